"""Ranks: processes of a `torch.distributed` group that share sums over data.

A sum takes three steps, the same ones on all ranks. They *meet*: each leaves the name of its call and what it has to
have in common with the others in the group's store, and waits for theirs. Each computes its own part. They *settle*:
one small reduction checks that all of them have one, of the same shapes; only then are the parts added up, by
`all_reduce`, whose result is the same on all ranks to the last bit. So a rank that fails never keeps others waiting,
and one that did not come is missed after a given time, by a store that is good for the next call all the same.
"""

from __future__ import annotations

import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PeerFailedError

T = TypeVar("T")
TIMEOUT = 30.0  # seconds for ranks that do the same to come to the same call: the slowest imports and first reads
_LONGEST_NAP = 0.02  # seconds between looks at the store: few enough requests where a thousand ranks look
_ROUNDING = 1e-3  # of its norm by which a vector may differ between ranks: a solve's in single precision, never another
_TEXT = 2000  # characters of an error that are sent to other ranks
_TODO = (
    "In a torch.distributed group, calls that take a loader or a Problem share their sums and are made on all ranks "
    "alike; pass `distributed=False` for one that is made on a single rank."
)
_PACKAGE = str(Path(__file__).parents[1])
_ALIKE = (
    "Give all ranks the same model, loss, options, vectors (random ones from the same seed) and data (or rows of their "
    "own by a DistributedSampler); `distributed=False` works on one rank alone."
)


@final
class Rendezvous:
    """The default process group: where ranks synchronise, report failures, and add up.

    Args:
        group: The process group.
        store: Its store.

    Attributes:
        busy: A rank computes its part of a sum; what it calls meanwhile is its own.
    """

    def __init__(self, group: Any, store: Any) -> None:
        from torch.distributed.distributed_c10d import PrefixStore

        self.group, self.store = group, PrefixStore("jacops", store)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.busy = False
        self._meeting = 0

    def meet(self, call: str, facts: Mapping[str, Any], timeout: float) -> list[dict[str, Any]]:
        """Wait for all ranks at a call; return what each brought.

        Whether a meeting takes place is decided once for all, by the first to see that everybody is there or that
        the time is over. Who comes to one that was given up goes to the next.

        Raises:
            PeerFailedError: Some did not come in time, or came to another call.
        """
        message = json.dumps({"call": call, **facts})
        try:
            brought, absent = self._met(message, time.monotonic() + timeout)
        except RuntimeError as error:  # of the store
            raise _lost(call, error) from error
        if not brought:
            who = f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}" if absent else "a rank"
            came = f"{who} of {self.size} did not make this call within {timeout:g} s"
            raise PeerFailedError(f"{_asked(call)}: {came}. {_TODO}", absent)
        _check_calls(call, brought)
        return brought

    def _met(self, message: str, deadline: float) -> tuple[list[dict[str, Any]], list[int]]:
        """Return what all ranks brought to the first meeting that takes place, or nothing and who did not come."""
        while True:
            number, self._meeting = self._meeting, self._meeting + 1
            keys = [f"{number}/{rank}" for rank in range(self.size)]
            self.store.set(keys[self.rank], message)
            here = False
            try:
                here = self._wait(keys, deadline)
            finally:  # also after an interrupt
                held = self.store.compare_set(f"{number}/held", "", "yes" if here else "no") == b"yes"
            if held:
                self._forget(number - 1)
                return [json.loads(self.store.get(key)) for key in keys], []
            if not here:
                return [], [rank for rank, key in enumerate(keys) if not self.store.check([key])]

    def _wait(self, keys: list[str], deadline: float) -> bool:
        """Return whether all keys are there before the time is over; short sleeps leave room for an interrupt."""
        started = time.monotonic()
        while not self.store.check(keys):
            now = time.monotonic()
            if now >= deadline:
                return False
            time.sleep(min(_LONGEST_NAP, 1e-4 + 0.1 * (now - started)))
        return True

    def _forget(self, number: int) -> None:
        """Take what this rank left at an earlier meeting out of the store: all have come to a later one."""
        if number >= 0:
            for key in (f"{number}/{self.rank}", *([f"{number}/held"] if self.rank == 0 else [])):
                self.store.delete_key(key)

    def settle(self, call: str, error: BaseException | None, parts: Sequence[Tensor], like: torch.device) -> None:
        """Report to the others whether this rank has its part of a sum, and wait for them.

        Raises:
            PeerFailedError: Another rank has none, or one of other shapes.
        """
        number = self._meeting - 1
        if error is not None:
            text = f"{type(error).__name__}: {error}"[:_TEXT]
            self.store.set(f"{number}/failed/{self.rank}", text)
        kind = zlib.crc32(repr([(tuple(part.shape), part.dtype) for part in parts]).encode()) & 0xFFFFF
        flags = torch.zeros(self.size + 2, dtype=torch.int64, device=like)
        flags[self.rank] = int(error is not None)
        flags[-2], flags[-1] = kind, kind**2
        *failed, total, squares = self.added(call, flags).tolist()
        if error is not None:
            return
        if any(failed):
            who = [rank for rank, flag in enumerate(failed) if flag]
            text = self.store.get(f"{number}/failed/{who[0]}").decode()
            raise PeerFailedError(f"{call}: rank {who[0]} of {self.size} failed: {text}", who)
        # Sums of numbers and of their squares are those of equal numbers only where all are equal.
        if (total, squares) != (self.size * kind, self.size * kind**2):
            raise PeerFailedError(
                f"{call}: the ranks' parts of a sum have different shapes: the model or the data's kind differs between"
                f" them, or their processors round a decision differently. {_TODO}"
            )

    def added(self, call: str, part: Tensor) -> Tensor:
        """Return the sum of a tensor of each rank; the tensor's memory may be used up.

        Raises:
            PeerFailedError: A rank is gone.
        """
        if not part.numel():
            return part
        wide = part.to(self._place(part.device), _exact(part.dtype)).contiguous()
        try:
            dist.all_reduce(wide, group=self.group)
        except RuntimeError as error:  # of torch's own kinds, and plain where gloo lost a connection
            raise _lost(call, error) from error
        return wide.to(part.device, part.dtype)

    def _place(self, device: torch.device) -> torch.device:
        """Return where the group reduces tensors of a device."""
        kinds = [own.type for own in self.group._device_types]
        if device.type in kinds:
            return device
        return torch.device(kinds[0], torch.cuda.current_device()) if kinds[0] == "cuda" else torch.device(kinds[0])


def _asked(call: str) -> str:
    """Return how messages call a call: by the public one that it is a part of, too."""
    found, frame = "", sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_qualname
        hidden = "<" in name or any(part.startswith("_") for part in name.split("."))
        if frame.f_code.co_filename.startswith(_PACKAGE) and not hidden:
            found = name
        frame = frame.f_back
    return call if found in call or found.startswith("Operator.") else f"{found} ({call})"


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over ranks are taken: half precision in single."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _figures(vector: Tensor) -> dict[str, Any]:
    """Return a vector's shape, and figures that another one hardly has: its norm and the sum of its entries."""
    wide = vector.detach().double()
    return {"shape": list(vector.shape), "norm": float(torch.linalg.vector_norm(wide)), "sum": float(wide.sum())}


def _near(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> bool:
    """Return whether figures are of the same vectors, up to rounding; of those that are not finite nothing is known."""
    if [a["shape"] for a in one] != [b["shape"] for b in other]:
        return False
    pairs = [(a[name] - b[name], a["norm"]) for a, b in zip(one, other, strict=True) for name in ("norm", "sum")]
    return all(abs(difference) <= _ROUNDING * norm or not math.isfinite(difference) for difference, norm in pairs)


def _check_alike(call: str, name: str, values: Sequence[Any], same: Callable[[Any, Any], bool]) -> None:
    others = [rank for rank, value in enumerate(values) if not same(values[0], value)]
    if others:
        came = f"{name} of rank 0 ({values[0]}) and of rank {others[0]} ({values[others[0]]})"
        raise PeerFailedError(f"{_asked(call)}: {came} differ, but must be the same on all ranks. {_ALIKE}", others)


def _lost(call: str, error: Exception) -> PeerFailedError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return PeerFailedError(f"{call}: the connection to another rank was lost: it ended or was killed ({text}).")


def _check_calls(call: str, brought: Sequence[Mapping[str, Any]]) -> None:
    others = {rank: one["call"] for rank, one in enumerate(brought) if one["call"] != call}
    if others:
        rank, other = next(iter(others.items()))
        raise PeerFailedError(f"{_asked(call)}: rank {rank} called {other} instead. {_TODO}", list(others))


@final
@dataclass(frozen=True)
class Ranks:
    """Who shares a sum over data: this process alone, or all ranks of a group.

    Attributes:
        rank: This process.
        size: How many there are.
        group: How they reach each other; None for one.
        timeout: Seconds to wait for others at a call.
        apart: Each rank reads rows of its own; otherwise all read the same batches, and batch b is of rank b mod size.
    """

    rank: int = 0
    size: int = 1
    group: Rendezvous | None = None
    timeout: float = TIMEOUT
    apart: bool = False

    @property
    def shared(self) -> bool:
        """Whether there is more than one."""
        return self.group is not None

    @property
    def leads(self) -> bool:
        """Whether this rank adds what counts once."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Return whether a batch is this rank's."""
        return self.apart or number % self.size == self.rank

    def agree(self, call: str, facts: Mapping[str, Any], vectors: Sequence[Tensor] = ()) -> list[dict[str, Any]]:
        """Wait for all ranks; return what each brought.

        Args:
            call: On whose behalf.
            facts: What must be the same on all ranks, by name.
            vectors: What must be the same up to rounding: each rank computes its own.

        Raises:
            PeerFailedError: Some did not come, came to another call, or came with other facts.
        """
        if self.group is None:
            return [dict(facts)]
        brought = self.group.meet(call, {**facts, "v": [_figures(vector) for vector in vectors]}, self.timeout)
        for name in facts:
            _check_alike(call, name, [one.get(name) for one in brought], lambda a, b: a == b)
        _check_alike(call, "`v`", [one["v"] for one in brought], _near)
        return brought

    def run(self, call: str, compute: Callable[[], T], facts: Mapping[str, Any] | None = None) -> T:
        """Return what this rank computes, after all ranks have computed theirs.

        Raises:
            PeerFailedError: As for `agree`, or another rank failed.
        """
        found: list[T] = []

        def parts() -> list[Tensor]:
            found.append(compute())
            return []

        self.sums(call, parts, facts)
        return found[0]

    def sums(
        self,
        call: str,
        compute: Callable[[], Sequence[Tensor]],
        facts: Mapping[str, Any] | None = None,
        vectors: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Return the sums over ranks of the tensors that each computes, the same on all to the last bit.

        Raises:
            PeerFailedError: As for `agree`, or another rank failed; this rank's own error comes as it is.
        """
        if self.group is None:
            return list(compute())
        group = self.group
        self.agree(call, facts or {}, vectors)
        group.busy = True
        try:
            parts = [part.detach() for part in compute()]
        except BaseException as error:
            with suppress(PeerFailedError):
                group.settle(call, error, [], torch.device("cpu"))
            raise
        finally:
            group.busy = False
        group.settle(call, None, parts, parts[0].device if parts else torch.device("cpu"))
        return [group.added(call, part) for part in parts]

    def total(self, call: str, compute: Callable[[], Tensor], *vectors: Tensor) -> Tensor:
        """Return the sum over ranks of the tensor that each computes, from the same vectors."""
        return self.sums(call, lambda: [compute()], vectors=vectors)[0]

    def leading(self, call: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the first rank on all."""
        return self.sums(call, lambda: [t if self.leads else torch.zeros_like(t) for t in tensors])

    def every(self, call: str, compute: Callable[[], bool]) -> bool:
        """Return whether something holds on every rank."""
        return not self.total(call, lambda: torch.tensor(0 if compute() else 1)).item()

    def least(self, call: str, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        if self.group is None:
            return number
        brought = self.group.meet(call, {"number": number}, self.timeout)
        return min(int(one["number"]) for one in brought)


ALONE = Ranks()
_groups: list[Rendezvous] = []  # of the default process group, while it is the same


def ranks_here(distributed: bool = True, timeout: float = TIMEOUT, apart: bool = False) -> Ranks:
    """Return the ranks of the default process group; one alone where there is none, or inside of another sum.

    Args:
        distributed: Look for a group.
        timeout: Seconds to wait for others at a call.
        apart: As for `Ranks`.
    """
    if not (distributed and dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return ALONE
    from torch.distributed.distributed_c10d import _get_default_group, _get_default_store

    current = _get_default_group()
    if not _groups or _groups[0].group is not current:
        _groups[:] = [Rendezvous(current, _get_default_store())]
    group = _groups[0]
    return ALONE if group.busy else Ranks(group.rank, group.size, group, timeout, apart)
