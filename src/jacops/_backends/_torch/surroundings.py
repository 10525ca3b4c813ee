"""The state a forward or a sweep runs in: gradient recording on, nothing of the caller's moved."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from ...errors import NotDifferentiableError


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


@contextmanager
def recording() -> Iterator[None]:
    """Record a graph whatever the caller's modes are: `no_grad`, inference mode or autocast's weight cache.

    Raises:
        NotDifferentiableError: A `torch.func` transform of the caller is at work around the call.
    """
    if functorch.peek_interpreter_stack() is not None:
        raise NotDifferentiableError(
            "jacops was called inside a torch.func transform (vmap, grad, jvp …), whose tensors it cannot record. "
            "Call it outside, or ask for `create_graph=True` and differentiate its result with torch.autograd."
        )
    with torch.inference_mode(False), torch.enable_grad(), math_attention:
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
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random states back afterwards, those of devices included."""
    before = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


def out_of_inference(tensor: Tensor) -> Tensor:
    """Return `tensor`, cloned if it was made in inference mode and so cannot be recorded."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def is_memory_error(error: BaseException) -> bool:
    """Say whether an exception means that memory ran out, on a device or on the processor."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)


def private_noise(like: Tensor, seed: int = 0) -> Tensor:
    """Return normal noise shaped like `like`, never from the global generator."""
    generator = torch.Generator().manual_seed(seed)
    kind = like.dtype if like.dtype.is_complex or like.dtype.itemsize >= 4 else torch.float32
    return torch.randn(like.shape, generator=generator, dtype=kind).to(like.device, like.dtype)
