"""Follows index sets through the operations of a backward pass.

The abstract value of a tensor is a tensor of set ids on the same storage, so views cost nothing and writes in place
are right by construction. An operation has a rule of its own, is pointwise by torch's tags, is decomposed, or is
unknown: then everything it gives depends on everything it took, which is safe, and its name is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .._progress import tick
from .._runtime.contexts import must_surface
from .._runtime.restoring import Hooks, restoring
from .._runtime.side_effects import Light, tensors_in
from ._pool import Array, Pool
from ._taint import Outside, Taint, storage_key, traits_of, written, zeros_in

_PURGE_EVERY = 64  # calls between two searches for freed tensors: often enough to free memory, too rare to cost time
_FOLDED = 16  # entries that are united one after another; for more, sorting them takes less time
_ESCAPES = ("tolist", "numpy", "__array__", "__dlpack__")


class CannotFollowError(Exception):
    """Values leave the sight of detection here: all that is safe to say is that everything depends on everything."""


@dataclass
class TracedCall:
    """One operation at work.

    Attributes:
        func: The operation.
        base: Its name, without the mark of those that write in place.
        args: What it was given by position.
        kwargs: What it was given by name.
        outs: The tensors it gave.
        places: Where they stand among all it gave.
        live: Those of the tensors it was given that carry sets.
        zero: Where the one operand that carries sets was zero before, if it is written over.
    """

    func: Any
    base: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Tensor]
    live: list[Tensor] = field(default_factory=list)
    zero: NDArray[np.bool_] | None = None
    places: list[int] = field(default_factory=list)

    @cached_property
    def named(self) -> dict[str, Any]:
        """All arguments by name, defaults included."""
        arguments = self.func._schema.arguments
        named = {a.name: a.default_value for a in arguments if a.has_default_value()}
        named |= {a.name: value for a, value in zip(arguments, self.args, strict=False)}
        return named | self.kwargs

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors it was given, without those that its result is written into."""
        given = tensors_in(self.args)
        return given + tensors_in({k: v for k, v in self.kwargs.items() if k != "out"}) if self.kwargs else given


Rule = Callable[
    ["Tracer", TracedCall], Any
]  # ids as a tensor or array that broadcasts to the output; a list for several


class Tracer(Light):
    """A mode in which index sets flow along.

    Args:
        pool: Where sets are kept.
        taint: What was seen to depend on the point, whose zeros do not count; None lets all zeros count.
        rule_of: Returns how an operation is followed; None where nothing is known about it.

    Attributes:
        unknown: Operations that no rule is known for, and how often they were met.
        dtypes: Of the floating-point numbers that carried sets.
    """

    def __init__(
        self, pool: Pool, taint: Taint | None, rule_of: Callable[[Tracer, TracedCall], Rule | Decomposed | None]
    ) -> None:
        super().__init__()
        self.pool, self.taint, self._rule_of = pool, taint, rule_of
        self.unknown: dict[str, int] = {}
        self._pointed = False
        self.dtypes: set[torch.dtype] = set()
        self._held: dict[int, tuple[StorageWeakRef, int, Tensor]] = {}
        self._calls = 0
        self._loose = 0  # inside a written-out form, whose zeros are not those of the operation

    # ---- ids on storages ---------------------------------------------------------------------------------------

    def tracks(self, tensor: Tensor) -> bool:
        """Return whether sets are kept for the storage of a tensor."""
        return tensor.layout is torch.strided and storage_key(tensor) in self._held

    def read(self, tensor: Tensor) -> Tensor | None:
        """Return the ids of a tensor's entries, shaped like it; None where there are none."""
        if not self.tracks(tensor):
            return None
        _, size, ids = self._held[storage_key(tensor)]
        wanted = tensor.element_size()
        if wanted == 2 * size:  # real numbers seen as complex ones
            first, second = np.ascontiguousarray(ids.numpy().reshape(-1, 2).T)
            ids = torch.from_numpy(self.pool.union_pairs(first, second).copy())
        elif size == 2 * wanted:
            ids = ids.repeat_interleave(2)
        elif size != wanted:
            return torch.full(tensor.shape, self.pool.union(ids.numpy()))
        return ids.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def ids(self, tensor: Tensor) -> Tensor:
        """Return the ids of a tensor's entries, zeros where there are none."""
        found = self.read(tensor)
        return torch.zeros(tensor.shape, dtype=torch.int64) if found is None else found

    def array(self, tensor: Tensor) -> Array:
        """Return `ids` as a contiguous array."""
        return self.ids(tensor).contiguous().numpy()

    def write(self, tensor: Tensor, ids: Any) -> None:
        """Give a tensor's entries these ids, an array or tensor that broadcasts to it."""
        if tensor.layout is not torch.strided:
            raise CannotFollowError(f"a result of layout {tensor.layout}")
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            self.dtypes.add(tensor.dtype)
        ids = ids.numpy() if isinstance(ids, Tensor) else np.asarray(ids, np.int64)
        key = storage_key(tensor)
        if key not in self._held:
            if not _any(ids):
                return
            storage = tensor.untyped_storage()
            many = storage.nbytes() // tensor.element_size()
            whole = many == tensor.numel() and tensor.is_contiguous()  # then all of it is written below
            blank = torch.empty(many, dtype=torch.int64) if whole else torch.zeros(many, dtype=torch.int64)
            self._held[key] = (StorageWeakRef(storage), tensor.element_size(), blank)
        _, size, held = self._held[key]
        if size != tensor.element_size() or any(
            step == 0 and many > 1 for step, many in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            held.fill_(self.pool.union(np.r_[held.numpy(), ids.ravel()]))
        else:
            held.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).numpy()[...] = ids

    def _purge(self) -> None:
        """Drop storages that no longer exist; until now the weak reference kept their address from being used again."""
        for key in [key for key, (alive, _, _) in self._held.items() if alive.expired()]:
            del self._held[key]

    # ---- what rules ask for ------------------------------------------------------------------------------------

    def union(self, arrays: Iterable[Any], shape: Iterable[int]) -> Array:
        """Return unions entry by entry of arrays that broadcast to `shape`."""
        total, shape = None, tuple(shape)
        for array in arrays:
            part = np.asarray(array)
            part = part if part.shape == shape else np.broadcast_to(part, shape)
            total = part if total is None else self.pool.union_pairs(total, part)
        return np.zeros(shape, np.int64) if total is None else total

    def group(self, groups: Any, ids: Any, count: int) -> Array:
        """Return the union over each of `count` groups."""
        return self.pool.union_groups(np.ravel(np.asarray(groups)), np.ravel(np.asarray(ids)), count)

    def along(self, ids: Array, axes: Iterable[int]) -> Array:
        """Return the union along axes, which are kept with one entry each."""
        axes = {axis % max(ids.ndim, 1) for axis in axes}
        kept = [1 if i in axes else size for i, size in enumerate(ids.shape)]
        if 0 < ids.size <= _FOLDED * math.prod(kept):
            moved = np.moveaxis(ids, sorted(axes), range(len(axes)))
            rest = moved.shape[len(axes) :]
            return self.union(moved.reshape(-1, *rest), rest).reshape(kept)
        groups = np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), ids.shape)
        return self.group(groups, ids, math.prod(kept)).reshape(kept)

    def everything(self, call: TracedCall) -> int:
        """Return the union of all sets that an operation was given."""
        parts = [np.unique(self.array(t)) for t in call.tensors if self.tracks(t)]
        return self.pool.union(np.concatenate(parts)) if parts else 0

    def nonzero(self, tensor: Tensor) -> NDArray[np.bool_] | None:
        """Return where a constant is not zero, None if it has to count as nonzero everywhere."""
        if not self.is_constant([tensor]):
            return None
        mask = ~zeros_in(tensor)
        return None if mask.all() else mask

    def is_constant(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether zeros in these tensors are permanent (or zero at this point, for a local pattern)."""
        if self._loose:
            return False
        tensors = list(tensors)
        if self.takes_all_routes and not tensors:
            return False  # the factor is a number of Python's, which may be a flag
        return self.taint is None or not any(self.taint.holds(t) for t in tensors)

    @property
    def takes_all_routes(self) -> bool:
        """Whether indices and conditions made of data stand for all that they could be."""
        return isinstance(self.taint, Outside)

    def is_open(self, route: Any) -> bool:
        """Return whether an index or condition may be another one elsewhere, and is to be taken for all of them."""
        taint = self.taint
        return isinstance(taint, Outside) and isinstance(route, Tensor) and taint.holds(route)

    def may_turn(self, condition: Any) -> bool:
        """Return whether a condition depends on the point, so that either branch may be taken elsewhere."""
        return self.taint is not None and isinstance(condition, Tensor) and self.taint.holds(condition)

    @property
    def holds_here_only(self) -> bool:
        """Whether the sets depend on this point: on indices made of its values, or on values that Python read."""
        return self.taint is None or self.taint.read_out or self._pointed

    def places_rest_on(self, tensors: Iterable[Tensor]) -> None:
        """Note that these determine where entries go.

        Raises:
            NotImplementedError: They stand for all that they could be.
        """
        if self.taint is None or not any(self.taint.holds(t) for t in tensors):
            return
        if self.takes_all_routes:
            raise NotImplementedError
        self._pointed = True

    def note_indices(self, call: TracedCall) -> None:
        """Note whether an operation takes indices that depend on the point."""
        if self.taint is not None and not self._pointed:
            whole = (t for t in call.tensors if not (t.is_floating_point() or t.is_complex()) and t.dtype != torch.bool)
            self._pointed = any(self.taint.holds(t) for t in whole)

    # ---- dispatch ----------------------------------------------------------------------------------------------

    @restoring
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tick()
        traits = traits_of(func)
        if traits.is_view:  # the same storage, which has its sets already
            return func(*args, **(kwargs or {}))
        call = TracedCall(func, traits.base, args, kwargs or {}, [])
        call.live = [t for t in call.tensors if self.tracks(t)]
        if not call.live:
            out = func(*args, **call.kwargs)
            if self.taint is not None:
                self.taint.passes(func, call.args, call.kwargs, out)
            for tensor in tensors_in(call.kwargs.get("out")):  # written over by values without sets
                if self.tracks(tensor):
                    self.write(tensor, 0)
            return out
        self._calls += 1
        if self._calls % _PURGE_EVERY == 0:
            self._purge()
        if traits.resizes:
            return func(*args, **call.kwargs)
        if traits.reads:
            raise CannotFollowError(f"{func} (reads a value)")
        rule = self._rule_of(self, call)
        if isinstance(rule, Decomposed):
            if rule.exact or traits.written or traits.is_random:
                with self:
                    return rule.run(*args, **call.kwargs)
            rule = self._written_out(rule, call)
        if rule is not None and len(call.live) == 1 and traits.written:
            call.zero = zeros_in(call.live[0])
        out = func(*args, **call.kwargs)
        self._follow(call, rule, out)
        return out

    @restoring
    def _written_out(self, form: Decomposed, call: TracedCall) -> Rule | None:
        """Return a rule that takes the ids a written-out form gives; its values are rounded otherwise and dropped."""
        self._loose += 1
        try:
            with self:
                shadows = tree_leaves(form.run(*call.args, **call.kwargs))
            found = [self.ids(t).clone() if isinstance(t, Tensor) else None for t in shadows]
        except Exception as error:  # a form that does not fit this use of its operation is none
            if must_surface(error):
                raise
            return None
        finally:
            self._loose -= 1
        return lambda tracer, same: tracer.of_shadows([found[i] for i in same.places], same.outs)

    def of_shadows(self, found: list[Tensor | None], outs: list[Tensor]) -> list[Array]:
        """Return ids found beside an operation for what it gave itself, its own zeros left out."""
        kept = []
        for ids, out in zip(found, outs, strict=True):
            if ids is None or ids.shape != out.shape:
                raise NotImplementedError
            array = ids.numpy()
            if self.taint is None and not self._loose:
                # One member: the entry is that member's factor times a number of size one or more.
                array = np.where(zeros_in(out) & (self.pool.sizes(array) == 1), 0, array)
            kept.append(array)
        return kept

    def _follow(self, call: TracedCall, rule: Rule | None, out: Any) -> None:
        leaves = [out] if isinstance(out, Tensor) else tree_leaves(out)
        call.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        call.outs = [leaves[i] for i in call.places]
        into = written(call.func, call.args, call.kwargs)
        places = call.outs + [t for t in into if not any(t is o for o in call.outs)]
        found: Any = None
        if rule is not None:
            try:
                found = rule(self, call)
            except CannotFollowError:
                raise
            except Exception as error:  # a rule that does not fit this use of its operation is no rule
                if must_surface(error):
                    raise
                rule = None
        if rule is None:
            self.unknown[str(call.func)] = self.unknown.get(str(call.func), 0) + 1
            everything = self.everything(call)
            found = [everything] * len(places)
        parts = found if isinstance(found, list) else [found] * len(places)
        for tensor, ids in zip(places, parts, strict=False):
            if ids is not None:
                self.write(tensor, ids)


@dataclass(frozen=True)
class Decomposed:
    """An operation that torch itself writes out with simpler ones.

    Attributes:
        run: The written-out form.
        exact: It is what torch runs itself, so its values are the operation's.
    """

    run: Callable[..., Any]
    exact: bool = False


class Escapes(TorchFunctionMode):
    """Notices values with sets leaving for NumPy or Python, where they cannot be followed.

    Only backward passes written in Python can do that; torch leaves function modes before it runs them, so hooks
    enter this one around each.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ESCAPES and args and isinstance(args[0], Tensor) and self.tracer.tracks(args[0]):
            raise CannotFollowError(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))

    def around(self, nodes: Iterable[Any]) -> Hooks:
        """Return a context in which this mode is active while the Python ones of these nodes of a graph run.

        Torch restores its own state if one of them fails.
        """
        written = [node for node in nodes if isinstance(node, BackwardCFunction)]
        before = [partial(node.register_prehook, lambda grads: self._enter()) for node in written]
        after = [partial(node.register_hook, lambda inputs, outputs: self._leave()) for node in written]
        return Hooks([*before, *after])

    def _enter(self) -> None:
        self.__enter__()

    def _leave(self) -> None:
        self.__exit__(None, None, None)


def rank_of(call: TracedCall) -> int:
    """Return how many axes of space an operation goes over, by its name."""
    return next(rank for rank in (1, 2, 3) if f"{rank}d" in call.base)


def _any(ids: Array) -> bool:
    """Say whether there is a set with members. Mostly the first one is, which takes no pass over all of them."""
    return ids.size > 0 and bool(ids.item(0) or ids.any())
