"""Uses that an earlier call found, at the same places of another recording of the same graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from ..sweeps.linearization import Linearization
from .rules import Entry, RowLayout, Rule, output_shape, refusal
from .uses import ParameterUse


@dataclass(frozen=True)
class _UsePlace:
    """A use, without what belongs to one recording: operations are places in the walk over the graph."""

    node: int
    entry: Entry
    shape: torch.Size
    rule: Rule
    sum: int | None
    edge: tuple[int, int] | None
    order: int
    layout: RowLayout | None
    turned: bool


@dataclass(frozen=True)
class KnownUses:
    """Uses by places in a graph.

    The key of a graph, which they are remembered by, holds types of operations, connections, numbers, flags and the
    sizes that operations keep. All else that uses rest on is compared when they are looked up: which leaf stands at
    each end of the graph, their shapes and kinds, the sizes on the way from a leaf to its uses, and what rules say of
    each operation.

    Attributes:
        uses: By leaf.
        ends: Which leaf stands at each end of the graph, None for another tensor.
        shapes: Of the outputs of operations between leaves and uses, these included, and their dtypes.
        leaves: Shapes and dtypes of all leaves.
        made: What is made of these alone, by the names of those who made it.
    """

    uses: Mapping[int, Sequence[_UsePlace]]
    ends: tuple[tuple[int, int | None], ...]
    shapes: tuple[tuple[int, list[int], torch.dtype], ...]
    leaves: tuple[Any, ...]
    made: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, lin: Linearization, found: Mapping[int, Sequence[ParameterUse]]) -> KnownUses:
        """Return uses, the order of whose rows is a number, by place."""
        uses, nodes = [use for own in found.values() for use in own], lin.graph_info.nodes
        index = {id(leaf): i for i, leaf in enumerate(lin.leaves)}
        ends = {node: index.get(id(node.variable)) for node in nodes if hasattr(node, "variable")}
        roots = [node for node, leaf in ends.items() if leaf in found]
        between = _between(nodes, roots, {use.node for use in uses})
        sums = [use.sum for use in uses if use.sum is not None]
        return cls(
            {leaf: [_placed(use, nodes) for use in own] for leaf, own in found.items()},
            tuple((nodes[node], leaf) for node, leaf in ends.items()),
            tuple((nodes[node], *_kind(node)) for node in dict.fromkeys([*between, *sums])),
            _kinds(lin),
        )

    def at(self, lin: Linearization, samples: int) -> dict[int, list[ParameterUse]] | None:
        """Return the uses in another recording of the same key; None where something is not what it was."""
        nodes, leaves = [*lin.graph_info.nodes], lin.leaves
        if lin.aliased_leaves or self.leaves != _kinds(lin):
            return None
        for place, leaf in self.ends:
            variable = nodes[place].variable
            if (variable is not leaves[leaf]) if leaf is not None else any(variable is own for own in leaves):
                return None
        for place, shape, dtype in self.shapes:
            made = nodes[place]._input_metadata[0]
            if [*made.shape] != shape or made.dtype is not dtype:
                return None
        found: dict[int, list[ParameterUse]] = {}
        for leaf, own in self.uses.items():
            found[leaf] = []
            for use in own:
                node, entry = nodes[use.node], use.entry
                # All that a rule without a source looks at was compared, or is in the wiring.
                if use.rule.has_source and refusal(use.rule, node, entry) is not None:
                    return None
                if use.edge is not None:
                    entry = replace(entry, edge=GradientEdge(nodes[use.edge[0]], use.edge[1]))
                after = None if use.sum is None else nodes[use.sum]
                one = ParameterUse(node, entry, use.shape, use.rule, leaves[leaf], after, samples, use.order)
                vars(one).update(_layout=use.layout, turned=use.turned)  # which it would compute of the same
                found[leaf].append(one)
        return found


def _placed(use: ParameterUse, nodes: Mapping[Any, int]) -> _UsePlace:
    after, edge = None if use.sum is None else nodes[use.sum], use.entry.edge
    entry = use.entry if edge is None else replace(use.entry, edge=None)  # which would keep its graph
    made = None if edge is None else (nodes[edge.node], edge.output_nr)
    place, order = nodes[use.node], int(use.order)
    return _UsePlace(place, entry, use.shape, use.rule, after, made, order, use._layout, use.turned)


def _kind(node: Any) -> tuple[list[int], torch.dtype]:
    return [*output_shape(node)], node._input_metadata[0].dtype


def _kinds(lin: Linearization) -> tuple[Any, ...]:
    return lin.domain.shapes, lin.domain.dtypes, [*map(type, lin.leaves)]


def _between(nodes: Iterable[Any], roots: Sequence[Any], ends: set[Any]) -> list[Any]:
    """Return the operations that roots lead into, up to ends and these included."""
    into: dict[Any, list[Any]] = {}
    for node in nodes:
        for parent, _ in node.next_functions:
            if parent is not None:
                into.setdefault(parent, []).append(node)
    found, waiting = dict[Any, None](), [*roots]
    while waiting:
        for node in into.get(waiting.pop(), ()):
            if node not in found:
                found[node] = None
                if node not in ends:
                    waiting.append(node)
    return list(found)
