"""Projected training gradients in tiles, with what each tile adds to the projected curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._data import Batch
from .._digests import digest_data, surroundings
from .._fisher import drawn_scores
from .._framework import likelihood_at
from .._problem import BatchPoint, Problem
from .._runtime.counter import Draws
from .._torch.protocol import row_scale
from .._trees import output_leaves
from .._words import IndexCurvature
from ..errors import InputError
from ._run import in_tiles
from ._sketch import VERSION, GradientSketch

if TYPE_CHECKING:
    from ..store import Grid

_TILE_BYTES = 2**24  # 16 MiB of rows, what `jacops.store` recommends for a tile
_TOGETHER = 4096  # columns up to which the curvature is one matrix: 128 MiB in float64
_WIDEST = 16384  # side of a block: 2 GiB in float64
_PAIRS_BYTES = 2**28  # 256 MiB of rows of output Jacobians at a time
_MOST_OUTPUTS = 4096  # of a sample, each of which takes a sweep: beyond that a Gauss-Newton matrix is refused
_CONVEX = 1e-5  # relative: negative eigenvalues of a loss's Hessian up to this are rounding, in float32 too


@dataclass(frozen=True)
class Tile:
    """Some training samples.

    Attributes:
        rows: Projected gradients `(n, r)`.
        shares: Weights in the objective `(n,)`, float64.
        curvature: What they add to the curvature, block after block, `(entries,)`, float64.
    """

    rows: Tensor
    shares: Tensor
    curvature: Tensor


@dataclass(frozen=True)
class IndexPlan:
    """What an index is made of.

    Attributes:
        problem: The objective.
        sketch: The projection.
        kind: The curvature.
    """

    problem: Problem
    sketch: GradientSketch
    kind: IndexCurvature

    @cached_property
    def blocks(self) -> list[slice]:
        """Columns that the curvature couples: all of them where it is small enough, else those of each parameter."""
        return [slice(0, self.sketch.dim)] if self.sketch.dim <= _TOGETHER else self.sketch.slices

    def check_size(self) -> None:
        """Refuse a rank with which a block of the curvature would take more than 2 GiB.

        Raises:
            InputError: It would.
        """
        sides = {block.stop - block.start for block in self.blocks}
        if max(sides, default=0) > _WIDEST:
            came, needed = f"{self.sketch.rank}", f"a parameter would have {max(sides):,} numbers, at most {_WIDEST:,}"
            raise InputError.of("rank", came, f"{needed} are taken", f"Take at most {int(_WIDEST**0.5)}.")

    @property
    def sizes(self) -> list[int]:
        """Entries of each block of the curvature."""
        return [(block.stop - block.start) ** 2 for block in self.blocks]

    @property
    def step(self) -> int:
        """Rows of a tile: enough for its share of the curvature to take no more than the rows."""
        each = max(1, self.sketch.dim) * self.problem.space.dtype.itemsize
        return max(1, _TILE_BYTES // each, -(-8 * sum(self.sizes) // each))

    @property
    def dtype(self) -> str:
        """Of the rows, in NumPy's words."""
        return str(self.problem.space.dtype).removeprefix("torch.")

    def tiles(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Tile]]:
        """Compute those tiles that are wanted, by number."""
        _ = self.problem.denominator  # before any other pass: it computes by what the loss divides
        unchanged, first = self.problem.objective.unchanged(), 0
        batches = self.problem.data.tracked("projected_index", self.problem.progress)
        for number, parts in enumerate(in_tiles(batches, self.step)):
            if wanted(number):
                unchanged("projected_index")
                yield number, self._tile(parts, first)
            first += sum(part.rows for part in parts)

    def _tile(self, parts: Sequence[Batch], first: int) -> Tile:
        problem = self.problem
        total = [torch.zeros(b.stop - b.start, b.stop - b.start, dtype=torch.float64) for b in self.blocks]
        rows, shares = list[Tensor](), list[Tensor]()
        for part in parts:
            point = self._point(part)
            rows.append(self.sketch.rows(point.objective.sample_gradients(part.x, part.y)))
            shares.append(problem.shares(part).double() / problem.denominator)
            for more in self._roots(point, rows[-1], shares[-1], first):
                for block, sums in zip(self.blocks, total, strict=True):
                    own = more[:, block].double()
                    sums += (own.T @ own).cpu()
            first += part.rows
        return Tile(torch.cat(rows), torch.cat(shares).cpu(), torch.cat([sums.flatten() for sums in total]))

    def _point(self, part: Batch) -> BatchPoint:
        """Return a batch with an objective that records it once."""
        return self.problem.at(part) if part.place else BatchPoint(part, self.problem.objective.on(part.x))

    # ---- rows whose squares add up to the curvature ----------------------------------------------------------------

    def _roots(self, point: BatchPoint, rows: Tensor, shares: Tensor, first: int) -> Iterator[Tensor]:
        if self.kind == "ggn":
            yield from self._of_outputs(point, shares)
            return
        batch, objective = point
        if batch.weights is not None:
            todo = "Pass `curvature='ggn'`."
            raise InputError.of("curvature", repr(self.kind), "a Fisher matrix takes no sample weights", todo)
        mean = objective.reduction == "mean"
        own = float(objective.denominators(batch.y, batch.rows).sum()) if mean else 1.0
        factor = (own / self.problem.denominator) ** 0.5
        yield factor * (self._of_draws(point, first) if self.kind == "monte_carlo_fisher" else _of_labels(point, rows))

    def _of_draws(self, point: BatchPoint, first: int) -> Tensor:
        """Return projected gradients for drawn labels: one draw for every target."""
        batch, objective = point
        if objective.foreign:
            came, todo = "'monte_carlo_fisher' for a JAX model", "Pass 'ggn' or 'empirical_fisher'."
            raise InputError.of("curvature", came, "drawn labels are taken with torch models", todo)
        found = objective.recorded(batch.x, "projected_index", pulled=True)
        scores = drawn_scores(objective.model, objective.losses, batch.y, found, Draws(0, first))
        drawn = objective.changed(loss=_along, reduction="sum")
        return self.sketch.rows(drawn.sample_gradients(batch.x, scores))

    def _of_outputs(self, point: BatchPoint, shares: Tensor) -> Iterator[Tensor]:
        """Yield roots of the Gauss-Newton matrix of a batch, some samples at a time."""
        batch = point.batch
        outputs = point.objective.recorded(batch.x, "projected_index").lin.codomain.dim // batch.rows
        if outputs > _MOST_OUTPUTS:
            came = f"'ggn' with {outputs:,} outputs a sample, a sweep each"
            todo = "Pass 'monte_carlo_fisher' or 'empirical_fisher'."
            raise InputError.of("curvature", came, f"at most {_MOST_OUTPUTS:,} are taken", todo)
        step = max(1, _PAIRS_BYTES // max(1, outputs * self.sketch.dim * 8))
        for start in range(0, batch.rows, step):
            some = slice(start, min(start + step, batch.rows))
            part, objective = point if step >= batch.rows else self._point(batch.part(some))
            J, _, curvature = objective.outputs(part.x, part.y)  # noqa: N806
            values, vectors = torch.linalg.eigh(curvature.double())
            if float(values.min()) < -_CONVEX * float(values.max()):
                todo = "Pass `curvature='empirical_fisher'`."
                raise InputError.of("curvature", "'ggn' of a loss that is not convex", "its matrix has no root", todo)
            root = vectors * (values.clamp_min(0) * shares[some].to(values).unsqueeze(1)).sqrt().unsqueeze(1)
            rows = self.sketch.rows(J).view(part.rows, -1, self.sketch.dim)  # pyright: ignore[reportArgumentType]
            yield torch.einsum("nke,nkr->ner", root, rows.to(root)).flatten(0, 1)

    def ridge(self) -> Tensor:
        """Return the weight decay of every projected entry, `(r,)`, which is one number for each parameter."""
        found, ridge = torch.zeros(self.sketch.dim, dtype=torch.float64), self.problem.ridge
        if ridge is not None:
            for own, whole in zip(self.sketch.slices, self.problem.space.slices, strict=True):
                found[own] = float(ridge[whole][0]) if whole.stop > whole.start else 0.0
        return found

    # ---- on disk -------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, str]:
        """Return digests of all that the rows depend on, in one pass over the data."""
        data = digest_data((b.x, b.y, b.weights) for b in self.problem.data)
        return {
            **self.problem.fingerprint(),
            "training data": data,
            "projection": f"rank {self.sketch.rank}, seed {self.sketch.seed}, numbers of version {VERSION}",
            "curvature": f"{self.kind} in {len(self.blocks)} blocks",
            "dtype": self.dtype,
        }

    def grids(self) -> dict[str, Grid]:
        """Return the arrays of a store."""
        from ..store import Grid

        n, r, tile, entries = self.problem.rows, self.sketch.dim, self.step, sum(self.sizes)
        return {
            "rows": Grid((n, r), tile=(tile, r), dtype=self.dtype),
            "shares": Grid((n,), tile=(tile,)),
            "curvature": Grid((-(-n // tile), entries), tile=(1, entries)),
        }

    def write(self, path: Any) -> None:
        """Compute what a store lacks.

        Raises:
            StoreMismatchError: The store is of another model, loss, data set or projection; the message names what.
                MissingExtraError: zarr is not installed.
        """
        from ..store import StoredRun

        with StoredRun.open(path, self.identity(), self.grids(), surroundings=surroundings()) as kept:
            beside = ("shares", "curvature")
            free = not all(kept.has(name, index) for name, grid in self.grids().items() for index in grid.indices())
            while free:
                for number, tile in self.tiles(lambda number: kept.take("rows", (number, 0), *beside)):
                    kept.write("shares", (number,), tile.shares)
                    kept.write("curvature", (number, 0), tile.curvature.unsqueeze(0))
                    kept.write("rows", (number, 0), tile.rows)
                free = kept.wait("rows", *beside)
            kept.complete()


def _of_labels(point: BatchPoint, rows: Tensor) -> Tensor:
    """Return projected gradients `(n, r)` such that their squares are the empirical Fisher matrix of a batch's loss."""
    batch, objective = point
    losses = objective.losses

    def computed() -> Any:
        found = objective.recorded(batch.x, "projected_index", pulled=True)
        return likelihood_at(objective.model, found, losses, batch.y)

    terms, total = row_scale(losses, batch.y, batch.rows, computed)
    return (terms.double() / total**0.5).to(rows).unsqueeze(1) * rows


def _along(output: Any, scores: Tensor) -> Tensor:
    """A loss that is linear in the output."""
    return (output_leaves(output, aside=True)[0][0] * scores).sum()
