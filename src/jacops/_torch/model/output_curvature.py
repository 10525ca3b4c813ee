r"""The loss's Hessian by the model's output, sample by sample, as directions $s$ with $\sum s s^\top = H$."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._finite import is_finite
from ..._runtime.agreement import few_operations_tolerance
from ..._runtime.contexts import private_noise
from ..._runtime.counter import Draws


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

    def at(self, labels: Tensor) -> Tensor:
        """Return `p - e_c`, `(n, entries)`, for the classes c that are labels, zero where these do not count."""
        classes = torch.where(self.real, labels.reshape(self.real.shape), 0)
        chosen = self.p.scatter_add(2, classes, self.p.new_full((), -1.0).expand(classes.shape))
        return chosen.mul_(self.root).flatten(1)


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
class FullBlocks:
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


Directions = Elementwise | Softmax | Given | FullBlocks


def _units(start: int, stop: int, like: Tensor) -> Tensor:
    """Return unit vectors `(stop - start, 1, entries)` of a sample's output."""
    entries = torch.arange(start, stop, device=like.device)
    return torch.nn.functional.one_hot(entries, like.shape[1:].numel()).unsqueeze(1).to(like)


# The error of a small entry, in rounding errors of a sample's largest one: it has some of those of sums over entries.
_ROUNDINGS = 64


class ProbedHessian:
    """The form of the Hessian of a loss by the outputs, determined from three products and not from the loss.

    Args:
        product: Products with rows `(k, n, entries)`.
        like: `(n, entries)`, in the dtype and on the device of the outputs.
        outputs: The outputs whose entries these are, one after the other.
        computed_in: The loss's own dtype, which may be coarser than the outputs'.

    Attributes:
        is_finite: The products are.
        mixes: A sample's output changes the slope at another's.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        like: Tensor,
        outputs: Sequence[Tensor],
        computed_in: torch.dtype | None = None,
    ) -> None:
        self._outputs, self._probe = outputs, private_noise(like, 1)
        half = torch.arange(like.shape[0], device=like.device) % 2 == 0
        self._signs = torch.where(private_noise(like, 2) >= 0, 1.0, -1.0).to(self._probe)
        self._image, masked, self._signed = product(
            torch.stack([self._probe, self._probe * half[:, None], self._signs])
        )
        self.is_finite = is_finite(self._image)
        self.mixes = bool(masked[~half].any())
        dtypes = like.dtype, computed_in or like.dtype
        self._rounding = max(few_operations_tolerance(dtype) for dtype in dtypes)
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        self._closely = max(self._rounding, 10 * eps)  # of one sample: in bfloat16, roundings do not cancel there
        self._floor = min(self._rounding, _ROUNDINGS * eps)
        self._allowed = self._rounding * float(self._image.norm())

    def diagonal(self) -> Tensor | None:
        """Return its diagonal `(n, entries)`, where there is nothing beside it."""
        found = self._signed * self._signs
        return found if self._is_image(found * self._probe) else None

    def is_of(self, blocks: Tensor) -> bool:
        """Return whether it consists of these blocks `(n, entries, entries)`, with nothing between samples."""
        probe = self._probe.to(blocks.dtype).unsqueeze(2)
        return self._is_image((blocks @ probe).squeeze(2), (blocks.abs() @ probe.abs()).squeeze(2))

    def _is_image(self, found: Tensor, terms: Tensor | None = None) -> bool:
        """Return whether this is what the products gave for the probe, by the scale of each sample.

        Samples may differ by far more than a rounding, and each alone may decide the curvature of a parameter.

        Args:
            found: To be compared.
            terms: Magnitudes of what its entries are sums of; by default their own.
        """
        size = torch.maximum(found.abs() if terms is None else terms, self._image.abs())
        largest = size.amax(1, keepdim=True) if size.shape[1] else size
        return bool(((found - self._image).abs() <= self._closely * size + self._floor * largest).all())

    def agrees(self, softmax: Softmax) -> bool:
        """Return whether products with a softmax's Hessian are those that were seen."""
        v, p = self._probe.reshape(softmax.p.shape), softmax.p
        image = softmax.root.square() * p * (v - (p * v).sum(2, keepdim=True))
        return float((image.reshape(self._image.shape) - self._image).norm()) <= self._allowed

    def softmax(self, counted: Tensor | None = None) -> Softmax | None:
        """Return it as that of a softmax at each position of the one output, where it is.

        Args:
            counted: Which positions have labels that count, where that is known.
        """
        output, samples = self._outputs[0].detach(), self._probe.shape[0]
        shape = output.shape
        if len(self._outputs) != 1 or output.ndim == 0 or shape[0] != samples:
            return None
        for axis in {1, len(shape) - 1}:
            folded = (samples, math.prod(shape[1:axis]), shape[axis], math.prod(shape[axis + 1 :]))
            p = output.softmax(axis).reshape(folded)
            v, seen = self._probe.reshape(folded), self._image.reshape(folded)
            plain = p * (v - (p * v).sum(2, keepdim=True))
            strength = (v * plain).sum(2, keepdim=True)
            # Factors are quotients: below that they have less than two digits.
            sure = strength > min(1e-6, 10 * torch.finfo(p.dtype).eps) * strength.max()
            factor = (v * seen).sum(2, keepdim=True) / strength
            if not bool(sure.all()):
                usual = factor[sure].median() if bool(sure.any()) else factor.new_zeros(())
                factor = torch.where(sure, factor, usual * (seen.abs().amax(2, keepdim=True) > 0))
            gap, terms = factor * plain - seen, factor * p * (v.abs() + (p * v.abs()).sum(2, keepdim=True))
            close = (gap.abs() <= self._closely * terms.amax(2, keepdim=True)) | ~sure
            if float(gap.norm()) <= self._allowed and bool((close & (factor >= 0)).all()):
                real = factor > 0
                if counted is not None and counted.numel() == real.numel():
                    real = counted.reshape(real.shape).to(real.device)
                return Softmax(p, factor.sqrt(), real)
        return None
