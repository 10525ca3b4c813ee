"""Derivatives of any order along a direction, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._finite import check_vector, is_finite
from .._keywords import keywords
from .._requirements import check_positive
from .._runtime.agreement import size
from .._runtime.contexts import eager
from .._torch.protocol import RECORDED, ConnectedModel, JacobianFunction, Samples, difference_step, nested
from ..errors import InputError
from ..space import Space
from ..trees import Selector, Tree, flatten
from ._alone import settled
from ._common import check_differences, check_finite, part_of, samples_of, tree_of
from ._evidence import Blocks, Nest, refuted, typical


@keywords()
@eager
def directional_derivative(
    model: nn.Module | Callable[..., Any],
    x: Any,
    v: Any,
    order: int = 1,
    batch_size: int = 1024,
    *,
    outputs: Selector = None,
    checks: str = "first",
    fallback: str = "warn",
    progress: bool | None = None,
) -> Any:
    r"""Return a derivative of any order along a direction for every sample, `(n, *out)`.

    It is $\frac{d^k}{dt^k} f(x_n + t v_n)$ at $t = 0$ of the model in eval mode on a batch of one: $J v$ for order 1,
    $v^\top H v$ for order 2, the third derivative contracted three times for order 3. One number per sample is
    differentiated, `order` times nested, so no tensor of higher order is formed; time and memory grow by a factor of
    two to four with every order.

    Args:
        model: As in `input_hessian`.
        x: As in `input_hessian`.
        v: Directions, one per sample, shaped like `x`; a tuple or dict like `x`, with None at integer entries.
        order: How often to differentiate, at least once.
        batch_size: Samples to a sweep.
        outputs: As in `input_hessian`.
        checks: As in `input_hessian`.
        fallback: As in `input_hessian`.
        progress: Force the progress bar on or off.

    Returns:
        A tensor shaped like the output, or the same structure of tensors.

    Raises:
        NotDifferentiableError: As in `input_hessian`; the symmetry of a Hessian cannot be seen here. From order 3 on
            also where torch gets a derivative wrong that its own tests do not cover, by central differences.
        InputTypeError: As in `input_hessian`, or `v` is of the wrong kind.
        InputError: As in `input_hessian`, or `v` does not match `x`, or `order` is not a positive whole number.
        NonFiniteError: `v` or a derivative is NaN or Inf.

    Example:
        >>> x, v = torch.tensor([[2.0], [1.0]]), torch.ones(2, 1)
        >>> directional_derivative(lambda x: x**4, x, v, order=3)
        tensor([[48.],
                [24.]])
    """
    check_positive("order", order)
    samples = samples_of("directional_derivative", model, x, batch_size, outputs, checks, fallback)
    blocks, tree = along(samples, _directions(samples, v), order, batch_size, progress)
    return tree.build(blocks)


def _directions(samples: Samples, v: Any) -> list[Tensor]:
    """Return `v` as one tensor per differentiable input, held against these."""
    given = flatten(v, "v")[0]
    if len(given) != len(samples.values):
        came = f"{len(given)} tensors"
        raise InputError.of("v", came, f"{len(samples.values)} are needed, in the structure of `x`")
    floats = [samples.values[i] for i in samples.inputs]
    names = [samples.input_tree.names[i] for i in samples.inputs]
    tensors = Space.of(floats, names).check([given[i] for i in samples.inputs], "v")
    check_vector(samples.call, "v", tensors)
    return [t.detach() for t in tensors]


def along(
    samples: Samples, directions: list[Tensor], order: int, batch_size: int, progress: bool | None
) -> tuple[list[Tensor], Tree]:
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
    lines, first = nested(function, x, samples, ("along", order), batch_size, progress)
    blocks = [row[0] for row in lines]
    check_finite(samples.call, first)
    if innermost is not None:
        nest = Nest(
            samples, moved, x, [torch.Size()], _rerun(x, moved), innermost, order, True, _step(samples, directions)
        )
        flaw = None if all(is_finite(b) for b in blocks) else "values are not finite"

        def disproved(grids: Blocks, rows: slice) -> str | None:
            return _against_differences(samples, directions, order, [g[0][0] for g in grids], rows)

        blocks = [g[0][0] for g in settled(nest, [[[b]] for b in blocks], batch_size, flaw, disproved)]
    check_finite(samples.call, blocks)
    functions: list[str] = getattr(function, "functions", [])
    if functions and samples.count:
        _check_against_lower(samples, directions, order, blocks, functions, batch_size)
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
        args = samples.input_tree.build(inputs)
        return forward(**args) if isinstance(args, dict) else forward(*(args if isinstance(args, tuple) else (args,)))

    return moved


def _rerun(
    x: tuple[Tensor, Tensor], moved: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> Callable[[slice, float], tuple[list[Tensor], list[Tensor]]]:
    """Return a function that records a forward over some samples, moved by a multiple of the rounding unit."""

    def rerun(rows: slice, units: float) -> tuple[list[Tensor], list[Tensor]]:
        t = (x[0][rows] + units * torch.finfo(x[0].dtype).eps).requires_grad_()
        return [t], list(moved(t, x[1][rows]))

    return rerun


def _check_against_lower(
    samples: Samples, directions: list[Tensor], order: int, blocks: list[Tensor], functions: list[str], batch_size: int
) -> None:
    """Hold derivatives along directions against central differences of those of one order less."""
    length = max(size(v) for v in directions) or 1.0

    def central(step: float) -> list[Tensor]:
        return _differences(samples, directions, order, step, batch_size)[0]

    step = difference_step([samples.values[i] for i in samples.inputs]) / length
    check_differences(samples.call, blocks, central, step, functions)


def _against_differences(
    samples: Samples, directions: list[Tensor], order: int, blocks: list[Tensor], where: slice
) -> str | None:
    """Return how derivatives of some samples differ from converged differences of those of one order less."""
    part, moves = part_of(samples, where, fallback="silent"), [v[where] for v in directions]
    step = _step(part, moves)
    near, slope = _differences(part, moves, order, step, RECORDED)
    far, _ = _differences(part, moves, order, 2 * step, RECORDED)
    return refuted([b[where] for b in blocks], near, far, slope * torch.finfo(moves[0].dtype).eps / step)


def _step(samples: Samples, directions: list[Tensor]) -> float:
    """Return a step along directions for central differences, by the sizes of the samples and of these."""
    eps = torch.finfo(directions[0].dtype).eps
    if not samples.count:
        return eps ** (1 / 3)
    return eps ** (1 / 3) * (typical([samples.values[i] for i in samples.inputs]) or 1.0) / (typical(directions) or 1.0)


def _differences(
    samples: Samples, directions: list[Tensor], order: int, step: float, batch_size: int
) -> tuple[list[Tensor], float]:
    """Return central differences of derivatives of one order less, and the size of these."""
    ahead, behind = (
        along(
            part_of(samples, slice(None), [sign * step * v for v in directions]),
            directions,
            order - 1,
            batch_size,
            False,
        )[0]
        for sign in (1, -1)
    )
    return [(f - b) / (2 * step) for f, b in zip(ahead, behind, strict=True)], typical(ahead)
