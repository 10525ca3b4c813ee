"""Integrated Jacobians of samples: where they are summed, how complete they are, and the result made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._contributions import Contributions, verified, worst
from .._runtime.agreement import coarsest
from .._runtime.memory import SMALL, budget_bytes, ensure_fits, given_tensors, size_of
from .._torch.protocol import SampleJacobians
from ._adaptive import AdaptiveIntegration, PathIntegrals, fixed
from ._baselines import Paths
from ._integrand import PathJacobians
from ._layers import source_of

# The largest gap of a sample's contributions, relative to its largest change of an output. In double precision six
# digits; in single precision three, which take a tenth of the steps where there are kinks, and in half precision one.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 1e-1
_ROUNDINGS = 16.0  # of a forward: nets of up to 50 layers were off by less
_TODO = "Pass fewer samples at a time, pick outputs with `outputs=` or `target=`, or raise `budget=`."


@dataclass
class Integral:
    """Jacobians of samples, integrated along paths.

    Attributes:
        result: Where Jacobians and outputs are written.
        integrand: Sums Jacobians along paths.
        tolerance: The largest gap of a sample, relative to its scale.
        found: What is known of the paths; nothing before they are integrated along.
        gaps: The largest gap of each sample relative to its scale, once that is known.
        missed: The same in units of what is allowed.
    """

    result: SampleJacobians
    integrand: PathJacobians
    tolerance: float
    found: PathIntegrals
    gaps: Tensor = field(default_factory=lambda: torch.zeros(0))
    missed: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(cls, paths: Paths, batch_size: int, tolerance: float | None, options: Mapping[str, Any]) -> Integral:
        """Return integrals that are zero so far.

        Args:
            paths: The paths.
            batch_size: Most points to a sweep.
            tolerance: The largest gap, None for the usual one.
            options: Those of the call.

        Raises:
            MemoryBudgetError: Jacobians and contributions do not fit.
        """
        result = _prepared(paths, options)
        wanted = _TOLERANCE.get(result.output[0].dtype, _COARSE) if tolerance is None else float(tolerance)
        found = PathIntegrals.none(paths.count, sum(map(_entries, result.output)))
        return cls(result, _integrand(paths, result, batch_size, options), wanted, found)

    @property
    def paths(self) -> Paths:
        """The paths."""
        return self.integrand.paths

    def integrate(self, nodes: int | None, max_steps: int) -> None:
        """Integrate by so many nodes of each path, or by as many as it needs, at most `max_steps`."""
        sizes = [_entries(output) for output in self.result.output]
        if not self.found.total.numel():
            return
        if nodes is not None:
            self.found = fixed(self.integrand, self.paths.count, nodes, sizes)
            return
        kinds = [self.paths.samples.values[place].dtype for place in self.paths.samples.inputs]
        shortest = self._rounding(kinds)
        adaptive = AdaptiveIntegration(self.integrand, sizes, self.tolerance, self._rounding(), shortest, max_steps)
        self.found = adaptive.integrate(self.paths.count)

    def contributions(self, begin: str) -> Contributions:
        """Return the result; paths begin at what is said."""
        result, many, sets = self.result, self.paths.samples.count, self.paths.baselines
        first, final = (part.view(many, sets, part.shape[1]) for part in (self.found.first, self.found.final))
        sizes = [_entries(output) for output in result.output]
        pairs = zip(first.mean(1).split(sizes, 1), final[:, :1].sum(1).split(sizes, 1), strict=True)
        biases, added, checks = [], [], []
        values = self._values()
        for output, row, (bias, end) in zip(result.output, values, pairs, strict=True):
            output.copy_(end.view(output.shape))
            biases.append(torch.empty_like(output).copy_(bias.view(output.shape)))
            added.append(sum(_matrices(value, end.shape[1]).double().sum(2).cpu() for value in row) + 0 * end)
            checks.append(verified(end, bias, added[-1]))
        self._compare(final[:, :1].sum(1) - first.mean(1) - torch.cat(added, 1))
        build = result.output_tree.build
        return Contributions(
            result.arranged(values),
            build(biases),
            build(result.output),
            result.arranged(),
            worst(checks),
            None,
            self._notes(begin),
            "integrated",
            steps=int(self.found.steps.max()) if many else 0,
        )

    def _compare(self, gaps: Tensor) -> None:
        """Note how large the gaps of samples are, in units of what is allowed."""
        many, sets = self.paths.samples.count, self.paths.baselines
        if gaps.numel():
            scale = self.found.scale.view(many, sets, -1).mean(1)
            outputs = torch.maximum(self.found.first.abs(), self.found.final.abs()).view(many, sets, -1).mean(1)
            rounding = self._rounding() * torch.maximum(outputs.amax(1, keepdim=True), scale)
            self.gaps = (gaps.abs() / scale).amax(1)
            self.missed = (gaps.abs() / torch.maximum(self.tolerance * scale, rounding)).amax(1)

    @property
    def failure(self) -> str | None:
        """Which samples do not add up, in words; None where all do."""
        many = int((self.missed > 1).sum())
        if not many:
            return None
        worst = int(self.missed.argmax())
        first = worst * self.paths.baselines
        steps = int(self.found.steps[first : first + self.paths.baselines].max())
        return (
            f"the contributions of {many:,} of {len(self.missed):,} samples do not add up to {self.tolerance:.0e} of a "
            f"sample's largest change of an output: those of sample {worst} lack {float(self.gaps[worst]):.1e} of it "
            f"after {steps:,} steps"
        )

    def _notes(self, begin: str) -> tuple[str, ...]:
        if not self.gaps.numel():
            return ()
        low, high = int(self.found.steps.min()), int(self.found.steps.max())
        steps = f"{low:,}{'' if low == high else f' to {high:,}'} steps a path"
        gap = f"completeness gap at most {float(self.gaps.max()):.1e} of a sample's largest change of an output"
        failure = self.failure
        return f"from {begin}, {steps}", gap, *([] if failure is None else [failure])

    def _values(self) -> list[list[Tensor]]:
        """Return contributions as they are given out, and put Jacobians where they are given out."""
        found: list[list[Tensor]] = []
        steps = self.paths.steps(torch.arange(self.paths.count)) if self.integrand.values is None else []
        for out, (row, blocks) in enumerate(zip(self.integrand.jacobian, self.result.blocks, strict=True)):
            found.append([])
            for leaf, (jacobian, block) in enumerate(zip(row, blocks, strict=True)):
                if jacobian.dtype != block.dtype:
                    block.copy_(jacobian.view(block.shape))
                sums = self.integrand.values
                value = sums[out][leaf] if sums is not None else jacobian * steps[leaf].flatten(1).unsqueeze(1)
                found[-1].append(value.view(block.shape).to(block.dtype))
        return found

    def _rounding(self, given: Sequence[torch.dtype] = ()) -> float:
        """Return what rounding may add up to, relative to numbers of these dtypes and of those that they go through."""
        dtypes = given or [output.dtype for output in self.result.output]
        return _ROUNDINGS * torch.finfo(coarsest([self.result.coarse, *dtypes]) or torch.float32).eps


def _entries(output: Tensor) -> int:
    return output.shape[1:].numel()


def _prepared(paths: Paths, options: Mapping[str, Any]) -> SampleJacobians:
    """Return Jacobians of the samples that paths lead to, zero so far.

    Raises:
        MemoryBudgetError: They and contributions of the same size do not fit.
    """
    samples, budget = paths.samples, options.get("budget")
    result = SampleJacobians(samples.call, samples.count, budget, given_tensors(options.get("out")))
    if source_of(options.get("at")) is None:
        result.input_tree, result.inputs = samples.input_tree.map_held(lambda _: None), samples.inputs
    one = [v[:1] if samples.count else v.new_zeros((1, *v.shape[1:])) for v in samples.values]
    with samples.explained():
        run = samples.runner.run(one)
    each = sum(leaf.numel() for leaf in run.lin.leaves) * sum(size_of(output) for output in run.lin.outputs)
    parts = {f"{name} of {samples.count:,} samples": each * samples.count for name in ("the Jacobian", "contributions")}
    ensure_fits(samples.call, parts, budget, one[0].device, _TODO)
    result.prepare(run, alone=True)
    for block in (b for row in result.blocks for b in row):
        block.zero_()
    return result


def _integrand(paths: Paths, result: SampleJacobians, batch_size: int, options: Mapping[str, Any]) -> PathJacobians:
    """Return the Jacobians along paths, to be summed into the result, or into wider tensors if that is coarse."""
    pairs = zip(result.output, result.blocks, strict=True)
    jacobian = [[_summed(b, _entries(output)) for b in row] for output, row in pairs]
    values = None if paths.baselines == 1 else [[torch.zeros_like(b) for b in row] for row in jacobian]
    blocks, budget = [b for row in jacobian for b in row], options.get("budget")
    # Points are held as they come, weighted, and in double precision. As many bytes as the result has are requested
    # anyway; less than that need not be counted.
    each = sum(b.shape[1:].numel() * (3 * b.element_size() + 8) for b in blocks)
    held = sum(map(size_of, blocks))
    room = max(SMALL, held)
    if budget is not None:
        budget = max(1, budget_bytes(budget, blocks[0].device) - 2 * held)
        room = min(room, budget // 2)
    most = max(1, min(batch_size, room // max(1, each)))
    mode, check_finite = options.get("mode", "auto"), options.get("check_finite", True)
    return PathJacobians(paths, most, batch_size, jacobian, values, mode, budget, check_finite)


def _summed(block: Tensor, outputs: int) -> Tensor:
    """Return the tensor that Jacobians are summed in, `(n, outputs, inputs)`: itself, or one of single precision."""
    return _matrices(block, outputs).to(torch.promote_types(block.dtype, torch.float32))


def _matrices(block: Tensor, outputs: int) -> Tensor:
    """Return `(n, *out, *in)` as `(n, outputs, inputs)`, also where there are none."""
    return block.view(len(block), outputs, block.shape[1:].numel() // max(1, outputs))
