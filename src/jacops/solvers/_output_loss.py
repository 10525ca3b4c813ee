"""A loss as a function of a model's output, and its Hessian there in the simplest form.

What kind of Hessian it is, is read off products with it, never off the loss's name: diagonal (squared error, logistic),
that of a softmax up to a factor for each position (cross-entropy, weighted, with ignored or smoothed targets), or
small blocks in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from .._finite import check_outputs
from .._ladder.names import Fact
from .._ladder.protocol import Linearized, is_framework_model
from .._recorded_loss import LossOf, loss_of_output, recordable
from .._runtime.agreement import worst_disagreement
from .._runtime.contexts import autocast_on, recording
from .._runtime.restoring import restoring
from .._torch.protocol import (
    Elementwise,
    FullBlocks,
    KnownSoftmax,
    ProbedHessian,
    RowLosses,
    Softmax,
    counted_labels,
    gradient_linearization,
    label_settings,
    record_at_outputs,
    softmax_of_labels,
    torch_loss,
)
from .._trees import output_leaves
from ..errors import InputError, NonFiniteError, NotDifferentiableError

_FULL_ENTRIES = 2**26  # 512 MiB of blocks, which are held in float64


@final
class LossAtOutput:
    """A loss as a function of a model's recorded output, of which each sample has some entries.

    Args:
        model: The model.
        found: Its recorded output, in any framework.
        of: The loss and its target.
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

    def __init__(self, model: Any, found: Any, of: LossOf, samples: int, call: str) -> None:
        self.model, self.found, self.samples, self.call = model, found, samples, call
        self.y, self._record, loss = of.y, of.record, of.loss
        self.foreign = is_framework_model(model)
        self._loss = loss
        outputs, tree = output_leaves(found.output, aside=True) if self.foreign else (found.lin.outputs, found.tree)
        check_outputs(call, outputs, tree.names)
        self._used = list(range(len(outputs)))
        self._computed_in: torch.dtype | None = None  # the loss's own dtype, which may be coarser than the output's
        alone = not self.foreign and len(outputs) == 1 and found.output is outputs[0] and not autocast_on(outputs)
        # What is known of torch's own cross-entropy takes no recording of it.
        self._settings = label_settings(loss, of.y, found.output) if alone else None
        if self._settings is None:
            self._at = self._recorded()
        if not self._used:
            raise NotDifferentiableError(f"{call}: the loss does not depend on the model's output.")
        self.leaves = [outputs[i] for i in self._used]
        for i, leaf in zip(self._used, self.leaves, strict=True):
            if leaf.ndim == 0 or leaf.numel() % samples or (self.foreign and leaf.shape[0] != samples):
                came = f"of shape {tuple(leaf.shape)} for {samples} samples"
                raise InputError.of(tree.names[i], came, "its first axis must be the samples")
        self.entries = sum(leaf.numel() // samples for leaf in self.leaves)
        self.like = self.leaves[0].detach().new_empty(()).expand(samples, self.entries)  # takes no memory

    @cached_property
    def _at(self) -> Any:
        """The loss by the output, recorded there."""
        return self._recorded()

    @restoring
    def _recorded(self) -> Any:
        """Return the loss by the output, recorded there, and note what it depends on."""
        loss = self._loss
        if self.foreign:
            return self.model.record_at_output(self.found, loss, self.y, self.call)
        if self._record is not None:
            outer = self._record(self.found, self.y, self.call)
        else:
            outer = record_at_outputs(self.found, loss_of_output(loss, recordable(self.y, False)), loss, self.call)
        reached = outer.lin.graph_info.leaves
        self._used = [i for i, leaf in enumerate(outer.lin.leaves) if id(leaf) in reached]
        self._computed_in = outer.lin.outputs[0].dtype
        return outer

    @cached_property
    def _counted(self) -> Tensor | None:
        """Which labels count, where that is known."""
        return None if self.foreign else counted_labels(self._loss, self.y)

    @cached_property
    def _lin(self) -> Linearized:
        """The gradient of the loss by the output, linearised there."""
        return self._at.lin if self.foreign else gradient_linearization(self._at, self.call)

    @restoring
    def output(self) -> Any:
        """Return the recorded output `(n, entries)`, linearised by the parameters, of a torch model."""
        lin = self.found.lin
        if len(lin.outputs) == 1 and lin.outputs[0].shape == self.like.shape:  # the same graph, which is known
            return lin.to(lin.outputs, ["output"], self.call)
        with recording(advance=True):
            joined = self._joined([lin.outputs[i] for i in self._used])
        return lin.to([joined], ["output"], self.call)

    def product(self, rows: Tensor) -> Tensor:
        """Return the Hessian times `(n, entries)`."""
        return self._products(rows.unsqueeze(0))[0]

    def _products(self, rows: Tensor) -> Tensor:
        """Return the Hessian times `(k, n, entries)`."""
        many = len(rows)
        full = self._lin.codomain.split(rows.new_zeros(many, self._lin.codomain.dim))
        parts = rows.split([leaf.numel() // self.samples for leaf in self.leaves], 2)
        for i, part, leaf in zip(self._used, parts, self.leaves, strict=True):
            full[i] = part.reshape(many, *leaf.shape).to(leaf.dtype)
        found = self._lin.pull_rows(full)
        joined = [found[i].reshape(many, self.samples, -1).to(self.leaves[0].dtype) for i in self._used]
        return torch.cat(joined, 2).detach()

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

    def slopes(self, own: Any, shares: Tensor, mean: bool, terms: Tensor, total: float) -> Tensor:
        """Return the gradient `(n, entries)` of every sample's own loss by the output, times `terms / sqrt(total)`.

        That of the whole loss is made of them, which is compared with `own` once for a graph, and now and then.

        Args:
            own: The sum of the samples' own losses, as a loss.
            shares: What each sample adds to the denominator of a mean, `(n,)`; zero where it has no loss.
            mean: The whole loss is a mean, not a sum.
            terms: Of how many terms each sample's loss is the mean, `(n,)`.
            total: Of the whole loss.
        """
        if self.foreign:
            return _times(self.gradient(own), terms, total)
        lin, claim = self._at.lin, (Fact.ROWS_OF_LOSS, mean)
        slope = lin.gradient([torch.ones_like(lin.outputs[0])])
        whole = self._joined([slope[i] for i in self._used]).detach()
        due = self._due(*claim)
        if mean and terms is shares and not due:  # a part of the whole's slope is a sample's own times its share
            return whole * (float(shares.sum()) / math.sqrt(total))
        factors = torch.where(shares > 0, shares.sum() / torch.where(shares > 0, shares, 1.0), 0.0) if mean else shares
        if due:
            plain = self.gradient(own)
            if not worst_disagreement([(_times(whole, factors), plain)]) <= lin.tolerance:
                return _times(plain, terms, total)
            lin.proofs.remember(*claim)
        return _times(whole, factors * terms, total)

    def _due(self, *claim: Hashable) -> bool:
        """Return whether a claim about a torch loss has to be looked at: it is not proved, or was long ago."""
        proofs = self._at.lin.proofs
        # Nothing that a loss of torch's own computes is hidden from its graph, by which proofs are kept.
        return proofs.needs(*claim) or (torch_loss(self._loss) is None and proofs.spot_due(str(claim[0])))

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

    def hessian(self, losses: RowLosses | None = None) -> Elementwise | Softmax | FullBlocks:
        """Return the Hessian in the simplest form that gives its products.

        That of a softmax is read off the labels where it was found to be so for this graph, and now and then again.

        Args:
            losses: What the loss's rows are known to be, where they count alike.

        Raises:
            NonFiniteError: It holds NaN or Inf.
            InputError: The loss mixes samples, is not convex in the output, or is of a kind too large for its blocks.
        """
        expected = None if losses is None else self._labelled(losses)
        if expected is not None and not expected.is_due():
            return expected.form
        found = ProbedHessian(self._products, self.like, self.leaves, self._computed_in)
        if not found.is_finite:
            raise NonFiniteError(f"{self.call}: in the loss's second derivative by the output, some are NaN or Inf.")
        if found.mixes:
            came = "one that mixes samples"
            raise InputError.of("loss", came, f"{self.call} needs a mean or a sum over samples", "Use `CG()`.")
        diagonal = found.diagonal()
        if diagonal is not None:
            return Elementwise(_root(diagonal))
        if expected is not None and expected.agrees(found):
            return expected.form
        return found.softmax(self._counted) or self._blocks()

    def _labelled(self, losses: RowLosses) -> KnownSoftmax | None:
        """Return the Hessian that labels make it expected to have, where they fit the output."""
        if self.foreign:
            return None
        proofs = self._at.lin.proofs if self._settings is None else self.found.lin.proofs
        counted = self._counted if self._settings is None else None
        return softmax_of_labels(losses, self.y, self.leaves, proofs, counted, self._settings)

    def of_labels(self, losses: RowLosses, computed: Callable[[], Tensor]) -> Tensor:
        """Return the slopes of the samples' own losses that `slopes` does: from the labels, where that was proved.

        Args:
            losses: Of the rows.
            computed: Computes them.
        """
        known = None if self._settings is None else self._labelled(losses)
        if known is None:
            return computed()
        found = known.form.at(self.y)
        if known.is_due(Fact.ROWS_OF_LOSS):
            plain = computed()
            if not worst_disagreement([(found, plain)]) <= self.found.lin.tolerance:
                return plain
            known.proved(Fact.ROWS_OF_LOSS)
        return found

    def _blocks(self) -> FullBlocks:
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
        return FullBlocks(root, matrix.diagonal(dim1=1, dim2=2) != 0)


def _times(slopes: Tensor, factors: Tensor, total: float = 1.0) -> Tensor:
    return slopes * (factors / math.sqrt(total)).to(slopes).unsqueeze(1)


def _root(diagonal: Tensor) -> Tensor:
    # Negative by 100 roundings of float32 or more; a loss that is not convex is so by a share of 1.
    if float(diagonal.min()) < -1e-5 * float(diagonal.abs().max()):
        raise _not_convex(float(diagonal.min()))
    return diagonal.clamp_min(0).sqrt()


def _not_convex(lowest: float) -> InputError:
    came = f"not convex in the model's output (curvature {lowest:.3g} along one direction)"
    return InputError.of("loss", came, "EKFAC needs a positive one", "Use EKFAC(fisher='empirical') or `CG()`.")
