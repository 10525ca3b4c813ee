"""Loaders where samples are requested: a call is made for every batch in turn, or once for all rows joined.

Results whose rows are samples are joined in the order of the data, or written to places of the caller's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from itertools import zip_longest
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ._data import Batches
from ._finite import InBatch
from ._progress import track
from ._runtime.memory import ensure_fits, given_tensors
from ._torch.protocol import Shared, rows_apart
from ._trees import flatten
from .errors import DataError, InputError, InputTypeError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_PASSED_ON = ("unpack", "out", "progress")  # what is about the pass and not about a batch
_TODO = "Write into a memmap with `out=`, pick outputs with `outputs=` or `target=`, or raise `budget=`."


def is_loader(x: Any) -> bool:
    """Return whether `x` is an iterable of batches: no array, table, model or mapping, and no list of numbers."""
    others = Tensor, Mapping, tuple, str, bytes, set, frozenset, nn.Module
    if isinstance(x, others) or not isinstance(x, Iterable):
        return False
    if isinstance(x, list):
        return (
            len(x) > 0
            and all(isinstance(batch, tuple | list | Mapping) and len(batch) for batch in x)
            and all(any(hasattr(leaf, "shape") for leaf in flatten(batch, "x")[0]) for batch in x)
        )
    return not any(hasattr(x, name) for name in ("shape", "__array__", "to_numpy"))


def by_batches(*aligned: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Return a decorator that lets a call take a loader as `x`: it is made for every batch in turn.

    Args:
        aligned: Other arguments with a row per sample, which are cut as the batches are.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        signature = inspect.signature(function)
        place = list(signature.parameters).index("x")

        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if not _takes_loader(place, args, kwargs):
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            return _in_turn(function, given, [name for name in aligned if given.get(name) is not None])

        return call

    return decorate


def joined(*, ordered: bool = True) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Return a decorator that lets a call take a loader as `x`: it is made once, for the rows of all batches.

    Where the call has an argument `y`, that comes with the batches.

    Args:
        ordered: The order of the rows shows in the result, so that a loader that shuffles is refused.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        signature = inspect.signature(function)
        place, with_target = list(signature.parameters).index("x"), "y" in signature.parameters
        anyhow: Callable[..., Result] = function

        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            loads = _takes_loader(place, args, kwargs)
            given = signature.bind_partial(*args, **kwargs).arguments if loads or with_target else {}
            if not loads:
                if with_target and "x" in given and given.get("y") is None:
                    raise InputTypeError.of("y", "left out", "with tensors as `x` the target of each is needed")
                return function(*args, **kwargs)
            given |= given.pop("options", {})
            batches = Batches(given["x"], "x", given.pop("unpack", None), ordered)
            return anyhow(**{**given, **_whole(batches, given, with_target)})

        return call

    return decorate


def _takes_loader(place: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call is given a loader.

    Args:
        place: Of `x` among the arguments.
        args: Arguments by place.
        kwargs: The others.

    Raises:
        InputError: It is not, and there is an `unpack` of batches.
    """
    x = args[place] if place < len(args) else kwargs.get("x")
    if is_loader(x):
        return True
    if kwargs.get("unpack") is not None:
        raise InputError.of("unpack", "given", f"`x` is a {type(x).__name__}, which is no loader of batches")
    return False


def _in_turn(function: Callable[..., Any], given: dict[str, Any], aligned: Sequence[str]) -> Any:
    """Return what a call gives for the batches of a loader, one after the other."""
    batches = Batches(given["x"], "x", given.get("unpack"))
    call, shared, progress = function.__name__, given.get("shared"), given.get("progress")
    about_batch = {name: value for name, value in given.items() if name not in _PASSED_ON}
    rows = _Joined(call, batches.known_rows, given.get("budget"), given_tensors(given.get("out")))
    for number, x in enumerate(track(batches.inputs(), call, enabled=progress)):
        with InBatch(number):
            many = rows_of(x, shared, number)
            where = slice(rows.done, rows.done + many)
            some = {name: _cut(given[name], where, name) for name in aligned}
            out = rows.room(where)
            placed = {} if out is None else {"out": out}
            rows.add(function(**{**about_batch, **some, **placed, "x": x, **_quiet(function)}), many)
    for name in aligned:
        many = len(next(leaf for leaf in flatten(given[name], name)[0] if isinstance(leaf, Tensor) and leaf.ndim))
        if many != rows.done:
            raise InputError.of(name, f"of {many} rows", f"the loader gives {rows.done}")
    return rows.whole()


def _quiet(function: Callable[..., Any]) -> dict[str, Any]:
    return {"progress": False} if "progress" in inspect.signature(function).parameters else {}


def _cut(value: Any, where: slice, name: str) -> Any:
    leaves, tree = flatten(value, name)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) < where.stop:
            raise InputError.of(name, f"of {len(leaf)} rows", f"the loader gives {where.stop} or more")
    return tree.build([leaf[where] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves])


def rows_of(x: Any, shared: Shared, number: int) -> int:
    """Return how many samples a batch holds.

    Raises:
        DataError: Nothing in it has rows.
    """
    values = rows_apart(x, "x", shared)[0]
    first = next((v for v in values if isinstance(v, Tensor) and v.ndim), None)
    if first is None:
        came = f"a {type(x).__name__} without rows as the input of batch {number}"
        raise DataError.of("x", f"giving {came}", "tensors with a row per sample are needed", "Pass `unpack=`.")
    return first.shape[0]


class _Joined:
    """Results of batches, put one after the other.

    Args:
        call: The public call.
        count: How many rows there will be, None where that is not known.
        budget: What may be allocated.
        places: The caller's own tensors, if given.
    """

    def __init__(self, call: str, count: int | None, budget: Any, places: list[Tensor] | None) -> None:
        self.call, self.count, self.budget, self.given = call, count, budget, places
        self.done, self.parts, self.tree = 0, list[list[Tensor]](), None
        self.places = places

    def room(self, where: slice) -> list[Tensor] | None:
        """Return the caller's places for some rows."""
        if self.given is None:
            return None
        short = next((place for place in self.given if len(place) < where.stop), None)
        if short is not None:
            raise InputError.of("out", f"of {len(short)} rows", f"the loader gives {where.stop} or more")
        return [place[where] for place in self.given]

    def add(self, found: Any, many: int) -> None:
        """Take the result for the next rows."""
        leaves, tree = flatten(found, "result")
        tensors, self.tree = tree.holding(leaves, [i for i, leaf in enumerate(leaves) if leaf is None])
        if self.given is None and self.places is None and self.count is not None and many:
            self.places = self._allocated(tensors, self.count)
        if self.places is None:
            self.parts.append(tensors)
        elif self.given is None:
            if self.done + many > len(self.places[0]):
                raise DataError.of("x", f"giving {self.done + many} rows or more", f"its sampler gives {self.count}")
            for place, part in zip(self.places, tensors, strict=True):
                place[self.done : self.done + many] = part
        self.done += many

    def _allocated(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        whole = [((count, *part.shape[1:]), part) for part in tensors]
        need = sum(torch.Size(shape).numel() * part.element_size() for shape, part in whole)
        ensure_fits(self.call, {f"the result for {count} samples": need}, self.budget, tensors[0].device, _TODO)
        return [part.new_empty(shape) for shape, part in whole]

    def whole(self) -> Any:
        """Return the result for all rows.

        Raises:
            InputError: The caller's places have more rows than there are.
            DataError: The loader gave fewer rows than it said.
        """
        places = self.places
        if self.given is not None and any(len(place) != self.done for place in self.given):
            raise InputError.of("out", f"of {len(self.given[0])} rows", f"the loader gives {self.done}")
        if places is not None and any(len(place) != self.done for place in places):
            raise DataError.of("x", f"giving {self.done} rows", f"its sampler gives {self.count}")
        whole = [torch.cat(column) for column in zip(*self.parts, strict=True)] if places is None else places
        return None if self.tree is None else self.tree.build(whole)


def _whole(batches: Batches, given: Mapping[str, Any], with_target: bool) -> dict[str, Any]:
    """Return the input (and target) of all rows of a loader.

    Raises:
        InputError: A target is given beside it.
        DataError: Batches have weights, or do not fit together.
    """
    shared = given.get("shared")
    if not with_target:
        return {"x": _joined(list(batches.inputs()), shared, "x")}
    if given.get("y") is not None:
        raise InputError.of("y", "given beside a loader", "it is part of the batches", "Leave it out.")
    found = [(*parts, None)[:3] for parts in batches.pairs()]
    if any(weights is not None for _, _, weights in found):
        todo = "Leave them out with `unpack=`, or take `Problem(...).sample_gradients()`."
        raise DataError.of("x", "giving weights", "all rows have the same weight here", todo)
    x, y = (_joined([parts[i] for parts in found], shared if i == 0 else None, name) for i, name in enumerate("xy"))
    return {"x": x, "y": y}


def cut_rows(x: Any, shared: Shared, where: slice) -> Any:
    """Return some samples of an input, with all that has no rows."""
    values, tree = rows_apart(x, "x", shared)
    return tree.build([value[where] for value in values])


def joined_rows_of(parts: Sequence[Any], shared: Shared) -> Any:
    """Return the samples of several inputs as one input."""
    return parts[0] if len(parts) == 1 else _joined(parts, shared, "x")


def _joined(parts: Sequence[Any], shared: Shared, name: str) -> Any:
    """Return inputs of batches as one; what has no rows must be the same in all of them."""
    apart = [rows_apart(part, name, shared) for part in parts]
    for number, (values, _) in enumerate(apart):
        wrong = next((value for value in values if not isinstance(value, Tensor)), None)
        if wrong is not None:
            came = f"giving a {type(wrong).__name__} in batch {number}"
            raise InputTypeError.of(name, came, "batches of tensors are needed", "Convert them with torch.as_tensor.")
    (first, tree), *others = apart
    for number, (values, other) in enumerate(others, 1):
        same = other.names == tree.names and len(values) == len(first)
        pairs = zip_longest(tree.held, other.held)
        if not same or not all(a is not None and b is not None and _equal(a[1], b[1]) for a, b in pairs):
            came = f"giving an input in batch {number} that differs from the first in more than its rows"
            raise DataError.of(name, came, "settings and shared tensors must be the same in all batches")
    return tree.build([torch.cat(column) for column in zip(*(values for values, _ in apart), strict=True)])


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))
    return type(one) is type(other) and repr(one) == repr(other)
