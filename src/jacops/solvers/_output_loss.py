"""A loss as a function of a model's output, and its Hessian there in the simplest form.

What kind of Hessian it is, is read off products with it, never off the loss's name: diagonal (squared error, logistic),
that of a softmax up to a factor for each position (cross-entropy, weighted, with ignored or smoothed targets), or
small blocks in full.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._finite import check_outputs, is_finite
from .._ladder.protocol import FrameworkModel, Recorded, is_framework_model
from .._runtime.agreement import few_operations_tolerance
from .._runtime.contexts import out_of_inference, private_noise, recording, sweeping
from .._runtime.restoring import restoring
from .._torch.protocol import Likelihood, Recording, call_loss, counted_labels, likelihood_of
from .._trees import flatten, output_leaves
from ..errors import InputError, NonFiniteError, NotDifferentiableError
from ._output_curvature import Blocks, Elementwise, OutputHessian, Softmax

_FULL_ENTRIES = 2**26  # 512 MiB of blocks, which are held in float64


class OutputLoss(ABC):
    """A loss as a function of a model's output, of which each sample has some entries.

    Attributes:
        call: The public call, for messages.
        samples: How many.
        entries: Of one sample's output.
        leaves: The outputs that the loss depends on.
    """

    call: str
    samples: int
    entries: int
    leaves: Sequence[Tensor]
    _counted: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return self.leaves[0].dtype

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """Return the Hessian times `(n, entries)`."""

    @abstractmethod
    def gradient(self, function: Any) -> Tensor:
        """Return the gradient `(n, entries)` of another loss by the output."""

    @abstractmethod
    def likelihood(self, loss: Any) -> Likelihood | None:
        """Return the likelihood of a loss at this output, if it has one."""

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return every sample's Hessian, `(n, entries, entries)`."""
        like = torch.empty(self.samples, self.entries, dtype=self.dtype, device=self.leaves[0].device)
        matrix = torch.empty(*like.shape, self.entries, dtype=dtype, device=like.device)
        for i in range(self.entries):
            unit = torch.zeros_like(like)
            unit[:, i] = 1
            matrix[:, :, i] = self.product(unit)
        return matrix

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
        scale, allowed = float(image.norm()), few_operations_tolerance(self.dtype)
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
            # Factors are quotients: below that, rounding of float32 (6e-8) leaves them no two digits.
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
            needed = f"blocks of {self.entries} × {self.entries} for {self.samples} samples are too many"
            raise InputError.of("loss", came, needed, "Use smaller batches, or EKFAC(fisher='empirical').")
        matrix = self.matrix()
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        largest = values.abs().max()
        # Negative by 100 roundings of float32 or more; a loss that is not convex is so by a share of 1.
        if float(values.min()) < -1e-5 * float(largest):
            raise _not_convex(float(values.min()))
        # Fifty roundings of float64, in which blocks are decomposed: smaller ones are zero.
        kept = (values > 1e-14 * largest).any(0)
        kept[-1] = True
        root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1))[..., kept].to(like.dtype)
        return Blocks(root, matrix.diagonal(dim1=1, dim2=2) != 0)

    def _refuse_mixing(self, probe: Tensor) -> None:
        half = torch.arange(self.samples, device=probe.device) % 2 == 0
        if bool(self.product(probe * half.unsqueeze(1))[~half].any()):
            came = "one that mixes samples"
            raise InputError.of("loss", came, "EKFAC needs a mean or a sum over samples", "Use `CG()`.")


class LossAtOutput(OutputLoss):
    """A loss as a function of an output that torch recorded.

    Args:
        found: The recorded model.
        loss: `loss(output, y)`, one number.
        y: The target.
        samples: How many.
        call: The public call, for messages.

    Raises:
        NotDifferentiableError: The loss does not depend on the output, or has no derivative.
        InputError: An output it depends on cannot be told apart by samples.
        NonFiniteError: An output is NaN or Inf.
    """

    @restoring
    def __init__(self, found: Recording, loss: Callable[[Any, Any], Tensor], y: Any, samples: int, call: str) -> None:
        self.samples, self._y, self.call = samples, y, call
        self._counted = counted_labels(loss, y)
        self._outputs, self._tree = output_leaves(found.output)
        names = found.lin.codomain.names
        check_outputs(call, self._outputs, names)
        grads, leaves = self._differentiated(lambda output: call_loss(loss, output, _recordable(y)), create_graph=True)
        self._used = [i for i, grad in enumerate(grads) if grad is not None]
        if not self._used:
            raise NotDifferentiableError(f"{call}: the loss does not depend on the model's output.")
        for i in self._used:
            if self._outputs[i].ndim == 0 or self._outputs[i].numel() % samples:
                raise _not_by_samples(names[i], self._outputs[i], samples)
        self.leaves, self.grads = [leaves[i] for i in self._used], [grads[i] for i in self._used]
        with recording():
            flat = [self._outputs[i].reshape(samples, -1) for i in self._used]
            joined = flat[0] if len(flat) == 1 else torch.cat([part.to(flat[0].dtype) for part in flat], 1)
        self.lin = found.lin.to([joined], ["output"], call)
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

    def gradient(self, function: Callable[[Any, Any], Tensor]) -> Tensor:
        """Return the gradient `(n, entries)` of another loss by the output."""
        grads, leaves = self._differentiated(lambda output: call_loss(function, output, _recordable(self._y)))
        full = [torch.zeros_like(leaves[i]) if (g := grads[i]) is None else g for i in self._used]
        return torch.cat([grad.reshape(self.samples, -1).to(self.dtype) for grad in full], 1)

    def likelihood(self, loss: Callable[[Any, Any], Tensor]) -> Likelihood | None:
        """Return the likelihood of a loss at this output, if it has one."""
        return likelihood_of(loss, self._outputs, self._tree, self._y)


class FrameworkLossAtOutput(OutputLoss):
    """A loss as a function of an output that another framework recorded.

    Args:
        model: The model.
        found: What was recorded.
        loss: As the framework has it.
        y: The target.
        samples: How many.
        call: The public call, for messages.

    Raises:
        NotDifferentiableError: The loss does not depend on the output, or has no derivative.
        InputError: An output cannot be told apart by samples.
        NonFiniteError: An output is NaN or Inf.
    """

    def __init__(self, model: FrameworkModel, found: Recorded, loss: Any, y: Any, samples: int, call: str) -> None:
        self.samples, self.call, self._model, self._found, self._y = samples, call, model, found, y
        self.leaves, tree = output_leaves(found.output)
        check_outputs(call, self.leaves, tree.names)
        for leaf, name in zip(self.leaves, tree.names, strict=True):
            if leaf.ndim == 0 or leaf.shape[0] != samples:
                raise _not_by_samples(name, leaf, samples)
        self.entries = sum(leaf[0].numel() for leaf in self.leaves)
        self._lin = model.record_at_output(found, loss, y, call).lin

    def product(self, rows: Tensor) -> Tensor:
        """Return the Hessian times `(n, entries)`."""
        sizes = [leaf[0].numel() for leaf in self.leaves]
        parts = [
            part.reshape(1, *leaf.shape).to(leaf.dtype)
            for part, leaf in zip(rows.split(sizes, 1), self.leaves, strict=True)
        ]
        return self._joined([part[0] for part in self._lin.pull_rows(parts)])

    def gradient(self, function: Any) -> Tensor:
        """Return the gradient `(n, entries)` of another loss by the output."""
        at = self._model.record_at_output(self._found, function, self._y, self.call)
        return self._joined(at.lin.domain.unflatten(self._model.slope(at)))

    def likelihood(self, loss: Any) -> Likelihood | None:
        """Return the likelihood of a loss at this output, if it has one."""
        return self._model.likelihood(self._found, loss, self._y)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(self.samples, -1).to(self.dtype) for part in parts], 1)


def loss_at_output(model: Any, found: Any, loss: Any, y: Any, samples: int, call: str) -> OutputLoss:
    """Return a loss as a function of a recorded output, whatever recorded it."""
    if is_framework_model(model):
        return FrameworkLossAtOutput(model, found, loss, y, samples, call)
    return LossAtOutput(found, loss, y, samples, call)


def _not_by_samples(name: str, output: Tensor, samples: int) -> InputError:
    came = f"of shape {tuple(output.shape)} for {samples} samples"
    return InputError.of(name, came, "its first axis must be the samples")


def _root(diagonal: Tensor) -> Tensor:
    # Negative by 100 roundings of float32 or more; a loss that is not convex is so by a share of 1.
    if float(diagonal.min()) < -1e-5 * float(diagonal.abs().max()):
        raise _not_convex(float(diagonal.min()))
    return diagonal.clamp_min(0).sqrt()


def _not_convex(lowest: float) -> InputError:
    came = f"not convex in the model's output (curvature {lowest:.3g} along one direction)"
    return InputError.of("loss", came, "EKFAC needs a positive one", "Use EKFAC(fisher='empirical') or `CG()`.")


def _recordable(y: Any) -> Any:
    """Return a target whose tensors may take part in a recorded computation."""
    leaves, tree = flatten(y, "y")
    return tree.build([out_of_inference(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
