"""The step from original features to a model's input: fitted scikit-learn transformers as one affine map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ._display import Described, Description, listed
from ._interop import ArrayLike
from ._keywords import keywords
from ._saving import Savable
from ._tables import pandas
from .errors import InputError, InputTypeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers: TypeAlias = NDArray[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Projection(ArrayLike, Savable, Described):
    """An affine map from original features to the model's input: `input = matrix @ (features - mean) + offset`.

    Attributes:
        matrix: The derivative of the input by the features, `(inputs, features)`.
        mean: The features that contributions are counted from, `(features,)`: for a PCA the mean of its training data.
        offset: The input at `mean`, `(inputs,)`; None where it is 0. It is a constant that no feature accounts for,
            such as what a scaler behind a PCA adds.
        names: Of the features, where the estimator was fitted with names.
    """

    matrix: Tensor
    mean: Tensor
    offset: Tensor | None = None
    names: tuple[str, ...] | None = None
    _array: ClassVar[str] = "matrix"

    def __call__(self, features: Tensor) -> Tensor:
        """Return the model's input for rows of features."""
        linear = (features - self.mean) @ self.matrix.T
        return linear if self.offset is None else linear + self.offset

    def notes(self) -> list[str]:
        """Return notes for contributions through it."""
        centred = ["contributions are of features minus their mean"] if bool(self.mean.any()) else []
        return centred + ([] if self.offset is None else ["what the projection adds by itself counts to the bias"])

    def _describe(self) -> Description:
        (m, n), dtype = self.matrix.shape, str(self.matrix.dtype).removeprefix("torch.")
        facts = [] if self.names is None else [("features", listed(self.names))]
        return Description(f"Projection({n:,} features to {m:,} inputs, {dtype})", facts)


@keywords()
def projection(estimator: Any, dtype: torch.dtype = torch.float64) -> Projection:
    r"""Return the affine map of a fitted scikit-learn transformer.

    For a PCA the matrix is `components_`, with whitening $C / \sqrt{\lambda}$ row by row: the derivative of the reduced
    input by the original features, which is what the chain rule needs. Steps of a pipeline are multiplied. The map is
    compared with `estimator.transform` on random rows before it is returned.

    `mean` is the point that the steps up to the first PCA (or whatever else mixes features) map to its centre. A
    scaler alone, such as MinMaxScaler, counts from the features that it maps to 0. What later steps add is `offset`.

    Args:
        estimator: A fitted PCA, IncrementalPCA, TruncatedSVD, FastICA, FactorAnalysis, GaussianRandomProjection or
            SparseRandomProjection; a StandardScaler, MinMaxScaler, MaxAbsScaler or RobustScaler; a selection of
            features (VarianceThreshold, SelectKBest, …); or a Pipeline of these, steps that pass data on included.
        dtype: Of the result.

    Returns:
        A `Projection` for `contributions(projection=)`: the affine map between features and what the model is given.

    Raises:
        InputTypeError: `estimator` is not fitted, or is none of these, such as a KernelPCA or a scaler that clips.
        InputError: `estimator.transform` gives something else, as that of a subclass can.

    Example:
        >>> from sklearn.preprocessing import StandardScaler
        >>> scaler = StandardScaler().fit([[0.0, 1.0], [4.0, 3.0]])
        >>> back = projection(scaler)
        >>> back.matrix, back.mean
        (tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]], dtype=torch.float64), tensor([2., 2.], dtype=torch.float64))
    """
    return _projection_of("estimator", estimator, dtype)


def as_projection(given: Any) -> Projection | None:
    """Return the projection that `projection=` of a call gives, None for none; estimators are converted."""
    return given if given is None or isinstance(given, Projection) else _projection_of("projection", given)


def _projection_of(argument: str, estimator: Any, dtype: torch.dtype = torch.float64) -> Projection:
    try:
        steps = _steps(argument, estimator) or [_Elementwise(int(estimator.n_features_in_))]
    except AttributeError as error:  # of an attribute that fitting sets
        came = f"a {type(estimator).__name__} that is not fitted ({error})"
        raise InputTypeError.of(argument, came, "a fitted one is needed", "Call `.fit(features)` first.") from None
    names = getattr(estimator, "feature_names_in_", None)
    found = _composed(steps)
    _compare(argument, estimator, found, names)
    labels = None if names is None else tuple(map(str, names))
    offset = None if found.offset is None else found.offset.to(dtype)
    return replace(found, matrix=found.matrix.to(dtype), mean=found.mean.to(dtype), offset=offset, names=labels)


# ---- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Elementwise:
    """Every feature by itself: `(value - centre) * scale + shift`."""

    width: int
    centre: Any = 0.0
    scale: Any = 1.0
    shift: Any = 0.0

    def forward(self, values: Numbers) -> Numbers:
        return (values - self.centre) * self.scale + self.shift

    def back(self, values: Numbers) -> Numbers:
        """Return what is mapped to the values."""
        return self.centre + (values - self.shift) / self.scale

    def before(self, matrix: Numbers) -> Numbers:
        """Return the matrix multiplied by that of this step."""
        return matrix * self.scale


@dataclass(frozen=True)
class _Selected:
    """Some of the features."""

    columns: Numbers
    among: int

    @property
    def width(self) -> int:
        return len(self.columns)

    def forward(self, values: Numbers) -> Numbers:
        return values[..., self.columns]

    def back(self, values: Numbers) -> Numbers:
        return self.before(values)  # the others, which nothing depends on, are counted from 0

    def before(self, matrix: Numbers) -> Numbers:
        whole = np.zeros((*matrix.shape[:-1], self.among))
        whole[..., self.columns] = matrix
        return whole


@dataclass(frozen=True)
class _Mixed:
    """Sums of features: `matrix @ (values - centre)`."""

    matrix: Numbers
    centre: Numbers

    @property
    def width(self) -> int:
        return len(self.matrix)

    def forward(self, values: Numbers) -> Numbers:
        return (values - self.centre) @ self.matrix.T

    def before(self, matrix: Numbers) -> Numbers:
        return matrix @ self.matrix


_Step: TypeAlias = _Elementwise | _Selected | _Mixed


def _composed(steps: list[_Step]) -> Projection:
    matrix = reduce(lambda made, step: step.before(made), reversed(steps), np.eye(steps[-1].width))
    leading: list[_Elementwise | _Selected] = []
    for step in steps:
        if isinstance(step, _Mixed):
            break
        leading.append(step)
    mixed = steps[len(leading)] if len(leading) < len(steps) else None
    point = np.zeros(steps[-1].width) if not isinstance(mixed, _Mixed) else mixed.centre
    mean = reduce(lambda made, step: step.back(made), reversed(leading), point)
    later = steps[len(leading) + 1 :]
    offset = reduce(lambda made, step: step.forward(made), later, np.zeros(mixed.width)) if mixed and later else None
    tensors = (None if a is None else torch.from_numpy(np.array(a, np.float64)) for a in (matrix, mean, offset))
    matrix, mean, offset = tensors
    return Projection(matrix, mean, offset)  # pyright: ignore[reportArgumentType]


# ---- estimators ------------------------------------------------------------------------------------------------------


def _steps(argument: str, estimator: Any, place: str = "") -> list[_Step]:
    """Return the affine maps that an estimator makes one after the other.

    Raises:
        AttributeError: It is not fitted.
        InputTypeError: It is of a kind that is not known.
    """
    if isinstance(getattr(estimator, "steps", None), list):  # a Pipeline
        parts = [(name, part) for name, part in estimator.steps if part is not None and part != "passthrough"]
        return [step for name, part in parts for step in _steps(argument, part, f"{place}.{name}".strip("."))]
    if callable(getattr(estimator, "get_support", None)):
        chosen = np.asarray(estimator.get_support())
        return [_Selected(np.flatnonzero(chosen), len(chosen))]
    kind = next((base.__name__ for base in type(estimator).__mro__ if base.__name__ in _RULES), None)
    clips = getattr(estimator, "clip", False) is True
    if kind is None or clips:
        came = f"a {type(estimator).__name__}{' with clip=True' if clips else ''}"
        needed = f"an affine map is needed: {', '.join(_RULES)}, a selection of features, or a Pipeline of these"
        todo = "Take what stands behind it, with the features that enter that: a part of a pipeline is `pipeline[k:]`."
        raise InputTypeError.of(argument, f"a Pipeline whose step {place} is {came}" if place else came, needed, todo)
    return [_RULES[kind](estimator)]


def _components(of: Any, centred: bool = True) -> _Mixed:
    matrix = of.components_.toarray() if hasattr(of.components_, "toarray") else np.asarray(of.components_)
    centre = np.asarray(of.mean_, np.float64) if centred else np.zeros(matrix.shape[1])
    return _Mixed(matrix.astype(np.float64), centre)


def _principal(of: Any) -> _Mixed:
    found = _components(of)
    if not of.whiten:
        return found
    scale = np.sqrt(np.asarray(of.explained_variance_))[:, None]
    # scikit-learn never divides by less than the precision of the data.
    return replace(found, matrix=found.matrix / np.maximum(scale, np.finfo(scale.dtype).eps))


def _factors(of: Any) -> _Mixed:
    """Return the posterior means of factors (Barber, Bayesian Reasoning and Machine Learning, 21.2.2)."""
    found = _components(of)
    weighed = found.matrix / np.asarray(of.noise_variance_)
    precision = np.eye(len(weighed)) + weighed @ found.matrix.T
    return replace(found, matrix=np.linalg.solve(precision.T, weighed))


def _standard(of: Any) -> _Elementwise:
    centre = of.mean_ if of.with_mean else 0.0
    return _Elementwise(of.n_features_in_, centre, 1 / of.scale_ if of.with_std else 1.0)


def _robust(of: Any) -> _Elementwise:
    centre = of.center_ if of.with_centering else 0.0
    return _Elementwise(of.n_features_in_, centre, 1 / of.scale_ if of.with_scaling else 1.0)


_RULES: dict[str, Callable[[Any], _Step]] = {
    "PCA": _principal,
    "IncrementalPCA": _principal,
    "TruncatedSVD": lambda of: _components(of, centred=False),
    "FastICA": lambda of: _components(of, centred=bool(of.whiten)),
    "FactorAnalysis": _factors,
    "GaussianRandomProjection": lambda of: _components(of, centred=False),
    "SparseRandomProjection": lambda of: _components(of, centred=False),
    "StandardScaler": _standard,
    "MinMaxScaler": lambda of: _Elementwise(of.n_features_in_, 0.0, of.scale_, of.min_),
    "MaxAbsScaler": lambda of: _Elementwise(of.n_features_in_, 0.0, 1 / of.scale_),
    "RobustScaler": _robust,
}

# ---- verification ----------------------------------------------------------------------------------------------------

_ROWS = 5  # random rows; an affine map that agrees on one of them agrees on almost all, so a few are plenty


def _compare(argument: str, estimator: Any, found: Projection, names: Any) -> None:
    """Refuse a map that is not what the estimator does.

    Raises:
        InputError: It is not, on random rows.
    """
    spread = 1 + found.mean.abs()
    drawn = torch.randn(_ROWS, len(spread), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = found.mean + spread * drawn
    came: Any = rows.numpy()
    if names is not None:
        came = pandas().DataFrame(came, columns=names)
    given = estimator.transform(came)
    given = np.asarray(given.toarray() if hasattr(given, "toarray") else given)
    made, terms = found(rows).numpy(), (rows.abs() + found.mean.abs()) @ found.matrix.abs().T
    terms = terms if found.offset is None else terms + found.offset.abs()
    # Rounding stays far below the square root of eps; a wrong map is off by a share of 1.
    bound = np.sqrt(max(_eps(given), *map(_eps, _attributes(estimator)))) * (1e-300 + terms.numpy() + np.abs(made))
    if given.shape != made.shape or not (np.abs(given - made) <= bound).all():
        off = f"off by {np.abs(given - made).max():.1e}" if given.shape == made.shape else f"of shape {given.shape}"
        raise InputError.of(
            argument,
            f"a {type(estimator).__name__} whose `transform` is not the affine map of its attributes ({off})",
            "both must agree",
            "Build `jacops.results.Projection(matrix, mean)` from what it does.",
        )


def _attributes(estimator: Any) -> Iterator[Any]:
    steps = getattr(estimator, "steps", None)
    for _, part in steps if isinstance(steps, list) else ():
        yield from _attributes(part)
    yield from getattr(estimator, "__dict__", {}).values()


def _eps(value: Any) -> float:
    """Return the precision of an array; of anything else that of double precision."""
    kind = getattr(value, "dtype", None)
    return float(np.finfo(kind).eps) if isinstance(kind, np.dtype) and kind.kind == "f" else float(np.finfo(float).eps)
