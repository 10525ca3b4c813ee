"""Nothing non-finite comes back quietly: where NaN or Inf was seen first, and in what."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._trees import flatten
from .errors import NonFiniteError


def is_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite, reading the tensor once and allocating nothing of its size."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor.resolve_conj())
    # A sum is finite unless an entry is not, or it overflows: only then look at each entry.
    wide = tensor.dtype in (torch.float32, torch.float64)
    total = tensor.sum() if wide else tensor.sum(dtype=torch.float32)
    return math.isfinite(total.item()) or bool(torch.isfinite(tensor).all())


def on_finite_rows(apply: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Return a map of rows `(k, n)`, one result per row, computed for the finite rows; it is NaN for the others."""
    if is_finite(rows):
        return apply(rows)
    good = rows.isfinite().all(1)
    some = rows[good] if bool(good.any()) else torch.zeros_like(rows[:1])  # for the shape of a result
    found = apply(some)
    result = found.new_full((rows.shape[0], *found.shape[1:]), math.nan)
    if bool(good.any()):
        result[good] = found
    return result


def require_finite(tensor: Tensor, where: str, more: str = ".") -> None:
    """Refuse a tensor with NaN or Inf.

    Args:
        tensor: The tensor.
        where: The call and the place, such as `"sparse: in the matrix"`.
        more: What else to say.

    Raises:
        NonFiniteError: It has some; the message states where.
    """
    if not is_finite(tensor):
        raise NonFiniteError(f"{where}, {where_first(tensor)}{more}")


def where_first(tensor: Tensor) -> str:
    """Return index and count of the entries that are not finite, for a message."""
    bad = (~torch.isfinite(tensor.detach())).nonzero()
    return f"{bad.shape[0]} of {tensor.numel()} entries are NaN or Inf, the first at index {tuple(bad[0].tolist())}"


def row_in_data(data: Mapping[str, Any]) -> str | None:
    """Return in words the first row of these data, trees of tensors by name, with NaN or Inf; None if there is none."""
    for name, value in data.items():
        leaves, tree = flatten(value, name)
        for leaf, path in zip(leaves, tree.names, strict=True):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not is_finite(leaf):
                first = (~torch.isfinite(leaf.detach())).nonzero()[0].tolist()
                value = leaf[tuple(first)].item()
                return f"{path} holds {value} in row {first[0]}" if first else f"{path} is {value}"
    return None


class InBatch:
    """A context in which a `NonFiniteError` is raised again with the number of the batch.

    Args:
        number: The number, from 0 on.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Name the batch.

        Raises:
            NonFiniteError: One was raised inside.
        """
        if isinstance(error, NonFiniteError):
            raise NonFiniteError(f"batch {self._number}: {error}") from error


def check_vector(call: str, argument: str, vectors: Iterable[Tensor]) -> None:
    """Refuse a given vector with NaN or Inf.

    Raises:
        NonFiniteError: It has some; the message states where.
    """
    vectors = list(vectors)
    for i, vector in enumerate(vectors):
        which = f", tensor {i}" if len(vectors) > 1 else ""
        require_finite(vector, f"{call}: in `{argument}`{which}", ". Nothing was computed.")


def check_finite(
    call: str,
    results: Sequence[Tensor],
    names: Sequence[str],
    lin: Any,
    todo: str = "",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Refuse an output or a derivative with NaN or Inf; where the data hold one, name its row.

    Raises:
        NonFiniteError: There is some; the message names the output, or the tensor whose derivative it is.
    """
    if data is not None and not all(map(is_finite, [*lin.outputs, *results])) and (row := row_in_data(data)):
        raise NonFiniteError(f"{call}: {row}.{todo}")
    check_outputs(call, lin.outputs, lin.codomain.names, todo)
    for result, name in zip(results, names, strict=True):
        require_finite(result, f"{call}: in the derivative's part for {name}", f"; the output itself is finite.{todo}")


def check_outputs(call: str, outputs: Sequence[Tensor], names: Sequence[str], todo: str = "") -> None:
    """Refuse an output with NaN or Inf: a finite derivative of it would mislead.

    Raises:
        NonFiniteError: There is some; the message names the output and the first row.
    """
    for output, name in zip(outputs, names, strict=True):
        require_finite(output, f"{call}: in {name}", f" (first axis: row of the batch).{todo}")
