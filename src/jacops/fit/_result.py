"""What a least-squares call gives back: where it ended, why it stopped, and what happened on the way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args, overload

import numpy as np
from torch import Tensor

from .._display import Described, Description
from .._figures import canvas, convergence, residuals
from .._interop import ArrayLike
from .._requirements import check_choice
from .._runtime.contexts import arithmetic
from .._runtime.restoring import restoring
from .._saving import Savable
from .._tables import record_table
from .._words import FitFigure
from . import _covariance
from ._columns import FitColumns
from ._system import LinearizedFit
from ._table import parameters, steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from scipy.sparse import csr_array

Found = TypeVar("Found")  # what the parameters come in: as they were given

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class StepRecord(Savable):
    """One step, accepted or rejected.

    Attributes:
        step: Its number, from 1.
        objective: The objective before it.
        tried: The objective after it, had it been taken.
        optimality: The scaled gradient before it.
        length: Its length.
        damping: The damping (for a trust region the radius) it was made with; 0 without.
        ratio: Actual by predicted reduction.
        accepted: Whether it was taken.
        inner_residual: True relative residual of its linear equations.
        inner_steps: Iterations of the linear solver.
        solver: Which linear solver, and why where it was chosen.
        seconds: Its time, the Jacobian for it included.
        predicted: The reduction of the objective that the linearised problem predicted.
    """

    step: int
    objective: float
    tried: float
    optimality: float
    length: float
    damping: float
    ratio: float
    accepted: bool
    inner_residual: float
    inner_steps: int
    solver: str
    seconds: float
    predicted: float = float("nan")

    def __repr__(self) -> str:
        mark = "" if self.accepted else " rejected"
        return (
            f"{self.step:3d}: {self.objective:.6e} -> {self.tried:.6e}{mark}, gradient {self.optimality:.1e}, "
            f"step {self.length:.1e}, damping {self.damping:.1e}, inner {self.inner_residual:.1e}, {self.seconds:.2f} s"
        )


@dataclass(frozen=True, eq=False)
class FitProgress(Generic[Found]):
    """The argument of a callback, after each accepted step.

    Attributes:
        x: The parameters now, a copy in the form of the result's `x`.
        cost: The objective.
        optimality: The scaled gradient.
        nit: Steps tried so far.
        nfev: Forward passes so far.
        step: The record of the step.
    """

    x: Found
    cost: float
    optimality: float
    nit: int
    nfev: int
    step: StepRecord


@dataclass(frozen=True, eq=False, repr=False)
class LeastSquaresResult(ArrayLike, Savable, Described, Generic[Found]):
    r"""The result of a least-squares fit.

    Attributes:
        x: The parameters found: by name for a module, else in the form of `params`.
        cost: The objective $\tfrac12 \sum_k \rho(\lVert r_k \rVert^2)$ there.
        fun: Output minus target there, flat, neither weighted nor corrected.
        optimality: Scaled gradient: the largest cosine between the residual and a column of the Jacobian.
        status: The test that stopped the call: `"gradient"`, `"objective"`, `"step"` (the rules gtol, ftol, xtol), or
            `"max_steps"`, `"max_nfev"`, `"max_seconds"`, `"callback"`, `"stalled"`, `"singular"`, `"diverged"`.
        message: The status in words.
        log: One record per step tried.
        nfev: Forward passes.
        njev: Jacobians.
        route: How Jacobians were taken, and why.
        plan: The sparse plan, for a later call; `save` leaves it out, since it has a file of its own.
        certificate: The evidence that the point is a minimum, as in `success`; empty where there is none.
        predicted: The reduction that an undamped Gauss-Newton step predicts where it was last computed, relative to
            the objective; NaN where it was not needed or could not be computed.
        method: The call and its strategy.
        limited_by: What `damping` in the log is: `"damping"`, `"radius"`, or empty without either.
        equations: How the linear equations of the last step were solved: the solver, why it was chosen, and for a
            factorisation by dense fronts what it eliminated how.
        active_mask: With bounds, in the form of `x`: -1 where a lower bound is met, 1 an upper one, else 0; else None.
    """

    x: Found
    cost: float
    fun: Tensor
    optimality: float
    status: str
    message: str
    log: list[StepRecord]
    nfev: int
    njev: int
    route: str
    plan: Any = field(default=None, metadata={"saved": False})
    certificate: str = ""
    predicted: float = float("nan")
    method: str = "least squares"
    limited_by: str = "damping"
    active_mask: Found | None = None
    equations: str = ""
    _system: LinearizedFit | None = field(default=None, repr=False)
    _columns: FitColumns | None = field(default=None, repr=False)

    @property
    def success(self) -> bool:
        """Whether a stop rule was met and there is evidence for a minimum.

        That is one of: an undamped Gauss-Newton step predicts a reduction of at most 1e-8 of the objective; every
        residual is at the rounding level of its terms; such a step moves none by more than this; the Hessian of the
        objective, second derivatives of residuals included, is positive definite, and a Newton step with it predicts
        at most 1e-8. With a kernel the objective is the robust one and the undamped step that of the reweighted
        problem.

        The Hessian is computed for up to 100 parameters, where the Jacobian lacks rank, or predicts 1e-2 or more
        although steps end; a negative curvature, as of saddles and maxima, is no success there. Where the Jacobian has
        full rank, success means that the gradient is small, and saddles of curved residuals are not excluded. A stop
        rule looser than its default may end the call without this evidence; `status` and `message` then
        describe which.
        """
        return self.rule_met and bool(self.certificate)

    @property
    def rule_met(self) -> bool:
        """Whether ftol, xtol or gtol stopped the call."""
        return self.status in ("gradient", "objective", "step")

    @property
    def jac(self) -> np.ndarray | csr_array | None:
        """The Jacobian at the end, weighted and corrected, by tangent columns: an array or a SciPy CSR array."""
        return None if self._system is None else self._system.J

    @property
    def grad(self) -> np.ndarray | None:
        """The gradient of the objective at the end, by tangent columns."""
        return None if self._system is None else self._system.gradient

    def covariance(
        self, columns: Any = None, rows: Any = None, *, absolute: bool = False, robust: bool = False
    ) -> np.ndarray:
        r"""Return the joint covariance of parameters, $\sigma^2 (J^\top J)^{-1}$, along tangents of their charts.

        Of a sparse Jacobian only fronts between the chosen columns and the root of the elimination tree are solved
        with: $C^\top C$ for $C = L^{-1} E$, $L$ the Cholesky factor and $E$ columns of the identity.

        Args:
            columns: A parameter's name, a list of names, or a dict of rows by name (None for all rows); or positions
                among the free tangent columns, which are those of the parameters in order, fixed ones left out. By
                default all of the latter.
            rows: Places of the first axis of the one parameter that is named, or a mask over them; by default all.
            absolute: True where weights are inverse variances: $\sigma^2 = 1$. Otherwise it is twice the objective
                over the degrees of freedom, as in `scipy.optimize.curve_fit`.
            robust: Return $A^{-1} B A^{-1}$ instead, B the sum of squares of each block's own gradient and A the
                Hessian with the kernel's curvature (Huber, 1967; White, 1980), times m / (m - n) for m blocks. It holds
                for residuals of any distribution, each block by itself, so for fits with a kernel and outliers, where
                the other is too wide, and for weights that are wrong; it needs many more blocks than columns.

        Returns:
            (k, k), in the order requested; zero for what was held fixed. In units of the parameters; on a chart, of
            its tangent at `x`.

        Raises:
            SolveError: The Jacobian has no full rank, so that some direction has no variance; the message states which
                and what to hold fixed.
            InputError: A name, a row or a position does not exist, or there are no degrees of freedom to estimate the
                variance from.

        Example:
            >>> from jacops import gauss_newton
            >>> fit = gauss_newton(lambda x: x - torch.tensor([1.0, 3.0]), params=torch.zeros(1))
            >>> fit.covariance()
            array([[1.]])
        """
        return _covariance.joint(self, columns, rows, absolute, robust)

    def marginals(
        self,
        name: str | None = None,
        rows: Any = None,
        *,
        against: Any = None,
        absolute: bool = False,
        robust: bool = False,
    ) -> np.ndarray:
        r"""Return the covariance of each row of a parameter by itself, or with a row of a parameter paired with it.

        Blocks of the diagonal of $\sigma^2 (J^\top J)^{-1}$ and what else is on the pattern of a sparse factor are
        computed on that pattern alone, from the root of the elimination tree down to the chosen rows (Takahashi, Fagan
        and Chen, 1973), in about the time of a factorisation for all rows, and the memory of a second factor.

        Args:
            name: The parameter; may be left out where there is one.
            rows: Places of its first axis, or a mask over them; by default all.
            against: As many rows, paired with these in order: of the same parameter, or of another one in a dict by
                its name. By default the same rows.
            absolute: Weights are inverse variances; otherwise the variance is that of the residuals at the end.
            robust: As in `covariance`; the chosen columns are solved for with a sparse factor, some at a time.

        Returns:
            (rows, w, w): w tangent directions of a row; (rows, w, v) for a parameter of v directions in `against`. Zero
            for what was held fixed.

        Raises:
            SolveError: The Jacobian has no full rank.
            InputError: A name or a row does not exist, numbers of rows differ, or there are no degrees of freedom.

        Example:
            >>> from jacops import gauss_newton
            >>> fit = gauss_newton(lambda x: x - 1, params=torch.zeros(2, 3))
            >>> fit.marginals("x", rows=[1], absolute=True).shape
            (1, 3, 3)
        """
        return _covariance.blocks(self, name, rows, against, absolute, robust)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the log as a table: one row per step tried, one column per field of `StepRecord`.

        Raises:
            MissingExtraError: Pandas is not installed (extra `pandas`).
        """
        return record_table(self.log, StepRecord, "step")

    @overload
    def plot(self, kind: FitFigure | None = None, *, ax: None = None) -> Figure: ...
    @overload
    def plot(self, kind: FitFigure | None = None, *, ax: Axes) -> Axes: ...
    def plot(self, kind: FitFigure | None = None, *, ax: Axes | None = None) -> Figure | Axes:
        """Draw the objective step by step, and the residuals at the end.

        Args:
            kind: `"convergence"` or `"residuals"`; both side by side by default.
            ax: Matplotlib axes to draw one of them into; a new figure otherwise, which `pyplot.show` does not show.

        Returns:
            The figure; the axes where they were given.

        Raises:
            MissingExtraError: Matplotlib is not installed.
            InputError: There is no such kind, or axes were given for both.
        """
        kinds = get_args(FitFigure) if kind is None else (check_choice("kind", kind, FitFigure),)
        drawn, panels = canvas(ax, (5.0 * len(kinds), 3.5), len(kinds))
        for word, panel in zip(kinds, panels, strict=True):
            if word == "residuals":
                residuals(panel, self.fun.detach().cpu().double().numpy().reshape(-1))
                panel.set_title(f"{self.fun.numel():,} residuals", fontsize=10)
                continue
            objectives = [record.objective for record in self.log]
            rejected = [(record.step, record.tried) for record in self.log if not record.accepted]
            convergence(panel, [*objectives, self.cost], rejected)
            panel.set_title(f"{self.method}, status: {self.status}", fontsize=10)
        return drawn

    def _describe(self) -> Description:
        first = self.log[0].objective if self.log else self.cost
        taken = sum(r.accepted for r in self.log)
        reason, *more = self.message.split("; ", 1)
        title = f"LeastSquaresResult({self.status}: {reason})"
        steps = f"{taken} of {len(self.log)} taken, {sum(r.seconds for r in self.log):.2f} s"
        sweeps = f"{self.njev} ({self.route}), {self.nfev} forward passes"
        facts = [("note", more[0])] if more else []
        facts += [("objective", f"{first:.6e} -> {self.cost:.6e}, scaled gradient {self.optimality:.1e}")]
        steps += f", by {self.equations}" if self.equations else ""
        return Description(title, [*facts, ("steps", steps), ("Jacobians", sweeps)])

    def _whole(self) -> Description:
        """Return the description with parameters and steps."""
        short = self._describe()
        facts = [*short.facts, ("method", f"{self.method}, success {self.success}")]
        return replace(short, facts=facts, tables=[parameters(self._named()), steps(self.log, self.limited_by)])

    def __str__(self) -> str:
        """Return the repr, the parameters by name, and a line per step."""
        return self._whole().text()

    def _repr_html_(self) -> str:
        return self._whole().html()

    def _named(self) -> dict[str, Tensor]:
        x: Any = self.x
        if isinstance(x, Tensor):
            return {"x": x}
        if isinstance(x, dict):
            return {str(name): value for name, value in x.items()}
        return {f"x[{k}]": value for k, value in enumerate(x)}


def in_form(values: dict[str, Tensor], kind: type | None) -> Any:
    """Return tensors by name in the form that parameters were given in: a tensor, a list, or a dict by name."""
    if kind is None or issubclass(kind, dict):
        return dict(values)
    return next(iter(values.values())) if issubclass(kind, Tensor) else kind(values.values())


@restoring
def as_given(values: dict[str, Tensor], kind: type | None) -> Any:
    """Return the parameters in the form they were given in: a tensor, a list, or a dict by name."""
    with arithmetic(False):
        detached = {name: value.detach().clone() for name, value in values.items()}
    return in_form(detached, kind)
