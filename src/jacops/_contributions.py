"""What features add to outputs: the result of `contributions`, and how well it was verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from ._attribution_plot import DrawnContributions
from ._display import Described, Description, Table
from ._interop import ArrayLike, as_array
from ._saving import Savable
from ._tables import Names, contribution_table

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray

_SHOWN = 5  # features in a repr: those of largest contribution


@dataclass(repr=False)
class JacobianVerification(Savable, Described):
    """How well `Z = J X` holds.

    Attributes:
        z_range: Smallest and largest entry of `Z`.
        reconstruction_range: Smallest and largest entry of `J X`.
        max_error: Largest absolute difference, in the units of `Z`.
        mean_error: Mean absolute difference, in the units of `Z`.
        relative_error: `max_error` over the largest absolute entry of `Z`, right at any scale; if that is 0, 0 for no
            error and inf for any.
    """

    z_range: tuple[float, float]
    reconstruction_range: tuple[float, float]
    max_error: float
    mean_error: float
    relative_error: float

    def _describe(self) -> Description:
        ranges = {"range of Z": self.z_range, "range of J X": self.reconstruction_range}
        facts = [(word, f"{low:.4g} to {high:.4g}") for word, (low, high) in ranges.items()]
        errors = f"at most {self.max_error:.1e}, mean {self.mean_error:.1e}"
        title = f"JacobianVerification: relative error {self.relative_error:.1e}"
        return Description(title, [("error", errors), *facts])


def verification_of(z: NDArray[np.float64], rebuilt: NDArray[np.float64]) -> JacobianVerification:
    """Return how well `z` was rebuilt; nothing is missing where there is nothing."""
    if not z.size:
        return JacobianVerification((0.0, 0.0), (0.0, 0.0), 0.0, 0.0, 0.0)
    error = np.abs(z - rebuilt)
    worst, scale = float(error.max()), float(np.abs(z).max())
    relative = worst / scale if scale > 0 else (0.0 if worst == 0 else float("inf"))
    return JacobianVerification(_range(z), _range(rebuilt), worst, float(error.mean()), relative)


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


@dataclass(frozen=True, eq=False, repr=False)
class Contributions(ArrayLike, Savable, DrawnContributions):
    """What every feature adds to every output, what none of them does, and whether that is all.

    Attributes:
        values: Feature f adds `J[n, o, f] * x[n, f]` to output o, in the units of the output, `(n, out, features)`;
            from a hidden layer (`at=`) its axes take the place of `features`.
        bias: What the model's constants add, computed without the output, `(n, out)`.
        output: The model's output, `(n, out)`.
        jacobian: By the features that `values` speaks of, of the shape of `values`.
        verification: `output - bias` against the sum of `values`; small means that nothing is missing.
        slope_error: How far `f(x + d) - f(x - d)` is from `2 J d` for small `d`, relative to the size of the terms of
            `J d`, at worst over samples and outputs. Kinks between are allowed for, and what the model detaches is held
            fixed. It is about 1e-8 in double and 1e-5 in single precision where the Jacobian is right. None where the
            Jacobian is no slope but an average.
        notes: Remarks: operations that are not piecewise linear, what was centred.
        method: `"exact"`, or `"integrated"` for parts averaged along a path, of which `bias` is the output where it
            begins.
        steps: Jacobians taken along a path, at most; None where there is no path.
    """

    values: Tensor
    bias: Tensor
    output: Tensor
    jacobian: Tensor
    verification: JacobianVerification
    slope_error: float | None
    notes: tuple[str, ...]
    method: str = "exact"
    steps: int | None = None
    _array: ClassVar[str] = "values"

    def to_pandas(
        self, *, samples: Names = None, outputs: Names = None, features: Names = None, bias: bool = False
    ) -> pandas.DataFrame:
        """Return the contributions as a table of one row per sample, output and feature.

        Args:
            samples: Names of the samples; by default positions.
            outputs: Names of the outputs.
            features: Names of the features.
            bias: Add a row of feature `"bias"` per sample and output, so that rows sum to the output.

        Returns:
            A table with columns `sample`, `output`, `feature` (`feature_0`, … where there are several axes), `value`.

        Raises:
            MissingExtraError: Pandas is not installed (extra `pandas`).
            InputError: Names are too few or too many, or `bias` is asked of features with several axes.
        """
        constants = as_array(self.bias) if bias else None
        return contribution_table(as_array(self), constants, samples, outputs, features)

    def _describe(self) -> Description:
        n, out, *features = self.values.shape
        added = self.values.flatten(2).sum(-1)
        share = float(self.bias.abs().sum() / (self.bias.abs().sum() + added.abs().sum() + 1e-300))
        facts = [
            ("output", f"features + bias up to {self.verification.relative_error:.1e} of its range"),
            ("bias", f"{share:.0%} of it"),
            *([] if self.slope_error is None else [("slopes", f"as the Jacobian says up to {self.slope_error:.1e}")]),
            *(("note", note) for note in self.notes),
        ]
        mean = torch.linalg.vector_norm(self.values, 1, dim=(0, 1)) / (n * out)
        order = mean.flatten().argsort(descending=True)[:_SHOWN].tolist()
        places = [np.unravel_index(k, tuple(features)) for k in order]
        rows = [(", ".join(map(str, place)), f"{float(mean[place]):.4g}") for place in places]
        title = f"Contributions({n:,} samples, {out} outputs, {'x'.join(map(str, features))} features)"
        return Description(title, facts, [Table(("feature", "mean |contribution|"), rows)])
