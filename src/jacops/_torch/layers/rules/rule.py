"""The interface of rules for operations, and the view of an operation's output."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ...._cached import cached_property

Kind = Literal["outer", "lookup", "vector"]
Order = int | Tensor
"""How rows belong to samples: positions in front of the samples' axis (-1: all of them), or whose they are.

A tensor `(samples, positions)` holds which rows are a sample's, where the number of rows means none.
"""

_LAYOUTS = 256  # shapes of outputs whose layouts are remembered, numbers alone: those of a few networks


@dataclass(frozen=True, eq=False)
class Entry:
    """How a leaf arrives at an operation: by itself, seen in another shape, or as a tensor that is computed from it.

    Attributes:
        leaf: Which of the linearization's leaves.
        shape: Of what the operation takes.
        dtype: Of the leaf.
        weight: Shape of the leaf, or of the tensor computed from it: what gradients are shaped as.
        turned: The last two axes were exchanged on the way.
        copies: It was repeated so many times along its front on the way.
        repeated: It was, if only once.
        edge: Where in the graph the tensor that is computed from the leaf comes out; None for the leaf itself.
    """

    leaf: int
    shape: torch.Size
    dtype: torch.dtype
    weight: torch.Size
    turned: bool = False
    copies: int = 1
    repeated: bool = False
    edge: GradientEdge | None = None


@dataclass(frozen=True)
class RowLayout:
    """An operation's output as rows of channels.

    Attributes:
        shape: Of the output.
        sizes: Its axes, where some are split or laid end to end.
        order: These in the order in which they are read, those of channels last.
        rows: How many of them make rows.
        samples_first: No axis may stand in front of the samples'.
        groups: Parts that the channels fall into, each with an operand of its own.
    """

    shape: torch.Size
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    rows: int
    samples_first: bool = False
    groups: int = 1

    @cached_property
    def _in_order(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    @cached_property
    def _rows_in_all(self) -> int:
        return math.prod(self.row_sizes)

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Lengths of the axes that make rows."""
        return tuple(self.sizes[i] for i in self.order[: self.rows])

    @cached_property
    def channels(self) -> int:
        """Numbers in a row."""
        return math.prod(self.sizes[i] for i in self.order[self.rows :])

    def spread(self, raw: Tensor, many: int, order: Order) -> Tensor:
        """Return tensors `(…, *shape)` as `(…, samples, positions, channels)`."""
        ahead = raw.ndim - len(self.shape)
        lead = raw.shape[:ahead]
        if self._in_order and _samples_first(self._rows_in_all, many, order):
            return raw.reshape(*lead, many, self._rows_in_all // many, self.channels)
        split = raw.reshape(*lead, *self.sizes).permute(*range(ahead), *(ahead + i for i in self.order))
        return by_sample(split.reshape(*lead, *self.row_sizes, self.channels), many, order, ahead, self.rows)

    def grouped(self, raw: Tensor, many: int, order: Order) -> Tensor:
        """Return tensors `(…, *shape)` as `(…, samples, positions, groups, channels of a group)`."""
        groups = self.groups
        if self._in_order and _samples_first(self._rows_in_all, many, order):
            lead = raw.shape[: raw.ndim - len(self.shape)]
            return raw.reshape(*lead, many, self._rows_in_all // many, groups, self.channels // groups)
        return self.spread(raw, many, order).unflatten(-1, (groups, self.channels // groups))

    def gathered(self, rows: Tensor) -> Tensor:
        """Undo `spread`."""
        lead = rows.shape[:-2]
        split = rows.reshape(*lead, *(self.sizes[i] for i in self.order))
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return split.permute(*range(len(lead)), *(len(lead) + i for i in back)).reshape(*lead, *self.shape)


@lru_cache(_LAYOUTS)
def last_axis(shape: torch.Size) -> RowLayout:
    """Return the layout of an output whose last axis are channels; one axis alone makes rows."""
    sizes = tuple(shape) if len(shape) > 1 else (*shape, 1)
    return RowLayout(shape, sizes, tuple(range(len(sizes))), len(sizes) - 1)


@lru_cache(_LAYOUTS)
def second_axis(shape: torch.Size, samples: int, groups: int = 1) -> RowLayout:
    """Return the layout of an output `(samples, channels, …)`, or one that is reshaped so."""
    inner = shape[2:].numel()
    sizes = samples, shape[:2].numel() // max(1, samples), inner
    return RowLayout(shape, sizes, (0, 2, 1), 2, samples_first=True, groups=groups)


def output_shape(node: Any) -> torch.Size:
    """Return the shape of an operation's first output."""
    return torch.Size(map(int, node._input_metadata[0].shape))


def by_sample(rows: Tensor, many: int, order: Order, axis: int = 0, axes: int = 1) -> Tensor:
    """Return rows, along some axes, as `(…, samples, positions, …)`; zero where a sample has fewer than others."""
    if axis == 0 and axes == 1 and _samples_first(rows.shape[0], many, order):  # as most are
        return rows.reshape(many, rows.shape[0] // many, *rows.shape[1:])
    lead, total, rest = rows.shape[:axis], rows.shape[axis : axis + axes].numel(), rows.shape[axis + axes :]
    if isinstance(order, Tensor):
        flat = rows.reshape(*lead, total, *rest)
        return torch.cat([flat, flat.new_zeros(*lead, 1, *rest)], axis)[(slice(None),) * axis + (order,)]
    if _samples_first(total, many, order):
        return rows.reshape(*lead, many, total // many, *rest)
    ahead = order if order > 0 else total // many
    laid = rows.reshape(*lead, ahead, many, total // (ahead * many), *rest)
    return laid.transpose(axis, axis + 1).flatten(axis + 1, axis + 2)


def _samples_first(total: int, many: int, order: Order) -> bool:
    """Return whether no axis of positions precedes the samples' axis, so that rows need not be moved."""
    return not isinstance(order, Tensor) and many > 0 and (order == 1 or total == many)


class Rule(ABC):
    """How cotangents at an operation's output become gradients by a tensor that enters it.

    With R rows, which are samples times positions (tokens, pixels), the gradient by the tensor is

    - `"outer"`: the sum of `delta[r, g] outer operand[r, g]`, delta `(R, g, out)` and operand `(R, g, in)` in g groups;
    - `"lookup"`: `delta[r]` added to row `operand[r]` of the table, delta `(R, width)`, operand `(R,)`;
    - `"vector"`: the sum of `delta[r]`, shaped as the tensor.

    Attributes:
        kind: Which of the three.
        factors: Numbers kept by the operation by which it multiplies, all of which have to be one.
        has_source: A saved tensor may multiply the tensor.
        views: The operand is a view of a saved tensor.
    """

    kind: ClassVar[Kind]
    factors: tuple[str, ...] = ()
    has_source = True
    views = False

    def refuses(self, node: Any, entry: Entry) -> str | None:
        """Return why this operation is not the one that the rule describes; None where it is."""
        return None

    def turned(self, node: Any, entry: Entry) -> bool:
        """Return whether the weight is stored inputs first."""
        return False

    def source(self, node: Any) -> Tensor | None:
        """Return the saved tensor that the operand is made of."""
        return None

    def operand(self, node: Any, entry: Entry) -> Tensor | None:
        """Return what multiplies the tensor, with its graph; for `"vector"` shaped as the output, None for ones."""
        return self.source(node)

    def rows(self, node: Any, delta: Tensor, entry: Entry, operand: Tensor | None) -> Tensor:
        """Return a cotangent as rows where these are not those of the layout; of a vector's, times the operand."""
        return delta

    @abstractmethod
    def layout(self, node: Any, entry: Entry) -> RowLayout | None:
        """Return how the output is seen; None where gradients are not outer products of its channels."""

    def entries(self, node: Any, entry: Entry, numbers: Tensor) -> Tensor:
        """Return numbers of a vector's entries, `(entries,)`, where they enter: shaped as the output, by expansion."""
        return numbers.view(entry.shape).expand(output_shape(node))

    def patch_bytes(self, node: Any, entry: Entry) -> int:
        """Return the bytes of an operand that is larger than what it is made of; 0 elsewhere."""
        return 0


def refusal(rule: Rule, node: Any, entry: Entry) -> str | None:
    """Return why an operation is not the one its rule describes: factors, transposition, spoiled values."""
    meta = node._input_metadata[0]
    if meta.dtype != entry.dtype or not meta.shape:
        return "its output has another dtype, or no axes"
    for factor in rule.factors:
        if getattr(node, factor) != 1:
            return "it is multiplied by a number"
    if rule.kind == "vector" and entry.turned:
        return "the vector is transposed"
    try:  # what is costly to compute is not looked at but at what it is computed from
        source = rule.source(node)
        reason = rule.refuses(node, entry)
    except RuntimeError:  # a saved tensor was written into since
        return "what it kept was written into"
    if reason is not None or source is None:
        return reason if reason is not None or rule.kind == "vector" else "it kept no operand"
    same = type(source) is Tensor and (not source.is_floating_point() or source.dtype == entry.dtype)
    plain = source.layout is torch.strided and (rule.kind == "vector" or same)
    return None if plain else "its operand is of another kind"
