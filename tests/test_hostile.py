"""Hostile models, inputs and surroundings: the call works and equals plain autograd, or a typed error says why.

Of the numbered catalogue of such things these are the rows that are neither a wrong argument (those stand in
`refusals.py`) nor a model to be tried with every call (those stand in `zoo.py`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
import jacops.testing
import oracle
import zoo
from jacops import JacopsWarning, TorchTwiceDifferentiable, compute_influences, compute_jacobian, modjac
from jacops.errors import JacopsError, ModelStateError, NotDifferentiableError
from refusals import Quantised
from small import Calls, close, draw, flat, refused, settled, small_net, square, tangents

X, Y = draw(5, 3), draw(5, 2)


# Sizes


def test_row_14_one_row_of_a_model_that_squeezes():
    model = settled(nn.Sequential(nn.Linear(3, 1), nn.Tanh()))
    squeezing = nn.Sequential(model, Calls(lambda out: out.squeeze()))
    for x in (draw(1, 3), draw(4, 3)):
        close(compute_jacobian(squeezing, x), oracle.input_jacobian(squeezing, x))
        close(modjac(squeezing, x), oracle.parameter_jacobian(squeezing, x))
        y = draw(*squeezing(x).shape)
        close(jacops.hessian(squeezing, square, x, y).dense(), oracle.hessian(squeezing, square, x, y))
    one = draw(1, 3), draw(1, 1)
    close(jacops.sample_gradients(model, square, *one).matrix[0], oracle.gradient(model, square, *one))


def test_row_15_a_feature_or_output_axis_without_entries():
    narrow = Calls(lambda W, b, x: x @ W + b, (0, 2), (2,))
    x = torch.zeros(5, 0).double()
    assert compute_jacobian(narrow, x).shape == (5, 2, 0)
    assert [tuple(block.shape) for block in modjac(narrow, x)] == [(5, 2, 0, 2), (5, 2, 2)]
    assert jacops.jacobian(narrow, x).dense().shape == (10, 2)
    silent = Calls(lambda W, x: x @ W, (3, 0))
    assert compute_jacobian(silent, X).shape == (5, 0, 3)
    assert modjac(silent, X).shape == (5, 0, 3, 0)
    assert jacops.model_jvp(silent, X, [torch.zeros(3, 0).double()]).shape == (5, 0)


# Samples, and what a forward moves


def test_row_20_dropout_in_train_mode_is_allowed_with_one_mask_for_all_samples():
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))).train()
    x, y = draw(1, 3).expand(6, 3).contiguous(), draw(1, 2).expand(6, 2).contiguous()
    before = torch.get_rng_state()

    def rows(seed: int) -> Tensor:
        return jacops.sample_gradients(model, square, x, y, randomness="same", seed=seed).matrix

    assert torch.equal(rows(3), rows(3)[:1].expand(6, -1))
    assert torch.equal(rows(3), rows(3))
    assert any(not torch.equal(rows(3), rows(seed)) for seed in range(8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["spectral_norm_train", "embedding_max_norm"])
def test_rows_22_and_23_sample_gradients_move_no_state_that_a_forward_would(name: str):
    case = zoo.BY_NAME[name]
    model, before = case.model(), case.model().state_dict()
    with torch.no_grad():
        case.model()(case.x())
    rows = jacops.sample_gradients(model, case.loss, case.x(), case.y()).matrix
    for i, row in enumerate(rows):
        close(row, oracle.gradient(model, case.loss, case.x()[i : i + 1], case.y()[i : i + 1]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():  # a forward of the caller's does move it
        model(case.x())
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Parameters of every kind


def test_row_27_a_frozen_table_of_integers_is_a_constant():
    model = Quantised()
    product = X @ model.table.double()
    close(modjac(model, X), torch.diag_embed(product))
    close(compute_jacobian(model, X), (model.table.double() * model.scale.detach()).T.expand(5, 2, 3))
    close(jacops.hessian(model, square, X, Y).dense(), torch.diag((product**2).mean(0)))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_row_30_a_sparse_input_is_fine_where_nothing_is_differentiated_by_it():
    for x in (torch.eye(3).double().to_sparse(), torch.eye(3).double().to_sparse_csr()):
        close(modjac(small_net(), x), oracle.parameter_jacobian(small_net(), x.to_dense()))


# Wrappers


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, X),
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled inside": lambda model: nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:]),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_rows_38_and_39_a_wrapper_changes_nothing(wrapper: str):
    model = small_net()
    wrapped, blocks, vs = WRAPPERS[wrapper](model), oracle.parameter_jacobian(model, X), tangents(model)
    twice = TorchTwiceDifferentiable(wrapped, square)
    hessian = oracle.hessian(model, square, X, Y)
    close(modjac(wrapped, X), blocks)
    close(compute_jacobian(wrapped, X), oracle.input_jacobian(model, X))
    close(jacops.model_jvp(wrapped, X, vs), oracle.jvp(blocks, vs))
    close(jacops.model_vjp(wrapped, X, Y), oracle.vjp(blocks, [Y]))
    close(jacops.jacobian(wrapped, X).dense(), flat(blocks, list(model.parameters())))
    close(jacops.hessian(wrapped, square, X, Y).dense(), hessian)
    close(twice.grad(X, Y), oracle.gradient(model, square, X, Y))
    close(twice.hessian(X, Y), hessian)
    if wrapper == "compiled":
        assert jacops.jacobian(wrapped, X).domain.names[0] == "0.weight"


def test_row_38_a_model_wrapped_for_several_processes():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small_net()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        close(modjac(wrapped, X), oracle.parameter_jacobian(model, X))
        close(compute_jacobian(wrapped, X), oracle.input_jacobian(model, X))
        spread = small_net()
        fully_shard(spread, mesh=init_device_mesh("cpu", (1,)))
        for call in (modjac, compute_jacobian, jacops.jacobian):
            refused(ModelStateError, lambda call=call: call(spread, X), "FSDP", "whole")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["weight_norm", "orthogonal"])
def test_row_40_parametrised_weights_go_by_their_own_names(name: str):
    case = zoo.BY_NAME[name]
    names = jacops.jacobian(case.model(), case.x()).domain.names
    assert set(names) == {name for name, _ in case.model().named_parameters()}
    assert any("parametrizations" in name for name in names)


# Functions that some transforms refuse


@pytest.mark.parametrize("name", ["lstm_float32", "attention_float32"])
def test_rows_41_and_42_operators_over_fused_kernels_keep_the_laws(name: str):
    case = zoo.BY_NAME[name]
    jacops.testing.check_operator(jacops.jacobian(case.model(), case.x()))


@pytest.mark.parametrize(("pull", "passes"), [(3, True), (2, False)])
def test_row_46_a_check_finds_a_wrong_backward(pull: int, passes: bool):
    class Pulled(zoo.Cube):
        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return pull * ctx.saved_tensors[0].detach() ** 2 * slope  # its second derivative is another matter

    found = jacops.check(Calls(lambda W, x: Pulled.apply(x @ W), (3, 2)), X)
    assert found.passed == passes
    assert (found.error > 0.1) == (not passes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Tanh])
def test_a_check_allows_for_kinks_and_for_nothing_else(dtype: torch.dtype, activation: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self, reads: bool) -> None:
            super().__init__()
            self.first, self.last, self.reads = nn.Linear(4, 6), nn.Linear(6, 3), reads

        def forward(self, x: Tensor) -> Tensor:
            hidden = activation()(self.first(x))
            return self.last(hidden + 0.1 * hidden.detach() if self.reads else hidden)

    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(30, 4, dtype=dtype)
        assert jacops.check(Scaled(False).to(dtype), x).passed
        assert not jacops.check(Scaled(True).to(dtype), x).passed


# What a forward or a loss may do


@pytest.mark.parametrize(
    "read",
    [
        lambda W, x: x @ W * (x @ W).detach().sum().item(),
        lambda W, x: x @ W * float((x @ W).detach().max()),
        lambda W, x: x @ W * (x @ W).detach(),
    ],
    ids=["item", "float", "detach"],
)
def test_row_47_a_check_finds_a_value_that_is_read_out_and_put_back(read: Callable[..., Tensor]):
    found = jacops.check(Calls(read, (3, 2)), X)
    assert not found.passed
    assert found.error > 0.1


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.tanh() if x.sum() > 0 else x**2, "reads values out of tensors.*differentiated alone"),
        (lambda x: torch.nn.functional.dropout(x, 0.5) ** 2, "the forward is random in eval mode"),
    ],
    ids=["a branch", "dropout"],
)
def test_row_48_samples_that_cannot_share_a_forward_are_taken_alone_and_one_warning_says_why(
    function: Callable[[Tensor], Tensor], words: str
):
    model, x = Calls(function), draw(6, 3)
    assert 0 < int((x.sum(1) > 0).sum()) < 6
    with zoo.seeded(), pytest.warns(JacopsWarning, match=words) as said:
        found = compute_jacobian(model, x)
    assert len(said) == 1
    with zoo.seeded():
        close(found, oracle.input_jacobian(model, x))


def test_row_49_a_forward_may_write_into_what_nobody_needs():
    kept = torch.zeros(5, 2).double()
    plain = oracle.parameter_jacobian(Calls(lambda W, x: (x @ W).tanh(), (3, 2)), X)
    close(modjac(Calls(lambda W, x: kept.copy_((x @ W).detach()).mul(0) + (x @ W).tanh(), (3, 2)), X), plain)
    fine = Calls(lambda W, x: (x @ W).tanh().mul(2).add_(1).relu_(), (3, 2))
    close(modjac(fine, X), oracle.parameter_jacobian(fine, X))
    close(jacops.hessian(fine, square, X, Y).dense(), oracle.hessian(fine, square, X, Y))


# Outputs, modes, values


def test_row_55_one_part_may_be_picked_where_another_has_no_derivative():
    model = Calls(lambda W, x: {"y": x @ W, "name": "me", "label": (x @ W).argmax(1)}, (3, 2))
    whole = Calls(lambda W, x: x @ W, (3, 2))
    close(compute_jacobian(model, X, outputs="y"), oracle.input_jacobian(whole, X))
    close(modjac(model, X, outputs="y"), oracle.parameter_jacobian(whole, X))
    close(jacops.jacobian(model, X, outputs="y").dense(), flat(oracle.parameter_jacobian(whole, X), [draw(3, 2)]))


def test_row_55_an_output_of_a_kind_that_transformers_return_comes_back_as_that_kind():
    output_type = pytest.importorskip("transformers.modeling_outputs").BaseModelOutput
    both = lambda W, x: output_type(last_hidden_state=x @ W, hidden_states=(x @ W, (x @ W).tanh()))  # noqa: E731
    model = Calls(both, (3, 2))
    found = modjac(model, X)
    assert type(found) is output_type
    close(found["last_hidden_state"][0], oracle.parameter_jacobian(Calls(lambda W, x: x @ W, (3, 2)), X))
    close(compute_jacobian(model, X, outputs="last_hidden_state"), model.weights[0].detach().T.expand(5, 2, 3))
    assert compute_jacobian(model, X)["hidden_states"][1].shape == (5, 2, 3)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_row_56_operators_under_no_grad_and_inference_mode(context: Callable[[], Any]):
    model, hessian = small_net(), oracle.hessian(small_net(), square, X, Y)
    ggn = jacops.ggn(model, square, X, Y).dense()
    with context():
        close(jacops.hessian(model, square, X, Y).dense(), hessian)
        close(jacops.ggn(model, square, X, Y).dense(), ggn)
        rows = jacops.sample_gradients(model, square, X, Y).matrix
        assert not torch.is_grad_enabled()
    close(rows[2], oracle.gradient(model, square, X[2:3], Y[2:3]))


def test_row_56_under_autocast_precision_is_autocast_s_and_dtypes_are_the_parameters():
    single, x, y = small_net().float(), X.float(), Y.float()
    blocks, hessian = oracle.parameter_jacobian(small_net(), X), oracle.hessian(small_net(), square, X, Y)
    jacobian = oracle.input_jacobian(small_net(), X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert modjac(single, x, flatten=True).dtype == torch.float32
        assert compute_jacobian(single, x).dtype == single(x).dtype == torch.bfloat16  # the output's
        close(compute_jacobian(single, x), jacobian, rtol=0.05, same_dtype=False)
        close(modjac(single, x), blocks, rtol=0.05, same_dtype=False)
        close(jacops.hessian(single, square, x, y).dense(), hessian, rtol=0.05, same_dtype=False)
        assert torch.is_autocast_enabled("cpu")
    close(modjac(single, x), blocks, rtol=1e-5, same_dtype=False)
    close(compute_jacobian(single, x), jacobian, rtol=1e-5, same_dtype=False)


def test_row_57_a_norm_at_zero_has_the_slope_that_autograd_gives_it():
    model = Calls(lambda W, x: (W * 0).norm() * x, (3,))
    close(modjac(model, torch.ones(3).double()), torch.zeros(3, 3).double())


@pytest.mark.parametrize("kind", ["linear", "relu", "tanh"])
def test_row_58_a_linear_loss_has_the_curvature_of_its_net_zero_blocks_included(kind: str):
    nets = {
        "linear": nn.Linear(3, 1),
        "relu": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)),
        "tanh": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
    }
    model, y = settled(nets[kind]), draw(5, 1)
    loss = lambda output, y: (output * y).sum()  # noqa: E731
    expected = oracle.hessian(model, loss, X, y)
    assert expected.any() == (kind != "linear")
    assert expected[:16, :16].any() == (kind == "tanh")
    close(jacops.hessian(model, loss, X, y).dense(), expected)
    close(jacops.hvp(model, loss, X, y, torch.ones(len(expected)).double()), expected.sum(1))
    close(TorchTwiceDifferentiable(model, loss).hessian(X, y), expected)
    assert not jacops.ggn(model, loss, X, y).dense().any()


# The caller's own transforms around a call


def calls_on(x: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """Every call, of an input that a transform may have wrapped."""
    model, y = small_net(), draw(5, 2, seed=1)
    W, u, v = draw(3, 2).requires_grad_(), draw(5, 2, seed=2), draw(3, 2)
    wrapped = TorchTwiceDifferentiable(model, square)
    vs = tangents(model)
    return {
        "compute_jacobian": lambda x: compute_jacobian(model, x),
        "modjac": lambda x: modjac(model, x, flatten=True),
        "model_jvp": lambda x: jacops.model_jvp(model, x, vs),
        "model_vjp": lambda x: jacops.model_vjp(model, x, u)[0],
        "jvp": lambda x: jacops.jvp(lambda: (x @ W).tanh(), [W], v),
        "vjp": lambda x: jacops.vjp(lambda: (x @ W).tanh(), [W], u),
        "full_jacobian": lambda x: jacops.full_jacobian(lambda: (x @ W).tanh(), [W])[0],
        "jacobian": lambda x: jacops.jacobian(model, x).dense(),
        "hessian": lambda x: jacops.hessian(model, square, x, y).dense(),
        "ggn": lambda x: jacops.ggn(model, square, x, y).dense(),
        "sample_gradients": lambda x: jacops.sample_gradients(model, square, x, y).matrix,
        "grad": lambda x: wrapped.grad(x, y),
        "influences": lambda x: compute_influences(wrapped, [(x, y)], damping=5.0).values,
    }


CALLS = list(calls_on(X))
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "vmap": lambda function, x: torch.func.vmap(function)(x),
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x[0]),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x[0]),
    "jvp": lambda function, x: torch.func.jvp(function, (x[0],), (x[1],)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_callers_transform_around_a_call_is_a_clear_error(call: str, transform: str):
    x = draw(2, 5, 3)
    function = calls_on(x)[call]
    with pytest.raises(NotDifferentiableError, match=r"inside a torch.func transform.*Call it outside"):
        TRANSFORMS[transform](function, x)
    function(x[0])  # and afterwards it works again


@pytest.mark.parametrize("call", CALLS)
def test_callers_compile_around_a_call_works_or_says_that_it_does_not(call: str):
    function = calls_on(X)[call]
    expected, found, said = function(X), None, ""
    try:
        found = torch.compile(function, backend="eager")(X)
    except JacopsError as error:
        said = str(error)
    finally:
        torch.compiler.reset()
    assert found is not None or "compile" in said
    if found is not None:
        close(found, expected)
