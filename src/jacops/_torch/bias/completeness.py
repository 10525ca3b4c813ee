"""Does `f(x) = J x + b` hold, and is `J` the slope of `f`: errors relative to the terms, and the bounds of rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._runtime.agreement import coarsest
from .companions import wide
from .homogeneous import BiasParts, Moved

FEW = 8  # samples whose slopes are compared: a wrong derivative of an operation shows in any of them
_CURVED = 1e-4  # of a difference over twice d: more than what curvature makes of it where d is 2**-20 of x
_CANCELLED = 1e3  # how far several kinks at one point may cancel in a second difference; further in one of 1,000
_TERMS = 2.0**12  # roundings of its terms that a result may hold
_LEFT = 2.0**-10  # a tiny output may be what is left of terms 1,000 times as large, as a sample's other outputs are
_TEMPORARY = 2**18  # entries of temporaries: 2 MiB in double precision, which caches hold
_SEEDS = (0, 1, 2)  # directions; the least error counts, since kinks affect one direction and rarely three


def exactness(output: Tensor, parts: BiasParts) -> float:
    """Return how far two computations of an output may differ, relative to the sum of its terms' sizes.

    It is 1.5e-10 in double and 1e-4 in single precision: four times the power 2/3 of the precision, which is a million
    roundings of the one and a thousand of the other. Of several dtypes that the forward computed in the coarsest
    counts.
    """
    dtypes = output.dtype, parts.coarse, *(point.dtype for point in parts.points)
    return 4 * torch.finfo(coarsest(dtypes) or output.dtype).eps ** (2 / 3)


@dataclass(frozen=True)
class Errors:
    """Relative errors of a check of one output.

    Attributes:
        what: What fails where they are beyond their bound.
        name: Of the output.
        relative: One per sample and number of the output, `(n, *out)`.
        bound: What rounding can make of it.
    """

    what: str
    name: str
    relative: Tensor
    bound: float

    @property
    def holds(self) -> bool:
        """No error is beyond the bound, nor NaN."""
        return bool((self.relative <= self.bound).all())

    @property
    def largest(self) -> float:
        """The largest error; 0 where there are no samples."""
        return float(self.relative.max()) if self.relative.numel() else 0.0

    @property
    def beyond(self) -> float:
        """The largest error in units of its bound, NaN as inf."""
        return float(self._known.max()) / self.bound if self.relative.numel() else 0.0

    @property
    def _known(self) -> Tensor:
        return torch.where(torch.isnan(self.relative), torch.inf, self.relative)

    def __str__(self) -> str:
        known = self._known
        row, *place = (int(i) for i in torch.unravel_index(known.argmax(), known.shape))
        where = f" {place[0] if len(place) == 1 else tuple(place)}" if place else ""
        size = f"{float(known.max()):.1e} of the terms"
        return f"{self.what} by {size} in row {row}, {self.name}{where} (bound {self.bound:.0e})"


@dataclass(frozen=True)
class Terms:
    """What features add to one output.

    Attributes:
        values: `J[n, o, f] * x[n, f]`, one tensor `(n, *out, *in)` per input.
        added: Their sum over all features, in double precision, `(n, *out)`.
        sizes: The sum of their absolute values: a scale, in their own precision.
    """

    values: list[Tensor]
    added: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, output: Tensor, blocks: Sequence[Tensor], bases: Sequence[Tensor]) -> Terms:
        """Return the terms of an output.

        Args:
            output: `(n, *out)`.
            blocks: Its Jacobians, one `(n, *out, *in)` per input.
            bases: What contributions are by, one `(n, *in)` per input: points, or features that they are linear in.
        """
        values, added = [], torch.zeros(output.shape, dtype=wide(output), device=output.device)
        sizes = torch.zeros(output.shape, dtype=_at_least_single(output.dtype), device=output.device)
        for block, basis in zip(blocks, bases, strict=True):
            value, factors = torch.empty_like(block), _aligned(basis.to(block.dtype), output)
            step = max(1, _TEMPORARY // max(1, block.shape[1:].numel()))
            for some in (slice(start, start + step) for start in range(0, len(block), step)):
                torch.mul(block[some], factors[some], out=value[some])
                flat = _flat(value[some], output[some])
                added[some] += flat.sum(-1, dtype=added.dtype)
                sizes[some] += flat.abs().sum(-1, dtype=sizes.dtype)  # five times faster than the same norm
            values.append(value)
        return cls(values, added, sizes)


def check_identity(parts: BiasParts, names: Sequence[str], terms: Sequence[Terms]) -> list[Errors]:
    """Return how far `f(x)` is from `J x + b`, output by output."""
    found = []
    for name, output, bias, of in zip(names, parts.outputs, parts.bias, terms, strict=True):
        error = (_wide(output) - _wide(bias) - of.added).abs()
        sizes = _wide(output).abs() + bias.abs() + of.sizes
        bound = exactness(output, parts)
        found.append(Errors("output and features + bias differ", name, _ratio(error, sizes), bound))
    return found


def check_slopes(
    moved: Callable[[Tensor, int], Moved | None],
    parts: BiasParts,
    names: Sequence[str],
    blocks: Sequence[Sequence[Tensor]],
    checks: str,
) -> list[Errors]:
    """Return how far `f(x + d) - f(x - d)` is from `2 J d` for small `d`, for some samples or all of them.

    Kinks between `x - d` and `x + d` show in the second difference. What they do to the first one is of its size,
    unless several of them meet at `x` and cancel, which they do not along three directions.

    Args:
        moved: Returns the outputs around some samples, along a random direction of a seed.
        parts: Outputs and bias parts.
        names: Of the outputs.
        blocks: Jacobians, `J[output][input]`.
        checks: `"always"` compares slopes for all samples, `"never"` for none.
    """
    bounds = [max(exactness(o, parts), _CURVED if parts.curved else 0.0) for o in parts.outputs]
    relative = [torch.zeros(o.shape, dtype=wide(o), device=o.device) for o in parts.outputs]
    count = parts.outputs[0].shape[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    rows = order[: count if parts.moved or checks in ("always", "strict") else FEW].sort().values
    rows = rows.to(parts.outputs[0].device)
    for seed in _SEEDS if checks != "never" else ():
        around = parts.moved if parts.moved and seed == _SEEDS[0] else moved(rows, seed) if rows.numel() else None
        if around is None:
            break
        bad = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for number, of in enumerate(blocks):
            some = of if len(rows) == count else [block[rows.to(block.device)] for block in of]
            errors = _slope_errors(around, number, some)
            errors = errors if seed == _SEEDS[0] else torch.minimum(relative[number][rows], errors)
            relative[number][rows] = errors
            bad |= (~(errors <= bounds[number])).reshape(len(rows), -1).any(1)
        rows = rows[bad]
    what = "the output's changes and the Jacobian differ"
    return [Errors(what, name, of, bound) for name, of, bound in zip(names, relative, bounds, strict=True)]


def _slope_errors(around: Moved, number: int, blocks: Sequence[Tensor]) -> Tensor:
    """Return the relative errors of some samples' slopes of one output."""
    base, ahead, behind = (of[number] for of in (around.base, around.ahead, around.behind))
    pairs = zip(blocks, around.move, strict=True)
    terms = torch.cat([_flat(_wide(block) * _aligned(move, base), base) for block, move in pairs], -1)
    total, sizes = terms.sum(-1), terms.abs().sum(-1)
    error = ((ahead - behind) / 2 - total).abs()
    kinks = _CANCELLED * (ahead - 2 * base + behind).abs()
    # An output that is tiny beside the sample's others may be the remainder of terms of their size.
    others = torch.linalg.vector_norm(base.reshape(len(base), -1), torch.inf, 1) if base.numel() else base
    scale = torch.maximum(base.abs(), _LEFT * others.reshape(-1, *[1] * (base.ndim - 1)))
    rounding = _TERMS * torch.finfo(base.dtype).eps * scale
    return _ratio((error - kinks - rounding).clamp_min(0), sizes)


def _aligned(basis: Tensor, output: Tensor) -> Tensor:
    """Return `(n, *in)` as `(n, 1, ..., *in)`, to be multiplied with Jacobians of an output."""
    return basis.reshape(len(basis), *[1] * (output.ndim - 1), *basis.shape[1:])


def _flat(terms: Tensor, output: Tensor) -> Tensor:
    """Return `(n, *out, *in)` with the features on one axis."""
    return terms.reshape(*output.shape, terms.shape[output.ndim :].numel())


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(wide(tensor))


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    """Return error over size, where nothing in nothing is no error."""
    return torch.where(error != 0, error / size, 0)
