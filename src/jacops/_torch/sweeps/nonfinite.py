"""Backward passes that also show where a cotangent turns NaN or Inf and where it is dropped again.

A backward that multiplies a zero cotangent by an infinite slope makes NaN; one that selects entries by a condition on
them turns NaN into zero. The result is then finite and may be wrong, and autograd reports nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..._runtime.contexts import sweeping
from ..._runtime.engine import swept
from ..._runtime.restoring import restoring
from ..._runtime.rows import Rows, dense, plain
from .graph import parents_first
from .linear_nodes import is_linear


@dataclass(frozen=True)
class Lost:
    """Cotangents that turn NaN or Inf during a pull.

    Attributes:
        makers: Operations that made them of finite ones.
        droppers: Operations that returned finite ones for them.
    """

    makers: tuple[str, ...]
    droppers: tuple[str, ...]

    def __str__(self) -> str:
        made = f"in the backward of {', '.join(self.makers)} " if self.makers else ""
        dropped = f" and is dropped by that of {', '.join(self.droppers)}" if self.droppers else ""
        return f"a NaN or Inf arises {made.rstrip()}{dropped}"


def pull_noting_losses(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], seeds: Sequence[Tensor]
) -> tuple[Rows, Lost | None]:
    """Return the gradients of `outputs` by `leaves` for the cotangents `seeds`, and what was not finite on the way.

    Args:
        outputs: Ends of a recorded graph, which is kept.
        leaves: What is differentiated by; zeros come back where no path leads.
        seeds: One cotangent per output.
    """
    live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    if not live:
        return [torch.zeros_like(leaf) for leaf in leaves], None
    ends = {get_gradient_edge(leaf).node for leaf in leaves}
    nodes = _between([o.grad_fn or get_gradient_edge(o).node for o, _ in live], ends)
    inner = set(nodes)
    # Non-finite values begin at operations with infinite slopes: there are few, and few edges to keep.
    made = [e for node in nodes if not is_linear(node) for e in node.next_functions if e[0] in inner]
    grads, kept = _pulled(live, leaves, list(dict.fromkeys(made)))
    if not _nonfinite(kept):
        return grads, None
    edges = [(node, i) for node in nodes for i in range(len(node._input_metadata))]
    _, kept = _pulled(live, leaves, edges)
    return grads, _named([edges[i] for i in _nonfinite(kept)], nodes)


@restoring
def _pulled(
    live: list[tuple[Tensor, Tensor]], leaves: Sequence[Tensor], edges: list[tuple[Any, int]]
) -> tuple[Rows, Sequence[Tensor | None]]:
    """Return gradients by leaves, and what was passed along edges."""
    outputs, seeds = [o for o, _ in live], [s for _, s in live]
    targets = [*leaves, *(GradientEdge(*edge) for edge in edges)]
    with sweeping(outputs[0]):
        grads = swept(outputs, targets, seeds)
    found = [dense(g) for g in grads[: len(leaves)]]
    filled = [torch.zeros_like(v) if g is None else plain(g) for g, v in zip(found, leaves, strict=True)]
    return filled, grads[len(leaves) :]


def _between(roots: list[Any], ends: set[Any]) -> list[Any]:
    """Return the nodes on paths from `roots` to `ends`, without these."""
    reaching, between = set(ends), list[Any]()
    for node in parents_first(roots):
        if node not in ends and any(parent in reaching for parent, _ in node.next_functions):
            reaching.add(node)
            between.append(node)
    return between[::-1]


def _nonfinite(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the positions of the tensors with NaN or Inf."""
    kept = [(i, t) for i, t in enumerate(tensors) if t is not None and t.layout is torch.strided and t.numel()]
    if not kept:
        return []
    norms = torch._foreach_norm([plain(t) for _, t in kept])  # pyright: ignore[reportPrivateImportUsage]
    sizes = torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).isfinite().tolist()
    # A norm may overflow where no entry does.
    return [i for (i, t), fine in zip(kept, sizes, strict=True) if not fine and not bool(torch.isfinite(t).all())]


def _named(bad: list[tuple[Any, int]], nodes: list[Any]) -> Lost:
    edges, stained, inner = set(bad), {node for node, _ in bad}, set(nodes)
    makers, part, droppers = {}, {}, {}
    for node in nodes:
        leads = [edge in edges for edge in node.next_functions if edge[0] in inner]
        if any(leads) and node not in stained:  # an edge collects from several nodes: those with no finite one first
            (makers if all(leads) else part)[_name(node)] = None
        elif node in stained and not any(leads):
            droppers[_name(node)] = None
    return Lost(tuple(makers or part), tuple(droppers))


def _name(node: Any) -> str:
    return re.sub(r"(Backward)?\d*$", "", node.name().rpartition("::")[2]).lower()
