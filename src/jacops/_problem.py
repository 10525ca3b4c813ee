"""Problem: a model, its loss and its data; every derivative of the whole objective as an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._data import Batch, Batches, Unpack
from ._display import Described, Description
from ._finite import InBatch
from ._ladder.protocol import is_framework_model
from ._objective import Objective, ObjectiveOptions
from ._operators import Operator
from ._operators._data import StackOver, SumOver
from ._operators._naming import named
from ._operators._precision import computed_in
from ._passes import FISHERS, BatchPasses
from ._picks import Picks
from ._requirements import check_choice, check_range
from ._space import Space
from ._torch.protocol import bare
from ._trees import Selector
from ._words import Curvature, FisherKind, Randomness, Reduction
from .errors import DataError, InputError, InputTypeError, ModelStateError

_KEPT_BYTES = 2**29  # 512 MiB of linearised batches: more are recorded again in every pass
_KEPT_FOR_FEW = 2**26  # 64 MiB where passes are few: what an epoch of small data takes, and less than a fit's own sums


class ProblemOptions(ObjectiveOptions, total=False):
    """Options of `Problem`, for calls that make one."""

    l2: float | Mapping[str, float]
    unpack: Unpack | None
    progress: bool | None


class BatchPoint(NamedTuple):
    """A batch, and the objective for it, which keeps what it records of it."""

    batch: Batch
    objective: Objective

    def gradients(self) -> Operator:
        """Return the gradients of the rows' own losses."""
        return self.objective.sample_gradients(self.batch.x, self.batch.y)


class Problem(Described):
    r"""A model, its loss and its data, as one objective to differentiate.

    It is $L = \sum_i w_i \ell_i / \sum_i w_i d_i + \frac12 \sum_j r_j \theta_j^2$ for a mean, with sample weights
    $w$, what each row adds to the denominator $d$ (1, or its labels' number or weights) and weight decay $r$. Sums and
    denominators are added up over batches and divided once, so batches of any size, class weights, ignored
    targets and sample weights come out as the whole objective in one batch would.

    Args:
        model: A module, a `JaxFunction`, or whatever carries an `objective` (a `TwiceDifferentiable` of any framework).
        loss: `loss(output, y)`, as the objective reduces it; `"model"` for the loss that a model of transformers
            computes from its `logits` and `labels`; left out where `model` carries an objective.
        data: A loader of batches; see `Batches` for what a batch may be. One that shuffles is read in the order of its
            data set, and refused where rows are samples.
        parameters: Which parameters: None takes those that require grad; name patterns or a function pick others.
        reduction: How the loss reduces a batch; by default what `loss.reduction` says, else the mean. It is verified.
        l2: Weight decay $r$: one number, or numbers by name pattern; parameters that no pattern fits have none.
        unpack: Batch -> `(x, y)` or `(x, y, weights)`.
        randomness: As in `sample_gradients`.
        seed: As in `sample_gradients`.
        progress: Force progress bars on or off.

    Raises:
        DataError: A loader draws with replacement or drops rows at random, runs dry, or gives something else than
            batches.
        InputError: An argument is out of range, or the loss does not reduce batches as said.
        ModelStateError: Batch statistics or dropout are in train mode.
        InputTypeError: `loss` is not callable, or left out with a module.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.eye(2), torch.zeros(2, 1)), (torch.ones(1, 2), torch.zeros(1, 1))]
        >>> Problem(model, torch.nn.functional.mse_loss, data).hessian().dense() * 3
        tensor([[4., 2.],
                [2., 4.]])
    """

    def __init__(
        self,
        model: Any,
        loss: Any = None,
        data: Any = None,
        *,
        parameters: Picks = None,
        reduction: Reduction | None = None,
        l2: float | Mapping[str, float] = 0.0,
        unpack: Unpack | None = None,
        randomness: Randomness = "error",
        seed: int | None = None,
        progress: bool | None = None,
    ) -> None:
        options = ObjectiveOptions(parameters=parameters, reduction=reduction, randomness=randomness, seed=seed)
        self.objective = _objective(model, loss, options)
        self.objective.check_state()
        self.data, self.progress = Batches.of(data, "data", unpack, ordered=False), progress
        if not self.objective.space.dim:
            came = f"a {type(self.objective.model).__name__} without parameters to differentiate"
            raise ModelStateError.of("model", came, "at least one must be a floating-point parameter that is trainable")
        self.ridge = _ridge(l2, self.objective.space)
        self.l2 = l2
        self._denominator: float | None = None
        self._convex = False
        self._kept: dict[tuple[Batches, int], BatchPoint] = {}
        self.room = _KEPT_BYTES

    @property
    def space(self) -> Space:
        """The parameters that are differentiated."""
        return self.objective.space

    @property
    def rows(self) -> int:
        """Samples in the data."""
        return self.data.rows

    def batches(self) -> Iterator[Batch]:
        """Yield the batches that have rows."""
        return (batch for batch in self.data if batch.rows)

    @property
    def denominator(self) -> float:
        """What the sum of all losses is divided by: the number of rows or of labels, or their weights; 1 for a sum."""
        if self._denominator is None:
            total, first, convex, waiting = 0.0, None, True, list[Batch]()
            for number, batch in enumerate(self.batches()):
                waiting.append(batch)
                if first is None and not self.objective.losses.ignores(batch.y):
                    first = self.at(batch)
                    with InBatch(number):
                        first.objective.check_reduction(first.batch)
                    self.keep(first)
                if first is not None:
                    total += sum(float(self.shares(each).sum()) for each in waiting)
                    waiting.clear()
                convex = convex and self.objective.is_convex(batch.y)
            if first is None or not total > 0:
                empty = first is None and not waiting
                came = "without rows" if empty else "data of which no row counts"
                todo = "" if empty else "All labels are ignored (-100), or all weights are 0."
                raise DataError.of(self.data.name, came, "at least one row is needed", todo)
            self._convex = convex
            self._denominator = total if self.objective.reduction == "mean" else 1.0
        return self._denominator

    def shares(self, batch: Batch) -> Tensor:
        """Return what each row of a batch weighs before the division, `(rows,)`."""
        shares = self.objective.denominators(batch.y, batch.rows)
        if self.objective.reduction == "sum":
            shares = torch.ones_like(shares)
        return shares if batch.weights is None else shares * batch.weights.to(shares)

    def at(self, batch: Batch) -> BatchPoint:
        """Return the objective on a batch; one of the problem's own comes with what an earlier pass kept of it."""
        if batch.place is None or batch.place[0] is not self.data:
            return BatchPoint(batch, self.objective)
        return self._kept.get(batch.place) or BatchPoint(batch, self.objective.on(batch.x))

    def fits(self, held: int) -> bool:
        """Say whether all batches, if each takes so many bytes, are few enough to be kept for a few passes only."""
        return held * self.data.count <= _KEPT_FOR_FEW

    def keep(self, point: BatchPoint, few: bool = False) -> int:
        """Keep what was recorded of a batch for later passes, where it fits; return its bytes, 0 if it is not kept.

        Where these are `few`, it is dropped unless all batches are small.
        """
        place, held = point.batch.place, point.objective.held_bytes
        if place is None or (place not in self._kept and held > self.room):
            return 0
        if few and not self.fits(held):
            self.room += held if self._kept.pop(place, None) else 0
            return 0
        if held and place not in self._kept:
            self.room -= held
            self._kept[place] = point
        return held

    def term(self, batch: Batch) -> tuple[BatchPoint, Objective, float]:
        """Return a batch's point, its objective with weighted rows, and the factor with which it enters the whole."""
        mean = self.objective.reduction == "mean" or batch.weights is not None
        whole = self.denominator if mean else 1.0  # first: it computes by what the loss divides, from the first batch
        point = self.at(batch)
        if batch.weights is not None:
            return point, point.objective.weighted(batch.weights), 1.0 / whole
        own = self.objective.denominators(batch.y, batch.rows).sum() if mean else 1.0
        return point, point.objective, float(own) / whole

    # ---- derivatives of the objective ------------------------------------------------------------------------------

    def value(self) -> float:
        """Return the objective, its quadratic term included.

        Raises:
            NonFiniteError: The loss of a batch is NaN or Inf.
        """
        total = 0.0
        for number, (_, (batch, _), term, factor) in enumerate(self.terms("value")):
            with InBatch(number):
                total += factor * term.value(batch.x, batch.y)
        return total + self._quadratic()[0]

    def gradient(self) -> Tensor:
        """Return the gradient `(P,)` of the objective, its quadratic term included."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """Return the objective and its gradient `(P,)`, its quadratic term included, from one pass.

        The model runs once for every batch (and for the first one of a new kind on a few rows more, which verify how
        the loss reduces them).

        Raises:
            NonFiniteError: A gradient holds NaN or Inf.
        """
        value, gradient = self._quadratic()
        for number, (_, (batch, _), term, factor) in enumerate(self.terms("value_and_gradient")):
            with InBatch(number):
                own, slope = term.value_and_gradient(batch.x, batch.y)
            value += factor * own
            gradient.add_(slope, alpha=factor)
        return value, gradient

    def _quadratic(self) -> tuple[float, Tensor]:
        """Return the quadratic term and its gradient."""
        if self.ridge is None:
            return 0.0, torch.zeros(self.space.dim, dtype=self.space.dtype, device=self.space.device)
        point = self.objective.point()
        return 0.5 * float((self.ridge * point**2).sum()), self.ridge * point

    def hessian(self) -> SumOver:
        """Return the Hessian of the objective."""
        return self.curvature("hessian")

    def ggn(self) -> SumOver:
        """Return the generalised Gauss-Newton matrix of the objective, its quadratic term included."""
        return self.curvature("ggn")

    def fisher(self, kind: FisherKind = "exact") -> SumOver:
        """Return a Fisher matrix of the data in the scale of the objective, plus the quadratic term.

        Labels are drawn once for each target, by the sample's place in the data; `noise` is the relative standard
        error that this leaves.

        Raises:
            InputError: There is no such kind.
        """
        names: dict[FisherKind, Curvature] = {value: name for name, value in FISHERS.items()}
        return self.curvature(names[check_choice("kind", kind, FisherKind)])

    def curvature(self, kind: Curvature) -> SumOver:
        """Return a curvature of the objective by its name.

        The first batch is linearised at once, so that what cannot be differentiated says so here.

        Raises:
            InputError: There is no such curvature.
            NotDifferentiableError: There is no second derivative.
        """
        passes = BatchPasses(self, check_choice("curvature", kind, Curvature))
        first = passes.first()
        description = f"{self.rows} rows{'' if self.ridge is None else ' with a quadratic term'}"
        mark = self._mark(kind, first, passes)
        return named(SumOver(passes, self.space, self.ridge, mark, self, description, computed_in(first)), kind)

    def _mark(self, kind: str, first: Operator, passes: BatchPasses) -> bool | Callable[[], bool]:
        """Return whether a curvature is positive, or a function that computes it, batch by batch."""
        if kind == "hessian" or (self.ridge is not None and bool((self.ridge < 0).any())):
            return False
        if kind in ("empirical_fisher", "monte_carlo_fisher"):  # squares, in every batch
            return first.positive
        if self._convex or self.objective.is_convex(None):
            return True

        def computed() -> bool:
            known = self._denominator is None and all(self.objective.is_convex(b.y) for b in self.batches())
            return known or all(part.positive for _, part in passes())

        return computed

    def sample_gradients(self, data: Any = None) -> StackOver:
        """Return the gradients of the rows' own losses as rows of an operator `(n, P)`, without quadratic term.

        Args:
            data: Other data than the problem's own.
        """
        batches = self.data.in_order() if data is None else Batches.of(data, "data", self.data.unpack)
        unchanged = self.objective.unchanged()

        def parts() -> Iterator[tuple[float, Operator]]:
            unchanged("Problem.sample_gradients")
            for batch in batches.tracked("gradients", self.progress):
                if batch.rows:
                    yield 1.0, self.at(batch).gradients()

        rows = Space.flat(batches.rows, "samples", torch.empty(0, dtype=self.space.dtype, device=self.space.device))
        return named(StackOver(parts, self.space, rows), "sample_gradients")

    def jacobian(self, data: Any = None, *, outputs: Selector = None) -> StackOver:
        """Return the Jacobian of the model's outputs by the parameters, rows of all samples, as `(n * k, P)`.

        Rows are entries of the outputs, sample by sample, each sample alone as in `sample_jacobians`. A product makes
        one pass over the data, and holds the factors of one batch at a time beside what the problem keeps.

        Args:
            data: Other data than the problem's own.
            outputs: Part of the output, as in `jacobian`; what it picks must be one tensor.

        Raises:
            DataError: There are no rows.
            InputError: The output is not one tensor, or its shape changes between batches.

        Example:
            >>> data = [(torch.eye(2), torch.zeros(2, 1)), (torch.ones(1, 2), torch.zeros(1, 1))]
            >>> J = Problem(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, data).jacobian()
            >>> J.dense()
            tensor([[1., 0.],
                    [0., 1.],
                    [1., 1.]])
        """
        batches = self.data if data is None else Batches.of(data, "data", self.data.unpack)
        unchanged = self.objective.unchanged()

        def parts() -> Iterator[tuple[float, Operator]]:
            unchanged("Problem.jacobian")
            for batch in batches.tracked("jacobian", self.progress):
                if batch.rows:
                    yield 1.0, self.at(batch).objective.sample_jacobians(batch.x, outputs)

        first = next((part for _, part in parts()), None)
        if first is None:
            raise DataError.of(batches.name, "without rows", "at least one is needed")
        own = first.codomain
        rows = replace(own, shapes=(torch.Size((batches.rows, *own.shapes[0][1:])),))
        return named(StackOver(parts, self.space, rows), "jacobian")

    def fingerprint(self) -> dict[str, str]:
        """Return digests of what the objective is made of beside its data, by part."""
        return {
            "model": self.objective.fingerprint(),
            "reduction": self.objective.reduction,
            "l2": repr(self.l2 if not isinstance(self.l2, Mapping) else sorted(self.l2.items())),
        }

    def terms(self, what: str) -> Iterator[tuple[int, BatchPoint, Objective, float]]:
        """Yield batches that count: the number of rows before it, the batch, its objective and factor."""
        first = 0
        for batch in self.data.tracked(what, self.progress):
            if batch.rows:
                point, term, factor = self.term(batch)
                if factor:
                    yield first, point, term, factor
                first += batch.rows

    def _describe(self) -> Description:
        covered = f"{self.space.dim:,} of {self.objective.parameters_total:,} parameters"
        quadratic = "" if self.ridge is None else f", l2 {self.l2}"
        facts = [("parameters", self.space.layout)]
        return Description(f"Problem({self.objective.reduction} over {self.data.name}, {covered}{quadratic})", facts)


def _objective(model: Any, loss: Any, options: ObjectiveOptions) -> Objective:
    own = model if isinstance(model, Objective) else getattr(model, "objective", None)
    if isinstance(own, Objective):
        given: Any = {name: value for name, value in options.items() if value not in (None, "error")}
        return own.changed(loss=loss, **given) if loss is not None or given else own
    if not is_framework_model(model):
        bare(model)  # refuses what is no module
    if loss is None:
        raise InputTypeError.of("loss", "left out", "a callable `loss(output, y)` is needed with a module")
    return Objective(model, loss, **options)


def _ridge(l2: float | Mapping[str, float], space: Space) -> Tensor | None:
    """Return the quadratic term's diagonal; None where it is zero everywhere."""
    by_pattern = l2 if isinstance(l2, Mapping) else {"*": l2}
    for pattern, value in by_pattern.items():
        check_range("l2", value, zero=True)
        if not any(fnmatchcase(name, pattern) for name in space.names):
            raise InputError.of("l2", f"for {pattern!r}", f"no parameter fits; there are {space.layout}")
    if not any(by_pattern.values()):
        return None
    ridge = torch.zeros(space.dim, dtype=space.dtype, device=space.device)
    for name, where in zip(space.names, space.slices, strict=True):
        fitting = [value for pattern, value in by_pattern.items() if fnmatchcase(name, pattern)]
        ridge[where] = fitting[-1] if fitting else 0.0
    return ridge
