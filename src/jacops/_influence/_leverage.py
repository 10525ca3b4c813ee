r"""The leverage correction: what leaving a sample out does to the curvature, not only to the gradient.

With the sample's output Jacobian $J_i$, the loss's gradient $e_i$ and Hessian $H_i$ at its output, its weight $s_i$ in
the objective and $M_i = J_i A^{-1} J_i^\top$, the step without the sample is $A^{-1} J_i^\top (I - s_i H_i M_i)^{-1}
e_i$, by Woodbury's identity. With one output that divides the plain step by $1 - h_i$, $h_i = s_i H_i M_i$ (Cook and
Weisberg, Residuals and Influence in Regression, 1982).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._data import Batches
from .._finite import on_finite_rows
from .._problem import Problem
from ..errors import SolveError
from ..solvers import Solution


def leveraged(
    problem: Problem, data: Batches, factors: Tensor, solve: Callable[[Tensor], Solution], strict: bool = True
) -> tuple[Tensor, Tensor]:
    """Return corrected influences `(n_test, n)` and the leverages `(n,)`.

    Args:
        problem: Whose objective loses a sample.
        data: The samples.
        factors: Solutions for the test samples, `(n_test, P)`.
        solve: Solves for more right-hand sides.
        strict: Raise for a sample without which the curvature is singular; else its column is NaN.

    Raises:
        SolveError: There is such a sample.
    """
    values, leverages, start = [], [], 0
    for raw in data.tracked("leverage", problem.progress):
        if not raw.rows:
            continue
        batch, objective = problem.at(raw)
        J, slope, curvature = objective.outputs(batch.x, batch.y)  # noqa: N806
        n, K = slope.shape  # noqa: N806
        rows = J.dense()
        inner = torch.bmm(rows.view(n, K, -1), solve(rows).x.view(n, K, -1).transpose(1, 2))
        own = (problem.shares(batch) / problem.denominator).to(curvature).view(n, 1, 1) * curvature @ inner
        step, singular = _steps(own, slope)
        if strict and bool(singular.any()):
            row = start + int(singular.nonzero()[0])
            raise SolveError(
                f"the leverage of sample {row} of {data.name} is 1: without it the damped curvature is singular, so "
                "there is no step. Raise `damping`, or leave out `leverage`."
            )
        start += n
        along = on_finite_rows(J.apply, factors).view(-1, n, K)
        values.append((along * step.squeeze(2)).sum(2))
        leverages.append(own.diagonal(dim1=1, dim2=2).sum(1))
    return torch.cat(values, 1), torch.cat(leverages)


def _steps(own: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's gradient by the output, corrected, `(n, K, 1)`, and whether there is none."""
    eye = torch.eye(own.shape[1], dtype=own.dtype, device=own.device)
    step, failed = torch.linalg.solve_ex(eye - own, slope.unsqueeze(2))
    singular = (failed != 0) & own.flatten(1).isfinite().all(1)
    return torch.where(singular.view(-1, 1, 1), math.nan, step), singular
