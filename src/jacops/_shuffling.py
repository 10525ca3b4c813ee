"""Loaders that shuffle: found by their samplers, and read in the order of their data where order has no place."""

from __future__ import annotations

from copy import copy
from typing import Any

from .errors import DataError


def kind_of_random(loader: Any) -> str | None:
    """Return the kind of random sampler that a loader draws by, None for none.

    By kind and not by comparing passes: with the random state restored, they would agree by chance.
    """
    sampler = _random(loader)
    return None if sampler is None else type(sampler).__name__


def without_shuffling(loader: Any, name: str) -> Any:
    """Return a copy of a loader that gives the rows it would shuffle in the order of its data set.

    Raises:
        DataError: Its passes do not see every row once, or its batches are not made of one row after the other.
    """
    from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler

    sampler, batches = _random(loader), getattr(loader, "batch_sampler", None)
    kind = type(sampler).__name__
    if isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(loader.dataset):
        order: Any = range(len(loader.dataset))
    elif isinstance(sampler, SubsetRandomSampler):
        order = list(sampler.indices)
    else:
        came, needed = f"a loader with a {kind} that draws", "every pass must see every row once"
        raise DataError.of(name, came, needed, "Make it with shuffle=False.")
    read = copy(loader)  # of whatever class: it may move batches to a device
    vars(read).update(sampler=order, _iterator=None)  # which a DataLoader lets nobody set
    if batches is None:
        return read
    if type(batches) is not BatchSampler:
        came = f"a loader with a {kind} in a {type(batches).__name__}"
        raise DataError.of(name, came, "batches of one row after the other are needed", "Make it with shuffle=False.")
    if batches.drop_last and len(order) % batches.batch_size:
        came = f"a loader that drops {len(order) % batches.batch_size} of {len(order)} rows, drawn anew in every pass"
        raise DataError.of(name, came, "every pass must see every row once", "Make it with drop_last=False.")
    vars(read).update(batch_sampler=BatchSampler(order, batches.batch_size, batches.drop_last))
    return read


def sharing_sampler(loader: Any) -> Any:
    """Return the `DistributedSampler` that a loader draws by, None for none."""
    from torch.utils.data.distributed import DistributedSampler

    return next((sampler for sampler in _samplers(loader) if isinstance(sampler, DistributedSampler)), None)


def _samplers(loader: Any) -> list[Any]:
    return [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]


def _random(loader: Any) -> Any:
    from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

    kinds = RandomSampler, SubsetRandomSampler, WeightedRandomSampler
    return next((sampler for sampler in _samplers(loader) if isinstance(sampler, kinds)), None)
