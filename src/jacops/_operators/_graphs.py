"""Which operators keep the graph of their products, and copies of operators without a graph."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor

from .._torch.protocol import RowFactors
from ..errors import InputTypeError
from ._finite_results import parts_of

Made = TypeVar("Made")


def keeps_graph(operator: Any) -> bool:
    """Return whether products keep their graph: an operator was made with `create_graph=True`, or a part of it was."""
    return operator.create_graph or (operator.has_parts and any(map(keeps_graph, parts_of(operator))))


def has_graph(operator: Any) -> bool:
    """Return whether products are differentiable by something: they keep a graph, or a tensor inside requires grad."""
    tensors = (value for value in vars(operator).values() if isinstance(value, Tensor))
    held = operator.create_graph or any(tensor.requires_grad for tensor in tensors)
    return held or any(has_graph(part) for part in parts_of(operator))


def check_operator(operator: Any) -> None:
    """Refuse what is no operator.

    Raises:
        InputTypeError: It is none.
    """
    if not hasattr(operator, "_apply_transpose"):
        todo = "Wrap a tensor: `jacops.linalg.Matrix(tensor)`." if isinstance(operator, Tensor) else ""
        todo = "Take its `.hessian()` or `.ggn()`." if hasattr(operator, "hessian") else todo
        raise InputTypeError.of("operator", f"a {type(operator).__name__}", "an Operator is needed", todo)


def without_graph(operator: Made) -> Made:
    """Return an operator with the same entries of which nothing keeps a graph; itself where nothing does.

    Raises:
        InputTypeError: It is no operator.
    """
    check_operator(operator)
    return _detached(operator, {}) if has_graph(operator) else operator


def _detached(value: Any, known: dict[int, Any]) -> Any:
    """Return a copy without graph of an operator, or of something that it holds; the same copy for the same object."""
    if type(value) in (tuple, list):
        return type(value)(_detached(part, known) for part in value)
    if isinstance(value, Tensor):
        return value.detach()
    if not (hasattr(value, "_apply_transpose") or isinstance(value, RowFactors)):
        return value
    if id(value) not in known:
        known[id(value)] = twin = copy.copy(value)
        for name, part in vars(value).items():
            object.__setattr__(twin, name, False if name == "create_graph" else _detached(part, known))
    return known[id(value)]
