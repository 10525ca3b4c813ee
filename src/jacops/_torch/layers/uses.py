"""Where parameters enter a recorded graph, and what multiplies them there.

A row of a parameter Jacobian never needs a sweep down to the parameter. Where a weight enters by `z = W a`, the
gradient of anything by `W` is the cotangent at `z` times `a`, sample by sample (Goodfellow, 2015). The graph itself
says where that happens: each operation that a leaf leads into is one `ParameterUse`, whoever wrote the forward (a
layer, a functional call, the projections inside attention, a weight used twice). A leaf with a use that no rule covers
is left to ordinary sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..._cached import cached_property
from ..._ladder.failures import Attempted, RouteFailedError
from ..._runtime.contexts import sweeping
from ..._runtime.engine import swept
from ..._runtime.restoring import restoring
from ..sweeps.linearization import Linearization
from .part import RowFactors, Rows, matrix_shape
from .parts import Lookup, Outer
from .rules import (
    RULES,
    Entry,
    Kind,
    Order,
    RowLayout,
    Rule,
    by_sample,
    derived,
    output_shape,
    passed_on,
    pulled_back,
    refusal,
    repeating_sums,
)

_DEEPEST = 50  # operations between a parameter and the weight made of it: a chain of more is a network's


@dataclass(frozen=True, eq=False)
class ParameterUse:
    """One place where a leaf enters, as rows `(samples, positions, …)`; `Rule` defines these.

    Attributes:
        node: The operation; `edge` is its output, where cotangents are requested.
        entry: How the leaf arrives.
        shape: Of the operation's output; of the sum's where there is one.
        rule: Of the operation.
        sum: The sum that repeats the operation's output for all samples (positions added to tokens), if there is one:
            cotangents are requested at its output, where samples are still apart.
        samples: How many.
        order: How rows belong to them.
    """

    node: Any
    entry: Entry
    shape: torch.Size
    rule: Rule
    _tensor: Tensor
    sum: Any = None
    samples: int = 1
    order: Order = 1

    def ordered(self, samples: int, order: Order) -> ParameterUse:
        """Return the use with the order of its rows; nothing that depends on another one is kept."""
        return ParameterUse(self.node, self.entry, self.shape, self.rule, self._tensor, self.sum, samples, order)

    @property
    def leaf(self) -> int:
        """Which of the linearization's leaves."""
        return self.entry.leaf

    @property
    def kind(self) -> Kind:
        """How rows are put together."""
        return self.rule.kind

    @cached_property
    def turned(self) -> bool:
        """Whether the leaf is the transposed sum of outer products, group by group."""
        return self.kind == "outer" and self.rule.turned(self.node, self.entry)

    @property
    def derived(self) -> bool:
        """Whether what enters is computed from the leaf, so that rows by it have to be pulled back."""
        return self.entry.edge is not None

    @property
    def edge(self) -> GradientEdge:
        """Where cotangents are requested."""
        return GradientEdge(self.node if self.sum is None else self.sum, 0)

    @cached_property
    def attached(self) -> Tensor | None:
        """What multiplies the leaf, `(R, …)`, with its graph."""
        return self.rule.operand(self.node, self.entry)

    @cached_property
    def operand(self) -> Tensor | None:
        """What multiplies the leaf, `(R, …)`, as numbers."""
        return self._found(attached=False)

    def _found(self, attached: bool) -> Tensor | None:
        if self.rule.views and self.sum is None and not attached:  # its graph is dropped at once, sooner than left out
            found = self.rule.operand(self.node, self.entry)
            return None if found is None else found.detach()
        return self._computed(attached)

    @restoring
    def _computed(self, attached: bool) -> Tensor | None:
        with torch.set_grad_enabled(attached):
            found = self.rule.operand(self.node, self.entry)
        if found is not None and self.sum is not None:
            found = found.repeat(self.shape[:-1].numel() // found.shape[0])
        return found if found is None or attached else found.detach()

    @property
    def dtype(self) -> torch.dtype:
        """Of the leaf and of the operation's output."""
        return self._tensor.dtype

    @property
    def patch_bytes(self) -> int:
        """Bytes of an operand that is made for the purpose, before it is."""
        return self.rule.patch_bytes(self.node, self.entry)

    # ---- rows of samples ---------------------------------------------------------------------------------------

    def sample_operand(self, attached: bool = False) -> Tensor | None:
        """Return what multiplies the leaf, `(n, T, …)`; None for a vector, whose rows are multiplied already.

        With `attached` it has its graph.
        """
        operand = None if self.kind == "vector" else self._found(attached)  # not kept: it may be larger than the graph
        return None if operand is None else by_sample(operand, self.samples, self.order)

    def delta(self, cotangent: Tensor, attached: bool = False) -> Tensor:
        """Return a cotangent at the operation's output as rows `(n, T, …)` of the rule, with their graph."""
        if self.kind == "outer" and self._layout is not None:
            return self._layout.grouped(cotangent, self.samples, self.order)
        # Rules of outer products and lookups return the cotangent: only vectors are multiplied here.
        factor = None if self.kind != "vector" else self.attached if attached else self.operand
        rows = by_sample(self.rule.rows(self.node, cotangent, self.entry, factor), self.samples, self.order)
        return rows.unsqueeze(2) if self.kind == "lookup" else rows

    def deltas(self, cotangents: Tensor) -> Tensor:
        """Return the rows `(k, n, T, …)` for several cotangents `(k, *shape)`."""
        if self.kind == "outer" and self._layout is not None:
            return self._layout.grouped(cotangents, self.samples, self.order)
        if self.kind == "vector" and self.operand is None and self.entry.copies == 1 and len(self.shape) > 1:
            # The first axis becomes rows, for any cotangent.
            rows = self.rule.rows(self.node, cotangents.flatten(0, 1), self.entry, None)
            return by_sample(rows.unflatten(0, (len(cotangents), -1)), self.samples, self.order, axis=1)
        return torch.stack([self.delta(cotangent) for cotangent in cotangents])

    def part(self, operand: Tensor | None, delta: Tensor) -> RowFactors:
        """Return rows from cotangents `(n, k, T, …)`.

        Raises:
            RouteFailedError: Torch cannot pull rows back to the parameter.
        """
        many, (long, wide) = delta.shape[:2], matrix_shape(self.entry.weight)
        if operand is None:
            summed = delta.squeeze(2) if delta.shape[2] == 1 else delta.sum(2)
            part: RowFactors = Rows(summed.reshape(*many, long, wide))
        elif self.kind == "outer":
            part = Outer(delta, operand, self.turned, long)
        else:
            part = Lookup(delta, operand, long)
        if self.entry.edge is None:
            return part
        formed = part.block(slice(0, long)).flatten(0, 1).reshape(-1, *self.entry.weight)
        if formed.is_meta:  # where bytes are planned
            rows = formed.new_empty(len(formed), *self._tensor.shape)
        else:
            rows = pulled_back(self.entry.edge, self._tensor, formed)
        return Rows(rows.reshape(*many, *matrix_shape(self._tensor.shape)))

    def ones(self, operand: Tensor) -> Tensor:
        """Return the operand of a bias beside a weight's, `(n, T, g, 1)`: zero where a sample has fewer positions."""
        ones = operand.new_ones(*operand.shape[:-1], 1)
        if not isinstance(self.order, Tensor):
            return ones
        known = self.order < self.shape[:-1].numel()
        return ones * known.to(ones.dtype).view(*known.shape, 1, 1)

    # ---- the operation's output --------------------------------------------------------------------------------

    @cached_property
    def _layout(self) -> RowLayout | None:
        return self.rule.layout(self.node, self.entry)

    @property
    def layout(self) -> RowLayout | None:
        """How the output is seen; None where gradients by the leaf are not made of its channels."""
        return None if self.derived else self._layout

    @property
    def row_count(self) -> int:
        """Samples times positions, by the shape of the output."""
        return math.prod(self.layout.row_sizes) if self.layout is not None else self.shape[:1].numel()

    def entries(self) -> Tensor:
        """Return for `"vector"` which entry of the leaf enters where, `(*shape)`: broadcasting, as numbers."""
        return self.rule.entries(self.node, self.entry, torch.arange(self._tensor.numel(), device=self._tensor.device))


def find_uses(lin: Linearization, repeated: bool = False, inside: Iterable[Any] = ()) -> dict[int, list[ParameterUse]]:
    """Return the uses of every leaf all of whose uses have a rule, by the leaf's index.

    A leaf that is missing enters in some other way; a leaf with an empty list does not enter at all.

    Args:
        lin: What was recorded.
        repeated: Look for cotangents behind sums that repeat what was looked up for all samples.
        inside: Operations that make weights, so that no parameter enters there.
    """
    if lin.aliased_leaves or lin.graph_info.reentrant or lin.graph_info.functions:
        return {}
    found = _Search(lin, inside).uses()
    if repeated:
        lookups = {use.node for uses in found.values() for use in uses if use.kind == "lookup"}
        ends = [output.grad_fn for output in lin.outputs]
        sums = repeating_sums(lookups, lin.graph_info.nodes, ends) if lookups else {}
        found = {leaf: [_behind(use, sums.get(use.node)) for use in uses] for leaf, uses in found.items()}
    for uses in found.values():
        uses.sort(key=lambda use: use.node._sequence_nr())  # the same order in every run
    return found


def _behind(use: ParameterUse, after: Any) -> ParameterUse:
    """Return a use with its cotangents taken behind a sum that repeats its output along the first axis."""
    return use if after is None else replace(use, shape=output_shape(after), sum=after)


_Found = dict[Any, ParameterUse] | None  # by operation and place
_Made = dict[Any, _Found]


class _Search:
    """A walk from leaves to the operations where they, or what is computed from them alone, meet samples."""

    def __init__(self, lin: Linearization, inside: Iterable[Any]) -> None:
        self._lin = lin
        self._ends = {(o.grad_fn, o.output_nr) for o in lin.outputs}
        self._index = {id(leaf): i for i, leaf in enumerate(lin.leaves)}
        self._into: dict[Any, list[tuple[Any, int, int]]] = {}
        self._roots: dict[int, Any] = {}
        for node in lin.graph_info.nodes:
            before = node.next_functions
            for place, (parent, number) in enumerate(before):
                if parent is not None:
                    self._into.setdefault(parent, []).append((node, place, number))
            leaf = None if before else self._index.get(id(getattr(node, "variable", None)))
            if leaf is not None:
                self._roots[leaf] = node
        self._behind: dict[Any, set[int] | None] = {}
        self._inside = set(inside)

    def uses(self) -> dict[int, list[ParameterUse]]:
        """Return the uses of the leaves that have rules everywhere."""
        while True:
            found = {i: own for i in range(len(self._lin.leaves)) if (own := self._of_leaf(i)) is not None}
            # Operations that compute a weight from parameters are not uses of these: paths would count twice.
            edges = [use.entry.edge for uses in found.values() for use in uses]
            inside: set[Any] = set()
            for edge in edges:
                if edge is not None:
                    self._add_made_by(edge.node, inside)
            if inside <= self._inside:
                return found
            self._inside |= inside

    def _of_leaf(self, leaf: int) -> list[ParameterUse] | None:
        tensor = self._lin.leaves[leaf]
        if any(tensor is output for output in self._lin.outputs) or tensor.grad_fn is not None:
            return None
        if leaf not in self._roots:
            return []
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_complex():
            return None
        entry = Entry(leaf, tensor.shape, tensor.dtype, tensor.shape)
        found = self._follow(self._roots[leaf], 0, entry, {})
        return None if found is None else list(found.values())

    def _follow(self, node: Any, number: int, entry: Entry, made: _Made, depth: int = 0) -> _Found:
        """Return the uses of one output of an operation; None where one is not covered.

        Args:
            node: The operation, or a leaf.
            number: Which of its outputs.
            entry: How the leaf arrives there.
            made: What was found of tensors computed from the leaf.
            depth: Operations since the leaf.
        """
        if (node, number) in self._ends or depth > _DEEPEST:
            return None
        found: dict[Any, ParameterUse] = {}
        for after, place, own in self._into.get(node, ()):
            if own == number:
                use = self._use(after, place, entry)
                more = self._beyond(after, entry, made, depth) if use is None else {(after, place): use}
                if more is None:
                    return None
                found |= more
        return found

    def _beyond(self, node: Any, entry: Entry, made: _Made, depth: int) -> _Found:
        """Return the uses behind an operation that makes something of a leaf."""
        seen = passed_on(node, entry)
        found = None if seen is None else self._follow(node, 0, seen, made, depth + 1)
        if found is not None:
            return found
        if node not in made:
            made[node] = self._computed(node, entry, made, depth)
        return made[node]

    def _computed(self, node: Any, entry: Entry, made: _Made, depth: int) -> _Found:
        """Return the uses of all outputs of an operation, as tensors computed from leaves alone."""
        behind = self._leaves_behind(node, 0)
        if behind is None:
            return None
        entries, found = sum(self._lin.leaves[i].numel() for i in behind), {}
        for number in range(len(node._input_metadata)):
            own = derived(node, number, entry, entries)
            more = None if own is None else self._follow(node, number, own, made, depth + 1)
            if more is None:
                return None
            found |= more
        return found

    def _leaves_behind(self, node: Any, depth: int) -> set[int] | None:
        """Return the leaves that an operation's outputs are computed from; None where other tensors are among them."""
        if node not in self._behind:
            self._behind[node] = None
            found: set[int] = set()
            for parent, _ in node.next_functions:
                leaf = self._index.get(id(getattr(parent, "variable", None)))
                if leaf is not None:
                    found.add(leaf)
                elif parent is not None:
                    closed = depth > _DEEPEST or hasattr(parent, "variable")
                    more = None if closed else self._leaves_behind(parent, depth + 1)
                    if more is None:
                        return None
                    found |= more
            self._behind[node] = found
        return self._behind[node]

    def _add_made_by(self, node: Any, found: set[Any]) -> None:
        """Add an operation and those before it, up to leaves."""
        if node is not None and node not in found and not hasattr(node, "variable"):
            found.add(node)
            for parent, _ in node.next_functions:
                self._add_made_by(parent, found)

    def _use(self, node: Any, place: int, entry: Entry) -> ParameterUse | None:
        rule = RULES.get((node.name(), place))
        if rule is None or node in self._inside or refusal(rule, node, entry) is not None:
            return None
        return ParameterUse(node, entry, output_shape(node), rule, self._lin.leaves[entry.leaf])


@restoring
def cotangents(
    lin: Linearization,
    uses: Sequence[ParameterUse],
    seeds: Sequence[Tensor],
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Return the cotangents at the outputs of all uses, by one sweep that forms no gradient of a leaf.

    Raises:
        RouteFailedError: Torch cannot take it.
    """
    if not uses:
        return ()
    live = [(output, seed) for output, seed in zip(lin.outputs, seeds, strict=True) if output.requires_grad]
    edges = {use.node: use.edge for use in uses}  # a weight and its bias enter together
    with sweeping(lin.outputs[0]), Attempted():
        found = swept([o for o, _ in live], list(edges.values()), [seed for _, seed in live], create_graph)
        if any(cotangent is None for cotangent in found):
            raise RouteFailedError("no path leads from the outputs to some of the layers")
    by_node: dict[Any, Any] = dict(zip(edges, found, strict=True))
    return tuple(by_node[use.node] for use in uses)
