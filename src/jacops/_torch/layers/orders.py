"""Which sample a row of a use belongs to: found by sweeps with cotangents that tell samples apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..._ladder.failures import attempt
from ..._runtime.contexts import private_noise
from ..sweeps.linearization import Linearization
from .uses import ParameterUse, cotangents, find_uses

Order = Literal["sample first", "sample second"] | Tensor
"""How rows are laid out; a tensor `(samples, positions)` says which they are, the number of rows standing for none."""

_FAR = (
    1e-3  # a row whose two cotangents are not one times a whole number, to this relative error, is of several samples
)


Ordered = dict[int, list[tuple[ParameterUse, Order | None]]]


def sample_uses(lin: Linearization, samples: int) -> Ordered:
    """Return all uses that have a rule, by leaf, with how their rows belong to samples; None where samples mix.

    Where rows belong to none, an operation may be part of what makes a weight, and uses are looked for behind it.

    Args:
        lin: A model's outputs, first axis samples, by its parameters; with one sample, anything of that sample.
        samples: How many.
    """
    found = find_uses(lin, repeated=True)
    uses = _flat(found)
    if samples == 1:  # any order is right
        return {leaf: [(use, "sample first") for use in found[leaf]] for leaf in sorted(found)}
    trust, key = lin.trust, ("orders of rows", len(uses), tuple(lin.domain.names))
    if key in trust.known and not trust.needs(*key):
        orders, lost = trust.known[key]
        return _ordered(find_uses(lin, True, [uses[i].node for i in lost]) if lost else found, orders)
    orders = attempt(lambda: find_orders(lin, uses)) if uses else []
    lost = [i for i, order in enumerate(orders) if order is None]
    if lost:
        behind = find_uses(lin, True, [uses[i].node for i in lost])
        if any(uses[i].leaf in behind for i in lost):
            found, orders = behind, attempt(lambda: find_orders(lin, _flat(behind)))
    if all(isinstance(order, str) for order in orders):
        trust.known[key] = orders, lost
        trust.remember(*key)
    return _ordered(found, orders)


def _flat(found: dict[int, list[ParameterUse]]) -> list[ParameterUse]:
    return [use for leaf in sorted(found) for use in found[leaf]]


def _ordered(found: dict[int, list[ParameterUse]], orders: Iterable[Order | None]) -> Ordered:
    rest = iter(orders)
    return {leaf: [(use, next(rest)) for use in found[leaf]] for leaf in sorted(found)}


def find_orders(lin: Linearization, uses: Iterable[ParameterUse]) -> list[Order | None]:
    """Say for each use how its rows belong to samples, by one sweep or three; None where samples mix.

    A random cotangent on half of the samples leaves exact zeros in the rows of the others. Where rows are laid out in
    neither of the usual ways (packed sequences), one that is multiplied by each sample's number says whose they are.
    """
    uses, many, device = list(uses), lin.outputs[0].shape[0], lin.outputs[0].device
    kept = torch.randperm(many, generator=torch.Generator().manual_seed(0)).to(device) < (many + 1) // 2
    masked = [use.rows(delta) for use, delta in zip(uses, _swept(lin, uses, kept), strict=True)]
    found: list[Order | None] = [_order(rows, kept) for rows in masked]
    lost = [i for i, order in enumerate(found) if order is None]
    if lost:
        rest, numbers = [uses[i] for i in lost], torch.arange(1, many + 1, device=device)
        pairs = zip(lost, _swept(lin, rest, torch.ones_like(numbers)), _swept(lin, rest, numbers), strict=True)
        for i, once, scaled in pairs:
            places = _places(uses[i].rows(once), uses[i].rows(scaled), many)
            apart = places is not None and not bool(by_sample(masked[i], many, places)[~kept].any())
            found[i] = places if apart else None
    return found


def _swept(lin: Linearization, uses: Sequence[ParameterUse], factors: Tensor) -> tuple[Tensor, ...]:
    """Return cotangents at the uses for noise at the outputs, times a number for each sample."""
    lin.sweeps += 1
    seeds = [private_noise(o, i) * factors.to(o.dtype).view(-1, *[1] * (o.ndim - 1)) for i, o in enumerate(lin.outputs)]
    return cotangents(lin, uses, seeds)


def _order(rows: Tensor, kept: Tensor) -> Order | None:
    if rows.shape[0] % kept.shape[0]:
        return None
    for order in ("sample first", "sample second"):
        if not bool(by_sample(rows, kept.shape[0], order)[~kept].any()):
            return order
    return None


def _places(once: Tensor, scaled: Tensor, many: int) -> Tensor | None:
    """Return whose each row is, given it and it times the number of its sample; None if that is not so."""
    total = once.shape[0]
    once, scaled = once.reshape(total, -1), scaled.reshape(total, -1)
    size = once.square().sum(1)
    live = size > 0
    number = ((once * scaled).sum(1) / torch.where(live, size, 1.0)).round()
    apart = (scaled - number.unsqueeze(1) * once).square().sum(1) <= _FAR**2 * size
    if not bool((apart & (~live | ((number >= 1) & (number <= many)))).all()):
        return None
    owners = torch.where(live, number.long() - 1, many)
    ranked = owners.sort(stable=True)
    counts = torch.bincount(owners, minlength=many + 1)
    starts = counts.cumsum(0) - counts
    places = once.new_full((many + 1, max(1, int(counts[:many].max()))), total, dtype=torch.long)
    within = torch.arange(total, device=once.device) - starts[ranked.values]
    real = ranked.values < many
    places[ranked.values[real], within[real]] = ranked.indices[real]
    return places[:many]


def by_sample(rows: Tensor, many: int, order: Order) -> Tensor:
    """Return rows `(R, …)` as `(samples, positions, …)`; zero where a sample has fewer than others."""
    if isinstance(order, Tensor):
        return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[order]
    if order == "sample first":
        return rows.unflatten(0, (many, -1))
    return rows.unflatten(0, (-1, many)).transpose(0, 1)
