"""What the ranks of a process group exchange before they compute together.

A call whose ranks meet in collectives goes through stages. In each a rank works by itself; then all exchange a few
words. A rank that failed reports it there, so that every rank ends with an error instead of waiting for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PeerFailedError

_BYTES = 4096  # of one rank's words; some digests and the beginning of a message
_MESSAGE = 1500  # characters of an error's message, of at most two bytes each as JSON escapes them rarely
_PATIENCE = timedelta(seconds=30)  # for the first exchange, so that a call of one rank alone does not hang


class MeshRanks:
    """The ranks of one mesh, in one call.

    Args:
        group: The process group.
        device: Where its collectives work.
        call: The public call, for messages.
    """

    def __init__(self, group: Any, device: torch.device, call: str) -> None:
        self.group, self.device, self.call = group, device, call
        self.many, self.own = dist.get_world_size(group), dist.get_rank(group)
        self._met = False

    def stage(self) -> Stage:
        """Return a context in which this rank works by itself; it ends when all ranks have come to its end."""
        return Stage(self)

    def exchange(self, words: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the words of all ranks, in the order of the ranks.

        Raises:
            PeerFailedError: The other ranks do not answer, or one of them failed.
        """
        parts = [torch.empty(_BYTES, dtype=torch.uint8, device=self.device) for _ in range(self.many)]
        work = dist.all_gather(parts, self._written(words), group=self.group, async_op=True)
        try:
            if work is not None:
                work.wait() if self._met else work.wait(_PATIENCE)
        except RuntimeError as error:
            todo = "Every rank of the group must make the same call."
            raise PeerFailedError(f"{self.call}: the other ranks did not answer ({error}). {todo}") from error
        self._met = True
        return [json.loads(bytes(part.tolist()).rstrip(b"\0")) for part in torch.stack(parts).cpu()]

    def _written(self, words: Mapping[str, Any]) -> Tensor:
        text = json.dumps(words).encode().ljust(_BYTES, b"\0")
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)


class Stage:
    """A part of a call that each rank does by itself; leaving it reports the outcome to the other ranks.

    Attributes:
        words: What this rank reports when it is done.
        said: What all ranks said, once the stage has ended.
    """

    def __init__(self, ranks: MeshRanks) -> None:
        self._ranks, self._open = ranks, True
        self.words: dict[str, Any] = {}
        self.said: list[dict[str, Any]] = []

    def __enter__(self) -> Stage:
        """Begin it."""
        return self

    def turn(self) -> None:
        """Wait for the other ranks within the stage, before a collective; once it has ended, do nothing.

        Raises:
            PeerFailedError: Another rank failed.
        """
        if self._open:
            self._heard(self._ranks.exchange({}))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Exchange words with the other ranks.

        Raises:
            PeerFailedError: Another rank failed.
        """
        self._open = False
        if isinstance(error, PeerFailedError):  # the others know
            return
        if error is not None:
            with suppress(Exception):  # this rank's own error is what it ends with
                self._ranks.exchange({"error": f"{type(error).__name__}: {error}"[:_MESSAGE]})
            return
        self.said = self._heard(self._ranks.exchange(self.words))

    def _heard(self, said: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for rank, words in enumerate(said):
            if "error" in words:
                raise PeerFailedError(f"{self._ranks.call}: rank {rank} failed: {words['error']}", [rank])
        return said

    def differing(self, word: str) -> list[int]:
        """Return the ranks that said something else than the first one."""
        return [rank for rank, words in enumerate(self.said) if words.get(word) != self.said[0].get(word)]
