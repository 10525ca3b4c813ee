"""Passes over a data set that are provably the same pass each time."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._checksums import checksum, is_apart
from ._fetching import together
from ._progress import track
from ._requirements import check_dense
from ._runtime.contexts import random_state_kept, random_states, refuse_transforms, set_random_states
from ._runtime.restoring import restoring
from ._shuffling import kind_of_random, without_shuffling
from ._trees import flatten
from .errors import DataError, InputError, InputTypeError

Unpack = Callable[[Any], tuple[Any, ...]]
_TARGETS = ("labels", "label", "targets", "target", "y")
_WEIGHTS = ("weights", "weight", "sample_weight")


@dataclass(frozen=True)
class Batch:
    """Some rows of data.

    Attributes:
        x: The model's input: a tensor, a tuple of positional or a mapping of keyword arguments.
        y: The target.
        rows: How many.
        weights: How much each row counts, `(rows,)`; None where all count alike.
        place: The data that it is a batch of, and its number there; None for a part of one.
    """

    x: Any
    y: Any
    rows: int
    weights: Tensor | None = None
    place: tuple[Batches, int] | None = field(default=None, repr=False, compare=False)

    def part(self, where: slice | Tensor) -> Batch:
        """Return some of the rows."""
        leaves, tree = flatten((self.x, self.y), "batch")
        x, y = tree.build([leaf[where] if hasattr(leaf, "shape") else leaf for leaf in leaves])
        rows = len(range(*where.indices(self.rows))) if isinstance(where, slice) else int(where.numel())
        return Batch(x, y, rows, None if self.weights is None else self.weights[where])


def rows_of(x: Any) -> int:
    """Return the length of the first axis of the arrays in a model's input."""
    return next(int(leaf.shape[0]) for leaf in flatten(x, "x")[0] if hasattr(leaf, "shape"))


class Batches:
    """Batches that can be read again and again in one order.

    A batch is a pair `(x, y)`; a mapping with its target under `labels`, `label`, `targets`, `target` or `y` (and
    sample weights under `weights`, `weight` or `sample_weight`), the rest being keyword arguments of the model; or
    whatever `unpack` makes a pair or a triple `(x, y, weights)` of.

    Args:
        loader: A DataLoader, or any iterable of batches that can be read more than once; a single pair is one batch.
        name: How messages call it.
        unpack: Batch -> `(x, y)` or `(x, y, weights)`.
        ordered: The order of the rows shows in the result: a loader that shuffles is refused. Otherwise it is read in
            the order of its data set.

    Attributes:
        given: What the caller passed.
        shuffles: The kind of sampler that was left out, None for a loader that has an order.
        alone: Rows are read one at a time: in a batch, each would have random numbers of its own.
        latest: The batch, as it was given, that is being read.

    Raises:
        DataError: It can be read once only, or it shuffles, or its passes need not see every row once.
        InputTypeError: It is not iterable.
    """

    @classmethod
    def of(
        cls, loader: Any, name: str, unpack: Unpack | None = None, ordered: bool = True, alone: bool = False
    ) -> Batches:
        """Return `loader` as batches; one that is already stays, and goes on comparing its passes."""
        found = loader if isinstance(loader, Batches) else cls(loader, name, unpack, ordered)
        found.alone = found.alone or alone
        return found.in_order() if ordered else found

    def __init__(self, loader: Any, name: str, unpack: Unpack | None = None, ordered: bool = True) -> None:
        self.given = loader
        if isinstance(loader, tuple) and len(loader) == 2 and hasattr(loader[1], "shape"):
            loader = [loader]
        if not isinstance(loader, Iterable):
            todo = "Pass `DataLoader(dataset, batch_size=...)`." if isinstance(loader, Dataset) else ""
            raise InputTypeError.of(name, f"a {type(loader).__name__}", "an iterable of batches (x, y) is needed", todo)
        if isinstance(loader, Iterator):
            came = "a generator, which can be read once"
            raise DataError.of(name, came, "several passes are needed", "Pass a list or a DataLoader.")
        self.shuffles = kind_of_random(loader)
        self.loader, self.name, self.unpack, self.alone = loader, name, unpack, False
        if self.shuffles is not None:
            self.loader = self.in_order().loader if ordered else without_shuffling(loader, name)
        self.latest: Batch | None = None
        self._digests: list[int] | None = None
        self._known: dict[int, tuple[list[Any], int]] = {}
        self._rows = 0

    def in_order(self) -> Batches:
        """Return these batches if their order is fixed.

        Raises:
            DataError: They come from a loader that shuffles.
        """
        if self.shuffles is not None:
            needed = "rows and columns of the result need one order"
            raise DataError.of(self.name, f"a loader with a {self.shuffles}", needed, "Make it with shuffle=False.")
        return self

    def inputs(self) -> Iterator[Any]:
        """Yield the model's input of every batch, in one pass; targets are left out.

        Beside what else is a batch, this takes a tensor, a list of one, or a mapping without a target.

        Raises:
            DataError: There are no batches.
        """
        for number, raw in self._raw():
            alone = isinstance(raw, list | tuple) and len(raw) == 1
            bare = hasattr(raw, "shape") or (isinstance(raw, Mapping) and _by_name(raw) is None)
            if self.unpack is not None or not (alone or bare):
                x = self._unpacked(raw, number)[0]
            else:
                x = raw[0] if alone else raw
            yield tuple(x) if isinstance(x, list) else x

    def pairs(self) -> Iterator[tuple[Any, ...]]:
        """Yield `(x, y)` or `(x, y, weights)` of every batch as they are, in one pass.

        Raises:
            DataError: There are no batches.
        """
        for number, raw in self._raw():
            x, *rest = self._unpacked(raw, number)
            yield tuple(x) if isinstance(x, list) else x, *rest

    def _raw(self) -> Iterator[tuple[int, Any]]:
        refuse_transforms()
        number = -1
        for number, raw in enumerate(_drawn(self.loader)):
            yield number, raw
        if number < 0:
            raise DataError.of(self.name, "empty", "at least one batch is needed")

    @property
    def known_rows(self) -> int | None:
        """Rows of all batches by a loader's sampler, without reading any; None where it has no length."""
        batches: Any = getattr(self.loader, "batch_sampler", None)
        try:
            rows, most = len(batches.sampler), batches.batch_size
        except (AttributeError, TypeError):  # no sampler, or one without a length
            return None
        return rows - rows % most if batches.drop_last else rows

    @property
    def rows(self) -> int:
        """Rows of all batches; reads them once if no pass was made yet."""
        self._read_once()
        return self._rows

    @property
    def count(self) -> int:
        """Batches of a pass; reads the data once if no pass was made yet."""
        read = len(self._read_once())
        return self._rows if self.alone else read

    @property
    def digest(self) -> str:
        """A number that another order or other values would change; reads the data once if no pass was made yet."""
        return f"{zlib.crc32(repr(self._read_once()).encode()):08x}-{self._rows}"

    def _read_once(self) -> list[int]:
        """Return the digests of the batches, after a first pass if none was made yet."""
        if self._digests is None:
            for _ in self:
                pass
        return self._digests or []

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; the caller's random state does not move.

        Raises:
            DataError: There are no batches, or a pass differs from the first one.
        """
        refuse_transforms()
        digests: list[int] = []
        rows = 0
        copies = _Copies(self.loader)
        for number, raw in enumerate(_drawn(self.loader)):
            batch, digest = self._read(raw, number)
            self._compare(number, digest)
            digests.append(digest)
            self.latest = batch
            copies.note(batch)
            yield from self._one_by_one(batch, rows) if self.alone else (batch,)
            rows += batch.rows
        self.latest = None
        copies.refuse(self.name)
        if not digests:
            raise DataError.of(self.name, "empty", "at least one batch is needed")
        if self._digests is not None and len(digests) != len(self._digests):
            came = f"{len(digests)} batches in this pass"
            raise DataError.of(self.name, came, f"the first pass had {len(self._digests)}")
        self._digests, self._rows = digests, rows

    def _one_by_one(self, batch: Batch, first: int) -> Iterator[Batch]:
        for row in range(batch.rows):
            yield replace(batch.part(slice(row, row + 1)), place=(self, first + row))

    def tracked(self, what: str, enabled: bool | None = None) -> Iterable[Batch]:
        """Yield as `iter` does, behind a progress bar."""
        known = range(self.count) if self._digests is not None else self.loader
        total = len(known) if isinstance(known, Sized) and not (self.alone and known is self.loader) else None
        return track(self, what, enabled=enabled, total=total)

    def _compare(self, number: int, digest: int) -> None:
        if self._digests is not None and (number >= len(self._digests) or self._digests[number] != digest):
            came = f"different in batch {number} from the first pass"
            needed = "all passes must be the same"
            raise DataError.of(self.name, came, needed, "Take shuffling and random augmentation out of it.")

    def _read(self, raw: Any, number: int) -> tuple[Batch, int]:
        batch, arrays = _batch_of(self._unpacked(raw, number), self.name, number, self)
        return batch, self._digest(arrays, number)

    def _digest(self, arrays: list[Any], number: int) -> int:
        """Return the digest of a batch; one that stays in a device's memory is read in the first pass alone."""
        if not all(is_apart(array) and not array.is_inference() for array in arrays):  # those have no versions
            return checksum(arrays)
        marks, found = self._known.get(number, ([], 0))
        same = len(marks) == len(arrays)
        if not same or any(ref() is not a or v != a._version for (ref, v), a in zip(marks, arrays, strict=True)):
            found = checksum(arrays)
            self._known[number] = [(weakref.ref(array), array._version) for array in arrays], found
        return found

    def _unpacked(self, raw: Any, number: int) -> tuple[Any, ...]:
        if self.unpack is not None:
            parts = self.unpack(raw)
            if not isinstance(parts, tuple) or len(parts) not in (2, 3):
                came = f"returning a {type(parts).__name__} for batch {number} of {self.name}"
                raise InputError.of("unpack", came, "a tuple (x, y) or (x, y, weights) is needed")
            return parts
        if isinstance(raw, list | tuple) and len(raw) == 2:
            return tuple(raw)
        if isinstance(raw, Mapping):
            named = _by_name(raw)
            if named is not None:
                return named
            came = f"batch {number} with keys {list(raw)}"
        elif isinstance(raw, list | tuple):
            came = f"{len(raw)} things as batch {number}"
        else:
            came = f"a {type(raw).__name__} as batch {number}"
        needed = f"pairs (x, y), or mappings with the target under {', '.join(map(repr, _TARGETS))}, are needed"
        todo = "Pass `unpack=`, a function from a batch to (x, y) or (x, y, weights)."
        raise DataError.of(self.name, f"giving {came}", needed, todo)


def only_batch(x: Any, y: Any, name: str) -> Batch:
    """Return data that are one batch and are read once, so that no later pass has to be compared with this one.

    Raises:
        DataError: There is not one row per sample.
    """
    return _batch_of((x, y), name, 0, None)[0]


def _batch_of(parts: tuple[Any, ...], name: str, number: int, data: Batches | None) -> tuple[Batch, list[Any]]:
    """Return a batch of `(x, y)` or `(x, y, weights)`, and the arrays that it consists of."""
    x, y, weights = (*parts, None)[:3]
    leaves = [(label, leaf) for label, part in (("x", x), ("y", y)) for leaf in flatten(part, label)[0]]
    arrays = [leaf for _, leaf in leaves if hasattr(leaf, "shape")]
    for label, leaf in leaves:
        if isinstance(leaf, Tensor):  # of which rows are taken
            check_dense(f"{label} in batch {number}", leaf)
    lengths = {leaf.shape[0] if len(leaf.shape) else None for leaf in arrays}
    if len(lengths) != 1 or None in lengths:
        came = f"giving lengths {sorted(map(str, lengths))} in batch {number}"
        raise DataError.of(name, came, "x and y need one row per sample")
    rows = int(lengths.pop() or 0)
    if weights is not None:
        weights = _checked_weights(weights, rows, number, name)
    place = None if data is None else (data, number)
    batch = Batch(tuple(x) if isinstance(x, list) else x, y, rows, weights, place)
    return batch, [*arrays, *([] if weights is None else [weights])]


_END = object()


def _drawn(loader: Any) -> Iterator[Any]:
    """Yield what a loader yields; the random numbers that it draws continue from one to the next.

    No state is changed while the generator is suspended: an interrupt in the loop around it leaves none behind.
    """
    steps: list[Any] = []
    states: list[Any] | None = None
    while True:
        raw, states = _step(loader, steps, states)
        if raw is _END:
            return
        yield raw


@restoring
def _step(loader: Any, steps: list[Any], states: list[Any] | None) -> tuple[Any, list[Any]]:
    """Return the next item of the iterator in `steps`, made if there is none, and the random states after it."""
    with random_state_kept():
        if states is not None:
            set_random_states(states)
        if not steps:
            steps.append(iter(together(loader)))
        return next(steps[0], _END), random_states()


class _Copies:
    """Rows that every worker of a loader gives again, as an IterableDataset does that does not share itself out."""

    def __init__(self, loader: Any) -> None:
        from torch.utils.data import IterableDataset

        workers = getattr(loader, "num_workers", 0)
        self.workers = workers if isinstance(getattr(loader, "dataset", None), IterableDataset) else 0
        self.seen: list[int] = []

    def note(self, batch: Batch) -> None:
        """Record the rows of a batch, so that repeated rows are found."""
        if self.workers < 2:
            return
        arrays = [leaf for leaf in flatten((batch.x, batch.y), "batch")[0] if hasattr(leaf, "shape")]
        self.seen += [checksum([array[row] for array in arrays]) for row in range(batch.rows)]

    def refuse(self, name: str) -> None:
        """Refuse data in which every row came once from every worker.

        Raises:
            DataError: It did.
        """
        if self.workers > 1 and self.seen and self.workers * len(set(self.seen)) == len(self.seen):
            came = f"an IterableDataset that gives every row {self.workers} times, once from each worker"
            todo = "Share it out by `torch.utils.data.get_worker_info()`, or take one worker."
            raise DataError.of(name, came, "every row must be given once", todo)


def _by_name(raw: Mapping[Any, Any]) -> tuple[Any, ...] | None:
    """Return `(x, y, weights)` of a mapping, by the usual names; None where it names no target."""
    target = next((key for key in _TARGETS if key in raw), None)
    if target is None:
        return None
    weight = next((key for key in _WEIGHTS if key in raw), None)
    rest = {key: value for key, value in raw.items() if key not in (target, weight)}
    return rest, raw[target], None if weight is None else raw[weight]


def _checked_weights(weights: Any, rows: int, number: int, name: str) -> Tensor:
    label = f"the weights in batch {number} of {name}"
    if not isinstance(weights, Tensor):
        weights = torch.as_tensor(np.array(weights))
    if tuple(weights.shape) != (rows,):
        raise InputError.of(label, f"of shape {tuple(weights.shape)}", f"one number per row, ({rows},), is needed")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise InputError.of(label, "negative or not finite", "every weight must be a finite number, 0 or more")
    return weights.detach()
