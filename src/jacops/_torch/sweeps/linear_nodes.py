"""Backwards that are known to be linear in their cotangent with finite coefficients, whatever the cotangent is.

Where a forward's graph holds no other ones, so do the graphs of its derivatives, and pulling many slopes that were
recorded together is the same as pulling each alone. The list holds operations whose slopes of all orders are finite at
every finite input, and those that move entries. Division, roots, logarithms and norms are absent: their slopes are
infinite somewhere; so are layer and batch norm, whose kernels have no right derivative of third order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

_NAMES = """
    AccumulateGrad AdaptiveAvgPool1D AdaptiveAvgPool2D Add Addbmm Addcmul Addmm Addmv Addr Alias AsStrided AvgPool2D
    Baddbmm Bmm Cat Clone Col2Im ConstantPadNd Convolution Copy Cumsum Detach DiagEmbed Diagonal Dot Embedding Expand
    Flip Gather Im2Col Index IndexAdd IndexPut IndexPutImpl IndexSelect Lerp Linear MaskedFill MaskedScatter
    MaxPool2DWithIndices Mean Mm Mul Mv Narrow Neg Permute ReflectionPad1D ReflectionPad2D Repeat ReplicationPad1D
    ReplicationPad2D Reshape ReshapeAlias Roll Rsub Scatter ScatterAdd Select SelectScatter Slice SliceScatter Split
    SplitWithSizes Squeeze Stack Sub Sum T ToCopy Trace Transpose Tril Trilinear Triu Unbind Unfold UnsafeSplit
    UnsafeView Unsqueeze View Where
    Abs Asinh Atan Celu Cos Cosh Elu Erf Exp Exp2 Expm1 Gelu Hardswish Hardtanh LeakyRelu LogSigmoid LogSoftmax
    LogSoftmaxBackwardData Logsumexp NativeGroupNorm PreluKernel Relu Sgn Sigmoid Silu
    Sin Sinh Softmax SoftmaxBackwardData Softplus Tanh Threshold
"""
_LINEAR = frozenset(_NAMES.split())
_STACKING = ("Reshape", "Stack", "UnsafeView", "View")
_TAIL = re.compile(r"(Backward)*\d*$")
_known: dict[str, bool] = {}


def all_linear(nodes: Iterable[Any]) -> bool:
    """Return whether every node of a graph is known to be linear in its cotangent, with finite coefficients."""
    return all(is_linear(node) for node in nodes)


def first_slope(slopes: Iterable[Tensor]) -> Iterator[Any]:
    """Yield the nodes of the graph of the first slope in a stack of them, where hooks on the way show as nodes."""
    node = next((t.grad_fn for t in slopes if t.grad_fn is not None), None)
    while node is not None and node.name().startswith(_STACKING):
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    stack = [] if node is None else [node]
    seen = set(stack)
    while stack:
        yield (node := stack.pop())
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def has_fused_norm(nodes: Iterable[Any]) -> bool:
    """Return whether a graph holds a fused norm, whose derivatives beyond the second torch gets wrong."""
    return any("LayerNorm" in name or "BatchNorm" in name for name in (node.name() for node in nodes))


def has_fused_attention(nodes: Iterable[Any]) -> bool:
    """Say whether a graph holds attention by a fused kernel, whose backward has no derivative."""
    return any(node.name().startswith("ScaledDotProduct") for node in nodes)


def is_linear(node: Any) -> bool:
    """Return whether a node's backward is known to be linear in its cotangent, with finite coefficients."""
    if isinstance(node, BackwardCFunction):
        return False
    name = node.name()
    known = _known.get(name)
    if known is None:
        known = _known[name] = _TAIL.sub("", name.rpartition("::")[2]) in _LINEAR
    return known or (name == "PowBackward0" and _is_polynomial(node))


def _is_polynomial(node: Any) -> bool:
    exponent = getattr(node, "_saved_exponent", None)
    return isinstance(exponent, int | float) and exponent >= 0 and float(exponent).is_integer()
