"""The caller's world, looked at bit for bit: what no call may move, and how a call is watched and interrupted."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

import zoo
from oracle import called, leaves
from zoo import Case

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
    return {
        f"attributes of {name or 'the model'}": {key: Only(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


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
    cuda = torch.backends.cuda
    hooks = {k: list(v) for k, v in vars(module_globals).items() if k.startswith("_global_") and isinstance(v, dict)}
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "anomaly mode": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "attention kernels": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "mkldnn": torch.backends.mkldnn.enabled,
        "global hooks": hooks,
    }


def unchanged(before: Facts, after: Facts) -> None:
    """Fail with the names of the facts that differ."""
    moved = [name for name in before | after if before.get(name, ...) != after.get(name, ...)]
    assert not moved, "\n".join(f"{name}: {before.get(name)!s:.300} -> {after.get(name)!s:.300}" for name in moved)


class World:
    """A model, its inputs and all around them as they were before a call."""

    def __init__(self, model: nn.Module, inputs: Any):
        self.here = model, inputs
        self.fixed, self.moving, self.held = standing(model, inputs), numbers(model, inputs), attributes(model)

    def stands(self) -> None:
        """Fail if anything moved that no run may move."""
        unchanged(self.fixed, standing(*self.here))

    def untouched(self) -> None:
        """Fail if anything moved at all."""
        self.stands()
        unchanged(self.moving | self.held, numbers(*self.here) | attributes(self.here[0]))

    def moved_as(self, case: Case) -> None:
        """Fail unless all moved as if the caller had run the model once."""
        self.stands()
        model, inputs = prepared(case)
        with zoo.seeded():
            called(model, inputs)
            after = numbers(model, inputs)
        unchanged(after, numbers(*self.here))


def prepared(case: Case, hooked: bool = False) -> tuple[nn.Module, Any]:
    """A model and inputs as a caller in the middle of training has them: gradients set, hooks in place on request."""
    model, inputs = case.model(), case.x()
    for index, parameter in enumerate(model.parameters()):
        if index % 2 == 0:
            parameter.grad = zoo.like(parameter, 300 + index)
    model.register_state_dict_pre_hook(lambda module, prefix, keep_vars: None)
    if hooked:
        model.register_forward_hook(lambda module, args, output: None)
    return model, inputs


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
