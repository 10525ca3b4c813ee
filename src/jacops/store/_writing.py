"""Writing a stored run, in any number of processes at once: each takes tiles that no other has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
from torch import Tensor

from .._progress import track
from ..errors import InputError, StoreDamagedError, StoreError, StoreIncompleteError, warn
from ._beginning import FACTS, FACTS_BYTES, ONLY, agreed, kept_bytes, packed, refuse_other_things
from ._files import Folder
from ._format import HEADER, Grid, Header, Index, TileCodec, dumped_json, loaded_json
from ._locks import Claims, Use, Wait
from ._reading import Location, Store, chunk_at, explained, header_in, mark_at
from ._states import TileStates

Facts = Callable[[], Mapping[str, Any]]
_STATE_BYTES = 8, 2**20  # of a state at most: so many tiles (an iteration holds three or four), and what is beside


class StoredRun(Store):
    """A run that writes its tiles to a store, shares it with other processes, and continues an earlier run.

    Made by `StoredRun.open`. Any number of processes may run the same lines: each computes tiles that no other has,
    waits for those, takes over what a killed one left, and reads all. Use it as a context: leaving it releases the
    store, finished or not.

    Example:
        >>> import torch
        >>> from tempfile import mkdtemp
        >>> from jacops.store import digest_module
        >>> identity = {"model": digest_module(torch.nn.Linear(2, 1)), "damping": "0.1"}
        >>> with StoredRun.open(mkdtemp(), identity, {"influences": Grid((3, 4), tile=(2, 4))}) as run:
        ...     for index in run.missing("influences"):
        ...         run.write("influences", index, np.ones(run.arrays["influences"].tile_shape(index)))
        ...     run.complete()
        ...     run.read("influences").sum()
        np.float64(12.0)
    """

    def __init__(self, folder: Folder, header: Header, use: Use, facts: Facts | None) -> None:
        super().__init__(folder, header, {name: TileCodec(grid) for name, grid in header.arrays.items()})
        self._use, self._make_facts = use, facts
        self._right: dict[str, set[Index]] = {name: set() for name in header.arrays}
        self._claims = Claims(folder.path)
        self._states: dict[tuple[str, Index], TileStates] = {}

    @classmethod
    def open(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        path: Location,
        identity: Mapping[str, str],
        arrays: Mapping[str, Grid],
        *,
        surroundings: Mapping[str, str] | None = None,
        facts: Facts | None = None,
    ) -> StoredRun:
        """Begin a run in a new or empty folder, or take part in the one that is there.

        Args:
            path: A folder of a file system with locks.
            identity: Names and digests, or short texts, of everything the numbers depend on. A difference is refused.
            arrays: The arrays and how they are cut.
            surroundings: What should not change the numbers beyond rounding. A difference is warned of.
            facts: Computes what all tiles depend on beside their place, such as a step size or fitted factors: plain
                values and bytes by name, which `fact` returns. One process calls it, before the store is there; if it
                raises, there is none.

        Raises:
            StoreMismatchError: The run there has another identity or other arrays; each difference is named.
            StoreDamagedError: The header of the run there cannot be read.
            StoreFileError: The file system refuses, or has no locks.
            InputError: An argument is out of range, or the folder holds other things.
            InputTypeError: An argument is of the wrong kind.
            MissingExtraError: zarr is not installed.
        """
        if facts is not None:
            arrays = {**arrays, FACTS: Grid((1, FACTS_BYTES), (1, FACTS_BYTES), "uint8")}
        header = Header(identity, surroundings or {}, arrays)
        folder, codecs = Folder.at(path), [TileCodec(grid) for grid in arrays.values()]
        _ = codecs  # without zarr nothing is made
        refuse_other_things(folder)  # before locks are put beside it
        use = Use(folder.path)
        try:
            while True:
                alone = use.begin()
                use.probe()
                run = cls._begun(folder, header, use, facts, alone)
                if run is not None and (not alone or use.share()):
                    return run
        except BaseException:
            use.end()
            raise

    @classmethod
    def _begun(cls, folder: Folder, header: Header, use: Use, facts: Facts | None, alone: bool) -> Self | None:
        """Return a run in the store, which is made where it is not there yet; None where it takes to be alone."""
        there = header_in(folder)
        if there is not None:
            run = cls(folder, agreed(folder, there, header), use, facts)
            run._tidy(alone)
            return run
        if not alone:  # who began it died
            use.end()
            return None
        refuse_other_things(folder)
        found = None if facts is None else facts()
        with explained(folder, (HEADER,)):
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write((HEADER,), header.dumped())
        run = cls(folder, header, use, facts)
        run._tidy(alone)
        if found is not None:
            run.write(FACTS, ONLY, packed(folder, found))
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the store, and tiles that were taken and not written."""
        self._claims.close()
        self._use.end()

    # ---- sharing tiles ---------------------------------------------------------------------------------------------

    def missing(self, name: str, *also: str) -> Iterator[Index]:
        """Iterate over the tiles that this run is to compute, the last axis fastest, until all are finished.

        A tile is assigned to one of the running processes until it is written or the run is closed. Tiles of other
        processes are waited for, and assigned again if their process ends without having written them. Finished tiles
        are read and compared with their marks; a damaged one causes a warning and is assigned again.

        Args:
            name: Which array.
            also: Arrays that are written together with it: their tiles of the same first indices.

        Raises:
            InputError: There is no such array.
            StoreFileError: The store cannot be read.
        """
        self._grid(name)
        return self._missing(name, also)

    def _missing(self, name: str, also: tuple[str, ...]) -> Iterator[Index]:
        while True:
            yield from (index for index in self._grid(name).indices() if self.take(name, index, *also))
            if not self.wait(name, *also):
                return

    def take(self, name: str, index: Index, *also: str) -> bool:
        """Take a tile to compute it; False where it is finished, or some run has it. Never waits.

        Args:
            name: Which array.
            index: Which tile.
            also: Arrays that are written together with it: their tiles of the same first indices.

        Raises:
            InputError: There is no such array or tile.
            StoreFileError: The store cannot be read.
        """
        self._require_open()
        if self._is_settled(name, index, also) or not self._claims.take(name, index):
            return False
        if self._is_finished(name, index, also, tell=True):  # meanwhile
            self._claims.let_go(name, index)
            return False
        return True

    def leave(self, name: str, index: Index) -> None:
        """Release a tile that was taken."""
        self._claims.let_go(name, index)

    def has(self, name: str, index: Index) -> bool:
        """Return whether a tile is finished, its bytes those that were marked.

        Raises:
            InputError: There is no such array or tile.
            StoreFileError: The store cannot be read.
        """
        return self._is_finished(name, index)

    def wait(self, name: str, *also: str) -> bool:
        """Wait for the tiles that other runs have; return whether one of them is to be computed after all.

        Tiles that this run has taken itself are not waited for: write them first, since other runs may wait for them.

        Args:
            name: Which array.
            also: Arrays that are written together with it: their tiles of the same first indices.

        Raises:
            InputError: There is no such array.
            StoreFileError: The store cannot be read.
        """
        held = [index for index in self._grid(name).indices() if not self._is_settled(name, index, also)]
        freed: list[Index] = []
        for _ in track(self._finishing(name, also, held, freed), "waiting for other processes", total=len(held)):
            pass
        return bool(freed)

    def _finishing(self, name: str, also: tuple[str, ...], held: list[Index], freed: list[Index]) -> Iterator[Index]:
        """Yield tiles as others finish them, until all are, or one was left."""
        waited = Wait(f"store {self.path!r}: {len(held)} of the tiles of {name!r} are left to other processes")
        while held:
            for index in list(held):
                free = self._claims.is_free(name, index)  # before it is looked at: who ends writes, then lets go
                if self._is_settled(name, index, also):
                    held.remove(index)
                    yield index
                elif free:
                    freed.append(index)
                    return
            if held:
                waited.pause(self._claims.holder(name, held[0]))

    def _is_settled(self, name: str, index: Index, also: Iterable[str]) -> bool:
        return self._claims.has(name, index) or self._is_finished(name, index, also)

    def _is_finished(self, name: str, index: Index, also: Iterable[str] = (), tell: bool = False) -> bool:
        """Return whether a tile and those that belong to it exist undamaged; with `tell`, warn of damage."""
        tiles = [(name, index), *((other, (*index, *ONLY)[: len(self._grid(other).counts)]) for other in also)]
        return all([place in self._right[of] or self._kept(of, place, tell) is not None for of, place in tiles])

    def _require_open(self) -> None:
        if not self._use.held:
            raise StoreError(self.path, "this run was closed, or belongs to another process. Open it again.")

    # ---- writing ---------------------------------------------------------------------------------------------------

    def write(self, name: str, index: Index, block: Tensor | np.ndarray) -> None:
        """Finish a tile: when this returns, it is on the disk and marked, and no longer this run's own.

        If another process has the tile, the call waits for it.

        Args:
            name: Which array.
            index: Which tile.
            block: Its values, of the tile's shape and of the array's dtype.

        Raises:
            InputError: There is no such array or tile, or shape or dtype do not fit.
            NonFiniteError: The block holds NaN or Inf, and the grid does not allow them.
            StoreFileError: The file system refuses; finished tiles are kept.
            StoreError: The run was closed.
        """
        self._require_open()
        values = self._grid(name).fitting(name, index, block)
        raw = self._codecs[name].encode(index, values)
        self._claims.wait_for(name, index)
        try:
            if self._header.complete:
                self._set_complete(False)
            with explained(self._folder, chunk_at(name, index), name, index):
                self._folder.write(chunk_at(name, index), raw)
            with explained(self._folder, mark_at(name, index), name, index):
                self._folder.write(mark_at(name, index), dumped_json(self._mark(name, index, raw)))
            if (states := self._states.pop((name, index), None)) is not None:
                states.forget()
        finally:
            self._claims.let_go(name, index)
        self._right[name].add(index)

    def states(self, name: str, index: Index) -> TileStates:
        """Return what is kept of a tile that is in work, to go on from after a kill; it is removed with `write`."""
        limit = _STATE_BYTES[0] * self._grid(name).encoded + _STATE_BYTES[1]
        return self._states.setdefault((name, index), TileStates(self._folder, name, index, limit))

    def obtain(self, name: str, index: Index, compute: Callable[[], Tensor | np.ndarray]) -> np.ndarray:
        """Return a tile: from the store if it is finished; otherwise it is computed and written.

        One process computes it; others wait for it.

        Args:
            name: Which array.
            index: Which tile.
            compute: Gives the tile's values.

        Raises:
            InputError: There is no such array or tile, or shape or dtype do not fit.
            NonFiniteError: The block holds NaN or Inf, and the grid does not allow them.
            StoreError: The run was closed, or the file system refuses.
        """
        raw = self._kept(name, index, tell=False)
        if raw is None:
            self._require_open()
            self._claims.wait_for(name, index)
            try:
                raw = self._kept(name, index)
                if raw is None:
                    self.write(name, index, compute())
                    return self.tile(name, index)
            finally:
                self._claims.let_go(name, index)
        return self._decoded(name, index, raw)

    def complete(self) -> None:
        """Set the last mark, after every tile of every array was found right.

        Raises:
            StoreIncompleteError: Tiles are missing or damaged.
            StoreFileError: The file system refuses.
        """
        lacking = {
            name: sum(not self._is_finished(name, index) for index in grid.indices())
            for name, grid in self.arrays.items()
        }
        if any(lacking.values()):
            raise StoreIncompleteError(self.path, {name: count for name, count in lacking.items() if count})
        if not self._header.complete:
            self._set_complete(True)

    def _refuse_unfinished(self, name: str, marked: set[Index]) -> None:
        """A run may read back an array of its own as soon as it has all tiles of that one."""
        if len(marked) < self._grid(name).total:
            raise StoreIncompleteError(self.path, {name: self._grid(name).total - len(marked)})

    def _kept(self, name: str, index: Index, tell: bool = True) -> bytes | None:
        """Return a finished tile's bytes, or None where it must be computed."""
        try:
            raw = self._checked(name, index)
        except StoreDamagedError as error:
            if tell:
                warn(f"store {self.path!r}: tile {name}{list(index)} is damaged: {error.reason}. It is computed again.")
            return None
        if raw is not None:
            self._right[name].add(index)
        return raw

    def _set_complete(self, complete: bool) -> None:
        header = replace(self._header, complete=complete)
        with explained(self._folder, (HEADER,)):
            self._folder.write((HEADER,), header.dumped())
        self._header = header

    def _tidy(self, alone: bool) -> None:
        """Put every array's metadata in its place; who is alone clears away what killed writers left half-written."""
        if alone:
            with explained(self._folder, ()):
                self._folder.sweep((), deep=False)
                for name in self.arrays:
                    self._folder.sweep((name,))
        for name, codec in self._codecs.items():
            if self._array_metadata_differs(name):
                with explained(self._folder, (name, HEADER)):
                    self._folder.write((name, HEADER), codec.metadata)

    # ---- facts -----------------------------------------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """Return one of the facts, as the run that began the store had it.

        Raises:
            InputError: There is none of this name.
            StoreDamagedError: The facts are not what a run writes.
            StoreFileError: The store cannot be read.
        """
        value = self._fact(name)
        if not isinstance(value, dict) or "blake2b" not in value:
            return value
        raw = kept_bytes(self._folder, name, value)
        if raw is None:
            warn(f"store {self.path!r}: the file of its fact {name!r} is damaged. It is computed again.")
            with explained(self._folder, mark_at(FACTS, ONLY), FACTS, ONLY):
                self._folder.remove(mark_at(FACTS, ONLY))
            self._right[FACTS].clear()
            raw = kept_bytes(self._folder, name, self._fact(name))
        if raw is None:
            raise StoreDamagedError(self.path, f"the file of {name!r} is not the one that was written", FACTS, ONLY)
        return raw

    def _fact(self, name: str) -> Any:
        if self._make_facts is None:
            raise InputError.of("name", repr(name), "the run was opened without `facts`")
        make = self._make_facts
        tile = self.obtain(FACTS, ONLY, lambda: packed(self._folder, make()))
        try:
            found = loaded_json(tile.tobytes())
        except ValueError as error:
            raise StoreDamagedError(self.path, f"it is {error}", FACTS, ONLY) from None
        if name not in found:
            raise InputError.of("name", repr(name), f"one of {sorted(found)} is needed")
        return found[name]
