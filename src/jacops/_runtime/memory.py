"""Bytes: what a call may take, what it does take, and the refusal when it would take too much.

The default budget is half of what is free: of RAM, of the cgroup's room and of the address space on the processor, of
the device's memory elsewhere. Linux kills without an exception when memory runs out, so on the processor the plan has
to be right beforehand.
"""

from __future__ import annotations

import os
import re
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..errors import InputError, InputTypeError, MemoryBudgetError
from .side_effects import Light, tensors_in

Budget = int | float | str | None

SHARE = 0.5  # the other half is for other processes and what a plan cannot see: Linux kills without an exception
SMALL = 2**25  # 32 MiB: any machine has them, and reading what is free takes as long as a small call
"""Below this a call runs without asking the system what is free."""

# Measured: modules and library pages of the first derivative of a process. Those of `torch.autograd.grad` are 33 MiB
# of it, which a call may need or not, also after a first sweep without them.
_STARTUP = 46 * 2**20
# Measured over MLPs, convolutions, attention, encoders and decoders.
_KERNELS, _HOLES, _MOST_HOLES = 12 * 2**20, 0.65, 96 * 2**20
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def budget_bytes(budget: Budget, device: torch.device) -> int:
    """Return a budget in bytes: a number, a text such as `"2GiB"` or `"500MB"`, None for a safe share of free memory.

    Raises:
        InputTypeError: It is neither number nor text.
        InputError: The text is not a size, or the number is not positive.
    """
    if budget is None:
        return int(SHARE * free_bytes(device))
    todo = 'Pass bytes, or a size such as "2GiB" or "500MB".'
    if isinstance(budget, bool) or not isinstance(budget, int | float | str):
        raise InputTypeError.of("budget", f"a {type(budget).__name__}", "bytes or a text are needed", todo)
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", budget.lower())
        if found is None:
            raise InputError.of("budget", repr(budget), "a size is needed", todo)
        budget = float(found[1]) * _UNITS[found[2] or ""]
    if not 1 <= budget < float("inf"):
        raise InputError.of("budget", repr(budget), "at least one byte is needed", todo)
    return int(budget)


def free_bytes(device: torch.device) -> int:
    """Return how many bytes are free where tensors on `device` live."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    rooms = [room // _processes() for room in (*_free_ram(), *_cgroup_room())] + [*_address_room()]
    return max(0, min(rooms)) if rooms else 2**33  # a system that reports nothing: as if 8 GiB were free


def _processes() -> int:
    """Return how many ranks `torchrun` started on this machine: they share its free memory."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(said)) if said.isdecimal() else 1


def _free_ram() -> Iterator[int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return


def _cgroup_room() -> Iterator[int]:
    root = Path("/sys/fs/cgroup")
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            yield int((root / most).read_text(encoding="ascii")) - int((root / used).read_text(encoding="ascii"))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue


def _address_room() -> Iterator[int]:
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            yield most - pages * resource.getpagesize()
    except (ImportError, OSError):
        return


def startup_bytes(device: torch.device) -> int:
    """Return the bytes that the first derivative of a process takes permanently, for modules and libraries of torch."""
    loaded = "torch.fx.experimental.symbolic_shapes" in sys.modules
    # Those pages are of the processor's memory; of a device's memory nothing is taken.
    return 0 if loaded or device.type != "cpu" else _STARTUP


def resident(held: float) -> int:
    """Return what tensors of so many bytes, made and freed in turn, take from the system.

    The processor's allocator leaves holes between small tensors and keeps them; measured over MLPs, convolutions,
    attention, encoders and decoders. Kernels take something for themselves.
    """
    return int(_KERNELS + held + min(_HOLES * held, _MOST_HOLES))


def live(room: float) -> float:
    """Return how many bytes of tensors fit into so many bytes of the system's: what `resident` turns round."""
    room -= _KERNELS
    return max(room / (1 + _HOLES), room - _MOST_HOLES)


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's entries."""
    return tensor.numel() * tensor.dtype.itemsize


def in_words(count: float) -> str:
    """Return bytes in a fitting unit, to three digits.

    Example:
        >>> [in_words(size) for size in (0, 1536, 12 * 2**20, 1000 * 2**40)]
        ['0 B', '1.5 KiB', '12 MiB', '1,000 TiB']
    """
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            break
        count, unit = count / 1024, larger
    return f"{count:,.0f} {unit}" if count >= 100 else f"{float(f'{count:.3g}'):g} {unit}"


def refuse(call: str, tensors: Mapping[str, float], budget: int, todo: str) -> NoReturn:
    """Refuse what does not fit.

    Args:
        call: The public call.
        tensors: Bytes of what would be held at once, by name.
        budget: Bytes allowed.
        todo: The arguments to change.

    Raises:
        MemoryBudgetError: Always; it names the largest tensor.
    """
    largest = max(tensors, key=lambda name: tensors[name])
    raise MemoryBudgetError(
        f"{call}: {in_words(sum(tensors.values()))} would be held at once, the largest part {largest} with "
        f"{in_words(tensors[largest])}, but the budget is {in_words(budget)}; nothing was allocated. {todo}"
    )


def ensure_fits(call: str, tensors: Mapping[str, float], budget: Budget, device: torch.device, todo: str) -> None:
    """Refuse tensors that do not fit the budget; free memory is read only where they are large.

    Raises:
        MemoryBudgetError: They do not; nothing was allocated.
    """
    need = sum(tensors.values())
    if budget is None and need < SMALL:
        return
    allowed = budget_bytes(budget, device)
    if need > allowed:
        refuse(call, tensors, allowed, todo)


def given_tensors(out: Any) -> list[Tensor] | None:
    """Return the caller's own places for a result as tensors, None if there are none; arrays are wrapped, not copied.

    Raises:
        InputTypeError: One is neither tensor nor array, or requires grad.
    """
    if out is None:
        return None
    places = []
    for place in pytree.tree_leaves(out):
        if isinstance(place, np.ndarray):
            place = torch.from_numpy(place)
        if not isinstance(place, Tensor) or place.requires_grad:
            came = "a tensor that requires grad" if isinstance(place, Tensor) else f"a {type(place).__name__}"
            raise InputTypeError.of("out", came, "a plain tensor or a NumPy array (a memmap too) is needed")
        places.append(place)
    return places


def check_places(places: Sequence[Tensor], shapes: Sequence[Any], like: Sequence[Tensor]) -> None:
    """Check the caller's places for what will be written there.

    Raises:
        InputError: Count, shape, dtype or device differ, or a place is not laid out in order.
    """
    if len(places) != len(shapes):
        raise InputError.of("out", f"{len(places)} tensors", f"the result has {len(shapes)}, in this order")
    for place, shape, other in zip(places, shapes, like, strict=True):
        needed = f"shape {tuple(shape)}, {other.dtype} on {other.device} is needed"
        if tuple(place.shape) != tuple(shape) or place.dtype != other.dtype or place.device != other.device:
            raise InputError.of("out", f"of shape {tuple(place.shape)}, {place.dtype} on {place.device}", f"{needed}")
        if not place.is_contiguous():
            raise InputError.of("out", f"with strides {place.stride()}", f"{needed}, contiguous")


class Meter(Light):
    """Counts the bytes of tensors made inside that are alive at once.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[Any] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tensors_in((args, kwargs)):
            if value.layout is torch.strided:
                self._seen.setdefault(value.untyped_storage()._cdata, None)  # the caller's own
        result = func(*args, **kwargs)
        for value in tensors_in(result):
            if value.layout is torch.strided:
                self._count(value.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: Any) -> None:
        key, many = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self.live += many
            self._seen[key] = weakref.ref(storage, partial(self._freed, key, many))

    def _freed(self, key: int, many: int, _: Any) -> None:
        self.live -= many
        self._seen.pop(key, None)
