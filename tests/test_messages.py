"""Bad or unusual input: either it works, with right values, or the error names the argument, what came and what to do.

The tests follow the table of inputs that the four earlier modules met with unhelpful errors, one group per row.
"""

import itertools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
from jacops import JacopsWarning, TorchTwiceDifferentiable, compute_jacobian, errors, modjac
from jacops.errors import InputError, InputTypeError, JacopsError, ModelStateError, NotDifferentiableError, SolveError
from small import Calls, draw, settled, small_net

STRATEGIES = list(itertools.product(("reverse-mode", "forward-mode"), (False, True)))


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    for a, b in zip(oracle.leaves(actual), oracle.leaves(expected), strict=True):
        assert a.shape == b.shape, f"shape {tuple(b.shape)} expected, got {tuple(a.shape)}"
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, check_dtype=False)


def says(error: BaseException, *parts: str) -> None:
    """The message holds all of these, and the error is one of the library's."""
    assert isinstance(error, JacopsError)
    for part in parts:
        assert part in str(error), f"{part!r} is missing in: {error}"


def tangents(model: nn.Module) -> list[Tensor]:
    return [draw(*p.shape, seed=30 + i) for i, p in enumerate(model.parameters())]


def square(output: Any, y: Any) -> Tensor:
    return sum((leaf**2).sum() for leaf in oracle.leaves(output)) + 0 * y.sum()


Y = torch.zeros(1).double()


# Every call that takes a model, with the answer of plain autograd


def answer_jacobian(model: nn.Module, x: Any) -> Tensor:
    blocks = oracle.parameter_jacobian(model, x)
    params = list(model.parameters())
    rows = [[_matrix(block, p) for block, p in zip(row, params, strict=True)] for row in blocks]
    return torch.cat([torch.cat(row, 1) for row in rows])


def _matrix(block: Tensor, parameter: Tensor) -> Tensor:
    return block.reshape(block.shape[: block.ndim - parameter.ndim].numel(), parameter.numel())


MODEL_CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "compute_jacobian": lambda model, x: compute_jacobian(model, x),
    "model_jvp": lambda model, x: jacops.model_jvp(model, x, tangents(model)),
    "model_vjp": lambda model, x: jacops.model_vjp(model, x, oracle.mapped(torch.ones_like, quietly(model, x))),
    "modjac": lambda model, x: modjac(model, x),
    "jacobian": lambda model, x: jacops.jacobian(model, x).dense(),
    "grad": lambda model, x: TorchTwiceDifferentiable(model, square).grad(x, Y),
    "hessian": lambda model, x: TorchTwiceDifferentiable(model, square).hessian(x, Y),
}

ANSWERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "compute_jacobian": lambda model, x: oracle.input_jacobian(model, x),
    "model_jvp": lambda model, x: oracle.jvp(oracle.parameter_jacobian(model, x), tangents(model)),
    "model_vjp": lambda model, x: oracle.vjp(
        oracle.parameter_jacobian(model, x), [torch.ones_like(o) for o in oracle.leaves(quietly(model, x))]
    ),
    "modjac": lambda model, x: oracle.parameter_jacobian(model, x),
    "jacobian": lambda model, x: answer_jacobian(model, x),
    "grad": lambda model, x: oracle.gradient(model, square, x, Y),
    "hessian": lambda model, x: oracle.hessian(model, square, x, Y),
}
model_calls = pytest.mark.parametrize("call", MODEL_CALLS)


def quietly(model: nn.Module, x: Any) -> Any:
    """The output, for its shape."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return oracle.called(oracle.copy.deepcopy(model), x)


def right(call: str, model: nn.Module, x: Any) -> None:
    """The call gives what plain autograd gives."""
    close(MODEL_CALLS[call](model, x), ANSWERS[call](model, x))


# Empty batch


def test_empty_batch_of_compute_jacobian_and_modjac():
    assert compute_jacobian(small_net(), torch.zeros(0, 3).double()).shape == (0, 2, 3)
    for strategy, vectorize in STRATEGIES:
        found = modjac(small_net(), torch.zeros(0, 3).double(), strategy=strategy, vectorize=vectorize)
        assert [tuple(block.shape) for block in found] == [(0, 2, 4, 3), (0, 2, 4), (0, 2, 2, 4), (0, 2, 2)]


def test_empty_batch_of_directions_and_of_outputs():
    W = draw(3, 2).requires_grad_()
    assert jacops.batch_jvp(lambda: W[:2] ** 2, [W], torch.zeros(0, 3, 2).double()).shape == (0, 2, 2)
    assert jacops.batch_vjp(lambda: W[:2] ** 2, [W], torch.zeros(0, 2, 2).double())[0].shape == (0, 3, 2)
    assert jacops.full_jacobian(lambda: W[:0], [W])[0].shape == (0, 3, 2)
    wrapped = TorchTwiceDifferentiable(small_net(), square)
    recorded = wrapped.grad(draw(5, 3), Y, create_graph=True)
    assert wrapped.mvp(recorded, torch.zeros(0, 26).double(), wrapped.parameters).shape == (0, 26)


# No parameters


def test_no_parameters_input_jacobians_work():
    right("compute_jacobian", nn.Tanh(), draw(5, 3))


@pytest.mark.parametrize("call", ["model_jvp", "model_vjp", "modjac", "jacobian"])
def test_no_parameters_is_said_of_the_model_by_its_class(call: str):
    with pytest.raises(ModelStateError) as error:
        MODEL_CALLS[call](nn.ReLU(), draw(5, 3))
    says(error.value, "`model`", "ReLU", "without parameters", "floating-point parameter")


def test_no_parameters_is_said_of_a_model_with_a_loss():
    with pytest.raises(ModelStateError) as error:
        TorchTwiceDifferentiable(nn.ReLU(), square)
    says(error.value, "`model`", "ReLU", "no parameter requires grad", "requires_grad_()")


@pytest.mark.parametrize("call", ["jvp", "vjp", "batch_jvp", "batch_vjp"])
def test_no_parameters_of_a_closure_point_to_generators_that_were_used_up(call: str):
    generator = iter([draw(3).requires_grad_()])
    assert len(list(generator)) == 1
    for params in ([], (), generator):
        with pytest.raises(InputError) as error:
            getattr(jacops, call)(lambda: torch.ones(3), params, torch.ones(2, 3) if "batch" in call else torch.ones(3))
        says(error.value, "`params`", "empty", "at least one tensor", "generator", "pass a list")


# A parameter without entries, flattened


@pytest.mark.parametrize(("strategy", "vectorize"), STRATEGIES)
def test_empty_parameter_takes_no_columns(strategy: Any, vectorize: bool):
    model = Calls(lambda a, b, c, x: x * a + b.sum() + c, (3,), (0, 2), ())
    found = modjac(model, draw(5, 3), flatten=True, strategy=strategy, vectorize=vectorize)
    assert found.shape == (15, 4)
    close(found, answer_jacobian(model, draw(5, 3)))


# Tuple, dict, None and other outputs


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda W, x: (x @ W, (x @ W).tanh()),
    "nested": lambda W, x: (x @ W, ((x @ W) ** 2, {"last": (x @ W).sum(1)})),
    "list": lambda W, x: [x @ W, x @ W * 2],
    "dict": lambda W, x: {"logits": x @ W, "hidden": (x @ W).tanh()},
}


@pytest.mark.parametrize("kind", OUTPUTS)
@model_calls
def test_outputs_may_be_trees(kind: str, call: str):
    model, x = Calls(OUTPUTS[kind], (3, 2)), draw(5, 3)
    found = MODEL_CALLS[call](model, x)
    close(found, ANSWERS[call](model, x))
    if call in ("compute_jacobian", "model_jvp", "modjac"):
        assert type(found) is type(OUTPUTS[kind](draw(3, 2), x))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_a_closure_may_be_trees(kind: str):
    W, x = draw(3, 2).requires_grad_(), draw(5, 3)
    expected = oracle.parameter_jacobian(Calls(OUTPUTS[kind], (3, 2)), x)
    close(jacops.jvp(lambda: OUTPUTS[kind](W, x), [W], draw(3, 2, seed=9)), oracle.jvp(expected, [draw(3, 2, seed=9)]))
    (matrix,) = jacops.full_jacobian(lambda: OUTPUTS[kind](W, x), [W])
    close(matrix, torch.cat([row[0].reshape(-1, 3, 2) for row in expected]))


WRONG_OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str, tuple[str, ...]]] = {
    "none": (lambda W, x: None, "InputTypeError", ("NoneType", "tensor")),
    "text in a tuple": (lambda W, x: (x @ W, "me"), "InputTypeError", ("[1]", "str", "outputs=")),
    "text in a dict": (lambda W, x: {"y": x @ W, "name": "me"}, "InputTypeError", ("['name']", "str", "outputs=")),
    "a number": (lambda W, x: float((x @ W).detach().sum()), "InputTypeError", ("float", "tensor")),
    "numpy": (lambda W, x: (x @ W).detach().numpy(), "InputTypeError", ("ndarray", "tensor")),
    "labels": (lambda W, x: (x @ W).argmax(1), "NotDifferentiableError", ("torch.int64", "floating-point", "scores")),
    "a mask": (lambda W, x: x @ W > 0, "NotDifferentiableError", ("torch.bool", "floating-point")),
    "nothing": (lambda W, x: (), "InputTypeError", ("tuple", "tensor")),
    "sparse": (lambda W, x: (x @ W).to_sparse(), "InputError", ("sparse", "to_dense")),
}


@pytest.mark.parametrize("kind", WRONG_OUTPUTS)
@pytest.mark.parametrize("call", ["compute_jacobian", "model_jvp", "modjac", "jacobian", "jvp", "full_jacobian"])
def test_outputs_that_are_no_tensors_are_named_leaf_by_leaf(kind: str, call: str):
    function, name, parts = WRONG_OUTPUTS[kind]
    W, x = draw(3, 2).requires_grad_(), draw(5, 3)
    model = Calls(function, (3, 2))
    calls: dict[str, Callable[[], Any]] = {
        "jvp": lambda: jacops.jvp(lambda: function(W, x), [W], draw(3, 2)),
        "full_jacobian": lambda: jacops.full_jacobian(lambda: function(W, x), [W]),
    }
    with pytest.raises(getattr(errors, name)) as error:
        calls.get(call, lambda: MODEL_CALLS[call](model, x))()
    says(error.value, "output" if call not in ("jvp", "full_jacobian") else "func()", *parts)


def test_outputs_one_part_may_be_picked_where_another_has_no_derivative():
    model = Calls(lambda W, x: {"y": x @ W, "name": "me", "label": (x @ W).argmax(1)}, (3, 2))
    x = draw(5, 3)
    assert compute_jacobian(model, x, outputs="y").shape == (5, 2, 3)
    assert modjac(model, x, outputs="y").shape == (5, 2, 3, 2)
    assert jacops.jacobian(model, x, outputs="y").shape == (10, 6)


# Several inputs


INPUTS: dict[str, tuple[Callable[..., Any], Any]] = {
    "a tuple": (lambda W, a, b: (a * b) @ W, (draw(5, 3), draw(5, 3, seed=1))),
    "a dict": (lambda W, b, a: (a - b**2) @ W, {"a": draw(5, 3), "b": draw(5, 3, seed=1)}),
    "with integers": (lambda W, a, i: a @ W + i[:, None], (draw(5, 3), torch.arange(5))),
}


@pytest.mark.parametrize("kind", INPUTS)
@model_calls
def test_inputs_several_of_them_are_unpacked(kind: str, call: str):
    function, inputs = INPUTS[kind]
    right(call, Calls(function, (3, 2)), inputs)


def test_inputs_of_several_lengths_are_named():
    with pytest.raises(InputError) as error:
        compute_jacobian(Calls(lambda a, b: a), (draw(5, 3), draw(4, 3)))
    says(error.value, "`x`", "x[0]", "5", "x[1]", "4", "one row per sample")


@pytest.mark.parametrize("x", [[1.0, 2.0], "x", None, 3.0, {1.0}], ids=repr)
def test_inputs_that_are_no_tensors_are_named(x: Any):
    with pytest.raises(InputTypeError) as error:
        compute_jacobian(small_net(), x)
    says(error.value, "`x`", type(x).__name__, "tensor", "torch.as_tensor")


def test_inputs_that_do_not_fit_the_forward_s_signature_are_the_model_s_own_error():
    with pytest.raises(TypeError):
        compute_jacobian(small_net(), (draw(5, 3), draw(5, 3)))


# Frozen parameters


@model_calls
def test_frozen_parameters_are_fine(call: str):
    model, x = small_net(), draw(5, 3)
    model[0].weight.requires_grad_(False)
    if call == "jacobian":
        close(MODEL_CALLS[call](model, x), answer_jacobian(model, x)[:, 12:])
    else:
        right(call, model, x)


def test_frozen_tensor_of_a_closure_is_named():
    W, frozen = draw(3).requires_grad_(), draw(3)
    for call, extra in ((jacops.jvp, [[frozen, frozen]]), (jacops.vjp, [frozen]), (jacops.full_jacobian, [])):
        with pytest.raises(InputError) as error:
            call(lambda: W * frozen, [W, frozen], *extra)
        says(error.value, "`params[1]`", "(3,)", "does not require grad", "requires_grad_()")


# Buffers, unused parameters, zero blocks, constants


@model_calls
def test_batch_norm_in_eval_mode_is_fine(call: str):
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)))
    model[1].running_mean.copy_(draw(4))
    model.eval()
    mean = model[1].running_mean.clone()
    right(call, model, draw(5, 3))
    assert torch.equal(model[1].running_mean, mean)


@model_calls
def test_unused_parameters_are_zero(call: str):
    model = Calls(lambda idle, W, x: x @ W, (2,), (3, 2))
    right(call, model, draw(5, 3))


def test_unused_parameters_are_zero_in_second_derivatives():
    model = Calls(lambda idle, W, x: x @ W, (2,), (3, 2))
    wrapped = TorchTwiceDifferentiable(model, square)
    recorded = wrapped.grad(draw(5, 3), Y, create_graph=True)
    expected = oracle.hessian(model, square, draw(5, 3), Y)
    close(wrapped.mvp(recorded, torch.eye(8).double(), wrapped.parameters), expected)
    assert not expected[:2].any()


@pytest.mark.parametrize("net", [lambda: settled(nn.Linear(3, 2)), small_net], ids=["linear", "tanh"])
def test_zero_hessian_of_a_linear_loss_is_zero(net: Callable[[], nn.Module]):
    """A linear loss on a linear net has no curvature; on another net it has."""
    model, x = net(), draw(5, 3)

    def linear(output: Tensor, y: Tensor) -> Tensor:
        return output.sum()

    expected = oracle.hessian(model, linear, x, Y)
    assert bool(expected.any()) == (not isinstance(model, nn.Linear))
    close(jacops.hessian(model, linear, x, Y).dense(), expected)
    close(jacops.hvp(model, linear, x, Y, torch.ones(expected.shape[0]).double()), expected.sum(1))
    close(TorchTwiceDifferentiable(model, linear).hessian(x, Y), expected)
    assert not jacops.ggn(model, linear, x, Y).dense().any()


def test_constant_output_is_zero_and_said_once():
    model, x = Calls(lambda W, x: torch.ones(x.shape[0], 2).double(), (3, 2)), draw(5, 3)
    for call in ("model_jvp", "model_vjp", "modjac"):
        with pytest.warns(JacopsWarning, match="no path leads") as said:
            found = MODEL_CALLS[call](model, x)
        assert len(said) == 1
        assert not any(leaf.any() for leaf in oracle.leaves(found))
    with pytest.raises(NotDifferentiableError) as error:
        jacops.jacobian(model, x)
    says(error.value, "no path leads", "output", "weights.0", "allow_zero=True")
    assert not jacops.jacobian(model, x, allow_zero=True).dense().any()


def test_constant_output_has_zero_input_jacobians():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        found = compute_jacobian(Calls(lambda x: torch.ones(x.shape[0], 2).double()), draw(5, 3))
    assert torch.equal(found, torch.zeros(5, 2, 3).double())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@model_calls
def test_no_grad_and_inference_mode_are_fine(call: str, context: Callable[[], Any]):
    model, x = small_net(), draw(5, 3)
    expected = ANSWERS[call](model, x)
    with context():
        close(MODEL_CALLS[call](model, x), expected)


# Strategies of modjac


def test_strategy_typo_names_the_two():
    with pytest.raises(InputError) as error:
        modjac(small_net(), draw(5, 3), strategy="forwards")
    says(error.value, "`strategy`", "'forwards'", "'reverse-mode' or 'forward-mode'")


@pytest.mark.parametrize(
    "options", [{}, {"vectorize": True}, {"strict": True}, {"vectorize": True, "strict": True}], ids=str
)
@pytest.mark.parametrize("create_graph", [False, True])
def test_strategy_forward_mode_goes_with_every_other_option(options: dict[str, bool], create_graph: bool):
    model, x = small_net(), draw(5, 3)
    found = modjac(model, x, create_graph, strategy="forward-mode", **options)
    close([block.detach() for block in found], oracle.parameter_jacobian(model, x)[0])
    assert all(block.requires_grad == create_graph for block in found[:3])


# Integer, float64, NumPy


def test_integer_input_of_an_input_jacobian_points_to_the_embedding():
    model = nn.Sequential(nn.Embedding(10, 3), nn.Linear(3, 2))
    with pytest.raises(NotDifferentiableError) as error:
        compute_jacobian(model, torch.tensor([[1, 2], [3, 4]]))
    says(error.value, "`x`", "without floating-point tensors", "integer", "at=")


@pytest.mark.parametrize("call", [c for c in MODEL_CALLS if c != "compute_jacobian"])
def test_integer_input_of_an_embedding_is_fine_by_parameters(call: str):
    model = settled(nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)))
    right(call, model, torch.tensor([[1, 2], [3, 5]]))


def test_integer_input_of_an_embedding_is_fine_with_create_graph():
    model = settled(nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)))
    ids = torch.tensor([[1, 2], [3, 5]])
    wrapped = TorchTwiceDifferentiable(model, square)
    recorded = wrapped.grad(ids, Y, create_graph=True)
    eye = torch.eye(wrapped.num_params).double()
    close(wrapped.mvp(recorded, eye, wrapped.parameters), oracle.hessian(model, square, ids, Y))


def shape_only(model: nn.Module, x: Any, call: str) -> Any:
    """The call, with vectors made for a batch of five."""
    if call == "model_vjp":
        return jacops.model_vjp(model, x, torch.ones(5, 2, dtype=model[2].weight.dtype))
    if call == "model_jvp":
        return jacops.model_jvp(model, x, [torch.ones_like(p) for p in model.parameters()])
    return MODEL_CALLS[call](model, x)


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.int64),
    ],
)
@model_calls
def test_input_of_another_dtype_names_both(call: str, own: torch.dtype, given: torch.dtype):
    model, x = small_net().to(own), torch.ones(5, 3).to(given)
    if call == "compute_jacobian" and given is torch.int64:
        with pytest.raises(NotDifferentiableError, match="integer inputs have no derivative"):
            compute_jacobian(model, x)
        return
    with pytest.raises(InputError) as error:
        shape_only(model, x, call)
    says(error.value, "`input`", str(own), str(given), "Cast one of them")


@pytest.mark.parametrize(
    "x", [np.ones((5, 3)), np.ones((5, 3))[::-1], [[1.0, 2.0, 3.0]] * 5], ids=["numpy", "reversed", "list"]
)
@model_calls
def test_input_from_numpy_or_a_list_is_named_with_what_to_do(call: str, x: Any):
    with pytest.raises(InputTypeError) as error:
        shape_only(small_net(), x, call)
    says(error.value, "x" if call == "compute_jacobian" else "input", type(x).__name__, "torch.as_tensor")


# Branches, values read out, randomness, recurrent layers


class Recurrent(nn.Module):
    def __init__(self, kind: type):
        super().__init__()
        self.layer = kind(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


FLOWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "a branch": (lambda: Calls(lambda W, x: x @ W if x.sum() > 0 else (x @ W) ** 2, (3, 2)), (5, 3), True),
    "item": (lambda: Calls(lambda W, x: x @ W * x.detach().max().item(), (3, 2)), (5, 3), True),
    "nonzero": (lambda: Calls(lambda W, x: x @ W * len(x.detach().nonzero()), (3, 2)), (5, 3), True),
    "RReLU": (lambda: nn.Sequential(nn.Linear(3, 2), nn.RReLU()).eval(), (5, 3), False),
    "LSTM": (lambda: Recurrent(nn.LSTM), (3, 4, 3), False),
    "GRU": (lambda: Recurrent(nn.GRU), (3, 4, 3), False),
    "RNN": (lambda: Recurrent(nn.RNN), (3, 4, 3), False),
}


@pytest.mark.parametrize("flow", FLOWS)
@model_calls
def test_flow_branches_values_and_recurrent_layers_are_fine(flow: str, call: str):
    make, shape, reads = FLOWS[flow]
    torch.manual_seed(0)
    model, x = settled(make()), draw(*shape)
    if call == "compute_jacobian" and reads:
        with pytest.warns(JacopsWarning, match="reads values out of tensors.*differentiated alone"):
            right(call, model, x)
    else:
        right(call, model, x)


@pytest.mark.parametrize("call", [c for c in MODEL_CALLS if c != "compute_jacobian"])
def test_flow_dropout_that_is_always_on_has_one_mask_per_call(call: str):
    model, x = Calls(lambda W, x: F.dropout(x, 0.5) @ W, (3, 2)), draw(5, 3)
    torch.manual_seed(4)
    expected = ANSWERS[call](model, x)
    before = torch.get_rng_state()
    close(MODEL_CALLS[call](model, x), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_flow_dropout_that_is_always_on_is_taken_sample_by_sample_with_a_warning():
    model, x = Calls(lambda x: F.dropout(x, 0.5) ** 2), draw(5, 3)
    torch.manual_seed(4)
    expected = oracle.input_jacobian(model, x)
    with pytest.warns(JacopsWarning, match="the forward is random in eval mode"):
        close(compute_jacobian(model, x), expected)


# Models that cannot be copied deeply


class Locked(nn.Module):
    """A model with a lock, an activation of an earlier call that hangs on a graph, and an open generator."""

    def __init__(self):
        super().__init__()
        self.net = small_net()
        self.lock = threading.Lock()
        self.stream = (i for i in range(3))
        self.cached = self.net(draw(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.cached = self.net(x)
        return self.cached


@model_calls
def test_copying_a_model_that_cannot_be_copied_deeply_is_not_needed(call: str):
    model, x = Locked(), draw(5, 3)
    cached = model.cached
    found = shape_only(model, x, call) if call != "model_vjp" else jacops.model_vjp(model, x, torch.ones(5, 2).double())
    vectors = {
        "model_jvp": lambda: oracle.jvp(
            oracle.parameter_jacobian(model.net, x), [torch.ones_like(p) for p in model.parameters()]
        )
    }
    close(found, vectors.get(call, lambda: ANSWERS[call](model.net, x))())
    assert model.cached is cached
    assert next(model.stream) == 0


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@model_calls
def test_copying_a_model_with_the_old_weight_norm_is_not_needed(call: str):
    model = nn.utils.weight_norm(nn.Linear(3, 2)).double()
    fresh = nn.utils.weight_norm(nn.Linear(3, 2)).double()
    fresh.load_state_dict(model.state_dict())
    model(draw(5, 3))
    x = draw(5, 3)
    found = (
        MODEL_CALLS[call](model, x) if call != "model_vjp" else jacops.model_vjp(model, x, torch.ones(5, 2).double())
    )

    def copier(_: nn.Module) -> nn.Module:
        twin = nn.utils.weight_norm(nn.Linear(3, 2)).double()
        twin.load_state_dict(model.state_dict())
        return twin

    blocks = oracle.parameter_jacobian(model, x, copier)
    expected = {
        "compute_jacobian": lambda: oracle.input_jacobian(model, x, copier),
        "model_jvp": lambda: oracle.jvp(blocks, tangents(model)),
        "model_vjp": lambda: oracle.vjp(blocks, [torch.ones(5, 2)]),
        "modjac": lambda: blocks,
        "jacobian": lambda: torch.cat([b.reshape(10, -1) for b in blocks[0]], 1),
        "grad": lambda: oracle.gradient(model, square, x, Y, copier),
        "hessian": lambda: oracle.hessian(model, square, x, Y, copier),
    }
    close(found, expected[call]())


# TorchScript, DataParallel


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrapper", ["script", "trace", "DataParallel"])
@model_calls
def test_wrappers_that_change_nothing_are_fine(call: str, wrapper: str):
    model, x = small_net(), draw(5, 3)
    wraps: dict[str, Callable[[], nn.Module]] = {
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, x),
        "DataParallel": lambda: nn.DataParallel(model),
    }
    wrapped = wraps[wrapper]()
    expected = ANSWERS[call](model, x)
    found = (
        jacops.model_vjp(wrapped, x, torch.ones(5, 2).double())
        if call == "model_vjp"
        else MODEL_CALLS[call](wrapped, x)
    )
    close(found, expected)


# Sparse gradients


@pytest.mark.parametrize("call", [c for c in MODEL_CALLS if c != "compute_jacobian"])
def test_sparse_gradient_of_an_embedding_is_fine(call: str):
    model = settled(nn.Sequential(nn.Embedding(6, 3, sparse=True), nn.Linear(3, 2)))
    dense = settled(nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)))
    ids = torch.tensor([[1, 2], [3, 5]])
    found = MODEL_CALLS[call](model, ids)
    close(found, ANSWERS[call](dense, ids))
    assert all(leaf.layout is torch.strided for leaf in oracle.leaves(found))
    assert model[0].sparse


def test_sparse_gradient_in_a_closure_is_fine():
    table, ids = nn.Embedding(6, 3, sparse=True).double(), torch.tensor([1, 2, 2])
    expected = torch.zeros(9, 6, 3).double()
    for row, index in enumerate(ids.tolist()):
        for j in range(3):
            expected[3 * row + j, index, j] = 1
    (matrix,) = jacops.full_jacobian(lambda: table(ids), [table.weight])
    close(matrix, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        close(jacops.jvp(lambda: table(ids), [table.weight], draw(6, 3)), draw(6, 3)[ids])
    assert torch.equal(jacops.vjp(lambda: table(ids), [table.weight], torch.ones(3, 3).double()), expected.sum(0))


# Solves


def test_singular_system_is_an_error_that_carries_what_there_is():
    model = settled(nn.Linear(2, 1, bias=False))
    flat, other = draw(3, 2) * torch.tensor([1.0, 0.0]).double(), [(draw(3, 2, seed=5), torch.ones(3, 1).double())]
    data = [(flat, torch.ones(3, 1).double())]
    with pytest.raises(SolveError) as error:
        jacops.compute_influence_factors(TorchTwiceDifferentiable(model, F.mse_loss), data, other)
    says(error.value, "hessian", "singular", "damping")
    assert set(error.value.solution.status) == {"singular"}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"influence_type": "sideways"}, ("`influence_type`", "'sideways'", "'up' or 'perturbation'")),
        ({"inversion_method": "magic"}, ("`inversion_method`", "'magic'", "'direct'")),
    ],
    ids=["influence_type", "inversion_method"],
)
def test_unknown_names_come_with_the_known_ones(options: dict[str, str], parts: tuple[str, ...]):
    model = settled(nn.Linear(2, 1))
    with pytest.raises(InputError) as error:
        jacops.compute_influences(TorchTwiceDifferentiable(model, F.mse_loss), [(draw(3, 2), draw(3, 1))], **options)
    says(error.value, *parts)


# A plain function in place of a module


def test_plain_function_has_input_jacobians():
    x = draw(5, 3)
    close(compute_jacobian(lambda rows: rows**2, x), torch.diag_embed(2 * x))
    net = small_net()
    close(compute_jacobian(lambda rows: net(rows), x), oracle.input_jacobian(net, x))


FUNCTION_CALLS: dict[str, Callable[[Any], Any]] = {
    "model_jvp": lambda model: jacops.model_jvp(model, draw(5, 3), []),
    "model_vjp": lambda model: jacops.model_vjp(model, draw(5, 3), draw(5, 2)),
    "modjac": lambda model: modjac(model, draw(5, 3)),
    "jacobian": lambda model: jacops.jacobian(model, draw(5, 3)),
    "hessian": lambda model: jacops.hessian(model, square, draw(5, 3), Y),
    "ggn": lambda model: jacops.ggn(model, square, draw(5, 3), Y),
    "sample_gradients": lambda model: jacops.sample_gradients(model, square, draw(5, 3), draw(5, 1)),
    "check": lambda model: jacops.check(model, draw(5, 3)),
    "TorchTwiceDifferentiable": lambda model: TorchTwiceDifferentiable(model, square),
}


@pytest.mark.parametrize("call", FUNCTION_CALLS)
def test_plain_function_has_no_parameters_to_differentiate_and_is_named(call: str):
    with pytest.raises(InputTypeError) as error:
        FUNCTION_CALLS[call](lambda x: x)
    says(error.value, "`model`", "function", "torch.nn.Module")


@pytest.mark.parametrize("call", [*FUNCTION_CALLS, "compute_jacobian"])
def test_plain_class_in_place_of_a_model_is_asked_back(call: str):
    with pytest.raises(InputTypeError) as error:
        FUNCTION_CALLS.get(call, lambda model: compute_jacobian(model, draw(5, 3)))(nn.Linear)
    says(error.value, "`model`", "the class Linear", "Did you mean Linear()?")


# Words that choose a route


@pytest.mark.parametrize("argument", ["checks", "fallback"])
def test_unknown_words_come_with_the_known_ones(argument: str):
    known = {"checks": ("'first'", "'always'", "'never'"), "fallback": ("'warn'", "'silent'", "'error'")}[argument]
    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    word = {argument: "sometimes"}
    for call in (
        lambda: compute_jacobian(model, x, **word),
        lambda: jacops.jacobian(model, x, **word),
        lambda: jacops.hessian(model, F.mse_loss, x, y, **word),
        lambda: jacops.ggn(model, F.mse_loss, x, y, **word),
    ):
        with pytest.raises(InputError) as error:
            call()
        says(error.value, f"`{argument}`", "'sometimes'", *known)


@pytest.mark.parametrize("call", ["jvp", "batch_jvp"])
def test_unknown_fallback_of_a_closure_is_named_before_it_runs(call: str):
    runs: list[int] = []
    W = draw(3).requires_grad_()
    with pytest.raises(InputError, match="`fallback` is 'maybe'"):
        getattr(jacops, call)(lambda: runs.append(1) or W**2, [W], draw(*([2] * (call != "jvp")), 3), fallback="maybe")
    assert not runs


# The errors themselves


BUILTINS = {
    "InputTypeError": TypeError,
    "InputError": ValueError,
    "ModelStateError": ValueError,
    "NotDifferentiableError": RuntimeError,
    "NonFiniteError": ArithmeticError,
    "DataError": ValueError,
    "SolveError": RuntimeError,
    "MemoryBudgetError": MemoryError,
    "MissingExtraError": ImportError,
    "StoreError": RuntimeError,
    "StoreMismatchError": RuntimeError,
    "StoreDamagedError": RuntimeError,
    "StoreIncompleteError": RuntimeError,
    "StoreBusyError": RuntimeError,
    "StoreFileError": OSError,
}


@pytest.mark.parametrize("name", BUILTINS)
def test_errors_are_caught_as_the_library_s_and_as_the_builtin(name: str):
    kind = getattr(errors, name)
    assert issubclass(kind, JacopsError)
    assert issubclass(kind, BUILTINS[name])


def test_errors_every_error_type_is_in_the_table():
    kinds = {n for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, JacopsError)} - {"JacopsError"}
    assert kinds == set(BUILTINS)
