"""Lifting: a pure selection of a parameter (`p[i]`, a slice, a view, an embedding) becomes a leaf of its own.

Rows of what is computed row by row from parameters are computed from such leaves.

Then `J = sum_k J_k S_k`, where `S_k` maps each entry of leaf k to the entry that it is a copy of. In residual models
every residual reads its own copies, so `J_k` is block diagonal and takes as many sweeps as a residual has rows, however
many parameters and residuals there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._runtime.restoring import restoring
from .._runtime.rows import plain
from ._replay import Replay
from ._taint import storage_key

_SELECTIONS = set(
    """
    __getitem__ index_select gather take take_along_dim roll flip narrow select unbind split chunk tensor_split
    split_with_sizes expand expand_as broadcast_to repeat tile repeat_interleave view reshape flatten unflatten
    transpose permute movedim swapaxes swapdims squeeze unsqueeze diagonal unfold masked_select ravel contiguous clone
    embedding
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Selection:
    """A leaf that copies entries of a parameter.

    Attributes:
        source: Number of the parameter.
        positions: Which of its entries each entry of the leaf is, flat.
        leaf: The copy.
        version: How often its memory had been written when it was made.
    """

    source: int
    positions: Tensor
    leaf: Tensor
    version: int

    @property
    def untouched(self) -> bool:
        """Whether nobody wrote into it since."""
        return self.leaf._version == self.version


class Lift(TorchFunctionMode):
    """A mode in which selections of parameters come back as leaves.

    Args:
        sources: The parameters; copies that share their memory are known by it.
        replay: Whether rows of what is computed from parameters are lifted too.

    Attributes:
        selections: What was lifted, in order.
        replayed: Whether some of them are rows of what is computed.
    """

    def __init__(self, sources: Iterable[Tensor], replay: bool = True) -> None:
        super().__init__()
        self._sources = list(sources)
        self._roots = {_place(t): i for i, t in enumerate(self._sources)}
        self._known: dict[int, tuple[int, Tensor]] = {}
        self.selections: list[Selection] = []
        self.replayed = False
        self._replay = Replay(self._rows) if replay else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        replay = self._replay
        if replay is not None and (rows := _computed_rows(replay, name, args, kwargs)) is not None:
            self.replayed = True
            return rows
        out = self._selected(func, args, kwargs) if name in _SELECTIONS else func(*args, **kwargs)
        if name and replay is not None:
            replay.note(func, args, kwargs, out)
        return out

    def _rows(self, value: Tensor, index: Any) -> Tensor | None:
        """Return rows of a parameter, or of a selection of one, as a leaf; None for another tensor."""
        return None if self._find(value) is None else self._selected(Tensor.__getitem__, (value, index), {})

    @restoring
    def _selected(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.__name__
        at = _source_argument(name, args, kwargs)
        found = None if at is None else self._find(args[at])
        if at is None or found is None:
            return func(*args, **kwargs)
        with torch.no_grad():
            out = func(*args, **kwargs)
            where = func(*args[:at], found[1], *args[at + 1 :], **kwargs)
        one = isinstance(out, Tensor)
        leaves = [
            self._leaf(found[0], o, w) for o, w in zip([out] if one else out, [where] if one else where, strict=True)
        ]
        return leaves[0] if one else type(out)(leaves)

    def _find(self, value: Any) -> tuple[int, Tensor] | None:
        """Return which parameter a tensor is or copies, and where its entries stand in it."""
        if not isinstance(value, Tensor) or not value.requires_grad or not value.is_leaf:
            return None
        if id(value) in self._known:
            return self._known[id(value)]
        index = self._roots.get(_place(value))
        if index is None or value.shape != self._sources[index].shape:
            return None
        return index, torch.arange(value.numel(), device=value.device).reshape(value.shape)

    def _leaf(self, source: int, out: Tensor, where: Tensor) -> Tensor:
        leaf = out.detach().requires_grad_()
        self._known[id(leaf)] = source, where
        self.selections.append(Selection(source, where.reshape(-1), leaf, leaf._version))
        return leaf


def _place(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    tensor = plain(tensor)
    if tensor.layout is not torch.strided:
        return (0, 0, ())
    return storage_key(tensor), int(tensor.storage_offset()), tuple(tensor.stride())


def _computed_rows(replay: Replay, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return rows of a computed tensor, computed from rows of parameters; None where the call selects none."""
    if name != "embedding":
        return None if kwargs else replay.selected(name, args)
    at = _source_argument(name, args, kwargs)
    return None if at is None else replay.selected("__getitem__", (args[at], args[1 - at]))


def _source_argument(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return which argument is selected from; None where the call is no pure selection."""
    if name != "embedding":
        return 0 if args else None
    # F.embedding(input, weight, …) and torch.embedding(weight, indices, …); both may scale or cut gradients.
    special = [v for v in (*args[2:], *kwargs.values()) if v is not None and v is not False and v != -1 and v != 2.0]
    if len(args) < 2 or special:
        return None
    return 1 if not args[0].is_floating_point() else 0
