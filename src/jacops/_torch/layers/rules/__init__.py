"""Rules for the operations that parameters enter: one file for each family, one table for all.

A rule is found by an operation's name in the graph and the place among its inputs at which a parameter arrives.
"""

from __future__ import annotations

from .bilinear import Trilinear
from .convolution import Convolution
from .embedding import Embedding, repeating_sums
from .linear import BatchedProduct, MatrixProduct
from .normalisation import BatchGain, BatchOffset, GroupGain, LayerGain
from .parametrised import derived, passed_on, pulled_back
from .rule import Entry, Kind, Order, RowLayout, Rule, by_sample, output_shape, refusal
from .scale import Broadcast, ByChannel, Slope

__all__ = [
    "RULES",
    "Entry",
    "Kind",
    "Order",
    "RowLayout",
    "Rule",
    "by_sample",
    "derived",
    "output_shape",
    "passed_on",
    "pulled_back",
    "refusal",
    "repeating_sums",
]

_SCALES = ("_saved_alpha", "_saved_beta")

RULES: dict[tuple[str, int], Rule] = {
    ("AddBackward0", 0): Broadcast(factors=("_saved_alpha",)),
    ("AddBackward0", 1): Broadcast(factors=("_saved_alpha",)),
    ("AddmmBackward0", 0): Broadcast(factors=_SCALES),
    ("AddmmBackward0", 2): MatrixProduct("_saved_mat1", _SCALES),
    ("BmmBackward0", 0): BatchedProduct(first=True),
    ("BmmBackward0", 1): BatchedProduct(first=False),
    ("ConvolutionBackward0", 1): Convolution(),
    ("ConvolutionBackward0", 2): ByChannel(),
    ("CudnnBatchNormBackward0", 1): BatchGain(),
    ("CudnnBatchNormBackward0", 2): BatchOffset(),
    ("EmbeddingBackward0", 0): Embedding(),
    ("MmBackward0", 1): MatrixProduct("_saved_self"),
    ("MulBackward0", 0): Broadcast(lambda node: node._saved_other),
    ("MulBackward0", 1): Broadcast(lambda node: node._saved_self),
    ("NativeBatchNormBackward0", 1): BatchGain(),
    ("NativeBatchNormBackward0", 2): BatchOffset(),
    ("NativeGroupNormBackward0", 1): GroupGain(),
    ("NativeGroupNormBackward0", 2): ByChannel(),
    ("NativeLayerNormBackward0", 1): LayerGain(),
    ("NativeLayerNormBackward0", 2): Broadcast(),
    ("PreluKernelBackward0", 1): Slope(),
    ("TrilinearBackward0", 1): Trilinear(),
}
