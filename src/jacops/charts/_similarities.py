"""Similarities of space: rotation, translation and scale.

The coefficients of the exponential are those of Strasdat, Local accuracy and global consistency for efficient visual
SLAM (PhD thesis, Imperial College, 2012), section 2.4, with the singularities taken out of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial
from typing import Any, final

import torch
from torch import Tensor

from ..errors import InputError
from ._angles import (
    SERIES_BELOW,
    conjugate,
    cosine,
    cross,
    dot,
    lengths,
    polynomial,
    product,
    quaternion_exp,
    quaternion_log,
    sinc,
    turned,
    versine,
)
from ._group import GroupChart
from ._groups import SO3, check_unit

_TERMS = 20  # for numbers up to 1 what is left out is below 1 / 21!, 2e-20


def _growth(sigma: Tensor) -> Tensor:
    """Return (e^s - 1) / s."""
    small = sigma.abs() < 1
    near = polynomial([1 / factorial(k + 1) for k in range(_TERMS)], torch.where(small, sigma, torch.zeros_like(sigma)))
    far = torch.where(small, torch.ones_like(sigma), sigma)
    return torch.where(small, near, far.expm1() / far)


def _near(sigma: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
    """Return `_coefficients` (the last two) as power series in z = s + i t, for |z| < 1.

    With q_k = Im z^k / t and r_k = (s^k - Re z^k) / t^2, which are polynomials in s and t^2, they are the sums of
    q_k / (k + 1)! and r_k / (k + 1)!.
    """
    p, q, r = torch.ones_like(sigma), torch.zeros_like(sigma), torch.zeros_like(sigma)
    first, second = q, r
    for k in range(1, _TERMS):
        shift = squared * q
        q, r, p = torch.addcmul(p, sigma, q), torch.addcmul(q, sigma, r), sigma * p - shift
        first = torch.add(first, q, alpha=1 / factorial(k + 1))
        second = torch.add(second, r, alpha=1 / factorial(k + 1))
    return first, second


def _coefficients(sigma: Tensor, squared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return c, a, b of the integral over u in [0, 1] of exp(u (s + hat)) = c + a hat + b hat^2.

    Args:
        sigma: The logarithm s of the scale.
        squared: The square of the angle t.
    """
    c, total = _growth(sigma), sigma * sigma + squared
    small = total < SERIES_BELOW
    zeros = torch.zeros_like(sigma)
    near = _near(torch.where(small, sigma, zeros), torch.where(small, squared, zeros))
    s, t = torch.where(small, zeros, sigma), torch.where(small, torch.ones_like(sigma), squared)
    scale, divisor = s.exp(), s * s + t
    a = (1 + scale * (s * sinc(t) - cosine(t))) / divisor
    b = (_growth(s) + scale * (s * versine(t) - sinc(t))) / divisor
    return c, torch.where(small, near[0], a), torch.where(small, near[1], b)


def _split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moved, q, scale = x.split([3, x.shape[-1] - 4, 1], -1)
    return moved, q, scale


@final
@dataclass(frozen=True, repr=False)
class _Sim3(GroupChart):
    def normalize(self, x: Tensor) -> Tensor:
        moved, q, scale = _split(x)
        return torch.cat([moved, SO3.normalize(q), scale], -1)

    def magnitudes(self, x: Tensor) -> Tensor:
        return torch.cat([lengths(x[..., :3], 3), torch.ones_like(x[..., :4])], -1)

    def check(self, x: Any, argument: str = "x") -> None:
        super().check(x, argument)
        check_unit(self.name, argument, x[..., 3:7])
        scale = x[..., 7].detach()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            wrong = int((~((scale > 0) & scale.isfinite())).reshape(-1).nonzero()[0])
            came = f"holding a scale of {float(scale.reshape(-1)[wrong]):.3g} (element {wrong})"
            raise InputError.of(argument, came, f"{self.name} needs positive scales")

    def storage_jacobian(self, x: Tensor) -> Tensor:
        move = torch.zeros(*x.shape, 7, dtype=x.dtype, device=x.device)
        eye = torch.eye(3, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 3, 3)
        moved, q, scale = _split(x)
        move[..., :3, :3] = eye
        move[..., :3, 3:6] = cross(eye, moved.unsqueeze(-2).expand_as(eye)).mT
        move[..., :3, 6] = moved
        move[..., 3:7, 3:6] = SO3.storage_jacobian(q)
        move[..., 7, 6:] = scale
        return move

    def _exp(self, d: Tensor) -> Tensor:
        step, turn, sigma = _split(d)
        c, a, b = _coefficients(sigma, dot(turn, turn))
        once = cross(turn, step)
        return torch.cat([c * step + a * once + b * cross(turn, once), quaternion_exp(turn), sigma.exp()], -1)

    def _log(self, x: Tensor) -> Tensor:
        """Invert c + a hat + b hat^2, whose eigenvalues are c and, twice, of squared size `size`."""
        moved, q, scale = _split(x)
        turn, sigma = quaternion_log(q), scale.log()
        squared = dot(turn, turn)
        c, a, b = _coefficients(sigma, squared)
        size = (c - b * squared) ** 2 + a * a * squared
        once = cross(turn, moved)
        rest = (a * a + b * b * squared - b * c) / c
        step = moved / c + (rest * cross(turn, once) - a * once) / size
        return torch.cat([step, turn, sigma], -1)

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        (moved, q, scale), (step, r, factor) = _split(a), _split(b)
        return torch.cat([moved + scale * turned(q, step), product(q, r), scale * factor], -1)

    def _inverse(self, x: Tensor) -> Tensor:
        moved, q, scale = _split(x)
        back = conjugate(q)
        return torch.cat([-turned(back, moved) / scale, back, 1 / scale], -1)

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        (moved, q, scale), (place, r, factor) = _split(a), _split(b)
        back = conjugate(q)
        return torch.cat([turned(back, place - moved) / scale, product(back, r), factor / scale], -1)

    def _act(self, x: Tensor, p: Tensor) -> Tensor:
        moved, q, scale = _split(x)
        return moved + scale * turned(q, p)


Sim3: GroupChart = _Sim3("Sim3", 8, 7, 3)
"""Similarities of space, stored as translation, unit quaternion and scale; tangent `(step, turn, log of scale)`."""
