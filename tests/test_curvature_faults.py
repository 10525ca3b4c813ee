"""Curvature at rounding level, wrong keywords, models that change, objectives at zero loss, class weights."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import jacops
from jacops._torch.model.output_curvature import ProbedHessian
from jacops.errors import InputError, InputTypeError, ModelStateError, NonFiniteError, NotDifferentiableError

FLOATS = [torch.float32, torch.float64]


def net(dtype: torch.dtype = torch.float64, seed: int = 0, gain: float = 1.0, middle: nn.Module | None = None) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 6), middle or nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        model[2].weight.mul_(gain)
    return model


def rows(dtype: torch.dtype = torch.float64, many: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(many, 3, dtype=dtype), torch.randint(3, (many,))


# ---- the symmetry check ----

CONSTANT: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "sum of a softmax": lambda o, y: o.softmax(-1).sum(-1).mean(),
    "sum of exponentials of a log-softmax": lambda o, y: o.log_softmax(-1).exp().sum(-1).mean(),
    "sigmoid and its mirror": lambda o, y: (o.sigmoid() + (-o).sigmoid()).mean(),
    "shifted log-sum-exp": lambda o, y: (o.logsumexp(-1) - (o - 5).logsumexp(-1)).mean(),
    "length of a normalised vector": lambda o, y: F.normalize(o, dim=-1).square().sum(-1).mean(),
}
SATURATED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "cross-entropy": lambda o, y: F.cross_entropy(o, o.argmax(-1)),
    "probability": lambda o, y: -o.softmax(-1).amax(-1).mean(),
    "focal": lambda o, y: ((1 - o.softmax(-1).amax(-1)) ** 2 * F.cross_entropy(o, o.argmax(-1))).mean(),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CONSTANT)
def test_curvature_of_a_constant_loss_is_zero_up_to_rounding(name: str, dtype: torch.dtype):
    x, y = rows(dtype)
    for gain, scale in ((1.0, 1.0), (300.0, 1.0), (30.0, 1e-20), (30.0, 1e20)):
        model = net(dtype, gain=gain)

        def loss(o: Tensor, y: Any, scale: float = scale) -> Tensor:
            return scale * CONSTANT[name](o, y)

        typical = jacops.hessian(model, lambda o, y: o.square().mean(), x, y).dense().abs().max()
        for call in (jacops.hessian, jacops.ggn):
            found = call(model, loss, x, y).dense()
            assert float(found.abs().max()) / scale <= 1e3 * torch.finfo(dtype).eps * max(float(typical), 1.0) * gain


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SATURATED)
def test_confident_classifiers_have_a_curvature(name: str, dtype: torch.dtype):
    x, y = rows(dtype)
    for seed in range(2):
        for gain in (10.0, 300.0, 1000.0):
            model = net(dtype, seed, gain)
            for call in (jacops.hessian, jacops.ggn):
                call(model, SATURATED[name], x, y)
            jacops.hvp(model, SATURATED[name], x, y, torch.ones(45, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_confident_linear_classifiers_have_influences(dtype: torch.dtype):
    for gain in (1.0, 30.0, 300.0, 3000.0):
        torch.manual_seed(0)
        model = nn.Linear(4, 2).to(dtype)
        with torch.no_grad():
            model.weight.mul_(gain)
        x = torch.randn(30, 4, dtype=dtype)
        twice = jacops.TorchTwiceDifferentiable(model, nn.CrossEntropyLoss())
        found = jacops.compute_influences(twice, [(x, model(x).argmax(1))], curvature="ggn", damping=1e-3)
        assert bool(torch.isfinite(found.values).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_second_derivatives_by_the_input_of_constants_are_zero_up_to_rounding(dtype: torch.dtype):
    x, _ = rows(dtype)
    model = net(dtype)
    for loss in CONSTANT.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about samples: another matter
            found = jacops.input_hessian(lambda x, loss=loss: loss(model(x), None).expand(len(x), 1), x[:1])
            assert float(found.abs().max()) <= 1e4 * torch.finfo(dtype).eps
            jacops.laplacian(lambda x, loss=loss: loss(model(x), None).expand(len(x), 1), x[:1])


class TooLarge(torch.autograd.Function):
    """A square with a backward that is one percent too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 1.01 * grad * 2 * ctx.saved_tensors[0]


class Detached(TooLarge):
    """A square whose backward drops its second derivative."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 2 * ctx.saved_tensors[0].detach()


class Once(TooLarge):
    """A square whose backward is marked as not differentiable."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 2 * ctx.saved_tensors[0]


class Right(TooLarge):
    """A square with its right backward."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 2 * ctx.saved_tensors[0]


class Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class FusedWeightNorm(nn.Module):
    """Torch's fused weight norm, whose second derivative is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.rand(6, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.tanh(), torch.ops.aten._weight_norm_interface(self.v, self.g, 0)[0])


WRONG: dict[str, Callable[[], nn.Module]] = {
    "fused weight norm": FusedWeightNorm,
    "detached": lambda: Applied(Detached),
    "once_differentiable": lambda: Applied(Once),
    "one percent": lambda: Applied(TooLarge),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_second_derivatives_are_refused_at_any_scale(name: str, scale: float, dtype: torch.dtype):
    x, y = rows(dtype)
    for gain in (1.0, 5.0):
        torch.manual_seed(0)
        model = net(dtype, gain=gain, middle=WRONG[name]())
        with pytest.raises(NotDifferentiableError):
            jacops.hessian(model, lambda o, y: scale * F.cross_entropy(o, y), x, y)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_right_custom_functions_are_taken_at_any_scale(scale: float, dtype: torch.dtype):
    x, y = rows(dtype)
    constant = CONSTANT["sum of a softmax"]
    for loss in (
        F.cross_entropy,
        constant,
        SATURATED["cross-entropy"],
        lambda o, y: o.sum(),
        lambda o, y: (o**4).sum(),
    ):
        model = net(dtype, gain=30.0, middle=Applied(Right))
        jacops.hessian(model, lambda o, y, loss=loss: scale * loss(o, y), x, y)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_wrong_second_derivatives_by_the_input_are_refused_at_any_scale(scale: float):
    x, _ = rows()
    for function in (Detached, Once, TooLarge):
        model = net(middle=Applied(function))
        for call in (jacops.input_hessian, jacops.laplacian):
            with pytest.raises(NotDifferentiableError):
                call(lambda x, model=model: scale * model(x).square().sum(-1, keepdim=True), x)
    right = net(middle=Applied(Right))
    jacops.input_hessian(lambda x: scale * right(x).square().sum(-1, keepdim=True), x)
    jacops.directional_derivative(lambda x: scale * right(x), x, torch.ones_like(x), 2)


def test_a_check_that_only_rounding_passed_proves_nothing():
    """A wrong kernel at a point where the curvature is lost in rounding is refused once it matters."""
    torch.manual_seed(0)
    model, (x, _) = net(torch.float32, middle=FusedWeightNorm()), rows(torch.float32)
    model[2].weight.data.mul_(1e4)
    target = model(x).argmax(1)
    jacops.hessian(model, F.cross_entropy, x, target)
    model[2].weight.data.div_(1e4)
    with pytest.raises(NotDifferentiableError, match="not symmetric"):
        jacops.hessian(model, F.cross_entropy, x, target)


class Radial(nn.Module):
    """The norm of the parameter: torch's second derivative of it at zero is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-(torch.linalg.norm(self.p) ** 2)) * x


def test_nan_does_not_pass_the_symmetry_check():
    x = torch.ones(1, dtype=torch.float64)
    for _ in range(2):  # nor is it remembered
        with pytest.raises(NonFiniteError, match="hessian"):
            jacops.hessian(Radial(), lambda o, y: o.sum(), x, None)
    big = torch.randn(10, 3) * 1e30
    for call in (jacops.hessian, jacops.ggn):
        with pytest.raises(NonFiniteError):
            call(net(torch.float32, middle=nn.ReLU()), F.mse_loss, big, torch.zeros(10, 3)).dense()


def test_jax_hessians_have_the_same_floor():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((6, 3)), jnp.float32)

    def constant(o: Any, y: Any) -> Any:
        return jax.nn.softmax(o).sum(-1).mean()

    def apply(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {
        "a": jnp.asarray(generator.standard_normal((3, 4)), jnp.float32),
        "b": jnp.asarray(30 * generator.standard_normal((4, 2)), jnp.float32),
    }
    found = jacops.JaxTwiceDifferentiable(apply, params, constant).hessian(x, jnp.zeros(6))
    assert float(jnp.abs(found).max()) < 1e-2


# ---- keywords ----

CALLS = {name: getattr(jacops, name) for name in jacops.__all__ if inspect.isfunction(getattr(jacops, name))}
INTERNAL = ("shift", "purpose", "finish", "connected", "kept", "call", "copies", "no_such_keyword")
# What calls have under these names is their own: what is differentiated by.
OWN = {name: {"at", "wrt"} for name in ("hessian", "ggn", "fisher", "hvp", "ggnvp")}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_wrong_keyword_names_the_call_the_user_made(name: str):
    has = {p.name for p in inspect.signature(CALLS[name]).parameters.values()}
    for keyword in (*INTERNAL, *({"at", "training", "wrt"} - has - OWN.get(name, set()))):
        if (
            keyword in has
            or keyword in OWN.get(name, set())
            or (name in ("contributions", "integrated_jacobian") and keyword == "at")
            or name == "plan"
        ):
            continue
        with pytest.raises(InputTypeError, match=rf"{name}\(\) has no keyword `{keyword}`"):
            CALLS[name](**{keyword: 1})


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_misspelled_keyword_comes_with_the_nearest_one(name: str):
    named = [p.name for p in inspect.signature(CALLS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = [p for p in inspect.signature(CALLS[name]).parameters.values() if p.kind is p.VAR_KEYWORD]
    if options and name != "plan":
        named += ["progress" if "compute" in name or "self" in name or name == "contributions" else "fallback"]
    for keyword in named:
        with pytest.raises(InputTypeError, match=f"Did you mean `{keyword}`"):
            CALLS[name](**{keyword + "_": 1})


def test_a_wrong_keyword_of_a_planned_call_is_named():
    with pytest.raises(InputTypeError, match="Did you mean `batch_size`"):
        jacops.plan(jacops.compute_jacobian, net(), rows()[0], batchsize=3)


@pytest.mark.parametrize(
    "call", [jacops.hessian, jacops.ggn, jacops.sample_gradients, jacops.linalg.empirical_fisher, jacops.fisher]
)
def test_options_that_are_documented_go_through(call: Any):
    x, y = rows()
    found = call(
        net(), F.cross_entropy, x, y, parameters=lambda n, p: n == "2.bias", checks="always", fallback="silent"
    )
    assert found.shape[1] == 3


# ---- operators whose model changed ----


def _stepped(model: nn.Module, **options: Any) -> None:
    x, y = rows()
    F.cross_entropy(model(x), y).backward()
    torch.optim.Adam(model.parameters(), 0.1, **options).step()


def _replaced(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = torch.randn_like(p)


def _averaged(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.lerp_(torch.ones_like(p), 0.5)


def _through_numpy(model: nn.Module) -> None:
    model.get_parameter("2.weight").detach().numpy()[1, 1] += 1.0


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    ".data.mul_": lambda model: [p.data.mul_(2) for p in model.parameters()],
    ".data =": _replaced,
    "numpy": _through_numpy,
    "load_state_dict": lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}),
    "moving average": _averaged,
    "swapped rows": lambda model: model.get_parameter("0.weight").data.copy_(model.get_parameter("0.weight").flip(0)),
    "optimiser, foreach": lambda model: _stepped(model, foreach=True),
    "optimiser, fused": lambda model: _stepped(model, fused=True),
}
OPERATORS: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "jacobian": lambda m, x, y: jacops.jacobian(m, x),
    "jacobian by inputs": lambda m, x, y: jacops.jacobian(m, x, "inputs"),
    "jacobian of the last layer": lambda m, x, y: jacops.jacobian(m, x, parameters=lambda n, p: n.startswith("2")),
    "hessian": lambda m, x, y: jacops.hessian(m, F.cross_entropy, x, y),
    "ggn": lambda m, x, y: jacops.ggn(m, F.cross_entropy, x, y),
    "fisher": lambda m, x, y: jacops.fisher(m, F.cross_entropy, x),
    "monte carlo fisher": lambda m, x, y: jacops.fisher(m, F.cross_entropy, x, kind="monte_carlo"),
    "empirical fisher": lambda m, x, y: jacops.linalg.empirical_fisher(m, F.cross_entropy, x, y),
    "sample gradients": lambda m, x, y: jacops.sample_gradients(m, F.cross_entropy, x, y),
    "sample jacobians": lambda m, x, y: jacops.sample_jacobians(m, x),
    "inverse": lambda m, x, y: jacops.inverse(jacops.ggn(m, F.cross_entropy, x, y), damping=0.1),
    "sum": lambda m, x, y: 2 * jacops.ggn(m, F.cross_entropy, x, y) + jacops.hessian(m, F.cross_entropy, x, y),
    "Problem.hessian": lambda m, x, y: jacops.Problem(m, F.cross_entropy, [(x, y), (x, y)]).hessian(),
    "Problem.ggn": lambda m, x, y: jacops.Problem(m, F.cross_entropy, [(x, y), (x, y)]).ggn(),
    "Problem.fisher": lambda m, x, y: jacops.Problem(m, F.cross_entropy, [(x, y)]).fisher("empirical"),
    "Problem.sample_gradients": lambda m, x, y: jacops.Problem(m, F.cross_entropy, [(x, y)]).sample_gradients(),
}


def _old_or_refused(operator: Any, old: Tensor, name: str) -> str:
    try:
        found = operator @ torch.ones(operator.shape[1], dtype=torch.float64)
    except ModelStateError as error:
        return str(error)
    torch.testing.assert_close(found, old, rtol=1e-8, atol=1e-10, msg=f"{name}: neither the old point nor an error")
    return ""


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_answers_for_the_point_where_it_was_made(name: str, large: bool, monkeypatch: pytest.MonkeyPatch):
    if large:  # as models are treated whose copies would take much memory
        monkeypatch.setattr("jacops._torch.sweeps.weights.COPIED", 0)
    x, y = rows()
    old = OPERATORS[name](net(), x, y) @ torch.ones(_columns(name, x), dtype=torch.float64)
    for write in WRITES.values():
        model = net()
        operator = OPERATORS[name](model, x, y)
        write(model)
        said = _old_or_refused(operator, old, name)
        assert not said or ("changed since" in said and ".weight'" in said)
        assert "inplace" not in said


def _columns(name: str, x: Tensor) -> int:
    return {"jacobian by inputs": x.numel(), "jacobian of the last layer": 21}.get(name, 45)


def test_inputs_and_targets_written_after_the_operator_was_made_do_not_matter():
    for name in ("jacobian", "hessian", "ggn", "empirical fisher", "sample gradients", "sample jacobians"):
        x, y = rows()
        v = torch.ones(45, dtype=torch.float64)
        operator = OPERATORS[name](net(), x, y)
        old = operator @ v
        x.data.mul_(2)
        y.copy_(y.roll(1))
        torch.testing.assert_close(OPERATORS[name](net(), *rows()) @ v, old)
        assert torch.equal(operator @ v, old)


def test_buffers_and_modes_of_a_model_that_is_run_again_are_compared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
    x, y = rows()
    for change in (lambda: model[1].running_mean.add_(1), lambda: model.train()):
        operator = jacops.Problem(model.eval(), F.cross_entropy, [(x, y)]).ggn()
        change()
        with pytest.raises(ModelStateError, match=r"changed since.*(running_mean|mode)"):
            operator @ torch.ones(operator.shape[1], dtype=torch.float64)


def test_a_model_that_changed_is_refused_by_solvers_that_read_its_data_again():
    x, y = rows()
    model = net()
    operator = jacops.Problem(model, nn.CrossEntropyLoss(), [(x, y)]).ggn()
    _averaged(model)
    with pytest.raises(ModelStateError, match="changed since"):
        jacops.solvers.EKFAC().prepare(operator, 0.1)


# ---- objectives ----


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-7, 1e-5])
def test_a_model_that_fits_its_data_is_a_problem_like_any_other(noise: float, dtype: torch.dtype):
    x, _ = rows(dtype, 16)
    model = net(dtype)
    y = model(x).detach() + (noise * torch.randn(16, 3, dtype=torch.float64)).to(dtype)
    for loss in (F.mse_loss, nn.MSELoss(reduction="sum"), F.huber_loss):
        problem = jacops.Problem(model, loss, [(x, y)])
        assert problem.gradient().shape == (45,)
    confident = net(dtype, gain=1000.0)
    assert jacops.Problem(confident, F.cross_entropy, [(x, confident(x).argmax(1))]).gradient().shape == (45,)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_a_wrong_reduction_is_refused_at_zero_loss_too(dtype: torch.dtype):
    x, labels = rows(dtype, 16)
    model = net(dtype)
    for y in (model(x).detach(), torch.zeros(16, 3, dtype=dtype)):
        with pytest.raises(InputError, match="reduction"):
            jacops.Problem(model, lambda o, y: ((o - y) ** 2).sum(), [(x, y)]).gradient()
    with pytest.raises(InputError, match="reduction"):
        jacops.Problem(model, lambda o, y: F.cross_entropy(o, y, reduction="sum"), [(x, labels)]).gradient()


def test_a_loss_that_is_not_finite_names_where_that_comes_from():
    x, y = rows()
    broken = net()
    with torch.no_grad():
        broken[2].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        jacops.Problem(broken, F.cross_entropy, [(x, y)]).gradient()
    bad = x.clone()
    bad[2, 1] = math.nan
    with pytest.raises(NonFiniteError, match="x holds nan in row 2"):
        jacops.Problem(net(), F.cross_entropy, [(bad, y)]).gradient()
    with pytest.raises(NonFiniteError, match="loss"):
        jacops.Problem(net(), lambda o, y: (-o.square() - 1).log().mean(), [(x, y)]).gradient()


def test_a_loss_that_drops_the_axis_of_one_row_is_explained():
    x, _ = rows()
    model, y = nn.Linear(3, 1).double(), torch.rand(6, dtype=torch.float64)

    def dropped(o: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(o.squeeze(), y)

    for call in (
        lambda: jacops.Problem(model, dropped, [(x, y)]).gradient(),
        lambda: jacops.sample_gradients(model, dropped, x, y),
        lambda: jacops.compute_influences(jacops.TorchTwiceDifferentiable(model, dropped), [(x, y)], damping=0.1),
    ):
        with pytest.raises(InputError, match=r"squeeze\(1\)"):
            call()
    kept = jacops.Problem(model, lambda o, y: F.binary_cross_entropy_with_logits(o.squeeze(1), y), [(x, y)])
    assert kept.gradient().shape == (4,)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_columns_of_a_table_are_labels_and_inputs_also_one_row_at_a_time(dtype: torch.dtype):
    torch.manual_seed(0)
    table = torch.randn(5, 4, dtype=torch.float64).to(dtype)
    model = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0)).to(dtype)
    x, y = table[:, 1:2], table[:, 3]
    whole = jacops.Problem(model, F.mse_loss, [(x, y)]).gradient()
    for many in (1, 2):
        found = jacops.Problem(model, F.mse_loss, list(zip(x.split(many), y.split(many), strict=True))).gradient()
        torch.testing.assert_close(found, whole)


def test_strided_parameters_of_one_entry_are_compared_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jacops._torch.sweeps.weights.COPIED", 0)
    model = nn.Linear(1, 1).double()
    flat = torch.randn(7, dtype=torch.float64)
    model.weight.data = flat[1:4:3].view(1, 1)
    operator = jacops.jacobian(model, torch.ones(2, 1, dtype=torch.float64), parameters=lambda n, p: True)
    assert operator.dense().shape == (2, 2)
    model.float()
    odd = torch.randn(9)
    model.weight.data, model.bias.data = odd[1:2].view(1, 1), odd[3:4]  # words that do not begin at whole multiples
    operator = jacops.jacobian(model, torch.ones(2, 1), "inputs")
    odd[1] += 1
    with pytest.raises(ModelStateError, match="weight"):
        operator.dense()


# ---- self-influences ----


def _by_hand(model: nn.Module, x: Tensor, y: Tensor, w: Tensor, damping: float) -> Tensor:
    """(n w_i / sum w)^2 g_i' (A + damping)^-1 g_i with plain autograd, A the Hessian of the weighted mean."""
    params = list(model.parameters())

    def flat(loss: Tensor, **options: Any) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params, **options)])

    own = torch.stack([flat(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])) for i in range(len(x))])
    slope = flat((w * F.cross_entropy(model(x), y, reduction="none")).sum() / w.sum(), create_graph=True)
    A = torch.stack([flat(s, retain_graph=True) for s in slope])  # noqa: N806
    solved = torch.linalg.solve(A + damping * torch.eye(len(A), dtype=A.dtype), own.T).T
    return (len(x) * w / w.sum()) ** 2 * (own * solved).sum(1)


def test_self_influences_weigh_samples_as_the_objective_does():
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    x, y = rows(many=12)
    classes = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64)
    data = list(zip(x.split(5), y.split(5), strict=True))
    for weight in (None, 3 * torch.ones(3, dtype=torch.float64), classes):
        twice = jacops.TorchTwiceDifferentiable(model, nn.CrossEntropyLoss(weight=weight))
        w = torch.ones(12, dtype=torch.float64) if weight is None else weight[y]
        found = jacops.self_influences(twice, data, damping=0.3)
        torch.testing.assert_close(found, _by_hand(model, x, y, w, 0.3), rtol=1e-6, atol=1e-9)
    each = torch.rand(12, dtype=torch.float64)
    weighted = [(x, y, each)]
    plain = jacops.TorchTwiceDifferentiable(model, nn.CrossEntropyLoss())
    found = jacops.self_influences(plain, weighted, damping=0.3, unpack=lambda batch: batch)
    torch.testing.assert_close(found, _by_hand(model, x, y, each, 0.3), rtol=1e-6, atol=1e-9)


def test_self_influences_of_ignored_targets_are_zero():
    torch.manual_seed(0)
    x, y = rows(many=8)
    y[3] = -100
    twice = jacops.TorchTwiceDifferentiable(nn.Linear(3, 3).double(), nn.CrossEntropyLoss())
    found = jacops.self_influences(twice, [(x, y)], damping=0.3)
    assert float(found[3]) == 0
    kept = torch.arange(8) != 3
    fewer = jacops.self_influences(twice, [(x[kept], y[kept])], damping=0.3)
    torch.testing.assert_close(found[kept], fewer * (8 / 7) ** 2, rtol=1e-6, atol=1e-9)


# ---- the form of the loss's Hessian, read off products ----


def embedded(outputs: int, dtype: torch.dtype) -> Any:
    """Return a model whose parameters each belong to one sample, and seven samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 4), nn.Tanh(), nn.Linear(4, outputs)).to(dtype)
    model[2].requires_grad_(False)
    return model, torch.arange(7)


def relative_errors(model: Any, loss: Any, x: Tensor) -> Tensor:
    """Return how far each sample's part of the Gauss-Newton diagonal is off."""
    found = jacops.linalg.diagonal(jacops.ggn(model, loss, x, x)).double().view(-1, 4)[: len(x)]
    model = model.double()
    weight, output = model[0].weight, model(x)
    J = torch.stack([torch.autograd.grad(o, weight, retain_graph=True)[0].flatten() for o in output.flatten()])
    H: Any = torch.autograd.functional.hessian(lambda o: loss(o, x), output.detach())
    expected = (J * (H.reshape(len(J), -1) @ J)).sum(0).view(-1, 4)[: len(x)]
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 3), (4, 6)])
def test_two_samples_that_a_loss_couples_are_seen_wherever_they_stand(outputs: int, pair: tuple[int, int]):
    first, second = pair
    model, x = embedded(outputs, torch.float64)
    errors = relative_errors(model, lambda o, y: (o[first] * o[second]).sum() + o.square().sum(), x)
    assert float(errors.max()) < 1e-12


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("large", [1.0, 1e5, 1e10])
@pytest.mark.parametrize("form", ["diagonal", "softmax"])
def test_a_sample_of_little_weight_has_a_hessian_of_its_own_form(form: str, large: float, dtype: torch.dtype):
    model, x = embedded(3, dtype)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        most = o[:6].square().sum() if form == "diagonal" else F.cross_entropy(o[:6], y[:6] % 3)
        return large * most + o[6].sum().square()

    errors = relative_errors(model, loss, x)
    assert float(errors.max()) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gain", [1.0, 10.0, 30.0])
def test_cross_entropy_is_a_softmax_with_any_gain_and_weights(gain: float, dtype: torch.dtype):
    torch.manual_seed(0)
    output = (gain * torch.randn(50, 7)).to(dtype).requires_grad_()
    weight = 10.0 ** torch.randint(-2, 3, (50,))
    loss = (F.cross_entropy(output, torch.randint(7, (50,)), reduction="none") * weight.to(dtype)).sum()
    (slope,) = torch.autograd.grad(loss, output, create_graph=True)

    def product(rows: Tensor) -> Tensor:
        return torch.stack([torch.autograd.grad(slope, output, row, retain_graph=True)[0] for row in rows])

    probed = ProbedHessian(product, output.detach(), [output])
    assert probed.diagonal() is None
    assert probed.softmax() is not None
