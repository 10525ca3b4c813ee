"""Selections of what is computed row by row from parameters: computed again from selections of the parameters.

`f(p)[i]` is `f(p[i])` where f treats rows by themselves, and the second form reads leaves of its own. Only operations
that torch tags as pointwise, and some that go along the last axis, are taken for such f; what comes of it must have the
values that the first form has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .._runtime.agreement import few_operations_tolerance
from .._runtime.side_effects import tensors_in

_OPERATORS = {"truediv": "div", "rtruediv": "div", "rdiv": "div", "radd": "add", "rmul": "mul", "rpow": "pow",
              "rsub": "sub"}  # fmt: skip
_BY_POSITION = {"sum", "mean", "softmax", "log_softmax", "cumsum", "cat", "stack", "logsumexp", "amax", "amin"}
_BY_NAME = _BY_POSITION | {"norm", "linalg_norm", "linalg_vector_norm"}
Select = Callable[[Tensor, Any], Tensor | None]


@dataclass(frozen=True, eq=False)
class _RowsComputed:
    """How a tensor was computed.

    Attributes:
        out: The tensor.
        run: The function.
        args: What it was given by position.
        kwargs: What it was given by name.
        versions: How often the memory of these tensors, and of the result, had been written.
    """

    out: Tensor
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]

    @property
    def given(self) -> list[Tensor]:
        return tensors_in((self.args, self.kwargs))

    @property
    def untouched(self) -> bool:
        return self.versions == _versions(self.out, self.given)


class Replay:
    """Notes how tensors are computed row by row, and computes rows of them again.

    Args:
        select: Returns rows of a parameter as a leaf, None for what is none.
    """

    def __init__(self, select: Select) -> None:
        self._select = select
        self._steps: dict[int, _RowsComputed] = {}

    def note(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note a call, if it treats rows by themselves."""
        if isinstance(out, Tensor) and out.requires_grad and _is_by_rows(run.__name__, args, kwargs, out):
            given = tensors_in((args, kwargs))
            if not any(out is t for t in given):
                self._steps[id(out)] = _RowsComputed(out, run, args, kwargs, _versions(out, given))

    def selected(self, name: str, args: tuple[Any, ...]) -> Tensor | None:
        """Return what a selection gives, computed from rows of parameters; None where that is not possible."""
        if name == "index_select" and len(args) == 3 and args[1] == 0:
            return self._rows(args[0], args[2])
        if name != "__getitem__":
            return None
        value, index = args[0], args[1]
        if not isinstance(index, tuple) or not index or not isinstance(index[0], Tensor):
            return self._rows(value, index)
        first, rest = index[0], index[1:]
        if not all(isinstance(k, int | slice) or k is Ellipsis for k in rest):
            return None
        found = self._rows(value, first)
        return None if found is None else found[(slice(None),) * first.ndim + rest]

    def _rows(self, value: Any, index: Any) -> Tensor | None:
        known = isinstance(value, Tensor) and id(value) in self._steps
        if not known or value.ndim == 0 or not isinstance(index, Tensor | slice):
            return None
        if isinstance(index, Tensor) and index.dtype not in (torch.int64, torch.int32, torch.bool):
            return None
        if isinstance(index, Tensor) and index.dtype is torch.bool and index.ndim != 1:
            return None
        right = value.detach()[index]
        found = self._computed(value, index, value.shape[0])
        if found is None or found.shape != right.shape or found.dtype != right.dtype:
            return None
        near = few_operations_tolerance(right.dtype)
        return found if torch.allclose(found.detach(), right, rtol=near, atol=0.0, equal_nan=True) else None

    def _computed(self, value: Tensor, index: Any, count: int) -> Tensor | None:
        step = self._steps.get(id(value))
        if step is None or not step.untouched:
            return None
        rank = max((t.ndim for t in step.given), default=0)
        missing = False

        def chosen(given: Any) -> Any:
            nonlocal missing
            if not isinstance(given, Tensor) or given.ndim < rank:
                return given  # it is the same for every row
            if given.shape[0] != count:
                missing = True
                return given
            found = self._select(given, index) if given.requires_grad else given[index]
            found = self._computed(given, index, count) if found is None else found
            missing = missing or found is None
            return found

        args, kwargs = tree_map(chosen, step.args), tree_map(chosen, step.kwargs)
        return None if missing else step.run(*args, **kwargs)


def _versions(out: Tensor, given: list[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in (out, *given)]


def _is_by_rows(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
    if kwargs.get("out") is not None or (name.endswith("_") and not name.endswith("__")):
        return False
    if _is_pointwise(name) or (name == "where" and len(args) == 3):
        return True
    first = args[0] if args else None
    ranks = {t.ndim for t in tensors_in((first,))}
    if len(ranks) != 1 or min(ranks) < 2:
        return False
    if name == "linalg_cross":
        return kwargs.get("dim", -1) == -1
    if name == "normalize":
        return kwargs.get("dim", 1) in (-1, min(ranks) - 1) and len(args) == 1
    if name == "__getitem__":
        index = args[1]
        return isinstance(index, tuple) and index[:1] == (Ellipsis,) and len(index) == 2 and isinstance(index[1], slice)
    by_position = name in _BY_POSITION and len(args) > 1 and args[1] == -1
    return by_position or (name in _BY_NAME and len(args) == 1 and kwargs.get("dim") == -1)


@cache
def _is_pointwise(name: str) -> bool:
    """Return whether torch tags an operation as pointwise, by the name of its function or operator."""
    plain = name.strip("_") if name.startswith("__") else name
    packet = getattr(torch.ops.aten, _OPERATORS.get(plain, plain), None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    kinds = [getattr(packet, kind) for kind in packet.overloads()]
    of_tensors = [k for k in kinds if k._schema.arguments[:1] and str(k._schema.arguments[0].type) == "Tensor"]
    run = [k for k in of_tensors if not k._schema.is_mutable]
    return bool(run) and all(torch.Tag.pointwise in k.tags for k in run)
