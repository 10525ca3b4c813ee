"""Sweeps over a graph through gathered parameters: plain reverse mode, and reverse over reverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .._finite import check_vector
from .._runtime.contexts import must_surface
from .._space import Space
from .._torch.protocol import OWN_FUNCTIONS, parents_first
from .._trees import Tree, leaves_for
from ..errors import ModelStateError, NotDifferentiableError, warn
from ._common import Grads


def pulled(
    call: str, tensors: Grads, by: Sequence[Tensor], cotangents: Grads | None = None, again: bool = False
) -> list[Tensor | None]:
    """Return the derivative of some tensors by others, along cotangents; nothing where no path leads.

    With `again` it can be differentiated again.

    Raises:
        NotDifferentiableError: Torch has no such derivative.
    """
    along = [None] * len(tensors) if cotangents is None else list(cotangents)
    pairs = [(t, u) for t, u in zip(tensors, along, strict=True) if t is not None and t.requires_grad]
    if not pairs:
        return [None] * len(by)
    if again:
        _refuse_functions(call, [t for t, _ in pairs])
    with explained():
        found = torch.autograd.grad(
            [t for t, _ in pairs], by, [u for _, u in pairs], create_graph=again, retain_graph=True, allow_unused=True
        )
    return list(found)


def pushed(call: str, outputs: Sequence[Tensor], leaves: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Return `J v`: the derivative of `J^T u` by `u` along the tangents."""
    us = [torch.zeros_like(output).requires_grad_() for output in outputs]
    slopes = pulled(call, outputs, leaves, us, again=True)
    if all(slope is None for slope in slopes):
        warn(f"{call}: no path leads from the output to any parameter; the derivative is zero everywhere.")
    rows = pulled(call, slopes, us, parts)
    return [torch.zeros_like(o) if row is None else row.detach() for o, row in zip(outputs, rows, strict=True)]


@contextmanager
def explained() -> Iterator[None]:
    """Translate torch's errors about sharded tensors and missing derivatives.

    Raises:
        ModelStateError: A parameter is used outside the module that gathers it.
        NotDifferentiableError: Torch has no such derivative.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "DTensor" in text and "mixed" in text:
            came = "using a parameter outside the module that holds it"
            todo = "Apply `fully_shard` to the module that uses it too, not to its parts alone."
            raise ModelStateError.of("model", came, "parameters are gathered for the forward of that", todo) from error
        if must_surface(error) or not any(word in text for word in _NO_DERIVATIVE):
            raise
        raise NotDifferentiableError(f"torch has no such derivative: {text}") from error


_NO_DERIVATIVE = ("derivative for", "once_differentiable", "use_reentrant", "not implemented", "does not require grad")


def _refuse_functions(call: str, tensors: Sequence[Tensor]) -> None:
    """Refuse custom autograd Functions in a graph that is differentiated again.

    Raises:
        NotDifferentiableError: There is one, whose second derivative torch may drop without a word.
    """
    nodes = parents_first([t.grad_fn for t in tensors if t.grad_fn is not None])
    custom = [type(n).__name__ for n in nodes if isinstance(n, BackwardCFunction) and not _is_known(n)]
    if custom:
        came = f"with the custom Function {custom[0].removesuffix('Backward')}"
        raise NotDifferentiableError.of("the graph", came, f"{call} cannot check its second derivative here")


def _is_known(node: Any) -> bool:
    """Return whether a Function is one that gathers or spreads: ours, or those of DTensors."""
    home = getattr(getattr(type(node), "_forward_cls", None), "__module__", "")
    return type(node).__name__ in OWN_FUNCTIONS or home.startswith("torch.distributed.")


def cotangents_of(outputs: Sequence[Tensor], tree: Tree, v: Any, call: str) -> list[Tensor]:
    space = Space.of(outputs, tree.names)
    found = [u.detach() for u in space.check(leaves_for(v, tree, "v"), "v")]
    check_vector(call, "v", found)
    return found
