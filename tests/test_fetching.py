"""Loaders of tensors: rows that are picked together are those that torch picks one by one, whatever changes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate
from torch.utils.data._utils import collate

import jacops
from jacops._data import Batches
from jacops._fetching import together

N = 11


class Doubled(TensorDataset):
    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        return tuple(2 * part for part in super().__getitem__(index))


class Loader(DataLoader[Any]):
    pass


class Rows:
    """A batch sampler that gives indices of some kind."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __iter__(self) -> Any:
        yield [self.kind(i) for i in (3, 1, 2)]
        yield [self.kind(-1)]

    def __len__(self) -> int:
        return 2


def data() -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(N, 3, 2), torch.arange(N), torch.rand(N) > 0.5)


def swapped(batch: Any) -> Any:
    return default_collate(batch)[::-1]


LOADERS: dict[str, tuple[Any, bool]] = {  # how it is made, and whether its rows are picked together
    "even": (lambda: DataLoader(data(), 4), True),
    "last one dropped": (lambda: DataLoader(data(), 4, drop_last=True), True),
    "shuffled": (lambda: DataLoader(data(), 4, shuffle=True, generator=torch.Generator().manual_seed(3)), True),
    "some rows": (lambda: DataLoader(Subset(Subset(data(), [5, 1, 9, 0]), [3, 0, 1]), 2), True),
    "rows by a tensor": (lambda: DataLoader(Subset(data(), torch.tensor([5, 1, 9])), 2), True),  # type: ignore[arg-type]
    "one tensor": (lambda: DataLoader(TensorDataset(torch.arange(10.0).view(5, 2)), 2), True),
    "numbers": (lambda: DataLoader(data(), batch_sampler=Rows(int)), True),
    "tensors": (lambda: DataLoader(data(), batch_sampler=Rows(torch.tensor)), True),
    "no batches": (lambda: DataLoader(data(), batch_size=None), False),
    "own rows": (lambda: DataLoader(Doubled(*data().tensors), 4), False),
    "own collation": (lambda: DataLoader(data(), 4, collate_fn=swapped), False),
    "own loader": (lambda: Loader(data(), 4), False),
    "a list": (lambda: DataLoader([(torch.ones(2), 1)] * 3, 2), False),  # type: ignore[arg-type]
    "a subclass": (lambda: DataLoader(TensorDataset(torch.nn.Parameter(torch.ones(4, 2))), 2), False),
}


@pytest.mark.parametrize("name", LOADERS)
def test_batches_are_those_of_the_loader(name: str) -> None:
    make, picks = LOADERS[name]
    plain, loader = make(), make()
    torch.manual_seed(1)
    wanted, after = list(plain), torch.rand(())
    torch.manual_seed(1)
    found, moved = list(together(loader)), torch.rand(())
    assert (together(loader) is not loader) == picks
    assert moved == after  # as many draws
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert type(one) is type(other)
        for a, b in zip(one, other, strict=True):
            assert (type(a), a.dtype, a.stride()) == (type(b), b.dtype, b.stride())
            assert torch.equal(a, b)


def test_batches_are_no_views_of_the_data() -> None:
    loader = DataLoader(data(), N)
    next(iter(together(loader)))[0].zero_()
    assert bool(loader.dataset.tensors[0].any())  # type: ignore[attr-defined]


def test_each_pass_looks_at_the_loader_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(data(), 4)
    batches = Batches(loader, "data", unpack=lambda batch: tuple(batch)[:2])
    first = [batch.x for batch in batches]
    x, *rest = loader.dataset.tensors  # type: ignore[attr-defined]
    loader.dataset.tensors = (x + 1, *rest)  # type: ignore[attr-defined]
    with pytest.raises(jacops.errors.DataError, match="different in batch 0"):
        list(batches)
    loader.dataset.tensors = (x, *rest)  # type: ignore[attr-defined]
    assert all(torch.equal(a, batch.x) for a, batch in zip(first, batches, strict=True))
    with monkeypatch.context() as changed:
        changed.setattr(loader, "collate_fn", lambda batch: [2 * part for part in default_collate(batch)[:2]])
        with pytest.raises(jacops.errors.DataError, match="different in batch 0"):
            list(batches)
    with monkeypatch.context() as changed:
        own = {**collate.default_collate_fn_map, Tensor: lambda batch, collate_fn_map: torch.stack(batch) + 1}
        changed.setattr(collate, "default_collate_fn_map", own)
        assert together(loader) is loader
    list(batches)
