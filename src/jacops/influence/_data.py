"""Passes over a data set that are provably the same pass each time."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._backends._torch.surroundings import random_state_kept, refuse_transforms
from .._progress import track
from ..errors import DataError, InputTypeError, explain
from ..trees import flatten

Batch = tuple[Any, Any]


class Batches:
    """Batches `(x, y)` that can be read again and again in one order.

    Args:
        loader: A DataLoader, or any iterable of pairs that can be read more than once; a single pair is one batch.
        name: How messages call it.

    Raises:
        DataError: It can be read once only, or it shuffles.
        InputTypeError: It is not iterable.
    """

    @classmethod
    def of(cls, loader: Any, name: str) -> Batches:
        """Return `loader` as batches; one that is already stays, and goes on comparing its passes."""
        return loader if isinstance(loader, Batches) else cls(loader, name)

    def __init__(self, loader: Any, name: str) -> None:
        if isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[1], Tensor):
            loader = [loader]
        if not isinstance(loader, Iterable):
            raise InputTypeError(explain(name, f"a {type(loader).__name__}", "an iterable of batches (x, y) is needed"))
        if isinstance(loader, Iterator):
            raise DataError(
                explain(
                    name,
                    "a generator, which can be read once",
                    "several passes are needed",
                    "Pass a list, a Dataset or a DataLoader.",
                )
            )
        _refuse_random(loader, name)
        self.loader, self.name = loader, name
        self._digests: list[int] | None = None

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Yield each batch and its number of rows; the caller's random state does not move.

        Raises:
            DataError: There are no batches, or a pass differs from the first one.
        """
        refuse_transforms()
        digests: list[int] = []
        with random_state_kept():
            for number, batch in enumerate(self.loader):
                pair, rows, digest = self._read(batch, number)
                self._compare(number, digest)
                digests.append(digest)
                yield pair, rows
        if not digests:
            raise DataError(explain(self.name, "empty", "at least one batch is needed"))
        if self._digests is not None and len(digests) != len(self._digests):
            raise DataError(
                explain(self.name, f"{len(digests)} batches in this pass", f"the first pass had {len(self._digests)}")
            )
        self._digests = digests

    def tracked(self, what: str, enabled: bool | None = None) -> Iterable[tuple[Batch, int]]:
        """Yield as `iter` does, behind a progress bar."""
        return track(self, what, enabled=enabled)

    def _compare(self, number: int, digest: int) -> None:
        if self._digests is not None and (number >= len(self._digests) or self._digests[number] != digest):
            raise DataError(
                explain(
                    self.name,
                    f"different in batch {number} from the first pass",
                    "all passes must be the same",
                    "Take shuffling and random augmentation out of it.",
                )
            )

    def _read(self, batch: Any, number: int) -> tuple[Batch, int, int]:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            came = (
                f"batch {number} with keys {list(batch)}"
                if isinstance(batch, dict)
                else f"a {type(batch).__name__} as batch {number}"
            )
            raise DataError(explain(self.name, f"giving {came}", "pairs (x, y) are needed"))
        tensors = [t for t in flatten(batch, "batch")[0] if isinstance(t, Tensor)]
        lengths = {t.shape[0] if t.ndim else None for t in tensors}
        if len(lengths) != 1 or None in lengths:
            raise DataError(
                explain(
                    self.name,
                    f"giving lengths {sorted(map(str, lengths))} in batch {number}",
                    "x and y need one row per sample",
                )
            )
        digest = 0
        for tensor in tensors:
            raw = tensor.detach().cpu().contiguous()
            digest = zlib.crc32(raw.reshape(-1).view(torch.uint8).numpy().tobytes(), digest)
        x, y = batch
        return (tuple(x) if isinstance(x, list) else x, y), lengths.pop() or 0, digest


def _refuse_random(loader: Any, name: str) -> None:
    """Refuse samplers that are random by kind: with the random state put back, their passes would agree by chance."""
    from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

    samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    for sampler in samplers:
        if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
            raise DataError(
                explain(
                    name,
                    f"a loader with a {type(sampler).__name__}",
                    "rows and columns of the result need one order",
                    "Make it with shuffle=False.",
                )
            )
