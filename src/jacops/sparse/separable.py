"""Do samples mix? Index sets with one member a sample, and masks that leave no room for doubt at this point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from .._keywords import keywords
from .._recorded_loss import check_usable
from .._runtime.contexts import private_noise
from .._runtime.restoring import restoring
from .._runtime.rows import plain
from .._torch.protocol import Linearization, ModelRun, by_digits
from .._trees import Selector
from ..errors import InputError
from ._taint import Outside
from ._trace import CannotFollowError
from .detect import trace

_NAMED = 5  # pairs that a message can name


@dataclass(frozen=True)
class Separation:
    """Whether the output of each sample depends on that sample alone; has a truth value.

    Attributes:
        apart: Whether it does, by the recorded graph.
        mixed: Pairs `(output sample, input sample)` that depend on each other, the first few.
        unknown: Operations without a rule, which count as mixing their inputs, and reads of values into Python.
        sweeps: Backward passes taken.
    """

    apart: bool
    mixed: tuple[tuple[int, int], ...] = ()
    unknown: dict[str, int] = field(default_factory=dict)
    sweeps: int = 1

    def __bool__(self) -> bool:
        return self.apart


@keywords()
@restoring
def samples_independent(
    model: nn.Module | Callable[..., Any],
    x: Any,
    *,
    outputs: Selector = None,
    training: bool | None = None,
    strict: bool = False,
) -> Separation:
    """Return whether sample i of the output depends on sample i of the input alone, by the recorded graph.

    One backward pass is traced with a set per sample, which includes every dependence in the graph, however small, also
    those that are zero at this point: zeros of inputs, parameters, buffers and of whatever is computed from them do not
    count as zeros, and conditions and indices computed from them may take any value. Only constants made in the forward
    pass (`torch.eye`, `torch.tril`, `torch.arange`) count as always zero. A model that reads values into Python may
    take another branch elsewhere, and is never reported as independent.

    With `strict`, `2 ceil(log2 n)` more backward passes with random cotangents on half of the samples must leave the
    gradient of the other half exactly zero; every ordered pair of samples is separated by one of them. Neither test
    detects the effect of detached batch statistics on values: compare outputs of single samples with outputs of the
    batch for that.

    Args:
        model: A module, or a function `f(x)`.
        x: Samples along the first axis; a tuple is positional arguments, a mapping keywords.
        outputs: Part of the output, as in `jacobian`.
        training: A mode for all modules, None for their own.
        strict: Test with masked cotangents, too.

    Returns:
        A `Separation` with the pairs of dependent samples that were found.

    Raises:
        InputError: An input or output has another number of samples along its first axis.
        NotDifferentiableError: No path leads from the output to the input.

    Example:
        >>> bool(samples_independent(torch.nn.LayerNorm(3), torch.randn(4, 3)))
        True
        >>> samples_independent(torch.nn.BatchNorm1d(3), torch.randn(4, 3)).mixed[0]
        (0, 1)
    """
    with Outside() as taint:
        run = ModelRun(model, x, call="samples_independent", parameters=None, outputs=outputs, training=training)
        found = run.recorded()
    lin = found.lin
    check_usable(lin)
    if taint.read_out:
        return Separation(False, (), {"reading a value": 1}, 0)
    many = _count(lin)
    members = np.concatenate([np.repeat(np.arange(many), size // max(many, 1)) for size in lin.codomain.sizes])
    try:
        traced = trace(lin, members, many, taint)
    except CannotFollowError as reason:
        return Separation(False, (), {str(reason): 1})
    pairs: list[tuple[int, int]] = []
    for ids in traced.ids:
        samples = np.repeat(np.arange(many), ids.size // max(many, 1))
        reached = traced.pool.matrix(ids.ravel()).tocoo()
        off = reached.col != samples[reached.row]
        pairs += zip(reached.col[off].tolist(), samples[reached.row][off].tolist(), strict=True)
    if pairs:
        return Separation(False, tuple(sorted(set(pairs))[:_NAMED]), traced.unknown)
    if not strict:
        return Separation(True, (), traced.unknown)
    return _masked(lin, many, traced.unknown)


def _count(lin: Linearization) -> int:
    many = lin.leaves[0].shape[0] if lin.leaves[0].ndim else 0
    for space in (lin.domain, lin.codomain):
        for name, shape in zip(space.names, space.shapes, strict=True):
            if not shape or shape[0] != many:
                needed = f"{many} samples along its first axis are needed"
                raise InputError.of(name, f"of shape {tuple(shape)}", needed)
    return many


def _masked(lin: Linearization, many: int, unknown: dict[str, int]) -> Separation:
    sweeps = 1
    for on in by_digits(many):
        seeds = [_only(plain(o.detach()), on, i) for i, o in enumerate(lin.outputs)]
        sweeps += 1
        for grad in lin.pull(list(seeds)):
            touched = on & False if grad is None else (plain(grad).flatten(1) != 0).any(1).cpu() & ~on
            if touched.any():
                return Separation(False, ((-1, int(touched.nonzero()[0])),), unknown, sweeps)
    return Separation(True, (), unknown, sweeps)


def _only(output: torch.Tensor, on: torch.Tensor, seed: int) -> torch.Tensor:
    noise = private_noise(output, 500 + seed)
    return torch.where(on.to(output.device).reshape(-1, *[1] * (output.ndim - 1)), noise, 0)
