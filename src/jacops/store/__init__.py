"""Stored runs: finished tiles go to a zarr v3 store, a killed run goes on where it was, and nothing torn gets through.

A store is one folder with one or more arrays, each cut into tiles. A tile is a pure function of its index and of the
run's identity: the digests of model, data, loss and settings. It is finished once its chunk is on the disk, whole,
and after that its mark, which holds a digest of the chunk's bytes keyed by the identity and the tile's place.

Any zarr v3 reader opens such a folder. This one also checks the marks. Needs `pip install 'jacops[store]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .._digests import DataDigest, digest_data, digest_function, digest_module, digest_tensors, surroundings
from .._finite import where_first
from .._keywords import keywords
from ..errors import (
    InputError,
    InputTypeError,
    NonFiniteError,
    StoreDamagedError,
    StoreError,
    StoreIncompleteError,
    StoreMismatchError,
    warn,
)
from ._files import Folder, Lock, is_partial
from ._format import HEADER, Grid, Header, Index, TileCodec, dumped_json, not_ours
from ._reading import Location, Store, chunk_at, explained, header_in, mark_at

__all__ = [
    "DataDigest",
    "Grid",
    "Store",
    "StoredRun",
    "digest_data",
    "digest_function",
    "digest_module",
    "digest_tensors",
    "read_store",
    "surroundings",
]


class StoredRun(Store):
    """A run that writes its tiles to a store, and goes on where an earlier one stopped; made by `StoredRun.open`.

    Use it as a context: leaving it lets go of the store, finished or not.

    Example:
        >>> from tempfile import mkdtemp
        >>> identity = {"model": digest_module(torch.nn.Linear(2, 1)), "damping": "0.1"}
        >>> with StoredRun.open(mkdtemp(), identity, {"influences": Grid((3, 4), tile=(2, 4))}) as run:
        ...     for index in run.missing("influences"):
        ...         run.write("influences", index, np.ones(run.arrays["influences"].tile_shape(index)))
        ...     run.complete()
        ...     run.read("influences").sum()
        np.float64(12.0)
    """

    def __init__(self, folder: Folder, header: Header, codecs: Mapping[str, TileCodec], lock: Lock) -> None:
        super().__init__(folder, header, codecs)
        self._lock = lock
        self._right: dict[str, set[Index]] = {name: set() for name in header.arrays}

    @classmethod
    def open(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        path: Location,
        identity: Mapping[str, str],
        arrays: Mapping[str, Grid],
        *,
        surroundings: Mapping[str, str] | None = None,
    ) -> StoredRun:
        """Begin a run in a new or empty folder, or go on with the one that is there.

        Args:
            path: A folder of a local file system.
            identity: Names and digests, or short texts, of everything the numbers rest on. A difference is refused.
            arrays: The arrays and how they are cut.
            surroundings: What should not change the numbers beyond rounding. A difference is warned of.

        Raises:
            StoreMismatchError: The run there has another identity or other arrays; each difference is named.
            StoreBusyError: Another run is writing there.
            StoreDamagedError: The header of the run there cannot be read.
            StoreFileError: The file system refuses.
            InputError: An argument is out of range, or the folder holds other things.
            InputTypeError: An argument is of the wrong kind.
            MissingExtraError: zarr is not installed.
        """
        header = Header(identity, surroundings or {}, arrays)
        codecs = {name: TileCodec(grid) for name, grid in arrays.items()}
        folder = Folder.at(path)
        _refuse_other_things(folder)  # before a lock is put beside it
        lock = Lock(folder.path)
        try:
            run = cls(folder, _resumed(folder, header), codecs, lock)
            run._tidy()
        except BaseException:
            lock.release()
            raise
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the store."""
        self._lock.release()

    def missing(self, name: str) -> Iterator[Index]:
        """Iterate over the tiles that are to be computed, the last axis fastest.

        Finished tiles are read and compared with their marks on the way; a damaged one is warned of and given out.

        Raises:
            InputError: There is no such array.
            StoreFileError: The store cannot be read.
        """
        grid, marked = self._grid(name), self.marked(name)
        return (index for index in grid.indices() if not self._is_right(name, index, marked))

    def write(self, name: str, index: Index, block: Tensor | np.ndarray) -> None:
        """Finish a tile: when this returns, it is on the disk and marked.

        Args:
            name: Which array.
            index: Which tile.
            block: Its values, of the tile's shape and of the array's dtype.

        Raises:
            InputError: There is no such array or tile, or shape or dtype do not fit.
            NonFiniteError: The block holds NaN or Inf, and the grid does not let them in.
            StoreFileError: The file system refuses; finished tiles are kept.
            StoreError: The run was closed.
        """
        if not self._lock.held:
            raise StoreError(self.path, "this run was closed, or belongs to another process. Open it again.")
        values = self._fitting(name, index, block)
        if self._header.complete:
            self._set_complete(False)
        raw = self._codecs[name].encode(index, values)
        with explained(self._folder, chunk_at(name, index), name, index):
            self._folder.write(chunk_at(name, index), raw)
        with explained(self._folder, mark_at(name, index), name, index):
            self._folder.write(mark_at(name, index), dumped_json(self._mark(name, index, raw)))
        self._right[name].add(index)

    def obtain(self, name: str, index: Index, compute: Callable[[], Tensor | np.ndarray]) -> np.ndarray:
        """Return a tile: from the store where it is finished, else computed, written and handed back.

        Args:
            name: Which array.
            index: Which tile.
            compute: Gives the tile's values.

        Raises:
            InputError: As `write`.
            NonFiniteError: As `write`.
            StoreError: As `write`.
        """
        raw = self._kept(name, index)
        if raw is None:
            self.write(name, index, compute())
            return self.tile(name, index)
        return self._decoded(name, index, raw)

    def complete(self) -> None:
        """Set the last mark, after every tile of every array was found right.

        Raises:
            StoreIncompleteError: Tiles are missing or damaged.
            StoreFileError: The file system refuses.
        """
        lacking = {name: sum(1 for _ in self.missing(name)) for name in self.arrays}
        if any(lacking.values()):
            raise StoreIncompleteError(self.path, {name: count for name, count in lacking.items() if count})
        if not self._header.complete:
            self._set_complete(True)

    def _refuse_unfinished(self, name: str, marked: set[Index]) -> None:
        """A run may read back an array of its own as soon as it has all tiles of that one."""
        if len(marked) < self._grid(name).total:
            raise StoreIncompleteError(self.path, {name: self._grid(name).total - len(marked)})

    def _is_right(self, name: str, index: Index, marked: Iterable[Index]) -> bool:
        return index in self._right[name] or (index in marked and self._kept(name, index) is not None)

    def _kept(self, name: str, index: Index) -> bytes | None:
        """Return a finished tile's bytes, or None where it must be computed."""
        try:
            raw = self._checked(name, index)
        except StoreDamagedError as error:
            warn(f"store {self.path!r}: tile {name}{list(index)} is damaged: {error.reason}. It is computed again.")
            return None
        if raw is not None:
            self._right[name].add(index)
        return raw

    def _fitting(self, name: str, index: Index, block: Any) -> np.ndarray:
        grid = self._grid(name)
        needed = grid.tile_shape(index)
        if not isinstance(block, Tensor | np.ndarray):
            raise InputTypeError.of("block", f"a {type(block).__name__}", "a tensor or a NumPy array is needed")
        came = f"{tuple(block.shape)} of {str(block.dtype).removeprefix('torch.')}"
        if came != f"{needed} of {grid.dtype}":
            raise InputError.of("block", came, f"tile {name}{list(index)} is {needed} of {grid.dtype}")
        if isinstance(block, Tensor):
            block = block.detach().resolve_conj().resolve_neg().cpu().numpy()
        if grid.finite and block.dtype.kind in "fc" and not np.isfinite(block).all():
            where = where_first(torch.from_numpy(np.ascontiguousarray(block)))
            raise NonFiniteError(f"in the block for tile {name}{list(index)}, {where}. It was not written.")
        return block

    def _set_complete(self, complete: bool) -> None:
        header = replace(self._header, complete=complete)
        with explained(self._folder, (HEADER,)):
            self._folder.write((HEADER,), header.dumped())
        self._header = header

    def _tidy(self) -> None:
        """Clear away what killed writers left half-written, and put every array's metadata in its place."""
        with explained(self._folder, ()):
            self._folder.sweep((), deep=False)
            for name in self.arrays:
                self._folder.sweep((name,))
        for name, codec in self._codecs.items():
            if self._array_metadata_differs(name):
                with explained(self._folder, (name, HEADER)):
                    self._folder.write((name, HEADER), codec.metadata)


@keywords()
def read_store(path: Location, name: str = "influences", *, partial: bool = False) -> np.ndarray:
    """Return a whole array of a stored run.

    Args:
        path: The store's folder.
        name: Which array.
        partial: As in `Store.read`.

    Raises:
        JacopsError: As `Store.open` and `Store.read`.
    """
    return Store.open(path).read(name, partial=partial)


def _resumed(folder: Folder, header: Header) -> Header:
    """Return the header of the run that is there, after comparing it, or put this one in its place."""
    there = header_in(folder)
    if there is None:
        _refuse_other_things(folder)
        with explained(folder, (HEADER,)):
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write((HEADER,), header.dumped())
        return header
    if differences := _differences(there.fields, header.fields):
        raise StoreMismatchError(folder.path, differences)
    changes = [
        f"{name}: {old} then, {new} now"
        for name, (old, new) in _differences(there.surroundings, header.surroundings).items()
    ]
    if changes:
        warn(f"store {str(folder.path)!r} was begun elsewhere, tiles may differ by rounding: {'; '.join(changes)}")
    return replace(header, surroundings=there.surroundings, complete=there.complete)


def _differences(there: Mapping[str, str], here: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    names = sorted({*there, *here})
    return {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}


def _refuse_other_things(folder: Folder) -> None:
    """Refuse a folder that is neither new, nor empty, nor a store."""
    if header_in(folder) is not None:
        return
    with explained(folder, ()):
        if not all(map(is_partial, folder.names())):
            raise not_ours(folder.path)
