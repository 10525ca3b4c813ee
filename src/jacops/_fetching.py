"""Loaders of tensors in memory: the rows of a batch are picked together, where torch picks and stacks one by one."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, final

import torch
from torch import Tensor


def together(loader: Any) -> Any:
    """Return a loader that gives the same batches as another one, by one operation for each of their tensors.

    Rows one by one take 5 µs each: of 1,500 rows as long as the pass of a small model. Where anything but torch's own
    code may have a say in a batch, the loader is returned as it is. What that depends on is looked at in every pass.
    """
    from torch.utils.data import DataLoader, default_collate

    if type(loader) is not DataLoader or loader.num_workers or loader.collate_fn is not default_collate:
        return loader
    if loader.batch_sampler is None or not _is_plain(loader.dataset) or not _stacks():
        return loader
    read = copy(loader)
    # A DataLoader refuses assignments to these attributes.
    vars(read).update(dataset=_Picked(loader.dataset), collate_fn=_as_it_is)
    return read


@final
class _Picked:
    """Rows of a data set, as a loader asks for them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, rows: Sequence[Any]) -> Any:
        """Return the rows of a batch, collated."""
        from torch.utils.data import Subset, default_collate

        dataset, picked = self.dataset, rows
        while type(dataset) is Subset:
            picked, dataset = [dataset.indices[row] for row in picked], dataset.dataset
        if not picked or any(type(row) is not int for row in picked):  # a sampler's own kind of index
            return default_collate([self.dataset[row] for row in rows])
        where, table = torch.as_tensor(picked), vars(dataset)["tensors"]
        return [tensor[where] for tensor in table]


def _as_it_is(batch: Any) -> Any:
    return batch


def _is_plain(dataset: Any) -> bool:
    """Return whether a data set is a `TensorDataset` of ordinary tensors, or some of its rows."""
    from torch.utils.data import Subset, TensorDataset

    while type(dataset) is Subset:
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return False
    return all(type(t) is Tensor and t.layout is torch.strided and not t.is_nested for t in dataset.tensors)


def _stacks() -> bool:
    """Return whether tensors are collated as torch does it, which callers may change."""
    from torch.utils.data._utils import collate

    return collate.default_collate_fn_map.get(Tensor) is collate.collate_tensor_fn
