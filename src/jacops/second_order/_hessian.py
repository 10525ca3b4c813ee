"""Hessians by the input, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._backends._torch.agreement import size, tolerance
from .._backends._torch.rounding import rounding_error
from .._backends._torch.rows import rows_size
from .._backends._torch.samples.batch import Samples
from .._backends._torch.samples.nested import Forward, Slopes, nested
from .._backends._torch.surroundings import eager, private_noise
from .._backends._torch.twice import asymmetric, difference_step
from .._keywords import keywords
from ..trees import Selector, Tree
from ._common import check_differences, check_finite, part_of, samples_of, tree_of

_WORST = 4  # samples whose rounding is measured, alone: an operation that is wrong shows where it is most wrong


@keywords()
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
    for output, rows in enumerate(blocks):
        gaps, sizes = _asymmetry(samples, rows)
        distance, whole = float(gaps.norm()), float(sizes.norm())
        if distance > tolerance([rows[0][0].dtype]) * whole and not _is_rounding(samples, rows, output, gaps):
            raise asymmetric(samples.call, distance / whole, functions)


def _asymmetry(samples: Samples, rows: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the distance of one output's Hessians from their transposes and their size, `(n,)` each."""
    leaves = [samples.values[i] for i in samples.inputs]
    gaps, sizes = [], []
    for a, left in enumerate(leaves):
        for b, right in enumerate(leaves[: a + 1]):
            one, other = matrices(rows[a][b], left, right), matrices(rows[b][a], right, left)
            gaps.append(rows_size(one - other.mT))
            sizes.append(rows_size(one))
    return torch.stack(gaps).norm(dim=0), torch.stack(sizes).norm(dim=0)


def _is_rounding(samples: Samples, rows: list[list[Tensor]], output: int, gaps: Tensor) -> bool:
    """Say whether the Hessians of the least symmetric samples hold rounding errors of that size."""
    for worst in gaps.topk(min(_WORST, len(gaps))).indices.tolist():
        where = slice(worst, worst + 1)
        x = [v[where] for v in samples.values]
        one = Samples(samples.runner.model, samples.input_tree.build(x), call=samples.call, checks="never")
        one.runner = replace(one.runner, outputs=samples.runner.outputs)
        found = [block[where] for row in rows for block in row]
        if not float(gaps[worst]) <= rounding_error(lambda one=one: _alone(one, output), found):
            return False
    return True


def _alone(samples: Samples, output: int) -> list[Tensor]:
    lines, _ = nested(
        Slopes(Forward(samples), samples.call), samples.input_tree.build(samples.values), samples, "rounding", 1, False
    )
    many = len(samples.inputs)
    return [block for row in lines[output * many : (output + 1) * many] for block in row]


def _check_against_jacobians(
    samples: Samples, blocks: list[list[list[Tensor]]], functions: list[str], batch_size: int
) -> None:
    """Compare Hessians along a random direction with central differences of Jacobians."""
    leaves = [samples.values[i] for i in samples.inputs]
    noise = [private_noise(leaf, seed=i) for i, leaf in enumerate(leaves)]
    length = math.hypot(*map(size, noise)) or 1.0
    noise = [v / length for v in noise]
    products = []
    for rows in blocks:
        for a, left in enumerate(leaves):
            parts = [
                (matrices(rows[a][b], left, right) @ noise[b].reshape(samples.count, 1, -1, 1)).squeeze(3)
                for b, right in enumerate(leaves)
            ]
            products.append(sum(parts[1:], parts[0]))

    def jacobians(shift: float) -> list[Tensor]:
        moved = part_of(samples, slice(None), [shift * v for v in noise]).jacobians(batch_size, False).blocks
        return [block for row in moved for block in row]

    def central(step: float) -> list[Tensor]:
        ends = zip(jacobians(step), jacobians(-step), products, strict=True)
        return [((ahead - behind) / (2 * step)).reshape(product.shape) for ahead, behind, product in ends]

    check_differences(samples.call, products, central, difference_step(leaves), functions)
