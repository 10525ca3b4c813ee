"""Every model of the zoo with every call: the value that plain autograd defines, or the error stated beforehand.

And the caller's world stays as it was, bit for bit, also when the model raises halfway. A closure is the caller's own:
it runs exactly once, and what that one run moves (running statistics, random numbers) is as if the caller had run it.
"""

import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
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
from world import Interruption, SideEffectWatch, World, prepared, watched
from zoo import BY_NAME, CLOSURES, ROWS, SECOND, SEED, ZOO, Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # warnings are checked in `told`

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


def plain_jacobian(blocks: Blocks, model: nn.Module, output: Any) -> Any:
    trained = [p.requires_grad for p in model.parameters() for _ in range(p.numel())]
    return plain_flat_modjac(blocks, model, output)[:, torch.tensor(trained)]


PLAIN = {
    "jacobian": plain_jacobian,
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
    "modjac_forward_plain": plain_modjac,
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
def test_every_cell_has_the_right_value_or_the_stated_error_and_touches_nothing(name: str, call: str) -> None:
    case = BY_NAME[name]
    model, inputs = prepared(case)
    asked = zoo.question(call, case, model, inputs)
    must, may = call in case.warns, call in case.may_warn
    listening = nullcontext() if call in case.expect else told(must, may, f"{name}-{call}")
    with listening, zoo.seeded():
        world = World(model, inputs)
        actual, error = outcome(asked)
        if call in CLOSURES and error is None:
            world.moved_as(case)
        else:
            world.untouched()
    if call in case.expect:
        refusal = case.expect[call]
        assert type(error) is getattr(errors, refusal.error), f"{refusal.error} was expected, {error!r} came"
        assert re.search(refusal.names, str(error)), f"message does not name {refusal.names!r}: {error}"
    else:
        assert error is None, f"refused: {error!r}"
        same(actual, right(name, call), case.tolerance, call, case.dtype)


def outcome(asked: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The answer, or the typed error in its place."""
    try:
        return asked(), None
    except (Interruption, errors.JacopsError) as error:
        return None, error


@cells
def test_nothing_is_touched_when_the_model_raises_halfway(name: str, call: str) -> None:
    case = BY_NAME[name]
    interrupted(call, case, None)  # what is proved at a first call is not run again
    watch = interrupted(call, case, None)
    if call in CLOSURES and call not in case.expect:
        assert watch.of_the_model == 1, f"the closure ran {watch.of_the_model} times"
    for at in sorted({1, watch.calls // 2 + 1, watch.calls}) if watch.calls else []:
        assert interrupted(call, case, at).raised, f"the call never reached its {at}th of {watch.calls} module calls"


def interrupted(call: str, case: Case, at: int | None) -> SideEffectWatch:
    """Make the call, interrupted or not, and fail if anything of the caller's moved that may not."""
    model, inputs = prepared(case, hooked=True)
    asked = zoo.question(call, case, model, inputs)
    with zoo.seeded():
        world = World(model, inputs)
        with watched(model, at) as watch:
            _, error = outcome(asked)
        if watch.raised is not None:
            assert error is watch.raised, f"the model's own exception was swallowed, or replaced by {error!r}"
        if call in CLOSURES:
            world.stands()
        else:
            world.untouched()
    return watch


@pytest.mark.parametrize("name", ["mlp_relu", "conv_batchnorm_train", "weight_norm_hook", "counting", "remembering"])
def test_the_model_answers_the_same_before_and_after(name: str) -> None:
    case = BY_NAME[name]
    for call in set(case.calls) - set(CLOSURES):
        model, inputs = prepared(case, hooked=True)
        before = case.output()
        zoo.question(call, case, model, inputs)()
        with zoo.seeded(), torch.no_grad():
            after = called(model, inputs)
        assert all(map(torch.equal, leaves(before), leaves(after))), f"{call} changed the model's answer"


@pytest.mark.parametrize("call", zoo.CALLS)
def test_a_graph_that_the_caller_recorded_is_not_freed(call: str) -> None:
    case = BY_NAME["mlp_gelu"]
    model, inputs = prepared(case)
    loss = case.loss(called(model, inputs), case.y())
    zoo.question(call, case, model, inputs)()
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    assert all(slope.isfinite().all() for slope in slopes), "the gradient of the caller's own graph is gone"


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
    with zoo.seeded():
        actual = jacops.compute_jacobian(model, inputs, batch_size=batch_size)
    same(actual, right(case.name, "compute_jacobian"), case.tolerance, "compute_jacobian", case.dtype)


EMPTY = ("mlp_relu", "prelu", "conv_batchnorm_eval", "self_attention", "tuple_output", "dict_output", "tuple_input")
EMPTY_CELLS = [(name, call) for name in EMPTY for call in zoo.CALLS if call not in zoo.TWICE]
EMPTY_CELLS += [
    (name, "compute_jacobian")
    for name in (
        *(
            "affine",
            "numbers",
            "sequence",
            "matrix_output",
            "maxpool",
            "tied_weights",
            "mlp_layernorm",
            "no_parameters",
        ),
        *("transformer_layer", "weight_norm", "spectral_norm_eval", "inplace_first", "squeezed", "nested_output"),
    )
]


@pytest.mark.parametrize(("name", "call"), EMPTY_CELLS, ids=[f"{name}-{call}" for name, call in EMPTY_CELLS])
def test_an_empty_batch_gives_an_empty_answer_of_the_right_shape(name: str, call: str) -> None:
    whole = BY_NAME[name]
    case = replace(whole, inputs=lambda: mapped(lambda tensor: tensor[:0], whole.inputs()))
    model, inputs = case.model(), case.x()
    expected = plain(call, case, model, inputs, case.output(), None)
    same(zoo.question(call, case, model, inputs)(), expected, 0.0, call, torch.float64)


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
    with zoo.seeded():
        actual = zoo.question(call, case, case.model(dtype), case.x(dtype))()
    same(actual, right(name, call, dtype), tolerance, call, dtype)


AUTOCAST = ("mlp_relu", "mlp_layernorm", "conv_batchnorm_eval", "conv_batchnorm_train", "self_attention")
AUTOCAST_CELLS = [(name, call) for name in AUTOCAST for call in BY_NAME[name].calls]


@pytest.mark.parametrize(("name", "call"), AUTOCAST_CELLS, ids=[f"{name}-{call}" for name, call in AUTOCAST_CELLS])
def test_close_inside_autocast(name: str, call: str) -> None:
    case = BY_NAME[name]
    model, inputs = case.model(torch.float32), case.x(torch.float32)
    with zoo.seeded(), torch.autocast("cpu", torch.bfloat16):
        actual = zoo.question(call, case, model, inputs)()  # its vectors are of the dtype that the output then has
    same(actual, right(name, call, torch.float32), 0.05, call, None)


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
