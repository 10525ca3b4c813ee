"""Sweeps shared by all samples of a batch, written in place: by outputs, by inputs, whichever is measured cheaper."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError
from ..._runtime.rows import plain
from ..sweeps.linearization import Linearization

Blocks = list[list[Tensor]]

_PLAUSIBLE = 4.0
_WORTH_TIMING = 2e-2
_BLOCK = 2**16


def counts(lin: Linearization) -> tuple[int, int]:
    """Return how many entries a sample has in the outputs and in the inputs."""
    return sum(o.shape[1:].numel() for o in lin.outputs), sum(leaf.shape[1:].numel() for leaf in lin.leaves)


def sweep(lin: Linearization, blocks: Blocks, where: slice, mode: str = "auto", limit: int | None = None) -> str:
    """Fill `blocks[output][leaf][where]` and say how.

    Args:
        lin: A run over the samples `where`.
        blocks: Where Jacobians are written.
        where: Which samples.
        mode: `"reverse"` takes a pull per output entry, `"forward"` a push per input entry, `"auto"` what it measures
            to be cheaper where the numbers alone do not say so, `"by number"` whichever are fewer.
        limit: Stop after so many sweeps, to see what they take.
    """
    direction = mode if mode in ("reverse", "forward") else None
    if mode == "auto":
        direction = lin.trust.direction
    if mode == "auto" and limit is None and direction is None and close(*counts(lin)):
        return _timed(lin, blocks, where)
    direction = direction or _fewest(lin)
    if direction == "forward" and not lin.trust.refused("push", "dual"):
        try:
            _exhaust(_columns(lin, blocks, where), limit)
            return _said(lin, "forward")
        except RouteFailedError as reason:
            lin.trust.refuse("push", "dual")
            if mode == "forward" and limit is None:
                lin.leave("push", "by outputs, in reverse", reason)
    _exhaust(_rows(lin, blocks, where), limit)
    return _said(lin, "reverse")


def _fewest(lin: Linearization) -> str:
    rows, columns = counts(lin)
    return "forward" if columns + 1 < rows else "reverse"


def close(rows: int, columns: int) -> bool:
    """Say whether the numbers of sweeps are so near each other that their price decides."""
    return 0.5 * (columns + 1) < rows < _PLAUSIBLE * (columns + 1) and min(rows, columns) > 2


def _said(lin: Linearization, direction: str) -> str:
    rows, columns = counts(lin)
    priced = " (measured cheaper)" if lin.trust.direction is not None else ""
    return (f"forward, {columns} pushes" if direction == "forward" else f"reverse, {rows} pulls") + priced


def _exhaust(sweeps: Iterator[None], limit: int | None = None) -> None:
    for done, _ in enumerate(sweeps, 1):
        if limit is not None and done >= limit:
            return


def _timed(lin: Linearization, blocks: Blocks, where: slice) -> str:
    """Take the first sweeps in both directions, time them, and go on with the cheaper one.

    What the cheaper one did is kept. The first sweep of each also sets things up, so the second one counts.
    """
    first = _fewest(lin)
    ways = {"reverse": _rows(lin, blocks, where), "forward": _columns(lin, blocks, where)}
    many = dict(zip(ways, counts(lin), strict=True))
    alone = _second(ways[first])
    seconds = {first: alone}
    other = "reverse" if first == "forward" else "forward"
    if alone is not None and alone * many[first] < _WORTH_TIMING:
        _exhaust(ways[first])
        return _said(lin, first)
    if alone is None or not lin.trust.refused("push", "dual"):
        seconds[other] = _second(ways[other])
    if seconds.get("forward", 0.0) is None:
        lin.trust.refuse("push", "dual")
    price = {way: t * many[way] for way, t in seconds.items() if t is not None}
    best = min(price, key=lambda way: price[way])
    lin.trust.direction = best
    try:
        _exhaust(ways[best])
    except RouteFailedError:
        lin.trust.refuse("push", "dual")
        lin.trust.direction = best = "reverse"
        _exhaust(_rows(lin, blocks, where))
    return _said(lin, best)


def _second(sweeps: Iterator[None]) -> float | None:
    """Return the seconds of the second of two sweeps; None where there is no such route."""
    started = 0.0
    try:
        for _ in range(2):
            started = time.perf_counter()
            next(sweeps)
    except RouteFailedError:
        return None
    return time.perf_counter() - started


def _rows(lin: Linearization, blocks: Blocks, where: slice) -> Iterator[None]:
    for out, output in enumerate(lin.outputs):
        many, entries = output.shape[0], output.shape[1:].numel()
        seed = torch.zeros(many, entries, dtype=output.dtype, device=output.device)
        cotangents = [seed.view(output.shape) if i == out else None for i in range(len(lin.outputs))]
        pairs = zip(blocks[out], lin.leaves, strict=True)
        targets = [block[where].view(many, entries, *leaf.shape[1:]) for block, leaf in pairs]
        for entry in range(entries):
            seed[:, entry] = 1
            grads = lin.pull(cotangents)
            for target, grad in zip(targets, grads, strict=True):
                target[:, entry] = 0 if grad is None else plain(grad)
            seed[:, entry] = 0  # only now: a gradient may be the cotangent itself
            yield


def _columns(lin: Linearization, blocks: Blocks, where: slice) -> Iterator[None]:
    for j, leaf in enumerate(lin.leaves):
        tangents = [torch.zeros((1, *other.shape), dtype=other.dtype, device=other.device) for other in lin.leaves]
        flat = tangents[j].view(leaf.shape[0], leaf.shape[1:].numel())
        # Columns lie side by side until all are there: written one by one, each would touch every cache line.
        kinds = [(o.numel(), row[j].dtype, o.device) for o, row in zip(lin.outputs, blocks, strict=True)]
        staged = [torch.empty(flat.shape[1], size, dtype=dtype, device=device) for size, dtype, device in kinds]
        for entry in range(flat.shape[1]):
            flat[:, entry] = 1
            for columns, change in zip(staged, lin.push_alone(tangents), strict=True):
                columns[entry] = change[0].reshape(-1)
            flat[:, entry] = 0  # only now: a push may be the tangent itself
            yield
        for columns, row in zip(staged, blocks, strict=True):
            _write_transposed(row[j][where].view(columns.shape[1], columns.shape[0]), columns)


def _write_transposed(target: Tensor, columns: Tensor) -> None:
    for start in range(0, target.shape[0], _BLOCK):
        target[start : start + _BLOCK].copy_(columns[:, start : start + _BLOCK].T)
