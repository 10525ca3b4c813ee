"""A call of a function of torch, as a mode receives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function of torch.

    Attributes:
        func: The function.
        name: Its name, without underscores.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        gates: By how much tensors are gates.
    """

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    gates: WeakIdKeyDictionary

    def run(self) -> Any:
        """Return what the function gives."""
        return self.func(*self.args, **self.kwargs)

    @property
    def in_place(self) -> bool:
        """Whether it writes into its first argument."""
        name = self.func.__name__
        return name.endswith("_") and not name.endswith("__")

    @property
    def first(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else self.kwargs.get("input", self.kwargs.get("self"))

    def on(self, *first: Any) -> Any:
        """Return what it gives for other leading arguments, never in place."""
        rest = {k: v for k, v in self.kwargs.items() if self.args or k not in ("input", "self")}
        return out_of_place(self.func)(*first, *self.args[len(first) :], **rest)

    def gate(self, tensor: Tensor) -> int:
        """Return by how much a tensor is a gate."""
        return self.gates.get(tensor) or 0


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a function of torch; in place and as an operator it has the same one."""
    name = getattr(func, "__name__", "")
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name.removesuffix("_")


def out_of_place(func: Callable[..., Any]) -> Callable[..., Any]:
    name = func.__name__
    if not name.endswith("_") or name.endswith("__"):
        return func
    homes = (torch._C._nn, torch, torch.Tensor)  # pyright: ignore[reportAttributeAccessIssue]
    return next(getattr(home, name[:-1]) for home in homes if hasattr(home, name[:-1]))


def dependent(value: Any) -> list[Tensor]:
    """Return the tensors in a value that depend on what is differentiated by: no parameter of a replica does."""
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.requires_grad]


def opened(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a function of `torch.nn.functional` as one that shows a mode what it calls; None for all others.

    Such a function, multi-head attention above all, hands itself to a mode as a whole, and what it then calls is out of
    the mode. The copy has the same code, and no mode applies to it.
    """
    # Those that choose between two others by a flag are made elsewhere, and return themselves when unwrapped.
    if not isinstance(func, FunctionType) or func.__globals__ is not vars(torch.nn.functional):
        return None
    asked = (name for name in func.__globals__ if name.startswith("has_torch_function"))
    seen = func.__globals__ | {name: _nobody for name in asked}
    copy = FunctionType(func.__code__, seen, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _nobody(*_: Any) -> bool:
    return False
