"""What comes in: parameters of a closure and inputs of a model, checked and copied."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..._requirements import check_choice, check_dense
from ..._runtime.contexts import out_of_inference
from ..._trees import Tree, flatten, is_differentiable, is_dtensor
from ..._words import Fallback
from ...errors import InputError, InputTypeError, JacopsError, ModelStateError
from .structure import SHARDED_CALLS


def check_fallback(fallback: str) -> str:
    """Return `fallback` if it is one of the known words.

    Raises:
        InputError: It is not.
    """
    return check_choice("fallback", fallback, Fallback)


def check_params(params: Any, empty: bool = False, spread: bool = False) -> list[Tensor]:
    """Return `params` as a list: one tensor, or any iterable of tensors, read once; DTensors if they may be `spread`.

    Raises:
        InputTypeError: An entry is not a tensor.
        InputError: There are none where `empty` does not allow it, or an entry is repeated, frozen, sparse or
            sharded.
    """
    try:
        leaves = (
            [params] if isinstance(params, Tensor) else list(params.values() if isinstance(params, Mapping) else params)
        )
    except TypeError:
        came = f"a {type(params).__name__}"
        raise InputTypeError.of("params", came, "a tensor or an iterable of tensors is needed") from None
    if not leaves and not empty:
        todo = "A generator such as `model.parameters()` can be read once; pass a list to use it again."
        raise InputError.of("params", "empty", "at least one tensor is needed", todo)
    seen: dict[int, int] = {}
    for i, leaf in enumerate(leaves):
        name = f"params[{i}]"
        if not isinstance(leaf, Tensor):
            raise InputTypeError.of(name, f"a {type(leaf).__name__}", "a tensor is needed")
        if is_dtensor(leaf) and not spread:
            todo = f"{SHARDED_CALLS} take DTensors."
            raise InputError.of(name, "a DTensor", "this call needs whole parameters", todo)
        if id(leaf) in seen:
            raise InputError.of(name, f"the same tensor as params[{seen[id(leaf)]}]", "each may be given once")
        if not leaf.requires_grad:
            todo = "Call `.requires_grad_()` on it before the function uses it, leave it out, or use the model_* calls."
            if leaf.is_inference():
                todo = "Make it outside torch.inference_mode(), or use the calls that take the model."
            came = f"a tensor {tuple(leaf.shape)} that does not require grad"
            raise InputError.of(name, came, "its uses must be recorded", todo)
        check_dense(name, leaf)
        seen[id(leaf)] = i
    return leaves


def split_input(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: a tuple or a mapping is unpacked, None is no argument."""
    if isinstance(value, Tensor):
        return (value,), {}
    if value is None:
        return (), {}
    if isinstance(value, tuple):
        return value, {}
    if isinstance(value, Mapping):
        return (), dict(value)
    return (value,), {}


def private_inputs(
    values: Sequence[Any], tree: Tree, connected: bool = False, fixed: bool = False
) -> tuple[Any, list[tuple[str, Tensor]]]:
    """Return a copy of the inputs, and the leaves in it that have derivatives; none where they are held `fixed`.

    Leaves are used through a clone, so that a forward may write into its input. With `connected`, the leaf of an input
    of the caller's that requires grad is a view of it, which only the forward's uses pass through. What the tree holds
    is copied too, and is no leaf.
    """
    leaves: list[tuple[str, Tensor]] = []
    copies = []
    for name, item in zip(tree.names, values, strict=True):
        if not isinstance(item, Tensor):
            copies.append(item)
            continue
        item = out_of_inference(item)
        if fixed or not is_differentiable(item):
            copies.append(item.detach().clone() if item.layout is torch.strided else item)
            continue
        leaf = item.view_as(item) if connected and item.requires_grad else item.detach().requires_grad_()
        leaves.append((name, leaf))
        copies.append(leaf.clone())
    held = tree.map_held(lambda part: _copied(part, connected)) if tree.held else tree
    return held.build(copies), leaves


def _copied(value: Any, connected: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = out_of_inference(value)
    value = value if connected else value.detach()
    return value.clone() if value.layout is torch.strided else value


class ForwardExplained:
    """A context that describes what does not fit when a forward fails because of a dtype, a device or a fixed shape.

    Args:
        module: What is run.
        tensors: Its input.

    Raises:
        InputError: An input has another dtype or device than the weights; torch's own error is its cause.
        ModelStateError: An exported module was requested another batch size than it was exported with.
    """

    def __init__(self, module: Any, tensors: Sequence[Tensor]) -> None:
        self._module, self._tensors = module, tensors

    def __enter__(self) -> None:
        """Nothing is changed."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError | AssertionError):
            self._explain(error)

    def _explain(self, error: Exception) -> None:
        module = self._module
        if (
            isinstance(module, nn.Module)
            and _FIXED_SHAPE.match(str(error))
            and any(map(_is_exported, module.modules()))
        ):
            came = f"exported for fixed shapes ({str(error).splitlines()[0][:120]})"
            needed = "samples are taken in batches of other sizes, down to one"
            todo = "Export it with `dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)`, or pass the original module."
            raise ModelStateError.of("model", came, needed, todo) from error
        params = module.parameters() if isinstance(module, nn.Module) else iter(())
        weight = next((p for p in params if p.is_floating_point()), None)
        if weight is None or isinstance(error, JacopsError | AssertionError):
            return
        for tensor in self._tensors:
            if tensor.device != weight.device:
                todo = f"Call `.to('{weight.device}')` on one of them."
                needed = f"the model is on {weight.device}"
                raise InputError.of("input", f"on {tensor.device}", needed, todo) from error
            if tensor.dtype != weight.dtype and (tensor.is_floating_point() or "dtype" in str(error)):
                todo = "Cast one of them; nothing is cast silently."
                needed = f"the model is of {weight.dtype}"
                raise InputError.of("input", f"of {tensor.dtype}", needed, todo) from error


# The beginnings of torch.export's messages that refuse a shape: the guards of `ExportedProgram.module()`, and what it
# and `torch.export.unflatten` check before the first operation.
_FIXED_SHAPE = re.compile(r"Guard failed: .*size\(\)|Expected input at .*shape\[")


def _is_exported(module: nn.Module) -> bool:
    return isinstance(module, torch.fx.GraphModule) or type(module).__module__.startswith("torch.export")


def advice_for(value: Any) -> str:
    """Return how something that is no tensor becomes one."""
    if isinstance(value, DataLoader):
        return "Pass the input of one batch; calls by samples and `Problem` take the loader."
    if isinstance(value, Dataset):
        return "Pass `DataLoader(dataset, batch_size=...)` where samples are taken, else the input of one batch."
    if isinstance(value, nn.Module):
        return "The model is the first argument."
    if hasattr(value, "to_numpy"):  # pandas
        return "Convert it with torch.as_tensor(x.to_numpy().copy())."
    if isinstance(value, np.ndarray):
        return "Convert it with torch.as_tensor(x.copy())."
    return "Convert it with torch.as_tensor(x)." if isinstance(value, list) else ""


def input_leaves(value: Any) -> tuple[list[Any], Tree]:
    """Return the leaves of a model's input and its structure.

    Raises:
        InputError: There is a DTensor.
        InputTypeError: There is a NumPy array or a bare number, or it is a loader; the message names it.
    """
    if type(value) is Tensor:
        return flatten(value, "input")
    if isinstance(value, DataLoader | Dataset):
        raise InputTypeError.of("input", f"a {type(value).__name__}", "one batch is needed", advice_for(value))
    leaves, tree = flatten(value, "input")
    for leaf, name in zip(leaves, tree.names, strict=True):
        if is_dtensor(leaf):
            raise InputError.of(name, "a DTensor", "this rank's tensor is needed", "Pass its `full_tensor()`.")
        if isinstance(leaf, np.ndarray) or (isinstance(value, list) and isinstance(leaf, int | float)):
            came = "an array" if isinstance(leaf, np.ndarray) else "a number in a list"
            came = f"{came} ({type(leaf).__name__})"
            raise InputTypeError.of(name, came, "a tensor is needed", "Convert it with torch.as_tensor(array.copy()).")
    return leaves, tree
