"""Objective: a model with its loss, differentiated one batch at a time.

Everything above it (problems, influence) has torch tensors and operators, whatever the model is written in.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ._digests import digest_function, digest_module
from ._finite import check_finite
from ._framework import recorded
from ._picks import Picks, picked
from ._reduction import not_finite, offset
from ._runtime.contexts import seeded, sweeping
from ._runtime.counter import Draws
from ._runtime.restoring import restoring
from ._torch.protocol import (
    Reduction,
    RowLosses,
    Weighted,
    bare,
    gradient_tape,
    is_convex,
    parameter_names,
    record_model,
    weights_of,
)
from .data import Batch, rows_of
from .derivatives import CurvatureOptions, Loss, ggn, hessian, record_loss, trainable
from .errors import InputError, InputTypeError, explain
from .fisher import KINDS, batch_fisher
from .operators import Operator
from .per_sample import Randomness, checked_seed, refuse_mixing_modules, sample_gradients, sample_jacobians
from .solvers._output_loss import loss_at_output
from .space import Space


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
        if kind not in KINDS:
            raise InputError(explain("kind", repr(kind), f"one of {KINDS} is needed"))
        options: CurvatureOptions = {"parameters": self.picks}
        with seeded(self.seed):
            return batch_fisher(self.model, self.losses, x, y, kind, 1, Draws(0, first), options)

    def sample_gradients(self, x: Any, y: Any) -> Operator:
        """Return `(n, P)`, row i the gradient of the loss of sample i alone."""
        return sample_gradients(
            self.model, self.losses.scalar, x, y, randomness=self.randomness, seed=self.seed, parameters=self.picks
        )

    @restoring
    def outputs(self, x: Any, y: Any) -> tuple[Operator, Tensor, Tensor]:
        """Return the output Jacobian `(n * K, P)`, and each sample's loss's gradient `(n, K)` and Hessian `(n, K, K)`.

        The last two are by the output, of which each sample has K entries.

        Raises:
            InputError: The output is not one tensor with a row per sample.
        """
        J, own = sample_jacobians(self.model, x, seed=self.seed, parameters=self.picks), self.own(rows_of(x))  # noqa: N806
        at = loss_at_output(self.model, self.recorded(x, "leverage"), own, y, rows_of(x), "leverage")
        return J, at.gradient(own), at.matrix(at.dtype)

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

    def settle(self, batch: Batch) -> None:  # noqa: B027 - most losses divide by rows
        """Compute by what the loss divides a mean, where that is not known."""


def checked_loss(loss: Loss, reduction: Reduction | None) -> RowLosses:
    """Return the losses of rows behind a loss.

    Raises:
        InputTypeError: It is not callable.
        InputError: There is no such reduction.
    """
    if not callable(loss):
        raise InputTypeError(explain("loss", f"a {type(loss).__name__}", "a callable `loss(output, y)` is needed"))
    if reduction not in (None, "mean", "sum"):
        raise InputError(explain("reduction", repr(reduction), "one of ('mean', 'sum') is needed"))
    return RowLosses(loss, reduction)


class TorchObjective(Objective):
    """A torch model with its loss.

    Args:
        model: A module, differentiated as it stands.
        loss: `loss(output, y)`, one number; or a torch loss with `reduction="none"`, of which the mean is taken.
        parameters: Which parameters: None takes those that require grad; name patterns (`"*.lora_*"`), one or
            several, or a function of name and parameter pick others.
        reduction: How the loss reduces a batch; by default what `loss.reduction` says, else the mean.
        randomness: As in `sample_gradients`.
        seed: As in `sample_gradients`.

    Raises:
        InputError: A pattern fits no parameter; the message names the nearest names.
        InputTypeError: `loss` is not callable.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        parameters: Picks = None,
        reduction: Reduction | None = None,
        randomness: Randomness = "error",
        seed: int | None = None,
    ) -> None:
        self.losses = checked_loss(loss, reduction)
        self._options = {"parameters": parameters, "reduction": reduction, "randomness": randomness, "seed": seed}
        self.model = model
        self.loss = self.losses.scalar
        self.reduction = self.losses.reduction
        self.picks = picked(parameters, list(parameter_names(bare(model)))) or trainable
        self.randomness: Randomness = randomness
        self.seed = checked_seed(randomness, seed)

    @property
    def space(self) -> Space:
        """The parameters that are differentiated."""
        return self._space

    @cached_property
    def _space(self) -> Space:
        chosen = {n: p for n, p in parameter_names(bare(self.model)).items() if self.picks(n, p)}
        return Space.of(chosen.values(), chosen)

    @property
    def parameters_total(self) -> int:
        """Entries of all the model's parameters."""
        return sum(p.numel() for p in parameter_names(bare(self.model)).values())

    def changed(self, *, loss: Loss | None = None, **options: Any) -> TorchObjective:
        """Return the objective with other options, or with another loss."""
        return TorchObjective(self.model, loss or self.losses.loss, **{**self._options, **options})

    def point(self) -> Tensor:
        """Return the parameters as they are, `(P,)`."""
        named = parameter_names(bare(self.model))
        return self.space.join([named[name].detach().unsqueeze(0) for name in self.space.names])[0]

    def check_state(self) -> None:
        """Refuse modules that make per-sample quantities ill-posed in train mode.

        Raises:
            ModelStateError: The message names the module.
        """
        refuse_mixing_modules(self.model, random=self.seed is None)

    def unchanged(self) -> Callable[[str], None]:
        """Return a function that raises `ModelStateError` once parameters, buffers or modes differ."""
        module = bare(self.model)
        weights = weights_of(module)
        return lambda call: weights.check(module, call)

    @restoring
    def settle(self, batch: Batch) -> None:
        """Compute by what the loss divides a mean, where it is none of torch's own and has labels."""
        if self.losses.may_count(batch.y):
            with seeded(self.seed):
                found = record_model(self.model, batch.x, call="loss", parameters=self.picks)
            self.losses.settle(found.output, batch.y)

    def weighted(self, weights: Tensor) -> TorchObjective:
        """Return the objective whose batch loss is the sum of its rows' numerators times `weights`."""
        other = copy.copy(self)
        other.loss, other.reduction = Weighted(self.losses, weights), "sum"
        return other

    @restoring
    def value(self, x: Any, y: Any) -> float:
        """Return the loss of a batch.

        Raises:
            NonFiniteError: It is NaN or Inf; the message names what holds the first NaN or Inf.
        """
        with seeded(self.seed):
            found = record_loss(self.model, self.loss, x, y, "value", parameters=self.picks)
        value = float(found.lin.outputs[0].detach())
        if not math.isfinite(value):
            raise not_finite("Problem", value, bare(self.model), x, y)
        return value

    @restoring
    def value_near(self, x: Any, y: Any) -> float:
        """Return the loss of a batch at parameters that are a little off, always the same ones; it may be NaN."""
        named = parameter_names(bare(self.model))
        shift = {name: offset(named[name].detach(), seed) for seed, name in enumerate(self.space.names)}
        with seeded(self.seed):
            found = record_loss(self.model, self.loss, x, y, "value", parameters=self.picks, shift=shift)
        return float(found.lin.outputs[0].detach())

    @restoring
    def gradient(self, x: Any, y: Any) -> Tensor:
        """Return the gradient `(P,)` of a batch's loss."""
        with seeded(self.seed):
            lin = record_loss(self.model, self.loss, x, y, "gradient", parameters=self.picks).lin
        rows = lin.pull_rows([torch.ones_like(lin.outputs[0]).unsqueeze(0)])
        check_finite("gradient", rows, lin.domain.names, lin, data={"x": x, "y": y})
        return lin.domain.join(rows)[0].detach()

    def mixed(self, x: Any, y: Any, rows: Tensor) -> Tensor:
        """Return `(k, n, *x)`, the derivative of `rows @ g_i` by sample i's input.

        All samples share the sweeps where one sample, taken alone, gives what it gives in the batch.

        Raises:
            InputError: `x` is not one floating-point tensor.
            NotDifferentiableError: There is no second derivative.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = f"of dtype {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InputError(explain("x", came, "perturbations need one floating-point tensor"))
        batch, many = Batch(x, y, x.shape[0]), x.shape[0]
        if many == 0:
            return rows.new_zeros(rows.shape[0], *x.shape)
        last = batch.part(slice(many - 1, many))
        alone = self._mixed_once(last, rows)
        if many > 1 and rows.shape[0]:
            found = self._mixed_once(batch, rows)
            scale = float(alone.abs().max()) + float(found.abs().max())
            if float((found[:, -1:] - alone).abs().max()) <= 1e3 * torch.finfo(x.dtype).eps * scale:
                return found
        return torch.cat([*(self._mixed_once(batch.part(slice(i, i + 1)), rows) for i in range(many - 1)), alone], 1)

    @restoring
    def _mixed_once(self, batch: Batch, rows: Tensor) -> Tensor:
        with seeded(self.seed):
            found = record_loss(self.model, self.own(batch.rows), batch.x, batch.y, "mixed", parameters=self.picks)
        gradient = gradient_tape(found, "mixed")
        leaf = next(leaf for given, leaf in found.inputs.values() if given is batch.x)
        with sweeping(leaf):
            flat = gradient.domain.join([g.unsqueeze(0) for g in gradient.outputs])[0]
            parts = (
                [
                    torch.autograd.grad(flat, leaf, row, retain_graph=True, materialize_grads=True)[0].detach()
                    for row in rows
                ]
                if flat.requires_grad
                else [torch.zeros_like(leaf) for _ in rows]
            )
        return torch.stack(parts) if parts else rows.new_zeros(0, *leaf.shape)

    def own(self, many: int) -> Loss:
        """Return a loss of `many` rows that is the sum of their own losses; a row that is ignored has none."""
        losses = self.losses

        def own(output: Any, y: Any) -> Tensor:
            shares = losses.denominators(y, many) if losses.reduction == "mean" else torch.ones(many)
            terms = losses.terms(output, y, many)
            return (terms / torch.where(shares > 0, shares, 1.0).to(terms)).sum()

        return own

    def fingerprint(self) -> str:
        """Return a digest of parameters and buffers, of the modules' and the loss's names, and of what is picked."""
        told = f"{self.reduction} {self.space} {self.randomness} {self.seed}"
        return " ".join((digest_module(bare(self.model)), digest_function(self.losses.loss), told))
