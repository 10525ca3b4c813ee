"""Calls whose results have a row per sample, by way of a store: tiles of rows, shared by processes and resumed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args

from torch import Tensor, nn

from ._data import Batches
from ._digests import DataDigest, digest_data, digest_function, digest_module, surroundings
from ._framework import refuse_options
from ._ladder.protocol import is_framework_model
from ._loaders import cut_rows, is_loader, joined_rows_of, rows_of
from ._planning import plan_samples
from ._progress import track
from ._torch.protocol import bare
from ._trees import flatten
from ._words import Mode
from .errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from .store import Grid, StoredRun

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_TILE_BYTES = 2**24  # 16 MiB of rows, what `jacops.store` recommends for a tile
_SETTINGS = ("outputs", "shared", "at", "freeze", "mode", "batch_size", "check_finite")


def in_store(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a call by samples write its rows to a store: it is then made for every tile of rows that is missing."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Any:
        if kwargs.get("store") is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _through_store(function, bound.arguments)

    return call


def _through_store(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Return what a call gives for all samples, as arrays on the disk."""
    from .store import Store, StoredRun

    path = given.pop("store")
    for name in ("out", "create_graph", "compile"):
        if given[name] is not None and given[name] is not False:
            raise InputError.of(name, "given", "a stored run writes plain numbers to its own folder", "Leave it out.")
    if is_framework_model(given["model"]):
        refuse_options(store=path)
    rows = _StoredSamples(given)
    identity = _identity(function.__name__, given, rows)

    def facts() -> dict[str, Any]:
        """Return how samples are swept, which is neither timed nor left to the memory that happens to be free."""
        if not rows.count:
            return {"mode": given["mode"], "batch_size": 1}
        plan = plan_samples({**given, **rows.some(slice(0, rows.step_of(grids)))})
        mode = plan.chosen.name if plan.chosen.name in get_args(Mode) else given["mode"]
        return {"mode": mode, "batch_size": max(1, plan.chunk)}

    grids = _grids_in(path) or _grids_of(function, given, rows)
    with StoredRun.open(path, identity, grids, surroundings=surroundings(), facts=facts) as kept:
        if not (kept.is_complete and all(kept.has(name, index) for name in grids for index in grids[name].indices())):
            _fill(function, given, rows, kept)
    found = Store.open(path)
    arrays = tuple(found.array(name) for name in found.arrays if name.startswith(_NAME))
    return arrays[0] if len(arrays) == 1 else arrays


_NAME = "jacobian"


def _fill(function: Callable[..., Any], given: dict[str, Any], rows: _StoredSamples, kept: StoredRun) -> None:
    """Compute the tiles that are missing, until all are there."""
    names = [name for name in kept.arrays if name.startswith(_NAME)]
    first, *others = names
    grid, how = kept.arrays[first], {name: kept.fact(name) for name in ("mode", "batch_size")}
    tiles = track(kept.missing(first, *others), function.__name__, enabled=given["progress"], total=grid.total)
    for index in tiles:
        where = grid.selection(index)[0]
        try:
            blocks = _leaves(function(**{**given, **rows.some(where), **how}))
        except NonFiniteError as error:
            raise NonFiniteError(f"samples {where.start} to {where.stop - 1}: {error}") from error
        for name, block in zip(reversed(names), reversed(blocks), strict=True):  # the one that is taken comes last
            kept.write(name, (index[0], *[0] * (block.ndim - 1)), block)
    kept.complete()


def _grids_in(path: Any) -> Mapping[str, Grid] | None:
    """Return the arrays of a store that is there: where model, data and settings agree, so do its shapes."""
    from .store._files import Folder
    from .store._reading import header_in

    there = header_in(Folder.at(path))
    grids = {} if there is None else {name: grid for name, grid in there.arrays.items() if name.startswith(_NAME)}
    return grids or None


def _grids_of(function: Callable[..., Any], given: dict[str, Any], rows: _StoredSamples) -> Mapping[str, Grid]:
    """Return the arrays for a result, whose shapes are those of one sample."""
    from .store import Grid

    blocks = _leaves(function(**{**given, **rows.some(slice(0, 1)), "fallback": "silent"}))
    row = max(1, sum(block[:1].numel() * block.element_size() for block in blocks))
    step = max(1, min(_TILE_BYTES // row, max(1, rows.count)))
    names = [_NAME] if len(blocks) == 1 else [f"{_NAME}_{number}" for number in range(len(blocks))]
    return {
        name: Grid(
            (rows.count, *block.shape[1:]),
            tile=(step, *(max(1, side) for side in block.shape[1:])),
            dtype=str(block.dtype),
            finite=given["check_finite"],
        )
        for name, block in zip(names, blocks, strict=True)
    }


def _leaves(found: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(found, "result")[0] if leaf is not None]


def _identity(call: str, given: Mapping[str, Any], rows: _StoredSamples) -> dict[str, str]:
    """Return digests of all that the numbers depend on."""
    model = given["model"]
    digest = digest_module(bare(model)) if isinstance(model, nn.Module) else digest_function(model)
    identity = {"call": call, "model": digest, "data": rows.digest}
    if given["target"] is not None:
        identity["target"] = digest_data([given["target"]])
    return identity | {name: _said(given[name]) for name in _SETTINGS}


def _said(value: Any) -> str:
    """Return a setting as a short text: plain ones as they are, others by their digest."""
    return repr(value) if _is_short(value) else digest_function(value)


def _is_short(value: Any) -> bool:
    """Return whether a value is made of few numbers and names."""
    several = isinstance(value, list | tuple | slice) and len(repr(value)) < 200
    return several or value is None or isinstance(value, str | int)


class _StoredSamples:
    """The samples of a call, from tensors or from a loader.

    Args:
        given: The call's arguments.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._x, self._shared, self._target = given["x"], given["shared"], given["target"]
        self._batches = Batches(self._x, "x", given["unpack"]) if is_loader(self._x) else None
        self._walk: Iterator[Any] = iter(())
        self._batch, self._start, self._stop = None, 0, 0  # the batch at hand, and its rows
        digest, self.count = DataDigest(), 0
        for number, x in enumerate(self._x_batches()):
            digest.update(x)
            self.count += rows_of(x, self._shared, number)
        self.digest = digest.hexdigest()
        if self._target is not None and len(self._target) != self.count:
            raise InputError.of("target", f"of {len(self._target)} rows", f"there are {self.count} samples")

    def step_of(self, grids: Mapping[str, Grid]) -> int:
        """Return the rows of a tile."""
        return next(iter(grids.values())).tile[0]

    def some(self, where: slice) -> dict[str, Any]:
        """Return arguments of a call for some samples."""
        target = None if self._target is None else self._target[where]
        return {"x": self.part(where), "target": target, "unpack": None, "progress": False}

    def part(self, where: slice) -> Any:
        """Return some samples; of a loader those before the last ones requested cost another pass."""
        if self._batches is None:
            return cut_rows(self._x, self._shared, where)
        if where.start < self._start or self._batch is None:
            self._walk, self._batch, self._start, self._stop = iter(self._x_batches()), None, 0, 0
        parts, number = list[Any](), 0
        while True:
            low, high = max(where.start, self._start) - self._start, min(where.stop, self._stop) - self._start
            if self._batch is not None and low < high:
                parts.append(cut_rows(self._batch, self._shared, slice(low, high)))
            if self._stop >= where.stop or self._stop >= self.count:
                return joined_rows_of(parts, self._shared)
            self._batch, self._start = next(self._walk), self._stop
            self._stop += rows_of(self._batch, self._shared, number)
            number += 1

    def _x_batches(self) -> Iterator[Any]:
        return iter([self._x]) if self._batches is None else self._batches.inputs()
