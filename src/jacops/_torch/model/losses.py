"""Calling a loss just as the user wrote it, without letting the target broadcast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..._runtime.contexts import must_surface
from ..._runtime.restoring import restoring
from ...errors import InputError, JacopsError
from .loss_facts import torch_loss


class _NoBroadcast(TorchFunctionMode):
    """Refuse a target that broadcasts against the output, which torch's elementwise losses only warn about."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(func is loss for loss in _ELEMENTWISE_LOSSES):
            shapes = [tuple(t.shape) for t in [*args, *kwargs.values()] if isinstance(t, Tensor)][:2]
            if len(set(shapes)) > 1:
                came = f"of shape {shapes[1]}"
                needed = f"the model's output has shape {shapes[0]} and the loss is elementwise"
                raise InputError.of("y", came, needed, "Give both the same shape, e.g. `y.unsqueeze(-1)`.")
        return func(*args, **kwargs)


_ELEMENTWISE_LOSSES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)


@restoring
def call_loss(loss: Callable[[Any, Any], Any], output: Any, target: Any) -> Any:
    """Return `loss(output, target)`.

    Raises:
        InputError: The target would broadcast against the output, or it is a loss of torch's that takes no such output.
    """
    try:
        with _NoBroadcast():
            return loss(output, target)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        name = torch_loss(loss)
        if name is None or isinstance(error, JacopsError) or must_surface(error):
            raise
        raise _misfit(name, output, target, error) from error


def _misfit(name: str, output: Any, target: Any, error: Exception) -> InputError:
    """Return the error for a loss of torch's that fails on a model's output and a target."""
    came, labels = _shown(output), _shown(target)
    todo = "Write a `loss(output, y)` that hands both to it in the shapes that it takes."
    logits = None if isinstance(output, Tensor) else getattr(output, "logits", None)
    of = "output" if logits is None else "output.logits"
    if name == "cross_entropy" and getattr(logits if logits is not None else output, "ndim", 0) == 3:
        todo = (
            f"It takes classes as the second axis: write `lambda output, y: cross_entropy({of}.flatten(0, 1), "
            f"y.flatten())`, or `{of}[:, :-1]` and `y[:, 1:]` in it where each token predicts the next."
        )
    elif logits is not None:
        todo = f"Write `lambda output, y: {name}(output.logits, y)`."
    if logits is not None:
        todo = f"{todo} The model's own loss is `'model'`."
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return InputError.of(
        "loss", f"{name}, which fails ({first[:200]})", f"the output is {came}, the target {labels}", todo
    )


def _shown(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@contextmanager
def one_row(call: str) -> Iterator[None]:
    """Run a model and its loss on one row alone, which a loss with `.squeeze()` may not take.

    Raises:
        InputError: It does not; the error of the model or the loss is its cause.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, JacopsError) or must_surface(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"{call}: the model with its loss fails on one sample alone ({type(error).__name__}: {first[:200]}), but "
            "losses of single samples are needed. `.squeeze()` drops the axis of a batch of one: write `.squeeze(1)`, "
            "or give output and target the same shape."
        ) from error
