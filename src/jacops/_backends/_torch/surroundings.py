"""The state a forward or a sweep runs in: gradient recording on, nothing of the caller's moved."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import TorchFunctionMode

from ...errors import NotDifferentiableError
from .norms import norm_rules

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def eager(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run `function` as it is also inside code that the caller compiles: a trace cannot hold sweeps over graphs."""
    disabled: list[Callable[Arguments, Result]] = []

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if "torch._dynamo" not in sys.modules or not (torch.compiler.is_compiling() or _compiles()):
            return function(*args, **kwargs)  # nobody compiles: to say so takes long, and to import that longer
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # pyright: ignore[reportArgumentType]
        return disabled[0](*args, **kwargs)

    return call


def _compiles() -> bool:
    """Say whether this runs below code that the caller compiles."""
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
            "Call it outside, or ask for `create_graph=True` and differentiate its result with torch.autograd."
        )


class _MathAttention:
    """Attention on the math kernel while anybody records: the fused ones have no second derivative.

    Torch keeps this choice for the whole process, so it is counted over threads: the first to enter saves the
    caller's choice and the last to leave puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._restore = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with self._lock:
            if self._users == 0:
                self._restore.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore.close()


math_attention = _MathAttention()


class _RightKernels(TorchFunctionMode):
    """Write out fused kernels whose derivatives torch gets wrong.

    Weight norm has a wrong second one (its gradgradcheck fails). Norms by statistics of the input have a wrong third
    one, since their second takes these statistics for constants; they are written out where that is asked for.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:  # pyright: ignore[reportPrivateImportUsage]
            v, g, *dim = args
            return v * (g / torch.norm_except_dim(v, 2, *dim))
        if _norms_written_out.get() and func in (rules := norm_rules()):
            result = rules[func](*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if result is None else result
        return func(*args, **(kwargs or {}))


_norms_written_out: ContextVar[bool] = ContextVar("_norms_written_out", default=False)


@contextmanager
def norms_written_out() -> Iterator[None]:
    """Record norms as elementary operations inside, which have derivatives of any order."""
    token = _norms_written_out.set(True)
    try:
        yield
    finally:
        _norms_written_out.reset(token)


@contextmanager
def recording() -> Iterator[None]:
    """Record a graph whatever the caller's modes are: `no_grad`, inference mode or autocast's weight cache.

    Raises:
        NotDifferentiableError: A `torch.func` transform of the caller is at work around the call.
    """
    refuse_transforms()
    with torch.inference_mode(False), torch.enable_grad(), math_attention, _RightKernels():
        # A weight cast under no_grad inside the caller's autocast would be reused here without its graph.
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch.clear_autocast_cache()


@contextmanager
def sweeping(like: Tensor) -> Iterator[None]:
    """Run backward passes in the dtypes they were recorded in, also inside the caller's autocast."""
    kind = like.device.type
    with torch.inference_mode(False), torch.enable_grad():
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield


@contextmanager
def arithmetic(create_graph: bool) -> Iterator[None]:
    """Put results together in the gradient mode that the call asks for, whatever the caller's is."""
    with torch.inference_mode(False), torch.set_grad_enabled(create_graph):
        yield


class _RandomState:
    """The global random states put back afterwards, those of devices included.

    They belong to the whole process: with several threads inside, the first to enter saves them and the last to leave
    puts them back. A context inside another one of its own thread puts back what it found itself.
    """

    def __init__(self) -> None:
        self._lock, self._threads, self._saved = threading.Lock(), 0, _random_states()
        self._own = threading.local()

    def __enter__(self) -> None:
        stack = self._own.__dict__.setdefault("stack", [])
        found = _random_states()
        if not stack:
            with self._lock:
                if self._threads == 0:
                    self._saved = found
                self._threads += 1
        stack.append(found)

    def __exit__(self, *_: object) -> None:
        found = self._own.stack.pop()
        if self._own.stack:
            _restore(found)
            return
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                _restore(self._saved)


def _random_states() -> tuple[Tensor, list[Tensor] | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None


def _restore(states: tuple[Tensor, list[Tensor] | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state_all(states[1])


_random_state = _RandomState()


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from `seed` inside, where there is one, and put the global random states back afterwards."""
    with _random_state:
        if seed is not None:
            torch.manual_seed(seed)
        yield


def random_state_kept() -> _RandomState:
    """Return a context that puts the global random states back afterwards."""
    return _random_state


def out_of_inference(tensor: Tensor) -> Tensor:
    """Return `tensor`, cloned if it was made in inference mode and so cannot be recorded."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def autocast_on(tensors: Sequence[Tensor]) -> bool:
    """Say whether the caller's autocast is at work where these tensors live."""
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def is_memory_error(error: BaseException) -> bool:
    """Say whether an exception means that memory ran out, on a device or on the processor."""
    words = ("not enough memory", "can't allocate memory", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def private_noise(like: Tensor, seed: int = 0) -> Tensor:
    """Return normal noise shaped like `like`, never from the global generator."""
    generator = torch.Generator().manual_seed(seed)
    kind = like.dtype if like.dtype.is_complex or like.dtype.itemsize >= 4 else torch.float32
    return torch.randn(like.shape, generator=generator, dtype=kind).to(like.device, like.dtype)
