"""Recorded: the Jacobian of a function at the point where it was run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from .._cached import cached_property
from .._ladder.protocol import Linearized
from .._space import Space
from .._torch.protocol import ByLayers, Linearization, check_kept
from ._base import Operator


@final
@dataclass(frozen=True, eq=False, repr=False)
class LinearizedMap(Operator):
    """The Jacobian at one linearisation point, by forward and backward sweeps over a recorded graph.

    The function ran once; products only sweep. The repr shows which route they took and why.

    Attributes:
        lin: What was recorded, by any framework.
        value: What the function returned there.
        symmetric: The function is a gradient, so this is a Hessian and pushes are pulls.
        mark: Whether it is positive semi-definite, or a function that computes that when it is first read.
        formed: A cheaper way to its matrix than products, if there is one.
        by_parameters: It is the Jacobian of a model's output by its parameters.
        create_graph: Products keep their graph.
    """

    lin: Linearized
    value: Any = None
    symmetric: bool = False
    mark: bool | Callable[[], bool] = False
    formed: ByLayers | None = None
    by_parameters: bool = False
    create_graph: bool = False

    has_parts: ClassVar[bool] = False

    @property
    def by_samples(self) -> Linearization | None:
        """What was recorded, where the matrix may be found for all samples at once."""
        return self.lin if self.by_parameters and isinstance(self.lin, Linearization) else None

    @cached_property
    def positive(self) -> bool:
        """Whether it is known to be positive semi-definite."""
        return self.mark() if callable(self.mark) else self.mark

    @property
    def domain(self) -> Space:
        """What the function was differentiated by."""
        return self.lin.domain

    @property
    def codomain(self) -> Space:
        """The function's output."""
        return self.lin.codomain

    @property
    def nbytes(self) -> int:
        """Bytes of the values that the graph keeps for its sweeps."""
        return self.lin.held_bytes

    def _apply(self, rows: Tensor) -> Tensor:
        if self.symmetric:
            return self._apply_transpose(rows)
        check_kept(self.lin.weights, self.lin.call)
        found = self.codomain.join(self.lin.push_rows(self.domain.split(rows), self.create_graph))
        return found if self.create_graph else found.detach()

    def _apply_vector(self, vector: Tensor) -> Tensor:
        if self.symmetric and not self.create_graph and isinstance(self.lin, Linearization):
            return self._pulled(vector)
        return super()._apply_vector(vector)

    def _pulled(self, vector: Tensor) -> Tensor:
        """Return the transpose's product with one vector, by one backward pass."""
        lin: Any = self.lin
        check_kept(lin.weights, lin.call)
        found = lin.pull_vector(vector)
        return found.detach() if found.requires_grad else found

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        if rows.shape[0] == 1 and not self.create_graph and isinstance(self.lin, Linearization):
            return self._pulled(rows[0]).unsqueeze(0)
        check_kept(self.lin.weights, self.lin.call)
        space = self.domain
        if self.create_graph:
            return space.join(self.lin.pull_rows(self.codomain.split(rows), True))
        if rows.shape[0] == 1 or any(dtype != space.dtype for dtype in space.dtypes):  # one row is joined at once
            return space.join(self.lin.pull_rows(self.codomain.split(rows))).detach()
        flat = torch.empty(rows.shape[0], space.dim, dtype=space.dtype, device=space.device)
        self.lin.pull_rows(self.codomain.split(rows), out=space.split(flat))
        return flat

    @property
    def name(self) -> str:
        """What it is: a Hessian where it is symmetric, as the Jacobian of a gradient is."""
        return self.meaning.name if self.meaning is not None else "Hessian" if self.symmetric else "Jacobian"

    def _routes(self) -> Mapping[str, str]:
        return self.lin.routes
