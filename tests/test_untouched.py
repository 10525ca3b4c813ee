"""The caller's world stays as it was, bit for bit, after every call on every model of the zoo.

Also when the model raises halfway. A closure is the caller's own: it runs exactly once, and what that one run moves
(running statistics, random numbers, an input written to) is as if the caller had run it.
"""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

import jacops
import zoo
from oracle import called, leaves
from zoo import BY_NAME, CLOSURES, ZOO, Case

CELLS = [(case.name, call) for case in ZOO for call in case.calls]
cells = pytest.mark.parametrize(("name", "call"), CELLS, ids=[f"{name}-{call}" for name, call in CELLS])

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what is said is for other tests

Facts = dict[str, Any]  # compared by ==, or by identity where an `Only` wraps the object


class Only:
    """Equal to the very same object alone."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Only) and self.thing is other.thing

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self.thing).__name__} at {id(self.thing):#x}"


# What is looked at


def bits(tensor: Tensor | None) -> bytes | None:
    """All that a tensor holds, to the last bit."""
    return None if tensor is None else tensor.detach().flatten().view(torch.uint8).numpy().tobytes()


def numbers(model: nn.Module, inputs: Any) -> Facts:
    """What one run of the model may move, bit for bit: state, inputs, and the global generators."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        **{f"values of {name}": bits(tensor) for name, tensor in held.items()},
        **{f"values of input {index}": bits(tensor) for index, tensor in enumerate(leaves(inputs))},
        "random state of torch": bits(torch.get_rng_state()),
        "random state of Python": random.getstate(),
        "random state of numpy": tuple(np.array(part).tobytes() for part in np.random.get_state()),
    }


def attributes(model: nn.Module) -> Facts:
    """The very objects that each submodule holds, the caller's own attributes among them."""
    facts = {}
    for name, module in model.named_modules():
        where = f"{name or 'the model'}"
        facts[f"attributes of {where}"] = {key: Only(value) for key, value in vars(module).items()}
    return facts


def standing(model: nn.Module, inputs: Any) -> Facts:
    """What no run may move: modes, hooks, identities, gradients, marks on tensors, and torch's global switches."""
    facts = dict(switches())
    for name, module in model.named_modules():
        where = f"{name or 'the model'}"
        facts[f"mode of {where}"] = module.training
        for key, value in vars(module).items():
            if isinstance(value, dict):  # parameters, buffers, submodules, and hooks of every kind
                facts[f"{key} of {where}"] = {entry: Only(held) for entry, held in value.items()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"input {index}": tensor for index, tensor in enumerate(leaves(inputs))}
    for name, tensor in tensors.items():
        facts[f"requires_grad of {name}"] = tensor.requires_grad
        facts[f"place of {name}"] = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        facts[f"hooks on {name}"] = dict(tensor._backward_hooks or {})
        if tensor.is_leaf:
            facts[f"gradient of {name}"] = (Only(tensor.grad), bits(tensor.grad))
    return facts


def switches() -> Facts:
    """Torch's global switches."""
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "anomaly mode": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "attention kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "mkldnn": torch.backends.mkldnn.enabled,
        "global hooks": {
            key: list(value)
            for key, value in vars(module_globals).items()
            if key.startswith("_global_") and isinstance(value, dict)
        },
    }


def unchanged(before: Facts, after: Facts) -> None:
    """Fail with the names of the facts that differ."""
    moved = [name for name in before | after if before.get(name, ...) != after.get(name, ...)]
    assert not moved, "\n".join(f"{name}: {before.get(name)!s:.300} -> {after.get(name)!s:.300}" for name in moved)


# How a call is watched


class Interruption(Exception):  # noqa: N818 - not an error of anybody's
    """Raised inside the model."""


class SideEffectWatch:
    """Counts the calls of modules, and raises at one of them.

    Attributes:
        calls: Calls of any module so far.
        of_the_model: Calls of the caller's own model so far.
        raised: The exception, once raised.
    """

    def __init__(self, model: nn.Module, at: int | None):
        self.model, self.at = model, at
        self.calls = self.of_the_model = 0
        self.raised: Interruption | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.calls += 1
        self.of_the_model += module is self.model
        if self.calls == self.at:
            self.raised = Interruption(f"in call {self.at}, of a {type(module).__name__}")
            raise self.raised


@contextmanager
def watched(model: nn.Module, at: int | None = None) -> Iterator[SideEffectWatch]:
    """See every call of a module, those of copies of the model too."""
    watch = SideEffectWatch(model, at)
    handle = module_globals.register_module_forward_pre_hook(watch)
    try:
        yield watch
    finally:
        handle.remove()


def prepared(case: Case) -> tuple[nn.Module, Any]:
    """A model and inputs as a caller in the middle of training has them: some gradients set, a hook in place."""
    model, inputs = case.model(), case.x()
    for index, parameter in enumerate(model.parameters()):
        if index % 2 == 0:
            parameter.grad = zoo.like(parameter, 300 + index)
    model.register_forward_hook(lambda module, args, output: None)
    model.register_state_dict_pre_hook(lambda module, prefix, keep_vars: None)
    return model, inputs


def after_one_run(case: Case) -> Facts:
    """What a caller finds who runs the model once."""
    model, inputs = prepared(case)
    with zoo.seeded():
        called(model, inputs)
        return numbers(model, inputs)


def attempt(call: str, case: Case, at: int | None = None) -> SideEffectWatch:
    """Make the call, interrupted or not, and fail if anything of the caller's moved that may not."""
    model, inputs = prepared(case)
    asked = zoo.question(call, case, model, inputs)
    own = call in CLOSURES
    with zoo.seeded():
        fixed, moving, held = standing(model, inputs), numbers(model, inputs), attributes(model)
        with watched(model, at) as watch:
            outcome = error_of(asked)
        if watch.raised is not None:
            assert outcome is watch.raised, f"the model's own exception was swallowed, or replaced by {outcome!r}"
        unchanged(fixed, standing(model, inputs))
        if not own:
            unchanged(moving | held, numbers(model, inputs) | attributes(model))
        elif watch.raised is None:
            unchanged(after_one_run(case) if watch.of_the_model else moving, numbers(model, inputs))
    return watch


def error_of(asked: Any) -> Exception | None:
    """What the call raises, or None; whether it should is for other tests."""
    try:
        asked()
    except (Interruption, jacops.JacopsError) as error:
        return error
    return None


# The laws


@cells
def test_nothing_of_the_callers_is_touched(name: str, call: str) -> None:
    case = BY_NAME[name]
    watch = attempt(call, case)
    if call in CLOSURES and call not in case.expect:
        assert watch.of_the_model == 1, f"the closure ran {watch.of_the_model} times"


@cells
def test_nothing_of_the_callers_is_touched_when_the_model_raises_halfway(name: str, call: str) -> None:
    case = BY_NAME[name]
    total = attempt(call, case).calls
    for at in sorted({1, total // 2 + 1, total} - {0}) if total else []:
        watch = attempt(call, case, at)
        assert watch.raised is not None, f"the call never reached its {at}th of {total} module calls again"


@pytest.mark.parametrize("name", ["mlp_relu", "conv_batchnorm_train", "weight_norm_hook", "counting", "remembering"])
def test_the_model_answers_the_same_before_and_after(name: str) -> None:
    case = BY_NAME[name]
    for call in set(case.calls) - set(CLOSURES):
        model, inputs = prepared(case)
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jacops.JacopsWarning)
        zoo.question(call, case, model, inputs)()
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    assert all(slope.isfinite().all() for slope in slopes), "the gradient of the caller's own graph is gone"
