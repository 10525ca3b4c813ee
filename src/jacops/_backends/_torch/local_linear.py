"""One operation near one point: its derivative along given directions, and whether it is linear around the point."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .surroundings import private_noise
from .tape import Tape

Operation = Callable[[Sequence[Tensor]], list[Tensor]]

# Moves relative to the values. At the first one a curvature of 1e-9 of the result is seen in double precision; the
# smaller ones pass fewer kinks, for results with many of them (a sum of 10,000 absolute values).
_MOVES = (2.0**-6, 2.0**-12, 2.0**-18)
_ROUNDING = 2.0**7  # in units of the precision: second differences of linear operations were seen to stay below 2**4
_VISIBLE = 8.0  # times that rounding
_SAME = 1e-2  # how equal two second differences across one kink are; across a curve they differ by a factor of four
_LEAST = 2.0**-10  # of a row's size: what entries that are zero or nearly so are moved by


def push_through(
    operation: Operation, points: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the results at `points` and, for each direction, the derivatives of all results along it.

    A push is the derivative of a backward pass by its cotangent; where a backward cannot be differentiated, it is made
    of backward passes, one per entry of the results.
    """
    # The hooks of a checkpoint around the operation must not see what is saved here.
    with torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
        leaves = [point.detach().requires_grad_() for point in points]
        results = operation(leaves)
        try:
            pushed = _by_double_backward(leaves, results, directions)
        except RuntimeError:
            pushed = [_by_rows(leaves, results, tangents) for tangents in directions]
    return [r.detach() for r in results], [[p.detach() for p in row] for row in pushed]


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _by_double_backward(
    leaves: Sequence[Tensor], results: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    live = [r for r in results if r.requires_grad]
    if not live:
        return [[torch.zeros_like(r) for r in results] for _ in directions]
    seeds = [private_noise(r, seed=i).requires_grad_() for i, r in enumerate(live)]
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
    inputs, outputs = ([f"{name} {i}" for i in range(len(of))] for name, of in (("input", leaves), ("output", results)))
    tape = Tape(leaves, results, leaf_names=inputs, output_names=outputs, call="contributions", fallback="silent")
    return [rows[0] for rows in tape.push_rows([t.unsqueeze(0) for t in tangents])]


def find_curved(operation: Operation, points: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    """Return, for every entry of every result, whether the operation is curved there rather than piecewise linear.

    All points move along one ray. A piecewise linear function has second differences of zero along it, up to the first
    kink; a single kink, however near, gives the same second difference at two lengths; a curve gives one that goes with
    the square of the length. A kink at the point itself is no matter, because the ray leaves on one side.
    """
    rays = [ray(point, seed=i) for i, point in enumerate(points)]
    open_ = [torch.isfinite(r) for r in results]
    before: list[Tensor] = []
    last = _MOVES[0]
    for move in _MOVES:
        probes = [operation([p + t * move * ray for p, ray in zip(points, rays, strict=True)]) for t in (0.25, 0.5, 1.0, 2.0)]
        seen = []
        for i, (result, *values) in enumerate(zip(results, *probes, strict=True)):
            near, middle, far, rounding = _second_differences(result, *values, move=move)
            flat = near <= rounding
            if before:  # only where a curve would still be seen
                flat &= before[i] * (move / last) ** 2 > _VISIBLE * rounding
            kink = ((far - middle).abs() <= _SAME * far) & (far > _VISIBLE * rounding)
            open_[i] = open_[i] & ~flat & ~kink
            seen.append(near)
        before, last = seen, move
        if not any(bool(o.any()) for o in open_):
            break
    return open_


def _second_differences(
    at_0: Tensor, at_quarter: Tensor, at_half: Tensor, at_1: Tensor, at_2: Tensor, *, move: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return second differences of three lengths, and what rounding makes of them."""
    near, middle, far = (
        (b - 2 * a + at_0).abs() for a, b in ((at_quarter, at_half), (at_half, at_1), (at_1, at_2))
    )
    # A change divided by the move is about as large as the terms that the result was summed from.
    terms = at_0.abs() + (at_2 - at_0).abs() / (2 * move)
    return near, middle, far, _ROUNDING * torch.finfo(terms.dtype).eps * terms


def ray(point: Tensor, seed: int = 0) -> Tensor:
    """Return a direction in which every finite entry moves, by about its own size."""
    noise = private_noise(point, seed=7 + seed)
    noise = noise.sgn() * (0.5 + noise.abs().clamp_max(1))
    sizes = torch.where(torch.isfinite(point), point, 0).abs()
    rows = sizes.reshape(sizes.shape[0], -1) if sizes.ndim and sizes.numel() else sizes.reshape(1, -1)
    typical = rows.square().mean(1).sqrt() if rows.numel() else rows.sum(1)
    typical = torch.where(typical > 0, typical, 1.0).reshape(-1, *[1] * max(0, sizes.ndim - 1))
    least = (_LEAST * typical).reshape(()) if sizes.ndim == 0 else _LEAST * typical
    return torch.where(torch.isfinite(point), noise * torch.maximum(sizes, least), 0)
