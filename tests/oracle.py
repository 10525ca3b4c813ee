"""Slow, plain derivatives in float64: what every answer of the library is compared with.

Nothing here is shared with the library and nothing is clever: a deep copy of the model, one call of it, and
`torch.autograd.grad` for one number of the output at a time. The caller's model is never run, and the random state is
put back, so that a call made next draws the very numbers that were drawn here.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Copier = Callable[[nn.Module], nn.Module]
Loss = Callable[[Any, Any], Tensor]
Blocks = list[list[Tensor]]  # [output][parameter], each (*output, *parameter)


# Trees: a tensor, or tuples, lists and mappings of them


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order; None holds no tensor."""
    if tree is None:
        return []
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, Mapping) else tree
    return [leaf for part in parts for leaf in leaves(part)]


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The tree in plain tuples, lists and dicts, with `function` of each tensor in its place."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: mapped(function, value) for key, value in tree.items()}
    return (list if isinstance(tree, list) else tuple)(mapped(function, part) for part in tree)


def called(model: Callable[..., Any], inputs: Any) -> Any:
    """The model's answer: a tuple holds positional arguments, a mapping keyword arguments, None no argument."""
    if inputs is None:
        return model()
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs)


def in_double(tensor: Tensor) -> Tensor:
    """A copy outside every graph; floating point becomes float64."""
    return tensor.detach().to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def alone(inputs: Any, sample: int) -> Any:
    """The inputs of one sample, as a batch of one."""
    return mapped(lambda tensor: tensor[sample : sample + 1], inputs)


@contextmanager
def same_draws() -> Iterator[None]:
    """Draw random numbers as the caller's next call would, and leave them undrawn."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        yield


# Rows of derivatives by plain autograd


def row(number: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of one number; zeros where it does not depend on a tensor."""
    if not number.requires_grad:
        return [torch.zeros_like(tensor) for tensor in wrt]
    found = torch.autograd.grad(number, wrt, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.to_dense() for g, t in zip(found, wrt, strict=True)]


def row_by_backward(number: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
    """The same through `.backward`, the only way through a re-entrant checkpoint."""
    for tensor in wrt:
        tensor.grad = None
    number.backward(retain_graph=True)
    return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone() for tensor in wrt]


def rows(output: Tensor, wrt: Sequence[Tensor], one_row: Callable[..., list[Tensor]] = row) -> list[Tensor]:
    """The Jacobians of one output, each (*output, *tensor)."""
    found = [one_row(number, wrt) for number in output.reshape(-1)]
    columns = [[line[i] for line in found] for i in range(len(wrt))]
    return [
        (torch.stack(column) if column else tensor.new_zeros(0)).reshape(*output.shape, *tensor.shape)
        for column, tensor in zip(columns, wrt, strict=True)
    ]


# First derivatives of a model


def input_jacobian(model: nn.Module, inputs: Any, copier: Copier = copy.deepcopy, by_backward: bool = False) -> Any:
    """The model in eval mode on a batch of one, per sample: (n, *out, *in), a tree like the outputs.

    With several inputs each leaf is a tree like the inputs, None at integer ones. Each sample starts from the model's
    present buffers and from the present random state.
    """
    count = len(leaves(inputs)[0])
    if count == 0:  # the shapes of a sample of zeros, without the sample
        one_zero = mapped(lambda tensor: tensor.new_zeros(1, *tensor.shape[1:]), inputs)
        return mapped(lambda jacobian: jacobian[:0], input_jacobian(model, one_zero, copier, by_backward))
    samples = [_sample_jacobian(model, alone(inputs, i), copier, by_backward) for i in range(count)]
    return _stacked(samples)


def _sample_jacobian(model: nn.Module, inputs: Any, copier: Copier, by_backward: bool) -> Any:
    with same_draws():
        twin = copier(model).double().eval()
        leaf = mapped(lambda tensor: in_double(tensor).requires_grad_(tensor.is_floating_point()), inputs)
        wrt = [tensor for tensor in leaves(leaf) if tensor.requires_grad]
        outputs = called(twin, mapped(torch.clone, leaf))  # clones, for a model that writes into its input
        return mapped(lambda output: _without_batch_axes(output, leaf, wrt, by_backward), outputs)


def _without_batch_axes(output: Tensor, leaf: Any, wrt: list[Tensor], by_backward: bool) -> Any:
    blocks = iter(rows(output, wrt, row_by_backward if by_backward else row))
    batched = output.ndim > 0 and output.shape[0] == 1
    out = output.shape[1:] if batched else output.shape
    return mapped(lambda tensor: next(blocks).reshape(*out, *tensor.shape[1:]) if tensor.requires_grad else None, leaf)


def _stacked(samples: list[Any]) -> Any:
    first = samples[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.stack(samples)
    if isinstance(first, Mapping):
        return {key: _stacked([sample[key] for sample in samples]) for key in first}
    return type(first)(_stacked([sample[i] for sample in samples]) for i in range(len(first)))


def parameter_jacobian(
    model: nn.Module, inputs: Any, copier: Copier = copy.deepcopy, by_backward: bool = False
) -> Blocks:
    """The function as it stands in its mode, by every parameter, frozen ones too, in `named_parameters` order."""
    with same_draws():
        twin = _trainable_twin(model, copier)
        outputs = leaves(called(twin, mapped(in_double, inputs)))
        wrt = list(twin.parameters())
        return [rows(output, wrt, row_by_backward if by_backward else row) for output in outputs]


def _trainable_twin(model: nn.Module, copier: Copier) -> nn.Module:
    twin = copier(model).double()
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    return twin


def jvp(blocks: Blocks, tangents: Sequence[Tensor]) -> list[Tensor]:
    """J v, one tensor per output."""
    return [sum(_times(block, v) for block, v in zip(line, tangents, strict=True)) for line in blocks]


def _times(block: Tensor, tangent: Tensor) -> Tensor:
    out = block.shape[: block.ndim - tangent.ndim]
    flat = block.reshape(out.numel(), tangent.numel())
    return (flat @ in_double(tangent).reshape(-1)).reshape(out)


def vjp(blocks: Blocks, cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Jᵀ u, one tensor per parameter."""
    return [
        sum(torch.tensordot(in_double(u), block, u.ndim) for u, block in zip(cotangents, column, strict=True))
        for column in zip(*blocks, strict=True)
    ]


# Derivatives of a loss by the trainable parameters


def gradient(
    model: nn.Module, loss: Loss, inputs: Any, y: Any, copier: Copier = copy.deepcopy, by_backward: bool = False
) -> Tensor:
    """The gradient of `loss(model(inputs), y)`, flat: (P,)."""
    with same_draws():
        twin = copier(model).double()
        number = loss(called(twin, mapped(in_double, inputs)), mapped(in_double, y))
        return _flat((row_by_backward if by_backward else row)(number, _trainable(twin)))


def hessian(model: nn.Module, loss: Loss, inputs: Any, y: Any, copier: Copier = copy.deepcopy) -> Tensor:
    """The second derivative of the loss by the parameters: (P, P)."""
    return second_derivatives(model, loss, inputs, y, copier)[0]


def mixed(model: nn.Module, loss: Loss, inputs: Any, y: Any, copier: Copier = copy.deepcopy) -> Tensor:
    """The derivative by the floating point inputs of the gradient by the parameters: (P, M)."""
    return second_derivatives(model, loss, inputs, y, copier)[1]


def second_derivatives(
    model: nn.Module, loss: Loss, inputs: Any, y: Any, copier: Copier = copy.deepcopy
) -> tuple[Tensor, Tensor]:
    """By parameters twice (P, P), and by parameters and inputs (P, M)."""
    with same_draws(), sdpa_kernel(SDPBackend.MATH), WeightNormInSteps():
        twin = copier(model).double()
        wrt = _trainable(twin)
        leaf = mapped(lambda tensor: in_double(tensor).requires_grad_(tensor.is_floating_point()), inputs)
        floats = [tensor for tensor in leaves(leaf) if tensor.requires_grad]
        number = loss(called(twin, mapped(torch.clone, leaf)), mapped(in_double, y))
        slopes = torch.autograd.grad(number, wrt, create_graph=True, allow_unused=True)
        slopes = [torch.zeros_like(t) if g is None else g.to_dense() for g, t in zip(slopes, wrt, strict=True)]
        lines = [row(slope, [*wrt, *floats]) for slope in _flat(slopes)]
    by_parameters = torch.stack([_flat(line[: len(wrt)]) for line in lines])
    by_inputs = torch.stack([_flat(line[len(wrt) :]) for line in lines]) if floats else by_parameters.new_zeros(0, 0)
    return by_parameters, by_inputs


class WeightNormInSteps(TorchFunctionMode):
    """Norms weights by elementary operations: the second derivative of torch's fused kernel is wrong (2.13)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._weight_norm:
            direction, size, axis = args
            return direction * (size / torch.norm_except_dim(direction, 2, axis))
        return func(*args, **(kwargs or {}))


def _trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


# Without any autograd: central differences, which the oracle itself is held to


def parameter_jacobian_by_differences(
    model: nn.Module, inputs: Any, copier: Copier = copy.deepcopy, step: float = 1e-5
) -> Blocks:
    """The same blocks from two calls per entry of each parameter; right to about 1e-8."""

    def moved(index: int, parameter: Tensor, entry: int) -> list[Tensor]:
        nudge = in_double(torch.zeros_like(parameter)).flatten()
        nudge[entry] = step
        above, below = (_nudged_call(model, inputs, copier, index, s * nudge) for s in (1, -1))
        return [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]

    def columns(index: int, parameter: Tensor) -> list[Tensor]:
        found = [moved(index, parameter, entry) for entry in range(parameter.numel())]
        return [
            torch.stack([change[i] for change in found], -1).reshape(*output.shape, *parameter.shape)
            if found
            else output.new_zeros(*output.shape, *parameter.shape)
            for i, output in enumerate(outputs)
        ]

    outputs = _nudged_call(model, inputs, copier, 0, None)
    by_parameter = [columns(index, parameter) for index, parameter in enumerate(model.parameters())]
    return [list(line) for line in zip(*by_parameter, strict=True)]


def _nudged_call(model: nn.Module, inputs: Any, copier: Copier, index: int, nudge: Tensor | None) -> list[Tensor]:
    """One call of a new copy with one parameter nudged, at the present random state."""
    with same_draws(), torch.no_grad():
        twin = copier(model).double()
        if nudge is not None:
            parameter = list(twin.parameters())[index]
            parameter += nudge.reshape(parameter.shape)
        return leaves(called(twin, mapped(in_double, inputs)))
