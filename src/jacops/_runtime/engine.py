"""Backward passes by torch's engine, without what `torch.autograd.grad` examines of its arguments first.

That examination takes 5 µs and 8 µs more for each output: a fifth of a product with the Hessian of a small model. The
first one of a process imports SymPy, which takes 0.25 s: as long as thousands of small fits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from operator import call
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from .restoring import Guard, restoring

# None of these is public, and none is needed. The last four are what `torch._vmap_internals._vmap` is made of, which
# takes 200 calls in Python around them, as long as the pass of a small model.
_engine: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)
_enter: Any = getattr(torch._C, "_vmapmode_increment_nesting", None)
_leave: Any = getattr(torch._C, "_vmapmode_decrement_nesting", None)
_batch: Any = getattr(torch, "_add_batch_dim", None)
_unbatch: Any = getattr(torch, "_remove_batch_dim", None)
_batches = None not in (_enter, _leave, _batch, _unbatch)
# The same of `torch.func.vmap`, which takes 57 µs around four tensors, and 14 µs so.
_functorch: Any = getattr(torch._C, "_functorch", None)
_func_enter: Any = getattr(_functorch, "_vmap_increment_nesting", None)
_func_leave: Any = getattr(_functorch, "_vmap_decrement_nesting", None)
_func_batch: Any = getattr(_functorch, "_add_batch_dim", None)
_func_unbatch: Any = getattr(_functorch, "_remove_batch_dim", None)
_load: Any = getattr(sys.modules.get("torch._functorch.vmap"), "lazy_load_decompositions", None)
_maps = None not in (_func_enter, _func_leave, _func_batch, _func_unbatch, _load)


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
    fitting = not has_torch_function(outputs + targets + seeds) and (fit or _alike(outputs, seeds, batched))
    if _engine is None or not fitting or (batched and not _batches):
        options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
        return torch.autograd.grad(outputs, targets, seeds, is_grads_batched=batched, **options)
    if batched:
        return _together(outputs, targets, seeds, create_graph)
    return _engine(outputs, seeds, True, create_graph, targets, True, accumulate_grad=False)


@restoring
def _together(
    outputs: tuple[Tensor, ...], targets: tuple[Any, ...], seeds: tuple[Tensor, ...], create_graph: bool
) -> tuple[Tensor | None, ...]:
    """Return gradients with an axis of cotangents first, as `torch._vmap_internals._vmap` does."""
    many = seeds[0].shape[0]
    with _Level(_enter, _leave, 0) as here:
        rows = tuple([_batch(seed, 0, here.level) for seed in seeds])
        found = _engine(outputs, rows, True, create_graph, targets, True, accumulate_grad=False)
        return tuple([None if grad is None else _unbatch(grad, here.level, many, 0) for grad in found])


@restoring
def mapped(function: Callable[..., Sequence[Tensor]], rows: Sequence[Tensor]) -> list[Tensor]:
    """Return what `torch.func.vmap(function)(*rows)` gives."""
    if not _maps:
        return list(torch.func.vmap(lambda *parts: tuple(function(*parts)))(*rows))
    _load()  # rules that are registered when they are first needed
    many = rows[0].shape[0]
    with _Level(partial(_func_enter, many, "error"), _func_leave, 1) as here:
        found = function(*[_func_batch(part, 0, here.level) for part in rows])
        return [_func_unbatch(part, here.level, many, 0) for part in found]


class _Level(Guard):
    """A level of torch's batching, which is left again.

    Args:
        enter: Enters a level and returns its number.
        leave: Leaves one and returns a number.
        shift: How much larger that is than the number of the level below.

    Attributes:
        level: Its number.
    """

    def __init__(self, enter: Callable[[], int], leave: Callable[[], int], shift: int) -> None:
        self._enter, self._leave, self._shift = enter, leave, shift

    def save(self) -> None:
        self.level: int
        self.level, _ = map(call, (self._enter, self._leave))  # one instruction: no interrupt comes between

    def change(self) -> None:
        self._enter()

    def restore(self) -> None:
        self._enter()
        while self._leave() >= self.level + self._shift:
            pass


def _alike(outputs: Sequence[Tensor], seeds: Sequence[Tensor], batched: bool) -> bool:
    """Return whether cotangents are of their outputs' shapes and dtypes, behind first axes of one length if batched."""
    counts = seeds[0].shape[:1] if batched and seeds else ()
    if len(counts) != batched:
        return False
    return all([(*counts, *o.shape) == s.shape and o.dtype is s.dtype for o, s in zip(outputs, seeds, strict=True)])
