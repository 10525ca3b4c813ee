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

# Neither is public, and neither is needed.
_engine: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)
_vmap: Any = getattr(getattr(torch, "_vmap_internals", None), "_vmap", None)


def swept(
    outputs: Sequence[Tensor],
    targets: Sequence[Any],
    seeds: Sequence[Tensor],
    create_graph: bool = False,
    batched: bool = False,
    fit: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return what `torch.autograd.grad` gives, with the graph kept and None where no path leads to a target.

    Args:
        outputs: What is differentiated.
        targets: By what: tensors, or edges of the graph.
        seeds: A cotangent per output.
        create_graph: The result can be differentiated.
        batched: First axes of the cotangents count them.
        fit: The cotangents are made for these outputs, so that they are not compared with them.
    """
    outputs, targets, seeds = tuple(outputs), tuple(targets), tuple(seeds)
    known = (_vmap is not None or not batched) and not has_torch_function(outputs + targets + seeds)
    if _engine is None or not known or not (fit or _alike(outputs, seeds, int(batched))):
        options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
        return torch.autograd.grad(outputs, targets, seeds, is_grads_batched=batched, **options)

    if not batched:
        return _engine(outputs, seeds, True, create_graph, targets, True, accumulate_grad=False)

    def swept_once(seeds: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        return _engine(outputs, seeds, True, create_graph, targets, True, accumulate_grad=False)

    together: Any = _vmap
    return together(swept_once, 0, 0, allow_none_pass_through=True)(seeds)


def _alike(outputs: Sequence[Tensor], seeds: Sequence[Tensor], axes: int) -> bool:
    return all(o.shape == s.shape[axes:] and o.dtype is s.dtype for o, s in zip(outputs, seeds, strict=True))
