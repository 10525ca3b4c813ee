r"""The loss's Hessian by the model's output, sample by sample, as directions $s$ with $\sum s s^\top = H$.

What kind of Hessian it is, is read off products with it, never off the loss's name: diagonal (squared error, logistic),
that of a softmax up to a factor for each position (cross-entropy, weighted, with ignored or smoothed targets), or
small blocks in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._finite import check_outputs, is_finite
from .._runtime.contexts import out_of_inference, private_noise, recording, sweeping
from .._runtime.counter import Draws
from .._runtime.restoring import restoring
from .._torch.protocol import Likelihood, Recording, call_loss, counted_labels, likelihood_of
from ..errors import InputError, NonFiniteError, NotDifferentiableError, explain
from ..trees import flatten, output_leaves

_FULL_ENTRIES = 2**26
_AGREES = {torch.float64: 1e-9, torch.float32: 1e-4}


class Directions(Protocol):
    """Cotangents at the output whose squares, added up sample by sample, are a curvature there."""

    @property
    def columns(self) -> int:
        """How many there are."""
        ...

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return some of them, `(k, n, entries)`."""
        ...


class OutputHessian(Directions, Protocol):
    """A positive Hessian of the loss by the output, block by block of samples."""

    def draw(self, draws: Draws, many: int) -> Tensor:
        """Return random directions `(many, n, entries)` whose squares are the Hessian on average.

        Each is drawn by the sample's place in the data and the entry's or position's place among those that count, so
        that padding changes nothing.
        """
        ...


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
        found = self.root.new_zeros(stop - start, *self.root.shape)
        for i in range(start, stop):
            found[i - start, :, i] = self.root[:, i]
        return found

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
        n, before, classes, after = self.p.shape
        found = self.p.new_zeros(stop - start, n, before, classes, after)
        for i in range(start, stop):
            b, c, a = i // (classes * after), i // after % classes, i % after
            found[i - start, :, b, :, a] = -self.p[:, b, :, a]
            found[i - start, :, b, c, a] += 1
            found[i - start, :, b, :, a] *= self.p[:, b, c, a].sqrt().unsqueeze(1) * self.root[:, b, :, a]
        return found.flatten(2)

    def draw(self, draws: Draws, many: int) -> Tensor:
        """Return `e_c - p` for classes c drawn from p."""
        spread, n = self.p.movedim(2, -1), self.p.shape[0]
        drawn = draws.classes(spread.reshape(n, -1, spread.shape[-1]), self.real.reshape(n, -1), many)
        chosen = torch.nn.functional.one_hot(drawn, spread.shape[-1]).reshape(many, *spread.shape).movedim(-1, 3)
        return ((chosen.to(self.p) - self.p) * self.root).flatten(2)


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


class LossAtOutput:
    """A loss as a function of a recorded output.

    Args:
        found: The recorded model.
        loss: `loss(output, y)`, one number.
        y: The target.
        samples: How many.

    Raises:
        NotDifferentiableError: The loss does not depend on the output, or has no derivative.
        InputError: An output it depends on cannot be told apart by samples.
        NonFiniteError: An output is NaN or Inf.
    """

    @restoring
    def __init__(self, found: Recording, loss: Callable[[Any, Any], Tensor], y: Any, samples: int) -> None:
        self.samples, self._y = samples, y
        self._counted = counted_labels(loss, y)
        self._outputs, self._tree = output_leaves(found.output)
        names = found.lin.codomain.names
        check_outputs("EKFAC", self._outputs, names)
        grads, leaves = self._differentiated(lambda output: call_loss(loss, output, _recordable(y)), create_graph=True)
        self._used = [i for i, grad in enumerate(grads) if grad is not None]
        if not self._used:
            raise NotDifferentiableError("EKFAC: the loss does not depend on the model's output.")
        for i in self._used:
            if self._outputs[i].ndim == 0 or self._outputs[i].numel() % samples:
                came = f"of shape {tuple(self._outputs[i].shape)} for {samples} samples"
                raise InputError(explain(names[i], came, "its first axis must be the samples"))
        self.leaves, self.grads = [leaves[i] for i in self._used], [grads[i] for i in self._used]
        with recording():
            flat = [self._outputs[i].reshape(samples, -1) for i in self._used]
            joined = flat[0] if len(flat) == 1 else torch.cat([part.to(flat[0].dtype) for part in flat], 1)
        self.lin = found.lin.to([joined], ["output"], "EKFAC")
        self.entries = joined.shape[1]

    @restoring
    def _differentiated(
        self, function: Callable[[Any], Tensor], create_graph: bool = False
    ) -> tuple[Sequence[Tensor | None], list[Tensor]]:
        """Return the gradients of a function of the output, None where it does not depend on a part, and the parts."""
        with recording():
            leaves = [o.detach().requires_grad_() for o in self._outputs]
            value = function(self._tree.build([leaf.clone() for leaf in leaves]))
            if not value.requires_grad:
                return [None] * len(leaves), leaves
            return torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True), leaves

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return self.lin.outputs[0].dtype

    @restoring
    def product(self, rows: Tensor) -> Tensor:
        """Return the Hessian times `(n, entries)`."""
        sizes = [leaf.numel() // self.samples for leaf in self.leaves]
        parts = [
            part.reshape(leaf.shape).to(leaf.dtype)
            for part, leaf in zip(rows.split(sizes, 1), self.leaves, strict=True)
        ]
        live = [(g, p) for g, p in zip(self.grads, parts, strict=True) if g is not None and g.requires_grad]
        if not live:
            return torch.zeros_like(rows)
        with sweeping(rows):
            found = torch.autograd.grad(
                [g for g, _ in live], self.leaves, [p for _, p in live], retain_graph=True, materialize_grads=True
            )
        return torch.cat([f.reshape(self.samples, -1).to(rows.dtype) for f in found], 1)

    def gradient(self, function: Callable[[Any], Tensor]) -> Tensor:
        """Return the gradient `(n, entries)` of another function of the output."""
        grads, leaves = self._differentiated(function)
        full = [torch.zeros_like(leaves[i]) if (g := grads[i]) is None else g for i in self._used]
        return torch.cat([grad.reshape(self.samples, -1).to(self.dtype) for grad in full], 1)

    def likelihood(self, loss: Callable[[Any, Any], Tensor]) -> Likelihood | None:
        """Return the likelihood of a loss at this output, if it has one."""
        return likelihood_of(loss, self._outputs, self._tree, self._y)

    def hessian(self) -> OutputHessian:
        """Return the Hessian in the simplest form that gives its products.

        Raises:
            NonFiniteError: It holds NaN or Inf.
            InputError: The loss mixes samples, is not convex in the output, or is of a kind too large for its blocks.
        """
        like = torch.empty(self.samples, self.entries, dtype=self.dtype, device=self.leaves[0].device)
        probe = private_noise(like, 1)
        image = self.product(probe)
        if not is_finite(image):
            raise NonFiniteError("EKFAC: in the loss's second derivative by the output, some are NaN or Inf.")
        self._refuse_mixing(probe)
        scale, allowed = float(image.norm()), _AGREES.get(self.dtype, 1e-2)
        signs = torch.where(private_noise(like, 2) >= 0, 1.0, -1.0).to(like)
        diagonal = self.product(signs) * signs
        if self.entries == 1 or float((diagonal * probe - image).norm()) <= allowed * scale:
            return Elementwise(_root(diagonal))
        return self._softmax(probe, image, allowed * scale) or self._blocks(like)

    def _softmax(self, probe: Tensor, image: Tensor, allowed: float) -> Softmax | None:
        output = self.leaves[0].detach()
        shape = output.shape
        if len(self.leaves) != 1 or shape[0] != self.samples:
            return None
        for axis in {1, len(shape) - 1}:
            folded = (self.samples, math.prod(shape[1:axis]), shape[axis], math.prod(shape[axis + 1 :]))
            p = output.softmax(axis).reshape(folded)
            v, seen = probe.reshape(folded), image.reshape(folded)
            plain = p * (v - (p * v).sum(2, keepdim=True))
            strength = (v * plain).sum(2, keepdim=True)
            sure = strength > 1e-6 * strength.max()
            factor = torch.where(sure, (v * seen).sum(2, keepdim=True) / torch.where(sure, strength, 1.0), 0.0)
            usual = factor[sure].median() if bool(sure.any()) else factor.new_zeros(())
            factor = torch.where(sure, factor, usual * (seen.abs().amax(2, keepdim=True) > 0))
            if float((factor * plain - seen).norm()) <= allowed and bool((factor >= 0).all()):
                real, labels = factor > 0, self._counted
                if labels is not None and labels.numel() == real.numel():
                    real = labels.reshape(real.shape).to(real.device)
                return Softmax(p, factor.sqrt(), real)
        return None

    def _blocks(self, like: Tensor) -> Blocks:
        if self.samples * self.entries**2 > _FULL_ENTRIES:
            came = f"one whose Hessian by {self.entries} outputs is neither diagonal nor that of a softmax"
            raise InputError(
                explain(
                    "loss",
                    came,
                    f"blocks of {self.entries} × {self.entries} for {self.samples} samples are too many",
                    "Use smaller batches, or EKFAC(fisher='empirical').",
                )
            )
        matrix = torch.empty(self.samples, self.entries, self.entries, dtype=torch.float64, device=like.device)
        for i in range(self.entries):
            unit = torch.zeros_like(like)
            unit[:, i] = 1
            matrix[:, :, i] = self.product(unit)
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        largest = values.abs().max()
        if float(values.min()) < -1e-5 * float(largest):
            raise _not_convex(float(values.min()))
        kept = (values > 1e-14 * largest).any(0)
        kept[-1] = True
        root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1))[..., kept].to(like.dtype)
        return Blocks(root, matrix.diagonal(dim1=1, dim2=2) != 0)

    def _refuse_mixing(self, probe: Tensor) -> None:
        half = torch.arange(self.samples, device=probe.device) % 2 == 0
        if bool(self.product(probe * half.unsqueeze(1))[~half].any()):
            raise InputError(
                explain("loss", "one that mixes samples", "EKFAC needs a mean or a sum over samples", "Use `CG()`.")
            )


def _root(diagonal: Tensor) -> Tensor:
    if float(diagonal.min()) < -1e-5 * float(diagonal.abs().max()):
        raise _not_convex(float(diagonal.min()))
    return diagonal.clamp_min(0).sqrt()


def _not_convex(lowest: float) -> InputError:
    came = f"not convex in the model's output (curvature {lowest:.3g} along one direction)"
    return InputError(explain("loss", came, "EKFAC needs a positive one", "Use EKFAC(fisher='empirical') or `CG()`."))


def _recordable(y: Any) -> Any:
    """Return a target whose tensors may take part in a recorded computation."""
    leaves, tree = flatten(y, "y")
    return tree.build([out_of_inference(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
