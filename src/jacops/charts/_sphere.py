"""Directions in space: a chart that is no group."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Any, final

import torch
from torch import Tensor

from ._angles import angle_per_length, cosine, dot, sinc
from ._base import Chart
from ._groups import check_unit


@final
@dataclass(frozen=True, repr=False)
class _S2(Chart):
    def normalize(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def magnitudes(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[..., 1:])

    def check(self, x: Any, argument: str = "x") -> None:
        super().check(x, argument)
        check_unit(self.name, argument, x, "vector")

    def storage_jacobian(self, x: Tensor) -> Tensor:
        """Return an orthonormal basis of the tangent plane, by Duff et al., Building an orthonormal basis, revisited.

        J. Comput. Graph. Tech. 6 (2017). It jumps where z changes its sign, as any basis must jump somewhere.
        """
        p, q, z = x.unbind(-1)
        sign = torch.copysign(torch.ones_like(z), z.detach())
        a = -1 / (sign + z)
        first = torch.stack([1 + sign * p * p * a, sign * p * q * a, -sign * p], -1)
        return torch.stack([first, torch.stack([p * q * a, sign + q * q * a, -q], -1)], -1)

    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        """Return the ends of great circles that start at `x` along `d`, whose length is the angle in radians."""
        self._check(x=x)
        self._check_like(x, d=d, width=2)
        squared = dot(d, d)
        step = (self.storage_jacobian(x) * d.unsqueeze(-2)).sum(-1)
        return self.normalize(cosine(squared) * x + sinc(squared) * step)

    def local(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the shortest steps that lead from `x` to `y`; to the opposite point one of them, of length pi."""
        self._check(x=x, y=y)
        step = (self.storage_jacobian(x) * y.unsqueeze(-1)).sum(-2)
        squared, along = dot(step, step), dot(x, y)
        opposite = torch.tensor([pi, 0.0], dtype=x.dtype, device=x.device)
        return torch.where((squared == 0) & (along < 0), opposite, step * angle_per_length(squared, along))


S2: Chart = _S2("S2", 3, 2)
"""Directions in space, stored as unit vectors; tangent: coordinates in a basis of the tangent plane, in radians."""
