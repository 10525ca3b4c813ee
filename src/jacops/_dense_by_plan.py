"""Dense Jacobians by the sparse plan of the same model, once one was seen to be mostly zeros.

A residual of many blocks, each of which reads a few parameters, takes a sweep per output entry densely, and a sweep per
entry of one block by a plan. The first call cannot know; it looks at what it found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._ladder.names import Fact
from ._picks import Picked
from ._torch.protocol import Blocks, Recording, bare, is_plain, parameter_names
from ._trees import Selector, flatten
from .errors import InputError, MemoryBudgetError, NonFiniteError, NotDifferentiableError
from .sparse._remembered import notes_of, sparse_jacobian

_ENTRIES = 100_000  # of a Jacobian; smaller ones take less time than the record, probe and reading off of a plan
_FULL = 0.1  # share of entries other than zero from which on a plan gains little
_FEWER = 4  # times fewer sweeps than rows that a plan must take


class DenseByPlan:
    """One question for a dense Jacobian, and its stored facts.

    Args:
        model: A module.
        inputs: Its input.
        picks: Which parameters.
        outputs: Part of the output to differentiate.
    """

    def __init__(self, model: nn.Module, inputs: Any, picks: Picked, outputs: Selector) -> None:
        self._asked = model, inputs, picks, outputs
        self._names = tuple(name for name, p in parameter_names(bare(model)).items() if picks(name, p))
        self._notes = notes_of(model, inputs, (Fact.DENSE_BY_PLAN, self._names), outputs)

    def matrix(self) -> tuple[Tensor, Any] | None:
        """Return the Jacobian `(outputs, parameters)` and the output, None where it is to be found by sweeps."""
        if not self._notes.get("sparse"):
            return None
        try:
            found = sparse_jacobian(*self._asked, tangent=False)
        except NonFiniteError:
            return None  # the sweeps name output and parameter
        except (NotDifferentiableError, InputError, MemoryBudgetError):
            self._notes["sparse"] = False
            return None
        self._notes["sparse"] = _FEWER * found.sweeps <= found.matrix.shape[0]
        return found.matrix.to_dense(), found.output

    def arranged(self, matrix: Tensor, output: Any) -> Any:
        """Return blocks `(*output, *parameter)` in the structure of `modjac`."""
        parameters = parameter_names(bare(self._asked[0]))
        leaves, tree = flatten(output, "output")
        columns = matrix.split([parameters[name].numel() for name in self._names], 1)
        blocks: list[tuple[Tensor, ...]] = []
        start = 0
        for leaf in leaves:
            rows, start = slice(start, start + leaf.numel()), start + leaf.numel()
            shapes = [(*leaf.shape, *parameters[name].shape) for name in self._names]
            blocks.append(tuple(part[rows].reshape(shape) for part, shape in zip(columns, shapes, strict=True)))
        if tree.single:
            return blocks[0][0] if len(blocks[0]) == 1 else blocks[0]
        return tree.build(blocks)

    def note(self, recorded: Recording, blocks: Blocks) -> None:
        """Store whether a Jacobian that was computed by sweeps is large and mostly zeros."""
        size = recorded.lin.codomain.dim * recorded.lin.domain.dim
        if "sparse" in self._notes or size < _ENTRIES or not is_plain(recorded.lin) or not recorded.lin.is_connected():
            return
        stored = sum(int(torch.count_nonzero(block)) for row in blocks for block in row)
        self._notes["sparse"] = 0 < stored <= _FULL * size
