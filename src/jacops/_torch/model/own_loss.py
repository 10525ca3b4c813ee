"""The loss that a model computes itself where it is given labels, as a function of its logits.

Models of transformers return `loss` beside `logits`. Curvature through the output, losses of rows and drawn labels need
that loss as `loss(output, labels)`, which is what their `loss_function` computes from the logits; it is compared with
what the model returns.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from ..._runtime.agreement import coarsest
from ..._runtime.contexts import random_state_kept
from ..._runtime.restoring import restoring
from ...errors import InputError, InputTypeError
from .inputs import split_input
from .losses import call_loss
from .replica import replicate
from .structure import bare

OWN = "model"  # what `loss=` is given for it
_WRITE = "Write it as `loss(output, y)`, a function of the model's output and the labels."


@final
class ModelLoss:
    """A model's own loss, `loss(output, labels)`: its `loss_function` of the output's `logits`.

    Args:
        model: A module with a `loss_function`, as transformers' models have.

    Attributes:
        name: Of the function.
        task: The model's `config.problem_type`, if it has one.

    Raises:
        InputTypeError: It has none.
    """

    ignore_index = -100  # of transformers

    def __init__(self, model: Any) -> None:
        function = getattr(bare(model), "loss_function", None)
        if not callable(function):
            came = f"'{OWN}' for a {type(bare(model)).__name__}"
            raise InputTypeError.of("loss", came, "a model with a `loss_function` is needed", _WRITE)
        self._function: Any = function
        self._config = getattr(bare(model), "config", None)
        self.name = f"{function.__module__}.{getattr(function, '__qualname__', '')}"
        self.task = str(getattr(self._config, "problem_type", None))
        self._verified = False  # no part of a digest
        taken = inspect.signature(function).parameters.values()
        self._takes = None if any(p.kind is p.VAR_KEYWORD for p in taken) else {p.name for p in taken}

    @property
    def verified(self) -> bool:
        """It was compared with what the model returns."""
        return self._verified

    def __call__(self, output: Any, y: Any) -> Tensor:
        """Return the loss of some rows.

        Raises:
            InputError: The output has no logits.
        """
        logits = _part(output, "logits")
        if not isinstance(logits, Tensor):
            came = f"'{OWN}' for an output without `logits` ({type(output).__name__})"
            raise InputError.of("loss", came, "the model's own loss is taken of these", _WRITE)
        given = {"logits": logits, "pooled_logits": logits, "labels": y, "vocab_size": logits.shape[-1]}
        given["config"] = copy.copy(self._config)  # the function may note there what kind of labels it was given
        return self._function(**{name: v for name, v in given.items() if self._takes is None or name in self._takes})

    @restoring
    def check(self, model: Any, x: Any, y: Any, output: Any) -> None:
        """Compare the loss of some rows with what the model returns for them.

        Raises:
            InputError: It returns another loss, or none.
        """
        args, kwargs = split_input(x)
        noted = dict(vars(self._config)) if self._config is not None else {}
        try:
            with torch.no_grad(), random_state_kept():
                found = float(call_loss(self, output, y))  # first: what does not fit is explained there
                expected = _part(replicate(model)(args, {**kwargs, "labels": y}), "loss")
        finally:
            if self._config is not None:
                vars(self._config).update(noted)
        if not isinstance(expected, Tensor):
            came = f"'{OWN}' for a model that returns no `loss` for `labels=`"
            raise InputError.of("loss", came, "the model's own loss is what it returns there", _WRITE)
        # Both are computed from the same logits, in half precision perhaps; weights of additional terms are 1e-3 or so.
        dtypes = [expected.dtype, *(p.dtype for p in bare(model).parameters())]
        allowed = 1e-2 if torch.finfo(coarsest(dtypes) or expected.dtype).eps > 1e-5 else 1e-5
        if not abs(found - float(expected)) <= allowed * max(abs(float(expected)), 1e-3):
            came = f"'{OWN}' for a model whose loss is {float(expected):.6g} where its `loss_function` is {found:.6g}"
            raise InputError.of("loss", came, "the model's own loss must be one of its logits and labels alone", _WRITE)
        self._verified = True


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def resolved_loss(model: Any, loss: Any) -> Any:
    """Return a loss as it was given, or the model's own where that is requested."""
    return ModelLoss(model) if isinstance(loss, str) and loss == OWN else loss
