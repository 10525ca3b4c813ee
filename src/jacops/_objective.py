"""Objective: a model with its loss, differentiated one batch at a time.

Everything above it (problems, influence) has torch tensors and operators, whatever the model is written in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ._data import Batch, rows_of
from ._derivatives import ggn, hessian
from ._fisher import KINDS, empirical_fisher, fisher_at
from ._framework import recorded
from ._operators import Operator
from ._operators._finite_results import Source, with_source
from ._per_sample import Randomness, sample_gradients, sample_jacobians
from ._recorded_loss import Loss
from ._reduction import check_reduction
from ._requirements import check_choice
from ._runtime.contexts import seeded
from ._runtime.counter import Draws
from ._runtime.restoring import restoring
from ._space import Space
from ._torch.protocol import Reduction, RowLosses, is_convex
from .errors import InputTypeError
from .solvers._output_loss import LossAtOutput


class Objective(ABC):
    """A model with its loss, which reduces a batch by `reduction`, one batch at a time.

    Derivatives are those that the public calls return, for models of any framework; what a framework knows of its
    model and of its losses is in the subclasses.

    Attributes:
        model: The model.
        loss: `loss(output, y)`, one number.
        losses: Of the rows.
        picks: Which parameters, by name and value.
        reduction: How the loss reduces a batch.
        randomness: As in `sample_gradients`.
        seed: Of random layers in train mode.
    """

    model: Any
    loss: Any
    losses: RowLosses
    picks: Callable[[str, Any], bool]
    reduction: Reduction = "mean"
    randomness: Randomness = "error"
    seed: int | None = None

    @property
    @abstractmethod
    def space(self) -> Space:
        """The parameters that are differentiated."""

    @property
    @abstractmethod
    def parameters_total(self) -> int:
        """Entries of all the model's parameters, differentiated or not."""

    @abstractmethod
    def point(self) -> Tensor:
        """Return the parameters as they are, `(P,)`."""

    @abstractmethod
    def value(self, x: Any, y: Any) -> float:
        """Return the loss of a batch.

        Raises:
            NonFiniteError: It is NaN or Inf; the message names what holds the first NaN or Inf.
        """

    @abstractmethod
    def value_near(self, x: Any, y: Any) -> float:
        """Return the loss of a batch at parameters that are a little off, always the same ones; it may be NaN."""

    @abstractmethod
    def gradient(self, x: Any, y: Any) -> Tensor:
        """Return its gradient `(P,)`."""

    @abstractmethod
    def mixed(self, x: Any, y: Any, rows: Tensor) -> Tensor:
        """Return `(k, n, *x)`, the derivative of `rows @ g_i` by sample i's input."""

    @abstractmethod
    def own(self, many: int) -> Any:
        """Return a loss of `many` rows that is the sum of their own losses."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of weights, buffers and names."""

    @abstractmethod
    def changed(self, **options: Any) -> Objective:
        """Return the objective with other options, or with another loss.

        Raises:
            InputError: This framework has no such options.
        """

    @abstractmethod
    def weighted(self, weights: Tensor) -> Objective:
        """Return the objective whose batch loss is the sum of its rows' numerators times `weights`."""

    @restoring
    def hessian(self, x: Any, y: Any) -> Operator:
        """Return the Hessian of a batch's loss, symmetric on the parameters."""
        with seeded(self.seed):
            return hessian(self.model, self.loss, x, y, parameters=self.picks)

    @restoring
    def ggn(self, x: Any, y: Any) -> Operator:
        """Return the generalised Gauss-Newton matrix of a batch's loss."""
        with seeded(self.seed):
            return ggn(self.model, self.loss, x, y, parameters=self.picks)

    @restoring
    def fisher(self, kind: str, x: Any, y: Any, first: int = 0) -> Operator:
        """Return a Fisher matrix of a batch in the scale of its loss, from one label drawn for each target.

        Args:
            kind: As in `jacops.fisher`.
            x: The input.
            y: The target.
            first: Place of the first sample in the data.

        Raises:
            InputError: There is no such kind.
        """
        check_choice("kind", kind, KINDS)
        record = partial(self.recorded, x, "fisher")
        with seeded(self.seed):
            if kind == "empirical":
                return empirical_fisher(self.model, self.losses, y, lambda: self.sample_gradients(x, y), record)
            operator = fisher_at(self.model, self.losses, y, kind, 1, Draws(0, first), record)
        return with_source(operator, Source("fisher", {"x": x, "y": y}), check_finite=False)  # checked as a whole

    def sample_gradients(self, x: Any, y: Any) -> Operator:
        """Return `(n, P)`, row i the gradient of the loss of sample i alone."""
        return sample_gradients(
            self.model, self.losses.scalar, x, y, randomness=self.randomness, seed=self.seed, parameters=self.picks
        )

    def sample_jacobians(self, x: Any) -> Operator:
        """Return `(n * K, P)`, rows of the output's Jacobian of every sample alone."""
        return sample_jacobians(self.model, x, seed=self.seed, parameters=self.picks)

    @restoring
    def outputs(self, x: Any, y: Any) -> tuple[Operator, Tensor, Tensor]:
        """Return the output Jacobian `(n * K, P)`, and each sample's loss's gradient `(n, K)` and Hessian `(n, K, K)`.

        The last two are by the output, of which each sample has K entries.

        Raises:
            InputError: The output is not one tensor with a row per sample.
        """
        J, own = self.sample_jacobians(x), self.own(rows_of(x))  # noqa: N806
        at = LossAtOutput(self.model, self.recorded(x, "leverage"), own, y, rows_of(x), "leverage")
        return J, at.gradient(own), at.matrix(at.like.dtype)

    @restoring
    def recorded(self, x: Any, call: str) -> Any:
        """Return the model's output on a batch, recorded by the parameters."""
        with seeded(self.seed):
            return recorded(self.model, x, call=call, parameters=self.picks)

    def unchanged(self) -> Callable[[str], None]:
        """Return a function of a call's name that raises `ModelStateError` once the model differs from what it is now.

        Frameworks whose parameters cannot be written into have nothing to compare.
        """
        return lambda call: None

    def check_state(self) -> None:  # noqa: B027 - most frameworks have no modes
        """Refuse a model whose mode makes per-sample quantities ill-posed."""

    def denominators(self, y: Any, rows: int) -> Tensor:
        """Return what each row adds to the denominator of a mean, `(rows,)`: 1, or its targets' number or weights."""
        return self.losses.denominators(y, rows)

    def is_convex(self, y: Any) -> bool:
        """Return whether the loss of these targets is known to be convex in the output, without computing it."""
        return is_convex(self.loss, y)

    def on(self, x: Any) -> Objective:
        """Return the objective for one batch, which may keep what it computes of these inputs."""
        return self

    @property
    def held_bytes(self) -> int:
        """Bytes of what is kept of a batch."""
        return 0

    def check_reduction(self, batch: Batch) -> None:
        """Refuse a loss that does not reduce a batch as the objective says, or a row alone.

        Raises:
            InputError: It does not.
            NonFiniteError: A loss is NaN or Inf.
        """
        check_reduction(self, batch)


def checked_loss(loss: Loss, reduction: Reduction | None) -> RowLosses:
    """Return the losses of rows behind a loss.

    Raises:
        InputTypeError: It is not callable.
        InputError: There is no such reduction.
    """
    if not callable(loss):
        raise InputTypeError.of("loss", f"a {type(loss).__name__}", "a callable `loss(output, y)` is needed")
    if reduction is not None:
        check_choice("reduction", reduction, ("mean", "sum"))
    return RowLosses(loss, reduction)
