"""Where parameters enter a recorded graph, and what multiplies them there.

A row of a parameter Jacobian never needs a sweep down to the parameter. Where a weight enters by `z = W a`, the
gradient of anything by `W` is the cotangent at `z` times `a`, sample by sample (Goodfellow, 2015). The graph itself
says where that happens: each node that a leaf leads into is one `Use`, whoever wrote the forward (a layer, a
functional call, the projections inside attention, a weight used twice). A leaf with a use that no rule covers is left
to ordinary sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..._runtime.contexts import sweeping
from ..._runtime.restoring import restoring
from ..sweeps.linearization import Linearization
from .part import slices

Kind = Literal["outer", "lookup", "vector"]

_TURNED = 2**19  # bytes of patches that are turned at once: they stay in a near cache


@dataclass(frozen=True)
class Rule:
    """How cotangents at an operation's output become gradients by a leaf.

    Attributes:
        kind: How they are put together; see `Use`.
        operand: The operation's saved tensors -> what multiplies the leaf, with its graph.
        rows: Operation, cotangent, leaf and operand -> one entry per sample and position along the first axis.
    """

    kind: Kind
    operand: Callable[[Any], Tensor | None]
    rows: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class ParameterUse:
    """One place where a leaf enters.

    With R rows, which are samples times positions (tokens, pixels), the gradient by the leaf is

    - `"outer"`: the sum of `delta[r, g] outer operand[r, g]`, delta `(R, g, out)` and operand `(R, g, in)` in g groups;
    - `"lookup"`: `delta[r]` added to row `operand[r]` of the table, delta `(R, width)`, operand `(R,)`;
    - `"vector"`: the sum of `delta[r]`, shaped as the leaf.

    Attributes:
        leaf: Which of the linearization's leaves.
        kind: Which of the three.
        node: The operation; `edge` is its output, where cotangents are asked for.
        turned: The leaf is the transposed sum of outer products.
        shape: Of the operation's output; of the sum's where there is one.
        sum: The sum that repeats the operation's output for all samples (positions added to tokens), if there is one:
            cotangents are asked for at its output, where samples are still apart.
    """

    leaf: int
    kind: Kind
    node: Any
    turned: bool
    shape: torch.Size
    _rule: Rule
    _tensor: Tensor
    sum: Any = None

    @property
    def edge(self) -> GradientEdge:
        """Where cotangents are asked for."""
        return GradientEdge(self.node if self.sum is None else self.sum, 0)

    @cached_property
    def attached(self) -> Tensor | None:
        """What multiplies the leaf, `(R, …)`, with its graph."""
        return self._rule.operand(self.node)

    @cached_property
    @restoring
    def operand(self) -> Tensor | None:
        """What multiplies the leaf, `(R, …)`, as numbers."""
        with torch.no_grad():
            found = self._rule.operand(self.node)
            if found is not None and self.sum is not None:
                found = found.repeat(self.shape[:-1].numel() // found.shape[0])
            return None if found is None else found.detach()

    @property
    def dtype(self) -> torch.dtype:
        """Of the leaf and of the operation's output."""
        return self._tensor.dtype

    def pixels(self, delta: Tensor) -> Tensor:
        """Return a cotangent at a convolution's output as `(samples, positions, g, out)`, not copied."""
        return _by_pixel(self.node, delta)

    @restoring
    def patches(self) -> Tensor:
        """Return a convolution's operand as `(samples, positions, g, in)`."""
        with torch.no_grad():
            return _by_patch(self.node).detach()

    @property
    def patch_bytes(self) -> int:
        """Bytes of a convolution's patches, before there are any; 0 elsewhere."""
        if self._rule.rows is not _pixels:
            return 0
        inner = int(self.node._saved_groups) * self._tensor.shape[1:].numel()
        return self.shape[0] * self.shape[2:].numel() * inner * self.dtype.itemsize

    def rows(self, delta: Tensor, attached: bool = False) -> Tensor:
        """Return a cotangent at the operation's output as rows `(R, …)` of what `kind` says."""
        # Rules of outer products and lookups give delta back: only vectors are multiplied here.
        factor = (self.attached if attached else self.operand) if self.kind == "vector" else None
        return self._rule.rows(self.node, delta, self._tensor, factor)

    def entries(self) -> Tensor:
        """Return for `"vector"` which entry of the leaf enters where, `(*shape)`: broadcasting, as numbers."""
        numbers = torch.arange(self._tensor.numel(), device=self._tensor.device).view(self._tensor.shape)
        if self._rule.rows is _channels:
            numbers = numbers.view(-1, *[1] * (len(self.shape) - 2))
        return numbers.expand(self.shape)


# ---- rules: a node's saved tensors -> operand; a cotangent at its output -> rows ----------------------------------


def _trailing(node: Any, delta: Tensor, leaf: Tensor, operand: Tensor | None) -> Tensor:
    """Return `(R, *leaf)` where the leaf broadcast along leading axes, and along its own axes of length one."""
    lead = _leading(delta.shape, leaf.shape)
    flat = delta.flatten(0, lead - 1)
    flat = flat if operand is None else flat * operand.reshape(-1, *operand.shape[lead:])
    inner = leaf.shape[leaf.ndim - (delta.ndim - lead) :]
    summed = [i + 1 for i, size in enumerate(inner) if size == 1 != flat.shape[i + 1]]
    return (flat.sum(summed, keepdim=True) if summed else flat).reshape(-1, *leaf.shape)


def _leading(output: Sequence[int], leaf: Sequence[int]) -> int:
    """Return how many leading axes of an operation's output a leaf knows nothing of."""
    lead = len(output) - len(leaf)
    return lead if lead > 0 else int(lead == 0 and len(leaf) > 0 and leaf[0] == 1)


def _channels(node: Any, delta: Tensor, leaf: Tensor, operand: Tensor | None) -> Tensor:
    value = delta if operand is None else delta * operand
    return value.flatten(2).sum(2) if value.ndim > 2 else value


def _patches(node: Any) -> Tensor:
    """Return the patches under a convolution's kernel, `(n * positions, groups, in)`."""
    return _by_patch(node).flatten(0, 1)


def _by_patch(node: Any) -> Tensor:
    a, kernel = node._saved_input, tuple(node._saved_weight.shape[2:])
    dilation, padding, stride = (
        tuple(int(i) for i in s) for s in (node._saved_dilation, node._saved_padding, node._saved_stride)
    )
    if len(kernel) == 1:
        a, kernel, dilation, padding, stride = a.unsqueeze(2), (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
    if torch.is_grad_enabled() and a.requires_grad:
        patches = F.unfold(a, kernel, dilation=dilation, padding=padding, stride=stride).transpose(1, 2)
    else:
        patches = _windows(a, kernel, dilation, padding, stride)
    return patches.unflatten(2, (int(node._saved_groups), -1))


def _windows(
    a: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...], padding: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    """Return `(samples, positions, in)`: long runs copied first, which `F.unfold` does not, and then turned."""
    a = F.pad(a, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else a
    for axis in (0, 1):
        a = a.unfold(axis + 2, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
    a = a[..., :: dilation[0], :: dilation[1]].permute(0, 1, 4, 5, 2, 3)
    inner, positions = a.shape[1:4].numel(), a.shape[4:].numel()
    found = a.new_empty(a.shape[0], positions, inner)
    for some in slices(a.shape[0], inner * positions * a.element_size(), _TURNED):
        found[some] = a[some].reshape(-1, inner, positions).transpose(1, 2)
    return found


def _pixels(node: Any, delta: Tensor, leaf: Tensor, operand: Tensor | None) -> Tensor:
    return _by_pixel(node, delta).flatten(0, 1)


def _by_pixel(node: Any, delta: Tensor) -> Tensor:
    return delta.flatten(2).transpose(1, 2).unflatten(2, (int(node._saved_groups), -1))


def _looked_up(node: Any, delta: Tensor, leaf: Tensor, operand: Tensor | None) -> Tensor:
    """Return `(R, width)`, zero where the entry that stands for padding was looked up."""
    padding = int(node._saved_padding_idx)
    padding = padding if padding < 2**63 else -1  # "none" comes back as an unsigned number
    rows, indices = delta.flatten(0, -2), node._saved_indices.flatten()
    kept = (indices != padding).to(delta.dtype).repeat(rows.shape[0] // max(1, indices.numel()))
    return rows * kept.unsqueeze(1)


def _standardised(node: Any) -> Tensor:
    """Return a normalisation's input with the mean taken off and the spread divided out."""
    a, name = node._saved_input, node.name()
    if name == "NativeLayerNormBackward0":
        return _normal(a, node._saved_result1, node._saved_result2, len(node._saved_normalized_shape))
    if name == "NativeGroupNormBackward0":
        grouped = a.reshape(a.shape[0], int(node._saved_group), -1)
        return _normal(grouped, node._saved_result1.unsqueeze(2), node._saved_result2.unsqueeze(2), 1).reshape(a.shape)
    axes = (1, -1, *[1] * (a.ndim - 2))
    spread = (node._saved_running_var + node._saved_eps).rsqrt()
    return (a - node._saved_running_mean.view(axes)) * spread.view(axes)


def _normal(a: Tensor, mean: Tensor, spread: Tensor, axes: int) -> Tensor:
    """Return `(a - mean) * spread`; what was saved leads nowhere, so a graph goes by definitions."""
    mean, spread, over = mean.detach(), spread.detach(), tuple(range(-axes, 0))
    if torch.is_grad_enabled() and a.requires_grad:
        moving, variance = a.mean(over, keepdim=True), a.var(over, correction=0, keepdim=True)
        mean, spread = moving, (spread**-2 + (variance - variance.detach())) ** -0.5
    return (a - mean) * spread


_BIAS = Rule("vector", lambda node: None, _trailing)
_OFFSET = Rule("vector", lambda node: None, _channels)
_GAIN = Rule("vector", _standardised, _channels)
_RULES: dict[tuple[str, int], Rule] = {
    ("AddmmBackward0", 0): _BIAS,
    ("AddBackward0", 0): _BIAS,
    ("AddBackward0", 1): _BIAS,
    ("MulBackward0", 0): Rule("vector", lambda node: node._saved_other, _trailing),
    ("MulBackward0", 1): Rule("vector", lambda node: node._saved_self, _trailing),
    ("AddmmBackward0", 2): Rule("outer", lambda node: node._saved_mat1.unsqueeze(1), lambda *a: a[1].unsqueeze(1)),
    ("MmBackward0", 1): Rule("outer", lambda node: node._saved_self.unsqueeze(1), lambda *a: a[1].unsqueeze(1)),
    ("ConvolutionBackward0", 1): Rule("outer", _patches, _pixels),
    ("ConvolutionBackward0", 2): _OFFSET,
    ("EmbeddingBackward0", 0): Rule("lookup", lambda node: node._saved_indices.flatten(), _looked_up),
    ("NativeLayerNormBackward0", 1): Rule("vector", _standardised, _trailing),
    ("NativeLayerNormBackward0", 2): _BIAS,
    ("NativeGroupNormBackward0", 1): _GAIN,
    ("NativeGroupNormBackward0", 2): _OFFSET,
    ("NativeBatchNormBackward0", 1): _GAIN,
    ("NativeBatchNormBackward0", 2): _OFFSET,
}
_TURNS = ("TBackward0", "TransposeBackward0")


def find_uses(lin: Linearization, repeated: bool = False) -> dict[int, list[ParameterUse]]:
    """Return the uses of every leaf all of whose uses have a rule, by the leaf's index.

    A leaf that is missing enters in some other way; a leaf with an empty list does not enter at all.

    Args:
        lin: What was recorded.
        repeated: Look for cotangents behind sums that repeat what was looked up for all samples.
    """
    if lin.aliased_leaves or lin.graph_info.reentrant or lin.graph_info.functions:
        return {}
    index = {id(leaf): i for i, leaf in enumerate(lin.leaves)}
    found: dict[int, list[ParameterUse]] = {i: [] for i in range(len(lin.leaves))}
    for i, leaf in enumerate(lin.leaves):
        if any(leaf is output for output in lin.outputs):
            del found[i]
    turns = {
        node: index[id(node.next_functions[0][0].variable)]
        for node in lin.graph_info.nodes
        if _turns(node) and id(getattr(node.next_functions[0][0], "variable", None)) in index
    }
    for node in lin.graph_info.nodes:
        for place, (parent, _) in enumerate(node.next_functions):
            leaf = turns.get(parent, index.get(id(getattr(parent, "variable", None))))
            if leaf is None or node in turns or leaf not in found:
                continue
            use = _use(lin, node, place, leaf, through_turn=parent in turns)
            if use is None:
                del found[leaf]
            else:
                found[leaf].append(use)
    if repeated:
        sums = _sums(lin, [use for uses in found.values() for use in uses if use.kind == "lookup"])
        found = {leaf: [_behind(use, sums.get(use.node)) for use in uses] for leaf, uses in found.items()}
    for uses in found.values():
        uses.sort(key=lambda use: use.node._sequence_nr())  # the same order in every run
    return found


def _sums(lin: Linearization, uses: Iterable[ParameterUse]) -> dict[Any, Any]:
    """Return the sum that each use leads into, where that is all it leads into."""
    ends = {output.grad_fn for output in lin.outputs}
    looked_up = {use.node for use in uses if use.node not in ends}
    into: dict[Any, list[Any]] = {node: [] for node in looked_up}
    for node in lin.graph_info.nodes if looked_up else ():
        for parent, _ in node.next_functions:
            if parent in looked_up:
                into[parent].append(node)
    return {node: after[0] for node, after in into.items() if len(after) == 1 and after[0].name() == "AddBackward0"}


def _behind(use: ParameterUse, after: Any) -> ParameterUse:
    """Return a use with its cotangents taken behind a sum that repeats its output along the first axis."""
    if after is None or int(after._saved_alpha) != 1:
        return use
    whole = torch.Size(int(size) for size in after._input_metadata[0].shape)
    many = whole[0] if len(whole) else 0
    repeats = many > 1 and use.shape in (whole[1:], torch.Size((1, *whole[1:])))
    return replace(use, shape=whole, sum=after) if repeats else use


def _turns(node: Any) -> bool:
    """Say whether an operation transposes a matrix."""
    dims = getattr(node, "_saved_dims", ()) if node.name() == "PermuteBackward0" else ()
    return node.name() in _TURNS or [int(dim) % 2 for dim in dims] == [1, 0]  # -1 comes back as an unsigned number


def _use(lin: Linearization, node: Any, place: int, leaf: int, through_turn: bool) -> ParameterUse | None:
    rule, tensor = _RULES.get((node.name(), place)), lin.leaves[leaf]
    if rule is None or (rule.kind == "vector" and through_turn) or type(tensor) not in (Tensor, torch.nn.Parameter):
        return None
    turned = rule.kind == "outer" and "Convolution" not in node.name() and not through_turn
    meta = node._input_metadata[0]
    shape = torch.Size(int(size) for size in meta.shape)
    plainly = meta.dtype == tensor.dtype and not tensor.is_complex() and len(shape) > 0
    if not plainly or not _is_plain(node, rule, shape, tensor):
        return None
    return ParameterUse(leaf, rule.kind, node, turned, shape, rule, tensor)


def _is_plain(node: Any, rule: Rule, shape: torch.Size, leaf: Tensor) -> bool:
    """Say whether an operation is the one its rule describes: no factors, no transposition, values unspoiled."""
    name = node.name()
    if any(getattr(node, f"_saved_{factor}", 1) != 1 for factor in ("alpha", "beta")):
        return False
    if name == "ConvolutionBackward0":
        padding = [int(p) for p in node._saved_output_padding]
        if node._saved_transposed or any(padding) or leaf.ndim not in (1, 3, 4) or len(shape) not in (3, 4):
            return False
    if name == "EmbeddingBackward0" and node._saved_scale_grad_by_freq:
        return False
    if name == "NativeBatchNormBackward0" and (node._saved_training or node._saved_running_mean is None):
        return False
    if rule.rows is _trailing and _leading(shape, leaf.shape) == 0:
        return False
    try:  # what is costly to compute is not looked at but at what it is computed from
        operand = node._saved_input if rule.operand in (_patches, _standardised) else rule.operand(node)
    except RuntimeError:  # a saved tensor was written into since
        return False
    if operand is not None and operand.layout is not torch.strided:
        return False
    if rule.kind == "vector" and name == "MulBackward0":
        return operand is not None and operand.shape == shape
    return rule.kind == "vector" or (
        operand is not None
        and type(operand) is Tensor
        and (not operand.is_floating_point() or operand.dtype == leaf.dtype)
    )


@restoring
def cotangents(
    lin: Linearization,
    uses: Sequence[ParameterUse],
    seeds: Sequence[Tensor],
    create_graph: bool = False,
    batched: bool = False,
) -> tuple[Tensor, ...]:
    """Return the cotangents at the outputs of all uses, by one sweep that forms no gradient of a leaf."""
    if not uses:
        return ()
    live = [(output, seed) for output, seed in zip(lin.outputs, seeds, strict=True) if output.requires_grad]
    edges = {use.node: use.edge for use in uses}  # a weight and its bias enter together
    with sweeping(lin.outputs[0]):
        found = torch.autograd.grad(
            [output for output, _ in live],
            list(edges.values()),
            [seed for _, seed in live],
            retain_graph=True,
            create_graph=create_graph,
            is_grads_batched=batched,
            materialize_grads=True,
        )
    by_node = dict(zip(edges, found, strict=True))
    return tuple(by_node[use.node] for use in uses)
