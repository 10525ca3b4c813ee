"""Jacobians times vectors: what does the output do if the parameters move so, and the other way round.

`func()` takes no argument and closes over `params`; it is called once, and whatever was recorded before the call
counts too. `J v` costs one forward and two backward sweeps, whatever the size of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

from torch import Tensor

from ._finite import check_finite, check_vector
from ._framework import recorded
from ._keywords import keywords
from ._ladder.protocol import is_framework_model
from ._options import Model
from ._runtime.contexts import arithmetic, eager, out_of_inference
from ._runtime.restoring import restoring
from ._runtime.rows import owned
from ._runtime.side_effects import storage_of
from ._sharded import closure_jvp, closure_vjp, sharded_closure, sharded_jvp, sharded_vjp
from ._torch.protocol import Recording, is_sharded, record_closure
from ._trees import leaves_for
from ._words import Fallback
from .errors import ModelStateError, warn

Params = Tensor | Iterable[Tensor]
Vectors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@overload
def jvp(
    func: Callable[[], Tensor], params: Params, v: Vectors, create_graph: bool = False, *, fallback: Fallback = "warn"
) -> Tensor: ...
@overload
def jvp(
    func: Callable[[], Any], params: Params, v: Vectors, create_graph: bool = False, *, fallback: Fallback = "warn"
) -> Any: ...
@keywords()
@eager
def jvp(
    func: Callable[[], Any], params: Params, v: Vectors, create_graph: bool = False, *, fallback: Fallback = "warn"
) -> Any:
    r"""Return $J v$, what a change `v` of the parameters does to the output, shaped like `func()`.

    $J v$ is the derivative of $J^\top u$ with respect to $u$ (Griewank and Walther, 2008): one forward and two
    backward sweeps. Functions without a second derivative rule go row by row, with a warning. For complex parameters
    it is the change of the output itself, $\mathrm{Re}(\bar g v)$ for a real output with gradient $g$.

    Args:
        func: Called once, without arguments; returns a tensor or a tree of tensors.
        params: One tensor or any iterable of tensors that `func` uses; those it does not use count as zero.
        v: One tensor per parameter, of its shape, dtype and device (a single tensor for a single parameter).
        create_graph: Keep the result differentiable, to any order.
        fallback: `"warn"`, `"silent"` or `"error"` when the fast route does not apply.

    Returns:
        A tensor shaped like `func()`, or the same tree; detached unless `create_graph`.

    Raises:
        InputError: `v` does not match `params` in count, shape, dtype or device, or a parameter is repeated or frozen.
        InputTypeError: An argument is of the wrong kind.
        NotDifferentiableError: The output has no derivative, or the fast route fails and `fallback="error"`.
        NonFiniteError: `v` or the result holds NaN or Inf.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> jvp(lambda: torch.stack([x[0] ** 2, 3 * x[1] ** 2]), [x], torch.tensor([0.5, -1.0]))
        tensor([  1., -12.])
    """
    params, sharded = sharded_closure(params)
    if sharded:
        return closure_jvp(func, params, v, create_graph)
    return _push(record_closure(func, params, "jvp", fallback), v, create_graph, batch=False)


@overload
def batch_jvp(
    func: Callable[[], Tensor], params: Params, vs: Vectors, create_graph: bool = False, *, fallback: Fallback = "warn"
) -> Tensor: ...
@overload
def batch_jvp(
    func: Callable[[], Any], params: Params, vs: Vectors, create_graph: bool = False, *, fallback: Fallback = "warn"
) -> Any: ...
@keywords()
@eager
def batch_jvp(
    func: Callable[[], Any], params: Params, vs: Vectors, create_graph: bool = False, *, fallback: Fallback = "warn"
) -> Any:
    """Return $J v$ for a batch of directions, `(B, *out)`, all at one linearisation point.

    Args:
        func: A function without arguments that returns a tensor or a tree of tensors, called once for the whole batch.
        params: One tensor or any iterable of tensors that `func` uses.
        vs: Per parameter a tensor `(B, *param)`.
        create_graph: Keep the result differentiable, to any order.
        fallback: `"warn"`, `"silent"` or `"error"` when the fast route does not apply.

    Returns:
        A tensor `(B, *out)`, or the same tree of such.

    Raises:
        InputError: Vectors do not match in count, shape, dtype or device, or a parameter is repeated or frozen; also if
            the tensors of `vs` differ in `B`.
        NonFiniteError: A vector or the result holds NaN or Inf.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> batch_jvp(lambda: x**2, [x], torch.eye(2))
        tensor([[2., 0.],
                [0., 4.]])
    """
    return _push(record_closure(func, params, "batch_jvp", fallback), vs, create_graph, batch=True)


@overload
def vjp(func: Callable[[], Any], params: Tensor, v: Any, create_graph: bool = False) -> Tensor: ...
@overload
def vjp(
    func: Callable[[], Any], params: Iterable[Tensor], v: Any, create_graph: bool = False
) -> Tensor | list[Tensor]: ...
@keywords()
@eager
def vjp(func: Callable[[], Any], params: Params, v: Any, create_graph: bool = False) -> Tensor | list[Tensor]:
    r"""Return $J^\top v$, the gradient of $\langle v, \mathrm{func}() \rangle$.

    For complex outputs this is what `torch.autograd.grad` returns for the cotangent `v`.

    Args:
        func: A function without arguments that returns a tensor or a tree of tensors.
        params: One tensor or any iterable of tensors that `func` uses.
        v: A tensor like the output in shape, dtype and device (for a tree: the same tree, or a list of its leaves).
        create_graph: Keep the result differentiable, to any order.

    Returns:
        A tensor for one parameter, else a list of tensors, each shaped like its parameter.

    Raises:
        InputError: `v` does not match the output; it is never reshaped.
        NonFiniteError: `v` or the result holds NaN or Inf.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> vjp(lambda: torch.stack([x[0] ** 2, 3 * x[1] ** 2]), [x], torch.tensor([0.5, -1.0]))
        tensor([  1., -12.])
    """
    params, sharded = sharded_closure(params)
    if sharded:
        grads = closure_vjp(func, params, v, create_graph)
    else:
        grads = _pull(record_closure(func, params, "vjp"), v, create_graph, batch=False)
    return grads[0] if len(grads) == 1 else grads


@keywords()
@eager
def batch_vjp(func: Callable[[], Any], params: Params, vs: Any, create_graph: bool = False) -> list[Tensor]:
    r"""Return $J^\top v$ for a batch of cotangents: always a list, `(B, *param)` each.

    Args:
        func: A function without arguments that returns a tensor or a tree of tensors, called once for the whole batch.
        params: One tensor or any iterable of tensors that `func` uses.
        vs: A tensor `(B, *out)`, or a tree of such.
        create_graph: Keep the result differentiable, to any order.

    Returns:
        One tensor `(B, *param)` per parameter.

    Raises:
        InputError: `vs` does not match the output.
        NonFiniteError: `vs` or the result holds NaN or Inf.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> batch_vjp(lambda: x**2, [x], torch.eye(2))
        [tensor([[2., 0.],
                [0., 4.]])]
    """
    return _pull(record_closure(func, params, "batch_vjp"), vs, create_graph, batch=True)


@overload
def model_jvp(
    model: Model, x: Tensor, v: Vectors, create_graph: bool = False, *, fallback: Fallback = "warn"
) -> Tensor: ...
@overload
def model_jvp(model: Model, x: Any, v: Vectors, create_graph: bool = False, *, fallback: Fallback = "warn") -> Any: ...
@keywords()
@eager
def model_jvp(model: Model, x: Any, v: Vectors, create_graph: bool = False, *, fallback: Fallback = "warn") -> Any:
    """Return $J v$ of a model's output by all its parameters, `list(model.parameters())`, frozen ones too.

    The model is run once on private copies of its state: nothing of it changes, whatever its mode.

    Args:
        model: A module, or a `JaxFunction`. Its parameters may be sharded (docs/sharded.md).
        x: Its input: a tuple is unpacked into positional arguments, a mapping into keyword arguments.
        v: One tensor per parameter, in order (or a dict by name; a single tensor for a single parameter).
        create_graph: Keep the result differentiable, also by the model's own trainable parameters.
        fallback: `"warn"`, `"silent"` or `"error"` when the fast route does not apply.

    Returns:
        A tensor shaped like the output, or the same tree.

    Raises:
        ModelStateError: The model has no parameters, or its state makes the question ill-posed.
        InputError: Vectors do not match in count, shape, dtype or device, or a parameter is repeated or frozen.
        NonFiniteError: A vector or the result holds NaN or Inf.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model_jvp(model, torch.tensor([[1.0, 2.0]]), torch.ones(1, 2))
        tensor([[3.]])
    """
    if is_sharded(model):
        return sharded_jvp(model, x, v, "model_jvp", create_graph)
    return _push(_recorded(model, x, "model_jvp", create_graph, fallback), v, create_graph, batch=False)


@keywords()
@eager
def model_vjp(model: Model, x: Any, v: Any, create_graph: bool = False) -> Tensor | list[Tensor]:
    r"""Return $J^\top v$ of a model's output by all its parameters.

    Args:
        model: A module.
        x: Its input: a tuple is unpacked into positional arguments, a mapping into keyword arguments.
        v: A tensor like the output in shape, dtype and device (for a tree: the same tree, or a list of its leaves).
        create_graph: Keep the result differentiable, to any order.

    Returns:
        A tensor for one parameter, else a list in the order of `model.parameters()`.

    Raises:
        ModelStateError: The model has no parameters, or its state makes the question ill-posed.
        InputError: Vectors do not match in count, shape, dtype or device, or a parameter is repeated or frozen.
        NonFiniteError: A vector or the result holds NaN or Inf.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model_vjp(model, torch.tensor([[1.0, 2.0]]), torch.ones(1, 1))
        tensor([[1., 2.]])
    """
    if is_sharded(model):
        grads = sharded_vjp(model, x, v, "model_vjp", create_graph)
    else:
        grads = _pull(_recorded(model, x, "model_vjp", create_graph, "warn"), v, create_graph, batch=False)
    return grads[0] if len(grads) == 1 else grads


def _recorded(model: Model, x: Any, call: str, create_graph: bool, fallback: Fallback) -> Recording:
    found = recorded(model, x, call=call, parameters=lambda *_: True, fallback=fallback, connected=create_graph)
    if is_framework_model(model):
        return found
    integers = [n for n, p in model.named_parameters() if not (p.is_floating_point() or p.is_complex())]
    if integers:
        raise ModelStateError.of(integers[0], "an integer parameter", "only floating-point parameters have derivatives")
    return found


@restoring
def _push(found: Recording, v: Vectors, create_graph: bool, batch: bool) -> Any:
    lin = found.lin
    vectors = [out_of_inference(t) for t in lin.domain.check(v, "vs" if batch else "v", batch=batch)]
    check_vector(lin.call, "vs" if batch else "v", vectors)
    warn_if_unconnected(found)
    with arithmetic(create_graph):
        rows = lin.push_rows(vectors if batch else [t.unsqueeze(0) for t in vectors], create_graph)
        check_finite(lin.call, rows, lin.codomain.names, lin)
        return found.tree.build(_handed_out(rows, vectors, create_graph, batch))


@restoring
def _pull(found: Recording, v: Any, create_graph: bool, batch: bool) -> list[Tensor]:
    lin, name = found.lin, "vs" if batch else "v"
    v = leaves_for(v, found.tree, name)
    vectors = [out_of_inference(t) for t in lin.codomain.check(v, name, batch=batch)]
    check_vector(lin.call, name, vectors)
    warn_if_unconnected(found)
    with arithmetic(create_graph):
        rows = lin.pull_rows(vectors if batch else [t.unsqueeze(0) for t in vectors], create_graph)
        check_finite(lin.call, rows, lin.domain.names, lin)
        return _handed_out(rows, vectors, create_graph, batch)


def _handed_out(rows: Sequence[Tensor], vectors: Sequence[Tensor], create_graph: bool, batch: bool) -> list[Tensor]:
    results = [given(row if batch else row[0], create_graph) for row in rows]
    taken = set(map(storage_of, vectors))
    return results if create_graph else [owned(result, taken) for result in results]


def given(result: Tensor, create_graph: bool) -> Tensor:
    """Return a result as it is given out: with its graph where that was requested, else without."""
    return result if create_graph else result.detach()


def warn_if_unconnected(found: Recording) -> None:
    """Warn once if no path leads from the output to any parameter: zeros are the derivative, and rarely the wish."""
    lin = found.lin
    if lin.domain.dim and not lin.is_connected():
        warn(
            f"{lin.call}: no path leads from the output to any of {lin.domain.layout}; the derivative is "
            "zero everywhere."
        )
