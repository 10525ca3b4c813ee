"""A loss as a function of a model's output, and its Hessian there in the simplest form.

What kind of Hessian it is, is read off products with it, never off the loss's name: diagonal (squared error, logistic),
that of a softmax up to a factor for each position (cross-entropy, weighted, with ignored or smoothed targets), or
small blocks in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from .._finite import check_outputs, is_finite
from .._ladder.protocol import Linearized, is_framework_model
from .._recorded_loss import loss_of_output, recordable
from .._runtime.agreement import few_operations_tolerance
from .._runtime.contexts import private_noise, recording
from .._runtime.restoring import restoring
from .._torch.protocol import counted_labels, gradient_linearization, record_at_outputs
from .._trees import output_leaves
from ..errors import InputError, NonFiniteError, NotDifferentiableError
from ._output_curvature import Blocks, Elementwise, Softmax

_FULL_ENTRIES = 2**26  # 512 MiB of blocks, which are held in float64


@final
class LossAtOutput:
    """A loss as a function of a model's recorded output, of which each sample has some entries.

    Args:
        model: The model.
        found: Its recorded output, in any framework.
        loss: `loss(output, y)`, one number.
        y: The target.
        samples: How many.
        call: The public call, for messages.

    Attributes:
        entries: Of one sample's output.
        leaves: The outputs that the loss depends on.

    Raises:
        NotDifferentiableError: The loss does not depend on the output, or has no derivative.
        InputError: An output it depends on cannot be split by samples.
        NonFiniteError: An output is NaN or Inf.
    """

    def __init__(self, model: Any, found: Any, loss: Any, y: Any, samples: int, call: str) -> None:
        self.model, self.found, self.samples, self.y, self.call = model, found, samples, y, call
        self.foreign = is_framework_model(model)
        self._counted = None if self.foreign else counted_labels(loss, y)
        outputs, tree = output_leaves(found.output, aside=True)
        check_outputs(call, outputs, tree.names)
        self._used = list(range(len(outputs)))
        self._computed_in: torch.dtype | None = None  # the loss's own dtype, which may be coarser than the output's
        self._lin = self._gradient(loss)
        if not self._used:
            raise NotDifferentiableError(f"{call}: the loss does not depend on the model's output.")
        self.leaves = [outputs[i] for i in self._used]
        for i, leaf in zip(self._used, self.leaves, strict=True):
            if leaf.ndim == 0 or leaf.numel() % samples or (self.foreign and leaf.shape[0] != samples):
                came = f"of shape {tuple(leaf.shape)} for {samples} samples"
                raise InputError.of(tree.names[i], came, "its first axis must be the samples")
        self.entries = sum(leaf.numel() // samples for leaf in self.leaves)
        self.like = self.leaves[0].detach().new_empty(()).expand(samples, self.entries)  # takes no memory

    @restoring
    def _gradient(self, loss: Any) -> Linearized:
        """Return the gradient of the loss by the output, linearised there, and note what it depends on."""
        if self.foreign:
            return self.model.record_at_output(self.found, loss, self.y, self.call).lin
        outer = record_at_outputs(self.found, loss_of_output(loss, recordable(self.y, False)), loss, self.call)
        reached = outer.lin.graph_info.leaves
        self._used = [i for i, leaf in enumerate(outer.lin.leaves) if id(leaf) in reached]
        self._computed_in = outer.lin.outputs[0].dtype
        return gradient_linearization(outer, self.call) if self._used else outer.lin

    @restoring
    def output(self) -> Any:
        """Return the recorded output `(n, entries)`, linearised by the parameters, of a torch model."""
        with recording():
            joined = self._joined([self.found.lin.outputs[i] for i in self._used])
        return self.found.lin.to([joined], ["output"], self.call)

    def product(self, rows: Tensor) -> Tensor:
        """Return the Hessian times `(n, entries)`."""
        full = self._lin.codomain.split(rows.new_zeros(1, self._lin.codomain.dim))
        parts = rows.split([leaf.numel() // self.samples for leaf in self.leaves], 1)
        for i, part, leaf in zip(self._used, parts, self.leaves, strict=True):
            full[i] = part.reshape(1, *leaf.shape).to(leaf.dtype)
        found = self._lin.pull_rows(full)
        return self._joined([found[i][0] for i in self._used]).detach()

    @restoring
    def gradient(self, loss: Any) -> Tensor:
        """Return the gradient `(n, entries)` of another loss by the output."""
        if self.foreign:
            at = self.model.record_at_output(self.found, loss, self.y, self.call)
            parts = at.lin.domain.unflatten(self.model.slope(at))
        else:
            finish = loss_of_output(loss, recordable(self.y, False))
            lin = record_at_outputs(self.found, finish, loss, self.call).lin
            parts = [rows[0] for rows in lin.pull_rows([torch.ones_like(lin.outputs[0]).unsqueeze(0)])]
        return self._joined([parts[i] for i in self._used]).detach()

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return outputs `(n, entries)`, in the dtype of the first."""
        rows = [part.reshape(self.samples, -1) for part in parts]
        return rows[0] if len(rows) == 1 else torch.cat([row.to(self.leaves[0].dtype) for row in rows], 1)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return every sample's Hessian, `(n, entries, entries)`."""
        matrix = torch.empty(*self.like.shape, self.entries, dtype=dtype, device=self.like.device)
        for i in range(self.entries):
            unit = torch.zeros_like(self.like)
            unit[:, i] = 1
            matrix[:, :, i] = self.product(unit)
        return matrix

    def hessian(self) -> Elementwise | Softmax | Blocks:
        """Return the Hessian in the simplest form that gives its products.

        Raises:
            NonFiniteError: It holds NaN or Inf.
            InputError: The loss mixes samples, is not convex in the output, or is of a kind too large for its blocks.
        """
        probe = private_noise(self.like, 1)
        image = self.product(probe)
        if not is_finite(image):
            raise NonFiniteError(f"{self.call}: in the loss's second derivative by the output, some are NaN or Inf.")
        self._refuse_mixing(probe)
        scale = float(image.norm())
        allowed = max(few_operations_tolerance(dtype) for dtype in (probe.dtype, self._computed_in or probe.dtype))
        signs = torch.where(private_noise(probe, 2) >= 0, 1.0, -1.0).to(probe)
        diagonal = self.product(signs) * signs
        if self.entries == 1 or float((diagonal * probe - image).norm()) <= allowed * scale:
            return Elementwise(_root(diagonal))
        return self._softmax(probe, image, allowed * scale) or self._blocks()

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

    def _blocks(self) -> Blocks:
        if self.samples * self.entries**2 > _FULL_ENTRIES:
            came = f"one whose Hessian by {self.entries} outputs is neither diagonal nor that of a softmax"
            needed = f"blocks of {self.entries} × {self.entries} for {self.samples} samples are too many"
            raise InputError.of("loss", came, needed, "Use smaller batches, or the empirical Fisher matrix.")
        matrix = self.matrix()
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        largest = values.abs().max()
        # Negative by 100 roundings of float32 or more; a loss that is not convex is so by a share of 1.
        if float(values.min()) < -1e-5 * float(largest):
            raise _not_convex(float(values.min()))
        # Fifty roundings of float64, in which blocks are decomposed: smaller ones are zero.
        kept = (values > 1e-14 * largest).any(0)
        kept[-1] = True
        root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1))[..., kept].to(self.like.dtype)
        return Blocks(root, matrix.diagonal(dim1=1, dim2=2) != 0)

    def _refuse_mixing(self, probe: Tensor) -> None:
        half = torch.arange(self.samples, device=probe.device) % 2 == 0
        if bool(self.product(probe * half.unsqueeze(1))[~half].any()):
            came = "one that mixes samples"
            raise InputError.of("loss", came, f"{self.call} needs a mean or a sum over samples", "Use `CG()`.")


def _root(diagonal: Tensor) -> Tensor:
    # Negative by 100 roundings of float32 or more; a loss that is not convex is so by a share of 1.
    if float(diagonal.min()) < -1e-5 * float(diagonal.abs().max()):
        raise _not_convex(float(diagonal.min()))
    return diagonal.clamp_min(0).sqrt()


def _not_convex(lowest: float) -> InputError:
    came = f"not convex in the model's output (curvature {lowest:.3g} along one direction)"
    return InputError.of("loss", came, "EKFAC needs a positive one", "Use EKFAC(fisher='empirical') or `CG()`.")
