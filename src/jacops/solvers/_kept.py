"""States of long iterations on the disk, from which a run that was killed goes on with the same bits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar, final

import torch
from torch import Tensor

from .._digests import digest_tensors
from .._saving import Savable, from_bytes, to_bytes
from ..errors import DataError, warn

State = TypeVar("State", bound=Savable)

# A killed run loses the work since the last state. Half a minute is what a process takes to start again: imports,
# digests of the data, a preconditioner. Where writing takes long, it may have a fiftieth of the time.
_SECONDS, _SHARE = 30.0, 0.02


class Kept(Protocol):
    """Where states are kept: a store, for the tile that is in work."""

    def load(self, name: str) -> bytes | None:
        """Return what was kept under a name, None where nothing was."""
        ...

    def keep(self, name: str, raw: bytes) -> None:
        """Keep bytes under a name, in place of what was there."""
        ...


@final
class StateFile(Generic[State]):
    """The last state of one iteration.

    Args:
        kept: Where it is kept.
        kind: Of the state.
        begun: What the iteration begins with: it has the state of another one only where all bytes of these agree.
        limits: The same, as words.
    """

    def __init__(self, kept: Kept, kind: type[State], begun: Mapping[str, Tensor], limits: str) -> None:
        self._kept, self._kind = kept, kind
        self._name = digest_tensors({**begun, limits: torch.zeros(0)})
        self._last, self._took = time.monotonic(), 0.0

    def state(self, device: torch.device) -> State | None:
        """Return the state that was kept of an iteration that began so."""
        raw = self._kept.load(self._name)
        if raw is None:
            return None
        try:
            found = from_bytes(raw, "a kept state", device=device)
        except DataError as error:
            warn(f"{error} The solve begins anew.")
            return None
        return found if isinstance(found, self._kind) else None

    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._last >= max(_SECONDS, self._took / _SHARE)

    def write(self, state: State) -> None:
        """Keep a state."""
        started = time.monotonic()
        self._kept.keep(self._name, to_bytes(state))
        self._last = time.monotonic()
        self._took = self._last - started
