"""Laplacians by the input, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack, overload

import torch
from torch import Tensor, nn

from .._data import Unpack as Batching
from .._keywords import keywords
from .._loaders import by_batches
from .._options import InputDerivativeOptions
from .._runtime.contexts import eager, keeping
from .._torch.protocol import Samples, Shared
from .._trees import Selector, Tree
from .._words import Checks, Fallback
from ..errors import NotDifferentiableError
from ._common import matrices, output_entries, part_of
from ._directional import along
from ._hessian import hessians

_HESSIAN_ENTRIES = 2**24  # 128 MiB of Hessians in float64; beyond, only their diagonals are taken, axis by axis
_DIRECTION_ENTRIES = 2**22  # 32 MiB of copies of the samples and directions in float64


@overload
def laplacian(
    model: nn.Module | Callable[..., Any],
    x: Tensor,
    batch_size: int = 1024,
    **options: Unpack[InputDerivativeOptions],
) -> Tensor: ...
@overload
def laplacian(
    model: nn.Module | Callable[..., Any],
    x: Any,
    batch_size: int = 1024,
    **options: Unpack[InputDerivativeOptions],
) -> Any: ...
@keywords()
@by_batches("target")
@eager
def laplacian(
    model: nn.Module | Callable[..., Any],
    x: Any,
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
    r"""Return the Laplacian of a model's output by its input for every sample, `(n, *out)`.

    It is $\sum_j \partial^2 f(x_n) / \partial x_{nj}^2$, the trace of `input_hessian`, whose sweeps it shares, some
    samples at a time so that memory stays bounded. Where the Hessian of one sample alone is large, it sums second
    directional derivatives along the axes instead and forms none.

    Args:
        model: A module (its copy is put in eval mode), or a plain function.
        x: Samples along the first axis, `(n, *in)`; a tuple or mapping of such tensors, or a loader; with several
            inputs the sum goes over all of them.
        batch_size: Samples to a sweep, at most.
        outputs: Part of the output: indices along its last axis, an entry of a tuple or dict, or a callable.
        target: One output per sample: an integer tensor `(n,)` of places along the last axis.
        shared: Inputs without an axis of samples, by name or position.
        unpack: For a loader whose batches are no pairs: batch -> `(x, y)`.
        checks: `"first"`, `"always"`, `"strict"` or `"never"`: how often it is proved that samples do not mix.
        fallback: `"warn"`, `"silent"` or `"error"` when the fast route does not apply.
        progress: Force the progress bar on or off.
        create_graph: Keep the result differentiable by trainable parameters and by inputs that require grad; samples
            then go together, whatever memory their graphs take.

    Returns:
        A tensor shaped like the output, or the same structure of tensors.

    Raises:
        NotDifferentiableError: There is no second derivative, or torch's is wrong; the message names the cause.
        InputTypeError: `model` or `x` is of the wrong kind.
        InputError: `batch_size` is not a positive whole number, or `x` does not fit the model.
        NonFiniteError: A derivative is NaN or Inf.

    Example:
        >>> laplacian(lambda x: (x**3).sum(1), torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([18.,  6.])
    """
    options: dict[str, Any] = {"outputs": outputs, "target": target, "shared": shared, "create_graph": create_graph}
    options |= {"checks": checks, "fallback": fallback, "batch_size": batch_size}
    with keeping(create_graph):
        return _laplacian(Samples(model, x, call="laplacian", **options), progress)


def _laplacian(samples: Samples, progress: bool | None) -> Any:
    widths = [samples.values[i][:1].numel() for i in samples.inputs] if samples.count else [0]
    entries = output_entries(samples) * sum(widths) ** 2
    if entries > _HESSIAN_ENTRIES:
        return _by_axes(samples, progress)
    many = min(samples.batch_size, max(1, _HESSIAN_ENTRIES // max(entries, 1)))
    parts, tree = [], None
    for start in range(0, max(samples.count, 1), many):
        part = part_of(samples, slice(start, start + many), create_graph=samples.runner.create_graph)
        blocks, tree = hessians(part, progress)
        parts.append([_traces(rows, part) for rows in blocks])
    return _built([torch.cat(column) for column in zip(*parts, strict=True)], tree)


def _traces(rows: list[list[Tensor]], samples: Samples) -> Tensor:
    """Return the sum of the diagonals of one output's Hessians, `(n, *out)`."""
    total = None
    for position, index in enumerate(samples.inputs):
        leaf, block = samples.values[index], rows[position][position]
        out = block.shape[1 : block.ndim - 2 * (leaf.ndim - 1)]
        part = matrices(block, leaf, leaf).diagonal(dim1=2, dim2=3).sum(2).reshape(block.shape[0], *out)
        total = part if total is None else total + part
    if total is None:
        raise NotDifferentiableError.of("x", "without floating-point tensors", "there is nothing to go by")
    return total


def _by_axes(samples: Samples, progress: bool | None) -> Any:
    """Return the Laplacian as a sum of second derivatives along axes, some pairs of a sample and an axis at a time."""
    floats = [samples.values[i] for i in samples.inputs]
    widths = [value[:1].numel() for value in floats]
    axes, totals, tree = sum(widths), [], None
    together = max(1, min(samples.batch_size, _DIRECTION_ENTRIES // axes))
    for start in range(0, samples.count * axes, together):
        pairs = torch.arange(start, min(start + together, samples.count * axes))
        units = torch.nn.functional.one_hot(pairs % axes, axes).split(widths, 1)
        copied = part_of(samples, pairs // axes, create_graph=samples.runner.create_graph)
        directions = [unit.reshape(-1, *value.shape[1:]).to(value) for unit, value in zip(units, floats, strict=True)]
        blocks, tree = along(copied, directions, 2, progress)
        totals = totals or [block.new_zeros(samples.count, *block.shape[1:]) for block in blocks]
        for total, block in zip(totals, blocks, strict=True):
            total.index_add_(0, (pairs // axes).to(total.device), block)
    return _built(totals, tree)


def _built(tensors: list[Tensor], tree: Tree | None) -> Any:
    if tree is None:
        raise NotDifferentiableError.of("model", "not evaluated", "at least one sample must run")
    return tree.build(tensors)
