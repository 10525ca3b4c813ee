"""An index of projected training gradients, which answers queries by one product of matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Unpack, final

import torch
from torch import Tensor

from .._data import Batches
from .._display import Described, Description
from .._estimators import spectral_norm
from .._keywords import keywords
from .._operators import Matrix
from .._problem import Problem, ProblemOptions
from .._progress import shows_progress, track
from .._requirements import check_choice, check_positive, check_precision, check_whole
from .._runtime.contexts import eager
from .._words import IndexCurvature, Which
from ..errors import SolveError
from ._damping import Damping, checked_damping, relative
from ._index_tiles import IndexPlan
from ._rankings import GroupedInfluences, LayerInfluences, RankedInfluences
from ._result import SIGN, UNITS, Influences
from ._selection import Block, Grouping, Strongest
from ._settings import Modelled, unchecked
from ._sketch import GradientSketch

if TYPE_CHECKING:
    from ..store import Store


@keywords(ProblemOptions)
@eager
@shows_progress()
def projected_index(
    model: Modelled,
    training_data: Any,
    *,
    loss: Any = None,
    rank: int = 16,
    curvature: IndexCurvature = "empirical_fisher",
    projection_seed: int = 0,
    store: Any = None,
    **options: Unpack[ProblemOptions],
) -> GradientIndex:
    r"""Return an index of randomly projected training gradients, for any number of queries.

    The gradient $G$ of a weight, outputs × inputs, is kept as $L^\top G R$ with random $L$ and $R$ of at most `rank`
    columns; of a layer its two factors are projected, so that $G$ is not formed. A parameter has at most rank² numbers
    and is kept as it is where it has no more, or where its sides are no longer than `rank`. A query's influences are
    $P g_t^\top (P A P^\top + \lambda I)^{-1} P G^\top$: one product of matrices. Where nothing is projected they are
    those of `compute_influences`.

    Sources: Park, Georgiev, Ilyas, Leclerc and Madry (2023), who project whole gradients; Choe et al. (2024) for both
    sides of a layer.

    Args:
        model: Model and loss as in `compute_influences`; or a module, with `loss`.
        training_data: A loader of batches in a fixed order.
        loss: `loss(output, y)`, or `"model"`, where `model` carries none.
        rank: The longest side of a projected weight. Memory and the disk grow with rank².
        curvature: `"empirical_fisher"`, from the same gradients; `"monte_carlo_fisher"`, one more sweep with
            labels drawn from the model; or `"ggn"`, a sweep for each of a sample's outputs. A sequence's labels count
            together. Above 4,096 numbers a sample the curvature is taken for each parameter alone.
        projection_seed: Of the projection, whose numbers depend on it, on a parameter's name and on their place alone.
        store: A folder for the index (zarr v3), which is otherwise held in memory. Processes that run the same line
            share its tiles. Run again, it continues a killed run, reads the tiles of a finished one without
            evaluating the model, and is refused if model, loss, data or projection differ.
        options: Of the objective, as in `Problem`.

    Returns:
        An index with `influences`, `top`, `groups` and `self_influences` for any test data.

    Raises:
        StoreMismatchError: The store is of another model, loss, data set or projection; the message names what.
        MissingExtraError: zarr is not installed.
        InputError: An argument is out of range, or the loss has another reduction.
        DataError: A loader shuffles, is empty, or does not yield batches.
        ModelStateError: Batch statistics or dropout are in train mode.
        NonFiniteError: A gradient is NaN or Inf.

    Example:
        >>> data = [(torch.eye(3), torch.zeros(3, 1))]
        >>> index = projected_index(torch.nn.Linear(3, 1, bias=False), data, loss=torch.nn.functional.mse_loss, rank=4)
        >>> index.top(data, 1, damping=0.1).indices
        tensor([[0],
                [1],
                [2]])
    """
    check_positive("rank", rank)
    check_whole("projection_seed", projection_seed, 0)
    check_choice("curvature", curvature, IndexCurvature)
    train = Batches.of(training_data, "training_data", options.get("unpack"))
    options["distributed"] = False  # its rows are no sum
    problem = Problem(model, loss, train, **options)
    check_precision("model", problem.space.dtype, "sums of products need")
    plan = IndexPlan(problem, GradientSketch(problem.space, rank, projection_seed), curvature)
    plan.check_size()
    if store is None:
        tiles = [tile for _, tile in plan.tiles(lambda number: True)]
        shares, summed = torch.cat([t.shares for t in tiles]), torch.stack([t.curvature for t in tiles]).sum(0)
        return GradientIndex(plan, [tile.rows for tile in tiles], shares, summed)
    plan.write(store)
    return _opened(plan, store)


def _opened(plan: IndexPlan, path: Any) -> GradientIndex:
    from ..store import Store

    kept = Store.open(path)
    grid = kept.arrays["curvature"]
    summed = torch.zeros(grid.shape[1], dtype=torch.float64)
    for index in grid.indices():
        summed += torch.from_numpy(kept.tile("curvature", index)[0])
    return GradientIndex(plan, _StoredRows(kept), torch.from_numpy(kept.read("shares")), summed, kept.path)


@final
class _StoredRows(Sequence[Tensor]):
    """Tiles of rows, read when they are requested."""

    def __init__(self, kept: Store) -> None:
        self.kept = kept

    def __len__(self) -> int:
        return self.kept.arrays["rows"].total

    def __getitem__(self, number: Any) -> Any:
        return torch.from_numpy(self.kept.tile("rows", (range(len(self))[number], 0)))


@final
class GradientIndex(Described):
    """Projected gradients of all training samples, in memory or on disk; made by `projected_index`.

    Attributes:
        shares: The weight of each training sample in the objective, `(n,)`.
        path: The store's folder; None for an index in memory.
    """

    def __init__(
        self, plan: IndexPlan, tiles: Sequence[Tensor], shares: Tensor, summed: Tensor, path: str | None = None
    ) -> None:
        self._plan, self._tiles, self._summed, self.shares, self.path = plan, tiles, summed, shares, path
        self._unchanged = plan.problem.objective.unchanged()

    @property
    def shape(self) -> tuple[int, int]:
        """Training samples, and numbers of each."""
        return len(self.shares), self._plan.sketch.dim

    def __len__(self) -> int:
        """Training samples."""
        return len(self.shares)

    @eager
    @shows_progress(call="GradientIndex.influences")
    def influences(
        self, test_data: Any = None, *, damping: float | Literal["auto"] = "auto", progress: bool | None = None
    ) -> Influences:
        r"""Return influences of all training samples on test samples.

        Args:
            test_data: A loader of batches; the training data where it is left out.
            damping: $\lambda \ge 0$, added to the projected curvature; `"auto"` takes 0.02 of its spectral norm.
            progress: Force the progress bar on or off.

        Raises:
            ModelStateError: The model has changed since the index was made.
            SolveError: The projected curvature is singular, and `damping` is 0.
            InputError: `damping` is out of range.
            DataError: A loader shuffles, is empty, or does not yield batches.
        """
        query = self._query(test_data, damping)
        values = torch.cat([block for _, _, block in query.blocks(progress)], 1)
        return Influences(values, "up", SIGN, UNITS["up"], query.damping, query.info, self.shares.to(values.device))

    @eager
    @shows_progress(call="GradientIndex.top")
    def top(
        self,
        test_data: Any = None,
        k: int = 10,
        *,
        which: Which = "largest",
        damping: float | Literal["auto"] = "auto",
        progress: bool | None = None,
    ) -> RankedInfluences:
        r"""Return the `k` training samples of strongest influence on every test sample, tile by tile.

        Args:
            test_data: A loader of batches `(x, y)`.
            k: How many.
            which: `"largest"` helped most, `"smallest"` hurt most, `"magnitude"` either.
            damping: $\lambda \ge 0$, added to the projected curvature; `"auto"` takes 0.02 of its norm.
            progress: Force the progress bar on or off.

        Raises:
            InputError: There are fewer than `k` training samples.
            JacopsError: The data or the loss is not supported, or a solve failed; the message states why.
        """
        check_choice("which", which, Which)
        query = self._query(test_data, damping)
        values, indices = Strongest((len(query.solutions), len(self)), k, which).take(query.blocks(progress))
        return RankedInfluences(values, indices, which, len(self), query.info)

    @eager
    @shows_progress(call="GradientIndex.group_influences")
    def group_influences(
        self,
        groups: Any,
        test_data: Any = None,
        *,
        damping: float | Literal["auto"] = "auto",
        progress: bool | None = None,
    ) -> GroupedInfluences:
        r"""Return influences summed over groups of training samples, as `jacops.influence.group_influences` does.

        Args:
            groups: The group of each training sample: whole numbers or strings.
            test_data: A loader of batches `(x, y)`.
            damping: $\lambda \ge 0$, added to the projected curvature; `"auto"` takes 0.02 of its norm.
            progress: Force the progress bar on or off.

        Raises:
            InputError: There are more or fewer labels than training samples.
            JacopsError: The data or the loss is not supported, or a solve failed; the message states why.
        """
        grouping = Grouping(groups, len(self))
        query = self._query(test_data, damping)
        values, weighted = grouping.sums(len(query.solutions), query.blocks(progress), self.shares)
        return GroupedInfluences(values, grouping.names, grouping.counts, weighted, query.info)

    @eager
    @shows_progress(call="GradientIndex.layer_influences")
    def layer_influences(
        self, test_data: Any = None, *, damping: float | Literal["auto"] = "auto", progress: bool | None = None
    ) -> LayerInfluences:
        r"""Return influences split by the parameters that they go through, which add up to the whole.

        Args:
            test_data: A loader of batches `(x, y)`.
            damping: $\lambda \ge 0$, added to the projected curvature; `"auto"` takes 0.02 of its norm.
            progress: Force the progress bar on or off.

        Raises:
            JacopsError: The data or the loss is not supported, or a solve failed; the message states why.
        """
        query, sketch = self._query(test_data, damping), self._plan.sketch
        tiles = [
            torch.stack([query.solutions[:, part] @ rows[:, part].T for part in sketch.slices], 2)
            for rows in query.tiles(progress)
        ]
        return LayerInfluences(torch.cat(tiles, 1), list(sketch.space.names), query.info)

    @eager
    @shows_progress(call="GradientIndex.self_influences")
    def self_influences(self, *, damping: float | Literal["auto"] = "auto", progress: bool | None = None) -> Tensor:
        r"""Return the influence of every training sample on itself, `(n,)`, weighted as in `jacops.self_influences`.

        Args:
            damping: $\lambda \ge 0$, added to the projected curvature; `"auto"` takes 0.02 of its norm.
            progress: Force the progress bar on or off.

        Raises:
            JacopsError: The data or the loss is not supported, or a solve failed; the message states why.
        """
        solve, _ = self._solver(damping)
        tiles = [self._like(rows) for rows in track(self._tiles, "self_influences", enabled=progress)]
        own = torch.cat([(solve(rows) * rows).sum(1) for rows in tiles])
        mean = self._plan.problem.objective.reduction == "mean"
        return own * (self.shares * (len(self) if mean else 1)).to(own) ** 2

    # ---- solves ----------------------------------------------------------------------------------------------------

    @cached_property
    def _curvature(self) -> list[Tensor]:
        """The blocks of the projected curvature in float64, weight decay included."""
        parts = self._summed.split(self._plan.sizes)
        found = [part.view(block.stop - block.start, -1) for part, block in zip(parts, self._plan.blocks, strict=True)]
        ridge = self._plan.ridge()
        return [part + ridge[block].diag() for part, block in zip(found, self._plan.blocks, strict=True)]

    def _damping(self, asked: Any) -> Damping:
        damping = checked_damping(asked)
        if not isinstance(damping, str):
            return Damping(damping)
        norms = [spectral_norm(Matrix(block, symmetric=True), progress=False).value for block in self._curvature]
        return relative(max(norms, default=0.0), "projected")

    def _solver(self, asked: Any) -> tuple[Callable[[Tensor], Tensor], Damping]:
        """Return what solves with the damped curvature, and the damping."""
        self._unchanged("GradientIndex")
        chosen = self._damping(asked)
        factors = []
        for block in self._curvature:
            factor, failed = torch.linalg.cholesky_ex(block + chosen[0] * torch.eye(len(block), dtype=block.dtype))
            if int(failed):
                raise SolveError(
                    f"GradientIndex: the projected curvature with damping {chosen[0]:g} is singular. Raise `damping`, "
                    "or pass `damping='auto'`."
                )
            factors.append(factor.to(self._plan.problem.space.device))

        def solve(rows: Tensor) -> Tensor:
            parts = zip(factors, self._plan.blocks, strict=True)
            found = [torch.cholesky_solve(rows[:, block].T.double(), factor).T for factor, block in parts]
            return torch.cat(found, 1).to(rows)

        return solve, chosen

    def _query(self, test_data: Any, damping: Any) -> _Query:
        solve, chosen = self._solver(damping)
        problem = self._plan.problem
        train = problem.data
        test = train if test_data is None else Batches.of(test_data, "test_data", train.unpack)
        if test is train:
            rows = torch.cat([self._like(rows) for rows in self._tiles])
        else:
            points = map(problem.at, test.tracked("queries", problem.progress))
            gradients = (p.objective.sample_gradients(p.batch.x, p.batch.y) for p in points if p.batch.rows)
            rows = torch.cat([self._plan.sketch.rows(found) for found in gradients])
        return _Query(self, solve(rows), chosen)

    def _like(self, rows: Tensor) -> Tensor:
        return rows.to(self._plan.problem.space.device)

    def _describe(self) -> Description:
        sketch, problem = self._plan.sketch, self._plan.problem
        kept = "as they are" if sketch.is_exact else f"of rank {sketch.rank}, seed {sketch.seed}"
        blocks = len(self._plan.blocks)
        facts = [
            ("projection", f"{sketch.space.dim:,} of {problem.objective.parameters_total:,} parameters {kept}"),
            ("curvature", f"{self._plan.kind}, {'whole' if blocks == 1 else f'in {blocks} blocks'}"),
            ("held", f"in {self.path!r}" if self.path else "in memory"),
        ]
        return Description(f"GradientIndex({len(self):,} × {sketch.dim:,}, {self._plan.dtype})", facts)


@final
class _Query:
    """Solutions for some test samples, and what is said of their scores."""

    def __init__(self, index: GradientIndex, solutions: Tensor, chosen: Damping) -> None:
        self.index, self.solutions, self.damping = index, solutions, chosen.value
        plan = index._plan
        self.info: dict[str, Any] = {
            "method": "projection" if not plan.sketch.is_exact else "direct",
            "curvature": plan.kind,
            **unchecked(len(solutions)),
            "damping": chosen.value,
            "damping_rule": chosen.rule,
            "rows": len(index),
            "covered": plan.sketch.space.dim,
            "parameters": plan.problem.objective.parameters_total,
            "rank": plan.sketch.rank,
            "projected": plan.sketch.dim,
        }

    def tiles(self, progress: bool | None) -> Iterator[Tensor]:
        """Yield the projected training gradients."""
        for rows in track(self.index._tiles, "influences", enabled=progress):
            yield self.index._like(rows)

    def blocks(self, progress: bool | None) -> Iterator[Block]:
        """Yield influences, tile by tile."""
        start = 0
        for rows in self.tiles(progress):
            columns = slice(start, start + len(rows))
            yield slice(0, len(self.solutions)), columns, self.solutions @ rows.T
            start = columns.stop
