"""Do samples mix? The evidence, each piece able to fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..._runtime.agreement import coarsest, few_operations_tolerance, size, tolerance, worst_disagreement
from ..._runtime.contexts import must_surface, private_noise
from ..._runtime.rounding import is_rounding
from ..._runtime.side_effects import SideEffects
from ...errors import JacopsError, NotDifferentiableError, warn
from .linearization import Linearization

Ran = TypeVar("Ran")

NOT_FINITE = "values are not finite"
_SUMS = 1e3  # roundings in a sum over as many terms as layers have
_DECIDED = 1e-2  # outputs that may differ by more, in half precision, decide nothing
UNDECIDED = ""  # rounding explains the difference: it neither refutes nor proves independence


def batched(run: Callable[[], Ran], many: int) -> Ran | str:
    """Return what a run over a batch gives, or how the forward failed."""
    try:
        return run()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, JacopsError) or must_surface(error):
            raise
        return f"the forward takes no batch of {many} ({type(error).__name__}: {str(error)[:100]})"


def rows_differ(values: Sequence[Tensor]) -> bool:
    """Return whether samples differ in anything: equal rows prove nothing about others, since they agree anyway."""
    return any(bool((v != v[:1]).any()) for v in values)


def outputs_differ(outputs: Sequence[Tensor]) -> bool:
    """Return whether outputs differ between samples by more than rounding, as `rows_differ` asks of inputs."""
    pairs = [(output.detach(), output.detach()[:1]) for output in outputs]
    return any(size(all_ - one) > few_operations_tolerance(all_.dtype) * size(all_) for all_, one in pairs)


def unbatchable(lin: Linearization, effects: SideEffects, many: int) -> str | None:
    """Return why a batch cannot be swept at all: random draws, no batch axis, coarse reads; None if it can."""
    coarse = torch.finfo(effects.coarse).eps if effects.coarse is not None else 0.0
    if effects.reads and _SUMS * coarse > _DECIDED:
        return with_reads("in half precision outputs alone do not show whether samples mix", effects)
    if effects.draws:
        return f"the forward is random in eval mode ({', '.join(effects.draws)})"
    for number, tensor in enumerate([*lin.outputs, *lin.leaves]):
        if tensor.ndim == 0 or tensor.shape[0] != many:
            name = [*lin.codomain.names, *lin.domain.names][number]
            return f"{name} has shape {tuple(tensor.shape)} and no axis of {many} samples first"
    return None


def read_tolerance(lin: Linearization) -> float:
    """Return how far outputs of a sample alone and in a batch may differ where the forward reads values.

    A value that is read from the whole batch changes them by little where samples are alike, so only rounding is
    allowed: 1,000 times that of one operation, for sums over as many terms as layers have.
    """
    effects = lin.proofs.effects or SideEffects()
    coarse = coarsest([effects.coarse, *(output.dtype for output in lin.outputs)])
    return min(lin.tolerance, _SUMS * torch.finfo(coarse or torch.float64).eps)


def with_reads(reason: str, effects: SideEffects) -> str:
    """Return a reason for which samples mix, beside the values that the forward reads, which may be its cause."""
    return (
        f"the forward reads values out of tensors ({', '.join(effects.reads)}); {reason}" if effects.reads else reason
    )


def differs(whole: Tensor, alone: Tensor, picked: Tensor, most: float | None = None) -> str | None:
    """Return how the outputs of some samples alone differ from those in the batch, by more than `most`."""
    expected = whole.detach()[picked.to(whole.device)]
    if alone.numel() != expected.numel():
        return f"the output's shape depends on the batch ({tuple(expected.shape)} or {tuple(alone.shape)})"
    error = worst_disagreement([(expected, alone.detach().reshape(expected.shape))])
    mixed = error > (tolerance([whole.dtype]) if most is None else most)
    return f"samples mix: outputs alone and in a batch differ by {error:.1e}" if mixed else None


def coupled(lin: Linearization, blocks: list[list[Tensor]], where: slice, strict: bool = False) -> str | None:
    """Compare a batch's blocks with two plain backward passes, over all samples and over half of them.

    A cotangent on half of the samples must leave exact zeros on the others, however small a coupling is. With
    `strict` halves are taken by every binary digit of the samples' numbers, both ways: then every ordered pair of
    samples is on different sides once, in 2 log2(n) passes.

    Returns:
        Why samples mix; None where they do not, `UNDECIDED` where only rounding was compared.
    """
    seeds = [private_noise(o, seed=i) for i, o in enumerate(lin.outputs)]
    many, undecided = where.stop - where.start, False
    halves = by_digits(many) if strict else [_random_half(many)]
    for mask in (torch.ones(many, dtype=torch.bool), *halves):
        masked = [s * mask.to(s.device, s.dtype).view(-1, *[1] * (s.ndim - 1)) for s in seeds]
        grads = lin.gradient(masked)
        if any(bool((g[~mask.to(g.device)] != 0).any()) for g in grads):
            return "samples mix: the output of one depends on another"
        pairs = [(_applied(blocks, where, masked, j, g), g) for j, g in enumerate(grads)]
        error = worst_disagreement(pairs)
        if error <= lin.tolerance:
            continue
        if math.isfinite(error) and is_rounding(partial(lin.pull, masked), pairs):
            undecided = True
            continue
        return f"samples mix: their shared sweep is off by {error:.1e}" if math.isfinite(error) else NOT_FINITE
    return UNDECIDED if undecided else None


def disagrees(alone: Linearization, blocks: list[list[Tensor]], row: int) -> str | None:
    """Compare one sample's blocks with a plain backward pass over a run of it alone."""
    seeds, where = [private_noise(o, seed=i) for i, o in enumerate(alone.outputs)], slice(row, row + 1)
    grads = alone.gradient(seeds)
    rows = [s.reshape(1, *b[0].shape[1 : b[0].ndim - grads[0].ndim + 1]) for s, b in zip(seeds, blocks, strict=True)]
    pairs = [(_applied(blocks, where, rows, j, g), g) for j, g in enumerate(grads)]
    error = worst_disagreement(pairs)
    if error <= alone.tolerance or (math.isfinite(error) and is_rounding(partial(alone.pull, seeds), pairs)):
        return None
    return f"samples mix: the sweep of one alone differs by {error:.1e}" if math.isfinite(error) else NOT_FINITE


def explain_alone(call: str, fallback: str, reason: str) -> None:
    """Report why samples are taken alone, as `fallback` requires, in every call, since it takes many more sweeps.

    Raises:
        NotDifferentiableError: `fallback="error"` forbids it.
    """
    if fallback == "error":
        raise NotDifferentiableError(f"{call}: {reason}, and fallback='error' forbids one sample at a time.")
    if fallback == "warn":
        warn(f"{call}: {reason}; so every sample was differentiated alone, in a batch of one.")


def _random_half(many: int) -> Tensor:
    half = torch.rand(many, generator=torch.Generator().manual_seed(1)) < 0.5
    half[0], half[-1] = True, False
    return half


def by_digits(many: int) -> list[Tensor]:
    """Return halves of samples by every binary digit of their numbers, both ways."""
    numbers = torch.arange(many)
    digits = [(numbers >> bit) % 2 == 1 for bit in range((many - 1).bit_length())]
    return [mask for digit in digits for mask in (digit, ~digit)]


def _applied(blocks: list[list[Tensor]], where: slice, seeds: list[Tensor], leaf: int, like: Tensor) -> Tensor:
    """Return what the blocks say the gradient of `seeds` is."""
    total = torch.zeros_like(like)
    for row, seed in zip(blocks, seeds, strict=True):
        many, entries = seed.shape[0], seed.shape[1:].numel()
        block = row[leaf][where].reshape(many, entries, like.shape[1:].numel())
        total += torch.bmm(seed.reshape(many, 1, entries).to(block.dtype), block).reshape(like.shape).to(like.dtype)
    return total
