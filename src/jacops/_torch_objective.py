"""TorchObjective: a torch model with its loss; a batch is recorded once for all that is asked of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ._data import Batch
from ._derivatives import ggn_at, hessian_at, shifted_gradient
from ._digests import digest_function, digest_module
from ._finite import check_finite, is_finite
from ._objective import Objective, checked_loss
from ._operators import LayerFactors, Operator
from ._operators._finite_results import Source, with_source
from ._per_sample import Randomness, checked_seed, gradients_at, jacobians_at, refuse_mixing_modules
from ._picks import Picks, picked
from ._recorded_loss import CurvatureOptions, Loss, record_loss, record_loss_of
from ._reduction import FEW_ROWS, check_reduction, not_finite, offset
from ._runtime.contexts import seeded, sweeping
from ._runtime.restoring import restoring
from ._space import Space
from ._torch.protocol import (
    Recording,
    Reduction,
    Weighted,
    bare,
    gradient_tape,
    parameter_names,
    record_model,
    weights_of,
)
from ._trees import flatten
from .errors import InputError, InputTypeError, NotDifferentiableError


class _Kept:
    """What is kept of one batch.

    Attributes:
        x: The model's input.
        found: Its recorded output, once it was asked for.
    """

    def __init__(self, x: Any) -> None:
        self.x = x
        self.found: Recording | None = None


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
        self.model, self.loss = model, self.losses.scalar
        self.reduction = self.losses.reduction
        self.picks = picked(model, parameters)
        self.randomness: Randomness = randomness
        self.seed = checked_seed(randomness, seed)
        self._kept: _Kept | None = None

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

    def on(self, x: Any) -> TorchObjective:
        """Return the objective for one batch: the model runs once for all that is asked of it."""
        other = copy.copy(self)
        other._kept = _Kept(x)
        return other

    @property
    def held_bytes(self) -> int:
        """Bytes of the values that the recorded output keeps for sweeps."""
        return 0 if self._kept is None or self._kept.found is None else self._kept.found.lin.held_bytes

    @restoring
    def recorded(self, x: Any, call: str) -> Recording:
        """Return the model's recorded output by the parameters, the same one while nothing was written into them."""
        kept = self._kept if self._kept is not None and self._kept.x is x else _Kept(x)
        if self._known(x) is None:
            with seeded(self.seed):
                kept.found = record_model(self.model, x, call=call, parameters=self.picks, kept=True)
        return kept.found  # pyright: ignore[reportReturnType]

    def _known(self, x: Any) -> Recording | None:
        """Return the recorded output of a batch if it is kept and the model still is as it was recorded."""
        found = None if self._kept is None or self._kept.x is not x else self._kept.found
        weights = None if found is None else found.lin.weights
        return None if weights is None or weights.changed_in(bare(self.model)) is not None else found

    @restoring
    def _recorded_loss(self, x: Any, y: Any, call: str, loss: Loss | None = None, kept: bool = False) -> Recording:
        """Return the recorded loss of a batch, over the graph of its recorded output where that is known.

        Args:
            x: The model's input.
            y: The target.
            call: On whose behalf.
            loss: Another loss than the objective's.
            kept: It is kept for later products, as is the output.
        """
        found, chosen = self._known(x), loss or self.loss
        if found is None and kept and self._kept is not None and self._kept.x is x:
            with suppress(InputTypeError, NotDifferentiableError):  # an output that is no tensor, but its loss is
                found = self.recorded(x, call)
        if found is not None:
            return record_loss_of(found, chosen, y, call)
        with seeded(self.seed):
            return record_loss(self.model, chosen, x, y, call, parameters=self.picks, kept=kept)

    def check_reduction(self, batch: Batch) -> None:
        """Refuse a loss that does not reduce a batch as said; proved once for a graph of model and loss.

        Raises:
            InputError: It does not.
            NonFiniteError: A loss is NaN or Inf.
        """
        if self.losses.may_count(batch.y):
            self._count(batch)
        found = self._recorded_loss(batch.x, batch.y, "loss", kept=True)
        trust, claim = found.lin.trust, ("reduction", self.reduction)
        if trust.needs(*claim) or trust.spot_due() or not is_finite(found.lin.outputs[0]):
            check_reduction(self, batch)
            trust.remember(*claim)

    def _count(self, batch: Batch) -> None:
        """Compute by what a loss that is none of torch's own divides a mean, from a few rows."""
        output = self.recorded(batch.x, "loss").output
        leaves, tree = flatten(output, "output")
        if all(isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch.rows for leaf in leaves):
            few = slice(0, FEW_ROWS)
            output, batch = tree.build([leaf[few] for leaf in leaves]), batch.part(few)
        self.losses.settle(output, batch.y)

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
        found = self._recorded_loss(x, y, "value")
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
        lin = self._recorded_loss(x, y, "gradient").lin
        rows = lin.pull_rows([torch.ones_like(lin.outputs[0]).unsqueeze(0)])
        check_finite("gradient", rows, lin.domain.names, lin, data={"x": x, "y": y})
        return lin.domain.join(rows)[0].detach()

    @restoring
    def hessian(self, x: Any, y: Any) -> Operator:
        """Return the Hessian of a batch's loss."""

        def gradient(shift: dict[str, Tensor]) -> Tensor:
            return shifted_gradient(self.model, self.loss, x, y, shift, {"parameters": self.picks})

        with seeded(self.seed):
            operator = hessian_at(self._recorded_loss(x, y, "hessian", kept=True), x, y, "hessian", gradient)
        return with_source(operator, Source("hessian", {"x": x, "y": y}))

    @restoring
    def ggn(self, x: Any, y: Any) -> Operator:
        """Return the generalised Gauss-Newton matrix of a batch's loss."""
        with seeded(self.seed):
            operator = ggn_at(self.recorded(x, "ggn"), self.loss, y, "ggn")
        return with_source(operator, Source("ggn", {"x": x, "y": y}))

    def sample_gradients(self, x: Any, y: Any) -> LayerFactors:
        """Return the gradients of the rows' own losses, `(n, P)`."""
        options: CurvatureOptions = {"parameters": self.picks}
        record = self._record(x, "sample_gradients")
        rows = gradients_at(self.model, self.losses.scalar, x, y, self.seed, options, record)
        return with_source(rows, Source("sample_gradients", {"x": x, "y": y}))

    def sample_jacobians(self, x: Any) -> LayerFactors:
        """Return the rows of the outputs' Jacobian, `(n * K, P)`."""
        record = self._record(x, "leverage")
        return jacobians_at(self.model, x, None, self.seed, {"parameters": self.picks}, record)

    def _record(self, x: Any, call: str) -> Callable[[], Recording] | None:
        """Return what records a batch that is kept; None for any other."""
        return partial(self.recorded, x, call) if self._kept is not None and self._kept.x is x else None

    def mixed(self, x: Any, y: Any, rows: Tensor) -> Tensor:
        """Return `(k, n, *x)`, the derivative of `rows @ g_i` by sample i's input.

        All samples share the sweeps where one sample, taken alone, gives what it gives in the batch.

        Raises:
            InputError: `x` is not one floating-point tensor.
            NotDifferentiableError: There is no second derivative.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = f"of dtype {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InputError.of("x", came, "perturbations need one floating-point tensor")
        batch, many = Batch(x, y, x.shape[0]), x.shape[0]
        if many == 0:
            return rows.new_zeros(rows.shape[0], *x.shape)
        last = batch.part(slice(many - 1, many))
        alone = self._mixed_once(last, rows)
        if many > 1 and rows.shape[0]:
            found = self._mixed_once(batch, rows)
            scale = float(alone.abs().max()) + float(found.abs().max())
            # Roundings of a sum over as many terms as layers have, as in `mixing`.
            if float((found[:, -1:] - alone).abs().max()) <= 1e3 * torch.finfo(x.dtype).eps * scale:
                return found
        return torch.cat([*(self._mixed_once(batch.part(slice(i, i + 1)), rows) for i in range(many - 1)), alone], 1)

    @restoring
    def _mixed_once(self, batch: Batch, rows: Tensor) -> Tensor:
        found = self._recorded_loss(batch.x, batch.y, "mixed", self.own(batch.rows))
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
