"""The curvature backend of the laplace-torch recipe, against that library's own plain implementations."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

laplace: Any = pytest.importorskip("laplace", exc_type=ImportError)

PAGE = Path(__file__).parent.parent / "docs" / "recipes" / "laplace.md"
BACKENDS: dict[str, Any] = {"__name__": "laplace_recipe"}
exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0], BACKENDS)
PLAIN = {"JacopsGGN": laplace.curvature.GGNInterface, "JacopsEF": laplace.curvature.EFInterface}
KINDS = ["classification", "regression"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(711)
    images = [nn.Conv2d(3, 4, 2, 2), nn.Flatten(), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 2)]
    return {
        "mlp": (nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)), torch.randn(10, 3)),
        "images": (nn.Sequential(*images), torch.randn(10, 3, 5, 5)),
    }


def case(name: str, kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    net, x = nets()[name]
    y = torch.randint(2, (10,)) if kind == "classification" else torch.randn(10, 2)
    return net.double(), x.double(), y if kind == "classification" else y.double()


def close(ours: Any, plain: Any) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "images"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("question", ["full", "diag"])
def test_curvature_is_that_of_the_plain_interface(name: str, kind: str, backend: str, question: str) -> None:
    net, x, y = case(name, kind)
    loss, found = getattr(BACKENDS[backend](net, kind), question)(x, y, N=10)
    plain_loss, plain = getattr(PLAIN[backend](net, kind), question)(x, y, N=10)
    close(loss, plain_loss)
    close(found, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hessian_is_torchs(kind: str) -> None:
    net, x, y = case("mlp", kind)
    ours = BACKENDS["JacopsHessian"](net, kind)
    named = dict(net.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = {n: v.view_as(p) for (n, p), v in zip(named.items(), flat.split(sizes), strict=True)}
        return ours.factor * ours.lossfunc(torch.func.functional_call(net, parts, x), y)

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    close(ours.full(x, y)[1], torch.func.hessian(loss)(flat))


@pytest.mark.parametrize("name", ["mlp", "images"])
def test_jacobians_and_gradients_are_the_plain_ones(name: str) -> None:
    net, x, y = case(name, "classification")
    ours, plain = BACKENDS["JacopsGGN"](net, "classification"), PLAIN["JacopsGGN"](net, "classification")
    for a, b in zip(ours.jacobians(x), plain.jacobians(x), strict=True):
        close(a, b)
    for a, b in zip(ours.gradients(x, y), plain.gradients(x, y), strict=True):
        close(a.detach(), b.detach())
    assert ours.jacobians(x, enable_backprop=True)[0].requires_grad


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_kronecker_factors_of_batches_add_up(backend: str, kind: str, approximation: str) -> None:
    for name in ("mlp", "images"):
        net, x, y = case(name, kind)
        own = BACKENDS[backend](net, kind)
        loss, whole = own.kron(x, y, N=10, kfac_approx=approximation)
        parts = [own.kron(x[some], y[some], N=10, kfac_approx=approximation) for some in (slice(3), slice(3, 10))]
        close(parts[0][0] + parts[1][0], loss)
        close((parts[0][1] + parts[1][1]).diag(), whole.diag())
        assert len(whole.diag()) == sum(p.numel() for p in net.parameters())
        exact = own.full(x[:1], y[:1])[1]
        one = own.kron(x[:1], y[:1], N=1, kfac_approx=approximation)[1].to_matrix()
        if name == "mlp":  # one sample at one position: the blocks are exact
            start = 0
            for p in net.parameters():
                where = slice(start, start + p.numel())
                close(one[where, where], exact[where, where])
                start += p.numel()


def test_draws_come_near_the_exact_matrix() -> None:
    net, x, y = case("mlp", "classification")
    exact = BACKENDS["JacopsGGN"](net, "classification")
    drawn = BACKENDS["JacopsGGN"](net, "classification", stochastic=True)
    for question in ("full", "kron"):
        found = [getattr(exact, question)(x, y, N=10)[1], getattr(drawn, question)(x, y, N=10, mc_samples=1000)[1]]
        right, near = (own if question == "full" else own.to_matrix() for own in found)
        assert 0 < float((near - right).norm() / right.norm()) < 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "images"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_kronecker_factors_are_those_of_curvlinops(kind: str, name: str, approximation: str) -> None:
    pytest.importorskip("curvlinops", exc_type=ImportError)
    net, x, y = case(name, kind)
    for own, other in (("JacopsGGN", laplace.curvature.CurvlinopsGGN), ("JacopsEF", laplace.curvature.CurvlinopsEF)):
        matrices = [
            backend(net, kind).kron(x, y, N=10, kfac_approx=approximation)[1].to_matrix()
            for backend in (BACKENDS[own], other)
        ]
        close(*matrices)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("weights", ["all", "last_layer"])
def test_posteriors_are_fitted(backend: str, structure: str, weights: str) -> None:
    net, x, y = case("images", "classification")
    posterior = laplace.Laplace(net, "classification", weights, structure, backend=BACKENDS[backend])
    posterior.fit(DataLoader(TensorDataset(x, y), batch_size=4))
    assert bool(torch.isfinite(posterior.log_marginal_likelihood()))
    close(posterior(x).sum(1), torch.ones(10, dtype=torch.float64))


def test_the_last_layer_is_a_part_of_the_whole() -> None:
    net, x, y = case("mlp", "classification")
    whole = BACKENDS["JacopsGGN"](net, "classification").full(x, y)[1]
    extractor = laplace.utils.FeatureExtractor(net)
    extractor(x)
    last = BACKENDS["JacopsGGN"](extractor, "classification", last_layer=True)
    close(last.full(x, y)[1], whole[-42:, -42:])
    for a, b in zip(last.last_layer_jacobians(x), last.jacobians(x), strict=True):
        close(a, b)
