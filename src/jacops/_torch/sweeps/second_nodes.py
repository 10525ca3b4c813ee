"""Products with a Hessian through a recorded graph, node by node: a gradient differentiated along a direction.

Tangents go forward through the graph of the loss, and change the cotangents that come back (Pearlmutter, 1994;
Griewank and Walther, 2008, §5). Unlike a second backward pass this needs no graph of the first, and no gradients of
weights on the way: for small models it takes half of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError
from ..._runtime.contexts import sweeping
from ..._runtime.engine import mapped
from ..._runtime.restoring import restoring
from ..._runtime.rows import Rows
from .graph import parents_first
from .node_rules import Rule, TransposedBackward, rule_for
from .nodewise import quiet_loops
from .second_rules import Needs, Parts, SecondRule, second_rule, transposed

if TYPE_CHECKING:
    from .linearization import Linearization

Shapes = Sequence[tuple[int, Sequence[int]]]


class _Push(NamedTuple):
    place: int
    sources: tuple[int, ...]
    rule: Rule


class _Pull(NamedTuple):
    """One node on the way back.

    Attributes:
        place: The node's place in the walk over the graph.
        sources: Those that it was computed from; -1 for what does not move.
        needs: Which of these have a derivative.
        inner: Which of them are nodes themselves, and so need a cotangent besides its change.
        rule: How cotangents pass it.
        spread: Inputs that may have been broadcast, with a leaf's shape; None for a node's, which data may decide.
    """

    place: int
    sources: tuple[int, ...]
    needs: Needs
    inner: Needs
    rule: SecondRule
    spread: tuple[tuple[int, torch.Size | None], ...]


@dataclass(frozen=True)
class SecondPlan:
    """The order in which tangents go forward, and cotangents back: the same for every graph of one wiring.

    Attributes:
        leaves: The place of each leaf, -1 where no path leads to it.
        pushes: The nodes that tangents have to go through.
        pulls: The nodes that cotangents go through, the last one first.
    """

    leaves: tuple[int, ...]
    pushes: tuple[_Push, ...]
    pulls: tuple[_Pull, ...]


def leaf_places(lin: Linearization) -> tuple[int, ...]:
    """Return the place of each leaf in the walk over the graph, -1 where no path leads to it."""
    known = lin.graph_info.leaves
    return tuple([known.get(id(leaf), -1) for leaf in lin.leaves])


def second_plan(lin: Linearization, leaves: tuple[int, ...]) -> SecondPlan:
    """Return the plan for the graph of one number.

    Raises:
        RouteFailedError: The graph holds something that no rule is for.
    """
    info, (root,) = lin.graph_info, lin.outputs
    if root.grad_fn is None:
        raise RouteFailedError("the loss is a leaf")
    moving, made = set(leaves) - {-1}, list[tuple[int, Any, tuple[int, ...]]]()
    for node in parents_first([root.grad_fn]):
        places = [-1 if parent is None else info.nodes[parent] for parent, _ in node.next_functions]
        sources = tuple([place if place in moving else -1 for place in places])
        if max(sources, default=-1) >= 0:
            _check(node, lin)
            moving.add(info.nodes[node])
            made.append((info.nodes[node], node, sources))
    rules = [second_rule(node) for _, node, _ in made]
    return SecondPlan(leaves, _pushes(made, rules), _pulls(made, rules, set(leaves)))


def _check(node: Any, lin: Linearization) -> None:
    """Refuse nodes with several outputs, and numbers that are not of the leaves' one kind."""
    dtype = lin.leaves[0].dtype
    if len(node._input_metadata) != 1 or any(number for _, number in node.next_functions):
        raise RouteFailedError(f"no rule for {node.name()}")
    if node._input_metadata[0].dtype != dtype or node._input_metadata[0].is_nested_tensor:
        raise RouteFailedError("tensors of several dtypes")


def _pushes(made: list[tuple[int, Any, tuple[int, ...]]], rules: list[SecondRule]) -> tuple[_Push, ...]:
    """Return the nodes whose tangents are read by a rule further on."""
    read: set[int] = set()
    found = []
    for (place, node, sources), rule in zip(reversed(made), reversed(rules), strict=True):
        if rule.reads:
            read.add(place)
        if rule.bends or place in read:
            read.update(sources)
        if place in read:
            push = rule_for(node)
            found.append(_Push(place, sources, transposed if isinstance(push, TransposedBackward) else push))
    return tuple(reversed(found))


def _pulls(
    made: list[tuple[int, Any, tuple[int, ...]]], rules: list[SecondRule], leaves: set[int]
) -> tuple[_Pull, ...]:
    found = []
    for (place, node, sources), rule in zip(reversed(made), reversed(rules), strict=True):
        parents = [parent for parent, _ in node.next_functions]
        needs = tuple([source >= 0 for source in sources])
        inner = tuple([source >= 0 and source not in leaves for source in sources])
        moved = [i for i in rule.spread if i < len(sources) and needs[i]]
        spread = tuple([(i, None if inner[i] else parents[i].variable.shape) for i in moved])
        found.append(_Pull(place, sources, needs, inner, rule, spread))
    return tuple(found)


class HessianByNodes:
    """Products with the Hessian of one number by the leaves of its recorded graph.

    Args:
        lin: Whose; it holds this, and not the other way round, so that both go when it goes.
        plan: Of a graph of this wiring.
    """

    def __init__(self, lin: Linearization, plan: SecondPlan) -> None:
        self._plan, self._nodes = plan, list(lin.graph_info.nodes)
        self._pulls = [(pull, self._shapes(pull) if pull.spread else ()) for pull in plan.pulls]
        self._cotangents: list[Tensor | None] | None = None  # of every node, which products share

    @restoring
    def product(self, lin: Linearization, direction: Sequence[Tensor], together: bool = False) -> Rows:
        """Return one tensor per leaf from one per leaf; `(k, *leaf)` from the same where several go `together`."""
        with sweeping(lin.outputs[0]), torch.no_grad(), quiet_loops() if together else nullcontext():
            if self._cotangents is None:
                self._cotangents = self._pulled(torch.ones_like(lin.outputs[0]))
            if together:
                return mapped(lambda *parts: self._product(parts, lin.leaves), direction)
            return self._product(direction, lin.leaves)

    def _shapes(self, pull: _Pull) -> Shapes:
        """Return what a node's cotangents are summed to: no plan knows the sizes that a mask left of a tensor."""
        return tuple([(i, _shape(self._nodes[pull.sources[i]]) if s is None else s) for i, s in pull.spread])

    def _product(self, direction: Sequence[Tensor], leaves: Sequence[Tensor]) -> Rows:
        nodes, moved, cotangents = self._nodes, self._pushed(direction), self._cotangents or []
        changes: list[Tensor | None] = [None] * (len(nodes) + 1)
        for (place, sources, needs, _, rule, _), shapes in self._pulls:
            c, dc = cotangents[place], changes[place]
            if c is not None and (dc is not None or rule.bends):
                tangents = [moved[source] for source in sources]
                _collect(changes, sources, rule.change(nodes[place], c, dc, tangents, moved[place], needs), shapes)
        found = [None if place < 0 else changes[place] for place in self._plan.leaves]
        return [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(found, leaves, strict=True)]

    def _pushed(self, direction: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the tangents of all nodes that need one; the last entry stands for what does not move."""
        moved: list[Tensor | None] = [None] * (len(self._nodes) + 1)
        for place, tangent in zip(self._plan.leaves, direction, strict=True):
            if place >= 0:
                moved[place] = tangent
        for place, sources, rule in self._plan.pushes:
            (moved[place],) = rule(self._nodes[place], [moved[source] for source in sources])
        return moved

    def _pulled(self, seed: Tensor) -> list[Tensor | None]:
        """Return the cotangents of all nodes."""
        found: list[Tensor | None] = [None] * (len(self._nodes) + 1)
        found[self._plan.pulls[0].place] = seed
        for (place, sources, _, inner, rule, _), shapes in self._pulls:
            c = found[place]
            if c is not None and True in inner:
                _collect(found, sources, rule.pull(self._nodes[place], c, inner), shapes, inner)
        return found


def _shape(node: Any) -> Sequence[int]:
    return node._input_metadata[0].shape


def _collect(
    total: list[Tensor | None],
    sources: tuple[int, ...],
    parts: Parts,
    shapes: Shapes,
    wanted: Needs = (),
) -> None:
    """Add what a node gives its sources to what they have."""
    if shapes:
        parts = [*parts]
        for i, shape in shapes:
            part = parts[i]
            parts[i] = None if part is None else part.sum_to_size(shape)
    for i, (source, part) in enumerate(zip(sources, parts, strict=True)):
        if source >= 0 and part is not None and (not wanted or wanted[i]):
            known = total[source]
            total[source] = part if known is None else known + part
