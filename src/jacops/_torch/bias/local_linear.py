"""One operation near one point: its derivative along given directions, and whether it is linear around the point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..._finite import is_finite
from ..._runtime.restoring import restoring
from ..sweeps.linearization import Linearization

Operation = Callable[[Sequence[Tensor]], list[Tensor]]

# Moves relative to the values. The first one detects a curvature of 1e-9 of the result in double precision; the
# smaller ones pass fewer kinks, for results with many of them (a sum of 10,000 absolute values).
_MOVES = (2.0**-6, 2.0**-12, 2.0**-18)
_ROUNDING = 2.0**7  # in units of the precision: second differences of linear operations were seen to stay below 2**4
_VISIBLE = 8.0  # times that rounding
_SAME = 1e-2  # how equal two second differences across one kink are; across a curve they differ by a factor of four
_LEAST = 2.0**-10  # of a row's size: what entries that are zero or nearly so are moved by


@restoring
def push_through(
    operation: Operation, points: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the results at `points` and, for each direction, the derivatives of all results along it.

    A push is the derivative of a backward pass by its cotangent; where a backward cannot be differentiated, it is made
    of backward passes, one per entry of the results.
    """
    # What is saved here must not reach the hooks of a checkpoint around the operation.
    with torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
        leaves = [point.detach().requires_grad_() for point in points]
        results = operation(leaves)
        try:
            pushed = _by_double_backward(leaves, results, directions)
        except RuntimeError:
            pushed = [_by_rows(leaves, results, tangents) for tangents in directions]
    return [r.detach() for r in results], [[p.detach() for p in row] for row in pushed]


@restoring
def push_entrywise(operation: Operation, point: Tensor, direction: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return what `push_through` does for an operation on each entry alone, whose derivative is its own transpose."""
    with torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
        leaf = point.detach().requires_grad_()
        (result,) = operation([leaf])
        (pushed,) = torch.autograd.grad(result, leaf, direction)
    return [result.detach()], [pushed]


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _by_double_backward(
    leaves: Sequence[Tensor], results: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    live = [r for r in results if r.requires_grad]
    if not live:
        return [[torch.zeros_like(r) for r in results] for _ in directions]
    seeds = [torch.ones_like(r).requires_grad_() for r in live]
    grads = torch.autograd.grad(live, leaves, seeds, create_graph=True, allow_unused=True)
    if any(g is not None and not g.requires_grad and bool(g.any()) for g in grads):
        raise RuntimeError("a backward without derivative by its cotangent")
    pushed = []
    for tangents in directions:
        pairs = [(g, t) for g, t in zip(grads, tangents, strict=True) if g is not None and g.requires_grad]
        parts: Sequence[Tensor | None] = [None] * len(seeds)
        if pairs:
            moved = [t.expand(g.shape) for g, t in pairs]
            parts = torch.autograd.grad([g for g, _ in pairs], seeds, moved, retain_graph=True, allow_unused=True)
        each = iter(parts)
        row = [next(each) if r.requires_grad else None for r in results]
        pushed.append([torch.zeros_like(r) if p is None else p for r, p in zip(results, row, strict=True)])
    return pushed


def _by_rows(leaves: Sequence[Tensor], results: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    lin = Linearization(leaves, results, leaf_names="input", output_names="output", call="contributions")
    lin.fallback = "silent"
    return [rows[0] for rows in lin.push_rows([t.unsqueeze(0) for t in tangents])]


def find_curved(operation: Operation, points: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor] | None:
    """Return, for every entry of every result, whether the operation is curved there; None where it is nowhere.

    All points move along one ray. A piecewise linear function has second differences of zero along it, up to the first
    kink; a single kink, however near, gives the same second difference at two lengths; a curve gives one that goes with
    the square of the length. A kink at the point itself is no matter, because the ray leaves on one side.
    """
    rays = [ray(point, seed=i) for i, point in enumerate(points)]
    undecided: list[Tensor] = []
    before: list[Tensor] = []
    for move, last in zip(_MOVES, (math.inf, *_MOVES), strict=False):

        def at(length: float, move: float = move) -> list[Tensor]:
            return operation([p + length * move * r for p, r in zip(points, rays, strict=True)])

        quarter, half = at(0.25), at(0.5)
        nears = [_second_difference(*values) for values in zip(results, quarter, half, strict=True)]
        # A change divided by the move is about as large as the terms that the result was summed from.
        scales = [r.abs() + (b - r).abs() * (2 / move) for r, b in zip(results, half, strict=True)]
        roundings = [(_ROUNDING * torch.finfo(s.dtype).eps) * s for s in scales]
        undecided = _without_flat(undecided, before, nears, roundings, (move / last) ** 2)
        if any(bool(u.any()) for u in undecided):
            ends = zip(undecided, results, half, at(1.0), at(2.0), roundings, strict=True)
            undecided = [u & torch.isfinite(r) & ~_is_kink(r, a, b, c, tiny) for u, r, a, b, c, tiny in ends]
        if not any(bool(u.any()) for u in undecided):
            return None
        before = nears
    return undecided


def _second_difference(at_0: Tensor, at_1: Tensor, at_2: Tensor) -> Tensor:
    return (at_2 - 2 * at_1 + at_0).abs()


def _without_flat(
    undecided: Sequence[Tensor],
    before: Sequence[Tensor],
    nears: Sequence[Tensor],
    roundings: Sequence[Tensor],
    less: float,
) -> list[Tensor]:
    """Return what is still undecided: differences are more than rounding, or would be rounding for a curve too."""
    if not before:
        return [~(n <= r) for n, r in zip(nears, roundings, strict=True)]
    four = zip(undecided, before, nears, roundings, strict=True)
    return [u & ~((n <= r) & (b * less > _VISIBLE * r)) for u, b, n, r in four]


def _is_kink(at_0: Tensor, at_half: Tensor, at_1: Tensor, at_2: Tensor, rounding: Tensor) -> Tensor:
    middle, far = _second_difference(at_0, at_half, at_1), _second_difference(at_0, at_1, at_2)
    return ((far - middle).abs() <= _SAME * far) & (far > _VISIBLE * rounding)


def ray(point: Tensor, seed: int = 0) -> Tensor:
    """Return a direction in which every finite entry moves, by half to one and a half times its own size."""
    if not is_finite(point):
        point = torch.where(torch.isfinite(point), point, 0)
    sizes = point.abs()
    rows = sizes.reshape(sizes.shape[0], -1) if sizes.ndim and sizes.numel() else sizes.reshape(1, -1)
    typical = torch.linalg.vector_norm(rows, dim=1) / max(1, rows.shape[1]) ** 0.5
    typical = torch.where(typical > 0, typical, 1.0).reshape(-1, *[1] * max(0, sizes.ndim - 1))
    least = (_LEAST * typical).reshape(()) if sizes.ndim == 0 else _LEAST * typical
    return torch.maximum(sizes, least) * _factors(seed, point)


@lru_cache(maxsize=16)
def _table(seed: int) -> Tensor:
    """Return factors between 0.5 and 1.5 of either sign, as many as no array's row is a multiple of (a prime)."""
    generator = torch.Generator().manual_seed(7 + seed)
    sizes, signs = torch.rand(2, 65_537, generator=generator, dtype=torch.float64)
    return (0.5 + sizes) * torch.where(signs < 0.5, -1.0, 1.0)


def _factors(seed: int, like: Tensor) -> Tensor:
    """Return random factors shaped like a tensor: repeated, since to draw them all takes longer than what is done."""
    table = _table(seed)
    many = like.numel()
    drawn = table.repeat(-(-many // table.numel()))[:many] if many > table.numel() else table[:many]
    return drawn.reshape(like.shape).to(like.device, like.real.dtype)
