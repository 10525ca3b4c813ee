"""Derivatives of any order along a direction, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack, overload

import torch
from torch import Tensor, nn

from .._data import Unpack as Batching
from .._finite import check_vector, is_finite
from .._keywords import keywords
from .._loaders import by_batches
from .._options import InputDerivativeOptions
from .._requirements import check_positive
from .._runtime.contexts import eager, keeping
from .._space import Space
from .._torch.protocol import ConnectedModel, JacobianFunction, Samples, Shared, nested
from .._trees import Selector, Tree, flatten
from .._words import Checks, Fallback
from ..errors import InputError
from ._alone import settled
from ._common import check_finite, detached, tree_of
from ._differences import Differences, length_of_step
from ._evidence import Nest


@overload
def directional_derivative(
    model: nn.Module | Callable[..., Any],
    x: Tensor,
    v: Tensor,
    order: int = 1,
    batch_size: int = 1024,
    **options: Unpack[InputDerivativeOptions],
) -> Tensor: ...
@overload
def directional_derivative(
    model: nn.Module | Callable[..., Any],
    x: Any,
    v: Any,
    order: int = 1,
    batch_size: int = 1024,
    **options: Unpack[InputDerivativeOptions],
) -> Any: ...
@keywords()
@by_batches("target", "v")
@eager
def directional_derivative(
    model: nn.Module | Callable[..., Any],
    x: Any,
    v: Any,
    order: int = 1,
    batch_size: int = 1024,
    *,
    outputs: Selector = None,
    target: Tensor | None = None,
    shared: Shared = None,
    unpack: Batching | None = None,
    checks: Checks = "first",
    fallback: Fallback = "warn",
    progress: bool | None = None,
    create_graph: bool = False,
) -> Any:
    r"""Return a derivative of any order along a direction for every sample, `(n, *out)`.

    It is $\frac{d^k}{dt^k} f(x_n + t v_n)$ at $t = 0$ of the model in eval mode on a batch of one: $J v$ for order 1,
    $v^\top H v$ for order 2, the third derivative contracted three times for order 3. One number per sample is
    differentiated, `order` times nested, so no tensor of higher order is formed; time and memory grow by a factor of
    two to four with every order.

    Args:
        model: A module (its copy is put in eval mode), or a plain function.
        x: Samples along the first axis, `(n, *in)`; a tuple or mapping of such tensors, or a loader.
        v: Directions, one per sample, shaped like `x`; a tuple or dict like `x`, with None at integer entries.
        order: How often to differentiate, at least once.
        batch_size: Samples to a sweep.
        outputs: Part of the output: indices along its last axis, an entry of a tuple or dict, or a callable.
        target: One output per sample: an integer tensor `(n,)` of places along the last axis.
        shared: Inputs without an axis of samples, by name or position.
        unpack: For a loader whose batches are no pairs: batch -> `(x, y)`.
        checks: `"first"`, `"always"`, `"strict"` or `"never"`: how often it is proved that samples do not mix.
        fallback: `"warn"`, `"silent"` or `"error"` when the fast route does not apply.
        progress: Force the progress bar on or off.
        create_graph: Keep the result differentiable by trainable parameters and by inputs that require grad; the result
            is differentiable by `v` too.

    Returns:
        A tensor shaped like the output, or the same structure of tensors.

    Raises:
        NotDifferentiableError: There is no derivative of that order; the message names the cause; the symmetry of a
            Hessian is not checked. From order 3 on also where central differences show that torch's derivative is
            wrong.
        InputTypeError: `model` or `x` is of the wrong kind, or `v` is of the wrong kind.
        InputError: `batch_size` is not a positive whole number, or `v` does not match `x`, or `order` is not a positive
            whole number.
        NonFiniteError: `v` or a derivative is NaN or Inf.

    Example:
        >>> x, v = torch.tensor([[2.0], [1.0]]), torch.ones(2, 1)
        >>> directional_derivative(lambda x: x**4, x, v, order=3)
        tensor([[48.],
                [24.]])
    """
    check_positive("order", order)
    options: dict[str, Any] = {"outputs": outputs, "target": target, "shared": shared, "create_graph": create_graph}
    options |= {"checks": checks, "fallback": fallback, "batch_size": batch_size}
    with keeping(create_graph):
        samples = Samples(model, x, call="directional_derivative", **options)
        blocks, tree = along(samples, _directions(samples, v), order, progress)
        return tree.build(blocks)


def _directions(samples: Samples, v: Any) -> list[Tensor]:
    """Return `v` as one tensor per differentiable input, with shapes and dtypes checked."""
    given, many = samples.input_tree.free(flatten(v, "v")[0]), len(samples.input_tree.names)
    if len(given) != many:
        raise InputError.of("v", f"{len(given)} tensors", f"{many} are needed, in the structure of `x`")
    floats = [samples.values[i] for i in samples.inputs]
    names = [samples.input_tree.names[i] for i in samples.inputs]
    tensors = Space.of(floats, names).check([given[i] for i in samples.inputs], "v")
    check_vector(samples.call, "v", tensors)
    return list(tensors) if samples.runner.create_graph else [t.detach() for t in tensors]


def along(samples: Samples, directions: list[Tensor], order: int, progress: bool | None) -> tuple[list[Tensor], Tree]:
    """Return the derivative of every output along directions, `(n, *out)`, and the structure of the outputs.

    The one number that is differentiated is `t` of every sample, so that nothing larger than an output is formed.
    """
    forward = ConnectedModel(samples)
    moved = _moved(samples, forward, directions)
    function: Callable[..., Any] = moved
    innermost: JacobianFunction | None = None
    for _ in range(order - 1):
        function = JacobianFunction(function, samples.call)
        innermost = innermost or function
    like = samples.values[samples.inputs[0]]
    x = (like.new_zeros(samples.count), torch.arange(samples.count, device=like.device))
    lines, first = nested(function, x, samples, ("along", order), progress)
    blocks = [row[0] for row in lines]
    check_finite(samples.call, first)
    differences = Differences(
        samples,
        lambda rows: [v[rows].detach() for v in directions],
        lambda grids, rows, _: [grid[0][0][rows].detach() for grid in grids],
        lambda part, moves: along(part, moves, order - 1, False)[0],
    )
    grids = [[[block]] for block in blocks]
    if innermost is not None:
        step = length_of_step(samples, directions)
        nest = Nest(samples, moved, x, [torch.Size()], _rerun(x, moved), innermost, order, True, step)
        flaw = None if all(is_finite(b) for b in blocks) else "values are not finite"
        grids = settled(nest, grids, flaw, differences)
        blocks = [grid[0][0] for grid in grids]
    check_finite(samples.call, blocks)
    differences.check(detached(grids), getattr(function, "functions", []))
    return blocks, tree_of(forward)


def _moved(
    samples: Samples, forward: ConnectedModel, directions: list[Tensor]
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """Return the model as a function of steps along directions, one per sample, and of the samples' numbers."""
    moving = dict(zip(samples.inputs, directions, strict=True))
    values = samples.values if samples.count else [v.new_zeros(1, *v.shape[1:]) for v in samples.values]
    moving = moving if samples.count else {i: torch.zeros_like(values[i]) for i in moving}

    def moved(t: Tensor, which: Tensor) -> tuple[Tensor, ...]:
        inputs = []
        for index, value in enumerate(values):
            rows = value[which.to(value.device)]
            if index in moving:
                step = t.to(rows).view(-1, *[1] * (rows.ndim - 1))
                rows = rows + step * moving[index][which.to(value.device)]
            inputs.append(rows)
        return forward(*inputs)

    return moved


def _rerun(
    x: tuple[Tensor, Tensor], moved: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> Callable[[slice, float], tuple[list[Tensor], list[Tensor]]]:
    """Return a function that records a forward over some samples, moved by a multiple of the rounding unit."""

    def rerun(rows: slice, units: float) -> tuple[list[Tensor], list[Tensor]]:
        t = (x[0][rows] + units * torch.finfo(x[0].dtype).eps).requires_grad_()
        return [t], list(moved(t, x[1][rows]))

    return rerun
