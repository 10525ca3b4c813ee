"""Products of matrices: linear layers, projections, einsum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .rule import Entry, RowLayout, Rule, last_axis, output_shape


class MatrixProduct(Rule):
    """`z = x W`, the weight second; `saved` names the first."""

    kind = "outer"
    views = True

    def __init__(self, saved: str, factors: tuple[str, ...] = ()) -> None:
        self._saved, self.factors = saved, factors

    def turned(self, node: Any, entry: Entry) -> bool:
        """W is `(in, out)`, unless it is the transposed of a leaf."""
        return not entry.turned

    def refuses(self, node: Any, entry: Entry) -> str | None:
        """Refuse repeated weights."""
        return "the weight is repeated" if entry.copies > 1 else None

    def source(self, node: Any) -> Tensor | None:
        """Return x."""
        return getattr(node, self._saved)

    def operand(self, node: Any, entry: Entry) -> Tensor:
        """Return x in one group."""
        return getattr(node, self._saved).unsqueeze(1)

    def layout(self, node: Any, entry: Entry) -> RowLayout:
        """Channels are last."""
        return last_axis(output_shape(node))


class BatchedProduct(Rule):
    """Products of matrices side by side, `(batch, rows, in) @ (batch, in, out)`, or with the weight first.

    The batch are groups of the weight's own (heads), or samples times these where the weight was repeated for each.
    """

    kind = "outer"

    def __init__(self, first: bool) -> None:
        self._first = first

    def turned(self, node: Any, entry: Entry) -> bool:
        """A weight that comes second is `(groups, in, out)`."""
        return entry.turned == self._first

    def source(self, node: Any) -> Tensor | None:
        """Return the other factor."""
        return node._saved_mat2 if self._first else node._saved_self

    def operand(self, node: Any, entry: Entry) -> Tensor:
        """Return the other factor as `(rows, groups, in)`."""
        other = node._saved_mat2.mT if self._first else node._saved_self
        return other.unflatten(0, (entry.copies, -1)).transpose(1, 2).flatten(0, 1)

    def layout(self, node: Any, entry: Entry) -> RowLayout:
        """Channels are groups times outputs."""
        shape, copies = output_shape(node), entry.copies
        sizes = (copies, shape[0] // copies, *shape[1:])
        order = (0, 3, 1, 2) if self._first else (0, 2, 1, 3)
        return RowLayout(shape, sizes, order, 2, samples_first=copies > 1, groups=sizes[1])
