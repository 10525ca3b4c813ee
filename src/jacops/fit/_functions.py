"""Plain functions of tensors as modules, which is how problems hold what they are fitted by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .._requirements import check_kind
from .._runtime.contexts import out_of_inference
from .._torch.protocol import bare, split_input
from ..errors import InputError, InputTypeError


class FunctionModule(nn.Module):
    """A plain function of tensors as a module: the tensors are its parameters."""

    def __init__(self, function: Callable[..., Any], params: Mapping[str, Tensor], keyword: bool) -> None:
        super().__init__()
        self.function, self.keyword, self.names = function, keyword, tuple(params)
        for name, value in params.items():
            self._parameters[name] = _leaf(value)  # pyright: ignore[reportArgumentType]

    def check_arguments(self, value: Any) -> None:
        """Refuse an input that the function cannot be called with beside its parameters.

        Raises:
            InputTypeError: There are too many arguments or too few; the message states how it would be called.
        """
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # of some builtins
            return
        args, kwargs = split_input(value)
        try:
            signature.bind(*args, **{n: n for n in self.names}, **kwargs) if self.keyword else signature.bind(
                *self.names, *args, **kwargs
            )
        except TypeError as error:
            one = len(self.names) == 1 and not self.keyword
            came = "one tensor" if one else f"{len(self.names)} tensors"
            called = f"f(*input, **params) with {', '.join(self.names)}" if self.keyword else "f(*params, *input)"
            needed = f"f{signature} is called as {called}, and that fails: {error}"
            todo = "Pass `params=` a list of tensors, one for each argument, or a dict by their names."
            raise InputTypeError.of("params", came, needed, todo) from None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function on the parameters and the input."""
        own = {name: self._parameters[name] for name in self.names}
        return self.function(*args, **own, **kwargs) if self.keyword else self.function(*own.values(), *args, **kwargs)


def called(model: nn.Module, values: Mapping[str, Tensor], value: Any) -> Any:
    """Return a model's output for other parameters, connected to them and to its input."""
    args, kwargs = split_input(value)
    if isinstance(model, FunctionModule):
        own = {name: values[name] for name in model.names}
        return (
            model.function(*args, **own, **kwargs) if model.keyword else model.function(*own.values(), *args, **kwargs)
        )
    module = bare(model)
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    return functional_call(module, {**buffers, **values}, args, kwargs)


def _leaf(value: Tensor) -> Tensor:
    value = out_of_inference(value).detach().clone()
    return nn.Parameter(value) if type(value) is Tensor else value.requires_grad_()


def function_module(function: Any, params: Any) -> FunctionModule:
    """Return a function and its tensors as a module.

    Raises:
        InputTypeError: `function` is not callable or `params` holds no tensors.
        InputError: `params` is empty.
    """
    if not callable(function):
        raise InputTypeError.of("model", f"a {type(function).__name__}", "a module or a function is needed")
    if params is None:
        todo = "Pass `params=` (a tensor, a list or a dict of tensors): the initial values."
        raise InputTypeError.of("params", "None", "a plain function needs the tensors it is to be solved for", todo)
    keyword = isinstance(params, Mapping)
    if isinstance(params, Tensor):
        named: dict[str, Any] = {"x": params}
    elif isinstance(params, Mapping):
        named = {str(name): value for name, value in params.items()}
    elif isinstance(params, list | tuple):
        named = {f"x[{i}]": value for i, value in enumerate(params)}
    else:
        raise InputTypeError.of("params", f"a {type(params).__name__}", "a tensor, list or dict is needed")
    if not named:
        raise InputError.of("params", "empty", "at least one tensor is needed")
    for name, value in named.items():
        label = f"params{name.removeprefix('x')}" if not keyword else f"params['{name}']"
        check_kind(label, value, Tensor, "a tensor is needed")
        if not value.is_floating_point():
            raise InputTypeError.of(label, f"of dtype {value.dtype}", "real floating-point numbers are needed")
    return FunctionModule(function, named, keyword)
