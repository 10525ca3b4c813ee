"""Hessians by the input, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._backends._torch.agreement import size, tolerance
from .._backends._torch.samples.batch import Samples
from .._backends._torch.samples.nested import Forward, Slopes, nested
from .._backends._torch.surroundings import eager, private_noise
from ..errors import NotDifferentiableError
from ..trees import Selector, Tree
from ._common import check_agreement, check_finite, part_of, samples_of, tree_of


@eager
def input_hessian(
    model: nn.Module | Callable[..., Any],
    x: Any,
    batch_size: int = 1024,
    *,
    outputs: Selector = None,
    checks: str = "first",
    fallback: str = "warn",
    progress: bool | None = None,
) -> Any:
    r"""Return the Hessian of a model's output by its input for every sample, `(n, *out, *in, *in)`.

    It is $\partial^2 f(x_n) / \partial x_n^2$ of the model in eval mode on a batch of one. Where samples provably do
    not mix they share sweeps, min(inputs, outputs · inputs) of them over the graph of the Jacobian; otherwise every
    sample is taken alone and a `JacopsWarning` says why. The result is held to be symmetric; with custom autograd
    Functions in the graph also to agree with a central difference of Jacobians, since torch does not notice a second
    derivative that a backward drops. Piecewise linear models have zeros.

    Args:
        model: A module (its copy is put in eval mode), or a plain function.
        x: Samples along the first axis, `(n, *in)`; or a tuple (positional) or dict (keyword) of such tensors.
        batch_size: Samples to a sweep.
        outputs: Part of the output, as in `compute_jacobian`. One number of a wide output saves as much memory.
        checks: As in `compute_jacobian`.
        fallback: `"warn"`, `"silent"` or `"error"` where samples must be taken one at a time.
        progress: Force the progress bar on or off.

    Returns:
        A tensor with the dtype of the output. A tuple or dict of outputs gives the same structure of Hessians; a
        tuple or dict of inputs that structure twice inside, `H[output][input][input]`, with None at integer entries.

    Raises:
        NotDifferentiableError: There is no second derivative, or torch gets it wrong; the message names the cause.
        InputTypeError: `model` or `x` is of the wrong kind.
        InputError: `batch_size` is not a positive whole number, or `x` does not fit the model.
        NonFiniteError: A derivative is NaN or Inf.

    Example:
        >>> input_hessian(lambda x: x[:, 0] ** 2 * x[:, 1], torch.tensor([[1.0, 3.0]]))
        tensor([[[6., 2.],
                 [2., 0.]]])
    """
    samples = samples_of("input_hessian", model, x, batch_size, outputs, checks, fallback)
    blocks, tree = hessians(samples, batch_size, progress)
    return tree.build([_arranged(samples, [_arranged(samples, row) for row in rows]) for rows in blocks])


def hessians(samples: Samples, batch_size: int, progress: bool | None) -> tuple[list[list[list[Tensor]]], Tree]:
    """Return `H[output][input][input]`, each `(n, *out, *in, *in)`, and the structure of the outputs."""
    forward = Forward(samples)
    slopes = Slopes(forward, samples.call)
    x = samples.input_tree.build(samples.values)
    lines, first = nested(slopes, x, samples, "hessian", batch_size, progress)
    many = len(samples.inputs)
    blocks = [lines[start : start + many] for start in range(0, len(lines), many)]
    check_finite(samples.call, [*first, *(b for rows in blocks for row in rows for b in row)])
    _check_symmetric(samples, blocks, slopes.functions)
    if slopes.functions and samples.count:
        _check_against_jacobians(samples, blocks, slopes.functions, batch_size)
    return blocks, tree_of(forward)


def _arranged(samples: Samples, blocks: Sequence[Any]) -> Any:
    leaves: list[Any] = [None] * len(samples.values)
    for index, block in zip(samples.inputs, blocks, strict=True):
        leaves[index] = block
    return samples.input_tree.build(leaves)


def matrices(block: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return a block `(n, *out, *a, *b)` as matrices `(n, out, a, b)`."""
    a, b = left.shape[1:].numel(), right.shape[1:].numel()
    inner = left.ndim + right.ndim - 2
    out = block.shape[1 : block.ndim - inner].numel()
    return block.reshape(block.shape[0], out, a, b)


def _check_symmetric(samples: Samples, blocks: list[list[list[Tensor]]], functions: list[str]) -> None:
    leaves = [samples.values[i] for i in samples.inputs]
    for rows in blocks:
        distance = whole = 0.0
        for a, left in enumerate(leaves):
            for b, right in enumerate(leaves[: a + 1]):
                one, other = matrices(rows[a][b], left, right), matrices(rows[b][a], right, left)
                distance, whole = distance + size(one - other.mT) ** 2, whole + size(one) ** 2
        if distance > tolerance([rows[0][0].dtype]) ** 2 * whole:
            suspects = f", perhaps of the custom Function {', '.join(functions)}" if functions else ""
            raise NotDifferentiableError(
                f"{samples.call}: the second derivative that torch gives is not symmetric (off by "
                f"{math.sqrt(distance / whole):.1e}), so it is wrong for some operation of this model{suspects}. Write "
                "that operation out with elementary ones."
            )


def _check_against_jacobians(
    samples: Samples, blocks: list[list[list[Tensor]]], functions: list[str], batch_size: int
) -> None:
    """Hold Hessians along a random direction against a central difference of Jacobians."""
    leaves = [samples.values[i] for i in samples.inputs]
    noise = [private_noise(leaf, seed=i) for i, leaf in enumerate(leaves)]
    length = math.sqrt(sum(size(v) ** 2 for v in noise) / samples.count)
    noise = [v / length for v in noise]
    step = torch.finfo(leaves[0].dtype).eps ** (1 / 3)
    ahead, behind = (
        part_of(samples, slice(None), [sign * step * v for v in noise]).jacobians(batch_size, False).blocks
        for sign in (1, -1)
    )
    for rows, front, back in zip(blocks, ahead, behind, strict=True):
        for a, left in enumerate(leaves):
            products = [
                (matrices(rows[a][b], left, right) @ noise[b].reshape(samples.count, 1, -1, 1)).squeeze(3)
                for b, right in enumerate(leaves)
            ]
            difference = ((front[a] - back[a]) / (2 * step)).reshape(products[0].shape)
            check_agreement(samples.call, sum(products[1:], products[0]), difference, functions)
