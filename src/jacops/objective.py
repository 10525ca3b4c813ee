"""Objective: a model with its loss, differentiated one batch at a time; the seam between frameworks.

Everything above it (problems, influence) speaks torch tensors and operators, whatever the model is written in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._reduction import check_reduction
from ._torch.protocol import Reduction
from .data import Batch
from .errors import InputError, explain
from .operators import Operator
from .space import Space


class Objective(ABC):
    """A model with its loss, which reduces a batch by `reduction`, one batch at a time."""

    reduction: Reduction = "mean"

    @property
    @abstractmethod
    def space(self) -> Space:
        """The parameters that are differentiated."""

    @property
    @abstractmethod
    def parameters_total(self) -> int:
        """Entries of all the model's parameters, differentiated or not."""

    @abstractmethod
    def point(self) -> Tensor:
        """Return the parameters as they are, `(P,)`."""

    @abstractmethod
    def value(self, x: Any, y: Any) -> float:
        """Return the loss of a batch.

        Raises:
            NonFiniteError: It is NaN or Inf.
        """

    @abstractmethod
    def gradient(self, x: Any, y: Any) -> Tensor:
        """Return its gradient `(P,)`."""

    @abstractmethod
    def hessian(self, x: Any, y: Any) -> Operator:
        """Return the Hessian of a batch's loss, symmetric on the parameters."""

    @abstractmethod
    def ggn(self, x: Any, y: Any) -> Operator:
        """Return the generalised Gauss-Newton matrix of a batch's loss."""

    @abstractmethod
    def sample_gradients(self, x: Any, y: Any) -> Operator:
        """Return `(n, P)`, row i the gradient of the loss of sample i alone."""

    @abstractmethod
    def mixed(self, x: Any, y: Any, rows: Tensor) -> Tensor:
        """Return `(k, n, *x)`, the derivative of `rows @ g_i` by sample i's input."""

    def outputs(self, x: Any, y: Any) -> tuple[Operator, Tensor, Tensor]:
        """Return the output Jacobian `(n * K, P)`, and each sample's loss's gradient `(n, K)` and Hessian `(n, K, K)`.

        Raises:
            InputError: This framework has none.
        """
        raise InputError(explain("leverage", True, f"{type(self).__name__} has no leverage correction"))

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of weights, buffers and names."""

    def fisher(self, kind: str, x: Any, y: Any, first: int = 0) -> Operator:
        """Return a Fisher matrix of a batch, by its kind and the place of its first sample as in `jacops.fisher`.

        Raises:
            InputError: This framework has none.
        """
        raise InputError(explain("curvature", repr(kind), f"{type(self).__name__} has 'hessian' and 'ggn'"))

    def unchanged(self) -> Callable[[str], None]:
        """Return a function of a call's name that raises `ModelStateError` once the model differs from what it is now.

        Frameworks whose parameters cannot be written into have nothing to compare.
        """
        return lambda call: None

    def check_state(self) -> None:  # noqa: B027 - most frameworks have no modes
        """Refuse a model whose mode makes per-sample quantities ill-posed."""

    @abstractmethod
    def value_near(self, x: Any, y: Any) -> float:
        """Return the loss of a batch at parameters that are a little off, always the same ones; it may be NaN."""

    def changed(self, **options: Any) -> Objective:
        """Return the objective with other options.

        Raises:
            InputError: This framework has no such options.
        """
        raise InputError(explain(next(iter(options)), "given", f"{type(self).__name__} has no such option"))

    def on(self, x: Any) -> Objective:
        """Return the objective for one batch, which may keep what it computes of these inputs."""
        return self

    @property
    def held_bytes(self) -> int:
        """Bytes of what is kept of a batch."""
        return 0

    def check_reduction(self, batch: Batch) -> None:
        """Refuse a loss that does not reduce a batch as the objective says, or a row alone.

        Raises:
            InputError: It does not.
            NonFiniteError: A loss is NaN or Inf.
        """
        check_reduction(self, batch)

    def denominators(self, y: Any, rows: int) -> Tensor:
        """Return what each row adds to the denominator of a mean, `(rows,)`."""
        return torch.ones(rows, dtype=torch.float64)

    def is_convex(self, y: Any) -> bool:
        """Return whether the loss of these targets is known to be convex in the output, without computing it."""
        return False

    def weighted(self, weights: Tensor) -> Objective:
        """Return the objective whose batch loss is the sum of its rows' numerators times `weights`.

        Raises:
            InputError: This framework has no weights.
        """
        raise InputError(explain("weights", "given", f"{type(self).__name__} takes data without sample weights"))
