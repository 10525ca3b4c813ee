"""`parameters=`: the same columns from every call, however they are asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacops
from jacops.errors import InputError, InputTypeError, ModelStateError

torch.manual_seed(0)
F64 = torch.float64
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
X, Y = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
CALLS = {
    "jacobian": lambda p: jacops.jacobian(NET, X, parameters=p).domain.names,
    "hessian": lambda p: jacops.hessian(NET, F.mse_loss, X, Y, parameters=p).domain.names,
    "ggn": lambda p: jacops.ggn(NET, F.mse_loss, X, Y, parameters=p).domain.names,
    "fisher": lambda p: jacops.fisher(NET, F.mse_loss, X, Y, parameters=p).domain.names,
    "empirical_fisher": lambda p: jacops.linalg.empirical_fisher(NET, F.mse_loss, X, Y, parameters=p).domain.names,
    "sample_gradients": lambda p: jacops.sample_gradients(NET, F.mse_loss, X, Y, parameters=p).domain.names,
    "sample_jacobians": lambda p: jacops.sample_jacobians(NET, X, parameters=p).domain.names,
    "sample_jacobians, no rows": lambda p: jacops.sample_jacobians(NET, X[:0], parameters=p).domain.names,
    "Problem": lambda p: jacops.Problem(NET, nn.MSELoss(), [(X, Y)], parameters=p).space.names,
    "compute_influences": lambda p: names_of_influence(p),
    "modjac": lambda p: names_by_shape(jacops.modjac(NET, X, parameters=p)),
    "modjac, sparse": lambda p: width(jacops.modjac(NET, X, parameters=p, sparse=True).shape[1]),
    "detect_pattern": lambda p: width(jacops.sparse.detect_pattern(NET, X, parameters=p).shape[1]),
    "sparse_plan": lambda p: width(jacops.sparse_plan(NET, X, parameters=p).shape[1]),
}
SHAPES = {tuple(p.shape): name for name, p in NET.named_parameters()}
WIDTHS = {12: ("0.weight",), 4: ("0.bias",), 16: ("0.weight", "0.bias"), 8: ("2.weight",), 10: ("2.weight", "2.bias"),
          26: tuple(NAMES)}  # fmt: skip


def names_by_shape(jacobian: Any) -> tuple[str, ...]:
    parts = jacobian if isinstance(jacobian, tuple) else (jacobian,)
    return tuple(SHAPES[tuple(part.shape[2:])] for part in parts)


def width(columns: int) -> tuple[str, ...]:
    return WIDTHS[columns]


def names_of_influence(parameters: Any) -> tuple[str, ...]:
    wrapped = jacops.TorchTwiceDifferentiable(NET, nn.MSELoss())
    found = jacops.compute_influence_factors(
        wrapped, [(X, Y)], [(X, Y)], curvature="ggn", damping=0.1, parameters=parameters
    )
    return width(found.x.shape[-1])


FORMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a name": ("0.weight", ("0.weight",)),
    "a pattern": ("2.*", ("2.weight", "2.bias")),
    "patterns": (["0.w*", "0.b*"], ("0.weight", "0.bias")),
    "names in another order": (("2.bias", "2.weight"), ("2.weight", "2.bias")),
    "a tensor": (NET[0].weight, ("0.weight",)),
    "a generator of tensors": (lambda: NET[2].parameters(), ("2.weight", "2.bias")),
    "a name beside a tensor": ([NET[0].bias, "0.weight"], ("0.weight", "0.bias")),
    "a predicate": (lambda: lambda name, p: name.startswith("0") and p.ndim == 2, ("0.weight",)),
    "trainable": ("trainable", tuple(NAMES)),
    "by default": (None, tuple(NAMES)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_has_the_same_columns(call: str, form: str) -> None:
    given, names = FORMS[form]
    assert CALLS[call](given() if callable(given) else given) == names


def test_products_are_by_the_parameters_asked_for() -> None:
    v = torch.randn(10, dtype=F64)
    whole = jacops.hessian(NET, F.mse_loss, X, Y).dense()[16:, 16:]
    torch.testing.assert_close(jacops.hvp(NET, F.mse_loss, X, Y, v, parameters="2.*"), whole @ v)
    curvature = jacops.ggn(NET, F.mse_loss, X, Y).dense()[16:, 16:]
    torch.testing.assert_close(jacops.ggnvp(NET, F.mse_loss, X, Y, v, parameters=NET[2].parameters()), curvature @ v)
    assert jacops.check(NET, X, parameters="2.*").passed


def test_frozen_parameters_are_taken_where_they_are_asked_for_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    net[0].requires_grad_(False)
    assert jacops.jacobian(net, X).domain.names == ("1.weight", "1.bias")
    assert jacops.jacobian(net, X, parameters="0.*").domain.names == ("0.weight", "0.bias")
    assert len(jacops.modjac(net, X)) == 4  # all, as its page says
    assert len(jacops.modjac(net, X, parameters="trainable")) == 2
    assert not net[0].weight.requires_grad


def test_a_tied_parameter_is_found_by_each_of_its_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    tied = Tied().double()
    for name in ("a.weight", "b.weight", "b.*"):
        assert jacops.jacobian(tied, X, parameters=name).domain.names == ("a.weight",)


def test_a_name_with_brackets_is_a_name_first() -> None:
    model = jacops.Function(lambda params, x: x @ params["w[0]"] + params["w0"], {"w[0]": X[0], "w0": X[0, :1]})
    assert jacops.jacobian(model, X, parameters="w[0]").domain.names == ("w[0]",)


CASES: dict[str, tuple[Any, type[Exception], str]] = {
    "a pattern that fits nothing": ("0.wieght", InputError, "0.wieght.*the nearest are 0.weight"),
    "a copy of a parameter": (NET[0].weight.detach().clone(), InputError, "0.weight"),
    "a number": (3, InputTypeError, "int"),
    "numbers": ([1, 2], InputTypeError, "an entry of type int"),
    "nothing": ([], InputError, "empty"),
    "a predicate that picks nothing": (lambda name, p: False, InputError, "picks none.*0.weight"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", ["jacobian", "hessian", "sample_gradients", "Problem", "modjac", "sparse_plan"])
def test_what_picks_no_parameter_is_refused(call: str, case: str) -> None:
    given, error, words = CASES[case]
    with pytest.raises(error, match=words):
        CALLS[call](given)


def test_a_variable_that_is_none_names_the_argument_that_picks_some() -> None:
    with pytest.raises(InputError, match="`parameters=`"):
        jacops.jacobian(NET, X, wrt="weight")  # pyright: ignore
    with pytest.raises(InputError, match="parameters"):
        jacops.jacobian(NET, X, wrt="inputs", parameters="0.*")


@pytest.mark.parametrize("call", [name for name in CALLS if not name.startswith(("modjac", "sample_jacobians, no"))])
def test_a_model_without_trainable_parameters_says_so(call: str) -> None:
    try:
        NET.requires_grad_(False)
        with pytest.raises(ModelStateError, match="parameter"):
            CALLS[call](None)
    finally:
        NET.requires_grad_(True)
