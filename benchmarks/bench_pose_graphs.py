"""Jacobians of pose graphs from a hundred to ten thousand poses: who still runs, how long, in how much memory?

A *sweep* is one forward and one backward pass of the unchanged model, timed in the same run: what planning and
evaluation cost is best counted in sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pypose as pp
import torch
from pypose.optim.functional import modjac as pypose_modjac
from scipy.optimize._numdiff import approx_derivative
from torch import Tensor, nn

import jacops

from .harness import Goal, Workload

EDGES_PER_POSE = 4
DENSE_UP_TO = 200


class PoseGraph(nn.Module):
    """Relative poses measured between pairs of poses, as PyPose users write it."""

    def __init__(self, poses: int, edges: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(poses)
        draw = {"generator": generator, "dtype": torch.float64}
        self.poses = pp.Parameter(pp.se3(0.5 * torch.randn(poses, 6, **draw)).Exp())
        chain = torch.stack([torch.arange(poses - 1), torch.arange(1, poses)], 1)
        near = torch.randint(0, poses, (edges - poses + 1,), generator=generator)
        far = (near + torch.randint(1, 50, near.shape, generator=generator)) % poses
        self.register_buffer("edges", torch.cat([chain, torch.stack([near, far], 1)]))
        self.measured = pp.se3(0.5 * torch.randn(edges, 6, **draw)).Exp()

    def forward(self) -> Tensor:
        """Return one residual of six numbers per edge."""
        first, second = self.poses[self.edges[:, 0]], self.poses[self.edges[:, 1]]
        return (self.measured.Inv() @ first.Inv() @ second).Log().tensor()


def one_sweep(model: PoseGraph) -> Callable[[], Any]:
    """Return a forward and a backward pass of the unchanged model."""
    return lambda: torch.autograd.grad(model().sum(), model.poses)


def by_differences(model: PoseGraph, pattern: Any) -> Callable[[], Any]:
    """Return grouped finite differences over the same pattern, as `scipy.optimize.least_squares` takes them."""
    start = model.poses.detach().clone()

    def residual(step: np.ndarray) -> np.ndarray:
        moved = pp.se3(torch.from_numpy(step).reshape(-1, 6)).Exp() @ start
        first, second = moved[model.edges[:, 0]], moved[model.edges[:, 1]]
        return (model.measured.Inv() @ first.Inv() @ second).Log().tensor().detach().numpy().ravel()

    zero = np.zeros(6 * start.shape[0])
    return lambda: approx_derivative(residual, zero, method="2-point", sparsity=pattern)


def alike(a: Any, b: Any) -> bool:
    """Say whether two Jacobians, sparse or dense, are the same."""
    left, right = (np.asarray(v.matrix.toarray() if isinstance(v, jacops.sparse.SparseJacobian) else v) for v in (a, b))
    return left.shape == right.shape and np.abs(left - right).max() <= 1e-9


def small() -> Workload:
    """Return G1: a hundred poses and three hundred edges, a matrix that PyPose can still form."""
    model, evaluate = PoseGraph(100, 300), "jacops: evaluate the plan, as a matrix"
    plan = jacops.sparse_plan(model, None, tangent=False)
    rivals: dict[str, Callable[[], Any]] = {
        "jacops: evaluate the plan": lambda: plan.evaluate(model, None),
        evaluate: lambda: plan.evaluate(model, None).matrix.toarray(),
        "jacops.modjac, dense": lambda: jacops.modjac(model, None, flatten=True),
        "PyPose: modjac(vectorize=True)": lambda: pypose_modjac(model, None, vectorize=True, flatten=True),
        "PyPose: modjac": lambda: pypose_modjac(model, None, flatten=True),
    }
    goals = [Goal("PyPose: modjac(vectorize=True)", faster=18), Goal("PyPose: modjac", faster=150)]
    size = {"result_bytes": 8.0 * 1800 * 700, "dtype": torch.float64}
    return Workload("G1", "100 poses, 300 edges: 1,800 × 700", rivals, alike, goals=goals, **size)


def workloads() -> Iterator[Workload]:
    """Yield G1 and growing graphs."""
    yield small()
    for poses in (100, 200, 1000, 3000, 10_000):
        model = PoseGraph(poses, EDGES_PER_POSE * poses)
        plan = jacops.sparse_plan(model, None)
        found = plan.evaluate(model, None)
        rivals: dict[str, Callable[[], Any]] = {
            "jacops: evaluate the plan": lambda model=model, plan=plan: plan.evaluate(model, None),
            "torch.autograd: one sweep of the model": one_sweep(model),
            "jacops, once: make the plan": lambda model=model: jacops.sparse_plan(model, None),
            "scipy: grouped finite differences": by_differences(model, found.matrix.astype(bool)),
        }
        if poses <= DENSE_UP_TO:
            dense = pypose_modjac(model, None, vectorize=True, flatten=True)
            _check(
                found.matrix.toarray(),
                dense.reshape(dense.shape[0], poses, 7)[..., :6].reshape(dense.shape[0], -1).numpy(),
            )
            rivals["PyPose: modjac(vectorize=True)"] = lambda model=model: pypose_modjac(model, None, vectorize=True)
            rivals["jacops.modjac, dense"] = lambda model=model: jacops.modjac(model, None, flatten=True)
        rows, columns = found.matrix.shape
        what = f"{poses:,} poses, {rows // 6:,} edges: {rows:,} × {columns:,}, {plan.sweeps} sweeps"
        yield Workload(f"G{poses}", what, rivals, goals={"PyPose: modjac(vectorize=True)": 100} if poses == 200 else {})


def _check(ours: np.ndarray, theirs: np.ndarray) -> None:
    error = np.abs(ours - theirs).max()
    if error > 1e-9:
        raise ArithmeticError(f"the sparse Jacobian differs from PyPose's by {error:.1e}")
