"""Problem: a model, its loss and its data; every derivative of the whole objective as an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._data import Batch, Batches, Unpack
from ._display import Described, Description
from ._finite import InBatch
from ._objective import Objective, ObjectiveOptions
from ._operators import Operator
from ._operators._data import StackOver, SumOver
from ._operators._naming import named
from ._operators._precision import computed_in
from ._passes import FISHERS, BatchPasses
from ._picks import Picks
from ._problem_parts import BatchPoint, check_dimension, objective_of, ridge_of
from ._requirements import check_choice
from ._runtime.ranks import ALONE, TIMEOUT
from ._sharing import FirstPass, facts_of, first_pass, number_of, ranks_of, refuse_apart, terms
from ._space import Space
from ._trees import Selector
from ._words import Curvature, FisherKind, Randomness, Reduction
from .errors import DataError

Made = TypeVar("Made")
_KEPT_BYTES = 2**29  # 512 MiB of linearised batches: more are recorded again in every pass
_KEPT_FOR_FEW = 2**26  # 64 MiB where passes are few: what an epoch of small data takes, and less than a fit's own sums


class ProblemOptions(ObjectiveOptions, total=False):
    """Options of `Problem`, for calls that make one."""

    l2: float | Mapping[str, float]
    unpack: Unpack | None
    progress: bool | None
    distributed: bool
    timeout: float


class Problem(Described):
    r"""A model, its loss and its data, as one objective to differentiate.

    It is $L = \sum_i w_i \ell_i / \sum_i w_i d_i + \frac12 \sum_j r_j \theta_j^2$ for a mean, with sample weights $w$,
    what each row adds to the denominator $d$ (1, or its labels' number or weights) and weight decay $r$. Sums and
    denominators are added up over batches and divided once, so that batches of any size, class weights, ignored targets
    and sample weights give the result of one large batch.

    Args:
        model: A module, a `JaxFunction`, or whatever carries an `objective` (a `TwiceDifferentiable` of any framework).
        loss: `loss(output, y)`, as the objective reduces it; `"model"` for the loss that a model of transformers
            computes from its `logits` and `labels`; left out where `model` carries an objective.
        data: A loader of batches; see `Batches` for what a batch may be. One that shuffles is read in the order of its
            data set, and refused where rows are samples.
        parameters: Which parameters: None takes those that require grad; name patterns or a function pick others.
        reduction: How the loss reduces a batch; by default `loss.reduction`, else the mean. It is verified.
        l2: Weight decay $r$: one number, or numbers by name pattern; parameters that no pattern fits have none.
        unpack: Batch -> `(x, y)` or `(x, y, weights)`.
        randomness: `"error"` refuses dropout in train mode; `"same"` draws the same masks for every sample.
        seed: Of those masks; needed with `randomness="same"`.
        progress: Force progress bars on or off.
        distributed: Share sums over the data among the ranks of an initialised `torch.distributed` group; all of them
            make the same calls then. False works on this rank alone.
        timeout: Seconds to wait for other ranks at a call.

    Raises:
        DataError: A loader draws with replacement or drops rows at random, repeats rows for other ranks, is empty, or
            does not yield batches.
        PeerFailedError: In any call that takes a pass: another rank failed, differs, or is missing.
        InputError: An argument is out of range, or the loss has another reduction.
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
        distributed: bool = True,
        timeout: float = TIMEOUT,
    ) -> None:
        options = ObjectiveOptions(parameters=parameters, reduction=reduction, randomness=randomness, seed=seed)
        self.objective = objective_of(model, loss, options)
        self.objective.check_state()
        alone = self.objective.seed is not None
        self.data, self.progress = Batches.of(data, "data", unpack, ordered=False, alone=alone), progress
        check_dimension(self.objective)
        self.ridge = ridge_of(l2, self.objective.space)
        self.l2 = l2
        self.ranks = ranks_of(self.data, distributed, timeout)
        self.known: FirstPass | None = None
        self.digested: tuple[Any, str] | None = None
        self._kept: dict[tuple[Batches, int], BatchPoint] = {}
        self.room = _KEPT_BYTES

    @property
    def space(self) -> Space:
        """The parameters that are differentiated."""
        return self.objective.space

    @property
    def rows(self) -> int:
        """Samples in the data, of all ranks."""
        return self.first_pass("Problem.rows").rows if self.ranks.shared else self.data.rows

    def batches(self) -> Iterator[Batch]:
        """Yield the batches that have rows."""
        return (batch for batch in self.data if batch.rows)

    @property
    def denominator(self) -> float:
        """What the sum of all losses is divided by: the number of rows or of labels, or their weights; 1 for a sum."""
        return self.first_pass("Problem.denominator").denominator

    def first_pass(self, call: str) -> FirstPass:
        """Return the results of the first pass, which is made if necessary."""
        self.known = self.known or first_pass(self, call)
        return self.known

    def sums(self, call: str, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Return the sums over ranks, which all must have the same problem, of the tensors that each computes."""
        return self.ranks.sums(call, compute, facts_of(self, call))

    def on_each(self, call: str, compute: Callable[[], Made]) -> Made:
        """Return what this rank computes, once all ranks, which must have the same problem, have computed theirs."""
        return self.ranks.run(call, compute, facts_of(self, call))

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
        """Return whether all batches, at this size, may be kept for the duration of a few passes."""
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

        def own() -> list[Tensor]:
            total = 0.0
            for _, (batch, _), term, factor in self.terms("value"):
                with InBatch(number_of(batch)):
                    total += factor * term.value(batch.x, batch.y)
            return [torch.tensor(total, dtype=torch.float64)]

        return self.sums("Problem.value", own)[0].item() + self._quadratic()[0]

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

        def own() -> list[Tensor]:
            value, gradient = self._quadratic(self.ranks.leads)
            for _, (batch, _), term, factor in self.terms("value_and_gradient"):
                with InBatch(number_of(batch)):
                    own, slope = term.value_and_gradient(batch.x, batch.y)
                value += factor * own
                gradient.add_(slope, alpha=factor)
            return [torch.tensor(value, dtype=torch.float64), gradient]

        value, gradient = self.sums("Problem.value_and_gradient", own)
        return value.item(), gradient

    def _quadratic(self, counts: bool = True) -> tuple[float, Tensor]:
        """Return the quadratic term and its gradient; zeros where another rank counts them."""
        if self.ridge is None or not counts:
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

        The first batch is linearised here, so that an objective without a derivative raises here.

        Raises:
            InputError: There is no such curvature.
            NotDifferentiableError: There is no second derivative.
        """
        passes = BatchPasses(self, check_choice("curvature", kind, Curvature))
        first = self.on_each(f"Problem.{kind}", passes.first)
        description = f"{self.rows} rows{'' if self.ridge is None else ' with a quadratic term'}"
        mark = self._mark(kind, first, passes)
        found = SumOver(passes, self.space, self.ridge, mark, self, description, computed_in(first), self.ranks)
        return named(found, kind)

    def _mark(self, kind: str, first: Operator, passes: BatchPasses) -> bool | Callable[[], bool]:
        """Return whether a curvature is positive, or a function that computes it, batch by batch."""
        if kind == "hessian" or (self.ridge is not None and bool((self.ridge < 0).any())):
            return False
        if kind in ("empirical_fisher", "monte_carlo_fisher"):  # squares, in every batch
            return first.positive
        if (self.known is not None and self.known.convex) or self.objective.is_convex(None):
            return True

        def computed() -> bool:
            known = self.known is None and all(self.objective.is_convex(b.y) for b in self.batches())
            return known or self.ranks.every(f"{kind}.positive", lambda: all(part.positive for _, part in passes()))

        return computed

    def sample_gradients(self, data: Any = None) -> StackOver:
        """Return the gradients of the rows' own losses as rows of an operator `(n, P)`, without quadratic term.

        Args:
            data: Other data than the problem's own.
        """
        batches, unchanged = self.rows_of(data, "Problem.sample_gradients"), self.objective.unchanged()

        def parts() -> Iterator[tuple[float, int, Operator]]:
            unchanged("Problem.sample_gradients")
            for first, batch in self._own(batches, "gradients"):
                yield 1.0, first, self.at(batch).gradients()

        rows = Space.flat(batches.rows, "samples", torch.empty(0, dtype=self.space.dtype, device=self.space.device))
        return named(StackOver(parts, self.space, rows, self.ranks), "sample_gradients")

    def rows_of(self, data: Any, call: str) -> Batches:
        """Return batches whose rows are samples of a result, the problem's own for None, the same on all ranks.

        Raises:
            DataError: Their order is not known, or each rank has rows of its own.
            PeerFailedError: They differ between ranks.
        """
        batches = self.data.in_order() if data is None else Batches.of(data, "data", self.data.unpack)
        refuse_apart(batches, self.ranks, "rows of the result need the order of the data set")
        if self.ranks.shared:
            self.on_each(call, lambda: batches.rows)
            self.ranks.agree(call, {f"`{batches.name}`": batches.digest})
        return batches

    def _own(self, batches: Batches, what: str) -> Iterator[tuple[int, Batch]]:
        """Yield the batches of this rank that have rows, with the number of rows before each."""
        first = 0
        for batch in batches.tracked(what, self.progress):
            if batch.rows and self.ranks.owns(number_of(batch)):
                yield first, batch
            first += batch.rows

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
        batches, unchanged = self.rows_of(data, "Problem.jacobian"), self.objective.unchanged()

        def rows_at(batch: Batch) -> Operator:
            return self.at(batch).objective.sample_jacobians(batch.x, outputs)

        def first() -> Space:
            for batch in batches:
                if batch.rows:
                    return rows_at(batch).codomain
            raise DataError.of(batches.name, "without rows", "at least one is needed")

        own = self.on_each("Problem.jacobian", first)
        width = own.shapes[0][1:]

        def parts() -> Iterator[tuple[float, int, Operator]]:
            unchanged("Problem.jacobian")
            for start, batch in self._own(batches, "jacobian"):
                yield 1.0, start * width.numel(), rows_at(batch)

        rows = replace(own, shapes=(torch.Size((batches.rows, *width)),))
        return named(StackOver(parts, self.space, rows, self.ranks), "jacobian")

    def fingerprint(self) -> dict[str, str]:
        """Return digests of what the objective is made of beside its data, by part."""
        return {
            "model": self.objective.fingerprint(),
            "reduction": self.objective.reduction,
            "l2": repr(self.l2 if not isinstance(self.l2, Mapping) else sorted(self.l2.items())),
        }

    def terms(self, what: str, everyone: bool = False) -> Iterator[tuple[int, BatchPoint, Objective, float]]:
        """Yield batches that count, as `terms` in `_sharing` does, of this rank or of all ranks."""
        return terms(self, what, ALONE if everyone else self.ranks)

    def _describe(self) -> Description:
        covered = f"{self.space.dim:,} of {self.objective.parameters_total:,} parameters"
        quadratic = "" if self.ridge is None else f", l2 {self.l2}"
        facts = [("parameters", self.space.layout)]
        return Description(f"Problem({self.objective.reduction} over {self.data.name}, {covered}{quadratic})", facts)
