r"""The loss's Hessian by the model's output, sample by sample, as directions $s$ with $\sum s s^\top = H$."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._runtime.counter import Draws


@dataclass(frozen=True, eq=False)
class Elementwise:
    """A diagonal Hessian; `root` `(n, entries)` is the root of its diagonal."""

    root: Tensor

    @property
    def columns(self) -> int:
        """One for each entry of a sample's output."""
        return self.root.shape[1]

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return the directions of some entries."""
        return self.root * _units(start, stop, self.root)

    def draw(self, draws: Draws, many: int) -> Tensor:
        """Return all of them at once, under random signs."""
        return self.root * draws.signs(self.root != 0, many).to(self.root)


@dataclass(frozen=True, eq=False)
class Softmax:
    """The Hessian of cross-entropy, `factor * (diag(p) - p p')` at each position.

    Attributes:
        p: Probabilities, `(n, before, classes, after)`, adding up to one over the classes.
        root: Roots of the factors, `(n, before, 1, after)`.
        real: Which positions count, `(n, before, 1, after)`.
    """

    p: Tensor
    root: Tensor
    real: Tensor

    @property
    def columns(self) -> int:
        """One for each entry of a sample's output."""
        return self.p[0].numel() if len(self.p) else 0

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return `sqrt(p_c) (e_c - p)` for some positions and classes c."""
        units = _units(start, stop, self.p).reshape(-1, 1, *self.p.shape[1:])
        return ((units - self.p) * ((units * self.p).sum(3, keepdim=True).sqrt() * self.root)).flatten(2)

    def draw(self, draws: Draws, many: int) -> Tensor:
        """Return `e_c - p` for classes c drawn from p."""
        spread, n = self.p.movedim(2, -1), self.p.shape[0]
        drawn = draws.classes(spread.reshape(n, -1, spread.shape[-1]), self.real.reshape(n, -1), many)
        drawn = drawn.reshape(many, *spread.shape[:-1]).unsqueeze(3)
        chosen = (-self.p).repeat(many, 1, 1, 1, 1)
        chosen.scatter_add_(3, drawn, chosen.new_ones(()).expand(drawn.shape))
        return chosen.mul_(self.root).flatten(2)


@dataclass(frozen=True, eq=False)
class Given:
    """A curvature that consists of these directions `(k, n, entries)`."""

    directions: Tensor

    @property
    def columns(self) -> int:
        """How many."""
        return self.directions.shape[0]

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return some of them."""
        return self.directions[start:stop]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Any positive Hessian of small outputs.

    Attributes:
        root: Directions as columns, `(n, entries, k)`, orthogonal for each sample.
        real: Entries with curvature, `(n, entries)`.
    """

    root: Tensor
    real: Tensor

    @property
    def columns(self) -> int:
        """As many as some sample needs."""
        return self.root.shape[2]

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return some columns."""
        return self.root[..., start:stop].permute(2, 0, 1).contiguous()

    def draw(self, draws: Draws, many: int) -> Tensor:
        """Return the symmetric root times random signs: eigenvectors are not unique, it is."""
        size = torch.linalg.vector_norm(self.root, dim=1, keepdim=True)
        unit = self.root / torch.where(size > 0, size, 1.0)
        along = torch.einsum("nek,sne->snk", unit, draws.signs(self.real, many).to(self.root) * self.real)
        return torch.einsum("nek,snk->sne", self.root, along)


Directions = Elementwise | Softmax | Given | Blocks


def _units(start: int, stop: int, like: Tensor) -> Tensor:
    """Return unit vectors `(stop - start, 1, entries)` of a sample's output."""
    entries = torch.arange(start, stop, device=like.device)
    return torch.nn.functional.one_hot(entries, like.shape[1:].numel()).unsqueeze(1).to(like)
