"""The problem: a private working copy of the model, evaluated and linearised wherever the steps lead."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._extras.lie import layout as lie_layout
from .._finite import require_finite
from .._requirements import check_choice
from .._runtime.agreement import identical
from .._runtime.contexts import arithmetic, out_of_inference, private_noise, recording
from .._runtime.restoring import restoring
from .._torch.protocol import (
    Linearization,
    ModelRun,
    Recording,
    check_state,
    jacobian_blocks,
    parameter_names,
    replicate,
    split_input,
    structure_of,
)
from .._trees import flatten, output_leaves
from .._words import JacobianForm
from ..errors import (
    MemoryBudgetError,
    ModelStateError,
    NonFiniteError,
    NotDifferentiableError,
)
from ..sparse import SparseJacobian, SparsePlan
from ..sparse._point import RecordedPoint, point_of
from ..sparse._remembered import kept_plan, new_plan
from ._bounds import bounds_of
from ._fit_pattern import FitPattern
from ._functions import FunctionModule, called
from ._implicit import Minima
from ._layout import Layout, ParameterPart, Values, layout_of
from ._residuals import Residuals, paired, residuals_of
from ._scaling import scaling_of
from ._system import LinearizedFit

_DENSE_ENTRIES = 10_000  # up to so many, dense fits of 5 to 20 steps took no longer than a plan and sparse steps
_DENSE_COLUMNS = 64  # columns, or rows, that one batched pass gives: a plan's sweeps cannot be fewer passes
_NONE = np.zeros(0)
_INTO_LEAF = re.compile(r"leaf Variable that requires grad .* in-place")
_FULL = 0.1  # rows fuller than this save less than a factor of ten, which sparse factorisation loses to dense


def _moved_by_charts(parts: tuple[ParameterPart, ...], held: Mapping[str, Tensor], J: np.ndarray) -> np.ndarray:
    """Return a Jacobian by stored numbers as one by tangents: times one small block per element."""
    found, start = [], 0
    for part in parts:
        own, start = J[:, start : start + part.stored], start + part.stored
        if part.chart:
            slots = own.reshape(len(J), part.lead.numel(), -1).swapaxes(0, 1)
            own = np.matmul(slots, part.moves(held[part.name])).swapaxes(0, 1).reshape(len(J), -1)
        found.append(own)
    return np.concatenate(found, 1)


def _fullness(lin: Linearization) -> float:
    """Return how full a few rows of the Jacobian are; of sparse ones, at most how full, by one backward pass."""
    chosen = [(i, e) for i, o in enumerate(lin.outputs) if (n := o.numel()) for e in sorted({0, n // 2, n - 1})]

    def share(entries: list[tuple[int, int]]) -> float:
        seeds: dict[int, Tensor] = {}
        for number, (index, entry) in enumerate(entries):
            seed = seeds.setdefault(index, torch.zeros_like(lin.outputs[index]).contiguous())
            seed.view(-1)[entry] = 1 + number / 7  # different numbers, so that rows do not cancel
        found = lin.pull([seeds.get(i) for i in range(len(lin.outputs))])
        return sum(int(g.count_nonzero()) for g in found if g is not None) / lin.domain.dim

    together = share(chosen) if chosen else 0.0
    # No row is fuller than several together.
    return together if together <= _FULL else sum(share([one]) for one in chosen) / len(chosen)


def _copied(value: Any) -> Any:
    return out_of_inference(value).detach().clone() if isinstance(value, Tensor) else value


class FitProblem:
    """A model in private, its parameters wherever the steps lead.

    Attributes:
        layout: Which parameters move and how.
        scaling: Scales of their columns.
        bounds: The box they stay in, if any.
        residuals: Outputs minus targets, weighted.
        evaluations: Forward passes so far.
        linearisations: Jacobians so far.
        route: How Jacobians are taken, and why.
        plan: The sparse plan, where one is used.
        may_be_dense: Whether the caller left it open how Jacobians are taken.
    """

    def __init__(self, model: nn.Module, value: Any, call: str, given: dict[str, Any]) -> None:
        structure = structure_of(model)
        check_state(structure)
        self.original = {n: p for n, p in structure.differentiable.items() if p.requires_grad}
        if not self.original:
            todo = "Call `.requires_grad_()` on what is to be solved for."
            raise ModelStateError.of("model", "without parameters that require grad", "some must move", todo)
        for name, start in self.original.items():
            require_finite(start.detach().as_subclass(Tensor), f"{call}: at the start, in the parameter {name}")
        self.layout: Layout = layout_of(self.original, given["manifolds"], given["fixed"])
        self.scaling = scaling_of(given.get("x_scale", "jac"), self.layout)
        self.bounds = bounds_of(given.get("bounds"), self.layout, self.original)
        self.call, self.value, self.given = call, value, given
        module = structure.model
        self.owner = module.function if isinstance(module, FunctionModule) else module
        self.work = replicate(module, wrt=self.original, cloned=True).module
        self.held = parameter_names(self.work)
        self._wanted = self.values()
        self.evaluations = self.linearisations = 0
        self.route, self.may_be_dense = "", isinstance(given["jacobian"], str) and given["jacobian"] == "auto"
        self.plan: Any = None
        self._here: RecordedPoint | SparseJacobian | None = None  # recorded, or evaluated, where the parameters are
        self._kept = self._kept_plan(given["jacobian"])
        outputs, tree = output_leaves(self._forward() if self._here is None else self._here.output)
        self.residuals: Residuals = residuals_of(outputs, tree, given, call)
        self._choose(given["jacobian"])

    @restoring
    def values(self) -> Values:
        """Return the parameters as the model has them now."""
        with arithmetic(False):
            return {name: self.held[name].detach().clone() for name in self.original}

    def objective(self, values: Values) -> float:
        """Return the objective at these parameters, by one forward pass, which a sparse plan can go on from."""
        self._set(values)
        if self.plan is None:
            return self.residuals.objective(output_leaves(self._forward())[0])
        self.evaluations += 1
        self._here = point = self.plan.recorded(self.work, self.value, "SparsePlan")
        return self.residuals.objective(output_leaves(point.output)[0])

    def linearised(self, values: Values) -> tuple[float, LinearizedFit, np.ndarray]:
        """Return the objective, the linearised problem and the raw residual, all from one forward pass.

        Raises:
            NonFiniteError: The Jacobian has NaN or Inf.
        """
        self._set(values)
        self.linearisations += 1
        self.evaluations += self._here is None
        outputs, J = self._sparse() if self.plan is not None else self._dense()
        raw = self.residuals.raw(outputs)
        cost, r, lefts = self.residuals.corrected(outputs)
        eps = max(torch.finfo(v.dtype).eps for v in (*outputs, *self.original.values()))
        about: dict[str, Any] = {"eps": eps, "terms": partial(self.residuals.magnitude, outputs)}
        if self.plan is None:
            return cost, LinearizedFit(self.residuals.times(lefts, J), r, self.layout.blocks, **about), raw
        pattern = self._pattern()
        found = pattern.moved.matrix(pattern.weighted(J, lefts))
        return cost, LinearizedFit(found, r, self.layout.blocks, structure=pattern.normal, **about), raw

    def minimum(self, module: nn.Module, values: Values, success: bool) -> Minima:
        """Return a point as a batch of one that is or may be a minimum.

        Args:
            module: What is run: the caller's model, for derivatives by its data, or `work`.
            values: The parameters.
            success: Whether the point is examined.
        """
        one = {name: value.unsqueeze(0) for name, value in values.items()}
        active = None if self.bounds is None else self.bounds.active(one)
        mine = module is self.work

        def outputs(moved: Values, rows: Tensor | None) -> Any:
            value = tree_map(_copied, self.value) if mine else self.value
            tensors, tree = output_leaves(called(module, {name: value[0] for name, value in moved.items()}, value))
            return tree.build([tensor.unsqueeze(0) for tensor in tensors])

        target = tree_map(lambda v: v.unsqueeze(0) if isinstance(v, Tensor) else v, self.given["target"])
        given = {**self.given, "target": target}
        return Minima(one, torch.tensor([success]), self.layout, active, outputs, given, self.call)

    # ---- the model ---------------------------------------------------------------------------------------------

    @restoring
    def _set(self, values: Values) -> None:
        self._wanted = values
        with arithmetic(False):
            for name, value in values.items():
                held, new = self.held[name].detach().as_subclass(Tensor), value.as_subclass(Tensor)
                if not torch.equal(held, new):
                    self._here = None
                    held.copy_(new)

    @restoring
    def _forward(self) -> Any:
        """Run the model on copies of its buffers and inputs, with the same random numbers in every run."""
        self.evaluations += 1
        with recording():
            replica = replicate(self.work)
            leaves, tree = flatten(self.value, "input")
            args, kwargs = split_input(tree.build([_copied(v) for v in leaves]))
            found = replica(args, kwargs)
        for name, wanted in self._wanted.items():
            if not identical(self.held[name].detach().as_subclass(Tensor), wanted.as_subclass(Tensor)):
                raise self._written(f" {name}")
        return found

    def _written(self, name: str) -> ModelStateError:
        came = f"one that writes into its parameter{name} in place"
        todo = "Let it return what it computes, or write into a copy: `x = x.clone()`."
        return ModelStateError.of("model", came, f"{self.call} moves parameters itself, and reads them again", todo)

    def _recorded(self) -> Recording:
        run = ModelRun(self.work, self.value, call=self.call, parameters=lambda name, _: name in self.original)
        try:
            return run.recorded()
        except RuntimeError as error:
            if _INTO_LEAF.search(str(error)):
                raise self._written("s") from error
            raise

    @restoring
    def _dense(self) -> tuple[list[Tensor], np.ndarray]:
        recorded = self._recorded()
        lie = lie_layout(recorded, True)
        with arithmetic(False):
            blocks = jacobian_blocks(recorded.lin)
            blocks = lie(blocks) if lie else blocks
            outputs = [o.detach() for o in recorded.lin.outputs]
            for name, line in zip(recorded.lin.codomain.names, blocks, strict=True):
                for part, block in zip(self.layout.parts, line, strict=True):
                    require_finite(block, f"{self.call}: in the Jacobian of {name} by {part.name}")
            widths = [part.stored for part in self.layout.parts]
            J = np.empty((self.residuals.rows, sum(widths)))
            for rows, line in zip(recorded.lin.codomain.slices, blocks, strict=True):
                many, into = rows.stop - rows.start, zip(line, widths, strict=True)
                parts = [block.reshape(many, width).to("cpu", torch.float64).numpy() for block, width in into]
                np.concatenate(parts, 1, out=J[rows])
        if any(part.chart for part in self.layout.parts):
            J = _moved_by_charts(self.layout.parts, self.held, J)
        kept = self.layout.kept
        return outputs, J if kept is None else J[:, kept]

    # ---- sparse ------------------------------------------------------------------------------------------------

    def _choose(self, jacobian: Any) -> None:
        rows, columns = self.residuals.rows, self.layout.columns
        if isinstance(jacobian, SparsePlan):
            self.plan, self.route = jacobian, "sparse: a plan was given"
            self._check_lie()
            return
        check_choice("jacobian", jacobian, JacobianForm, " or a SparsePlan")
        size = f"{rows} x {columns}"
        if jacobian == "dense":
            self._check_budget(rows, columns)
            self.route = f"dense: {size}, as asked"
            return
        if jacobian == "auto" and (rows * columns <= _DENSE_ENTRIES or min(rows, columns) <= _DENSE_COLUMNS):
            self.route = f"dense: {size} is small"
            return
        plan = self._still_held()
        if plan is None:
            direct = point_of(self._recorded(), self.call)
            if jacobian == "auto" and (share := _fullness(direct.recording.lin)) > _FULL:
                self._check_budget(rows, columns)
                self.route = f"dense: {size}, rows are {share:.0%} full"
                return
            asked = self.owner, self.work, self.value, self._setting(jacobian)
            plan, self._here = new_plan(*asked, direct)
        self.plan, self.route = plan, f"sparse: {size}, {plan.sweeps} sweeps"
        self._check_lie()

    def _setting(self, jacobian: Any) -> Hashable:
        return (jacobian, *((name, p.shape, p.dtype, p.device) for name, p in self.original.items()))

    def _kept_plan(self, jacobian: Any) -> SparsePlan | None:
        """Return the plan of an earlier fit, and record the start as it will be swept."""
        known = kept_plan(self.owner, self.value, self._setting(jacobian)) if isinstance(jacobian, str) else None
        if known is not None:
            self.evaluations += 1
            self._here = known.recorded(self.work, self.value, self.call)
        return known

    def _still_held(self) -> SparsePlan | None:
        """Return the plan of an earlier fit if it holds here, and evaluate it."""
        known, point, self._here = self._kept, self._here, None
        if known is not None and isinstance(point, RecordedPoint):
            self._here = known.at(point, 1, "scipy", self.residuals.importance, redetect=False)
        return None if self._here is None else known

    def _check_budget(self, rows: int, columns: int) -> None:
        """Refuse a dense Jacobian that would not fit.

        Raises:
            MemoryBudgetError: It and two matrices made of it need more than the machine's memory.
        """
        needed, there = 3 * 8 * rows * columns, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            raise MemoryBudgetError(
                f"{self.call}: a dense Jacobian of {rows:,} x {columns:,} needs about {needed / 2**30:.1f} GiB to "
                f"be solved with, and the machine has {there / 2**30:.1f} GiB. Pass `jacobian='sparse'` if it is, "
                "or fewer residuals at a time."
            )

    def _check_lie(self) -> None:
        """Compare the sparse Jacobian of LieTensors with their retraction along one random direction.

        Raises:
            NotDifferentiableError: PyPose's derivative is wrong for how the model uses a LieTensor.
        """
        groups = [part.name for part in self.layout.parts if part.group]
        if not groups:
            return
        values = self.values()
        self._set(values)
        outputs, entries = self._sparse()
        J = self._pattern().moved.matrix(entries)
        direction = private_noise(torch.empty(self.layout.columns, dtype=torch.float64)).numpy()
        eps = max(torch.finfo(o.dtype).eps for o in outputs)
        step = eps ** (1 / 3) * direction / float(np.linalg.norm(direction))
        ends = []
        for sign in (1.0, -1.0):
            self._set(self.layout.moved(values, sign * step))
            ends.append(self.residuals.raw(output_leaves(self._forward())[0]))
        predicted, found = J @ step, (ends[0] - ends[1]) / 2
        size = max(float(np.linalg.norm(predicted)), float(np.linalg.norm(found)), eps)
        # Differences with a step of eps ** (1/3): wrong gradients of LieTensors are off by a share of 1.
        if float(np.linalg.norm(predicted - found)) > max(1e-5, 50 * eps ** (1 / 3)) * size:
            raise NotDifferentiableError(
                f"{self.call}: the sparse Jacobian by {', '.join(groups)} and differences along PyPose's own update "
                "disagree: stored numbers of a LieTensor are read, whose gradient PyPose gets wrong. Pass "
                "`jacobian='dense'`, or read them through Act, Log or matrix()."
            )

    def _sparse(self) -> tuple[list[Tensor], np.ndarray]:
        """Return the outputs and the entries of the Jacobian by free directions, as `_pattern` places them."""
        found, self._here = self._here, None
        if not isinstance(found, SparseJacobian):
            point = found or self.plan.recorded(self.work, self.value, "SparsePlan")
            paired(self.residuals.terms, output_leaves(point.output)[0])
            asked = self.work, self.value, None, "scipy", self.residuals.importance
            found = self.plan._evaluated(*asked, point)
        outputs = [o.detach() for o in output_leaves(found.output)[0]]
        entries = found.matrix.data.astype(np.float64)
        if not np.isfinite(entries).all():
            raise NonFiniteError(f"{self.call}: the Jacobian has NaN or Inf; the output itself is finite.")
        moves = [part.moves(self.held[part.name]) if part.chart else _NONE for part in self.layout.parts]
        return outputs, self._pattern().jacobian(entries, moves)

    def _pattern(self) -> FitPattern:
        """Return how entries of the plan become a Jacobian; kept with the plan for other fits of this layout."""
        assembly, outputs = self.plan.assembly, [(t.rows, t.together) for t in self.residuals.terms]
        free = tuple(None if part.free is None else part.free.tobytes() for part in self.layout.parts)
        key = (tuple((part.name, part.shape, part.chart, part.group) for part in self.layout.parts), free, *outputs)
        found = assembly.kept.get(key)
        if found is None:
            found = FitPattern.of(assembly.ends, assembly.columns, self.layout, outputs)
            assembly.kept.clear()
            assembly.kept[key] = found
        return found
