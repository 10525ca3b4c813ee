"""How noisy a curvature from drawn cotangents is, by the samples' slopes along a few random directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from .._operators._noise import DIRECTIONS, ratio
from .._runtime.counter import Draws
from .._torch.protocol import Gradients, OuterGradients

_REMEMBERED = 2**12  # places of a side: in 4 directions 64 KiB of signs, for 128 sides 8 MiB


@final
class Noise:
    """Sums of squares and of fourth powers of slopes.

    A direction is an outer product of random signs in each weight, so that a slope costs no more than reading the
    factors of a gradient.
    """

    def __init__(self) -> None:
        self._squares = self._totals = torch.zeros(DIRECTIONS, dtype=torch.float64)

    def add(self, slopes: Sequence[Tensor], factor: float) -> None:
        """Add a batch under drawn cotangents, which enters with a factor: the slopes by all of its groups."""
        if slopes:
            squares = torch.stack(list(slopes)).sum(0).square().flatten(1)
            self._totals = self._totals + factor * squares.sum(1).cpu()
            self._squares = self._squares + factor**2 * squares.square().sum(1).cpu()

    def plus(self, other: Noise, factor: float = 1.0) -> Noise:
        """Return the sums over two data sets, the second of which enters with a factor."""
        total = Noise()
        total._totals = self._totals + factor * other._totals
        total._squares = self._squares + factor**2 * other._squares
        return total

    def parts(self) -> list[Tensor]:
        """Return the tensors that sums over ranks add up."""
        return [self._squares, self._totals]

    def take(self, parts: Iterator[Tensor]) -> None:
        """Replace the tensors that `parts` returns."""
        self._squares, self._totals = next(parts), next(parts)

    @property
    def value(self) -> float:
        """The relative standard error of a quadratic form, estimated from above as `relative_noise` does."""
        return ratio(self._squares, self._totals)

    def slopes(self, group: int, gradients: Gradients) -> list[Tensor]:
        """Return the parts `(directions, k, n)` that a group's gradients add to the samples' slopes."""
        if isinstance(gradients, Tensor):
            signs = self._along(group, 0, (1, gradients.shape[-1]), gradients)[:, 0]
            return [torch.einsum("kne,ze->zkn", gradients.double(), signs.double())]
        return [self._outer(group, use) for use in gradients]

    def _outer(self, group: int, use: OuterGradients) -> Tensor:
        right = self._side(group, 1, use.right)
        if not use.looks_up:
            return (self._side(group, 0, use.left) * right).sum((3, 4))
        signs = self._along(group, 0, (1, int(use.left.max()) + 1), use.right)[:, 0, use.left]
        return (signs.unsqueeze(1) * right[..., 0]).sum(3)

    def _side(self, group: int, side: int, values: Tensor) -> Tensor:
        """Return `(directions, k, n, t, g)`, one side of outer products along signs."""
        signs = self._along(group, side, (values.shape[3], values.shape[4]), values)
        # The few signs on the left: on the right they took five times as long where p is not the innermost axis.
        found = signs.to(values.dtype).transpose(0, 1) @ values.permute(3, 4, 0, 1, 2).flatten(2)
        return found.unflatten(2, values.shape[:3]).movedim(0, -1).double()

    def _along(self, group: int, side: int, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Return signs `(directions, *shape)`, the same at each place of a group's side every time."""
        return _signs(2 * group + side, shape, like.device)


def _signs(stream: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return signs `(directions, *shape)`, remembered unless there are very many."""
    return (_small_signs if math.prod(shape) <= _REMEMBERED else _drawn)(stream, shape, device)


def _drawn(stream: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    return Draws(stream).signs(torch.ones(shape, dtype=torch.bool, device=device), DIRECTIONS)


_small_signs = lru_cache(128)(_drawn)
