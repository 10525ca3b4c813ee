"""What a forward does besides arithmetic: values read out of tensors, random draws, writes into weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .agreement import coarsest

_READS_OUTSIDE_DISPATCH = ("tolist", "numpy", "__array__", "__dlpack__")
_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]

_unwatched: ContextVar[bool] = ContextVar("_unwatched", default=False)
_held: ContextVar[bool] = ContextVar("_held", default=False)


@contextmanager
def unwatched() -> Iterator[None]:
    """Record nothing inside: checks of this library read values too, which are not those of the user's forward."""
    token = _unwatched.set(True)
    try:
        yield
    finally:
        _unwatched.reset(token)


@contextmanager
def held_constant() -> Iterator[None]:
    """Compute without gradients what is constant by definition, so that it is not followed."""
    token = _held.set(True)
    try:
        with torch.no_grad():
            yield
    finally:
        _held.reset(token)


def is_held() -> bool:
    """Return whether what runs now is a constant by decision."""
    return _held.get()


class WritesState(Exception):
    """A forward is about to write into a guarded tensor; nothing was written yet."""


@dataclass(frozen=True)
class SideEffects:
    """What a forward was seen to do; kept with the proofs about it.

    Attributes:
        reads: Operations that read values out of tensors.
        draws: Random operations.
        writes: It writes into its weights.
        packs: It saves tensors through hooks (checkpoints), which compute them again when they are looked at.
        coarse: The coarsest floating-point dtype that it computed in.
        plain: A recording had nothing to replace in it and loses nothing of it, so that the next one is made without a
            look at each operation; its graph shows whether that was right.
    """

    reads: tuple[str, ...] = ()
    draws: tuple[str, ...] = ()
    writes: bool = False
    packs: bool = False
    coarse: torch.dtype | None = None
    plain: bool = False


class SideEffectWatch:
    """A context in which a forward's side effects are noted down.

    Attributes:
        reads: Operations that read values out of tensors (`.item()`, `if tensor:`, `nonzero` …), so that the next
            input may take another path.
        draws: Random operations.
        packs: Tensors are saved through hooks.
        replaces: A recording put another computation in the place of a kernel.
        coarse: The coarsest floating-point dtype of a result.
    """

    def __init__(self, guarded: Iterable[Tensor] = ()) -> None:
        self.reads: dict[str, None] = {}
        self.draws: dict[str, None] = {}
        self.packs = self.replaces = False
        self.coarse: torch.dtype | None = None
        self.guarded = {storage_of(tensor) for tensor in guarded}
        self._stack = ExitStack()

    def __enter__(self) -> SideEffectWatch:
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Dispatch(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def effects(self, writes: bool, shown: bool) -> SideEffects:
        """Return what was seen, as a record.

        Args:
            writes: The forward writes into its weights.
            shown: Its graph shows all that was recorded.
        """
        plain = shown and not self.replaces
        return SideEffects(tuple(self.reads), tuple(self.draws), writes, self.packs, self.coarse, plain)

    def note_result(self, result: Any) -> None:
        """Note the dtype of a result, and whether tensors are saved as they are."""
        self.packs = self.packs or _hooks(False) is not None
        if isinstance(result, Tensor) and result.dtype.is_floating_point and result.dtype is not self.coarse:
            self.coarse = coarsest([self.coarse, result.dtype])

    def note(self, operation: Any, args: tuple[Any, ...]) -> None:
        if _unwatched.get():
            return
        tags = operation.tags
        if torch.Tag.nondeterministic_seeded in tags and not _is_idle(operation, args):
            self.draws[str(operation)] = None
        if torch.Tag.data_dependent_output in tags or (
            torch.Tag.dynamic_output_shape in tags and _reads(operation, args)
        ):
            self.reads[str(operation)] = None
        if self.guarded and operation._schema.is_mutable:
            self._check_write(operation, args)

    def _check_write(self, operation: Any, args: tuple[Any, ...]) -> None:
        for argument, value in zip(operation._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor) and storage_of(value) in self.guarded:
                raise WritesState(str(operation))


class Light(TorchDispatchMode):
    """A dispatch mode that does not load torch's compiler with its first use (70 MB, seconds)."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Dispatch(Light):
    def __init__(self, watch: SideEffectWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.note(func, args)
        result = func(*args, **(kwargs or {}))
        self.watch.note_result(result)
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, watch: SideEffectWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS_OUTSIDE_DISPATCH and not _unwatched.get():
            self.watch.reads[func.__name__] = None
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in what an operation takes or gives: tensors, and lists, tuples and dicts with some.

    For these it takes a fraction of the time of a walk by torch's registry of trees.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    found: list[Tensor] = []
    for part in value:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, list | tuple | dict):
            found += tensors_in(part)
    return found


def storage_of(tensor: Tensor) -> int:
    """Return a key of the memory of a tensor, unique while the tensor exists."""
    return tensor.untyped_storage()._cdata


def _reads(operation: Any, args: tuple[Any, ...]) -> bool:
    """Indexing with integers has a known shape; only masks read values."""
    if operation.overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put):
        return True
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _is_idle(operation: Any, args: tuple[Any, ...]) -> bool:
    """Return whether a random operation draws nothing: training is off, or its dropout probability is zero."""
    arguments = operation._schema.arguments
    named = {a.name: a.default_value for a in arguments if a.has_default_value()}
    named |= {a.name: v for a, v in zip(arguments, args, strict=False)}
    if any(named.get(name) is False for name in ("train", "training")):
        return True
    return any(name in named and named[name] == 0 for name in ("dropout_p", "dropout"))
