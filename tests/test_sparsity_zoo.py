"""The sparse engine on every awkward model: the same numbers as the dense operator, or the same refusal."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacops
import zoo
from jacops.charts import SO3
from jacops.sparse import detect_pattern, sparse_plan


@pytest.mark.parametrize("name", [c.name for c in zoo.ZOO if c.dtype is torch.float64])
def test_sparse_is_dense_on_every_model(name: str) -> None:
    case = zoo.BY_NAME[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jacops.JacopsWarning)
        try:
            with zoo.seeded():
                dense = jacops.jacobian(case.model(), case.x(), allow_zero=True).dense()
        except jacops.JacopsError as refusal:
            with pytest.raises(type(refusal)):
                jacops.sparse.jacobian(jacops.jacobian(case.model(), case.x(), allow_zero=True))
            return
        with zoo.seeded():
            found = jacops.sparse.jacobian(jacops.jacobian(case.model(), case.x(), allow_zero=True), layout="scipy")
    torch.testing.assert_close(torch.from_numpy(found.matrix.toarray()), dense, atol=1e-9, rtol=1e-9)


# ---- residuals: the exact pattern, and how many sweeps it takes --------------------------------------------------


class Residual(nn.Module):
    """A function of a parameter and constants."""

    def __init__(self, function: Callable[..., Tensor], x: Tensor, **constants: Any) -> None:
        super().__init__()
        self.function, self.x = function, nn.Parameter(x.double())
        self.__dict__.update(constants)  # buffers must be strided

    def forward(self) -> Tensor:
        return self.function(self)


class Expected(NamedTuple):
    """A residual, the most sweeps it may take, and whether all entries of its pattern are nonzero here."""

    name: str
    model: Callable[[], nn.Module]
    sweeps: int
    exact: bool = True


def spline(many: int, knots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places, values and the dense matrix of a cubic B-spline basis."""
    at = torch.linspace(0.01, knots - 3.01, many, dtype=torch.float64)
    first = at.floor().long()
    u = at - first
    basis = torch.stack([(1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3], -1) / 6
    places = first[:, None] + torch.arange(4)
    return places, basis, torch.zeros(many, knots).double().scatter(1, places, basis)


def of_spline(how: Callable[..., Tensor], many: int, knots: int, layout: str = "strided") -> nn.Module:
    places, basis, dense = spline(many, knots)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|CSC)", UserWarning)
        A = getattr(dense, f"to_{layout}")() if layout != "strided" else dense
    return Residual(how, torch.randn(knots), places=places, basis=basis, A=A)


def sampled(mode: str, padding: str, align: bool, rank: int = 2) -> nn.Module:
    space, seen = ((9, 11), (7, 8)) if rank == 2 else ((4, 5, 6), (3, 4, 2))
    grid = 2.6 * torch.rand(2, *seen, rank).double() - 1.3
    return Residual(
        lambda m: F.grid_sample(m.x, m.grid, mode=mode, padding_mode=padding, align_corners=align),
        torch.randn(2, 3, *space),
        grid=grid,
    )


def bags(mode: str, **constants: Any) -> nn.Module:
    indices, offsets = torch.randint(0, 30, (40,)), torch.arange(0, 40, 4)
    return Residual(
        lambda m: F.embedding_bag(
            m.indices, m.x, m.offsets, mode=mode, per_sample_weights=getattr(m, "w", None), padding_idx=3
        ),
        torch.randn(30, 2),
        indices=indices,
        offsets=offsets,
        **constants,
    )


def residuals() -> Iterator[Expected]:
    ways: dict[str, tuple[Callable[..., Tensor], str]] = {
        "gathered": (lambda m: (m.basis * m.x[m.places]).sum(-1), "strided"),
        "gathered from computed": (lambda m: (m.basis * m.x.exp()[m.places]).sum(-1), "strided"),
        "dense": (lambda m: m.A @ m.x, "strided"),
        "CSR": (lambda m: m.A @ m.x, "sparse_csr"),
        "CSC": (lambda m: m.A @ m.x, "sparse_csc"),
        "COO": (lambda m: m.A @ m.x, "sparse_coo"),
        "sparse.mm": (lambda m: torch.sparse.mm(m.A, m.x[:, None])[:, 0], "sparse_csr"),
        "addmm": (lambda m: torch.addmm(m.x[:1, None], m.A, m.x[:, None].sin())[:, 0], "sparse_csr"),
        "matrix": (lambda m: (m.A @ torch.stack([m.x, m.x**2], -1)).reshape(-1), "sparse_csr"),
    }
    for name, (how, layout) in ways.items():
        yield Expected(f"spline, {name}", lambda h=how, k=layout: of_spline(h, 400, 42, k), 10)
    for mode in ("bilinear", "nearest", "bicubic"):
        for padding in ("zeros", "border", "reflection"):
            for align in (True, False):
                name = f"grid_sample, {mode}, {padding}, {align}"
                yield Expected(name, lambda m=mode, p=padding, a=align: sampled(m, p, a), 60)
    for mode in ("bilinear", "nearest"):
        yield Expected(f"grid_sample in space, {mode}", lambda m=mode: sampled(m, "border", False, 3), 60)
    image = torch.randn(2, 3, 5, 6).double()
    yield Expected(
        "grid_sample by its grid",
        lambda: Residual(lambda m: F.grid_sample(m.image, m.x.tanh() * 0.9, align_corners=True),
                         torch.randn(2, 4, 4, 2), image=image), 3)  # fmt: skip
    yield Expected("embedding_bag, sum", lambda: bags("sum"), 10)
    yield Expected("embedding_bag, mean", lambda: bags("mean"), 10)
    yield Expected("embedding_bag, max", lambda: bags("max"), 10)
    yield Expected("embedding_bag, weighted", lambda: bags("sum", w=torch.randn(40).double()), 10)
    yield Expected(
        "embedding_bag by its weights",
        lambda: Residual(lambda m: F.embedding_bag(m.i, m.table, m.o, mode="sum", per_sample_weights=m.x),
                         torch.randn(12), i=torch.arange(12) % 5, o=torch.arange(0, 12, 3),
                         table=torch.randn(5, 2).double()), 6)  # fmt: skip
    for p in (1.0, 2.0, 3.0):
        for exact in ("use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"):
            yield Expected(
                f"cdist, {p:g}, {exact}",
                lambda p=p, e=exact: Residual(lambda m: torch.cdist(m.x, m.fixed, p, compute_mode=e),
                                              torch.randn(2, 6, 3), fixed=torch.ones(2, 5, 3).double()), 5)  # fmt: skip
    yield Expected(
        "cdist of both",
        lambda: Residual(lambda m: torch.cdist(m.x[:4], m.x[4:], 1.0), torch.randn(9, 3)), 27)  # fmt: skip
    yield Expected("pdist", lambda: Residual(lambda m: F.pdist(m.x, 2.0), torch.randn(20, 3)), 30)
    for name in ("rfft", "hfft", "fft"):
        yield Expected(
            name,
            lambda n=name: Residual(lambda m: torch.view_as_real(getattr(torch.fft, n)(m.x) + 0j), torch.randn(20, 8)),
            16, exact=False)  # fmt: skip
    yield Expected(
        "irfft",
        lambda: Residual(lambda m: torch.fft.irfft(torch.view_as_complex(m.x), n=8, dim=1), torch.randn(20, 5, 2)),
        8, exact=False)  # fmt: skip
    yield Expected("cumsum", lambda: Residual(lambda m: m.x.sin().cumsum(1), torch.randn(50, 4)), 4)
    yield Expected("cumprod", lambda: Residual(lambda m: m.x.cumprod(1), torch.randn(50, 4)), 4, exact=False)
    yield Expected(
        "cumsum of cumprod",
        lambda: Residual(lambda m: m.x.cumprod(0).cumsum(0), torch.rand(6, 50) + 0.5), 6, exact=False)  # fmt: skip
    yield Expected("logcumsumexp", lambda: Residual(lambda m: m.x.logcumsumexp(-1), torch.randn(50, 4)), 4)
    yield Expected(
        "a few of a long cumsum",
        lambda: Residual(lambda m: m.x.cumsum(0)[m.at], torch.randn(1500, 2), at=torch.arange(8) * 170),
        8,
    )


RESIDUALS = list(residuals())


def exact_pattern(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Return a Jacobian row by row, and where it is not zero."""
    y = model().reshape(-1)
    rows = [torch.autograd.grad(v, model.x, retain_graph=True)[0].reshape(-1) for v in y]
    J = torch.stack(rows).numpy()
    return J, J != 0


@pytest.mark.parametrize("case", RESIDUALS, ids=[case.name for case in RESIDUALS])
def test_no_entry_of_a_residual_is_missed(case: Expected) -> None:
    torch.manual_seed(5)
    model = case.model()
    J, truth = exact_pattern(model)
    for local in (False, True):
        found = detect_pattern(model, (), local=local)
        assert not found.unknown
        seen = found.matrix.toarray()
        assert not (truth & ~seen).any()
        extra = int((seen & ~truth).sum())
        assert extra == 0 if case.exact else extra <= truth.sum()
    plan = sparse_plan(model, ())
    assert plan.sweeps <= case.sweeps
    np.testing.assert_allclose(plan.evaluate(model, ()).matrix.toarray(), J, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["strided", "sparse_csr", "sparse_coo"])
def test_a_long_spline_takes_few_sweeps(layout: str) -> None:
    model = of_spline(lambda m: m.A @ m.x, 8000, 402, layout)
    plan = sparse_plan(model, ())
    assert plan.sweeps <= 10
    assert plan.pattern.nnz == 32_000
    found = plan.evaluate(model, ()).matrix
    assert abs(found - spline(8000, 402)[2].numpy()).max() == 0


def test_a_sparse_matrix_that_is_the_point_keeps_its_pattern() -> None:
    _, _, dense = spline(60, 12)

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.randn(12).double())

        def forward(self, values: Tensor) -> Tensor:
            return torch.sparse_coo_tensor(dense.nonzero().T, values, dense.shape, check_invariants=False) @ self.x

    values = dense[dense != 0]
    values[::3] = 0  # zeros of an input are not permanent
    found = detect_pattern(Given(), values)
    assert found.unknown == {}
    np.testing.assert_array_equal(found.matrix.toarray(), (dense != 0).numpy())


# ---- selections of what is computed row by row -------------------------------------------------------------------


def pairs(compute: Callable[[Tensor], Tensor], width: int | None, select: Callable[..., Tensor] | None = None) -> Any:
    """Return a model whose rows each read two rows of what is computed from its parameter."""
    torch.manual_seed(2)
    i, j = torch.randint(0, 40, (2, 150))
    select = select or (lambda p, k: p[k])
    shape = (40,) if width is None else (40, width)
    return Residual(lambda m: select(compute(m.x), i) - 2 * select(compute(m.x), j) ** 2, torch.randn(*shape).double())


W = torch.rand(40, 1).double()
BY_ROWS: dict[str, tuple[Any, int]] = {
    "elementwise": (lambda: pairs(lambda x: 1 / (1 + x**2), None), 1),
    "with constants": (lambda: pairs(lambda x: (x.exp() * W + torch.ones(3).double()).sin(), 3), 1),
    "normalized": (lambda: pairs(lambda x: x / x.norm(dim=-1, keepdim=True), 4), 4),
    "rows of the exponential": (lambda: pairs(SO3.exp, 3), 4),
    "of parts": (lambda: pairs(lambda x: torch.cat([x[..., :2].sin(), x[:, 2:] * x[:, :1]], -1), 3), 2),
    "two ways": (lambda: pairs(lambda x: x.cos(), 3, lambda p, k: p.index_select(0, k) + p[k, :1] + p[k, 1:2]), 3),
    "normalized by torch": (lambda: pairs(lambda x: F.normalize(x, dim=-1), 4), 4),
    "embedded": (lambda: pairs(torch.exp, 3, lambda p, k: F.embedding(k, p)), 1),
    "of a turned one": (lambda: pairs(lambda x: x.sin() + x.roll(1, 0).relu(), 2), 1),
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_selections_of_what_is_computed_by_rows_are_lifted(name: str) -> None:
    build, most = BY_ROWS[name]
    model = build()
    plan = sparse_plan(model, ())
    assert plan.sweeps <= most < sparse_plan(model, (), lift=False).sweeps
    for _ in range(2):
        found = plan.evaluate(model, ())
        J, truth = exact_pattern(model)
        np.testing.assert_allclose(found.matrix.toarray(), J, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.output, model().detach(), rtol=1e-12, atol=1e-12)
        assert not (truth & ~plan.pattern.matrix.toarray()).any()
        with torch.no_grad():
            model.x += 0.3


def written(x: Tensor) -> Tensor:
    p = x.sin()
    p += x.roll(1, 0).mean(0)
    return p


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x.softmax(0),
        lambda x: x - x.mean(0),
        lambda x: F.normalize(x, dim=0),
        lambda x: x.cumsum(0).sin(),
        lambda x: (x @ x.T) @ x,
        lambda x: x.exp().flip(0).T.reshape(40, 3),
        written,
        lambda x: x.sin().max(0, keepdim=True).values + x,
    ],
)
def test_rows_that_mix_are_not_taken_for_rows(mixing: Callable[[Tensor], Tensor]) -> None:
    model = pairs(mixing, 3)
    plan = sparse_plan(model, ())
    J, truth = exact_pattern(model)
    np.testing.assert_allclose(plan.evaluate(model, ()).matrix.toarray(), J, rtol=1e-9, atol=1e-12)
    assert not (truth & ~plan.pattern.matrix.toarray()).any()
