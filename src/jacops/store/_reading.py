"""Reading a stored run: every byte is compared with its mark before it is used."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, final

import numpy as np

from ..errors import InputError, MemoryBudgetError, StoreDamagedError, StoreError, StoreFileError, StoreIncompleteError
from ._files import Folder
from ._format import HEADER, Grid, Header, Index, TileCodec, loaded_json

Location = str | os.PathLike[str]

_METADATA_LIMIT = 1 << 20  # bytes; ours take a few thousand
_MARK_NAME = re.compile(r"(0|[1-9][0-9]{0,18})(\.(0|[1-9][0-9]{0,18}))*", re.ASCII)
_MISSING = f"{HEADER} is missing"
_LINK_OR_SO = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO}


class Store:
    """A stored run, opened for reading by `Store.open`.

    Attributes:
        path: The folder, absolute.
        identity: What the numbers depend on, by name.
        surroundings: Versions, threads and device of the run that began it.
        arrays: The grid of every array.
    """

    def __init__(self, folder: Folder, header: Header, codecs: Mapping[str, TileCodec]) -> None:
        self._folder, self._header, self._codecs = folder, header, codecs

    @classmethod
    def open(cls, path: Location) -> Store:
        """Return the store in a folder, whether its run has finished or not.

        Args:
            path: A folder of a local file system.

        Raises:
            InputError: There is no stored run there.
            StoreDamagedError: Its metadata is not what a run writes.
            StoreFileError: It cannot be read.
            MissingExtraError: zarr is not installed.
        """
        folder = Folder.at(path)
        header = header_in(folder)
        if header is None:
            raise InputError.of("path", f"{str(path)!r}, which holds no stored run", "a store's folder is needed")
        store = cls(folder, header, {name: TileCodec(grid) for name, grid in header.arrays.items()})
        for name in header.arrays:
            difference = store._array_metadata_differs(name)
            if difference and (header.complete or difference != _MISSING):  # a run begins with its header
                raise StoreDamagedError(folder.path, difference, name)
        return store

    @property
    def path(self) -> str:
        """The folder, absolute."""
        return str(self._folder.path)

    @property
    def identity(self) -> dict[str, str]:
        """What the numbers depend on, by name."""
        return dict(self._header.identity)

    @property
    def surroundings(self) -> dict[str, str]:
        """Versions, threads and device of the run that began it."""
        return dict(self._header.surroundings)

    @property
    def arrays(self) -> dict[str, Grid]:
        """The grid of every array."""
        return dict(self._header.arrays)

    @property
    def is_complete(self) -> bool:
        """Whether the run finished, with every tile found right."""
        return self._header.complete

    def marked(self, name: str) -> set[Index]:
        """Return the tiles of an array that were finished; their bytes are checked when they are read.

        Raises:
            InputError: There is no such array.
            StoreDamagedError: A folder in the store is a link.
            StoreFileError: The store cannot be read.
        """
        counts = self._grid(name).counts
        with explained(self._folder, (name, "done"), name):
            names = self._folder.names((name, "done"))
        indices = (tuple(map(int, text.split("."))) for text in names if _MARK_NAME.fullmatch(text))
        return {
            index
            for index in indices
            if len(index) == len(counts) and all(i < count for i, count in zip(index, counts, strict=True))
        }

    def array(self, name: str) -> StoredArray:
        """Return an array of a finished run, to be read where it is indexed.

        Raises:
            InputError: There is no such array.
            StoreIncompleteError: The run has not finished.
        """
        self._refuse_unfinished(name, self.marked(name))
        return StoredArray(self, name)

    def tile(self, name: str, index: Index) -> np.ndarray:
        """Return one tile.

        Raises:
            InputError: There is no such array or tile.
            StoreIncompleteError: The tile is not finished.
            StoreDamagedError: Its bytes are not what the run wrote there.
            StoreFileError: It cannot be read.
        """
        raw = self._checked(name, index)
        if raw is None:
            raise StoreIncompleteError(self.path, {name: 1})
        return self._decoded(name, index, raw)

    def read(self, name: str, *, partial: bool = False) -> np.ndarray:
        """Return a whole array.

        Args:
            name: Which array.
            partial: Accept an unfinished run; what is missing is then NaN, in arrays of whole numbers the
                smallest value, of unsigned ones the largest.

        Raises:
            InputError: There is no such array.
            StoreIncompleteError: The run has not finished, and `partial` is False.
            StoreDamagedError: Bytes are not what the run wrote there.
            StoreFileError: It cannot be read.
            MemoryBudgetError: The array is larger than the machine's memory; read it tile by tile.
        """
        grid, marked = self._grid(name), self.marked(name)
        if not partial:
            self._refuse_unfinished(name, marked)
        if grid.nbytes > _physical_memory():
            size = f"array {name!r} {grid.shape} of {grid.nbytes / 2**30:.1f} GiB"
            raise MemoryBudgetError(
                f"{size} does not fit the machine's memory. Read it tile by tile: `tile(name, index)`."
            )
        result = np.full(grid.shape, grid.blank, grid.dtype)
        for index in sorted(marked):
            result[grid.selection(index)] = self.tile(name, index)
        return result

    def _refuse_unfinished(self, name: str, marked: set[Index]) -> None:
        if not self.is_complete:
            raise StoreIncompleteError(self.path, self._lacking())
        for index in self._grid(name).indices():
            if index not in marked:
                raise StoreDamagedError(self.path, "its mark is gone, though the run had finished", name, index)

    def _lacking(self) -> dict[str, int]:
        lacking = {name: grid.total - len(self.marked(name)) for name, grid in self.arrays.items()}
        return {name: count for name, count in lacking.items() if count}

    def _grid(self, name: str) -> Grid:
        if not isinstance(name, str) or name not in self._header.arrays:
            raise InputError.of("name", repr(name), f"one of {sorted(self._header.arrays)} is needed")
        return self._header.arrays[name]

    def _array_metadata_differs(self, name: str) -> str:
        """Return how an array's metadata differs from what its header implies, empty where it does not."""
        try:
            with explained(self._folder, (name, HEADER), name):
                raw = self._folder.read((name, HEADER), _METADATA_LIMIT)
        except StoreDamagedError as error:
            return error.reason
        return _MISSING if raw is None else self._codecs[name].difference(raw)

    def _checked(self, name: str, index: Index) -> bytes | None:
        """Return a tile's bytes, which fit its mark, or None where there is no mark."""
        grid = self._grid(name)
        grid.selection(index)  # refuses an index outside
        with explained(self._folder, mark_at(name, index), name, index):
            mark = self._folder.read(mark_at(name, index), _METADATA_LIMIT)
        if mark is None:
            return None
        with explained(self._folder, chunk_at(name, index), name, index):
            raw = self._folder.read(chunk_at(name, index), grid.encoded)
        if reason := self._wrong(name, index, mark, raw):
            raise StoreDamagedError(self.path, reason, name, index)
        return raw

    def _wrong(self, name: str, index: Index, mark: bytes, raw: bytes | None) -> str:
        """Return what is wrong with the bytes of a tile or with its mark, empty where nothing is."""
        size = self._grid(name).encoded
        if raw is None:
            return "its file is gone"
        if len(raw) != size:
            return f"its file holds {'more' if len(raw) > size else len(raw)} bytes, but {size} are needed"
        try:
            marked = loaded_json(mark)
        except ValueError as error:
            return f"its mark is {error}"
        return "" if marked == self._mark(name, index, raw) else "its bytes are not those that were marked"

    def _decoded(self, name: str, index: Index, raw: bytes) -> np.ndarray:
        try:
            return self._codecs[name].decode(index, raw)
        except ValueError as error:
            raise StoreDamagedError(self.path, str(error), name, index) from None

    def _mark(self, name: str, index: Index, raw: bytes) -> dict[str, Any]:
        """Return the mark of these bytes, at this place, in this run."""
        digest = hashlib.blake2b(json.dumps([name, *index]).encode(), digest_size=32, key=self._header.key)
        digest.update(raw)
        return {"blake2b": digest.hexdigest()}


@final
class StoredArray:
    """An array on disk; indexing reads the tiles that are needed and compares each with its mark.

    Made by `Store.array`. The first index is a row or a slice of rows; `numpy.asarray` reads all.

    Attributes:
        store: The stored run.
        name: Which of its arrays.

    Example:
        >>> import torch, jacops
        >>> from tempfile import mkdtemp
        >>> x = torch.arange(12.0).reshape(6, 2)
        >>> found = jacops.compute_jacobian(lambda x: x**2, x, store=mkdtemp())
        >>> found.shape
        (6, 2, 2)
        >>> found[1]
        array([[4., 0.],
               [0., 6.]], dtype=float32)
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return self.store.arrays[self.name].shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its entries."""
        return np.dtype(self.store.arrays[self.name].dtype)

    @property
    def nbytes(self) -> int:
        """Its size, were it in memory."""
        return self.store.arrays[self.name].nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return rows, or what further indices take of them.

        Raises:
            InputError: The first index is neither a whole number in range nor a slice.
            StoreDamagedError: A tile is not what the run wrote there.
        """
        first, *others = index if isinstance(index, tuple) else (index,)
        rows = len(self)
        single = isinstance(first, int | np.integer) and not isinstance(first, bool)
        if not isinstance(first, slice) and not (single and -rows <= first < rows):
            raise InputError.of("index", f"{first!r:.80}", f"a row from 0 to {rows - 1} or a slice of rows is needed")
        picked = range(rows)[first] if isinstance(first, slice) else range(int(first) % rows, int(first) % rows + 1)
        found = self._rows(picked)
        return found[(slice(None), *others)] if isinstance(first, slice) else found[0][tuple(others)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self.store.read(self.name)
        return found if dtype is None else found.astype(dtype)

    def __repr__(self) -> str:
        return f"StoredArray({self.name!r} {self.shape} of {self.dtype}, in {self.store.path!r})"

    def _rows(self, picked: range) -> np.ndarray:
        grid = self.store.arrays[self.name]
        result = np.full((len(picked), *grid.shape[1:]), grid.blank, grid.dtype)
        if not picked:
            return result
        places, size = np.asarray(picked), grid.tile[0]
        touched = set((places // size).tolist())
        for index in grid.indices() if len(grid.counts) > 1 else ((number,) for number in sorted(touched)):
            if index[0] in touched:
                where = grid.selection(index)
                inside = (places >= where[0].start) & (places < where[0].stop)
                result[(inside, *where[1:])] = self.store.tile(self.name, index)[places[inside] - where[0].start]
        return result


def header_in(folder: Folder) -> Header | None:
    """Return the header in a folder, None where there is none."""
    with explained(folder, (HEADER,)):
        raw = folder.read((HEADER,), _METADATA_LIMIT)
    return None if raw is None else Header.loaded(folder.path, raw)


@contextlib.contextmanager
def explained(
    folder: Folder, parts: tuple[str, ...], name: str | None = None, index: Index | None = None
) -> Iterator[None]:
    """Convert an error of the file system to one with path and tile."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        file = "/".join(parts) or "."
        if error.errno in _LINK_OR_SO and folder.path.is_dir():
            reason = f"on the way to {file!r} stands a link, or something else that jacops does not create"
            raise StoreDamagedError(folder.path, reason, name, index) from None
        raise StoreFileError(folder.path, file, error.strerror or str(error), name, index) from error


def chunk_at(name: str, index: Index) -> tuple[str, ...]:
    """Return where a tile's chunk is."""
    return (name, "c", *map(str, index))


def mark_at(name: str, index: Index) -> tuple[str, ...]:
    """Return where a tile's mark is."""
    return (name, "done", ".".join(map(str, index)))


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
