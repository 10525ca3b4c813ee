"""What an influence computation found, and how: factors, influences, and what both say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np
import torch
from torch import Tensor

from .._display import Described, Description, Table
from .._figures import NEGATIVE, POSITIVE, bars, canvas, heat_map, legend, places
from .._interop import ArrayLike, as_array
from .._problem import Problem
from .._requirements import check_positive
from .._saving import Savable
from .._tables import Names, feature_axes, matrix_table, names_of, tidy_table
from .._words import InfluenceType
from ..errors import InputError
from ..solvers import Solution, Status
from ..solvers._solution import gravest, level_text, residual_text, truncation_facts
from ._damping import GIVEN, Damping
from ._twice_differentiable import InverseHvpResult

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TESTS, _STRONGEST = 5, 3  # test samples in a repr, and training samples for each

UNITS: dict[InfluenceType, str] = {
    "up": "test loss per unit of weight of the training sample",
    "perturbation": "test loss per unit of weight and unit of the training input",
    "token": "test loss per unit of weight of the token's term in its sequence's loss",
}
SIGN = "+ s_test · grad: positive where weighting the training sample up lowers the test loss"


@dataclass(frozen=True, eq=False, repr=False)
class InfluenceFactors(Described, InverseHvpResult[Tensor]):  # pyright: ignore[reportInvalidTypeArguments]
    """Solutions `(A + damping I) x = g_test`, one row per test sample.

    Attributes:
        x: The solutions, `(n_test, P)`.
        info: What happened: `method`, `curvature`, `status` (the worst), `statuses` and `residual` per row, `converged`
            (every row is), `success` (no row failed), `damping` and `damping_rule`, how that was
            chosen, `rows` of data, `covered` of `parameters`, and the method's own figures, as in `Solution.info`, such
            as `query_rank` and `truncation` per row. Failed rows hold what the solver had, or NaN.
    """

    def _describe(self) -> Description:
        shape = " × ".join(f"{size:,}" for size in self.x.shape)
        dtype = str(self.x.dtype).removeprefix("torch.")
        return Description(f"InfluenceFactors({shape}, {dtype}, {self.x.device})", _facts(self.info))


@dataclass(frozen=True, eq=False, repr=False)
class Influences(ArrayLike, Savable, Described):
    """Influences of training samples on test samples, with sign, units and solver.

    Attributes:
        values: `(n_test, n_train)` for `"up"`, `(n_test, n_train, *x)` for `"perturbation"`, `(n_test, n_train, T)` for
            `"token"`.
        influence_type: Which of these.
        sign: The convention, in words.
        units: What a number means.
        damping: Added to the curvature; how it was chosen is in `info["damping_rule"]`.
        info: Solver, damping, curvature, rows, residuals and statuses; `leverage` per training sample where the
            correction was requested.
        shares: The weight of each training sample in the objective, `(n_train,)`: 1/N in a plain mean, 1 in a sum.
    """

    values: Tensor
    influence_type: InfluenceType
    sign: str
    units: str
    damping: float
    info: dict[str, Any]
    shares: Tensor = field(default_factory=lambda: torch.empty(0))
    _array: ClassVar[str] = "values"

    @property
    def shape(self) -> torch.Size:
        """Shape of the values."""
        return self.values.shape

    def __len__(self) -> int:
        """Number of test samples."""
        return len(self.values)

    def __getitem__(self, key: Any) -> Tensor:
        """Index the values."""
        return self.values[key]

    def to_numpy(self) -> Any:
        """Return the values as a NumPy array."""
        return self.values.cpu().numpy()

    def leave_one_out(self) -> Tensor:
        """Return by how much each test loss would rise if a term of the objective were dropped, shaped like the values.

        Terms are training samples, or their tokens. First order: an influence times the sample's weight in the
        objective. With `leverage=True` the sample is removed from the curvature too, which is exact for least squares.

        Raises:
            InputError: These are perturbation influences.
        """
        if self.influence_type == "perturbation":
            self._need_up("leave_one_out")
        shares = self.shares.to(self.values)
        return self.values * (shares.unsqueeze(1) if self.influence_type == "token" else shares)

    def per_sample(self) -> Influences:
        """Return influences of tokens, `(n_test, n_train, T)`, added up to those of samples, `(n_test, n_train)`.

        Raises:
            InputError: These are not influences of tokens.
        """
        if self.influence_type != "token":
            raise InputError.of("influence_type", repr(self.influence_type), "`per_sample` needs 'token'")
        return replace(self, values=self.values.sum(2), influence_type="up", units=UNITS["up"])

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the `k` training samples of largest influence for every test sample, `(values, indices)`.

        Raises:
            InputError: There are fewer training samples, or these are perturbation influences.
        """
        return self._ends(k, largest=True)

    def bottom(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the `k` training samples of smallest influence for every test sample, `(values, indices)`.

        Raises:
            InputError: `k` is out of range.
        """
        return self._ends(k, largest=False)

    def _ends(self, k: int, largest: bool) -> tuple[Tensor, Tensor]:
        if self.values.ndim != 2 or not 0 < k <= self.values.shape[1]:
            came = f"influences of shape {tuple(self.shape)} need 0 < k <= {self.values.shape[1]} and two axes"
            todo = "Take those of `per_sample()`." if self.influence_type == "token" else ""
            raise InputError.of("k", k, came, todo)
        values, indices = self.values.topk(k, dim=1, largest=largest)
        return values, indices

    def to_pandas(self, top: int | None = None, *, test: Names = None, train: Names = None) -> pandas.DataFrame:
        """Return the influences as a table.

        Args:
            top: Only so many training samples of largest influence for every test sample, as `top` finds them.
            test: Names of the test samples; by default positions.
            train: Names of the training samples.

        Returns:
            One row per test sample and one column per training sample. With `top` one row per test sample and rank,
            with columns `test`, `rank`, `train`, `influence`. For perturbation influences one row per entry, with
            columns `test`, `train`, `feature` (`feature_0`, … where inputs have several axes), `influence`; for those
            of tokens with `token`. Its `attrs` hold sign, units, curvature, damping and how that was chosen.

        Raises:
            MissingExtraError: Pandas is not installed (extra `pandas`).
            InputError: Names are too few or too many, or as in `top`.
        """
        table = self._table(top, test, train)
        table.attrs |= {"sign": self.sign, "units": self.units, "damping": self.damping}
        table.attrs |= {name: self.info[name] for name in ("damping_rule", "curvature") if name in self.info}
        return table

    def _table(self, top: int | None, test: Names, train: Names) -> pandas.DataFrame:
        rows, columns = (names_of(*given) for given in (("test", test, len(self)), ("train", train, self.shape[1])))
        if top is not None:
            values, indices = (as_array(part) for part in self.top(top))
            table = tidy_table(values, [("test", rows), ("rank", np.arange(1, top + 1))], "influence")
            table.insert(2, "train", np.asarray(columns)[indices.reshape(-1)])
            return table
        if self.values.ndim == 2:
            return matrix_table(as_array(self), ("test", rows), ("train", columns))
        inner = (
            [("token", np.arange(self.shape[2]))] if self.influence_type == "token" else feature_axes(self.shape[2:])
        )
        return tidy_table(as_array(self), [("test", rows), ("train", columns), *inner], "influence")

    @overload
    def plot(self, test: Sequence[int] | None = None, k: int = 5, *, ax: None = None) -> Figure: ...
    @overload
    def plot(self, test: Sequence[int] | None = None, k: int = 5, *, ax: Axes) -> Axes: ...
    def plot(self, test: Sequence[int] | None = None, k: int = 5, *, ax: Axes | None = None) -> Figure | Axes:
        """Draw, for some test samples, the training samples that helped most and hurt most.

        Influences of tokens are drawn as a map: a row for each of the `k` training sequences of largest influence of
        either sign, a column for each token.

        Args:
            test: Which test samples, at most 6; the first ones by default.
            k: How many training samples on either side.
            ax: Matplotlib axes to draw one test sample into; a new figure otherwise, which `pyplot.show` does not show.

        Returns:
            The figure; the axes where they were given.

        Raises:
            MissingExtraError: Matplotlib is not installed.
            InputError: These are perturbation influences, or there are no such test samples.
        """
        tokens = self.influence_type == "token"
        if not tokens:
            self._need_up("plot")
        chosen = list(range(min(1 if ax is not None else 3, self.shape[0])) if test is None else test)
        if not 0 < len(chosen) <= 6 or not all(0 <= t < self.shape[0] for t in chosen):
            raise InputError.of("test", chosen, f"1 to 6 of the {self.shape[0]} test samples are needed")
        k = min(check_positive("k", k), self.shape[1] if tokens else self.shape[1] // 2 or 1)
        rows, width = (k, 5.5) if tokens else (2 * k, 3.2)
        drawn, panels = canvas(ax, (max(4.5, width * len(chosen)), 0.26 * rows + 1.6), len(chosen))
        for panel, t in zip(panels, chosen, strict=True):
            _draw(panel, self.values[t].double().cpu(), k)
            panel.set_title(f"test sample {t}", fontsize=10, pad=8 if tokens else 22)  # above the legend, all alike
        panels[0].set_ylabel("training sequence" if tokens else "training sample")
        if not tokens:
            legend(panels[0], {"lowers the loss": POSITIVE, "raises it": NEGATIVE})
        return drawn

    def _need_up(self, call: str) -> None:
        if self.influence_type != "up":
            raise InputError.of("influence_type", repr(self.influence_type), f"`{call}` needs 'up'")

    def _describe(self) -> Description:
        shape, dtype = " × ".join(f"{size:,}" for size in self.shape), str(self.values.dtype).removeprefix("torch.")
        title = f"Influences({shape}, {dtype}, {self.values.device}): {self.influence_type}"
        facts = [("sign", self.sign), ("unit", self.units), *_facts(self.info)]
        return Description(title, facts, [_strongest(self.values)] if self.values.ndim == 2 else ())


def described(problem: Problem, kind: str, solutions: Sequence[Solution], damping: Damping) -> dict[str, Any]:
    """Return what is known of some solves together, in one dictionary."""
    statuses = [str(status) for solution in solutions for status in solution.status]
    worst = gravest(statuses)
    return {
        **_figures(solutions),
        "method": solutions[-1].method if solutions else "none",
        "curvature": kind,
        "status": str(worst),
        "statuses": statuses,
        "converged": worst == Status.CONVERGED,
        "success": worst.success,
        "residual": [r for solution in solutions for r in solution.residual.tolist()],
        "iterations": [i for solution in solutions for i in solution.iterations],
        "seconds": sum(solution.info.get("seconds", 0.0) for solution in solutions),
        "damping": damping.value,
        "damping_rule": damping.rule,
        "rows": problem.rows,
        "reduction": problem.objective.reduction,
        "l2": problem.l2,
        "covered": problem.space.dim,
        "parameters": problem.objective.parameters_total,
        "data": f"{problem.rows} rows in order {problem.data.digest}",
    }


def _figures(solutions: Sequence[Solution]) -> dict[str, Any]:
    """Return the figures of several solves: rows one below the other, products summed, of others the last."""
    found: dict[str, Any] = {}
    for solution in solutions:
        found |= solution.info
    for name in found:
        parts = [solution.info.get(name) for solution in solutions]
        rows = [part for part in parts if isinstance(part, Tensor)]
        shapes = [solution.residual.shape for solution in solutions]
        if [part.shape for part in rows] == shapes:
            found[name] = torch.cat(rows)
        elif name == "products":
            found[name] = sum(part or 0 for part in parts)
    return found


def _facts(info: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is known of solves, in words."""
    residual = residual_text(info["residual"]) + level_text(info["statuses"], info)
    rows = f"{info['rows']} training rows, {info['covered']} of {info['parameters']} parameters"
    rule = info.get("damping_rule", GIVEN)  # files of older versions have none
    chosen = [] if rule == GIVEN else [("damping", rule)]
    return [
        ("curvature", f"{info['curvature']}, damping {info['damping']:g}, {rows}"),
        *chosen,
        *truncation_facts(info),
        ("solver", f"{info['method']}: {info['status']}, {residual}"),
    ]


def _strongest(values: Tensor) -> Table:
    """Return the training samples that matter most to the first test samples."""
    rows: list[tuple[str, ...]] = []
    for number, row in enumerate(values[:_TESTS]):
        ends = [row.topk(min(_STRONGEST, len(row)), largest=most).indices.tolist() for most in (True, False)]
        rows.append((f"{number}", *("  ".join(f"#{i} {float(row[i]):+.2g}" for i in end) for end in ends)))
    rows += [(f"… {len(values) - _TESTS} more",)] if len(values) > _TESTS else []
    return Table(("test sample", "largest influences", "smallest"), rows)


def _draw(panel: Axes, values: Tensor, k: int) -> None:
    """Draw the strongest training samples of one test sample: bars, or a map of their tokens."""
    if values.ndim == 2:
        picked = values.sum(1).abs().topk(k).indices
        heat_map(panel, values[picked].numpy(), "influence", square=False)
        panel.set_yticks(range(k), [f"#{i}" for i in picked.tolist()], fontsize=8)
        places(panel, "x", None, values.shape[1])
        panel.set_xlabel("token")
        return
    order = values.argsort()
    picked = torch.cat([order[:k], order[-k:]]) if len(order) >= 2 * k else order
    bars(panel, [f"#{i}" for i in picked.tolist()], values[picked].tolist())
    panel.invert_yaxis()  # the largest one on top
    panel.set_xlabel("influence: test loss per unit of weight")
    panel.locator_params(axis="x", nbins=4)  # labels of more would meet in a narrow panel
