"""The rows of every sample alone, with their graph: each by the definition, a batch of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...errors import ModelStateError
from ..layers.parts import Rows, matrix_shape
from ..sweeps.linearization import Linearization
from .by_sample import Definition
from .whole_matrix import jacobian_blocks


def rows_with_graph(what: Definition) -> tuple[Linearization, list[Rows]]:
    """Return a linearization of some sample, for names and shapes, and the rows of all samples by each leaf.

    Args:
        what: The definition of a row, whose recordings stay connected to the caller's parameters.

    Raises:
        ModelStateError: Samples have outputs of different shapes.
        NotDifferentiableError: A backward cannot be differentiated.
    """
    samples = list(_alone(what))
    first = samples[0][0]
    columns = zip(*(rows for _, rows in samples), strict=True)
    return first, [Rows(torch.cat(column)) for column in columns]


def _alone(what: Definition) -> Iterator[tuple[Linearization, Sequence[Tensor]]]:
    """Yield one sample after the other, with its rows `(1, k, F, W)` by each leaf."""
    first: Linearization | None = None
    for i in range(what.values[0].shape[0]):
        lin = what.alone([v[i : i + 1] for v in what.values]).lin
        first = first or lin
        if lin.codomain.shapes != first.codomain.shapes:
            came = f"returning {lin.codomain.shapes} after {first.codomain.shapes}"
            raise ModelStateError.of("model", came, "all samples must have outputs of one shape")
        (blocks,) = jacobian_blocks(lin, create_graph=True)
        yield lin, [block.reshape(1, len(block), *matrix_shape(block.shape[1:])) for block in blocks]
