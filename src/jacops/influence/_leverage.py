r"""The leverage correction: what leaving a sample out does to the curvature, not only to the gradient.

With the sample's output Jacobian $J_i$, the loss's gradient $e_i$ and Hessian $H_i$ at its output, its weight $s_i$ in
the objective and $M_i = J_i A^{-1} J_i^\top$, the step without the sample is $A^{-1} J_i^\top (I - s_i H_i M_i)^{-1}
e_i$, by Woodbury's identity. With one output that divides the plain step by $1 - h_i$, $h_i = s_i H_i M_i$ (Cook and
Weisberg, Residuals and Influence in Regression, 1982).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data import Batches
from ..problem import Problem
from ..solvers import Solution


def leveraged(
    problem: Problem, data: Batches, factors: Tensor, solve: Callable[[Tensor], Solution]
) -> tuple[Tensor, Tensor]:
    """Return corrected influences `(n_test, n)` and the leverages `(n,)`.

    Args:
        problem: Whose objective loses a sample.
        data: The samples.
        factors: Solutions for the test samples, `(n_test, P)`.
        solve: Solves for more right-hand sides.
    """
    values, leverages = [], []
    for batch in data.tracked("leverage", problem.progress):
        if not batch.rows:
            continue
        J, slope, bend = problem.objective.outputs(batch.x, batch.y)  # noqa: N806
        n, K = slope.shape  # noqa: N806
        rows = J.dense()
        inner = torch.bmm(rows.view(n, K, -1), solve(rows).x.view(n, K, -1).transpose(1, 2))
        own = (problem.shares(batch) / problem.denominator).to(bend).view(n, 1, 1) * bend @ inner
        step = torch.linalg.solve(torch.eye(K, dtype=own.dtype, device=own.device) - own, slope.unsqueeze(2))
        along = J.apply(factors).view(-1, n, K)
        values.append((along * step.squeeze(2)).sum(2))
        leverages.append(own.diagonal(dim1=1, dim2=2).sum(1))
    return torch.cat(values, 1), torch.cat(leverages)
