"""Calling a loss just as the user wrote it, without letting the target broadcast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...errors import InputError, explain
from .restoring import restoring


class _NoBroadcast(TorchFunctionMode):
    """Refuse a target that broadcasts against the output, which torch's elementwise losses only warn about."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(func is loss for loss in _ELEMENTWISE_LOSSES):
            shapes = [tuple(t.shape) for t in [*args, *kwargs.values()] if isinstance(t, Tensor)][:2]
            if len(set(shapes)) > 1:
                raise InputError(
                    explain(
                        "y",
                        f"of shape {shapes[1]}",
                        f"the model's output has shape {shapes[0]} and the loss is elementwise",
                        "Give both the same shape, e.g. `y.unsqueeze(-1)`.",
                    )
                )
        return func(*args, **kwargs)


_ELEMENTWISE_LOSSES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)


@restoring
def call_loss(loss: Callable[[Any, Any], Any], output: Any, target: Any) -> Any:
    """Return `loss(output, target)`.

    Raises:
        InputError: The target would broadcast against the output.
    """
    with _NoBroadcast():
        return loss(output, target)
