"""What features add to outputs: the result of `contributions`, and how well it was verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from ._attribution_page import PagedContributions
from ._display import Described, Description, Table
from ._features import FeatureNames
from ._interop import ArrayLike
from ._saving import Savable

if TYPE_CHECKING:
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
    error = np.abs(z - rebuilt)
    worst, scale = float(error.max()), float(np.abs(z).max())
    relative = worst / scale if scale > 0 else (0.0 if worst == 0 else float("inf"))
    return JacobianVerification(_range(z), _range(rebuilt), worst, float(error.mean()), relative)


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


@dataclass(frozen=True, eq=False, repr=False)
class Contributions(ArrayLike, Savable, PagedContributions):
    """What every feature adds to every output, what none of them does, and whether that is all.

    Attributes:
        values: Feature f adds `J[n, o, f] * x[n, f]` to output o, in the units of the output, `(n, out, features)`;
            from a hidden layer (`at=`) its axes take the place of `features`.
        bias: What the model's constants add, computed without the output, `(n, out)`.
        output: The model's output, `(n, out)`.
        jacobian: By the features that `values` speaks of, of the shape of `values`; None for groups of features.
        verification: `output - bias` against the sum of `values`; small means that nothing is missing.
        slope_error: How far `f(x + d) - f(x - d)` is from `2 J d` for small `d`, relative to the size of the terms of
            `J d`, at worst over samples and outputs. Kinks between are allowed for, and what the model detaches is held
            fixed. It is about 1e-8 in double and 1e-5 in single precision where the Jacobian is right.
        notes: Remarks: operations that are not piecewise linear, what was centred.
        names: Names of the features and their groups, where some were given.
    """

    values: Tensor
    bias: Tensor
    output: Tensor
    jacobian: Tensor | None
    verification: JacobianVerification
    slope_error: float
    notes: tuple[str, ...]
    names: FeatureNames | None = None
    _array: ClassVar[str] = "values"

    def _describe(self) -> Description:
        n, out, *features = self.values.shape
        added = self.values.flatten(2).sum(-1)
        share = float(self.bias.abs().sum() / (self.bias.abs().sum() + added.abs().sum() + 1e-300))
        facts = [
            ("output", f"features + bias up to {self.verification.relative_error:.1e} of its range"),
            ("bias", f"{share:.0%} of it"),
            ("slopes", f"as the Jacobian says up to {self.slope_error:.1e}"),
            *(("note", note) for note in self.notes),
        ]
        shown = self.top(_SHOWN).table() if n * out else Table((), ())
        title = f"Contributions({n:,} samples, {out} outputs, {'x'.join(map(str, features))} features)"
        return Description(title, facts, [shown])
