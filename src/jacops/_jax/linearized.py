"""The Jacobian of a JAX function at a point, as pushes and pulls of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import jax
import numpy as np
import torch
from torch import Tensor

from .._ladder.protocol import SweepOptions
from .._space import Space
from .._trees import Tree
from ..errors import InputError
from .crossing import filled, to_numpy
from .model import Model
from .points import Point

Rows = Callable[[Point, np.ndarray, int, SweepOptions], list[np.ndarray]]


@final
@dataclass(frozen=True, eq=False)
class JaxLinearization:
    """Pushes and pulls at one point; every product runs the function again, compiled.

    Attributes:
        model: The compiled sweeps.
        point: Where they are taken.
        domain: What is differentiated by.
        codomain: The output.
        push: The sweep along rows of the domain; of a gradient it is the pull, too.
        pull: The sweep along rows of the codomain.
        options: Of the public call.
        outputs: What the function gave.
        connected: Whether a path leads from the output to the domain.
        weights: None: arrays of JAX are not written into.
    """

    model: Model
    point: Point
    domain: Space
    codomain: Space
    push: Rows
    pull: Rows
    options: SweepOptions
    outputs: Sequence[Tensor] = ()
    connected: bool = True
    weights: None = None

    @property
    def call(self) -> str:
        """The public call."""
        return self.options.call

    @cached_property
    def routes(self) -> dict[str, str]:
        """How products are computed."""
        return {self.call: "JAX, compiled" if self.model.compiled else "JAX, row by row, uncompiled"}

    @property
    def held_bytes(self) -> int:
        """Bytes of the batch; the parameters are the model's own."""
        return sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves((self.point.x, self.point.y)))

    def is_connected(self) -> bool:
        """Return whether a path leads from the output to anything it is differentiated by."""
        return self.connected

    def push_rows(self, rows: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
        """Return `J v` for rows of `v`.

        Raises:
            InputError: A graph is requested.
        """
        self._refuse_graph(create_graph)
        return self.codomain.split(self._swept(self.push, self.domain.join(rows), self.codomain))

    def pull_rows(
        self, rows: Sequence[Tensor], create_graph: bool = False, out: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Return `J' u` for rows of `u`.

        Raises:
            InputError: A graph is requested.
        """
        self._refuse_graph(create_graph)
        found = self.domain.split(self._swept(self.pull, self.codomain.join(rows), self.domain))
        for into, part in zip(out or (), found, strict=False):
            into.copy_(part)
        return found

    def _swept(self, sweep: Rows, rows: Tensor, space: Space) -> Tensor:
        shape = (rows.shape[0], space.dim)
        chunks = sweep(self.point, to_numpy(rows), space.dim, self.options) if all(shape) else []
        return filled(chunks, shape, space.dtype) if chunks else torch.zeros(shape, dtype=space.dtype)

    def _refuse_graph(self, create_graph: bool) -> None:
        if create_graph:
            todo = "Differentiate a function of JAX that calls `jax.jvp` or `jax.vjp`."
            raise InputError.of("create_graph", True, "JAX records no graphs", todo)


@final
@dataclass(frozen=True, eq=False)
class JaxRecording:
    """What was recorded of a JAX model at a point.

    Attributes:
        lin: Its pushes and pulls.
        tree: The output's structure.
        output: The output, in torch tensors.
        raw: The output as JAX has it.
        model: The compiled sweeps.
        point: Parameters and batch.
    """

    lin: JaxLinearization
    tree: Tree
    output: Any
    raw: Any
    model: Model
    point: Point
