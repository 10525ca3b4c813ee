"""LieTensors of PyPose (extra `pypose`): which of their derivatives are right, and how wide rows and columns are.

PyPose stores an element of a Lie group in one number more than it can move (SE3: 7 and 6). The backward passes of its
operations hand on the derivative along the update `X <- Exp(d) X`, padded with a zero to the width of storage; those
of torch hand on the derivative by the stored numbers. Both pass as "the gradient of X" and fit each other in shape, so
a graph in which the two meet is wrong without a word. Here the graph is walked from the parameters to the outputs, with
a note at every edge whether it carries group elements or plain numbers. Where they meet at an output the rows are
mended, since its value is at hand; where they meet further inside, the call is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..errors import NotDifferentiableError, warn

Blocks = list[list[Tensor]]

_OPERATIONS = "pypose.lietensor.operation"
_PARTS = {"SO3": (0, 0), "SE3": (1, 0), "RxSO3": (0, 1), "Sim3": (1, 1)}  # has a translation, has a scale
_ALGEBRAS = {name.lower(): name for name in _PARTS}
# What each operation takes: an element of its group (g) or plain numbers (p).
_TAKES = {"Log": "g", "Exp": "p", "Act": "gp", "Act4": "gp", "AdjXa": "gp", "AdjTXa": "gp", "Mul": "gg", "Inv": "g"}
_GIVES_GROUP = ("Exp", "Mul", "Inv")
# Nodes that copy entries without changing them; whether whole elements stay whole is probed.
_COPIES = "torch::autograd::CopySlices"
_MOVES = {_COPIES, "torch::autograd::CopyBackwards", "CopyBackwards"} | {
    f"{name}Backward{i}"
    for i in range(3)
    for name in [
        "Alias",
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "AsStrided",
        "Clone",
        "ToCopy",
        "Expand",
        "Repeat",
        "Unsqueeze",
        "Squeeze",
        "Select",
        "Slice",
        "Split",
        "SplitWithSizes",
        "Unbind",
        "UnsafeSplit",
        "UnsafeSplitWithSizes",
        "Index",
        "IndexSelect",
        "Gather",
        "MaskedSelect",
        "Take",
        "Permute",
        "Transpose",
        "T",
        "Flip",
        "Roll",
        "Diagonal",
        "Unfold",
        "Cat",
        "Stack",
        "Where",
        "IndexPut",
        "IndexPutImpl",
        "IndexCopy",
        "Scatter",
        "SelectScatter",
        "SliceScatter",
        "MaskedScatter",
    ]
}
_SERIES_NOISE = 1e-6
_TODO = "Use Act, Log, matrix() or rotation().matrix(), whose derivatives are right."
_TODOS = {
    "translation": "`X.Act(torch.zeros(3))` gives these numbers with the right derivative (mind the dtype).",
    "scale": "`X.Log().tensor()[..., -1:].exp()` gives these numbers with the right derivative.",
    "AdjT": "`X.Inv().Adj(a)` gives these numbers with the right derivative.",
    "made": "Make it by `pp.so3(…).Exp()` (or se3, sim3, rxso3), or keep it as a `pp.Parameter` of a LieTensor.",
    "hidden": "Call checkpoint with use_reentrant=False.",
}


def layout(recorded: Any, tangent: bool) -> Callable[[Blocks], Blocks] | None:
    """Return what turns blocks `(output entries, *leaf)` into their final shapes; None where no LieTensor is involved.

    Rows of a group-valued LieTensor output are those of `Log(f(x + dx) f(x)⁻¹)`, columns of a group-valued parameter
    those of `d` in `Exp(d) X`. Both are padded with a zero to the width of storage, or not if `tangent`. Rows of any
    other output, `.tensor()` of a LieTensor among them, are those of its numbers.

    Args:
        recorded: The linearisation point.
        tangent: Leave the padding out.

    Raises:
        NotDifferentiableError: PyPose's derivative is wrong for how the function uses a LieTensor; the message names
            the operation and the parameter.
    """
    if "pypose" not in sys.modules:
        return None
    from pypose import LieTensor

    tape = recorded.tape
    named = {f"{group}_{verb}" for pair in _ALGEBRAS.items() for group in pair for verb in _TAKES}
    if not any(isinstance(t, LieTensor) for t in (*tape.leaves, *tape.outputs)) and named.isdisjoint(
        tape.survey.functions
    ):
        return None
    walk = Walk.over(tape)
    kinds = walk.kinds(tape.outputs)
    for kind, output in zip(kinds, tape.outputs, strict=True):
        walk.check_output(kind, output)
    walk.warn_of_series()

    def laid_out(blocks: Blocks) -> Blocks:
        done = [
            [_block(b, output, leaf, kind, tangent) for b, leaf in zip(row, tape.leaves, strict=True)]
            for row, output, kind in zip(blocks, tape.outputs, kinds, strict=True)
        ]
        _check_twice(tape, [block for row in done for block in row if block.requires_grad])
        return done

    return laid_out


# ---- rows and columns --------------------------------------------------------------------------------------------


def group_of(tensor: Tensor) -> str:
    """Return the name of the group a LieTensor is in, empty for algebras and plain tensors."""
    ltype = getattr(tensor, "ltype", None)
    name = type(ltype).__name__.removesuffix("Type")
    return name if name in _PARTS and tensor.shape[-1:] == ltype.dimension else ""


def _widths(group: str) -> tuple[int, int]:
    """Return the widths of storage and tangent."""
    translation, scale = _PARTS[group]
    return 3 * translation + 4 + scale, 3 * translation + 3 + scale


def _block(block: Tensor, output: Tensor, leaf: Tensor, kind: Kind | None, tangent: bool) -> Tensor:
    block = block.reshape(*output.shape, *leaf.shape)
    if group := group_of(leaf):
        block = _kept(block, -1, group, tangent)
    own, carried = group_of(output), kind.group if kind is not None else ""
    if own and (carried or kind is None):
        return _kept(block, output.ndim - 1, own, tangent)
    if own or carried:
        return _mended(block, output if block.requires_grad else output.detach(), own, carried, tangent)
    return block


def _kept(block: Tensor, axis: int, group: str, tangent: bool) -> Tensor:
    """Return a block without the padding along an axis, or with zeros there."""
    width, free = _widths(group)
    kept = block.narrow(axis, 0, free)
    return kept if tangent else torch.cat([kept, torch.zeros_like(block.narrow(axis, free, width - free))], axis)


def _mended(block: Tensor, output: Tensor, own: str, carried: str, tangent: bool) -> Tensor:
    """Return rows of numbers from tangent ones, or the other way round, by what `d` in `Exp(d) X` does to storage."""
    width, free = _widths(own or carried)
    poses = output.as_subclass(Tensor).reshape(-1, width)
    map_out = storage_jacobian(own or carried, poses).to(block.dtype)
    rows = block.reshape(len(poses), width, block.shape[output.ndim :].numel())
    rows = torch.linalg.pinv(map_out) @ rows if own else map_out @ rows[:, :free]
    rows = rows.reshape(*output.shape[:-1], -1 if rows.numel() else rows.shape[1], *block.shape[output.ndim :])
    if not own or tangent:
        return rows
    padding = torch.zeros_like(rows.narrow(output.ndim - 1, 0, width - free))
    return torch.cat([rows, padding], output.ndim - 1)


def storage_jacobian(group: str, poses: Tensor) -> Tensor:
    r"""Return how the stored numbers of `poses` move with $d$ in $\exp(d) X$ at $d = 0$, (n, width, tangent).

    With $d = (\rho, \varphi, \sigma)$ as far as the group has them: $\dot t = \rho + \varphi \times t + \sigma t$,
    $\dot q = \tfrac12 \varphi \otimes q$, $\dot s = \sigma s$.
    """
    translation, scale = _PARTS[group]
    _, free = _widths(group)
    at = 3 * translation
    d = torch.eye(free, dtype=poses.dtype, device=poses.device).expand(len(poses), free, free)
    poses = poses.unsqueeze(1).expand(-1, free, -1)
    turn, grow = d[..., at : at + 3], d[..., -1:] * scale
    vector, real = poses[..., at : at + 3], poses[..., at + 3 : at + 4]
    parts = []
    if translation:
        parts.append(d[..., :3] + torch.linalg.cross(turn, poses[..., :3]) + grow * poses[..., :3])
    parts.append((turn * real + torch.linalg.cross(turn, vector)) / 2)
    parts.append(-(turn * vector).sum(-1, keepdim=True) / 2)
    if scale:
        parts.append(grow * poses[..., -1:])
    return torch.cat(parts, -1).mT


# ---- the walk ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What an edge carries on its way from a parameter; edges that no parameter reaches have none.

    Attributes:
        parameter: One parameter it comes from.
        group: Name of the group whose elements these are, in storage; empty for plain numbers.
        part: Part of an element's storage, with no right derivative; empty for all else.
    """

    parameter: str
    group: str = ""
    part: str = ""


@dataclass
class Walk:
    """One walk over a recorded graph.

    Attributes:
        subject: How messages begin.
        sources: Kinds of the edges that are parameters.
        series: Nodes of Log and Exp that were passed, whose derivatives PyPose sums up numerically.
        tolerance: Relative errors that are no news.
    """

    subject: str
    sources: dict[tuple[Any, int], Kind]
    tolerance: float
    series: list[Any] = field(default_factory=list)

    @classmethod
    def over(cls, tape: Any, remark: str = "") -> Walk:
        """Return a walk from the leaves of a tape."""
        leaves = [
            *zip(tape.domain.names, tape.leaves, strict=True),
            *((tape.domain.names[i], t) for i, t in tape.twins),
        ]
        sources = {_edge(t): Kind(name, group_of(t)) for name, t in leaves if t.requires_grad}
        return cls(tape.call + remark, sources, max(tape.tolerance, _SERIES_NOISE))

    def kinds(self, tensors: Iterable[Tensor]) -> list[Kind | None]:
        """Return what each tensor carries.

        Raises:
            NotDifferentiableError: On the way there group elements and plain numbers meet.
        """
        edges = [_edge(t) if t.requires_grad else (None, 0) for t in tensors]
        known: dict[Any, list[Kind | None]] = {None: [None]}
        ends = {node for node, _ in self.sources}
        for node in _parents_first([node for node, _ in edges if node is not None], ends):
            if node in ends:
                known[node] = [self.sources.get((node, i)) for i in range(len(node._input_metadata))]
            else:
                known[node] = self._through(node, [known[parent][i] for parent, i in _parents(node)])
        return [known[node][i] for node, i in edges]

    def _through(self, node: Any, inputs: list[Kind | None]) -> list[Kind | None]:
        many = len(node._input_metadata)
        met = [kind for kind in inputs if kind is not None]
        if not met:
            return [None] * many
        forward = getattr(type(node), "_forward_cls", None)
        if forward is not None and forward.__module__ == _OPERATIONS:
            return [self._operation(node, forward.__name__, inputs)]
        special = next((kind for kind in met if kind.group or kind.part), None)
        if special is None:
            return [met[0]] * many
        if special.part or node.name() not in _MOVES:
            raise self._raw_read(special, node.name())
        return self._moved(node, inputs)

    def _operation(self, node: Any, name: str, inputs: Sequence[Kind | None]) -> Kind:
        """Return what an operation of PyPose makes of its inputs."""
        prefix, _, verb = name.partition("_")
        group = _ALGEBRAS.get(prefix, prefix)
        met = [(kind, takes) for kind, takes in zip(inputs, _TAKES.get(verb, ""), strict=True) if kind is not None]
        if verb == "AdjTXa" and _PARTS[group][0]:
            raise self._refusal(
                met[0][0], f"goes through {group}.AdjT", "whose backward pass is wrong in PyPose", "AdjT"
            )
        for kind, takes in met:
            if kind.part or (kind.group and kind.group != (group if takes == "g" else "")):
                raise self._raw_read(kind, name)
            if takes == "g" and not kind.group:
                raise self._refusal(
                    kind,
                    f"is made into the {group} that {name} uses, out of plain numbers",
                    "where PyPose hands on a tangent as if it were the derivative by these numbers",
                    "made",
                )
        if verb in ("Log", "Exp"):
            self.series.append(node)
        return Kind(met[0][0].parameter, group if verb in _GIVES_GROUP else "")

    def _moved(self, node: Any, inputs: Sequence[Kind | None]) -> list[Kind | None]:
        """Return what outputs of a copying node carry: whole elements, a subgroup's elements, or parts of them."""
        widths = [meta.shape[-1] if len(meta.shape) else 0 for meta in node._input_metadata]
        found = {width: self._moved_at(node, inputs, width) for width in set(widths)}
        return [found[width] for width in widths]

    def _moved_at(self, node: Any, inputs: Sequence[Kind | None], width: int) -> Kind:
        grads = _probe(node, width)
        first = next(kind for kind in inputs if kind is not None and kind.group)
        seen: set[tuple[str, str]] = set()
        for kind, grad in zip(inputs, grads, strict=True):
            if kind is not None and not kind.group:
                raise self._raw_read(first, f"{node.name()} with plain numbers of parameter {kind.parameter}")
            if kind is not None and grad is not None:
                seen.add(_part_of(kind.group, grad, width))
        if len(seen) != 1 or (node.name() == _COPIES and not _overwrites(node, grads, width)):
            return replace(first, group="", part=node.name())
        ((group, part),) = seen
        return Kind(first.parameter, group, part and f"{first.group}.{part}")

    # ---- what is wrong -------------------------------------------------------------------------------------------

    def check_output(self, kind: Kind | None, output: Tensor) -> None:
        """Refuse an output whose rows cannot be mended.

        Raises:
            NotDifferentiableError: It is part of an element's storage, or an element of another group than it says.
        """
        own = group_of(output)
        if kind is not None and (kind.part or (own and kind.group not in ("", own))):
            raise self._raw_read(kind, "the output")
        if kind is not None and kind.group and output.shape[-1] != _widths(kind.group)[0]:
            raise self._raw_read(kind, "the output")

    def _raw_read(self, kind: Kind, by: str) -> NotDifferentiableError:
        by = by.removeprefix("torch::autograd::").removesuffix("Backward0").removesuffix("Backward")
        group, _, part = kind.part.partition(".")
        if part in _TODOS:
            return self._refusal(kind, f"is read by {group}.{part}()", f"whose numbers go into {by}", part)
        if by == "CheckpointFunction":
            return self._refusal(kind, "goes through a reentrant checkpoint", "which hides how it is used", "hidden")
        how = f"{kind.part.removesuffix('Backward0')} and {by}" if kind.part else by
        return self._refusal(
            kind, f"is read as raw storage by {how}", "as after .tensor(), .euler() or by arithmetic on it", ""
        )

    def _refusal(self, kind: Kind, what: str, remark: str, todo: str) -> NotDifferentiableError:
        return NotDifferentiableError(
            f"{self.subject}: a LieTensor that depends on parameter {kind.parameter} {what}, {remark}. "
            "PyPose's derivative of that "
            f"is not the one along its own update X <- Exp(d) X. {_TODOS.get(todo, _TODO)}"
        )

    def warn_of_series(self) -> None:
        """Warn if PyPose's own figures for the derivative of a Log or an Exp on the way are noticeably off."""
        worst: dict[str, float] = {}
        for node in self.series:
            name = type(node)._forward_cls.__name__.replace("_", ".")
            worst[name] = max(worst.get(name, 0.0), _series_error(name, node.saved_tensors[0]))
        for name, error in worst.items():
            if error > self.tolerance:
                warn(
                    f"{self.subject}: PyPose's derivative of {name} is off by {error:.0e} of its size at this "
                    "point, and the "
                    "Jacobian with it (PyPose cuts off the series for Sim3, and loses digits at small angles for SE3)."
                )


def _check_twice(tape: Any, blocks: Sequence[Tensor]) -> None:
    """Refuse `create_graph` where the Jacobian itself is made of raw storage, which its own derivatives would get wrong.

    Raises:
        NotDifferentiableError: It is; the message names the operation.
    """
    if blocks:
        walk = Walk.over(tape, ": with create_graph=True, the Jacobian itself would be differentiated wrongly")
        for kind in walk.kinds(blocks):
            if kind is not None and (kind.group or kind.part):
                raise walk._raw_read(kind, "the Jacobian")


def _series_error(name: str, vectors: Tensor) -> float:
    """Return the largest relative error of PyPose's Jacobian of Log or Exp at tangent vectors."""
    from pypose.lietensor import operation

    vectors = vectors.detach().reshape(-1, vectors.shape[-1])
    if not len(vectors):
        return 0.0
    algebra, _, verb = name.lower().partition(".")
    theirs = getattr(operation, f"{algebra}_Jl" + ("_inv" if verb == "log" else ""))(vectors).double()
    bracket = getattr(operation, f"{algebra}_adj")(vectors.double())
    # The left Jacobian is the sum of ad(x)^k / (k + 1)!, a corner of the exponential of a block matrix.
    size = bracket.shape[-1]
    corner = torch.nn.functional.pad(bracket, (0, size, 0, size))
    corner[:, :size, size:] = torch.eye(size, dtype=corner.dtype, device=corner.device)
    right = torch.linalg.matrix_exp(corner)[:, :size, size:]
    right = torch.linalg.inv(right) if verb == "log" else right
    return float(((theirs - right).norm(dim=(1, 2)) / right.norm(dim=(1, 2))).max())


# ---- nodes -------------------------------------------------------------------------------------------------------


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Return the node that makes `tensor` (for a leaf: that takes its gradient) and which of its outputs it is."""
    with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _parents(node: Any) -> list[tuple[Any, int]]:
    return [(parent, i if parent is not None else 0) for parent, i in node.next_functions]


def _parents_first(nodes: Iterable[Any], ends: set[Any]) -> list[Any]:
    """Return all nodes behind `nodes`, each after the ones it was computed from; `ends` are not looked behind."""
    order, seen, stack = [], set(), [(node, False) for node in nodes]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if node not in ends:
                stack.extend(
                    (parent, False) for parent, _ in _parents(node) if parent is not None and parent not in seen
                )
    return order


def _probe(node: Any, width: int) -> list[Tensor | None]:
    """Return what a copying node hands back of cotangents `a ⊗ b`, with one `b` of this width for all elements."""
    seeds = []
    for meta in node._input_metadata:
        fits = len(meta.shape) and meta.shape[-1] == width
        seeds.append(_seed(meta.shape, meta.dtype, meta.device) if fits else None)
    with torch.inference_mode(False), torch.no_grad():
        grads = node(*seeds)
    return list(grads) if isinstance(grads, tuple) else [grads]


def _seed(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = 1 + torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64)
    return (rows * _mark(shape[-1], rows)).to(device, dtype)


def _mark(width: int, like: Tensor) -> Tensor:
    """Return the row by which entries of an element are told apart."""
    return torch.arange(1, width + 1, dtype=like.dtype, device=like.device).sqrt()


def _part_of(group: str, grad: Tensor, width: int) -> tuple[str, str]:
    """Return which part of an element's storage came back: `(group, "")` of a subgroup, or `("", name)`."""
    translation, scale = _PARTS[group]
    at, storage = 3 * translation, _widths(group)[0]
    parts = {(0, storage): (group, ""), (at, 4): ("SO3", "")}
    if translation and scale:
        parts[at, 5] = "RxSO3", ""
    if translation:
        parts[0, 3] = "", "translation"
    if scale:
        parts[at + 4, 1] = "", "scale"
    for (start, size), name in parts.items():
        if size == width and _is_marked(grad, start, width):
            return name
    return "", "tensor"


def _is_marked(grad: Tensor, start: int, width: int) -> bool:
    """Say whether every row of `grad` is a multiple of the mark from `start` on, and zero elsewhere."""
    rows = grad.reshape(-1, grad.shape[-1]).float()
    mark = rows.new_zeros(rows.shape[-1])
    mark[start : start + width] = _mark(width, rows)
    left = rows - torch.outer(rows @ mark / (mark @ mark), mark)
    return bool((left.norm(dim=-1) <= 1e-2 * rows.norm(dim=-1)).all())


def _overwrites(node: Any, grads: Sequence[Tensor | None], width: int) -> bool:
    """Say whether a write into a view copies: arithmetic in place would hand on the entries that it changed."""
    base, sources = grads[0], [grad for grad in grads[1:] if grad is not None]
    if base is None:
        return True
    meta = node._input_metadata[0]
    seed = _seed(meta.shape, meta.dtype, meta.device).reshape(base.shape)
    untouched = bool(((base == 0) | (base == seed)).all())
    return untouched and (bool((base == 0).any()) or (bool(sources) and not any(g.numel() for g in sources)))
