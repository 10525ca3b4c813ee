"""Many rows of a derivative at once: compiled and batched, compared with the same rows one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._ladder.protocol import SweepOptions
from .._progress import track
from .._runtime.agreement import tolerance, worst_disagreement
from .._runtime.chunks import ROWS, rows_of
from ..errors import NotDifferentiableError, warn
from .crossing import to_torch
from .jaxpr import READS
from .rounding import rounding_error

Each = Callable[[Callable[[Any], Any], Any], Any]
Kernel = Callable[[Each, Any, Any], Any]


def together(function: Callable[[Any], Any], rows: Any) -> Any:
    """Map over the leading axis in one batched pass."""
    return jax.vmap(function)(rows)


def one_by_one(function: Callable[[Any], Any], rows: Any) -> Any:
    """Map over the leading axis in turn, compiled."""
    return jax.lax.map(function, rows)


def uncompiled(function: Callable[[Any], Any], rows: Any) -> Any:
    """Map over the leading axis in turn, with values at hand: the function may branch on them."""
    return jnp.stack([function(jax.tree.map(itemgetter(i), rows)) for i in range(rows_in(rows))])


def rows_in(rows: Any) -> int:
    """Return the length of the leading axis."""
    return jax.tree.leaves(rows)[0].shape[0]


def shapes(tree: Any) -> Any:
    """Return what a compiled function is specialised on: structure, shapes, dtypes and JAX's precision."""
    leaves, spec = jax.tree.flatten(tree)
    kinds = tuple((leaf.shape, str(leaf.dtype)) if hasattr(leaf, "dtype") else type(leaf) for leaf in leaves)
    return spec, kinds, bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


class Sweep:
    """One kernel over any number of rows.

    A kernel maps rows with the `each` it is given. Rows go in chunks, padded to a power of two so that few shapes are
    compiled. The first chunk of every shape is computed again one row at a time, or for a linear kernel one random mix
    of its rows; where the two differ, rows are computed one by one from then on.

    Args:
        kernel: `kernel(each, point, rows)`, one result per row.
        call: How messages call it.
        linear: The result is linear in the rows.
    """

    def __init__(self, kernel: Kernel, call: str, *, linear: bool) -> None:
        self.call, self.linear = call, linear
        self._together = jax.jit(partial(kernel, together))
        self._one_by_one = jax.jit(partial(kernel, one_by_one))
        self._uncompiled = partial(kernel, uncompiled)
        self._agreed: set[Any] = set()
        self._unbatched = ""  # why rows are computed one by one

    def __call__(
        self, point: Any, rows: Any, width: int, options: SweepOptions, *, compiled: bool = True
    ) -> list[np.ndarray]:
        """Return the results chunk by chunk.

        Args:
            point: What all rows share.
            rows: A tree of arrays with one leading axis.
            width: Number of entries of one result.
            options: Of the public call.
            compiled: False where the model reads values, which only works one row at a time and uncompiled.

        Raises:
            NotDifferentiableError: A value is read that depends on what is differentiated.
        """
        many = rows_in(rows)
        chunk = min(options.batch_size or ROWS, rows_of(width))
        # A power of two, so that few shapes are compiled.
        chunk = 1 << (chunk.bit_length() - 1)
        rows = jax.tree.map(np.asarray, rows)  # cut into chunks without compiling a gather for each shape
        results = []
        for start in track(range(0, many, chunk), self.call, enabled=options.progress):
            here = min(chunk, many - start)
            padded = 1 << (here - 1).bit_length() if compiled else here
            index = np.minimum(np.arange(start, start + padded), many - 1)
            part = jax.tree.map(itemgetter(index), rows)
            found = self._compiled(point, part, options) if compiled else self._read(point, part)
            results.append(found[:here])
        return results

    def _compiled(self, point: Any, rows: Any, options: SweepOptions) -> np.ndarray:
        if rows_in(rows) == 1:
            return np.asarray(self._one_by_one(point, rows))
        if self._unbatched:
            return self._give_up(self._unbatched, point, rows, options)
        try:
            found = np.asarray(self._together(point, rows))
        except NotImplementedError as error:  # an operation without a batching rule
            return self._give_up(f"it cannot be batched ({error})", point, rows, options)
        key = shapes((point, rows))
        known = key in self._agreed and options.checks == "first"
        if options.checks == "never" or known or not np.isfinite(found).all():
            return found
        distance, proved = self._distance(point, rows, found)
        if proved:
            self._agreed.add(key)
        elif distance:
            reason = f"JAX's vmap of it is off by {distance:.1e} from one row at a time"
            return self._give_up(reason, point, rows, options)
        return found

    def _give_up(self, reason: str, point: Any, rows: Any, options: SweepOptions) -> np.ndarray:
        news, self._unbatched = not self._unbatched, reason
        leave(replace(options, call=self.call), reason, "Its rows are computed one by one", news)
        return np.asarray(self._one_by_one(point, rows))

    def _distance(self, point: Any, rows: Any, found: np.ndarray) -> tuple[float, bool]:
        """Return how far the batched rows are from plain ones, 0 where that may be rounding, and if they agree."""
        if self.linear:
            weights = np.random.default_rng(0).standard_normal(rows_in(rows))
            rows, found = jax.tree.map(partial(_mixed, weights), (rows, found))
        plain = to_torch(self._one_by_one(point, rows))
        pairs = list(zip(to_torch(found), plain, strict=True))
        distance = worst_disagreement(pairs)
        if distance <= tolerance([plain.dtype]):
            return distance, True
        gap = float(np.linalg.norm((to_torch(found) - plain).double().numpy()))
        return 0.0 if gap <= rounding_error(self._uncompiled, point, rows) else distance, False

    def _read(self, point: Any, rows: Any) -> np.ndarray:
        try:
            return np.asarray(self._uncompiled(point, rows))
        except READS as error:
            raise reading(self.call, error) from None


def leave(options: SweepOptions, reason: str, instead: str, news: bool) -> None:
    """Report that a fast way is left, once, as the caller requested.

    Raises:
        NotDifferentiableError: `fallback="error"` forbids it.
    """
    if options.fallback == "error":
        raise NotDifferentiableError(f"{options.call}: {reason}, and fallback='error' forbids the plain route.")
    if news and options.fallback == "warn":
        warn(f"{options.call}: {reason}. {instead}.")


def reading(call: str, error: Exception) -> NotDifferentiableError:
    """Return the error for a value read out of an array that is being differentiated."""
    return NotDifferentiableError(
        f"{call}: the model or its loss turns an array that is differentiated into plain numbers, which cuts its "
        f"derivative off ({str(error).splitlines()[0]}). Use jax.numpy operations only, without `float()`, `.item()` "
        "or NumPy calls."
    )


def _mixed(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    return np.tensordot(weights, wide, 1)[None].astype(rows.dtype)
