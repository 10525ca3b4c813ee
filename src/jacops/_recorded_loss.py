"""Recording a loss by the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from torch import Tensor, nn

from ._framework import refuse_options
from ._ladder.protocol import Linearized, Picked, is_framework_model
from ._options import CurvatureOptions, LocatedOptions, LossOptions
from ._picks import differentiated, picked, trainable, variable
from ._runtime.contexts import arithmetic, out_of_inference
from ._runtime.restoring import restoring
from ._torch.protocol import At, Linearization, ModelRun, Recording, call_loss, record_at_outputs, record_further
from ._trees import flatten
from .errors import InputError, InputTypeError, NotDifferentiableError

Loss = Callable[[Any, Any], Tensor]


def located(model: Any, options: Mapping[str, Any]) -> LocatedOptions:
    """Return the options of `hessian`, `ggn` or `fisher`, with what is differentiated as `parameters`, None for inputs.

    Raises:
        InputError: They contradict each other.
    """
    wrt, at = options.get("wrt", "parameters"), options.get("at")
    if is_framework_model(model):
        refuse_options(at=at)
    rest = {name: value for name, value in options.items() if name not in ("wrt", "parameters", "at")}
    picks = differentiated(variable(model, wrt, options.get("parameters")))
    check_source(picks, at)
    return {**rest, "parameters": picks, **({} if at is None else {"at": at})}  # pyright: ignore[reportReturnType]


def check_source(picks: Picked | None, at: At) -> None:
    """Refuse to differentiate by parameters from a hidden layer on.

    Raises:
        InputError: That is requested.
    """
    if picks is not None and (at[0] if isinstance(at, tuple) else at) is not None:
        todo = "Pass `wrt='inputs'`, or a pair `(None, target)`."
        raise InputError.of("at", repr(at), "a source other than the input cuts the parameters before it off", todo)


def resolved(model: Any, options: Mapping[str, Any]) -> CurvatureOptions:
    """Return the options of a public call, with a function of name and parameter as `parameters`."""
    return {**options, "parameters": picked(model, options.get("parameters"))}  # pyright: ignore[reportReturnType]


def check_real(lin: Linearized) -> None:
    """Refuse leaves and outputs that are complex.

    Raises:
        NotDifferentiableError: One is.
    """
    made = [output.dtype for output in lin.outputs] or lin.codomain.dtypes
    if not any([dtype.is_complex for dtype in {*lin.domain.dtypes, *made}]):
        return
    for space in (lin.domain, lin.codomain):
        for name, dtype in zip(space.names, space.dtypes, strict=True):
            if dtype.is_complex:
                todo = "Use torch.view_as_real, or the calls that return tensors (modjac, jvp)."
                raise NotDifferentiableError.of(name, f"of dtype {dtype}", "operators are real", todo)


def check_usable(lin: Linearization, what: str = "", todo: str = "") -> None:
    """Refuse what is complex, or does not depend on anything it is differentiated by.

    Args:
        lin: The linearization.
        what: How to call its outputs, by default by their names.
        todo: What the caller can do.

    Raises:
        NotDifferentiableError: An output or a leaf is complex, or no path leads from any output to any leaf.
    """
    check_real(lin)
    if not lin.is_connected():
        raise NotDifferentiableError(
            f"{lin.call}: no path leads from {what or lin.codomain.layout} to any of {lin.domain.layout}; the "
            f"derivative is zero everywhere.{todo}"
        )


def record_loss(model: Any, loss: Loss, x: Any, y: Any, call: str, **options: Unpack[LossOptions]) -> Recording:
    """Record the loss of one batch by the parameters that are requested.

    Raises:
        InputTypeError: `loss` is not callable or does not return a tensor.
        InputError: The loss is not one number.
    """
    options.setdefault("parameters", trainable)
    y = recordable(y, kept=options.get("kept", False))
    found = ModelRun(model, x, call=call, finish=loss_of_output(loss, y), purpose=loss, **options).recorded()
    return _connected(found, call)


def check_loss(loss: Any) -> None:
    """Refuse what is no loss.

    Raises:
        InputTypeError: It is not callable, or the class of one.
    """
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        came, todo = f"the class {loss.__name__}", f"Did you mean {loss.__name__}()?"
        raise InputTypeError.of("loss", came, "a callable `loss(output, y)` is needed", todo)
    if not callable(loss):
        came = repr(loss) if isinstance(loss, str) else f"a {type(loss).__name__}"
        todo = "`Problem` and influence take 'model' too, for a model's own loss." if isinstance(loss, str) else ""
        raise InputTypeError.of("loss", came, "a callable `loss(output, y)` is needed", todo)


def record_loss_of(found: Recording, loss: Loss, y: Any, call: str) -> Recording:
    """Record the loss of a recorded output, as `record_loss` does, without running the model again."""
    y = recordable(y, kept=True)
    return _connected(record_further(found, loss_of_output(loss, y), loss, call), call)


def loss_of_output(loss: Loss, y: Any) -> Callable[[Any], Tensor]:
    """Return a loss as a function of the output, held to be one number.

    Raises:
        InputTypeError: It is no loss.
    """
    check_loss(loss)
    return lambda output: _checked(call_loss(loss, output, y))


@dataclass(frozen=True, eq=False)
class LossOf:
    """A loss with a target.

    Attributes:
        loss: `loss(output, y)`, one number.
        y: The target.
        record: Records it at an output of a torch model, for a call, where it may be recorded already.
    """

    loss: Any
    y: Any
    record: Callable[[Any, Any, str], Recording] | None = None


class LossAt:
    """The loss recorded at a batch's recorded output, kept until it is used again, and the loss of one sample."""

    def __init__(self) -> None:
        self._kept: list[tuple[Any, Any, Any, int | None, Recording]] = []
        self._sample: tuple[Any, Any, int | None, Recording] | None = None

    @restoring
    def of(self, found: Recording, loss: Loss, y: Any, call: str, kept: bool) -> Recording:
        """Return the recording, with `kept` for the next to ask too, where a write into the target would show."""
        version = _version(y)
        for output, other, target, before, at in (self._kept.pop() for _ in self._kept[:]):
            if output is found and other is loss and target is y and before == version:
                return at
        at = record_at_outputs(found, loss_of_output(loss, recordable(y, False)), loss, call)
        if kept and version is not None:
            self._kept.append((found, loss, y, version, at))
        return at

    def sample(self, found: Recording | None, y: Any, record: Callable[[], Recording]) -> Recording:
        """Return the recorded loss of a sample, the same one while the batch's recording and its target stay."""
        version = _version(y)
        if self._sample is not None and found is not None and version is not None:
            output, target, before, sample = self._sample
            if output is found and target is y and before == version:
                return sample
        sample = record()
        self._sample = (found, y, version, sample)
        return sample

    def bind(self, found: Recording) -> Recording:
        """Return a batch's recording; a sample that was recorded shortly before it belongs to it."""
        if self._sample is not None and self._sample[0] is None:
            self._sample = (found, *self._sample[1:])
        return found


def _version(y: Any) -> int | None:
    return y._version if isinstance(y, Tensor) and not y.is_inference() else None


def _connected(found: Recording, call: str) -> Recording:
    """Return a recorded loss.

    Raises:
        NotDifferentiableError: No path leads from it to a parameter, or something is complex.
    """
    check_real(found.lin)
    if not found.lin.is_connected():
        raise NotDifferentiableError(
            f"{call}: no path leads from the loss to any of the parameters {found.lin.domain.layout}; its "
            "derivative is "
            "zero everywhere."
        )
    return found


def recordable(y: Any, kept: bool) -> Any:
    """Return a target whose tensors may take part in a recorded computation, copied where that is kept."""
    if isinstance(y, Tensor) and not kept:  # the usual case, which needs no tree
        return out_of_inference(y)
    return _recordable(y, kept)


@restoring
def _recordable(y: Any, kept: bool) -> Any:
    leaves, tree = flatten(y, "y")
    with arithmetic(True):
        plain = [out_of_inference(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree.build([leaf.clone() if kept and isinstance(leaf, Tensor) else leaf for leaf in plain])


def _checked(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        came, todo = f"a {type(value).__name__}", "Drop `.item()` and `float()` from it."
        if value is None:  # what a model's output has where the model was given no labels
            todo = "Make it of the output and the target, or pass `'model'` for the model's own loss."
        raise NotDifferentiableError.of("the loss", came, "a tensor with a graph is needed", todo)
    if value.ndim > 0:
        todo = "Take its mean or sum (`reduction='mean'`), or `.squeeze()` it."
        raise InputError.of("the loss", f"of shape {tuple(value.shape)}", "one number, shape (), is needed", todo)
    if not value.is_floating_point():
        todo = "Take scores rather than labels or counts."
        came = f"of dtype {value.dtype}"
        raise NotDifferentiableError.of("the loss", came, "a floating-point number is needed", todo)
    return value
