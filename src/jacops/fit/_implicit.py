r"""Minima that can be differentiated by their data, by the implicit function theorem.

At a minimum the gradient by the free tangent columns is zero, $g(\xi, d) = 0$ at $\xi = 0$, so that
$d\xi = -H^{-1}\, \partial_d g$ with the Hessian $H$ of the objective, second derivatives of residuals and kernels
included. Columns at a bound that the gradient leads out of do not move. The minimum is connected through $-g$; backward
solves with $H$ once, and the rest is the gradient's own graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._runtime.contexts import out_of_inference, recording
from .._runtime.kernels import norms_written_out
from .._runtime.restoring import restoring
from .._trees import Tree, output_leaves
from ..errors import InputError, InputTypeError, NotDifferentiableError, SolveError
from ..solvers._implicit import ImplicitSolution
from ._kernels import Kernel, kernel_of
from ._layout import Layout, Values
from ._residuals import spread, spread_weight

_MOST = 2000  # free columns: their Hessian takes a pull each, and is factorised whole
_DEFINITE = 1e-12  # smallest square of a pivot, of a Hessian with unit diagonal, whose inverse has four digits


@dataclass(frozen=True, eq=False)
class Minima:
    """Problems and where they ended.

    Attributes:
        values: Their parameters, (n, ...) by name.
        success: Whether each is a minimum, (n,).
        layout: The parameters of one problem.
        active: Where they are at a bound, -1, 0 or 1, by name; None without bounds.
        outputs: Returns the outputs for parameters, (n, ...) each, connected to the caller's tensors; with rows, those
            of the problems in these rows.
        given: `target`, `weight`, `sqrt_weight`, `kernel` and `f_scale` as the caller gave them, for n problems.
        call: The public call.
    """

    values: Values
    success: Tensor
    layout: Layout
    active: Values | None
    outputs: Callable[[Values, Tensor | None], Any]
    given: dict[str, Any]
    call: str

    @restoring
    def connected(self) -> Values:
        """Return the parameters, differentiable by the caller's tensors once.

        Raises:
            InputError: There are too many parameters for a dense Hessian.
            InputTypeError: A parameter is a LieTensor.
            NotDifferentiableError: The residual has no second derivative.
        """
        self._check()
        like = next(iter(self.values.values()))
        with recording(), norms_written_out():
            zero = like.new_zeros(len(like), self.layout.columns).requires_grad_()
            gradient, H, usable = self.expanded(zero, self.success)
            free = self.free(gradient.detach())
            factor, regular = factorised_hessians(H, free, usable)

            def adjoint(rows: Tensor) -> Tensor:
                return _solved(factor, free, regular, rows, self.call)

            residual = -gradient * free
            step = ImplicitSolution.apply(residual, torch.zeros_like(zero), adjoint, self.call)
            return self._moved(step)  # pyright: ignore[reportArgumentType]

    def _check(self) -> None:
        if self.layout.columns > _MOST:
            came, needed = f"True for {self.layout.columns:,} parameters", f"at most {_MOST:,} can be differentiated"
            raise InputError.of("create_graph", came, f"{needed}, whose Hessian is dense")
        for part in self.layout.parts:
            if part.group:
                todo = "Pass its `.tensor()` and a chart in `manifolds=`."
                raise InputTypeError.of(
                    "create_graph", f"True for the LieTensor '{part.name}'", "a chart is needed", todo
                )

    def _moved(self, step: Tensor) -> Values:
        """Return the parameters moved by steps of the free columns, (n, columns)."""
        found = {}
        for part, own in zip(self.layout.parts, step.split(self.layout.sizes, 1), strict=True):
            value = out_of_inference(self.values[part.name]).detach()
            places = torch.from_numpy(part.kept).to(step.device)
            full = step.new_zeros(len(step), part.columns).index_copy(1, places, own).to(value.dtype)
            full = full.reshape(len(step), *part.tangent_shape)
            found[part.name] = value + full if part.chart is None else part.chart.retract(value, full)
        return found

    def expanded(self, zero: Tensor, usable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients, Hessians and which problems have both; where not, neither depends on anything."""
        while True:
            gradient = self._gradient(zero, usable)
            H = self._hessian(gradient, zero)
            finite = (torch.isfinite(gradient.detach()).all(1) & torch.isfinite(H).all((1, 2))).to(usable.device)
            if bool((finite | ~usable).all()):
                return gradient, H, usable
            usable = usable & finite

    def _gradient(self, zero: Tensor, usable: Tensor) -> Tensor:
        moved, rows = self._moved(zero), None
        if len(usable) > 1 and bool(usable.any()) and not bool(usable.all()):
            # Zero times the infinite slopes of a problem is NaN, also by data that all share: run another one for it.
            rows = torch.where(usable, torch.arange(len(usable)), usable.nonzero()[0, 0])
            moved = {name: value[rows.to(value.device)] for name, value in moved.items()}
        outputs, tree = output_leaves(self.outputs(moved, rows))
        total = objectives(outputs, tree, self.given, None if rows is None else usable).sum()
        if not total.requires_grad:
            raise NotDifferentiableError(f"{self.call}: the residual does not depend on the parameters.")
        found = torch.autograd.grad(total, zero, create_graph=True, allow_unused=True)[0]
        return torch.zeros_like(zero) if found is None else found

    def _hessian(self, gradient: Tensor, zero: Tensor) -> Tensor:
        """Return the Hessians by the free columns, (n, columns, columns)."""
        if not gradient.requires_grad:
            return zero.new_zeros(*zero.shape, zero.shape[1])
        rows = []
        for column in gradient.unbind(1):
            row = torch.autograd.grad(column.sum(), zero, retain_graph=True, allow_unused=True)[0]
            rows.append(torch.zeros_like(zero) if row is None else row.detach())
        H = torch.stack(rows, 1).double()
        return (H + H.mT) / 2

    def free(self, gradient: Tensor) -> Tensor:
        """Return where columns are not held by a bound, (n, columns)."""
        if self.active is None:
            return torch.ones_like(gradient, dtype=torch.bool)
        sides = []
        for part in self.layout.parts:
            side = torch.zeros(len(gradient), part.columns, dtype=torch.int8, device=gradient.device)
            side = side if part.chart else self.active[part.name].reshape(len(gradient), -1)
            sides.append(side[:, torch.from_numpy(part.kept).to(side.device)])
        side = torch.cat(sides, 1)
        return ~(((side < 0) & (gradient > 0)) | ((side > 0) & (gradient < 0)))


def factorised_hessians(H: Tensor, free: Tensor, success: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return Cholesky factors of Hessians with unit diagonals and what these were divided by; and which are regular."""
    both = free[:, :, None] & free[:, None]
    H = torch.where(both, H, 0.0) + torch.diag_embed((~free).to(H))
    diagonal = H.diagonal(dim1=1, dim2=2)
    unit = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    factor, info = torch.linalg.cholesky_ex(H / (unit[:, :, None] * unit[:, None]))
    pivots = factor.diagonal(dim1=1, dim2=2).square().amin(1)
    return (factor, unit), success.to(info.device) & (info == 0) & (pivots > _DEFINITE) & (diagonal > 0).all(1)


def _solved(factor: tuple[Tensor, Tensor], free: Tensor, regular: Tensor, rows: Tensor, call: str) -> Tensor:
    """Return rows times the inverses of the Hessians, zero where columns are held.

    Raises:
        SolveError: The derivative of a problem is requested that has none.
    """
    asked = ((rows != 0) & free).any(1) & ~regular
    if bool(asked.any()):
        first = int(asked.nonzero()[0])
        which = f" of {int(asked.sum())} problems, the first being {first}," if len(rows) > 1 else ""
        raise SolveError(
            f"{call}: the minimum{which} has no derivative: the fit had no success, or "
            "the Hessian of the objective there is not positive definite. Take the loss over results with `success`, "
            "and hold what is not determined with `fixed=`."
        )
    lower, unit = factor
    usable = (regular[:, None] & free).to(unit)
    right = (rows.double() * usable / unit).unsqueeze(-1)
    found = torch.cholesky_solve(right, torch.where(regular[:, None, None], lower, torch.eye(lower.shape[1]).to(lower)))
    return (found.squeeze(-1) / unit * usable).to(rows.dtype)


# ---- the objective, in torch -------------------------------------------------------------------------------------


def objectives(outputs: Sequence[Tensor], tree: Tree, given: dict[str, Any], usable: Tensor | None = None) -> Tensor:
    """Return the objectives of many problems, (n,), with their graph; all arguments have been checked.

    Args:
        outputs: Their outputs, (n, ...) each.
        tree: The structure of the output.
        given: As `Minima` holds it.
        usable: Of which problems; the others have none. By default all.
    """
    each = {key: spread(given[key], tree, key) for key in ("target", "weight", "sqrt_weight")}
    kernel = given["kernel"]
    kernels = spread(kernel, tree, "kernel") if isinstance(kernel, list | tuple | dict) else [kernel] * len(outputs)
    total: Any = 0.0
    for i, output in enumerate(outputs):
        target = each["target"][i]
        r = output if target is None else output - target
        if usable is not None:
            r = torch.where(usable.to(r.device).view(-1, *[1] * (r.ndim - 1)), r, 0.0)
        found = kernel_of(kernels[i], given["f_scale"])
        s = _squares(r, each["weight"][i], each["sqrt_weight"][i], by_entry=found is not None and r.ndim == 2)
        if found is not None:
            s = _Robust.apply(s.sum(-1) if r.ndim > 2 else s, found)
        total = total + s.reshape(len(r), -1).sum(1) / 2
    return total


def _squares(r: Tensor, weight: Any, root: Any, by_entry: bool) -> Tensor:
    """Return numbers that add up to the squared lengths of weighted blocks, (n, ...); squares of entries if asked."""
    given = weight if weight is not None else root
    if given is None:
        return r.square()
    if not isinstance(given, Tensor) or not given.ndim:
        return given * r.square() if weight is not None else (given * r).square()
    full = spread_weight(given.to(r.dtype), r.shape, "weight")
    if full.shape == r.shape:
        return full * r.square() if weight is not None else (full * r).square()
    if weight is not None and by_entry:  # a kernel is applied to entries of the root times a vector
        full, weight = torch.linalg.cholesky(full).mT, None
    moved = (full @ r.unsqueeze(-1)).squeeze(-1)
    return r * moved if weight is not None else moved.square()


class _Robust(torch.autograd.Function):
    """A kernel's values, differentiable twice."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, kernel: Kernel) -> Tensor:
        ctx.save_for_backward(s)
        ctx.kernel = kernel
        return _evaluated(kernel, s, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return grads[0] * _RobustSlope.apply(ctx.saved_tensors[0], ctx.kernel), None


class _RobustSlope(torch.autograd.Function):
    """A kernel's slopes, differentiable once."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, kernel: Kernel) -> Tensor:
        ctx.second = _evaluated(kernel, s, 2)
        return _evaluated(kernel, s, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] * ctx.second, None


def _evaluated(kernel: Kernel, s: Tensor, which: int) -> Tensor:
    flat = np.ascontiguousarray(s.detach().to("cpu", torch.float64).reshape(-1).numpy())
    return torch.from_numpy(np.asarray(kernel(flat)[which])).to(s).reshape(s.shape)
