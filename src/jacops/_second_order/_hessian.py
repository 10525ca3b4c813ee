"""Hessians by the input, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Unpack, overload

import torch
from torch import Tensor, nn

from .._data import Unpack as Batching
from .._finite import is_finite
from .._keywords import keywords
from .._loaders import by_batches
from .._options import InputDerivativeOptions
from .._runtime.agreement import size, tolerance
from .._runtime.contexts import eager, keeping, private_noise
from .._runtime.rounding import rounding_error
from .._runtime.rows import rows_size
from .._torch.protocol import ConnectedModel, JacobianFunction, Samples, Shared, asymmetric, nested
from .._trees import Selector, Tree
from .._words import Checks, Fallback
from ._alone import settled
from ._common import Blocks, check_finite, detached, flat, matrices, tree_of
from ._differences import Differences
from ._evidence import Nest

_WORST = 4  # samples whose rounding is measured, alone: an operation that is wrong shows where it is most wrong


@overload
def input_hessian(
    model: nn.Module | Callable[..., Any],
    x: Tensor,
    batch_size: int = 1024,
    **options: Unpack[InputDerivativeOptions],
) -> Tensor: ...
@overload
def input_hessian(
    model: nn.Module | Callable[..., Any],
    x: Any,
    batch_size: int = 1024,
    **options: Unpack[InputDerivativeOptions],
) -> Any: ...
@keywords()
@by_batches("target")
@eager
def input_hessian(
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
    r"""Return the Hessian of a model's output by its input for every sample, `(n, *out, *in, *in)`.

    It is $\partial^2 f(x_n) / \partial x_n^2$ of the model in eval mode on a batch of one. Where samples are proved to
    be independent they share sweeps, min(inputs, outputs · inputs) of them over the graph of the Jacobian; otherwise
    every sample is computed alone and a `JacopsWarning` states why. The result is checked for symmetry and, with custom
    autograd Functions in the graph, against a central difference of Jacobians, since torch does not detect a second
    derivative that a backward drops. Unless all operations are known to have backwards that are linear in their
    cotangent, every call compares the result with the derivative of one random mixture of the outputs, taken alone;
    where they disagree (`logcumsumexp`), every output is differentiated alone. Piecewise linear models have zeros.

    Args:
        model: A module (its copy is put in eval mode), or a plain function.
        x: Samples along the first axis, `(n, *in)`; or a tuple (positional) or mapping (keyword) of such tensors, or
            a loader, as in `compute_jacobian`.
        batch_size: Samples to a sweep.
        outputs: Part of the output, as in `compute_jacobian`. One number of a wide output saves as much memory.
        target: One output per sample, as in `compute_jacobian`.
        shared: Inputs without an axis of samples, as in `compute_jacobian`.
        unpack: For a loader, as in `compute_jacobian`.
        checks: `"first"`, `"always"`, `"strict"` or `"never"`: how often it is proved that samples do not mix; the
            comparison with a mixture is made in every call but with `"never"`.
        fallback: `"warn"`, `"silent"` or `"error"` where samples or outputs must be taken one at a time.
        progress: Force the progress bar on or off.
        create_graph: Keep the result differentiable by trainable parameters and by inputs that require grad.

    Returns:
        A tensor with the dtype of the output. A tuple or dict of outputs gives the same structure of Hessians; a
        tuple or dict of inputs that structure twice inside, `H[output][input][input]`, with None at integer entries.

    Raises:
        NotDifferentiableError: There is no second derivative, or torch's is wrong; the message names the cause.
        InputTypeError: `model` or `x` is of the wrong kind.
        InputError: `batch_size` is not a positive whole number, or `x` does not fit the model.
        NonFiniteError: A derivative is NaN or Inf.

    Example:
        >>> input_hessian(lambda x: x[:, 0] ** 2 * x[:, 1], torch.tensor([[1.0, 3.0]]))
        tensor([[[6., 2.],
                 [2., 0.]]])
    """
    options: dict[str, Any] = {"outputs": outputs, "target": target, "shared": shared, "create_graph": create_graph}
    options |= {"checks": checks, "fallback": fallback, "batch_size": batch_size}
    with keeping(create_graph):
        samples = Samples(model, x, call="input_hessian", **options)
        blocks, tree = hessians(samples, progress)
        return tree.build([samples.arranged([samples.arranged(row) for row in rows]) for rows in blocks])


def hessians(samples: Samples, progress: bool | None) -> tuple[Blocks, Tree]:
    """Return `H[output][input][input]`, each `(n, *out, *in, *in)`, and the structure of the outputs."""
    forward = ConnectedModel(samples)
    slopes = JacobianFunction(forward, samples.call)
    x = samples.values
    lines, first = nested(slopes, x, samples, "hessian", progress)
    many = len(samples.inputs)
    blocks = [lines[start : start + many] for start in range(0, len(lines), many)]
    check_finite(samples.call, first)
    flaw = _flaw(samples, detached(blocks)) if all(map(is_finite, flat(blocks))) else "values are not finite"
    shapes = [samples.values[i].shape[1:] for i in samples.inputs]
    nest = Nest(samples, forward, x, shapes, _rerun(samples, forward), slopes, 2, False)
    differences = Differences(
        samples,
        lambda rows: _unit_noise(samples, rows),
        lambda grids, rows, noise: _products(samples, grids, rows, noise),
        lambda moved, _: [block for row in moved.jacobians(False).blocks for block in row],
    )
    blocks = settled(nest, blocks, flaw, differences)
    found = detached(blocks)
    check_finite(samples.call, flat(found))
    gap = _asymmetry(samples, found)
    if gap is not None:
        raise asymmetric(samples.call, gap, slopes.functions)
    differences.check(found, slopes.functions)
    return blocks, tree_of(forward)


def _rerun(samples: Samples, forward: ConnectedModel) -> Callable[[slice, float], tuple[list[Tensor], list[Tensor]]]:
    """Return a function that records a forward over some samples, moved by a multiple of the rounding unit."""

    def rerun(rows: slice, units: float) -> tuple[list[Tensor], list[Tensor]]:
        values = [v[rows].detach() for v in samples.values]
        for i in samples.inputs:
            unit = units * torch.finfo(values[i].dtype).eps
            values[i] = (values[i] * (1 + unit * private_noise(values[i], seed=i))).requires_grad_()
        return [values[i] for i in samples.inputs], list(forward(*values))

    return rerun


def _asymmetry(samples: Samples, blocks: Blocks) -> float | None:
    """Return how far Hessians are from symmetric, relative to their size; None where rounding explains it."""
    for output, rows in enumerate(blocks):
        gaps, sizes = _gaps(samples, rows)
        distance, whole = float(gaps.norm()), float(sizes.norm())
        if distance > tolerance([rows[0][0].dtype]) * whole and not _is_rounding(samples, rows, output, gaps):
            return distance / whole
    return None


def _flaw(samples: Samples, blocks: Blocks) -> str | None:
    gap = _asymmetry(samples, blocks)
    return None if gap is None else f"the second derivative that torch gives is not symmetric (off by {gap:.1e})"


def _gaps(samples: Samples, rows: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
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
    """Return whether the Hessians of the least symmetric samples hold rounding errors of that size."""
    for worst in gaps.topk(min(_WORST, len(gaps))).indices.tolist():
        where = slice(worst, worst + 1)
        one = samples.over([v[where] for v in samples.values], checks="never", fallback="warn")
        found = [block[where] for row in rows for block in row]
        if not float(gaps[worst]) <= rounding_error(lambda one=one: _alone(one, output), found):
            return False
    return True


def _alone(samples: Samples, output: int) -> list[Tensor]:
    lines, _ = nested(
        JacobianFunction(ConnectedModel(samples), samples.call),
        samples.values,
        samples,
        "rounding",
        False,
    )
    many = len(samples.inputs)
    return [block for row in lines[output * many : (output + 1) * many] for block in row]


def _unit_noise(samples: Samples, where: slice) -> list[Tensor]:
    """Return a random direction for each of some samples, of length one on the average."""
    noise = [private_noise(samples.values[i][where], seed=j) for j, i in enumerate(samples.inputs)]
    length = math.sqrt(sum(size(v) ** 2 for v in noise) / max(1, noise[0].shape[0]))
    return [v / length for v in noise]


def _products(samples: Samples, blocks: Blocks, where: slice, noise: list[Tensor]) -> list[Tensor]:
    """Return Hessians times a direction, `(m, out, in)` per output and input."""
    leaves, result = [samples.values[i] for i in samples.inputs], []
    for rows in blocks:
        for a, left in enumerate(leaves):
            parts = [
                (matrices(rows[a][b], left, right)[where] @ noise[b].reshape(noise[b].shape[0], 1, -1, 1)).squeeze(3)
                for b, right in enumerate(leaves)
            ]
            result.append(sum(parts[1:], parts[0]))
    return result
