r"""Solutions that can be differentiated, by the implicit function theorem.

Where $A x = b$, $dx = A^{-1} (db - dA\,x)$. So a solution is connected through $b - A x$ at the $x$ that was found, one
product that keeps its graph; backward solves the transposed system for the cotangent, and the rest is the product's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._operators import Operator
from .._operators._graphs import has_graph
from .._runtime.contexts import arithmetic, out_of_inference
from .._runtime.restoring import restoring
from ..errors import NotDifferentiableError

RowMap = Callable[[Tensor], Tensor]


class ImplicitSolution(torch.autograd.Function):
    """The solution that was found, with the derivative of the solution for a residual."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, adjoint: RowMap, call: str) -> Tensor:
        """Return the solution.

        Args:
            ctx: Of the Function.
            residual: $b - A x$, with its graph.
            x: The solution.
            adjoint: Solves the transposed system for rows.
            call: The public call.
        """
        ctx.adjoint, ctx.call = adjoint, call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Solve the transposed system.

        Raises:
            NotDifferentiableError: The derivative is to be differentiated again.
        """
        if torch.is_grad_enabled():
            raise NotDifferentiableError(
                f"{ctx.call}: ImplicitSolution, the derivative of a solution, is given once; its own derivative is not "
                "recorded. Differentiate without `create_graph=True`."
            )
        return ctx.adjoint(grads[0]), None, None, None


@restoring
def connected(operator: Operator, rows: Tensor, x: Tensor, damping: float | Tensor, adjoint: RowMap) -> Tensor:
    r"""Return a solution of $(A + \lambda I) x = b$ that receives gradients.

    Args:
        operator: $A$; with a graph where it is to receive gradients.
        rows: $b$, `(k, n)`.
        x: The solution, `(k, n)`.
        damping: $\lambda$; a tensor where it is to receive gradients.
        adjoint: Solves the transposed system for rows.
    """
    with arithmetic(True):
        residual, x = out_of_inference(rows), out_of_inference(x.detach())
        if has_graph(operator):
            residual = residual - operator._apply(x)
        if isinstance(damping, Tensor):
            residual = residual - damping.to(x) * x
        return ImplicitSolution.apply(residual, x, adjoint, "solve")  # pyright: ignore[reportReturnType]
