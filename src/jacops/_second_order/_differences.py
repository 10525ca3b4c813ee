"""Derivatives compared with central differences of those of one order less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._runtime.agreement import difference_tolerance
from .._torch.protocol import RECORDED, Samples, dropped
from ._common import Blocks, compared, part_of, typical

# Differences of two steps that agree to a quarter of what they refute do not agree by chance.
_CONVERGED = 0.25
_ROUNDINGS = 100.0  # roundings in a model, at most, that add up to an error of its derivative


@dataclass(frozen=True)
class Differences:
    """How derivatives of a call are compared with differences.

    Attributes:
        samples: What was differentiated.
        directions: Returns a direction per input for some of the samples.
        products: Returns what derivatives of some samples are along their directions, `(m, …)` each.
        lower: Returns the derivatives of one order less, by samples and directions.
    """

    samples: Samples
    directions: Callable[[slice], list[Tensor]]
    products: Callable[[Blocks, slice, list[Tensor]], list[Tensor]]
    lower: Callable[[Samples, list[Tensor]], list[Tensor]]

    def refute(self, blocks: Blocks, where: slice, batch_size: int = RECORDED) -> float | None:
        """Return how far derivatives of some samples are from differences that converge; None if they are not."""
        part = part_of(self.samples, where, fallback="silent", batch_size=batch_size)
        moves = self.directions(where)
        step = length_of_step(part, moves)
        near, slope = self._central(part, moves, step)
        far, _ = self._central(part, moves, 2 * step)
        rounding = slope * torch.finfo(moves[0].dtype).eps / step
        return refuted(self.products(blocks, where, moves), near, far, rounding)

    def check(self, blocks: Blocks, functions: list[str]) -> None:
        """Refuse derivatives through custom Functions that differ from differences.

        Raises:
            NotDifferentiableError: One differs by more than rounding and the step explain.
        """
        if not functions or not self.samples.count:
            return
        error = self.refute(blocks, slice(None), self.samples.batch_size)
        if error is not None:
            raise dropped(self.samples.call, "the derivative and differences of the one before", error, functions)

    def _central(self, part: Samples, moves: list[Tensor], step: float) -> tuple[list[Tensor], float]:
        """Return central differences of derivatives of one order less, and the size of these."""
        ahead, behind = (
            self.lower(part_of(part, slice(None), [sign * step * v for v in moves]), moves) for sign in (1, -1)
        )
        return [(f - b) / (2 * step) for f, b in zip(ahead, behind, strict=True)], typical(ahead)


def length_of_step(samples: Samples, directions: list[Tensor]) -> float:
    """Return a step along directions for central differences, by the sizes of the samples and of these."""
    eps = torch.finfo(directions[0].dtype).eps
    if not samples.count:
        return eps ** (1 / 3)
    return eps ** (1 / 3) * (typical([samples.values[i] for i in samples.inputs]) or 1.0) / (typical(directions) or 1.0)


def refuted(parts: Sequence[Tensor], near: Sequence[Tensor], far: Sequence[Tensor], rounding: float) -> float | None:
    """Return how far derivatives are from central differences of two steps, where these agree; None if they are not.

    At a kink, or where steps are too long or too short, differences do not agree with each other and refute nothing.

    Args:
        parts: Derivatives, `(m, …)` each.
        near: Differences of the shorter step.
        far: Differences of the longer step.
        rounding: The rounding unit over the shorter step, times what the differences are of.
    """
    near, far = ([d.reshape(p.shape) for d, p in zip(ds, parts, strict=True)] for ds in (near, far))
    (off, scale), (spread, _) = compared(parts, near), compared(near, far)
    limit = difference_tolerance(parts[0].dtype) * scale + _ROUNDINGS * rounding
    bad = (off > limit) & (spread < _CONVERGED * off)
    return float((off / scale)[bad].max()) if bool(bad.any()) else None
