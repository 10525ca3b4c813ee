"""Where blocks of a whole Jacobian are written: parts of one tensor, so that nothing has to be joined afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..._runtime.memory import check_places
from ..sweeps.linearization import Linearization

Blocks = list[list[Tensor]]


@dataclass(frozen=True)
class Places:
    """Places for a Jacobian.

    Attributes:
        blocks: `J[output][leaf]`, each `(output entries, *leaf)`, views of `wholes`.
        wholes: The tensors that the caller gets.
    """

    blocks: Blocks
    wholes: list[Tensor]


def is_plain(lin: Linearization) -> bool:
    """Return whether all blocks have one dtype that is known beforehand: the leaves', and nothing complex."""
    tensors = [*lin.leaves, *lin.outputs]
    return len({t.dtype for t in tensors}) == 1 and not tensors[0].is_complex()


def by_leaf(lin: Linearization, given: list[Tensor] | None) -> Places:
    """Return one `(all output entries, *leaf)` tensor per leaf."""
    bounds = list(accumulate((o.numel() for o in lin.outputs), initial=0))
    shapes = [(bounds[-1], *leaf.shape) for leaf in lin.leaves]
    wholes = _taken(shapes, lin.leaves, given)
    return Places([[whole[a:b] for whole in wholes] for a, b in pairwise(bounds)], wholes)


def flat(lin: Linearization, given: list[Tensor] | None) -> Places:
    """Return one matrix, all output entries by all leaf entries."""
    rows = list(accumulate((o.numel() for o in lin.outputs), initial=0))
    columns = list(accumulate((leaf.numel() for leaf in lin.leaves), initial=0))
    (whole,) = _taken([(rows[-1], columns[-1])], lin.leaves[:1], given)
    parts = list(zip(pairwise(columns), lin.leaves, strict=True))
    return Places(
        [[whole[a:b, c:d].view(b - a, *leaf.shape) for (c, d), leaf in parts] for a, b in pairwise(rows)], [whole]
    )


def separate(lin: Linearization, given: list[Tensor] | None) -> Places:
    """Return one `(*output, *leaf)` tensor per output and leaf."""
    pairs = [(o, leaf) for o in lin.outputs for leaf in lin.leaves]
    wholes = _taken([(*o.shape, *leaf.shape) for o, leaf in pairs], [leaf for _, leaf in pairs], given)
    blocks = [whole.view(o.numel(), *leaf.shape) for whole, (o, leaf) in zip(wholes, pairs, strict=True)]
    many = len(lin.leaves)
    return Places([blocks[i : i + many] for i in range(0, len(blocks), many)], wholes)


def _taken(shapes: list[tuple[int, ...]], like: list[Tensor], given: list[Tensor] | None) -> list[Tensor]:
    if given is not None:
        check_places(given, shapes, like)
        return given
    pairs = zip(shapes, like, strict=True)
    return [torch.empty(shape, dtype=leaf.dtype, device=leaf.device) for shape, leaf in pairs]
