"""The state a forward or a sweep runs in: gradient recording on, nothing of the caller's moved."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import NotDifferentiableError
from .attention import ATTENTION, MATH
from .kernels import RightKernels, writes_norms_out
from .restoring import (
    Guard,
    Guards,
    ProcessState,
    Setting,
    function_modes,
    leave_function_modes,
    restoring,
)
from .side_effects import SideEffectWatch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Matters = Callable[[Tensor], bool]


def eager(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a public call: it runs as it is inside code that the caller compiles, and restores state when it ends.

    A trace cannot hold sweeps over graphs.
    """
    function = restoring(function)
    disabled: Callable[Arguments, Result] | None = None

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules or not (torch.compiler.is_compiling() or _compiles()):
            return function(*args, **kwargs)  # nobody compiles: to say so takes long, and to import that longer
        if disabled is None:  # no list: releases of torch before 2.13 do not trace `append`
            disabled = torch.compiler.disable(function)  # pyright: ignore[reportArgumentType, reportAssignmentType]
        return disabled(*args, **kwargs)  # pyright: ignore[reportOptionalCall]

    return call


def _compiles() -> bool:
    """Return whether this runs below code that the caller compiles."""
    from torch._C._dynamo import eval_frame  # pyright: ignore[reportMissingModuleSource, reportAttributeAccessIssue]

    return eval_frame.get_eval_frame_callback() is not None


def refuse_transforms() -> None:
    """Refuse to run inside a `torch.func` transform of the caller's.

    Raises:
        NotDifferentiableError: One is at work.
    """
    if functorch.peek_interpreter_stack() is not None:
        raise NotDifferentiableError(
            "jacops was called inside a torch.func transform (vmap, grad, jvp …), whose tensors it cannot record. "
            "Call it outside, or pass `create_graph=True` and differentiate its result with torch.autograd."
        )


# What `torch.set_grad_enabled` calls once it has made a context manager, which takes ten times as long.
set_gradients: Callable[[bool], Any] = torch._C._set_grad_enabled  # pyright: ignore[reportAttributeAccessIssue]


class _Gradients(Guard):
    """Gradient recording on or off inside, and inference mode off or on."""

    def __init__(self, enabled: bool, inference: bool = False) -> None:
        self._enabled, self._wanted, self._inference = enabled, inference, None

    def save(self) -> None:
        self._found = torch.is_grad_enabled()
        if torch.is_inference_mode_enabled() is not self._wanted:
            # The guard behind `torch.inference_mode`, which may be left twice.
            self._inference = torch._C._InferenceMode(self._wanted)  # pyright: ignore[reportAttributeAccessIssue]

    def change(self) -> None:
        if self._inference is not None:
            self._inference.__enter__()
        set_gradients(self._enabled)

    def restore(self) -> None:
        if self._inference is not None:
            self._inference.__exit__(None, None, None)
        set_gradients(self._found)


def _no_autocast(kind: str) -> Guard:
    """Return a context without autocast, for one kind of device."""

    def enable(enabled: bool) -> None:
        if enabled is not is_enabled():
            torch.set_autocast_enabled(kind, enabled)

    def is_enabled() -> bool:
        return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)

    return Setting(is_enabled, enable, False)


class GraphRecording(_Gradients):
    """A context in which a graph is recorded: one guard, since a small model's forward takes no longer than several.

    Args:
        mode: Puts the right kernels in place; None where the forward is known to use none of those it replaces.
        matters: Which tensors' gradients matter.
        call: The public call, for messages.
        attention: Attention runs on the math kernel.
        random: Keeps the random states; None where they are to advance.
    """

    def __init__(
        self, mode: RightKernels | None, matters: Matters, call: str, attention: bool, random: _RandomState | None
    ) -> None:
        super().__init__(True)
        self._mode, self._matters, self._call, self._attention, self._random = mode, matters, call, attention, random

    def save(self) -> None:
        super().save()
        self._modes = function_modes()
        if self._random is not None:
            self._random.save()

    def change(self) -> None:
        super().change()
        if self._random is not None:
            self._random.change()
        if self._attention:
            ATTENTION.enter(self, MATH)
        if self._mode is not None:
            self._mode.__enter__()
        # A weight cast under no_grad in the caller's autocast would be reused inside without its graph, and vice versa.
        torch.clear_autocast_cache()

    def restore(self) -> None:
        leave_function_modes(self._modes)
        torch.clear_autocast_cache()
        if self._random is not None:
            self._random.restore()
        if self._attention:
            ATTENTION.leave(self)
        super().restore()

    def __exit__(self, kind: object = None, *rest: object) -> None:
        super().__exit__(kind, *rest)
        lost = () if kind is not None or self._mode is None else self._mode.lost.values()
        if any(map(self._matters, lost)):
            raise NotDifferentiableError(
                f"{self._call + ': a' if self._call else 'A'} reentrant activation checkpoint takes no argument that "
                "requires grad, so torch records nothing of what it computes and the derivative by the parameters used "
                "inside would be zero. Use checkpoint(…, use_reentrant=False)."
            )


def recording(
    matters: Matters = lambda tensor: True,
    call: str = "",
    pulled: bool = False,
    watch: SideEffectWatch | None = None,
    plain: bool = False,
    advance: bool = False,
) -> GraphRecording:
    """Record a graph whatever the caller's modes are: `no_grad`, inference mode or autocast's weight cache.

    The global random states are what they were afterwards.

    Args:
        matters: Which tensors' gradients matter; those of all that require grad by default.
        call: The public call, for messages.
        pulled: Only pulls are taken of the graph, never their derivatives: attention keeps the caller's kernels.
        watch: Where it is noted that a kernel is replaced.
        plain: No kernel is replaced: the graph will be compared with one of a recording that had none to replace.
        advance: The random states advance, as in a call of the caller's own.

    Raises:
        NotDifferentiableError: A `torch.func` transform of the caller is active around the call; or, on leaving, a
            reentrant checkpoint lost the gradient of a tensor that matters.
    """
    refuse_transforms()
    plain = plain and not writes_norms_out()
    mode, random = None if plain else RightKernels(watch), None if advance else _RandomState()
    return GraphRecording(mode, matters, call, not (plain or pulled), random)


def sweeping(like: Tensor) -> Guards:
    """Run backward passes in the dtypes they were recorded in, also inside the caller's autocast."""
    if is_sweeping(like):
        return _UNCHANGED  # to save the state and set it again takes as long as a small pass
    return Guards(_Gradients(True), _no_autocast(like.device.type))


_UNCHANGED = Guards()


def is_sweeping(like: Tensor) -> bool:
    """Return whether the state is right for backward passes as it is."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not autocast_on([like])


def in_own_dtype(like: Tensor) -> Guards:
    """Multiply matrices in their own dtype, also inside the caller's autocast: factorisations take no other one."""
    return Guards(_no_autocast(like.device.type)) if autocast_on([like]) else _UNCHANGED


def arithmetic(create_graph: bool, inference: bool = False) -> Guard:
    """Assemble results in the gradient mode that the call needs, whatever the caller's is."""
    if create_graph and not inference and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _UNCHANGED
    return _Gradients(create_graph, inference)


def keeping(create_graph: bool) -> AbstractContextManager[object]:
    """Record what is put together inside where results keep their graph; the caller's gradient mode stays otherwise."""
    return arithmetic(True) if create_graph else nullcontext()


def random_states() -> list[Any]:
    """Return the global random states, those of devices included."""
    return [
        torch.default_generator.get_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
    ]


def set_random_states(states: Sequence[Any]) -> None:
    """Set the global random states."""
    torch.default_generator.set_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state_all(states[1])


_RANDOM = ProcessState(random_states, set_random_states)


class _RandomState(Guard):
    """The global random states restored afterwards, those of devices included.

    They belong to the whole process. A guard inside another one of its own thread restores what it found itself.

    Args:
        seed: What to draw from inside, where there is one.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed

    def save(self) -> None:
        self._nested = _RANDOM.is_entered()
        self._found = random_states() if self._nested else None

    def change(self) -> None:
        if not self._nested:
            _RANDOM.enter(self)
        if self._seed is not None:
            torch.manual_seed(self._seed)

    def restore(self) -> None:
        if self._found is not None:
            set_random_states(self._found)
        else:
            _RANDOM.leave(self)


def seeded(seed: int | None) -> Guard:
    """Draw from `seed` inside, where there is one, and restore the global random states afterwards."""
    return _RandomState(seed)


def random_state_kept() -> Guard:
    """Return a context that restores the global random states afterwards."""
    return _RandomState()


def out_of_inference(tensor: Tensor) -> Tensor:
    """Return `tensor`, cloned if it was made in inference mode and so cannot be recorded."""
    return _recordable(tensor) if tensor.is_inference() else tensor


@restoring
def _recordable(tensor: Tensor) -> Tensor:
    with arithmetic(False):
        return tensor.clone()


def autocast_on(tensors: Sequence[Tensor]) -> bool:
    """Return whether the caller's autocast is at work where these tensors live."""
    if not tensors or tensors[0].is_cpu:
        return torch.is_autocast_enabled("cpu")
    kind = tensors[0].device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def is_memory_error(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out, on a device or on the processor."""
    words = ("not enough memory", "can't allocate memory", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def must_surface(error: BaseException) -> bool:
    """Return whether no route may take an exception for its own failure: memory ran out, or the caller's mode raised.

    A caller's mode (`TorchDispatchMode`, `TorchFunctionMode`) receives all operations of a call and may refuse one.
    """
    if is_memory_error(error):
        return True
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        home = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if frame.f_code.co_name in ("__torch_dispatch__", "__torch_function__") and home not in ("torch", "jacops"):
            first = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_varnames else None
            if isinstance(first, TorchFunctionMode | TorchDispatchMode):  # a tensor's own class is no mode
                return True
        trace = trace.tb_next
    return False


def private_noise(like: Tensor, seed: int = 0) -> Tensor:
    """Return normal noise shaped like `like`, never from the global generator."""
    generator = private_generator(like.device, seed)
    kind = torch.complex64 if like.dtype.is_complex else torch.float32  # drawn in a fifth of the time of doubles
    drawn = torch.randn(like.shape, generator=generator, dtype=kind, device=generator.device)
    return drawn.to(like.device, like.dtype)


def private_generator(device: torch.device, seed: int) -> torch.Generator:
    """Return a seeded generator that draws on a device, where it has one.

    A model's worth of noise takes longer to draw on a processor and to copy than a pass on a device does. What is drawn
    differs between kinds of devices.
    """
    has_one = device.type == "cpu" or torch.accelerator.is_available() and _accelerates(device)
    return torch.Generator(device if has_one else "cpu").manual_seed(seed)


def _accelerates(device: torch.device) -> bool:
    found = torch.accelerator.current_accelerator()
    return found is not None and found.type == device.type
