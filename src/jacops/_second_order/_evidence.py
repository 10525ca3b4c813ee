"""Evidence on nested derivatives, gathered in every call: one dense mixture of outputs, its slope alone in its graph.

Shared sweeps record the slopes of all outputs in one graph and pull them with unit cotangents. Some backwards are not
linear in a cotangent where others are zero (that of logcumsumexp takes its logarithm): what they return is then wrong
without an error. A single slope, of outputs mixed by weights that are all nonzero, meets no such zeros. Its
derivative has to be the same mixture of the derivatives that were computed, sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .._runtime.agreement import tolerance
from .._runtime.contexts import arithmetic, autocast_on, private_noise, sweeping
from .._runtime.kernels import norms_written_out
from .._runtime.restoring import restoring
from .._runtime.rows import dense, plain
from .._torch.protocol import RECORDED, JacobianFunction, Lost, Samples, pull_noting_losses
from ._common import FLOOR, Blocks, compared, matrices, typical
from ._differences import refuted

Recorded = tuple[list[Tensor], list[Tensor]]

# One sample of rounding noise may be smaller than another: normal ones differ by 30 once in about 50 scalars.
_NOISE = 30.0
# The mixture takes about as many sweeps as the call for one output and one input: a 32nd of that is 3 %.
_SHARE = 32
_ALONE = 8  # samples looked at where each was taken alone, with sweeps of its own for every output
_UNITS = 8  # rounding units by which weights change: all roundings differ, and a backward that is not linear hardly


@dataclass(frozen=True)
class Nest:
    """What is differentiated in a call: a function of the samples, `order` times.

    Attributes:
        samples: The model and the batch asked about.
        function: Innermost: takes tensors with a row per sample, returns the outputs.
        x: Its arguments.
        shapes: Those of one sample's part of every input that is differentiated by.
        rerun: Returns differentiable inputs and outputs for some samples, moved by a multiple of the rounding unit.
        slopes: The innermost Jacobian of the route that was taken.
        order: How often.
        along: There is one input, a number per sample, so that directions are ones.
        step: How far that input moves for differences.
    """

    samples: Samples
    function: Callable[..., Any]
    x: Any
    shapes: list[torch.Size]
    rerun: Callable[[slice, float], Recorded]
    slopes: JacobianFunction
    order: int
    along: bool
    step: float = 0.0

    @restoring
    def record(self, rows: slice, units: float = 0.0) -> Recorded:
        """Return differentiable inputs and outputs for some samples, whatever the caller's gradient mode is."""
        written = norms_written_out() if self.order > 2 else nullcontext()
        with arithmetic(True), written:
            return self.rerun(rows, units)


@dataclass(frozen=True)
class Doubt:
    """The evidence against derivatives.

    Attributes:
        reason: In words.
        contradicted: The numbers differ; otherwise only NaN or Inf was dropped on the way.
        rows: Samples that were looked at.
    """

    reason: str
    contradicted: bool
    rows: slice


def doubt(nest: Nest, blocks: Blocks) -> Doubt | None:
    """Return what refutes `blocks[output][input][input]`, each `(n, *out, *in, *in)`; None if nothing."""
    found = (_doubt_of(nest, blocks, rows, recorded) for rows, recorded in _recorded(nest))
    return next((d for d in found if d is not None), None)


def _doubt_of(nest: Nest, blocks: Blocks, rows: slice, recorded: Recorded) -> Doubt | None:
    leaves, outputs = recorded
    if nest.order == 2 and sum(o.numel() for o in outputs) == leaves[0].shape[0]:
        # It was one slope alone: there is nothing to compare.
        lost = _chain(nest, leaves, outputs, [torch.ones_like(o) for o in outputs])[1]
        return None if lost is None else Doubt(str(lost), False, rows)
    some = [
        [
            [matrices(b, left, right)[rows] for b, right in zip(row, leaves, strict=True)]
            for row, left in zip(grid, leaves, strict=True)
        ]
        for grid in blocks
    ]
    weights = [w.to(o.dtype).reshape(o.shape) for w, o in zip(_weights(some), outputs, strict=True)]
    found, lost = _chain(nest, leaves, outputs, weights)
    expected = _contracted(nest, some, weights, leaves)
    limit = tolerance([o.dtype for o in outputs] + ([torch.bfloat16] if autocast_on(outputs) else []))
    error, scale = compared(found, expected)
    if bool((error > limit * scale).any()) or not bool(error.isfinite().all()):
        # Where much cancels, rounding is larger than the result: the same with other roundings shows how large.
        leaves, outputs = nest.record(rows, 1.0)
        again, _ = _chain(nest, leaves, outputs, [w * (1 + _UNITS * torch.finfo(w.dtype).eps) for w in weights])
        noise, _ = compared(found, [part / (1 + _UNITS * torch.finfo(weights[0].dtype).eps) for part in again])
        if not bool((error <= limit * scale + _NOISE * noise).all()):
            worst = float((error / scale).nan_to_num(torch.inf).max())
            reason = f"shared sweeps and the slope of one mixture of the outputs disagree by {worst:.1e}"
            return Doubt(reason, True, rows)
    higher = _refuted_by_lower(nest, rows, weights, found) if nest.order > 2 else None
    if higher is not None:
        return Doubt(differs(higher), True, rows)
    return None if lost is None else Doubt(str(lost), False, rows)


def differs(error: float) -> str:
    """Return in words how far derivatives are from differences."""
    return f"the derivative and central differences of the one before disagree by {error:.1e}"


def losses(nest: Nest) -> Lost | None:
    """Return what became NaN or Inf in the derivative of one output entry of one sample, taken alone."""
    leaves, outputs = nest.record(slice(0, 1))
    for index, output in enumerate(outputs):
        if output.numel():
            seeds = [torch.zeros_like(o) for o in outputs]
            seeds[index].view(-1)[-1] = 1
            return _chain(nest, leaves, outputs, seeds)[1]
    return None


def _recorded(nest: Nest) -> Iterator[tuple[slice, Recorded]]:
    """Yield some samples with inputs and outputs whose graph is there: of the last sweep, or of a forward."""
    count, last = nest.samples.count, nest.slopes.recorded
    if last is not None:
        many = last[0][0].shape[0]
        yield slice(count - many, count), last
        if many == 1:  # samples were taken alone
            step = max(1, count // _ALONE)
            yield from ((slice(i, i + 1), nest.record(slice(i, i + 1))) for i in range(0, count - 1, step))
        return
    rows = slice(0, count, min(_SHARE, max(1, 2 * count // RECORDED)))
    try:
        recorded = nest.record(rows)
    except (RuntimeError, ValueError, TypeError, IndexError):  # a model may take some batch sizes only
        rows = slice(0, 1)
        recorded = nest.record(rows)
    yield rows, recorded


@restoring
def _chain(
    nest: Nest, leaves: Sequence[Tensor], outputs: Sequence[Tensor], seeds: list[Tensor], order: int | None = None
) -> tuple[list[Tensor], Lost | None]:
    """Differentiate `order` times, first along `seeds`, then along the directions."""
    current = list(outputs)
    for _ in range((order or nest.order) - 1):
        live = [(o, s) for o, s in zip(current, seeds, strict=True) if o.requires_grad]
        if not live:
            break
        starts, cotangents = [o for o, _ in live], [s for _, s in live]
        options = {"create_graph": True, "retain_graph": True, "allow_unused": True}
        with sweeping(starts[0]):
            grads = [dense(g) for g in torch.autograd.grad(starts, list(leaves), cotangents, **options)]
        current = [torch.zeros_like(leaf) if g is None else plain(g) for g, leaf in zip(grads, leaves, strict=True)]
        seeds = _directions(nest, leaves)
    return pull_noting_losses(current, leaves, seeds)


def _refuted_by_lower(nest: Nest, rows: slice, weights: list[Tensor], found: list[Tensor]) -> float | None:
    """Return how far a derivative of third order or more is from differences of the one before.

    Torch's tests compare the first two derivatives of its operations with differences, and no higher ones.
    """

    def difference(step: float) -> list[Tensor]:
        units = step / torch.finfo(found[0].dtype).eps
        (ahead,), (behind,) = (
            _chain(nest, *nest.record(rows, sign * units), weights, nest.order - 1)[0] for sign in (1, -1)
        )
        sizes.append(typical([ahead]))
        return [(ahead - behind) / (2 * step)]

    sizes: list[float] = []
    near = difference(nest.step)
    rounding = sizes[0] * torch.finfo(found[0].dtype).eps / nest.step
    if refuted(found, near, near, rounding) is None:
        return None
    return refuted(found, near, difference(2 * nest.step), rounding)


def _directions(nest: Nest, leaves: Sequence[Tensor]) -> list[Tensor]:
    if nest.along:
        return [torch.ones_like(leaf) for leaf in leaves]
    return [private_noise(leaf, seed=i) for i, leaf in enumerate(leaves)]


def _weights(some: Blocks) -> list[Tensor]:
    """Return a weight `(m, out)` for every output entry of every sample, larger where its derivatives are small."""
    sizes = [
        torch.stack([torch.linalg.vector_norm(_wide(b), dim=(0, 2, 3)) for row in grid for b in row]).sum(0)
        for grid in some
    ]
    sizes = [s.nan_to_num(0.0) for s in sizes]
    whole = max((float(s.max()) for s in sizes if s.numel()), default=0.0) or 1.0
    noise = [private_noise(_wide(grid[0][0][:, :, 0, 0]), seed=7 + i) for i, grid in enumerate(some)]
    return [n / (s / whole).clamp_min(FLOOR) for n, s in zip(noise, sizes, strict=True)]


def _contracted(nest: Nest, some: Blocks, weights: list[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return what the blocks say the mixture's derivative along the directions is, `(m, *in)` per input."""
    directions = _directions(nest, leaves)
    result = []
    for b, leaf in enumerate(leaves):
        total = torch.zeros_like(leaf)
        for grid, weight in zip(some, weights, strict=True):
            for row, direction in zip(grid, directions, strict=True):
                parts = [*(_wide(t).reshape(len(leaf), -1) for t in (weight, direction)), _wide(row[b])]
                kind = reduce(torch.promote_types, (part.dtype for part in parts))
                found = torch.einsum("no,na,noab->nb", *(part.to(kind) for part in parts))
                total += found.reshape(leaf.shape).to(total.dtype)
        result.append(total)
    return result


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
