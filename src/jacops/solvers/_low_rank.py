"""Low rank: the inverse from a few directions, and the damping's on all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .._lanczos import KrylovSpace
from .._operators import Operator
from .._requirements import check_positive
from ..errors import NonFiniteError
from ._base import Prepared, PreparedBy, Solver
from ._judge import Raw
from ._refine import noise
from ._sketch import sketch
from ._solution import Status
from ._system import System, symmetric_system

_CHECK_EVERY = 5  # steps: the small eigenvalue problem costs the cube of their number, a product may cost less


@final
@dataclass(frozen=True)
class Lanczos(Solver):
    r"""The leading eigenpairs, by Lanczos's iteration with full reorthogonalisation (Schioppa et al., 2022: "Arnoldi").

    $(A + \lambda I)^{-1} b \approx V (\Theta + \lambda)^{-1} V^\top b + (b - V V^\top b) / \lambda$. The second term,
    which other implementations omit, is where the inverse is largest; it makes the answer exact for operators of that
    rank. Without damping it is left out, and the answer is that of the pseudo-inverse. There is no tolerance on the
    residual: the status is `approximate` if the eigenpairs have converged, and the residual is that of the solution.

    Attributes:
        rank: Number of eigenpairs, of largest magnitude.
        max_steps: At most so many Lanczos steps; by default four for each pair and at least forty more.
        tolerance: On the residual of an eigenpair, relative to the largest eigenvalue; 1e-7, or 1e-4 in float32.
        indefinite: Accept negative curvature.
        seed: Of the start.
        report_residual: Compute the residual of every solution, one product each; else it is NaN, and the status
            `unchecked`.
    """

    rank: int = 32
    max_steps: int | None = None
    tolerance: float | None = None
    indefinite: bool = False
    seed: int = 0
    report_residual: bool = True

    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Find the eigenpairs.

        Raises:
            InputError: The operator is not symmetric, or an option is out of range.
        """
        check_positive("rank", self.rank)
        system = symmetric_system(operator, damping, "Lanczos")
        rank = min(self.rank, system.n)
        # A bound on the time of a call: four steps for each pair, and 40 for small ranks.
        most = min(system.n, self.max_steps or 4 * rank + 40)
        if system.n == 0:
            return _prepared(self, system, system.zeros(0, 0), system.zeros(0), None, {})
        krylov = KrylovSpace(system.undamped, system.noise(1, self.seed)[None], most, self.seed + 1)
        # Pairs good to that change a solution by less than the pairs that are left out.
        tolerance = self.tolerance or (1e-7 if system.dtype == torch.float64 else 1e-4)
        info: dict[str, Any] = {"pairs_asked": rank, "pairs_found": 0}
        try:
            values, basis = _pairs(krylov, rank, tolerance, info)
        except NonFiniteError as error:
            failed, values, basis = Status.BREAKDOWN, system.zeros(0), system.zeros(0, system.n)
            info["reason"] = str(error)
        else:
            failed = None if info["pairs_found"] >= rank else Status.MAX_STEPS
        return _prepared(self, system, basis, values, failed, info)


def _pairs(krylov: KrylovSpace, rank: int, tolerance: float, info: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of largest magnitude and their vectors as rows, and count those that converged."""
    steps, n = 0, krylov.basis.shape[2]
    values = coefficients = leading = torch.zeros(0, dtype=torch.long)
    while krylov.room:
        krylov.step()
        steps += 1
        if krylov.room and (steps < rank or steps % _CHECK_EVERY):
            continue
        values, coefficients, residuals = (part[0] for part in krylov.ritz())
        leading = values.abs().argsort(descending=True)[:rank]
        largest = float(values.abs().max())
        small = residuals[leading] <= tolerance * largest
        info["pairs_found"] = len(leading) if steps == n else int(small.sum())
        # an invariant subspace gives no information on its complement
        # All residuals that small: the space is invariant, which does not mean that the pairs have converged.
        if info["pairs_found"] >= rank and not bool((residuals <= 1e-3 * tolerance * largest).all()):
            break
    basis = krylov.vectors(coefficients[None, leading])[0]
    return values[leading].to(basis), basis


@final
@dataclass(frozen=True)
class Nystrom(Solver):
    r"""A randomised sketch of a positive operator (Frangella, Tropp and Udell, 2023), with the complement's term.

    Attributes:
        rank: Of the sketch; by default it doubles until the smallest eigenvalue is at most a tenth of the damping.
        max_rank: Where it is found.
        seed: Of the sketch.
        report_residual: Compute the residual of every solution, one product each; else it is NaN, and the status
            `unchecked`.
    """

    rank: int | None = None
    max_rank: int = 512
    seed: int = 0
    report_residual: bool = True

    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Sketch.

        Raises:
            InputError: The operator is not symmetric, or an option is out of range.
        """
        check_positive("rank", 1 if self.rank is None else self.rank)
        system = symmetric_system(operator, damping, "Nystrom")
        # Eigenvalues of a tenth of the damping change a solution by a tenth at most; a preconditioner may omit ten
        # times that.
        found = sketch(system, self.rank, self.max_rank, self.seed, ratio=0.1)
        failed, info = None, {"rank": found.rank}
        if found.lowest is not None and found.lowest < 0:
            failed, info = Status.NEGATIVE_CURVATURE, {"lowest_curvature": found.lowest + system.damping}
        elif found.lowest is not None:
            failed, info = Status.BREAKDOWN, {"reason": "a product is not finite"}
        return _prepared(self, system, found.basis, found.values, failed, info)


def _prepared(
    recipe: Lanczos | Nystrom,
    system: System,
    basis: Tensor,
    values: Tensor,
    failed: Status | None,
    figures: dict[str, Any],
) -> Prepared:
    """Return a solver by directions as rows, what the operator does along them, and damping on all others."""
    damped = values + system.damping
    largest = float(damped.abs().max()) if len(damped) else 0.0
    rounding = noise(system) * largest
    info = {"rank": len(values), **figures}
    if len(damped) and float(damped.min()) < -rounding:
        info["lowest_curvature"] = float(damped.min())
        if isinstance(recipe, Nystrom) or not recipe.indefinite:
            failed = Status.NEGATIVE_CURVATURE
    flat = damped.abs() <= rounding
    has_complement = bool(system.given_damping) and len(values) < system.n
    undamped = has_complement and system.damping <= rounding
    if system.given_damping and (bool(flat.any()) or undamped) and largest > 0:
        failed = failed or Status.SINGULAR
    inverse, unchecked = torch.where(flat, 0.0, 1 / damped), not recipe.report_residual

    def solve(rows: Tensor) -> Raw:
        k = rows.shape[0]
        inside = rows @ basis.T
        x = (inside * inverse) @ basis
        if has_complement:
            rest = rows - inside @ basis
            rest = rest - (rest @ basis.T) @ basis
            x = x + rest / system.damping
        statuses = {} if failed is None else dict.fromkeys(range(k), failed)
        return Raw(x, [0] * k, statuses, largest or None, info, approximate=True, unchecked=unchecked)

    return PreparedBy(system, type(recipe).__name__, solve)
