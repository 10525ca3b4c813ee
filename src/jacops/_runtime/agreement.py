"""When do two routes agree? One tolerance per dtype, and sizes measured so that noise in a tiny part is no alarm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Some thousand roundings, room for deep nets; a wrong route is off by a share of 1.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
# As many for results of a few operations, of which no long sum is rounded.
_FEW_OPERATIONS = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 8e-2  # ten roundings of bfloat16 (2**-7 each), since sums are rounded at every layer
# Central differences with a step of eps ** (1/3) are good to eps ** (2/3) of the size of third derivatives; the rest is
# room for those.
_DIFFERENCES = {torch.float64: 1e-4, torch.float32: 2e-3}
# Share of all parts' size that a part is measured by at least: parts that are zero hold rounding of the rest.
_FLOOR = 1e-2
SQUARES = 1e-15  # norms whose squares, and those of entries far below, float32 can hold


def tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """Return how far two right answers in these dtypes may differ, relative to their size."""
    real = [d.to_real() if d.is_complex else d for d in set(dtypes)]
    return max((_TOLERANCE.get(d, _COARSE) for d in real), default=_COARSE)


def coarsest(dtypes: Iterable[torch.dtype | None]) -> torch.dtype | None:
    """Return the dtype of floating point with the fewest digits; None where there is none."""
    return max((d for d in dtypes if d is not None and d.is_floating_point), key=_spacing, default=None)


def _spacing(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def few_operations_tolerance(dtype: torch.dtype, coarse: float = 1e-2) -> float:
    """Return how far two right results of a few operations may differ; `coarse` is for less precise dtypes."""
    return _FEW_OPERATIONS.get(dtype, coarse)


def residual_tolerance(dtype: torch.dtype) -> float:
    """Return the relative residual that solvers and eigensolvers stop at by default."""
    return 1e-8 if dtype == torch.float64 else 1e-4  # some square roots of a rounding: what refinement does reach


def difference_tolerance(dtype: torch.dtype) -> float:
    """Return how far a right derivative and a central difference may differ, relative to their size."""
    return _DIFFERENCES.get(dtype, 0.5)


def size(tensor: Tensor) -> float:
    """Return the Euclidean norm as a number, at any scale: squares neither overflow nor underflow."""
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    quick = float(torch.linalg.vector_norm(wide))
    if SQUARES < quick < 1 / SQUARES or wide.numel() == 0:
        return quick
    largest = float(torch.linalg.vector_norm(wide, math.inf))
    if not 0 < largest < math.inf:
        return largest
    return largest * float(torch.linalg.vector_norm(wide / largest))


def identical(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same numbers in the same shape, dtype and place; NaN is the same as NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124 - NaN equals NaN here


def worst_disagreement(pairs: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float] | None = None) -> float:
    """Return the largest relative distance over pairs of tensors.

    Each pair is measured by its own size and a hundredth of the size of all of them together: parts that are
    mathematically zero hold only rounding of the rest. NaN anywhere gives NaN.
    """
    sizes = list(scales) if scales is not None else [max(size(a), size(b)) for a, b in pairs]
    floor = _FLOOR * math.sqrt(sum(s * s for s in sizes))
    worst = 0.0
    for (a, b), own in zip(pairs, sizes, strict=True):
        distance = size(a.detach() - b.detach())
        if not math.isfinite(distance):
            return math.nan
        worst = max(worst, distance / (own + floor) if own + floor else 0.0)
    return worst


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the real inner products of rows: a `(*shape)` with b `(k, *shape)` gives `(k,)`."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    # A product of a matrix and a vector: a sum in another dtype would copy what it sums.
    return torch.mv(as_rows(b.detach()).to(wide), a.detach().to(wide).reshape(-1).conj()).real.to(torch.float64)


def as_rows(tensor: Tensor) -> Tensor:
    """Return `(k, …)` as `(k, entries)`, also where there are none."""
    bare = tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)  # a LieTensor minds its shape
    return bare.reshape(bare.shape[0], bare.shape[1:].numel())
