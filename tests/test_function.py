"""`jacops.Function`: a pure function of a tree of parameters goes wherever a module goes."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import jacops
from jacops.errors import InputError, InputTypeError

F64 = torch.float64


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def network(params, x):  # noqa: ANN001, ANN201
    hidden = torch.tanh(x @ params["layers"][0]["weight"].T + params["layers"][0]["bias"])
    return hidden @ params["layers"][1]["weight"].T * params["scale"]


def tree() -> dict[str, object]:
    first = {"weight": draw(4, 3), "bias": draw(4)}
    return {
        "layers": [first, {"weight": draw(2, 4)}],
        "scale": draw(),
        "steps": 3,
        "table": torch.arange(3),
        "empty": None,
    }


NAMES = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "scale"]


class Same(nn.Module):
    """What `network` is, as a module."""

    def __init__(self, params) -> None:  # noqa: ANN001
        super().__init__()
        first, second = params["layers"]
        self.weight, self.bias = nn.Parameter(first["weight"].clone()), nn.Parameter(first["bias"].clone())
        self.second, self.scale = nn.Parameter(second["weight"].clone()), nn.Parameter(params["scale"].clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T + self.bias) @ self.second.T * self.scale


CALLS = {
    "jacobian": lambda m, x, y: jacops.jacobian(m, x).dense(),
    "hessian": lambda m, x, y: jacops.hessian(m, F.mse_loss, x, y).dense(),
    "ggn": lambda m, x, y: jacops.ggn(m, F.mse_loss, x, y).dense(),
    "fisher": lambda m, x, y: jacops.fisher(m, F.mse_loss, x, y).dense(),
    "empirical_fisher": lambda m, x, y: jacops.linalg.empirical_fisher(m, F.mse_loss, x, y).dense(),
    "sample_gradients": lambda m, x, y: jacops.sample_gradients(m, F.mse_loss, x, y).dense(),
    "sample_jacobians": lambda m, x, y: jacops.sample_jacobians(m, x).dense(),
    "compute_jacobian": lambda m, x, y: jacops.compute_jacobian(m, x),
    "input_hessian": lambda m, x, y: jacops.input_hessian(m, x),
    "laplacian": lambda m, x, y: jacops.laplacian(m, x),
    "directional_derivative": lambda m, x, y: jacops.directional_derivative(m, x, torch.ones_like(x)),
    "modjac": lambda m, x, y: jacops.modjac(m, x, flatten=True),
    "modjac, forward": lambda m, x, y: jacops.modjac(m, x, flatten=True, strategy="forward-mode"),
    "sparse_plan": lambda m, x, y: jacops.sparse_plan(m, x).evaluate(m, x).matrix.toarray(),
    "model_jvp": lambda m, x, y: jacops.model_jvp(m, x, [torch.ones_like(p) for p in m.parameters()]),
    "hvp": lambda m, x, y: jacops.hvp(m, F.mse_loss, x, y, torch.ones(25, dtype=F64)),
    "Problem": lambda m, x, y: jacops.Problem(m, nn.MSELoss(), [(x, y)]).hessian().dense(),
    "levenberg_marquardt": lambda m, x, y: jacops.levenberg_marquardt(m, x, y, max_steps=2, on_failure="return").cost,
    "influences": lambda m, x, y: (
        jacops.compute_influences(
            jacops.TorchTwiceDifferentiable(m, nn.MSELoss()), [(x, y)], curvature="ggn", damping=0.1
        ).values
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_of_a_tree_gives_what_the_module_gives(name: str) -> None:
    torch.manual_seed(3)
    params, x, y = tree(), draw(5, 3), draw(5, 2)
    call = CALLS[name]
    right = call(Same(params), x, y)  # first: a fit moves the tensors that a `Function` shares with the caller
    torch.testing.assert_close(call(jacops.Function(network, params), x, y), right)


BY_INPUTS = {
    "jacobian": lambda m, x, y: jacops.jacobian(m, x, wrt="inputs").dense(),
    "hessian": lambda m, x, y: jacops.hessian(m, F.mse_loss, x, y, wrt="inputs").dense(),
    "ggn": lambda m, x, y: jacops.ggn(m, F.mse_loss, x, y, wrt="inputs").dense(),
    "fisher": lambda m, x, y: jacops.fisher(m, F.mse_loss, x, y, wrt="inputs").dense(),
    "hvp": lambda m, x, y: jacops.hvp(m, F.mse_loss, x, y, [x], wrt="inputs")[0],
    "ggnvp": lambda m, x, y: jacops.ggnvp(m, F.mse_loss, x, y, [x], wrt="inputs")[0],
    "sparse_plan": lambda m, x, y: jacops.sparse_plan(m, x, wrt="inputs").evaluate(m, x).matrix.toarray(),
    "sparse.jacobian": lambda m, x, y: jacops.sparse.jacobian(jacops.jacobian(m, x, wrt="inputs")).matrix.to_dense(),
    "samples_independent": lambda m, x, y: bool(jacops.sparse.samples_independent(m, x)),
    **{name: CALLS[name] for name in ("compute_jacobian", "input_hessian", "laplacian", "directional_derivative")},
    "contributions": lambda m, x, y: jacops.contributions(m, x).values,
    "integrated_jacobian": lambda m, x, y: jacops.integrated_jacobian(m, x).values,
    "plan": lambda m, x, y: jacops.plan(jacops.jacobian(m, x, wrt="inputs").dense).result_bytes,
}


@pytest.mark.filterwarnings("ignore:contributions. not piecewise linear")
@pytest.mark.parametrize("name", BY_INPUTS)
def test_every_call_by_inputs_takes_modules_functions_of_parameters_and_plain_functions(name: str) -> None:
    torch.manual_seed(3)
    params, x, y = tree(), draw(5, 3), draw(5, 2)
    call, module = BY_INPUTS[name], Same(params)
    right = call(module, x, y)
    for model in (jacops.Function(network, params), lambda x: module(x), module.forward):
        for _ in range(2):  # what the first call proved is remembered with the function
            torch.testing.assert_close(call(model, x, y), right)


@pytest.mark.parametrize(
    "name", [name for name in CALLS if name not in BY_INPUTS or name in ("jacobian", "hessian", "ggn")]
)
def test_a_plain_function_has_no_parameters(name: str) -> None:
    x, y = draw(5, 3), draw(5, 2)
    words = (
        "Pass `params=`" if name == "levenberg_marquardt" else r"Write `jacops\.Function\(f, params\)`.*wrt='inputs'"
    )
    with pytest.raises((InputTypeError, AttributeError), match=f"{words}|no attribute 'parameters'"):
        CALLS[name](lambda x: x @ x.T, x, y)


def test_a_plain_function_whose_captured_tensor_changes_is_proved_anew() -> None:
    gate = torch.zeros((), dtype=F64)

    def model(x: Tensor) -> Tensor:
        return x.sin() + gate * x.sum(0)

    x = draw(4, 3)
    for value in (0.0, 1.0):
        gate.fill_(value)
        J = jacops.jacobian(model, x, wrt="inputs")
        right = jacrev(model)(x).reshape(12, 12)
        torch.testing.assert_close(J.dense(), right)
        torch.testing.assert_close(J @ x.flatten(), right @ x.flatten())


def test_parameters_are_named_by_their_paths_and_other_leaves_are_passed_on() -> None:
    seen = []
    model = jacops.Function(lambda params, x: (seen.append(params), network(params, x))[1], tree())
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert jacops.jacobian(model, draw(5, 3)).domain.names == tuple(NAMES)
    assert (seen[0]["steps"], seen[0]["empty"]) == (3, None)
    assert torch.equal(seen[0]["table"], torch.arange(3))
    assert "layers.0.weight: (4, 3)" in repr(model)


def test_one_bare_tensor_is_named_params_and_shares_memory() -> None:
    theta = draw(3)
    model = jacops.Function(lambda params, x: x @ params, theta)
    x = draw(4, 3)
    before = jacops.jacobian(model, x)
    assert before.domain.names == ("params",)
    torch.testing.assert_close(before.dense(), x)
    theta.mul_(2)
    torch.testing.assert_close(model(x).detach(), x @ theta)
    assert not theta.requires_grad


def test_those_that_require_grad_are_trainable_where_some_do() -> None:
    params = {"a": draw(3).requires_grad_(), "b": draw(3)}
    model = jacops.Function(lambda params, x: x @ (params["a"] * params["b"]), params)
    assert jacops.jacobian(model, draw(2, 3)).domain.names == ("a",)
    assert len(jacops.modjac(model, draw(2, 3))) == 2  # all, as the page says


def test_the_functional_form_of_a_module_goes_without_its_copy() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    weights = {name: p.detach() for name, p in net.named_parameters()}
    model = jacops.Function(lambda params, x: functional_call(net, params, (x,)), weights)
    x = draw(5, 3)
    right = jacrev(lambda w: functional_call(net, w, (x,)))(weights)
    for found, name in zip(jacops.modjac(model, x), weights, strict=True):
        torch.testing.assert_close(found, right[name])


def test_results_are_differentiable_by_tensors_that_are_no_leaves() -> None:
    start = draw(3).requires_grad_()
    moved = start - 0.1 * start.square()  # a step of an inner loop
    model = jacops.Function(lambda params, x: torch.tanh(x @ params), moved)
    x = draw(4, 3)
    jacobian = jacops.modjac(model, x, create_graph=True)
    (found,) = torch.autograd.grad(jacobian.square().sum(), start)
    plain = ((1 - torch.tanh(x @ (start - 0.1 * start.square())) ** 2)[:, None] * x).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, start)[0])


@pytest.mark.parametrize(
    ("function", "params", "error", "words"),
    [
        (nn.Linear(2, 2), draw(2), InputTypeError, "Pass the module itself"),
        (3, draw(2), InputTypeError, "function"),
        (network, {}, InputError, "tensor of floating point"),
        (network, {"a": torch.arange(3)}, InputError, "tensor of floating point"),
        (network, {"a.b": draw(1), "a": {"b": draw(1)}}, InputError, "'a.b'"),
    ],
)
def test_what_is_no_function_of_parameters_is_refused(function, params, error, words) -> None:  # noqa: ANN001
    with pytest.raises(error, match=words):
        jacops.Function(function, params)
