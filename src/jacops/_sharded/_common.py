"""What the ranks of one product exchange, and what they must have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._digests import DataDigest
from .._finite import require_finite
from .._runtime.together import MeshRanks, Stage
from .._torch.protocol import Shard
from .._trees import flatten
from ..errors import InputError

Grads = Sequence[Tensor | None]


def ranks_of(shards: Mapping[str, Shard], call: str) -> MeshRanks:
    first = next(iter(shards.values()))
    return MeshRanks(first.mesh.get_group(0), first.local.device, call)


def words_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rank's description of its data: a digest, and whether there are any."""
    digest = DataDigest()
    digest.update(dict(data))
    tensors = [value for value in flatten(dict(data), "data")[0] if isinstance(value, Tensor)]
    return {"data": digest.hexdigest(), "filled": all(tensor.numel() for tensor in tensors)}


def are_summed(stage: Stage, call: str) -> bool:
    """Return whether every rank has data of its own.

    Raises:
        InputError: Some ranks have the same, and others do not.
    """
    filled = [words["data"] for words in stage.said if words["filled"]]
    if len(set(filled)) <= 1:
        return len(filled) < len(stage.said)
    twins = [rank for rank, words in enumerate(stage.said) if words["filled"] and filled.count(words["data"]) > 1]
    if twins:
        came = f"the same on ranks {twins} and another one elsewhere, with its target or cotangent"
        raise InputError.of("x", came, f"{call} needs the same data on all ranks, or rows of its own on each")
    return True


def check_common(stage: Stage, call: str, *names: str) -> None:
    """Refuse what differs among ranks and must not.

    Raises:
        InputError: Something does; the message names it and the ranks.
    """
    for name in names:
        if ranks := stage.differing(name):
            came = f"not the same on all ranks ({call}: ranks {ranks} differ from rank 0)"
            raise InputError.of(name, came, "what is not sharded must be the same everywhere")


def sketch(leaves: Sequence[Tensor]) -> list[float]:
    """Return a few sums over outputs: of sizes, of all entries, of every other, of every third."""
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in (leaf.detach().resolve_conj() for leaf in leaves)]
    flat = [part.reshape(-1) for part in parts]
    sums = [[f.abs().sum(), *(f[::step].sum() for step in (1, 2, 3))] for f in flat]
    return torch.stack([torch.stack(s).double() for s in sums]).sum(0).tolist()


def agree(stage: Stage, leaves: Sequence[Tensor]) -> bool:
    """Return whether the outputs of all ranks are the same up to rounding, as far as their sketches show."""
    tolerance = max(torch.finfo(leaf.dtype).eps for leaf in leaves) ** 0.5
    first = stage.said[0]["output"]
    gaps = [abs(a - b) for words in stage.said for a, b in zip(words["output"], first, strict=True)]
    return max(gaps) <= tolerance * abs(first[0])


def results_of(ranks: MeshRanks, shards: Mapping[str, Shard], grads: Grads) -> list[Tensor]:
    found: list[Tensor] = []
    with ranks.stage():
        for (name, shard), grad in zip(shards.items(), grads, strict=True):
            part = torch.zeros_like(shard.local) if grad is None else grad
            part = part.detach()
            require_finite(part, f"{ranks.call}: in this rank's part of the derivative for {name}")
            found.append(shard.like_parameter(part))
    return found


def refuse_options_of(call: str, **options: object) -> None:
    """Refuse options that products with sharded models do not have.

    Raises:
        InputError: One is given; the message names it.
    """
    for name, value in options.items():
        if value not in _ACCEPTED.get(name, (None, False)):
            raise InputError.of(name, repr(value), f"{call} has no such option where parameters are sharded")


_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "wrt": ("parameters",),
    "parameters": (None, "trainable"),
    "check_finite": (True,),
    "checks": ("first", "always", "never"),  # there is one route, plain autograd
    "fallback": ("warn", "silent", "error"),
}
