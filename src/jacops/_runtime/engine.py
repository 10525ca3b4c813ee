"""Backward passes by torch's engine, without what `torch.autograd.grad` examines of its arguments first.

That examination takes 5 µs and 8 µs more for each output: a fifth of a product with the Hessian of a small model. The
first one of a process imports SymPy, which takes 0.25 s: as long as thousands of small fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

# None of these is public, and none is needed.
_engine: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)
# Axes of a batch: begin one, make the first axis of a tensor it, give it back, end it. `torch.autograd.grad` does this
# through a vmap that takes trees of arguments apart and joins them, a hundred calls in Python for one cotangent.
_begin: Any = getattr(torch._C, "_vmapmode_increment_nesting", None)
_add: Any = getattr(torch, "_add_batch_dim", None)
_remove: Any = getattr(torch, "_remove_batch_dim", None)
_end: Any = getattr(torch._C, "_vmapmode_decrement_nesting", None)
_batches = None not in (_begin, _add, _remove, _end)


def swept(
    outputs: Sequence[Tensor],
    targets: Sequence[Any],
    seeds: Sequence[Tensor],
    create_graph: bool = False,
    batched: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return what `torch.autograd.grad` gives, with the graph kept and None where no path leads to a target.

    Args:
        outputs: What is differentiated.
        targets: By what: tensors, or edges of the graph.
        seeds: A cotangent per output.
        create_graph: The result can be differentiated.
        batched: First axes of the cotangents count them.
    """
    outputs, targets, seeds = tuple(outputs), tuple(targets), tuple(seeds)
    known = _engine is not None and (_batches or not batched)
    if not known or has_torch_function(outputs + targets + seeds) or not _alike(outputs, seeds, int(batched)):
        options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
        return torch.autograd.grad(outputs, targets, seeds, is_grads_batched=batched, **options)
    if batched:
        return _swept_rows(outputs, targets, seeds, create_graph)
    run: Any = _engine
    return run(outputs, seeds, True, create_graph, targets, True, accumulate_grad=False)


def _swept_rows(
    outputs: tuple[Tensor, ...], targets: tuple[Any, ...], seeds: tuple[Any, ...], create_graph: bool
) -> tuple[Tensor | None, ...]:
    many, level = len(seeds[0]), _begin()
    try:
        rows = tuple([_add(seed, 0, level) for seed in seeds])
        found = _engine(outputs, rows, True, create_graph, targets, True, accumulate_grad=False)
        return tuple([None if part is None else _remove(part, level, many, 0) for part in found])
    finally:
        _end()


def _alike(outputs: Sequence[Tensor], seeds: Sequence[Tensor], axes: int) -> bool:
    rows = seeds[0].shape[:axes] if seeds else ()
    pairs = zip(outputs, seeds, strict=True)
    return len(rows) == axes and all([s.shape == rows + o.shape and o.dtype is s.dtype for o, s in pairs])
