"""Which sample a row of a use belongs to: found by sweeps with cotangents that differ between samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._ladder.names import Fact
from ..._runtime.contexts import private_noise
from ..sweeps.linearization import Linearization
from ..sweeps.mixing import outputs_differ
from .known_uses import KnownUses
from .rules import Order, by_sample
from .uses import ParameterUse, cotangents, find_uses

# A row whose two cotangents are not one times a whole number, to this relative error, is of several samples.
_FAR = 1e-3


def sample_uses(lin: Linearization, samples: int) -> tuple[dict[int, list[ParameterUse]], dict[str, Any]]:
    """Return all uses that have a rule and whose rows belong to samples, by leaf, and what is known to be made of them.

    Where rows belong to none, an operation may be part of what makes a weight, and uses are looked for behind it.

    Args:
        lin: A model's outputs, first axis samples, by its parameters; with one sample, anything of that sample.
        samples: How many.
    """
    proofs = lin.proofs
    key = (Fact.ORDERS_OF_ROWS, samples, lin.graph_info.key, lin.domain.names)
    known: KnownUses | None = None if proofs.needs(*key) else proofs.known.get(key)
    found = None if known is None else known.at(lin, samples)
    if known is not None and found is not None:
        return found, known.made
    found = find_uses(lin, repeated=True)
    orders: list[Order | None] = [1 for _ in _flat(found)]  # of one sample any order is right
    if samples > 1:
        uses = _flat(found)
        orders = find_orders(lin, uses, samples) if uses else []
        lost = [i for i, order in enumerate(orders) if order is None]
        if lost:
            behind = find_uses(lin, True, [uses[i].node for i in lost])
            if any(uses[i].leaf in behind for i in lost):
                found, orders = behind, find_orders(lin, _flat(behind), samples)
        found = _placed(found, orders, samples)
    # Of samples that are alike, a path from one to another may vanish (x - x.mean(0)): such orders are found again.
    if orders and all(isinstance(order, int) for order in orders) and (samples == 1 or outputs_differ(lin.outputs)):
        known = proofs.known[key] = KnownUses.of(lin, found)
        proofs.remember(*key)
        return found, known.made
    return found, {}


def _flat(found: dict[int, list[ParameterUse]]) -> list[ParameterUse]:
    return [use for own in found.values() for use in own]


def _placed(
    found: dict[int, list[ParameterUse]], orders: Iterable[Order | None], samples: int
) -> dict[int, list[ParameterUse]]:
    """Return uses with the order of their rows, apart from leaves of which some rows are of several samples."""
    rest, placed = iter(orders), dict[int, list[ParameterUse]]()
    for leaf, uses in found.items():
        pairs = [(use, next(rest)) for use in uses]
        own = [use.ordered(samples, order) for use, order in pairs if order is not None]
        if len(own) == len(uses):
            placed[leaf] = own
    return placed


def find_orders(lin: Linearization, uses: Sequence[ParameterUse], many: int) -> list[Order | None]:
    """Return for each use how its rows belong to samples, by one sweep or three; None where samples mix.

    A random cotangent on half of the samples leaves exact zeros in the rows of the others. Where rows are laid out in
    neither of the usual ways (packed sequences), one that is multiplied by each sample's number shows it.

    Raises:
        RouteFailedError: Torch cannot take a sweep.
    """
    device = lin.outputs[0].device
    kept = torch.randperm(many, generator=torch.Generator().manual_seed(0)).to(device) < (many + 1) // 2
    masked = [use.delta(delta)[0] for use, delta in zip(uses, _swept(lin, uses, kept), strict=True)]
    found: list[Order | None] = [_order(rows, kept) for rows in masked]
    lost = [i for i, order in enumerate(found) if order is None]
    if lost:
        rest, numbers = [uses[i] for i in lost], torch.arange(1, many + 1, device=device)
        pairs = zip(lost, _swept(lin, rest, torch.ones_like(numbers)), _swept(lin, rest, numbers), strict=True)
        for i, once, scaled in pairs:
            places = _places(uses[i].delta(once)[0], uses[i].delta(scaled)[0], many)
            apart = places is not None and not bool(by_sample(masked[i], many, places)[~kept].any())
            found[i] = places if apart else None
    return found


def _swept(lin: Linearization, uses: Sequence[ParameterUse], factors: Tensor) -> tuple[Tensor, ...]:
    """Return cotangents at the uses for noise at the outputs, times a number for each sample."""
    lin.sweeps += 1
    seeds = [private_noise(o, i) * factors.to(o.dtype).view(-1, *[1] * (o.ndim - 1)) for i, o in enumerate(lin.outputs)]
    return cotangents(lin, uses, seeds)


def _order(rows: Tensor, kept: Tensor) -> Order | None:
    many = kept.shape[0]
    orders = (1, -1) if rows.shape[0] % many == 0 else ()
    return next((order for order in orders if not bool(by_sample(rows, many, order)[~kept].any())), None)


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
