"""What derivatives by the input share: the samples asked about, and what an answer is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._finite import is_finite, where_first
from .._requirements import check_positive
from .._torch.protocol import ConnectedModel, Samples, disagreement, dropped
from ..errors import NonFiniteError, NotDifferentiableError
from ..trees import Selector, Tree


def samples_of(
    call: str, model: Any, x: Any, batch_size: int, outputs: Selector, checks: str, fallback: str
) -> Samples:
    check_positive("batch_size", batch_size)
    return Samples(model, x, call=call, outputs=outputs, checks=checks, fallback=fallback)


def part_of(
    samples: Samples, where: slice, shift: Sequence[Tensor] | None = None, fallback: str | None = None
) -> Samples:
    """Return some of the samples, moved by `shift` if there is one, with another `fallback` if there is one."""
    runner, values = samples.runner, [v[where] for v in samples.values]
    for index, change in zip(samples.inputs, shift or (), strict=shift is not None):
        values[index] = values[index] + change
    x = samples.input_tree.build(values)
    return Samples(
        runner.model,
        x,
        call=samples.call,
        outputs=runner.outputs,
        checks=samples.checks,
        fallback=fallback or samples.fallback,
    )


def output_entries(samples: Samples) -> int:
    """Return how many numbers the model gives for one sample."""
    one = [v[:1] if samples.count else v.new_zeros(1, *v.shape[1:]) for v in samples.values]
    return sum(output.numel() for output in samples.runner.run(one).lin.outputs)


def tree_of(forward: ConnectedModel) -> Tree:
    if forward.tree is None:
        raise NotDifferentiableError.of("model", "not evaluated", "at least one sample must run")
    return forward.tree


def check_finite(call: str, blocks: Sequence[Tensor]) -> None:
    for block in blocks:
        if not is_finite(block):
            raise NonFiniteError(f"{call}: in a derivative by the input, {where_first(block)} (first axis: sample).")


def check_differences(
    call: str,
    products: Sequence[Tensor],
    central: Callable[[float], Sequence[Tensor]],
    step: float,
    functions: list[str],
) -> None:
    """Refuse derivatives that differ from central differences of those of one order less.

    Raises:
        NotDifferentiableError: One differs by more than rounding and the step explain.
    """
    for index, (product, wide) in enumerate(zip(products, central(step), strict=True)):
        error = disagreement(product, wide, lambda shorter, index=index: central(shorter)[index], step)
        if error is not None:
            raise dropped(call, "the derivative and a central difference of the one before", error, functions)
