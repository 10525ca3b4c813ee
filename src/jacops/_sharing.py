"""A problem's data among ranks: who takes which batches, and what all must have in common."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._data import Batch, Batches
from ._digests import digest_function, digest_tensors
from ._finite import InBatch
from ._requirements import check_range
from ._runtime.ranks import Ranks, ranks_here
from ._shuffling import sharing_sampler
from ._torch.protocol import structure_of, weights_of
from .errors import DataError, InputTypeError

PLACES = "labels are drawn by the samples' places in the data set"


def ranks_of(data: Batches, distributed: bool, timeout: float) -> Ranks:
    """Return the ranks that share sums over some data.

    Raises:
        InputTypeError: `distributed` is no bool.
        InputError: `timeout` is out of range.
        DataError: A `DistributedSampler` is of another group, or repeats rows.
    """
    if not isinstance(distributed, bool):
        raise InputTypeError.of("distributed", f"a {type(distributed).__name__}", "True or False is needed")
    check_range("timeout", timeout)
    sampler = sharing_sampler(data.loader)
    ranks = ranks_here(distributed, timeout, sampler is not None)
    if sampler is None or not ranks.shared:
        return ranks
    if (sampler.num_replicas, sampler.rank) != (ranks.size, ranks.rank):
        came = f"a loader with a DistributedSampler for rank {sampler.rank} of {sampler.num_replicas}"
        raise DataError.of(data.name, came, f"this process is rank {ranks.rank} of {ranks.size}")
    if sampler.total_size > len(sampler.dataset):
        padded = sampler.total_size - len(sampler.dataset)
        came = f"a loader whose DistributedSampler repeats {padded} of {len(sampler.dataset)} rows to fill all ranks"
        todo = (
            "Make it with drop_last=True, take a number of rows that is a multiple of the number of ranks, or pass a "
            "plain DataLoader, whose batches are shared out without repeating any."
        )
        raise DataError.of(data.name, came, "every row must count once", todo)
    return ranks


def refuse_apart(data: Batches, ranks: Ranks, needed: str) -> None:
    """Refuse data of which each rank reads rows of its own.

    Raises:
        DataError: They come by a `DistributedSampler`.
    """
    if ranks.shared and sharing_sampler(data.loader) is not None:
        todo = "Pass a plain DataLoader, whose batches are shared out among the ranks."
        raise DataError.of(data.name, "a loader with a DistributedSampler", needed, todo)


class FirstPass(NamedTuple):
    """What the first pass over data finds.

    Attributes:
        denominator: What the sum of all losses is divided by.
        rows: Samples, of all ranks.
        convex: The loss is known to be convex in the output for all targets.
    """

    denominator: float
    rows: int
    convex: bool


def first_pass(problem: Any, call: str) -> FirstPass:
    """Read the data once, and verify on the first batch that counts how the loss reduces it.

    Raises:
        DataError: No row counts.
        InputError: The loss does not reduce batches as said.
        PeerFailedError: Another rank failed.
    """
    ranks: Ranks = problem.ranks

    def read() -> Tensor:
        return torch.tensor(_read(problem), dtype=torch.float64)

    found = ranks.total(call, read) if ranks.apart else ranks.run(call, read)
    total, rows, others, checked = found.tolist()
    check_counted(problem.data.name, int(rows), checked and total > 0)
    return FirstPass(total if problem.objective.reduction == "mean" else 1.0, int(rows), not others)


def check_counted(name: str, rows: int, counts: bool) -> None:
    """Refuse data of which no row counts.

    Raises:
        DataError: None does.
    """
    if not counts:
        came = "data of which no row counts" if rows else "without rows"
        todo = "All labels are ignored (-100), or all weights are 0." if rows else ""
        raise DataError.of(name, came, "at least one row is needed", todo)


def _read(problem: Any) -> list[float]:
    """Return what rows weigh, their number, whether a batch is not known to be convex, and whether one counted."""
    objective = problem.objective
    total, rows, others, first, waiting = 0.0, 0, False, None, list[Batch]()
    for number, batch in enumerate(problem.batches()):
        waiting.append(batch)
        rows += batch.rows
        if first is None and not objective.losses.ignores(batch.y):
            first = problem.at(batch)
            with InBatch(number):
                first.objective.check_reduction(problem.data.latest if problem.data.alone else first.batch)
            if problem.ranks.owns(number_of(batch)):
                problem.keep(first)
        if first is not None:
            total += sum(float(problem.shares(each).sum()) for each in waiting)
            waiting.clear()
        others = others or not objective.is_convex(batch.y)
    return [total, rows, others, first is not None]


def number_of(batch: Batch) -> int:
    """Return the number of a batch in its data; 0 for what is no batch of any."""
    return 0 if batch.place is None else batch.place[1]


def terms(problem: Any, what: str, ranks: Ranks) -> Iterator[tuple[int, Any, Any, float]]:
    """Yield a rank's batches that count: the number of rows before it, the batch, its objective and factor.

    A rank that has none gets the first one of all with a factor of 0, which gives it shapes and kinds.
    """
    first, none_yet, spare = 0, True, None
    for batch in problem.data.tracked(what, problem.progress):
        mine = ranks.owns(number_of(batch))
        if batch.rows and (mine or (none_yet and spare is None)):
            point, term, factor = problem.term(batch)
            if factor and mine:
                none_yet, spare = False, None
                yield first, point, term, factor
            elif factor:
                spare = first, point, term
        first += batch.rows
    if spare is not None:
        yield *spare, 0.0


@torch.no_grad()
def facts_of(problem: Any, call: str) -> dict[str, str]:
    """Return digests of what ranks must have in common, the data of the first pass too; none of a process alone."""
    if not problem.ranks.shared:
        return {}
    problem.first_pass(call)
    objective = problem.objective
    facts = {
        "the model": _model_digest(problem),
        "the loss": objective.fingerprint() if objective.foreign else digest_function(objective.losses.loss),
        "`parameters`": f"{zlib.crc32(str(objective.space.layout).encode()):08x}",
        "`reduction`": objective.reduction,
        "`l2`": repr(problem.l2),
        "`randomness`": f"{objective.randomness}, seed {objective.seed}",
    }
    sampler = sharing_sampler(problem.data.loader) if problem.ranks.apart else None
    if sampler is not None:
        facts["the DistributedSampler"] = f"seed {sampler.seed}, epoch {sampler.epoch}, shuffle {sampler.shuffle}"
    else:
        facts[f"`{problem.data.name}`"] = problem.data.digest
    return facts


def _model_digest(problem: Any) -> str:
    """Return a digest of a model's tensors, the same one while they stay as they are."""
    if problem.objective.foreign:
        return problem.objective.fingerprint()
    structure = structure_of(problem.objective.model)
    weights = weights_of(structure)
    if problem.digested is None or problem.digested[0] is not weights:
        problem.digested = weights, digest_tensors({**structure.parameters, **structure.buffers})
    return problem.digested[1]
