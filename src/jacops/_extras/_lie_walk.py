"""A walk over a recorded graph that distinguishes, edge by edge, elements of Lie groups from plain numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from .._runtime.contexts import arithmetic
from .._runtime.restoring import restoring
from .._torch.protocol import parents_first
from ..errors import NotDifferentiableError, warn
from ._lie_groups import ALGEBRAS, Mended, exact_series, group_of, parts_of, storage_width

_MODULE = "pypose.lietensor.operation"
# What each operation of PyPose takes: an element of its group (g) or plain numbers (p).
_TAKES = {"Log": "g", "Exp": "p", "Act": "gp", "Act4": "gp", "AdjXa": "gp", "AdjTXa": "gp", "Mul": "gg", "Inv": "g"}
OPERATIONS = frozenset(f"{group}_{verb}" for pair in ALGEBRAS.items() for group in pair for verb in _TAKES)
# Nodes that copy entries without changing them; whether elements stay whole is probed.
_WRITE = "CopySlices"
_MOVES = set(
    """
    Alias View UnsafeView ReshapeAlias AsStrided Clone ToCopy Expand Repeat Unsqueeze Squeeze Select Slice Split
    SplitWithSizes UnsafeSplit Unbind Index IndexSelect Gather MaskedSelect Take Permute Transpose T Flip Roll Diagonal
    Unfold Cat Stack Where IndexPut IndexPutImpl IndexCopy Scatter SelectScatter SliceScatter MaskedScatter
    MaskedFill IndexFill ConstantPadNd CopyBackwards CopySlices
    """.split()  # noqa: SIM905
)
_TODO = "Use Act, Log, matrix() or rotation().matrix(), whose derivatives are right."
_TODOS = {
    "translation": "`X.Act(torch.zeros(3))` gives these numbers with the right derivative (mind the dtype).",
    "scale": "`X.Log().tensor()[..., -1:].exp()` gives these numbers with the right derivative.",
}


@dataclass(frozen=True)
class EdgeKind:
    """What an edge carries on its way from a parameter; an edge that no parameter reaches has none.

    Attributes:
        parameter: One parameter it comes from.
        group: Name of the group whose elements these are, as they are stored; empty for plain numbers.
        part: How numbers were taken out of storage, which leaves them without a right derivative.
    """

    parameter: str
    group: str = ""
    part: str = ""


@dataclass
class Walk:
    """Walks from the parameters of a linearization.

    Attributes:
        call: The public call on whose behalf this is done.
        sources: Kinds of the edges that are parameters.
        twice: The graph walked is that of a Jacobian, to be differentiated once more.
        series: Nodes of Log and Exp that were passed.
        frozen: The first node passed whose gradient hides that it depends on a parameter.
    """

    call: str
    sources: dict[tuple[Any, int], EdgeKind]
    twice: bool = False
    series: list[Any] = field(default_factory=list)
    frozen: EdgeKind | None = None

    @classmethod
    def over(cls, lin: Any) -> Walk:
        """Return a walk from the leaves of a linearization and their representatives."""
        names = lin.domain.names
        leaves = [*zip(names, lin.leaves, strict=True), *((names[i], tensor) for i, tensor in lin.aliased_leaves)]
        return cls(lin.call, {_edge(t): EdgeKind(name, group_of(t)) for name, t in leaves if t.requires_grad})

    def kinds(self, tensors: Sequence[Tensor]) -> list[EdgeKind | None]:
        """Return what each tensor carries.

        Raises:
            NotDifferentiableError: On the way there elements of a group and plain numbers meet.
        """
        edges = [_edge(t) if t.requires_grad else (None, 0) for t in tensors]
        known: dict[Any, list[EdgeKind | None]] = {None: [None]}
        ends = {node for node, _ in self.sources}
        for node in parents_first([node for node, _ in edges if node is not None], ends):
            if node in ends:
                known[node] = [self.sources.get((node, i)) for i in range(len(node._input_metadata))]
            else:
                inputs = [known[parent][i if parent else 0] for parent, i in node.next_functions]
                known[node] = self._through(node, inputs)
        return [known[node][i] for node, i in edges]

    def check_outputs(self, kinds: Sequence[EdgeKind | None], outputs: Sequence[Tensor]) -> None:
        """Refuse outputs whose rows cannot be corrected.

        Raises:
            NotDifferentiableError: One holds numbers out of storage, or elements of another group than its own.
        """
        for kind, output in zip(kinds, outputs, strict=True):
            own = group_of(output)
            if kind is not None and (kind.part or (own and kind.group not in ("", own)) or (self.twice and kind.group)):
                raise self.raw_read(kind, "the Jacobian" if self.twice else "the output")

    def _through(self, node: Any, inputs: Sequence[EdgeKind | None]) -> list[EdgeKind | None]:
        """Return what the outputs of a node carry."""
        met = [kind for kind in inputs if kind is not None]
        forward = getattr(type(node), "_forward_cls", None)
        if met and forward is not None and forward.__module__ == _MODULE:
            return [self._operation(node, forward.__name__, inputs)]
        special = next((kind for kind in met if kind.group or kind.part), None)
        if special is None:
            return [met[0] if met else None] * len(node._input_metadata)
        name = _short(node.name())
        if isinstance(node, BackwardCFunction):
            raise self._custom(special, name)
        if special.part or name not in _MOVES:
            raise self.raw_read(special, name)
        if name == "Alias":
            return [special]
        return self._moved(node, name, inputs)

    def _operation(self, node: Any, name: str, inputs: Sequence[EdgeKind | None]) -> EdgeKind:
        """Return what an operation of PyPose makes of its inputs."""
        prefix, _, verb = name.partition("_")
        group = ALGEBRAS.get(prefix, prefix)
        met = [(kind, takes) for kind, takes in zip(inputs, _TAKES[verb], strict=True) if kind is not None]
        first = met[0][0]
        if verb == "AdjTXa" and group in ("SE3", "Sim3"):
            what = f"{group}.AdjT, which depends on parameter {first.parameter}, has a wrong backward pass in PyPose"
            raise self._refusal(what, "`X.Inv().Adj(a)` gives these numbers with the right derivative.")
        for kind, takes in met:
            if kind.part or (kind.group and kind.group != (group if takes == "g" else "")):
                raise self.raw_read(kind, name)
            if takes == "g" and not kind.group:
                raise self._made(kind, group, name)
        if verb in ("Log", "Exp"):
            self.series.append(node)
        if verb == "AdjXa" and len(met) == 2:
            self.frozen = self.frozen or first
        return EdgeKind(first.parameter, group if verb in ("Exp", "Mul", "Inv") else "")

    def _moved(self, node: Any, name: str, inputs: Sequence[EdgeKind | None]) -> list[EdgeKind | None]:
        """Return what the outputs of a copying node carry: elements, elements of a subgroup, or numbers out of them."""
        first = next(kind for kind in inputs if kind is not None and kind.group)
        plain = next((kind for kind in inputs if kind is not None and not kind.group), None)
        if plain is not None:
            raise self.raw_read(first, f"{name}, which joins it with plain numbers of parameter {plain.parameter}")
        widths = [meta.shape[-1] if len(meta.shape) else 0 for meta in node._input_metadata]
        found: dict[int, EdgeKind | None] = {}
        for width in set(widths):
            grads = _probe(node, width)
            pairs = zip(inputs, grads, strict=True)
            seen = {_part_of(kind.group, g, width) for kind, g in pairs if kind is not None and g is not None}
            group, part = seen.pop() if seen else ("", "")
            if seen or (name == _WRITE and not _overwrites(node, grads)):
                raise self.raw_read(first, f"{name}, which changes it in place" if name == _WRITE else name)
            kind = EdgeKind(first.parameter, group, part and f"{first.group}.{part}")
            found[width] = kind if group or part else None
        return [found[width] for width in widths]

    # ---- what is wrong -------------------------------------------------------------------------------------------

    def raw_read(self, kind: EdgeKind, by: str) -> NotDifferentiableError:
        """Return the error for numbers of an element that are used as they are stored."""
        group, _, part = kind.part.partition(".")
        whose = f"a LieTensor that depends on parameter {kind.parameter}"
        if part in _TODOS:
            return self._refusal(f"{group}.{part}() of {whose} goes into {by}", _TODOS[part])
        how = "number by number, " if part else ""
        lead = ".tensor(), .euler() and arithmetic lead to that"
        return self._refusal(f"{whose} is read as raw storage, {how}by {by} ({lead})", _TODO)

    def _made(self, kind: EdgeKind, group: str, by: str) -> NotDifferentiableError:
        what = f"an element of {group} made of plain numbers that depend on parameter {kind.parameter} goes into {by}"
        remark = "and PyPose uses its tangent as if it were the derivative by these numbers"
        todo = f"Make it by `pp.{group.lower()}(…).Exp()`, or keep it as a `pp.Parameter` of a LieTensor."
        return self._refusal(f"{what}, {remark}", todo)

    def _custom(self, kind: EdgeKind, by: str) -> NotDifferentiableError:
        what = f"a LieTensor that depends on parameter {kind.parameter} goes into {by} as raw storage"
        todo = "Call checkpoint with use_reentrant=False." if by == "CheckpointFunction" else _TODO
        return self._refusal(f"{what}, whose effect on it is not known", todo)

    def _refusal(self, what: str, todo: str) -> NotDifferentiableError:
        if self.twice:
            what = f"with create_graph=True, derivatives of the Jacobian would be wrong: in it, {what}"
            return NotDifferentiableError(f"{self.call}: {what}. Leave create_graph out; the Jacobian itself is right.")
        remark = "The gradient of that is not the derivative along PyPose's own update X <- Exp(d) X."
        return NotDifferentiableError(f"{self.call}: {what}. {remark} {todo}")

    def check_frozen(self) -> None:
        """Refuse to differentiate a Jacobian by what PyPose keeps out of its graph.

        Raises:
            NotDifferentiableError: An adjoint was applied whose element and vector both depend on parameters.
        """
        if self.frozen is not None:
            what = f"Adj of a LieTensor that depends on parameter {self.frozen.parameter} enters as a constant"
            raise replace(self, twice=True)._refusal(what, "")

    def mend(self, private: bool) -> None:
        """Let Log and Exp hand on exact gradients where PyPose's own figures are noticeably off.

        Args:
            private: No part of the graph is the caller's; where some is, a warning has to do.
        """
        for node in self.series:
            name, vectors = type(node)._forward_cls.__name__, node.saved_tensors[0].detach()
            eps = torch.finfo(vectors.dtype).eps
            # Corrected where three digits more than rounding are lost; with a warning where half of all are.
            exact = exact_series(name, vectors, noise=1000 * eps if private else eps**0.5)
            if exact is not None and private:
                node.register_hook(Mended(node, name, exact))
            elif exact is not None:
                warn(
                    f"{self.call}: PyPose's gradient of {name} is not exact here (a series cut off, or digits lost at "
                    "small angles), and the graph is partly the caller's, where it is not corrected."
                )


# ---- nodes -------------------------------------------------------------------------------------------------------


def _short(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name.rpartition("::")[2])


@restoring
def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Return the node that makes `tensor` (for a leaf: that takes its gradient) and which of its outputs it is."""
    with arithmetic(True), torch._C.DisableTorchFunctionSubclass():
        edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


@restoring
def _probe(node: Any, width: int) -> list[Tensor | None]:
    """Return what a copying node returns of cotangents `a ⊗ b`, with one `b` of this width for all elements."""
    seeds = [_seed(meta) if len(meta.shape) and meta.shape[-1] == width else None for meta in node._input_metadata]
    with arithmetic(False):
        grads = node(*seeds)
    return list(grads) if isinstance(grads, tuple) else [grads]


def _seed(meta: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = 1 + torch.rand(*meta.shape[:-1], 1, generator=generator, dtype=torch.float64)
    return (rows * _mark(meta.shape[-1])).to(meta.device, meta.dtype)


def _mark(width: int) -> Tensor:
    """Return the row by which the entries of an element are distinguished."""
    return torch.arange(1, width + 1, dtype=torch.float64).sqrt()


def _part_of(group: str, grad: Tensor, width: int) -> tuple[str, str]:
    """Return which part of an element's storage the marks came back in."""
    for (start, size), part in parts_of(group).items():
        if size == width and grad.shape[-1] == storage_width(group) and _is_marked(grad, start, width):
            return part
    return "", "numbers"


def _is_marked(grad: Tensor, start: int, width: int) -> bool:
    """Return whether every row of `grad` is a multiple of the mark from `start` on, and zero elsewhere."""
    rows = grad.reshape(-1, grad.shape[-1]).double()
    mark = rows.new_zeros(rows.shape[-1])
    mark[start : start + width] = _mark(width)
    left = rows - torch.outer(rows @ mark / (mark @ mark), mark)
    # Rounding is far less; a gradient that is no multiple of the mark is off by a share of 1.
    return bool((left.norm(dim=-1) <= 1e-2 * rows.norm(dim=-1)).all())


def _overwrites(node: Any, grads: Sequence[Tensor | None]) -> bool:
    """Return whether a write into a view copies: arithmetic in place hands on the entries that it changed."""
    base, sources = grads[0], [grad for grad in grads[1:] if grad is not None]
    if base is None:
        return True
    kept = base == _seed(node._input_metadata[0]).reshape(base.shape)
    nothing = bool(sources) and not any(grad.numel() for grad in sources)
    return bool((kept | (base == 0)).all()) and (nothing or not bool(kept.all()))
