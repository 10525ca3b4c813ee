"""Pushes through a recorded graph, node by node: forward mode without running the model again.

Every node of a graph holds the linearisation of its own operation, as the backward of it. A tangent goes through a node
by the transpose of that backward (`node_rules`), so a push costs what the operations cost, and nothing has to be
recorded for it first (Griewank and Walther, 2008, §3.1).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..._finite import is_finite
from ..._ladder.failures import RouteFailedError, RouteNotFiniteError, RouteWrongError
from ..._ladder.names import Question, RouteName
from ..._ladder.plan import Cost
from ..._runtime.contexts import private_noise, sweeping
from ..._runtime.restoring import Setting, restoring
from ..._runtime.rows import Rows, plain
from .ask import SweepAsk
from .double_backward import error_beside
from .graph import parents_first
from .node_rules import Rule, rule_for, selected

if TYPE_CHECKING:
    from .linearization import Linearization

# Sets whether torch warns of operations that vmap runs one by one, which is slow and correct; the setting cannot be
# read.
_warn_of_loops = torch._C._functorch._set_vmap_fallback_warning_enabled  # pyright: ignore[reportAttributeAccessIssue]
_SLOW, _NEGLIGIBLE = 4.0, 5e-3  # a differentiated pull takes 2 to 3 pulls; seconds below which timing is noise
_LARGE = 2**15  # numbers from which on several pushes in one pass gain nothing
Place = tuple[Any, int]


def quiet_loops() -> Setting:
    """Keep torch from warning of operations that vmap runs one by one."""
    return Setting(lambda: True, _warn_of_loops, False)


def pushes_are_large(lin: Linearization) -> bool:
    """Return whether a processor is as fast tangent by tangent; a device is always faster with all in one pass."""
    return lin.domain.device.type == "cpu" and lin.domain.dim + lin.codomain.dim > _LARGE


@dataclass(frozen=True)
class _Step:
    """One node on the way of a tangent.

    Attributes:
        node: The node.
        rule: How tangents go through it.
        sources: Where its tangents come from, None for inputs without derivative.
        spent: Places that nothing needs after this step.
    """

    node: Any
    rule: Rule
    sources: tuple[Place | None, ...]
    spent: tuple[Place, ...]

    @property
    def narrows(self) -> bool:
        """Whether it takes a part of a tensor, which a tangent that moves few entries may not move."""
        return self.rule is selected


class Nodewise:
    """A recorded graph, in the order in which tangents go through it.

    Args:
        lin: Whose; it holds this, and not the other way round, so that both go when it goes.

    Raises:
        RouteFailedError: The graph holds what Python code or complex numbers made.
    """

    def __init__(self, lin: Linearization) -> None:
        if lin.graph_info.reentrant or lin.graph_info.functions:
            raise RouteFailedError("the graph holds custom Functions")
        if any(t.is_complex() for t in (*lin.leaves, *lin.outputs)):
            raise RouteFailedError("complex numbers")
        leaves = [*lin.leaves, *(tensor for _, tensor in lin.aliased_leaves)]
        self.index = [*range(len(lin.leaves)), *(j for j, _ in lin.aliased_leaves)]
        self.starts = [_place(leaf) if leaf.requires_grad else None for leaf in leaves]
        self.ends = [_place(o) if o.requires_grad else None for o in lin.outputs]
        self.seconds = 0.0  # of the last push
        self.steps = _planned({p for p in self.starts if p}, [p for p in self.ends if p])

    @restoring
    def push(
        self, lin: Linearization, tangent: Sequence[Tensor | None], together: bool = False, sparse: bool = False
    ) -> Rows:
        """Return one tensor per output from one tangent per leaf, None for zero.

        Args:
            lin: Whose graph it is.
            tangent: The tangents.
            together: There are several, `(k, *leaf)` each, which gives `(k, *output)`.
            sparse: Most of its entries are zero, so that selected parts are tested for being zero.

        Raises:
            RouteNotFiniteError: A value is NaN or Inf.
        """
        lin.sweeps += 1
        given = [t for t in tangent if t is not None]
        looks = sparse and not together and lin.domain.device.type == "cpu"

        def pushed(*moving: Tensor) -> tuple[Tensor, ...]:
            rest = iter(moving)
            return tuple(self._pushed(lin.outputs, [None if t is None else next(rest) for t in tangent], looks))

        with sweeping(lin.outputs[0]), torch.no_grad(), quiet_loops() if together else nullcontext():
            row = list((torch.func.vmap(pushed) if together else pushed)(*given))
        if not all(is_finite(part) for part in row):
            raise RouteNotFiniteError("values are not finite")
        return row

    def _pushed(self, outputs: Sequence[Tensor], tangents: Sequence[Tensor | None], looks: bool) -> Rows:
        known: dict[Place, Tensor] = {}
        for place, j in zip(self.starts, self.index, strict=True):
            tangent = tangents[j]
            if place is not None and tangent is not None:
                _add(known, place, tangent)
        for step in self.steps:
            arrived = [None if source is None else known.get(source) for source in step.sources]
            if any(t is not None for t in arrived):
                for number, tangent in enumerate(step.rule(step.node, arrived)):
                    if tangent is not None and not (looks and step.narrows and not tangent.any()):
                        _add(known, (step.node, number), tangent)
            for place in step.spent:
                known.pop(place, None)
        pairs = zip(outputs, self.ends, strict=True)
        return [plain(known[p]) if p in known else torch.zeros_like(plain(o.detach())) for o, p in pairs]


def _add(known: dict[Place, Tensor], place: Place, tangent: Tensor) -> None:
    """Note a tangent; a tensor made on the way may be a leaf too, and then has one already."""
    known[place] = known[place] + tangent if place in known else tangent


class Adjoint:
    """`<u, J v> = <Jᵀu, v>` for a pull along a random `u`."""

    name, always = "adjoint", False

    def evidence(self, route: Any, ask: SweepAsk, found: Rows) -> bool:
        """Return whether the identity holds; refuse the route from now on where it takes far longer than that pull.

        A push through saved tensors that are recomputed one by one (checkpoints) is right, and so slow.

        Raises:
            RouteWrongError: It does not hold.
        """
        lin = ask.lin
        noise = [private_noise(o, seed=i) for i, o in enumerate(lin.outputs)]
        started = time.perf_counter()
        pulled = lin.pull(noise)
        limit = _SLOW * (time.perf_counter() - started) + _NEGLIGIBLE
        error = error_beside(pulled, noise, ask, found)
        if not error <= lin.tolerance:
            raise RouteWrongError(f"a push node by node fails the adjoint identity (by {error:.1e})")
        # Twice: the machine may have been busy with something else.
        if lin.nodewise.seconds > limit and _seconds(ask) > limit:
            ask.verdicts.refuse(ask.question, route.name, "measured slower than a differentiated pull")
        return True


def _seconds(ask: SweepAsk) -> float:
    started = time.perf_counter()
    ask.lin.nodewise.push(ask.lin, _of(ask, 0))
    return time.perf_counter() - started


class NodewisePush:
    """Tangents through the recorded graph, node by node and one by one."""

    name, claims, leaving = "node by node", (Adjoint(),), "silent"

    def refuses(self, ask: SweepAsk) -> str | None:
        """Several small tangents are faster in one batched pass; there is no graph to go through for later sweeps."""
        lin = ask.lin
        alone = (
            ask.alone
            or ask.many == 1
            or pushes_are_large(lin)
            or ask.verdicts.refusal(Question.PUSH, RouteName.BATCHED) is not None
        )
        return None if alone and ask.rows and not ask.create_graph else ""

    def cost(self, ask: SweepAsk) -> Cost:
        """A sweep per tangent."""
        return Cost(ask.many)

    def describe(self, ask: SweepAsk) -> str:
        """Name the check."""
        return "tangents node by node through the recorded graph"

    def value(self, ask: SweepAsk) -> Rows:
        """Return `(k, *output)` per output."""
        lin, started = ask.lin, time.perf_counter()
        pushed = [lin.nodewise.push(lin, _of(ask, i), sparse=ask.alone) for i in range(ask.many)]
        lin.nodewise.seconds = (time.perf_counter() - started) / max(1, ask.many)
        if len(pushed) == 1:
            return [part.unsqueeze(0) for part in pushed[0]]
        return [torch.stack(parts) for parts in zip(*pushed, strict=True)]


class BatchedNodewise(NodewisePush):
    """All tangents through the recorded graph, node by node, in one pass under vmap."""

    name = "node by node, batched"

    def refuses(self, ask: SweepAsk) -> str | None:
        """One tangent needs no batch; saved tensors that are made again when they are used would be under vmap, too."""
        effects = ask.lin.proofs.effects
        again = effects is not None and effects.packs
        return "" if ask.many == 1 or ask.create_graph or again or not any(t is not None for t in ask.rows) else None

    def describe(self, ask: SweepAsk) -> str:
        """Name the number of tangents."""
        return f"{ask.many} tangents node by node through the recorded graph, in one batched pass"

    def value(self, ask: SweepAsk) -> Rows:
        """Return `(k, *output)` per output."""
        lin, started = ask.lin, time.perf_counter()
        found = lin.nodewise.push(lin, ask.rows, together=True)
        lin.nodewise.seconds = (time.perf_counter() - started) / ask.many
        return found


def _of(ask: SweepAsk, number: int) -> list[Tensor | None]:
    return [None if t is None else t[number] for t in ask.rows]


def _place(tensor: Tensor) -> Place:
    node = tensor.grad_fn
    if node is not None:
        return node, tensor.output_nr
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _planned(starts: set[Place], ends: list[Place]) -> list[_Step]:
    """Return the steps from `starts` to `ends`, each once, in order."""
    moving: set[Any] = set()
    made: list[tuple[Any, tuple[Place | None, ...]]] = []
    for node in parents_first([node for node, _ in ends]):
        sources = tuple([edge if edge[0] in moving or edge in starts else None for edge in node.next_functions])
        if sources.count(None) < len(sources):
            moving.add(node)
            made.append((node, sources))
    needed: set[Place | None] = {None, *ends}
    steps = []
    for node, sources in reversed(made):  # from the end, the first step that takes a tangent is the last to need it
        spent = {source for source in sources if source not in needed}
        needed |= spent
        steps.append(_Step(node, rule_for(node), sources, tuple(filter(None, spent))))
    return steps[::-1]
