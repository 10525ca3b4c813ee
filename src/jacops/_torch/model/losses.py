"""Calling a loss just as the user wrote it, without letting the target broadcast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
            _refuse_broadcast(func.__name__, [*args, *kwargs.values()])
        return func(*args, **kwargs)


_ELEMENTWISE_LOSSES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_ELEMENTWISE = frozenset(loss.__name__ for loss in _ELEMENTWISE_LOSSES)


def _refuse_broadcast(name: str, values: Sequence[Any]) -> None:
    """Refuse an output and a target of different shapes, the first two tensors that an elementwise loss was given.

    Raises:
        InputError: They are.
    """
    shapes = [tuple(t.shape) for t in values if isinstance(t, Tensor)][:2]
    if len(set(shapes)) > 1:
        came = f"of shape {shapes[1]}"
        needed = f"the model's output has shape {shapes[0]} and the loss ({name}) is elementwise"
        todo = ", e.g. `y.unsqueeze(-1)`" if len(shapes[1]) < len(shapes[0]) else ""
        raise InputError.of("y", came, needed, f"Give both the same shape{todo}.")


@restoring
def _unbroadcast(loss: Callable[[Any, Any], Any], output: Any, target: Any) -> Any:
    """Return what a user's own loss gives, whose calls of torch's losses go through a mode."""
    with _NoBroadcast():
        return loss(output, target)


def call_loss(loss: Callable[[Any, Any], Any], output: Any, target: Any) -> Any:
    """Return `loss(output, target)`.

    Raises:
        InputError: The target would broadcast against the output, or a loss of torch's takes no such output or target:
            this one, or one that it calls.
    """
    known = torch_loss(loss)
    try:
        if known is None:
            return _unbroadcast(loss, output, target)
        if known in _ELEMENTWISE:
            _refuse_broadcast(known, (output, target))
        return loss(output, target)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, JacopsError) or must_surface(error):
            raise
        name = known or _failing(error)
        if name is None:
            error.add_note(f"{_named(loss)} was given an output {_shown(output)}, a target {_shown(target)}.")
            raise
        raise _misfit(loss, name, output, target, error) from error


def _failing(error: Exception) -> str | None:
    """Return the function of `torch.nn.functional` that raised an error, None where none did."""
    found, trace = None, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        found = code.co_name if code.co_filename == F.__file__ else found
        trace = trace.tb_next
    return found


def _misfit(loss: Any, name: str, output: Any, target: Any, error: Exception) -> InputError:
    """Return the error for a loss of torch's, or one that calls it, that fails on a model's output and a target."""
    logits = None if isinstance(output, Tensor) else getattr(output, "logits", None)
    of, direct = "output" if logits is None else "output.logits", torch_loss(loss) is not None
    scores = output if logits is None else logits
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    todo = "Write a `loss(output, y)` that passes both in the shapes that it requires."
    if "out of bounds" in first:
        todo = "Labels are numbers of classes, from 0 to one less than there are scores; -100 is ignored."
    elif name in ("cross_entropy", "nll_loss") and (getattr(scores, "ndim", 0), getattr(target, "ndim", 0)) == (3, 2):
        todo = (
            f"It takes classes as the second axis: write `lambda output, y: {name}({of}.flatten(0, 1), y.flatten())`, "
            f"or `{of}[:, :-1]` and `y[:, 1:]` in it where each token predicts the next."
        )
    elif logits is not None and direct:
        todo = f"Write `lambda output, y: {name}(output.logits, y)`."
    elif not direct and isinstance(scores, Tensor) and scores.ndim and len(scores) == 1:
        todo = f"It is one sample alone, whose axis `.squeeze()` drops: write `.squeeze(1)`. {todo}"
    if logits is not None and direct:
        todo = f"{todo} The model's own loss is `'model'`."
    came = f"{name}, which fails ({first[:200]})" if direct else f"{_named(loss)}, where {name} fails ({first[:200]})"
    shapes = f"the output is {_shown(output)}{'' if logits is None else f', its logits {_shown(logits)}'}"
    return InputError.of("loss", came, f"{shapes}, the target {_shown(target)}", todo)


def _named(loss: Any) -> str:
    own = getattr(loss, "name", None) or getattr(loss, "__qualname__", type(loss).__qualname__)
    return str(own).rpartition(".")[2]


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
