"""Every model of the zoo with every call: the value that plain autograd defines, or the error stated beforehand."""

import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
import oracle
import zoo
from jacops import errors
from oracle import Blocks, called, leaves, mapped
from zoo import BY_NAME, CLOSURES, ROWS, SECOND, SEED, ZOO, Case

CELLS = [(case.name, call) for case in ZOO for call in case.calls]
cells = pytest.mark.parametrize(("name", "call"), CELLS, ids=[f"{name}-{call}" for name, call in CELLS])

# Models for the conditions beyond the plain cell: one of each kind.
SUBSET = ("mlp_relu", "prelu", "conv_batchnorm_train", "dropout_train", "self_attention", "lstm", "inplace_add", "item")
SUBSET_CELLS = [(name, call) for name in SUBSET for call in BY_NAME[name].calls]
subset_cells = pytest.mark.parametrize(("name", "call"), SUBSET_CELLS, ids=[f"{n}-{c}" for n, c in SUBSET_CELLS])


# Comparing


def same(actual: Any, expected: Any, tolerance: float, where: str, dtype: torch.dtype | None) -> None:
    """Fail unless two trees agree: containers, keys, shapes, dtype, and numbers to a share of the largest entry."""
    sizes = [leaf.abs().max().item() for leaf in leaves(expected) if leaf.numel()]
    _same(actual, expected, tolerance * (max(sizes, default=0.0) or 1.0), where, dtype)


def _same(actual: Any, expected: Any, error: float, where: str, dtype: torch.dtype | None) -> None:
    if expected is None:
        assert actual is None, f"{where}: None expected, got {type(actual).__name__}"
    elif isinstance(expected, Tensor):
        _close(actual, expected, error, where, dtype)
    elif isinstance(expected, Mapping):
        assert isinstance(actual, Mapping), f"{where}: a mapping was expected, {type(actual).__name__} came"
        assert list(actual) == list(expected), f"{where}: keys {list(expected)} expected, got {list(actual)}"
        for key in expected:
            _same(actual[key], expected[key], error, f"{where}[{key!r}]", dtype)
    else:
        kind = type(expected)
        assert isinstance(actual, kind), f"{where}: a {kind.__name__} was expected, {type(actual).__name__} came"
        assert len(actual) == len(expected), f"{where}: {len(expected)} parts expected, got {len(actual)}"
        for index, part in enumerate(expected):
            _same(actual[index], part, error, f"{where}[{index}]", dtype)


def _close(actual: Tensor, expected: Tensor, error: float, where: str, dtype: torch.dtype | None) -> None:
    assert isinstance(actual, Tensor), f"{where}: a tensor was expected, {type(actual).__name__} came"
    assert actual.shape == expected.shape, f"{where}: shape {tuple(expected.shape)} expected, got {tuple(actual.shape)}"
    assert dtype is None or actual.dtype == dtype, f"{where}: {dtype} expected, got {actual.dtype}"
    assert not actual.requires_grad, f"{where}: requires grad though create_graph=False"
    assert actual.layout == torch.strided, f"{where}: layout {actual.layout}"
    off = (actual.double() - expected).abs()
    shown = f"\n{actual}\nexpected\n{expected}" if off.numel() <= 24 else ""
    assert (off <= error).all(), f"{where}: off by {off.max():.1e}, allowed {error:.1e}{shown}"


# What plain autograd says


def plain(call: str, case: Case, model: nn.Module, inputs: Any, output: Any, y: Any) -> Any:
    """The right answer of a call, in float64, at the present random state; the model and inputs are left alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models themselves
        if call == "compute_jacobian":
            return oracle.input_jacobian(model, inputs, case.copy, case.by_backward)
        if call == "grad":
            return oracle.gradient(model, case.loss, inputs, y, case.copy, case.by_backward)
        if call in SECOND:
            by_parameters, by_inputs = oracle.second_derivatives(model, case.loss, inputs, y, case.copy)
            wrt = {"hessian": by_parameters, "mvp": by_parameters, "mvp_inputs": by_inputs}[call]
            return wrt if call == "hessian" else zoo.directions(model).double() @ wrt
        blocks = oracle.parameter_jacobian(model, inputs, case.copy, case.by_backward)
        return PLAIN[call](blocks, model, output)


def shaped_like(output: Any, parts: list[Any]) -> Any:
    """The parts, one per output, in the containers of the output."""
    remaining = iter(parts)
    return mapped(lambda _: next(remaining), output)


def plain_jvp(blocks: Blocks, model: nn.Module, output: Any) -> Any:
    return shaped_like(output, oracle.jvp(blocks, zoo.tangents(model)))


def plain_batch_jvp(blocks: Blocks, model: nn.Module, output: Any) -> Any:
    vs = zoo.tangents(model, ROWS)
    answers = [oracle.jvp(blocks, [v[i] for v in vs]) for i in range(ROWS)]
    return shaped_like(output, [torch.stack(parts) for parts in zip(*answers, strict=True)])


def plain_vjp(blocks: Blocks, model: nn.Module, output: Any) -> Any:
    answer = oracle.vjp(blocks, leaves(zoo.cotangents(output)))
    return answer[0] if len(answer) == 1 else answer


def plain_batch_vjp(blocks: Blocks, model: nn.Module, output: Any) -> Any:
    us = leaves(zoo.cotangents(output, ROWS))
    answers = [oracle.vjp(blocks, [u[i] for u in us]) for i in range(ROWS)]
    return [torch.stack(parts) for parts in zip(*answers, strict=True)]


def plain_full_jacobian(blocks: Blocks, model: nn.Module, output: Any) -> Any:
    shapes = [parameter.shape for parameter in model.parameters()]
    sizes = [leaf.numel() for leaf in leaves(output)]
    columns = zip(*blocks, strict=True)
    return [
        torch.cat([block.reshape(size, *shape) for block, size in zip(column, sizes, strict=True)])
        for column, shape in zip(columns, shapes, strict=True)
    ]


def plain_modjac(blocks: Blocks, model: nn.Module, output: Any) -> Any:
    bare = isinstance(output, Tensor) and len(blocks[0]) == 1
    return shaped_like(output, [line[0] if bare else tuple(line) for line in blocks])


def plain_flat_modjac(blocks: Blocks, model: nn.Module, output: Any) -> Any:
    columns = plain_full_jacobian(blocks, model, output)
    sizes = [parameter.numel() for parameter in model.parameters()]
    return torch.cat([column.reshape(len(column), size) for column, size in zip(columns, sizes, strict=True)], 1)


PLAIN = {
    "jvp": plain_jvp,
    "vjp": plain_vjp,
    "batch_jvp": plain_batch_jvp,
    "batch_vjp": plain_batch_vjp,
    "full_jacobian": plain_full_jacobian,
    "model_jvp": plain_jvp,
    "model_vjp": plain_vjp,
    "modjac": plain_modjac,
    "modjac_vectorize": plain_modjac,
    "modjac_forward": plain_modjac,
    "modjac_flatten": plain_flat_modjac,
}


@cache
def right(name: str, call: str, dtype: torch.dtype | None = None) -> Any:
    """The right answer on a case as it is, or with model and inputs in another dtype."""
    case = BY_NAME[name]
    with zoo.seeded():
        return plain(call, case, case.model(dtype), case.x(dtype), case.output(dtype), case.y(dtype))


# Asking


@contextmanager
def told(must: bool, may: bool, where: str) -> Iterator[None]:
    """Fail on a missing JacopsWarning, on one out of place, and on any warning of another kind."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    others = [w for w in caught if not issubclass(w.category, jacops.JacopsWarning) and not deprecated(w)]
    own = [str(w.message) for w in caught if issubclass(w.category, jacops.JacopsWarning)]
    assert not others, f"{where}: warned {[str(w.message) for w in others]}"
    assert own or not must, f"{where}: no JacopsWarning"
    assert not own or must or may, f"{where}: warned {own}"
    assert len(own) <= 1, f"{where}: warned {len(own)} times: {own}"


def deprecated(warning: warnings.WarningMessage) -> bool:
    """Whether torch says this of itself, the first time a process differentiates forwards."""
    return "`torch.jit.script` is deprecated" in str(warning.message)


def ask(call: str, case: Case, model: nn.Module, inputs: Any, context: Callable[[], Any] = nullcontext) -> Any:
    """The library's answer, with the warnings that the cell allows."""
    asked = zoo.question(call, case, model, inputs)
    must, may = call in case.warns, call in case.may_warn
    with told(must, may, f"{case.name}-{call}"), zoo.seeded(), context():
        return asked()


# Every cell


@cells
def test_every_cell_has_the_right_value_or_the_stated_error(name: str, call: str) -> None:
    case = BY_NAME[name]
    if call in case.expect:
        refuses(case, call)
    else:
        actual = ask(call, case, case.model(), case.x())
        same(actual, right(name, call), case.tolerance, call, case.dtype)


def refuses(case: Case, call: str) -> None:
    """Fail unless the call raises the stated error, its message naming the cause."""
    refusal = case.expect[call]
    with pytest.raises(getattr(errors, refusal.error)) as caught:
        ask(call, case, case.model(), case.x())
    assert re.search(refusal.names, str(caught.value)), f"message does not name {refusal.names!r}: {caught.value}"


GRADED = [case for case in ZOO if "grad" not in case.expect and "mvp" not in case.expect]


@pytest.mark.parametrize("case", GRADED, ids=lambda case: case.name)
def test_a_gradient_with_a_graph_has_the_same_numbers(case: Case) -> None:
    model, inputs, y = case.model(), case.x(), case.y()
    with told(False, False, case.name), zoo.seeded():
        slope = jacops.TorchTwiceDifferentiable(model, case.loss).grad(inputs, y, create_graph=True)
    assert slope.requires_grad, "create_graph=True gave a gradient without a graph"
    same(slope.detach(), right(case.name, "grad"), case.tolerance, "grad", case.dtype)


@pytest.mark.parametrize("call", CLOSURES)
@pytest.mark.parametrize("name", ["frozen"])
def test_closures_work_over_the_parameters_that_are_trained(name: str, call: str) -> None:
    case = BY_NAME[name]
    model, inputs, output = case.model(), case.x(), case.output()
    kept = [index for index, parameter in enumerate(model.parameters()) if parameter.requires_grad]
    blocks = oracle.parameter_jacobian(model, inputs)
    kept_blocks = [[line[index] for index in kept] for line in blocks]
    only = nn.ParameterList([list(model.parameters())[index] for index in kept])
    extra = {
        "jvp": zoo.tangents(only),
        "batch_jvp": zoo.tangents(only, ROWS),
        "vjp": zoo.cotangents(output),
        "batch_vjp": zoo.cotangents(output, ROWS),
    }
    more = [extra[call]] if call in extra else []
    actual = getattr(jacops, call)(lambda: called(model, inputs), list(only), *more)
    same(actual, PLAIN[call](kept_blocks, only, output), 1e-9, call, torch.float64)


# Conditions beyond the plain cell


INPUT_CASES = [case for case in ZOO if "compute_jacobian" not in case.expect]
input_cases = pytest.mark.parametrize("case", INPUT_CASES, ids=lambda case: case.name)


@pytest.mark.parametrize("batch_size", [1, 2])
@input_cases
def test_the_batch_size_does_not_change_the_jacobian(case: Case, batch_size: int) -> None:
    model, inputs = case.model(), case.x()
    with warnings.catch_warnings(), zoo.seeded():
        warnings.simplefilter("ignore", jacops.JacopsWarning)
        actual = jacops.compute_jacobian(model, inputs, batch_size=batch_size)
    same(actual, right(case.name, "compute_jacobian"), case.tolerance, "compute_jacobian", case.dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_prelu_is_right_at_every_number_of_rows_in_a_chunk(rows: int) -> None:
    case = BY_NAME["prelu"]
    model, x = case.model(), zoo.draw(5, 3)
    expected = oracle.input_jacobian(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jacops.JacopsWarning)
        actual = jacops.compute_jacobian(model, x, batch_size=rows)
    same(actual, expected, 1e-12, "compute_jacobian", torch.float64)


EMPTY = ("mlp_relu", "prelu", "conv_batchnorm_eval", "self_attention", "tuple_output", "dict_output", "tuple_input")
EMPTY_CELLS = [(name, call) for name in EMPTY for call in zoo.CALLS if call not in zoo.TWICE]


@pytest.mark.parametrize(("name", "call"), EMPTY_CELLS, ids=[f"{name}-{call}" for name, call in EMPTY_CELLS])
def test_an_empty_batch_gives_an_empty_answer_of_the_right_shape(name: str, call: str) -> None:
    case = BY_NAME[name]
    model, inputs = case.model(), mapped(lambda tensor: tensor[:0], case.x())
    output = oracle.called(case.model(), inputs)
    expected = plain(call, case, model, inputs, output, None)
    extra = {
        "jvp": zoo.tangents(model),
        "model_jvp": zoo.tangents(model),
        "batch_jvp": zoo.tangents(model, ROWS),
        "vjp": zoo.cotangents(output),
        "model_vjp": zoo.cotangents(output),
        "batch_vjp": zoo.cotangents(output, ROWS),
    }
    if call in ("compute_jacobian", "modjac", "modjac_vectorize", "modjac_forward", "modjac_flatten"):
        actual = zoo.question(call, case, model, inputs)()
    elif call.startswith("model_"):
        actual = getattr(jacops, call)(model, inputs, extra[call])
    else:
        more = [extra[call]] if call in extra else []
        actual = getattr(jacops, call)(lambda: called(model, inputs), list(model.parameters()), *more)
    same(actual, expected, 0.0, call, torch.float64)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every other one of a wider tensor's."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    view = wide[..., ::2]
    return view.copy_(tensor)


@subset_cells
def test_inputs_need_not_be_contiguous(name: str, call: str) -> None:
    case = BY_NAME[name]
    inputs = strided(case.x())
    assert not inputs.is_contiguous(), "the test's own inputs are contiguous"
    actual = ask(call, case, case.model(), inputs)
    same(actual, right(name, call), case.tolerance, call, case.dtype)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@subset_cells
def test_right_inside_no_grad_and_inference_mode(name: str, call: str, context: Callable[[], Any]) -> None:
    case = BY_NAME[name]
    actual = ask(call, case, case.model(), case.x(), context)
    same(actual, right(name, call), case.tolerance, call, case.dtype)


MADE_INSIDE = [
    (name, call) for name, call in SUBSET_CELLS if call not in (*CLOSURES, "mvp", "mvp_inputs")
]  # autograd has no record of closures, nor of a gradient's way back to the caller's own tensors


@pytest.mark.parametrize(("name", "call"), MADE_INSIDE, ids=[f"{name}-{call}" for name, call in MADE_INSIDE])
def test_right_for_a_model_and_inputs_made_inside_inference_mode(name: str, call: str) -> None:
    case = BY_NAME[name]
    with torch.inference_mode():
        model, inputs = case.model(), case.x()
    actual = ask(call, case, model, inputs, torch.inference_mode)
    same(actual, right(name, call), case.tolerance, call, case.dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
@subset_cells
def test_right_in_lower_precision(name: str, call: str, dtype: torch.dtype, tolerance: float) -> None:
    case = BY_NAME[name]
    with warnings.catch_warnings(), zoo.seeded():
        warnings.simplefilter("ignore", jacops.JacopsWarning)
        actual = zoo.question(call, case, case.model(dtype), case.x(dtype))()
    same(actual, right(name, call, dtype), tolerance, call, dtype)


AUTOCAST = ("mlp_relu", "mlp_layernorm", "conv_batchnorm_eval", "conv_batchnorm_train", "self_attention")
AUTOCAST_CELLS = [(name, call) for name in AUTOCAST for call in BY_NAME[name].calls]


@pytest.mark.parametrize(("name", "call"), AUTOCAST_CELLS, ids=[f"{name}-{call}" for name, call in AUTOCAST_CELLS])
def test_close_inside_autocast(name: str, call: str) -> None:
    case = BY_NAME[name]
    model, inputs = case.model(torch.float32), case.x(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = case.output(torch.float32)  # the dtype that v must have
    asked = zoo.question(call, case, model, inputs)
    if call in ("vjp", "batch_vjp", "model_vjp"):
        asked = with_cotangents(call, model, inputs, output)
    with warnings.catch_warnings(), zoo.seeded(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("ignore", jacops.JacopsWarning)
        actual = asked()
    same(actual, right(name, call, torch.float32), 0.05, call, None)


def with_cotangents(call: str, model: nn.Module, inputs: Any, output: Any) -> Callable[[], Any]:
    """A pull-back with weights of the dtype that the output really has."""
    axes = (ROWS,) if call == "batch_vjp" else ()
    u = zoo.cotangents(output, *axes)
    if call == "model_vjp":
        return lambda: jacops.model_vjp(model, inputs, u)
    return lambda: getattr(jacops, call)(lambda: called(model, inputs), list(model.parameters()), u)


def test_a_gradient_without_curvature_still_has_a_graph_and_its_products_are_zero() -> None:
    model, x, y = nn.Linear(3, 2).double(), zoo.draw(4, 3), zoo.draw(4, 2)
    twice = jacops.TorchTwiceDifferentiable(model, lambda output, target: (output * target).sum())
    slope = twice.grad(x, y, create_graph=True)
    assert slope.requires_grad, "create_graph=True gave a gradient without a graph"
    product = twice.mvp(slope, zoo.directions(model), twice.parameters)
    same(product, torch.zeros(2, 8, dtype=torch.float64), 0.0, "mvp", torch.float64)
    same(twice.hessian(x, y), torch.zeros(8, 8, dtype=torch.float64), 0.0, "hessian", torch.float64)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("kind", ["input", "output"])
def test_complex_numbers_are_refused_by_compute_jacobian(kind: str) -> None:
    model, x = nn.Linear(3, 2).to(torch.complex128), zoo.draw(2, 3)
    asked = (model, x.to(torch.complex128)) if kind == "input" else (RealInComplexOut(model), x)
    with pytest.raises(errors.NotDifferentiableError, match="complex"):
        jacops.compute_jacobian(*asked)


class RealInComplexOut(nn.Module):
    """A complex output of a real input."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(torch.complex128))


# The oracle itself, held to central differences


SMOOTH = (
    "mlp_gelu",
    "mlp_layernorm",
    "prelu",
    "one_parameter",
    "odd_parameters",
    "tied_weights",
    "conv_batchnorm_train",
    "dropout_train",
    "self_attention",
    "multihead_attention",
    "lstm_nested_output",
    "embedding_bag",
    "embedding_sparse",
    "weight_norm_hook",
    "checkpoint_reentrant",
    "inplace_add",
    "custom_function",
    "counting",
    "dict_output",
    "dict_input",
    "frozen",
    "gpt2",
)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_oracle_agrees_with_central_differences(name: str) -> None:
    case = BY_NAME[name]
    model, inputs = case.model(), case.x()
    with zoo.seeded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a checkpoint without a gradient to come says so
        blocks = oracle.parameter_jacobian(model, inputs, case.copy, case.by_backward)
        differences = oracle.parameter_jacobian_by_differences(model, inputs, case.copy)
    same(blocks, differences, 1e-6, "parameter_jacobian", torch.float64)


@pytest.mark.parametrize("name", ["mlp_gelu", "conv_batchnorm_eval", "lstm", "self_attention", "samples_mixed"])
def test_the_input_oracle_agrees_with_central_differences(name: str) -> None:
    case = BY_NAME[name]
    model, x = case.model().eval(), case.x()
    expected = oracle.input_jacobian(model, x)
    for sample in range(len(x)):
        one, column = x[sample : sample + 1], []
        for entry in range(one.numel()):
            nudge = torch.zeros(one.numel(), dtype=x.dtype)
            nudge[entry] = 1e-5
            nudge = nudge.reshape(one.shape)
            with torch.no_grad():
                column.append((model(one + nudge) - model(one - nudge))[0] / 2e-5)
        differences = torch.stack(column, -1).reshape(expected.shape[1:])
        same(expected[sample], differences, 1e-6, f"sample {sample}", torch.float64)


SMOOTH_TWICE = (
    "mlp_gelu",
    "conv_batchnorm_train",
    "dropout_train",
    "frozen",
    "dot_product",
    "lstm",
    "embedding_sparse",
    "weight_norm_hook",
    "weight_norm",
    "custom_function",
    "gpt2",
)


@pytest.mark.parametrize("name", SMOOTH_TWICE)
def test_the_second_order_oracle_agrees_with_central_differences_of_gradients(name: str) -> None:
    case = BY_NAME[name]
    model, x, y = case.model(), case.x(), case.y()
    with zoo.seeded():
        by_parameters, by_inputs = oracle.second_derivatives(model, case.loss, x, y, case.copy)
        expected = gradient_differences(case, model, x, y, [p for p in model.parameters() if p.requires_grad])
        same(by_parameters, expected, 1e-6, "hessian", torch.float64)
        same(by_parameters, by_parameters.T, 1e-12, "symmetry", torch.float64)
        if x.is_floating_point():
            same(by_inputs, gradient_differences(case, model, x, y, [x]), 1e-6, "mixed", torch.float64)


def gradient_differences(case: Case, model: nn.Module, x: Tensor, y: Tensor, nudged: list[Tensor]) -> Tensor:
    """How the gradient moves with each entry of these tensors: (P, entries)."""
    columns = []
    for tensor in nudged:
        for place in itertools.product(*map(range, tensor.shape)):
            before = tensor.data[place].item()
            tensor.data[place] = before + 1e-5
            above = oracle.gradient(model, case.loss, x, y, case.copy)
            tensor.data[place] = before - 1e-5
            below = oracle.gradient(model, case.loss, x, y, case.copy)
            tensor.data[place] = before
            columns.append((above - below) / 2e-5)
    return torch.stack(columns, 1)


def test_the_zoo_is_large_and_its_models_come_out_the_same_each_time() -> None:
    assert len({case.name for case in ZOO}) == len(ZOO) >= 60, "too few cases, or a name twice"
    for case in ZOO:
        first, second = case.model().state_dict(), case.model().state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first), f"{case.name} differs from one to the next"
        assert torch.initial_seed() != SEED, f"{case.name}: the seed leaked"
