"""Objective: a model with its loss, differentiated one batch at a time.

Everything above it (problems, influence) has torch tensors and operators, whatever the model is written in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, TypedDict, Unpack, final

import torch
from torch import Tensor

from ._cached import cached_property
from ._data import Batch, rows_of
from ._derivatives import ggn_at, hessian, hessian_at, shifted_gradient
from ._digests import digest_function, digest_module
from ._finite import check_finite
from ._fisher import empirical_fisher, fisher_at
from ._framework import recorded
from ._ladder.protocol import SweepOptions, is_framework_model
from ._mixed import mixed_rows
from ._operators import LayerFactors, Operator
from ._operators._finite_results import Source, with_source
from ._options import CurvatureOptions, TorchOptions
from ._per_sample import KeptBatch, checked_seed, gradients_at, jacobians_at, refuse_mixing_modules
from ._picks import Picks, picked
from ._recorded_loss import Loss, LossAt, LossOf, record_loss, record_loss_of
from ._reduction import check_reduction, checked_loss, not_finite, offset, prove_reduction
from ._requirements import check_choice
from ._runtime.contexts import eager, seeded
from ._runtime.counter import Draws
from ._runtime.restoring import restoring
from ._sample_inputs import SampleInputs
from ._space import Space
from ._torch.protocol import ModelStructure, Weighted, bare, is_convex, resolved_loss, structure_of, weights_of
from ._trees import Selector
from ._words import FisherKind, Randomness, Reduction
from .errors import InputError, InputTypeError, NotDifferentiableError
from .solvers._output_loss import LossAtOutput

_NO_BATCH = object()


class ObjectiveOptions(TypedDict, total=False):
    """Options of an `Objective`."""

    parameters: Picks
    reduction: Reduction | None
    randomness: Randomness
    seed: int | None


@final
class Objective:
    """A model of any framework with its loss.

    Args:
        model: A module, differentiated in its current mode, or a model of another framework, such as a `JaxFunction`.
        loss: `loss(output, y)`, one number, in the framework's arrays; or a torch loss with `reduction="none"`, of
            which the mean is taken; or `"model"`, the model's own (`ModelLoss`).
        parameters: Which parameters: None takes those that require grad; name patterns (`"*.lora_*"`), one or
            several, or a function of name and parameter pick others.
        reduction: How the loss reduces a batch; by default `loss.reduction`, else the mean.
        randomness: `"error"` refuses dropout in train mode; `"same"` draws the same masks for every sample.
        seed: Of those masks; needed with `randomness="same"`.

    Attributes:
        foreign: The model is of another framework than torch.
        losses: Of the rows.
        picks: Which parameters, by name and value.

    Raises:
        InputError: A pattern fits no parameter, there is no such reduction, or a model of another framework is to
            draw random numbers.
        InputTypeError: `loss` is not callable.
    """

    def __init__(
        self,
        model: Any,
        loss: Loss,
        *,
        parameters: Picks = None,
        reduction: Reduction | None = None,
        randomness: Randomness = "error",
        seed: int | None = None,
    ) -> None:
        self._options = ObjectiveOptions(parameters=parameters, reduction=reduction, randomness=randomness, seed=seed)
        self.foreign = is_framework_model(model)
        for name, value in (("randomness", randomness), ("seed", seed)):
            if self.foreign and value not in (None, "error"):
                todo = "Pass the random key to `apply` as a part of `params` or `x`."
                raise InputError.of(name, "given", "a JAX model is a pure function", todo)
        loss = loss if self.foreign else resolved_loss(model, loss)
        self.model, self.losses = model, checked_loss(loss, reduction)
        self.loss, self.reduction = loss if self.foreign else self.losses.scalar, self.losses.reduction
        self.picks = picked(model, parameters)
        self._picked: CurvatureOptions = {"parameters": self.picks}
        self.randomness: Randomness = randomness
        self.seed = checked_seed(randomness, seed)
        self._x: Any = _NO_BATCH  # the input of the batch that it is for
        self._found: list[Any] = []  # its recorded output, once it was requested; shared with weighted ones
        self._at = LossAt()
        self._once = False  # recorded for one call, during which the weights stay as they are
        self._consists: ModelStructure | None = None  # for one call, of what the model consists
        self._shares: tuple[Any, Tensor] | None = None  # for one call, targets and their denominators

    @property
    def _named(self) -> dict[str, Tensor]:
        return (self._consists or structure_of(self.model)).differentiable

    @property
    def space(self) -> Space:
        """The parameters that are differentiated."""
        return self.model.space(self.picks) if self.foreign else self._space

    @cached_property
    def _space(self) -> Space:
        chosen = {n: p for n, p in self._named.items() if self.picks(n, p)}
        return Space.of(chosen.values(), chosen)

    @property
    def parameters_total(self) -> int:
        """Entries of all the model's parameters, differentiated or not."""
        return self.model.total if self.foreign else sum(p.numel() for p in self._named.values())

    def changed(self, model: Any = None, loss: Loss | None = None, **options: Unpack[ObjectiveOptions]) -> Objective:
        """Return the objective with other options, with another loss, or of another model.

        Raises:
            InputError: As for an objective.
        """
        model = self.model if model is None else model
        return Objective(model, loss or self.losses.loss, **(self._options | options))

    def point(self) -> Tensor:
        """Return the parameters as they are, `(P,)`."""
        if self.foreign:
            return self.model.point(self.picks)
        named = self._named
        return self.space.join([named[name].detach().unsqueeze(0) for name in self.space.names])[0]

    def check_state(self) -> None:
        """Refuse modules that make per-sample quantities ill-posed in train mode.

        Raises:
            ModelStateError: The message names the module.
        """
        if not self.foreign:
            refuse_mixing_modules(self._consists or structure_of(self.model), random=self.seed is None)

    def unchanged(self) -> Callable[[str], None]:
        """Return a function of a call's name that raises `ModelStateError` once the model differs from what it is now.

        Frameworks whose parameters cannot be written into have nothing to compare.
        """
        if self.foreign:
            return lambda call: None
        model = self.model
        weights = weights_of(structure_of(model))
        return lambda call: weights.check(structure_of(model), call)

    def denominators(self, y: Any, rows: int) -> Tensor:
        """Return what each row adds to the denominator of a mean, `(rows,)`: 1, or its targets' number or weights."""
        if not self._once:
            return self.losses.denominators(y, rows)
        if self._shares is None or self._shares[0] is not y:  # within a call, the targets stay as they are
            self._shares = y, self.losses.denominators(y, rows)
        return self._shares[1]

    def is_convex(self, y: Any) -> bool:
        """Return whether the loss of these targets is known to be convex in the output, without computing it."""
        return is_convex(self.loss, y)

    # ---- one batch, recorded once ----------------------------------------------------------------------------------

    def on(self, x: Any, once: bool = False) -> Objective:
        """Return the objective for one batch: a torch model runs once for all that is asked of it, `once` by a call."""
        other = object.__new__(Objective)
        vars(other).update(vars(self))  # as `copy.copy`, in a fifth of the time
        other._x, other._found, other._at, other._once = (_NO_BATCH if self.foreign else x), [], LossAt(), once
        other._consists = structure_of(self.model) if once and not self.foreign else None
        return other

    @property
    def held_bytes(self) -> int:
        """Bytes of the values that the recorded output keeps for sweeps."""
        return self._found[0].lin.held_bytes if self._found else 0

    @restoring
    def recorded(self, x: Any, call: str, pulled: bool = False) -> Any:
        """Return the model's recorded output by the parameters, the same one while nothing was written into them.

        Args:
            x: The model's input.
            call: On whose behalf.
            pulled: Only pulls are taken of it, never their derivatives.
        """
        found = self._known(x, pulled)
        if found is None:
            kept, consists = not self._once, self._consists if self._x is x else None
            options: TorchOptions = {"kept": kept, "aside": True, "pulled": pulled, "consists": consists}
            with nullcontext() if self.seed is None else seeded(self.seed):  # a run keeps the random state by itself
                found = recorded(self.model, x, call=call, parameters=self.picks, **options)
            if self._x is x:
                self._found[:] = [found]
        return found

    def _known(self, x: Any, pulled: bool) -> Any:
        """Return the recorded output of a batch if it is kept and the model still is as it was recorded."""
        found = self._found[0] if self._x is x and self._found else None
        weights = None if found is None or self._once else found.lin.weights
        if found is None or not (self._once or (weights and weights.changed_in(structure_of(self.model)) is None)):
            return None
        return found if pulled or not found.lin.is_pulled_only else None

    @restoring
    def recorded_loss(
        self, x: Any, y: Any, call: str, loss: Loss | None = None, kept: bool = False, pulled: bool = False
    ) -> Any:
        """Return the recorded loss of a batch, over the graph of its recorded output where that is known.

        Args:
            x: The model's input.
            y: The target.
            call: On whose behalf.
            loss: Another loss than the objective's.
            kept: It is kept for later products, as is the output.
            pulled: Only pulls are taken of it, never their derivatives.
        """
        found, chosen = self._known(x, pulled), loss or self.loss
        if found is None and kept and self._x is x:
            with suppress(InputTypeError, NotDifferentiableError):  # an output that is no tensor, but its loss is
                found = self.recorded(x, call, pulled)
        if found is not None:
            return record_loss_of(found, chosen, y, call)
        with seeded(self.seed):
            return record_loss(self.model, chosen, x, y, call, parameters=self.picks, kept=kept, pulled=pulled)

    def check_reduction(self, batch: Batch) -> None:
        """Refuse a loss that does not reduce a batch as said, or a row alone; proved once for a torch graph.

        Raises:
            InputError: It does not.
            NonFiniteError: A loss is NaN or Inf.
        """
        (check_reduction if self.foreign else prove_reduction)(self, batch)

    def at_output(self, found: Any, y: Any, call: str, kept: bool = False) -> Any:
        """Return the loss by a recorded output of a torch model, recorded there; with `kept` for later uses too."""
        return self._at.of(found, self.loss, y, call, kept)

    def weighted(self, weights: Tensor) -> Objective:
        """Return the objective whose batch loss is the sum of its rows' numerators times `weights`."""
        other = copy.copy(self)
        other.reduction = "sum"
        other.loss = self.model.weighted(self.losses.loss, weights) if self.foreign else Weighted(self.losses, weights)
        return other

    def own(self, many: int) -> Loss:
        """Return a loss of `many` rows that is the sum of their own losses; a row that is ignored has none."""
        return self.model.weighted(self.losses.loss, torch.ones(many)) if self.foreign else self.losses.own(many)

    # ---- derivatives -----------------------------------------------------------------------------------------------

    @eager
    def value(self, x: Any, y: Any) -> float:
        """Return the loss of a batch, which must be finite: else the message names what holds NaN or Inf."""
        if self.foreign:
            return self.model.value(self.loss, x, y, SweepOptions("value", self.picks))
        value = float(self.recorded_loss(x, y, "value", pulled=True).lin.outputs[0].detach())
        if not math.isfinite(value):
            raise not_finite("Problem", value, bare(self.model), x, y)
        return value

    @restoring
    def value_near(self, x: Any, y: Any) -> float:
        """Return the loss of a batch at parameters that are a little off, always the same ones; it may be NaN."""
        if self.foreign:
            return self.model.value(self.loss, x, y, SweepOptions("value", self.picks), offset)
        named = self._named
        shift = {name: offset(named[name].detach(), seed) for seed, name in enumerate(self.space.names)}
        with seeded(self.seed):
            found = record_loss(self.model, self.loss, x, y, "value", parameters=self.picks, shift=shift, pulled=True)
        return float(found.lin.outputs[0].detach())

    def gradient(self, x: Any, y: Any) -> Tensor:
        """Return the gradient `(P,)` of a batch's loss."""
        if self.foreign:
            return self.model.gradient(self.loss, x, y, SweepOptions("gradient", self.picks))
        return self.value_and_gradient(x, y, "gradient")[1]

    @eager
    def value_and_gradient(self, x: Any, y: Any, call: str = "value_and_gradient") -> tuple[float, Tensor]:
        """Return the loss of a batch and its gradient `(P,)`, which must be finite, from one forward."""
        if self.foreign:
            return self.value(x, y), self.gradient(x, y)
        lin = self.recorded_loss(x, y, call, pulled=True).lin
        rows = lin.pull_rows([torch.ones_like(lin.outputs[0]).unsqueeze(0)])
        check_finite(call, rows, lin.domain.names, lin, data={"x": x, "y": y})
        return float(lin.outputs[0].detach()), lin.domain.join(rows)[0].detach()

    @restoring
    def hessian(self, x: Any, y: Any) -> Operator:
        """Return the Hessian of a batch's loss."""
        if self.foreign:
            return hessian(self.model, self.loss, x, y, parameters=self.picks)

        def gradient(shift: dict[str, Tensor]) -> Tensor:
            return shifted_gradient(self.model, self.loss, x, y, shift, self._picked)

        with seeded(self.seed):
            operator = hessian_at(self.recorded_loss(x, y, "hessian", kept=True), x, y, "hessian", gradient)
        return with_source(operator, Source("hessian", {"x": x, "y": y}))

    @restoring
    def ggn(self, x: Any, y: Any) -> Operator:
        """Return the generalised Gauss-Newton matrix of a batch's loss."""
        with seeded(self.seed):
            operator = ggn_at(self.model, self.recorded(x, "ggn"), self.loss, y, "ggn")
        return with_source(operator, Source("ggn", {"x": x, "y": y}))

    @restoring
    def fisher(self, kind: str, x: Any, y: Any, first: int = 0) -> Operator:
        """Return a Fisher matrix of a batch in the scale of its loss, from one label drawn for each target.

        Args:
            kind: Which Fisher matrix.
            x: The input.
            y: The target.
            first: Place of the first sample in the data.

        Raises:
            InputError: There is no such kind.
        """
        check_choice("kind", kind, FisherKind)
        record = partial(self.recorded, x, "fisher")
        with seeded(self.seed):
            if kind == "empirical":
                return empirical_fisher(self.model, self.losses, y, lambda: self.sample_gradients(x, y), record)
            operator = fisher_at(self.model, self.losses, y, kind, 1, Draws(0, first), record)
        return with_source(operator, Source("fisher", {"x": x, "y": y}), check_finite=False)  # checked as a whole

    @eager
    def sample_gradients(self, x: Any, y: Any) -> LayerFactors:
        """Return `(n, P)`, row i the gradient of the loss of sample i alone."""
        call = "sample_gradients"
        given, record = SampleInputs(x, y), self._record(x, call, pulled=True)
        at, known, kept = self._at, partial(self._known, x, True), None
        if record is not None:
            kept = KeptBatch(lambda: at.bind(record()), lambda make: at.sample(known(), y, make))
        rows = gradients_at(self.model, self.losses.scalar, given, self.seed, self._picked, kept)
        return with_source(rows, Source(call, {"x": x, "y": y}))

    def sample_jacobians(self, x: Any, outputs: Selector = None) -> LayerFactors:
        """Return `(n * K, P)`, rows of the Jacobian of every sample alone, of the output or a part of it."""
        record = None if outputs is not None else self._record(x, "leverage")
        return jacobians_at(self.model, SampleInputs(x), outputs, self.seed, {**self._picked, "aside": True}, record)

    def _record(self, x: Any, call: str, pulled: bool = False) -> Callable[[], Any] | None:
        """Return what records a batch that is kept; None for any other."""
        return partial(self.recorded, x, call, pulled) if self._x is x else None

    @restoring
    def outputs(self, x: Any, y: Any) -> tuple[Operator, Tensor, Tensor]:
        """Return the output Jacobian `(n * K, P)`, and each sample's loss's gradient `(n, K)` and Hessian `(n, K, K)`.

        The last two are by the output, of which each sample has K entries.

        Raises:
            InputError: The output is not one tensor with a row per sample.
        """
        J, own = self.sample_jacobians(x), self.own(rows_of(x))  # noqa: N806
        at = LossAtOutput(self.model, self.recorded(x, "leverage"), LossOf(own, y), rows_of(x), "leverage")
        return J, at.gradient(own), at.matrix(at.like.dtype)

    @eager
    def mixed(self, x: Any, y: Any, rows: Tensor) -> Tensor:
        """Return `(k, n, *x)`, the derivative of `rows @ g_i` by sample i's input.

        Raises:
            InputError: `x` is not one floating-point tensor.
            NotDifferentiableError: There is no second derivative.
        """
        if self.foreign:
            return self.model.mixed(self.losses.loss, x, y, rows, SweepOptions("mixed", self.picks))
        return mixed_rows(lambda b: self.recorded_loss(b.x, b.y, "mixed", self.own(b.rows)), x, y, rows)

    def fingerprint(self) -> str:
        """Return a digest of weights and buffers, of the model's and the loss's names, and of what is picked."""
        if self.foreign:
            return self.model.fingerprint(self.losses.loss, f"{self.reduction} {self.space}")
        settings = f"{self.reduction} {self.space} {self.randomness} {self.seed}"
        return " ".join((digest_module(bare(self.model)), digest_function(self.losses.loss), settings))
