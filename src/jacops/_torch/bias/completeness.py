"""Does `f(x) = J x + b` hold, and is `J` the slope of `f`: errors relative to the terms, and the bounds of rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._runtime.contexts import autocast_on
from .companions import wide
from .homogeneous import FEW, BiasParts, FollowedModel, Moved

_CURVED = 1e-4  # of a difference over twice d: more than what curvature makes of it where d is 2**-20 of x
_CANCELLED = 1e3  # how far several kinks at one point may cancel in a second difference; further in one of 1,000
_TERMS = 2.0**12  # roundings of its terms that a result may hold
_LEFT = 2.0**-10  # a tiny output may be what is left of terms 1,000 times as large, as a sample's other outputs are
_SEEDS = (0, 1, 2)  # directions; the least error counts, since kinks spoil one direction and seldom three


def exactness(*tensors: Tensor) -> float:
    """Return how far two computations of the same quantity may differ, relative to the sum of its terms' sizes.

    It is 1.5e-10 in double and 1e-4 in single precision: four times the power 2/3 of the precision, which is a million
    roundings of the one and a thousand of the other.
    """
    coarse = [torch.finfo(torch.bfloat16).eps] if autocast_on(tensors) else []
    return 4 * max([torch.finfo(t.dtype).eps for t in tensors] + coarse) ** (2 / 3)


@dataclass(frozen=True)
class Errors:
    """Relative errors of a check.

    Attributes:
        what: What fails where they are beyond their bound.
        relative: One per sample and output.
        bound: What rounding can make of it.
    """

    what: str
    relative: Tensor
    bound: float

    @property
    def holds(self) -> bool:
        """No error is beyond the bound, nor NaN."""
        return bool((self.relative <= self.bound).all())

    def __str__(self) -> str:
        known = torch.where(torch.isnan(self.relative), torch.inf, self.relative)
        row, out = divmod(int(known.argmax()), known.shape[1])
        return (
            f"{self.what} by {float(known.max()):.1e} of the terms in row {row}, output {out} (bound {self.bound:.0e})"
        )


def summed(jacobian: Tensor, basis: Tensor) -> Tensor:
    """Return `J x` in double precision, `(n, out)`."""
    return torch.bmm(_wide(jacobian).flatten(2), _wide(basis).flatten(1).unsqueeze(-1)).squeeze(-1)


def check_identity(parts: BiasParts, jacobian: Tensor, basis: Tensor, added: Tensor) -> Errors:
    """Return how far `f(x)` is from `J x + b`.

    Args:
        parts: `f(x)` and `b`.
        jacobian: By `basis`, `(n, out, *in)`.
        basis: What contributions are by: the point, or features that it is a linear map of.
        added: `J x`, see `summed`.
    """
    rows, entries = jacobian.detach().flatten(2), basis.detach().flatten(1).unsqueeze(-1)
    sizes = torch.bmm(rows.abs(), entries.abs()).squeeze(-1)  # in their own precision: a scale
    output = _wide(parts.output)
    error = (output - parts.bias - added).abs()
    sizes = output.abs() + parts.bias.abs() + sizes
    what = "output and features + bias differ"
    return Errors(what, _ratio(error, sizes), exactness(parts.output, jacobian, basis))


def check_slopes(forward: FollowedModel, x: Tensor, parts: BiasParts, jacobian: Tensor, checks: str) -> Errors:
    """Return how far `f(x + d) - f(x - d)` is from `2 J d` for small `d`, for some samples or all of them.

    Kinks between `x - d` and `x + d` show in the second difference. What they do to the first one is of its size,
    unless several of them meet at `x` and cancel, which they do not along three directions.
    """
    what = "the output's changes and the Jacobian differ"
    bound = max(exactness(parts.output, jacobian), _CURVED if parts.curved else 0.0)
    relative = torch.full(parts.output.shape, 0.0, dtype=parts.bias.dtype, device=parts.bias.device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rows = order[: len(x) if parts.moved or checks in ("always", "strict") else FEW].sort().values.to(x.device)
    for seed in _SEEDS if checks != "never" else ():
        first = parts.moved if seed == _SEEDS[0] else None
        errors = _slope_errors(first or forward.moved(x, rows, seed), jacobian[rows.to(jacobian.device)])
        relative[rows] = errors if seed == _SEEDS[0] else torch.minimum(relative[rows], errors)
        rows = rows[~(relative[rows] <= bound).all(1)]
        if not rows.numel():
            break
    return Errors(what, relative, bound)


def _slope_errors(found: Moved, jacobian: Tensor) -> Tensor:
    terms = _wide(jacobian).flatten(2) * found.move.flatten(1).unsqueeze(1)
    sizes = terms.abs().sum(-1)
    error = ((found.ahead - found.behind) / 2 - terms.sum(-1)).abs()
    kinks = _CANCELLED * (found.ahead - 2 * found.base + found.behind).abs()
    # An output that is tiny beside the sample's others may be what is left of terms of their size.
    scale = torch.maximum(found.base.abs(), _LEFT * found.base.abs().amax(1, keepdim=True))
    rounding = _TERMS * torch.finfo(found.base.dtype).eps * scale
    return _ratio((error - kinks - rounding).clamp_min(0), sizes)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(wide(tensor))


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    """Return error over size, where nothing in nothing is no error."""
    return torch.where(error != 0, error / size, 0)
