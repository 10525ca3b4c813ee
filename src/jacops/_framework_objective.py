"""FrameworkObjective: a model of another framework than torch with its loss, one batch at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ._ladder.protocol import FrameworkModel, SweepOptions
from ._objective import Objective, checked_loss
from ._picks import Picks, picked
from ._reduction import offset
from ._runtime.contexts import eager
from ._space import Space
from ._torch.protocol import Reduction
from .errors import InputError


class FrameworkObjective(Objective):
    """A model of another framework with its loss; the model answers what its framework knows.

    Args:
        model: Such as a `JaxFunction`.
        loss: `loss(output, y)`, one number, in the framework's arrays.
        parameters: As in `TorchObjective`.
        reduction: As in `TorchObjective`.

    Raises:
        InputError: A pattern fits no parameter.
        InputTypeError: `loss` is not callable.
    """

    def __init__(
        self, model: FrameworkModel, loss: Any, *, parameters: Picks = None, reduction: Reduction | None = None
    ) -> None:
        self.losses = checked_loss(loss, reduction)
        self._options = {"parameters": parameters, "reduction": reduction}
        self.model, self.loss, self.reduction = model, loss, self.losses.reduction
        self.picks = picked(model, parameters)

    @property
    def space(self) -> Space:
        """The parameters that are differentiated, named by their place in the tree."""
        return self.model.space(self.picks)

    @property
    def parameters_total(self) -> int:
        """Entries of all arrays among the parameters."""
        return self.model.total

    def changed(self, *, loss: Any = None, **options: Any) -> FrameworkObjective:
        """Return the objective with other options, or with another loss.

        Raises:
            InputError: There is no such option: models of other frameworks draw no random numbers by themselves.
        """
        for name in options.keys() - self._options.keys():
            todo = "Pass the random key to `apply` as a part of `params` or `x`."
            raise InputError.of(name, "given", "a JAX model is a pure function", todo)
        given = {name: value for name, value in options.items() if value is not None}
        return FrameworkObjective(self.model, loss or self.losses.loss, **{**self._options, **given})

    def weighted(self, weights: Tensor) -> FrameworkObjective:
        """Return the objective whose batch loss is the sum of its rows' own losses times `weights`."""
        other = copy.copy(self)
        other.loss, other.reduction = self.model.weighted(self.losses.loss, weights), "sum"
        return other

    def own(self, many: int) -> Any:
        """Return a loss of `many` rows that is the sum of their own losses."""
        return self.model.weighted(self.losses.loss, torch.ones(many))

    def point(self) -> Tensor:
        """Return the parameters as they are, `(P,)`."""
        return self.model.point(self.picks)

    @eager
    def value(self, x: Any, y: Any) -> float:
        """Return the loss of a batch."""
        return self.model.value(self.loss, x, y, SweepOptions("value", self.picks))

    def value_near(self, x: Any, y: Any) -> float:
        """Return the loss of a batch at parameters that are a little off, always the same ones; it may be NaN."""
        return self.model.value(self.loss, x, y, SweepOptions("value", self.picks), offset)

    @eager
    def gradient(self, x: Any, y: Any) -> Tensor:
        """Return the gradient `(P,)` of a batch's loss."""
        return self.model.gradient(self.loss, x, y, SweepOptions("gradient", self.picks))

    @eager
    def mixed(self, x: Any, y: Any, rows: Tensor) -> Tensor:
        """Return `(k, n, *x)`, the derivative of `rows @ g_i` by sample i's input."""
        return self.model.mixed(self.losses.loss, x, y, rows, SweepOptions("mixed", self.picks))

    def fingerprint(self) -> str:
        """Return a digest of all parameters, of the functions' names, and of what is picked."""
        return self.model.fingerprint(self.losses.loss, f"{self.reduction} {self.space}")
