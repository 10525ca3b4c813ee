"""Jacobians along paths: taken at many points at once, as Jacobians of samples, and summed in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._finite import where_first
from .._progress import tick
from .._runtime.memory import Budget
from .._torch.protocol import SampleJacobians
from ..errors import NonFiniteError
from ._baselines import Paths

# Points to a batch at least. What is proved of a model holds for one number of samples, so batches come in few sizes:
# powers of two from here on.
_FEWEST = 8


@dataclass
class PathJacobians:
    """Jacobians along paths, summed into those of the samples that the paths lead to.

    Attributes:
        paths: The paths.
        most: How many points are taken at a time.
        batch_size: Most points to a sweep.
        jacobian: Averaged Jacobians so far, `J[output][input]`, each `(n, entries of output, entries of input)`.
        values: The same times sample minus baseline; None where the steps of all paths to a sample are the same.
        mode: `"reverse"`, `"forward"`, `"split"` or `"auto"`.
        budget: Bytes that points may take.
        check_finite: Refuse points at which an output or a derivative is NaN or Inf.
    """

    paths: Paths
    most: int
    batch_size: int
    jacobian: list[list[Tensor]]
    values: list[list[Tensor]] | None
    mode: str
    budget: Budget
    check_finite: bool
    alone: bool = field(init=False, default=True)  # how the last Jacobians were taken
    _warned: bool = field(init=False, default=False)
    _held: tuple[Tensor, list[list[Tensor]]] = field(init=False)

    def slopes(self, path: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and slopes at points, as in `Edges`, and keep their Jacobians until the next call."""
        many, found = len(path), self._taken(path, t)
        if self.check_finite:
            self._refuse_lost(found, path, t)
        kept = [
            [b[:many].reshape(many, -1, start[:1].numel()) for b, start in zip(row, self._inputs(), strict=True)]
            for row in found.blocks
        ]
        self._held = path, kept
        vectors = [_directions(step) for step in self.paths.steps(path)]
        products = [sum(torch.bmm(b.double(), v) for b, v in zip(row, vectors, strict=True)) for row in kept]
        joined = torch.cat([torch.as_tensor(product) for product in products], 1).cpu()
        tick(many)
        return _joined([o[:many] for o in found.output]), joined.transpose(1, 2)

    def outputs(self, path: Tensor, t: Tensor) -> Tensor:
        """Return outputs at points, `(points, outputs)`, taken as Jacobians were before."""
        parts = []
        for rows in torch.arange(len(path)).split(self.most):
            some, at = self._padded(path[rows], t[rows])
            found = self.paths.points(some, at).outputs(self.batch_size, self.alone)
            parts.append(_joined([o[: len(rows)] for o in found]))
        return torch.cat(parts)

    def add(self, weights: Tensor) -> None:
        """Add the Jacobians of the last points to those of their samples."""
        path, blocks = self._held
        used = weights.nonzero().squeeze(1)
        if not len(used):
            return
        rows, weights = self.paths.rows(path[used]), weights[used] / self.paths.baselines
        steps = self.paths.steps(path[used]) if self.values is not None else []
        for out, row in enumerate(blocks):
            for leaf, block in enumerate(row):
                target = self.jacobian[out][leaf]
                part = block[used.to(block.device)].to(target.dtype) * weights.to(target).view(-1, 1, 1)
                target.index_add_(0, rows.to(target.device), part)
                if self.values is not None:
                    part *= steps[leaf].reshape(len(used), 1, -1)
                    self.values[out][leaf].index_add_(0, rows.to(target.device), part)

    def drop(self, path: Tensor) -> Tensor:
        """Take back what was added for paths and for others to the same samples, and return all of these paths."""
        rows = self.paths.rows(path).unique()
        for block in (b for blocks in (self.jacobian, self.values or []) for row in blocks for b in row):
            block[rows.to(block.device)] = 0
        return (rows.unsqueeze(1) * self.paths.baselines + torch.arange(self.paths.baselines)).flatten()

    def _taken(self, path: Tensor, t: Tensor) -> SampleJacobians:
        samples = self.paths.points(*self._padded(path, t))
        if self._warned and samples.fallback == "warn":
            samples = samples.over(samples.values, fallback="silent")
        found = samples.jacobians(budget=self.budget, mode=self.mode)
        self.alone = found.alone
        self._warned |= self.alone and samples.count > 1
        return found

    def _padded(self, path: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return points with the last one repeated up to a common number, unless each is taken alone."""
        size = max(_FEWEST, 1 << (len(path) - 1).bit_length())
        if (self._warned and self.alone) or size > max(self.most, self.batch_size):
            return path, t
        return tuple(torch.cat([part, part[-1:].expand(size - len(part))]) for part in (path, t))  # pyright: ignore

    def _inputs(self) -> list[Tensor]:
        return [self.paths.samples.values[place] for place in self.paths.samples.inputs]

    def _refuse_lost(self, found: SampleJacobians, path: Tensor, t: Tensor) -> None:
        """Refuse values that are not finite.

        Raises:
            NonFiniteError: There is one; the message names the sample, and where on its path it is.
        """
        blocks = [] if found.sure else [(f"the Jacobian of {n}", b) for n, r in _named(found) for b in r]
        for what, tensor in [*zip(found.output_tree.names, found.output, strict=True), *blocks]:
            lost = ~tensor[: len(path)].reshape(len(path), -1).isfinite().all(1)
            if bool(lost.any()):
                first = int(lost.nonzero()[0])
                sample = int(self.paths.rows(path[first]))
                place = f"at {float(t[first]):.3g} of the way from the baseline to sample {sample}"
                raise NonFiniteError(f"{found.call}: in {what} {place}, {where_first(tensor[first])}.")


def _named(found: SampleJacobians) -> Any:
    return zip(found.output_tree.names, found.blocks, strict=True)


def _directions(step: Tensor) -> Tensor:
    """Return steps as they are and weighted at random, `(points, entries, 2)`."""
    flat = step.reshape(len(step), -1).double()
    weights = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0), dtype=flat.dtype)
    return torch.stack([flat, flat * weights.to(flat.device)], 2)


def _joined(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([o.detach().reshape(len(o), -1).cpu().double() for o in outputs], 1)
