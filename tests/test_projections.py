"""Fitted transformers as affine maps: each is what `transform` does; contributions follow by the chain rule."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jacops
import oracle
from jacops.attribution import projection
from jacops.errors import InputError, InputTypeError
from jacops.results import Projection
from small import Calls, close, draw, settled

sklearn = pytest.importorskip("sklearn")
from sklearn.compose import ColumnTransformer  # noqa: E402
from sklearn.decomposition import (  # noqa: E402
    PCA,
    FactorAnalysis,
    FastICA,
    IncrementalPCA,
    KernelPCA,
    SparsePCA,
    TruncatedSVD,
)
from sklearn.feature_selection import SelectKBest, VarianceThreshold, f_classif  # noqa: E402
from sklearn.pipeline import Pipeline, make_pipeline  # noqa: E402
from sklearn.preprocessing import (  # noqa: E402
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    PolynomialFeatures,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection  # noqa: E402

N, D = 60, 6
# Features of other means and spreads, one of them constant; mixed, so that components are not axes.
SPREADS = torch.tensor([5.0, 0.2, 1, 3, 0.05, 0]).double()
ROWS = (
    (draw(N, D) @ (torch.eye(D) + 0.3 * draw(D, D, seed=1))) * SPREADS + torch.tensor([7.0, 0, -3, 1e3, 1, 2])
).numpy()
LABELS = np.arange(N) % 2
T = torch.as_tensor


def scaled(x: Tensor, of: Any) -> Tensor:
    """A scaler in torch, as its page states it."""
    if isinstance(of, StandardScaler):
        x = x - T(of.mean_) if of.with_mean else x
        return x / T(of.scale_) if of.with_std else x
    if isinstance(of, MinMaxScaler):
        return x * T(of.scale_) + T(of.min_)
    if isinstance(of, MaxAbsScaler):
        return x / T(of.max_abs_).where(T(of.max_abs_) > 0, 1.0)
    x = x - T(of.center_) if of.with_centering else x
    return x / T(of.scale_) if of.with_scaling else x


def copied(x: Tensor, of: Any) -> Tensor:
    """What a fitted estimator does to rows, in torch, as its page states it: what autograd differentiates."""
    if isinstance(of, Pipeline):
        for _, step in of.steps:
            x = x if step is None or step == "passthrough" else copied(x, step)
        return x
    if hasattr(of, "get_support"):
        return x[:, T(of.get_support())]
    if isinstance(of, PCA | IncrementalPCA):
        reduced = (x - T(of.mean_)) @ T(of.components_).T
        return reduced / T(of.explained_variance_).sqrt() if of.whiten else reduced
    if isinstance(of, FastICA):
        return ((x - T(of.mean_)) if of.whiten else x) @ T(of.components_).T
    if isinstance(of, FactorAnalysis):
        loadings, noise = T(of.components_).T, T(of.noise_variance_)  # x = W z + noise: E[z | x]
        precision = torch.eye(loadings.shape[1]) + loadings.T @ (loadings / noise[:, None])
        return (x - T(of.mean_)) / noise @ loadings @ torch.linalg.inv(precision)
    if hasattr(of, "components_"):
        dense = of.components_.toarray() if hasattr(of.components_, "toarray") else of.components_
        return x @ T(dense).T
    return scaled(x, of)


ESTIMATORS: dict[str, Callable[[], Any]] = {
    "pca": lambda: PCA(3),
    "pca, whitened": lambda: PCA(3, whiten=True),
    "pca, by a share of the variance": lambda: PCA(0.999, whiten=True, svd_solver="full"),
    "incremental pca": lambda: IncrementalPCA(3),
    "incremental pca, whitened": lambda: IncrementalPCA(2, whiten=True, batch_size=20),
    "svd": lambda: TruncatedSVD(3, random_state=0),
    "ica, unit variance": lambda: FastICA(3, random_state=0),
    "ica, arbitrary variance": lambda: FastICA(3, whiten="arbitrary-variance", random_state=0),
    "ica, not whitened": lambda: make_pipeline(PCA(3, whiten=True), FastICA(whiten=False, random_state=0)),
    "factor analysis": lambda: make_pipeline(VarianceThreshold(), FactorAnalysis(2)),
    "random projection": lambda: GaussianRandomProjection(3, random_state=0),
    "sparse random projection": lambda: SparseRandomProjection(3, random_state=0),
    "standard": lambda: StandardScaler(),
    "standard, scale only": lambda: StandardScaler(with_mean=False),
    "standard, mean only": lambda: StandardScaler(with_std=False),
    "standard, neither": lambda: StandardScaler(with_mean=False, with_std=False),
    "min max": lambda: MinMaxScaler((-2, 5)),
    "max abs": lambda: MaxAbsScaler(),
    "robust": lambda: RobustScaler(unit_variance=True),
    "robust, scale only": lambda: RobustScaler(with_centering=False),
    "robust, centre only": lambda: RobustScaler(with_scaling=False),
    "variance threshold": lambda: VarianceThreshold(0.01),
    "k best": lambda: SelectKBest(f_classif, k=3),
    "scaler and pca": lambda: make_pipeline(StandardScaler(), PCA(3, whiten=True)),
    "pca and scaler": lambda: make_pipeline(PCA(3), MinMaxScaler()),
    "svd and scaler": lambda: make_pipeline(TruncatedSVD(3, random_state=0), StandardScaler()),
    "many steps": lambda: Pipeline(
        [("kept", "passthrough"), ("chosen", VarianceThreshold(1e-4)), ("left", None), ("range", MinMaxScaler()),
         ("inner", make_pipeline(RobustScaler(), PCA(4))), ("scale", StandardScaler()),
         ("ica", FastICA(2, random_state=0))]
    ),
    "selected behind a pca": lambda: make_pipeline(PCA(4), SelectKBest(f_classif, k=2), RobustScaler()),
}  # fmt: skip


def fitted(name: str, rows: Any = ROWS) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn: ICA that has not converged, constant features
        return ESTIMATORS[name]().fit(rows, LABELS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_map_is_what_transform_does(name: str) -> None:
    estimator = fitted(name)
    found = projection(estimator)
    rows = draw(7, D, seed=5) * 10 + T(ROWS.mean(0))
    close(found(rows), T(estimator.transform(rows.numpy())), rtol=1e-9)
    assert found.matrix.dtype == found.mean.dtype == torch.float64
    assert found.names is None
    # `mean` is mapped to 0, or to `offset`.
    origin = found(found.mean[None])[0]
    expected = torch.zeros(len(origin)).double() if found.offset is None else found.offset
    close(origin, expected, rtol=1e-12)
    close(T(estimator.transform(found.mean[None].numpy()))[0], expected, rtol=1e-8)
    half = projection(estimator, dtype=torch.float32)
    assert half.matrix.dtype == torch.float32
    assert half.offset is None or half.offset.dtype == torch.float32


@pytest.mark.parametrize("name", ESTIMATORS)
def test_contributions_by_features_are_the_chain_rule_and_add_up(name: str) -> None:
    estimator, features = fitted(name), T(ROWS[:9])
    reduced = T(estimator.transform(ROWS[:9]))
    net = settled(nn.Sequential(nn.Linear(reduced.shape[1], 5), nn.PReLU(), nn.Linear(5, 2)))
    found = jacops.contributions(net, reduced, projection=estimator, features=features)
    whole = nn.Sequential(Calls(lambda rows: copied(rows, estimator)), net)
    jacobian = oracle.input_jacobian(whole, features)
    mean = projection(estimator).mean
    close(found.jacobian, jacobian, rtol=1e-8)
    close(found.values, jacobian * (features - mean)[:, None], rtol=1e-8)
    # A piecewise-linear net is affine around each sample: what is left at the mean is the bias part.
    bias = whole(features).detach() - torch.einsum("nof,nf->no", jacobian, features - mean)
    close(found.bias, bias, rtol=1e-7)
    close(found.values.sum(2) + found.bias, found.output, rtol=1e-9)
    assert found.verification.relative_error < 1e-9


@pytest.mark.parametrize(
    ("name", "steps_mean"),
    [("pca", ROWS.mean(0)), ("scaler and pca", ROWS.mean(0)), ("standard", ROWS.mean(0)), ("svd", np.zeros(D)),
     ("min max", None), ("pca and scaler", ROWS.mean(0)), ("svd and scaler", np.zeros(D))],
)  # fmt: skip
def test_contributions_count_from_the_mean_of_the_training_data_where_there_is_one(name: str, steps_mean: Any) -> None:
    found = projection(fitted(name))
    if steps_mean is not None:
        close(found.mean, T(steps_mean), rtol=1e-9)
    assert (found.offset is None) == ("and scaler" not in name)


def test_a_wide_selection_never_makes_a_square_matrix() -> None:
    rows = np.zeros((8, 40_000))  # the square of which is 12 GB
    rows[:, ::1000] = draw(8, 40).numpy()
    estimator = make_pipeline(VarianceThreshold(), StandardScaler(), PCA(2)).fit(rows)
    found = projection(estimator)
    assert found.matrix.shape == (2, 40_000)
    close(found(T(rows)), T(estimator.transform(rows)), rtol=1e-9)


def test_features_that_were_fitted_with_names_keep_them() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS, columns=list("abcdef"))
    estimator = make_pipeline(StandardScaler(), PCA(2)).set_output(transform="pandas").fit(frame)
    found = projection(estimator)  # and without scikit-learn's warning of rows without names
    assert found.names == tuple("abcdef")
    assert "a, b, c, d, e, f" in repr(found)


def test_single_precision_and_sparse_results_are_compared_in_their_own_precision() -> None:
    estimator = PCA(3, whiten=True).fit(ROWS.astype(np.float32))
    found = projection(estimator)
    close(found(T(ROWS)), T(estimator.transform(ROWS)), rtol=1e-4)


@pytest.mark.parametrize(
    ("estimator", "words"),
    [(KernelPCA(2, kernel="rbf"), "KernelPCA"), (PolynomialFeatures(2), "PolynomialFeatures"),
     (QuantileTransformer(n_quantiles=9), "QuantileTransformer"), (SparsePCA(2, max_iter=5), "SparsePCA"),
     (MinMaxScaler(clip=True), "MinMaxScaler with clip=True"), (MaxAbsScaler(clip=True), "MaxAbsScaler with clip=True"),
     (ColumnTransformer([("a", StandardScaler(), [0, 1])]), "ColumnTransformer"),
     (make_pipeline(FunctionTransformer(np.tanh), PCA(2)), "a Pipeline whose step functiontransformer is"),
     (make_pipeline(make_pipeline(QuantileTransformer(n_quantiles=9))), "step pipeline.quantiletransformer is")],
)  # fmt: skip
@pytest.mark.parametrize("call", ["projection", "contributions"])
def test_what_is_not_affine_is_refused_by_name(estimator: Any, words: str, call: str) -> None:
    fit = estimator.fit(ROWS)
    argument = "estimator" if call == "projection" else "projection"
    net = nn.Linear(2, 2).double()
    calls: dict[str, Callable[[], Any]] = {
        "projection": lambda: projection(fit),
        "contributions": lambda: jacops.contributions(net, draw(N, 2), projection=fit, features=T(ROWS)),
    }
    with pytest.raises(InputTypeError, match=rf"`{argument}` is .*{words}.*affine map is needed: PCA, .*Pipeline"):
        calls[call]()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_not_fitted_is_refused(name: str) -> None:
    with pytest.raises(InputTypeError, match=r"`estimator` is an? .* that is not fitted.*\.fit"):
        projection(ESTIMATORS[name]())


def test_a_subclass_with_a_transform_of_its_own_is_refused() -> None:
    class Doubled(PCA):
        def transform(self, X: Any) -> Any:  # noqa: N803
            return 2 * super().transform(X)

    class Wider(StandardScaler):
        def transform(self, X: Any, copy: Any = None) -> Any:  # noqa: N803
            return np.hstack([super().transform(X)] * 2)

    for estimator, words in ((Doubled(2), "off by"), (Wider(), r"of shape \(5, 12\)")):
        with pytest.raises(InputError, match=rf"a {type(estimator).__name__} whose `transform` is not.*{words}"):
            projection(estimator.fit(ROWS))
    assert projection(type("Mine", (PCA,), {})(2).fit(ROWS)).matrix.shape == (2, D)


def test_a_projection_that_does_not_belong_to_the_rows_is_refused() -> None:
    estimator = fitted("pca and scaler")
    reduced, net = T(estimator.transform(ROWS)), nn.Linear(3, 2).double()
    found = Projection(*(getattr(projection(estimator), name) for name in ("matrix", "mean")))  # the offset left out
    with pytest.raises(InputError, match="`x` is not `projection` applied to `features`"):
        jacops.contributions(net, reduced, projection=found, features=T(ROWS))
