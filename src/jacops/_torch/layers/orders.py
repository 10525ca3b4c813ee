"""Which sample a row of a use belongs to: found by one sweep with a cotangent on half of the samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from ..._runtime.contexts import private_noise
from ..sweeps.linearization import Linearization
from .uses import ParameterUse, cotangents

Order = Literal["sample first", "sample second"]


def find_orders(lin: Linearization, uses: Iterable[ParameterUse]) -> list[Order | None]:
    """Say for each use how its rows belong to samples, by one sweep; None where samples mix or the order is another.

    A random cotangent on half of the samples leaves exact zeros in the rows of the others.
    """
    uses, many, device = list(uses), lin.outputs[0].shape[0], lin.outputs[0].device
    kept = torch.randperm(many, generator=torch.Generator().manual_seed(0)).to(device) < (many + 1) // 2
    seeds = [private_noise(o, i) * kept.to(o.dtype).view(-1, *[1] * (o.ndim - 1)) for i, o in enumerate(lin.outputs)]
    lin.sweeps += 1
    return [_order(delta, use, kept) for use, delta in zip(uses, cotangents(lin, uses, seeds), strict=True)]


def _order(delta: Tensor, use: ParameterUse, kept: Tensor) -> Order | None:
    rows = use.rows(delta)
    if rows.shape[0] % kept.shape[0]:
        return None
    orders: tuple[Order, ...] = ("sample first", "sample second")
    return next((o for o in orders if not bool(by_sample(rows, kept.shape[0], o)[~kept].any())), None)


def by_sample(rows: Tensor, many: int, order: Order) -> Tensor:
    """Return rows `(R, …)` as `(samples, positions, …)`."""
    if order == "sample first":
        return rows.unflatten(0, (many, -1))
    return rows.unflatten(0, (-1, many)).transpose(0, 1)
