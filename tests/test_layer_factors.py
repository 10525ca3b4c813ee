"""Whole parameter Jacobians by where parameters enter: taken where they are right, and only there."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
import zoo
from jacops._ladder.failures import RouteFailedError
from jacops._ladder.route import answer
from jacops._torch.routes.whole import WholeByLayers
from jacops._torch.routes.whole_ask import WholeAsk, WholeBlocks
from jacops._torch.sweeps.linearization import Linearization
from jacops._torch.sweeps.record import ModelRun
from layer_cases import MODELS, model_of
from small import Calls, close, draw

LEFT = {"one sample", "an entry per sample", "no layer at all"}
TAKEN_OF_ZOO = (
    *("mlp_relu", "mlp_layernorm", "conv_batchnorm_eval", "squeezed", "inplace_first", "gpt2", "mlp_bfloat16"),
    *("weight_norm", "prelu"),
)
LEFT_OF_ZOO = ("conv_batchnorm_train", "samples_mixed", "embedding_bag", "tuple_output")


def by_layers(lin: Linearization) -> WholeBlocks | None:
    """Blocks by layers and proved, None where that is not possible."""
    ask = WholeAsk(lin)
    try:
        return answer(ask, [WholeByLayers()])
    except RouteFailedError:
        return None


def taken(model: nn.Module, x: Tensor) -> bool:
    found = ModelRun(model, x, call="test", parameters=lambda name, p: True, checks="always").recorded()
    return by_layers(found.lin) is not None


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_the_oracles_at_first_and_later(name: str) -> None:
    model, x = model_of(name)
    for _ in range(2):
        close(jacops.modjac(model, x), oracle.parameter_jacobian(model, x), 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_route_is_taken_where_there_are_layers_and_only_there(name: str) -> None:
    assert taken(*model_of(name)) == (name not in LEFT)


@pytest.mark.parametrize("name", [*TAKEN_OF_ZOO, *LEFT_OF_ZOO])
def test_the_route_is_taken_in_the_zoo_where_samples_and_rules_allow_it(name: str) -> None:
    case = zoo.BY_NAME[name]
    assert taken(case.model(), case.x()) == (name in TAKEN_OF_ZOO)


def test_samples_that_mix_a_little_leave_the_route() -> None:
    model, x = Calls(lambda w, b, x: mixed(F.linear(x, w, b).tanh()), (3, 4), (3,)), draw(6, 4)
    assert not taken(model, x)
    for _ in range(2):
        close(jacops.modjac(model, x), oracle.parameter_jacobian(model, x), 1e-12)


def mixed(y: Tensor) -> Tensor:
    return y + 1e-9 * y.mean(0)


def test_it_costs_a_sweep_per_output_entry_and_two_to_check() -> None:
    model, x = model_of("mlp")
    sweeps = []
    for _ in range(2):
        found = ModelRun(model, x, call="test", parameters=lambda name, p: True).recorded()
        by_layers(found.lin)
        sweeps.append(found.lin.sweeps)
    assert sweeps == [3 + 2, 3]


def test_mixed_precision_and_sparse_inputs_are_left_to_plain_sweeps() -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not taken(model, x)
        assert jacops.modjac(model, x)[0].dtype is torch.float32
    sparse = torch.eye(4).to_sparse()
    (weight, _), (expected, _) = jacops.modjac(model, sparse), jacops.modjac(model, torch.eye(4))
    torch.testing.assert_close(weight, expected)


def test_entries_that_overflow_are_still_found() -> None:
    model, x = nn.Linear(1, 1, bias=False), torch.full((3, 1), 1e30)
    with torch.no_grad():
        model.weight.fill_(1e-30)
    steep = nn.Sequential(model, Calls(lambda y: 1e20 * y))
    assert torch.isfinite(steep(x)).all()
    with pytest.raises(jacops.errors.NonFiniteError, match=r"0\.weight"):
        jacops.modjac(steep, x)
