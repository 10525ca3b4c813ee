"""Faults P1, P2, P4 and P6-P8 of the parameter Jacobian that came before, each with the right value or a clear error.

Beside them: the shapes that callers rely on, `outputs=` and `at=` of operators, and threads that share one model.
"""

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
from jacops import JacopsWarning, modjac
from jacops.errors import ModelStateError, NonFiniteError, NotDifferentiableError
from small import Calls, Counts, Swept, close, draw, flat, settled, small_net

ROUTES = list(itertools.product(("reverse-mode", "forward-mode"), (False, True)))
routes = pytest.mark.parametrize(
    ("strategy", "vectorize"), ROUTES, ids=[f"{s}-{v and 'vectorized'}" for s, v in ROUTES]
)


# P1: inference mode


def linear_jacobian(model: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, out, out, in) and (rows, out, out)."""
    eye = torch.eye(model.out_features, dtype=x.dtype)
    return torch.einsum("oi,nf->noif", eye, x), eye.expand(x.shape[0], -1, -1)


@routes
@pytest.mark.parametrize("strict", [False, True])
def test_p1_inference_mode_gives_the_jacobian_and_never_zeros(strategy: Any, vectorize: bool, strict: bool):
    model, x = nn.Linear(3, 2).double(), draw(5, 3)
    expected = linear_jacobian(model, x)
    with torch.inference_mode():
        found = modjac(model, x, strategy=strategy, vectorize=vectorize, strict=strict)
    close(found, expected)
    assert all(block.any() for block in found)


@routes
def test_p1_parameters_and_inputs_made_in_inference_mode(strategy: Any, vectorize: bool):
    with torch.inference_mode():
        model, x = nn.Linear(3, 2).double(), draw(5, 3)
        assert model.weight.is_inference()
        found = modjac(model, x, strategy=strategy, vectorize=vectorize)
        close(found, linear_jacobian(model, x))
    again = modjac(model, x, strategy=strategy, vectorize=vectorize)
    close(again, linear_jacobian(model, x))
    assert model.weight.is_inference()


def test_p1_results_of_inference_mode_can_be_used_outside():
    with torch.inference_mode():
        found = modjac(small_net(), draw(5, 3), flatten=True)
    found = found.clone() if found.is_inference() else found
    found.requires_grad_().sum().backward()


# P2: forward mode with flatten


@routes
def test_p2_flatten_gives_one_matrix_on_every_route(strategy: Any, vectorize: bool):
    model, x = nn.Linear(3, 2).double(), draw(5, 3)
    found = modjac(model, x, strategy=strategy, vectorize=vectorize, flatten=True)
    assert isinstance(found, Tensor)
    assert found.shape == (10, 8)
    assert not found.requires_grad
    by_weight, by_bias = linear_jacobian(model, x)
    close(found, torch.cat([by_weight.reshape(10, 6), by_bias.reshape(10, 2)], 1))


@routes
@pytest.mark.parametrize("flatten", [False, True])
def test_p2_every_route_gives_the_same_containers_and_numbers(strategy: Any, vectorize: bool, flatten: bool):
    model = Calls(lambda a, b, x: (x @ a, {"sum": b.sum(), "both": (x @ a + b) ** 2}), (3, 2), (2,))
    x = draw(5, 3)
    found = modjac(model, x, strategy=strategy, vectorize=vectorize, flatten=flatten)
    blocks = oracle.parameter_jacobian(model, x)
    if flatten:
        close(found, flat(blocks, list(model.parameters())))
        assert found.shape == (10 + 1 + 10, 8)
    else:
        assert type(found) is tuple
        assert type(found[1]) is dict
        assert [type(row) for row in (found[0], found[1]["sum"], found[1]["both"])] == [tuple] * 3
        close(found, blocks)
        assert not any(leaf.requires_grad for leaf in oracle.leaves(found))


@routes
@pytest.mark.parametrize("strict", [False, True])
def test_p2_create_graph_keeps_the_graph_on_every_route(strategy: Any, vectorize: bool, strict: bool):
    model, x = small_net(), draw(5, 3)
    found = modjac(model, x, True, strict, vectorize, strategy, flatten=True)
    close(found.detach(), flat(oracle.parameter_jacobian(model, x), list(model.parameters())))
    assert found.requires_grad
    weights = draw(*found.shape, seed=4)
    slopes = torch.autograd.grad((found * weights).sum(), list(model.parameters()), allow_unused=True)
    direction = [draw(*p.shape, seed=7 + i) for i, p in enumerate(model.parameters())]
    product = sum((g * d).sum() for g, d in zip(slopes, direction, strict=True) if g is not None)
    values = []
    for sign in (1e-5, -1e-5):
        moved = small_net()
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(sign * d)
        values.append((modjac(moved, x, flatten=True) * weights).sum())
    close(product, (values[0] - values[1]) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_p2_dtypes_are_the_parameter_s_in_reverse_and_the_output_s_in_forward_mode(own: torch.dtype):
    model = Calls(lambda a, b, x: x @ a.double() + b.double(), (3, 2), (2,))
    model.weights[0].data = model.weights[0].data.to(own)
    reverse = modjac(model, draw(5, 3))
    forward = modjac(model, draw(5, 3), strategy="forward-mode")
    assert [block.dtype for block in reverse] == [own, torch.float64]
    assert [block.dtype for block in forward] == [torch.float64, torch.float64]
    assert modjac(model, draw(5, 3), flatten=True).dtype == torch.float64
    close(forward, reverse, rtol=1e-6, same_dtype=False)


# P4: complex parameters


class Complex(nn.Module):
    """A function of a complex linear map."""

    def __init__(self, of: Callable[[Tensor], Tensor]):
        super().__init__()
        self.of = of
        self.weight = nn.Parameter(draw(2, 3, seed=0, dtype=torch.complex128))
        self.bias = nn.Parameter(draw(2, seed=1, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x @ self.weight.T + self.bias)


COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z,
    "squared": lambda z: z**2,
    "squared size": lambda z: z.abs() ** 2,
}
COMPLEX_X = draw(5, 3, seed=9, dtype=torch.complex128)


def complex_change(model: nn.Module, changes: list[Tensor]) -> Tensor:
    """What a small step does to the output, by central differences."""
    ends = []
    for sign in (1e-6, -1e-6):
        with torch.no_grad():
            moved = Complex(model.of)
            for p, d in zip(moved.parameters(), changes, strict=True):
                p.add_(sign * d)
            ends.append(moved(COMPLEX_X))
    return (ends[0] - ends[1]) / 2e-6


@routes
@pytest.mark.parametrize("kind", COMPLEX)
def test_p4_complex_jacobians_keep_one_convention_on_every_route(kind: str, strategy: Any, vectorize: bool):
    """`df = J dz` for holomorphic outputs and `df = Re(J dz)` for real ones."""
    model = Complex(COMPLEX[kind])
    changes = [draw(*p.shape, seed=20 + i, dtype=p.dtype) for i, p in enumerate(model.parameters())]
    matrix = modjac(model, COMPLEX_X, strategy=strategy, vectorize=vectorize, flatten=True)
    product = matrix @ torch.cat([c.flatten() for c in changes])
    expected = complex_change(model, changes).flatten()
    close(product if expected.is_complex() else product.real, expected, rtol=1e-7)


def test_p4_a_complex_linear_layer_has_its_input_as_jacobian():
    model = Complex(COMPLEX["linear"])
    for strategy, vectorize in ROUTES:
        by_weight, by_bias = modjac(model, COMPLEX_X, strategy=strategy, vectorize=vectorize)
        eye = torch.eye(2, dtype=torch.complex128)
        close(by_weight, torch.einsum("oi,nf->noif", eye, COMPLEX_X))
        close(by_bias, eye.expand(5, 2, 2))


def test_p4_the_calls_agree_with_one_another():
    for model in map(Complex, COMPLEX.values()):
        blocks = modjac(model, COMPLEX_X)
        same = jacops.full_jacobian(lambda model=model: model(COMPLEX_X), model.parameters())
        close([b.reshape(10, *b.shape[2:]) for b in blocks], same)
        vs = [draw(*p.shape, seed=30, dtype=p.dtype) for p in model.parameters()]
        change = sum(torch.tensordot(b, v, v.ndim) for b, v in zip(blocks, vs, strict=True))
        pushed = jacops.model_jvp(model, COMPLEX_X, vs)
        close(pushed, change if pushed.is_complex() else change.real)


@routes
def test_p4_a_function_without_a_complex_jacobian_is_refused_on_every_route(strategy: Any, vectorize: bool):
    with pytest.raises(NotDifferentiableError, match="output is not a holomorphic function of weight.*view_as_real"):
        modjac(Complex(lambda z: z.conj() * z), COMPLEX_X, strategy=strategy, vectorize=vectorize)


def test_p4_complex_create_graph_is_right_too():
    model = Complex(COMPLEX["squared"])
    found = modjac(model, COMPLEX_X, create_graph=True, flatten=True)
    close(found.detach(), modjac(model, COMPLEX_X, flatten=True))
    (slope,) = torch.autograd.grad(found.abs().pow(2).sum(), model.bias)
    step, d = 1e-6, draw(2, seed=4, dtype=torch.complex128)
    ends = []
    for sign in (step, -step):
        moved = Complex(COMPLEX["squared"])
        with torch.no_grad():
            moved.bias.add_(sign * d)
        ends.append(modjac(moved, COMPLEX_X, flatten=True).abs().pow(2).sum())
    close((slope.conj() * d).real.sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


# P6: frozen parameters


@routes
def test_p6_frozen_parameters_are_columns_unless_left_out_by_request(strategy: Any, vectorize: bool):
    model, x = small_net(), draw(5, 3)
    model[0].weight.requires_grad_(False)
    blocks = oracle.parameter_jacobian(model, x)
    options = {"strategy": strategy, "vectorize": vectorize}
    close(modjac(model, x, **options), blocks)
    close(modjac(model, x, flatten=True, **options), flat(blocks, list(model.parameters())))
    trainable = modjac(model, x, flatten=True, parameters="trainable", **options)
    close(trainable, flat([row[1:] for row in blocks], list(model.parameters())[1:]))
    assert trainable.shape[1] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not model[0].weight.requires_grad


def test_p6_a_gauss_newton_step_over_trainable_parameters_fits():
    """The columns split exactly over the parameters that a step may move."""
    model, x, y = nn.Linear(3, 1).double(), draw(20, 3), draw(20, 1, seed=1)
    model.bias.requires_grad_(False)
    J = modjac(model, x, flatten=True, parameters="trainable")
    residual = (model(x) - y).detach().reshape(-1)
    step = torch.linalg.lstsq(J, -residual[:, None]).solution.reshape(-1)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, part in zip(trained, step.split([p.numel() for p in trained]), strict=True):
            p.add_(part.reshape(p.shape))
    slope = x.T @ (model(x) - y).detach()
    assert slope.abs().max() < 1e-10


def test_p6_a_model_frozen_altogether_still_has_its_jacobian_unless_only_trainable_ones_are_asked_for():
    model, x = small_net().requires_grad_(False), draw(5, 3)
    close(modjac(model, x), oracle.parameter_jacobian(model, x))
    with pytest.raises(ModelStateError, match="Sequential without parameters to differentiate"):
        modjac(model, x, parameters="trainable")


# P7: NaN and Inf


class Rooted(nn.Module):
    """A square root whose slope at zero is infinite, or not a number behind a mask."""

    def __init__(self, masked: bool):
        super().__init__()
        self.fine, self.root, self.masked = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor([4.0, 0.0])), masked

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        root = self.root.sqrt()
        return self.fine * x, torch.where(self.root > 0, root, torch.zeros(())) if self.masked else root * x


rows_are_fine = pytest.mark.filterwarnings("ignore:modjac.*Route used. row by row")  # forward mode says so first


@rows_are_fine
@routes
@pytest.mark.parametrize("masked", [False, True])
def test_p7_an_infinite_or_undefined_derivative_names_output_and_parameter(
    strategy: Any, vectorize: bool, masked: bool
):
    said = r"Jacobian of output\[1\] by root, 2 of 4 entries.*index \(0, 1\).*check_finite=False"
    with pytest.raises(NonFiniteError, match=said):
        modjac(Rooted(masked), torch.ones(2), strategy=strategy, vectorize=vectorize)


@rows_are_fine
@routes
@pytest.mark.parametrize("masked", [False, True])
def test_p7_the_check_can_be_turned_off_for_a_legitimate_one(strategy: Any, vectorize: bool, masked: bool):
    """Then the answer is what plain autograd makes of it, and no other entry is touched."""
    found = modjac(Rooted(masked), torch.ones(2), strategy=strategy, vectorize=vectorize, check_finite=False)
    expected = oracle.parameter_jacobian(Rooted(masked), torch.ones(2))
    for block, wanted in zip(oracle.leaves(found), oracle.leaves(expected), strict=True):
        torch.testing.assert_close(block.double(), wanted, equal_nan=True)
    assert not found[1][1].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_p7_a_bad_number_in_data_or_weights_is_found_in_the_output_first(bad: float):
    model, x = small_net(), draw(5, 3)
    x[3, 1] = bad
    model[1] = nn.ReLU()
    with pytest.raises(NonFiniteError, match=r"modjac: in output, . of 10 entries.*index \(3, \d\)"):
        modjac(model, x)
    model[2].bias.data[0] = bad
    with pytest.raises(NonFiniteError, match=r"in output.*index \(0, 0\)"):
        modjac(model, draw(5, 3))


def test_p7_the_check_is_no_assert():
    code = (
        "import torch, jacops\n"
        "layer = torch.nn.Linear(1, 1)\n"
        "layer.weight.data.fill_(float('nan'))\n"
        "try:\n"
        "    jacops.modjac(layer, torch.ones(2, 1))\n"
        "except jacops.JacopsError as error:\n"
        "    print('refused', type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused NonFiniteError\n"


# P8: one linearisation


class Noisy(nn.Module):
    """Linear in its weight but for one dropout mask, with batch statistics on the way."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.layer = nn.BatchNorm1d(8, affine=False), nn.Dropout(0.5), nn.Linear(8, 3, bias=False)
        self.runs = Counts()

    def forward(self, x: Tensor) -> Tensor:
        self.runs.forward += 1
        return self.layer(self.drop(self.norm(x)))


def test_p8_residual_and_jacobian_come_from_one_mask():
    model, x = Noisy().double().train(), draw(6, 8)
    torch.manual_seed(1)
    J = jacops.jacobian(model, x)
    assert model.runs.forward == 1
    weight = model.layer.weight.detach().flatten()
    close(J @ weight, J.output.detach().flatten())
    close(J.dense() @ weight, J.output.detach().flatten())
    assert (J.dense() == 0).double().mean() > 0.7  # the mask is there: half of the entries of each row's own block
    assert model.runs.forward == 1


@routes
def test_p8_modjac_runs_the_model_once_and_moves_nothing(strategy: Any, vectorize: bool):
    model, x = Noisy().double().train(), draw(6, 8)
    model.runs = runs = Counts()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    expected = oracle.parameter_jacobian(model, x)[0][0]
    runs.forward = 0
    found = modjac(model, x, strategy=strategy, vectorize=vectorize)
    close(found, expected)
    assert runs.forward == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert int(model.norm.num_batches_tracked) == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(8).double())
    assert model.training


def test_p8_the_next_call_has_the_next_mask_once_the_caller_drew_it():
    model, x = Noisy().double().train(), draw(6, 8)
    first = modjac(model, x)
    assert torch.equal(first, modjac(model, x))  # the random state was put back
    torch.rand(1)
    assert not torch.equal(first, modjac(model, x))


# Shapes that callers rely on


@routes
def test_shapes_trees_of_outputs(strategy: Any, vectorize: bool):
    x = draw(3, 2)
    for make in (lambda a, x: (x * a,), lambda a, x: (x * a, a.sum()), lambda a, x: {"y": x * a}, lambda a, x: [x * a]):
        one = modjac(Calls(make, (2,)), x, strategy=strategy, vectorize=vectorize)
        assert type(one) is type(make(torch.ones(2), x))
        rows = list(one.values()) if isinstance(one, dict) else list(one)
        assert all(type(row) is tuple and len(row) == 1 for row in rows)
        close(rows[0][0], torch.einsum("ni,ij->nij", x, torch.eye(2).double()))


INPUTS: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "a tuple is unpacked": ((draw(3, 2), draw(3, 2, seed=1)), lambda a, x, y: (x + y) * a),
    "a mapping is keywords": ({"y": draw(3, 2), "x": draw(3, 2, seed=1)}, lambda a, x, y: (x - y) * a),
    "a list is one argument": ([draw(3, 2), draw(3, 2, seed=1)], lambda a, xs: (xs[0] * xs[1]) * a),
    "nothing is no argument": (None, lambda a: a**2),
    "something else is passed on": ((draw(3, 2), "twice", 2.0), lambda a, x, word, factor: x * a * factor),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_shapes_inputs_are_passed_as_documented(kind: str):
    given, function = INPUTS[kind]
    model = Calls(function, (2,))
    found = modjac(model, given)
    a = model.weights[0].detach().clone().requires_grad_()
    args, kwargs = (
        (given, {}) if isinstance(given, tuple) else ((), given) if isinstance(given, dict) else ((given,), {})
    )
    output = function(a) if given is None else function(a, *args, **kwargs)
    (expected,) = oracle.rows(output, [a])
    close(found, expected)


def test_shapes_an_unused_parameter_is_zero_or_refused_by_name():
    model = Calls(lambda a, b, x: (x * a, x * a * b), (2,), (2,))
    x = draw(3, 2)
    found = modjac(model, x)
    assert not found[0][1].any()
    close(found, oracle.parameter_jacobian(model, x))
    for strategy, vectorize in ROUTES:
        with pytest.raises(NotDifferentiableError, match=r"output\[0\] does not depend on parameter weights.1"):
            modjac(model, x, strict=True, strategy=strategy, vectorize=vectorize)
    fine = Calls(lambda a, b, x: x * a * b, (2,), (2,))
    close(modjac(fine, x, strict=True), modjac(fine, x))


@routes
def test_shapes_an_output_that_depends_on_nothing_is_zero_with_one_warning(strategy: Any, vectorize: bool):
    model = Calls(lambda a, x: x * 2, (2,))
    with pytest.warns(JacopsWarning, match="modjac: no path leads from the output") as said:
        found = modjac(model, draw(3, 2), strategy=strategy, vectorize=vectorize)
    assert len(said) == 1
    assert torch.equal(found, torch.zeros(3, 2, 2).double())


EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int]]] = {
    "no rows": (lambda: nn.Linear(3, 2), (0, 3), (0, 8)),
    "no outputs": (lambda: Calls(lambda a, x: x[:, :0] * a[:0], (3,)), (5, 3), (0, 3)),
    "a parameter without entries": (lambda: Calls(lambda a, b, x: x * a + b.sum(), (3,), (0,)), (5, 3), (15, 3)),
    "only a parameter without entries": (lambda: Calls(lambda b, x: x + b.sum(), (0, 2)), (5, 3), (15, 0)),
}


@pytest.mark.parametrize("kind", EMPTY)
@routes
def test_shapes_empty_axes_are_kept(kind: str, strategy: Any, vectorize: bool):
    make, shape, expected = EMPTY[kind]
    model, x = make().double(), draw(*shape)
    found = modjac(model, x, strategy=strategy, vectorize=vectorize, flatten=True)
    assert found.shape == expected
    output = model(x)
    blocks = modjac(model, x, strategy=strategy, vectorize=vectorize)
    for block, p in zip(oracle.leaves(blocks), model.parameters(), strict=True):
        assert block.shape == (*output.shape, *p.shape)


# `outputs=` and `at=`


@pytest.mark.parametrize("pick", [41_234, [41_234], lambda out: out[:, 41_234]], ids=["index", "list", "callable"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_outputs_one_logit_of_fifty_thousand_costs_one_sweep(pick: Any, vectorize: bool):
    model, x = Swept(nn.Linear(2, 50_000)), draw(1, 2, dtype=torch.float32)
    by_weight, by_bias = modjac(model, x, outputs=pick, vectorize=vectorize)
    assert model.spent() == (1, 1)
    assert by_weight.numel() == 2 * 50_000
    assert torch.equal(by_weight.reshape(50_000, 2)[41_234], x[0])
    assert by_weight.count_nonzero() == 2
    assert by_bias.count_nonzero() == 1


def test_outputs_of_an_operator_pick_rows():
    model, x = small_net(), draw(5, 3)
    whole = flat(oracle.parameter_jacobian(model, x), list(model.parameters())).reshape(5, 2, -1)
    close(jacops.jacobian(model, x, outputs=1).dense(), whole[:, 1])
    close(jacops.jacobian(model, x, outputs=[1, 0]).dense(), whole[:, [1, 0]].reshape(10, -1))
    close(jacops.jacobian(model, x, outputs=lambda out: out.sum()).dense(), whole.sum((0, 1))[None])
    swept = Swept(nn.Linear(2, 50_000))
    J = jacops.jacobian(swept, draw(1, 2, dtype=torch.float32), outputs=7)
    assert J.shape == (1, 150_000)
    J.dense()
    assert swept.spent()[1] <= 2


def test_at_of_an_operator_goes_from_or_to_hidden_layers():
    model, x = small_net(), draw(5, 3)
    hidden = model[0](x).detach()
    slope = 1 - torch.tanh(hidden) ** 2
    blocks = (model[2].weight.detach() * slope[:, None]).unbind()
    close(jacops.jacobian(model, x, "inputs", at="0").dense(), torch.block_diag(*blocks))
    to_hidden = jacops.jacobian(model, x, "inputs", at=(None, "0")).dense()
    close(to_hidden, torch.block_diag(*[model[0].weight.detach()] * 5))
    close(jacops.jacobian(model, x, "inputs", at=("0", "1")).dense(), torch.diag(slope.flatten()))


def test_at_a_hidden_target_may_be_differentiated_by_parameters():
    model, x = small_net(), draw(5, 3)
    found = jacops.jacobian(model, x, at=(None, "0")).dense()
    close(found[:, :16], flat(oracle.parameter_jacobian(model[0], x), list(model[0].parameters())))
    assert not found[:, 16:].any()


# Threads that share one model


class Shared(nn.Module):
    """Batch statistics, a cached value and attention: state that threads could fight over."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.norm(x.transpose(1, 2)).transpose(1, 2)
        mixed = self.attention(self.last, self.last, self.last, need_weights=False)[0]
        return mixed + self.last


THREAD_CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "modjac": lambda model, x: modjac(model, x, flatten=True, vectorize=True),
    "compute_jacobian": lambda model, x: jacops.compute_jacobian(model, x),
    "model_jvp": lambda model, x: jacops.model_jvp(model, x, [torch.ones_like(p) for p in model.parameters()]),
    "hessian": lambda model, x: jacops.hessian(model, F.mse_loss, x, x).dense(),
}


def test_threads_may_share_one_model():
    """Eight at once, each with its own data, over two calls of each kind: as if alone, and the model is untouched."""
    model = settled(Shared()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [draw(3, 2, 4, seed=40 + i) for i in range(8)]
    tasks = [list(THREAD_CALLS)[i % 4] for i in range(8)]
    expected = [THREAD_CALLS[call](model, x) for call, x in zip(tasks, data, strict=True)]
    found: list[list[Tensor]] = [[] for _ in data]
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def work(i: int) -> None:
        try:
            start.wait()
            found[i].extend(THREAD_CALLS[tasks[i]](model, data[i]) for _ in range(3))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for answers, wanted in zip(found, expected, strict=True):
        assert len(answers) == 3
        for answer in answers:
            close(answer, wanted)
    assert model.last is None
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.backends.cuda.flash_sdp_enabled()


class Steps:
    """Events by which two threads take turns; no thread waits for ever."""

    def __init__(self):
        self.first_drew, self.second_drew, self.first_left = (threading.Event() for _ in range(3))


class TakesTurns(nn.Module):
    """Draws random numbers while another thread does, too: the second enters before the first has left."""

    def __init__(self, steps: Steps):
        super().__init__()
        self.weight, self.steps = nn.Parameter(torch.ones(3).double()), steps

    def forward(self, first: str) -> Tensor:
        steps = self.steps
        if first == "first":
            noise = torch.rand(3).double()
            steps.first_drew.set()
            steps.second_drew.wait(2)
        else:
            steps.first_drew.wait(2)
            noise = torch.rand(3).double()
            steps.second_drew.set()
            steps.first_left.wait(2)
        return self.weight * noise


def test_threads_that_draw_at_the_same_time_leave_the_random_state_put():
    steps = Steps()
    model, before = TakesTurns(steps), torch.get_rng_state()
    answers: list[Tensor] = []

    def work(name: str) -> None:
        answers.append(modjac(model, name))
        if name == "first":
            steps.first_left.set()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [J.count_nonzero() for J in answers] == [3, 3]
    assert torch.equal(torch.get_rng_state(), before)
