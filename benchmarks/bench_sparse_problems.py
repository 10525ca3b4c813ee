"""Standard sparse problems: how many sweeps does a Jacobian or Hessian take, here and by `asdex` on the same in JAX?

`asdex` is optional (`pip install asdex jax`); without it its column stays empty. Sweeps are counted, not timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import jacops

from .harness import RESULTS, Workload, machine

TIMED = False  # `benchmarks.compare` has nothing to measure here


class Function(nn.Module):
    """A plain function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return the function's value."""
        return self.function(x)


def problems(np: Any) -> dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]]:
    """Return functions of one array and its shape, in torch or in jax.numpy, which have the same names for these."""
    cat = getattr(np, "concatenate")  # noqa: B009 - both have it

    def roll(s: Any, by: int, axis: int) -> Any:
        return np.roll(s, by, axis)

    def brusselator(s: Any) -> Any:
        u, v = s[0], s[1]
        spread = roll(s, 1, 1) + roll(s, -1, 1) + roll(s, 1, 2) + roll(s, -1, 2) - 4 * s
        return np.stack([1 + u * u * v - 4.4 * u, 3.4 * u - u * u * v]) + 40.0 * spread

    def bratu(u: Any) -> Any:
        inner = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1]
        return inner + 0.01 * np.exp(u[1:-1, 1:-1])

    def banded(x: Any) -> Any:
        near = sum(x[k : len(x) - 4 + k] * (1 + x[k : len(x) - 4 + k]) for k in range(5))
        return x[2:-2] * (2 + 5 * x[2:-2] * x[2:-2]) + 1 - near

    def arrowhead(x: Any) -> Any:
        return cat([(x**2).sum().reshape(1), x[1:] ** 2 + x[1:] * x[0]])

    def rosenbrock(x: Any) -> Any:
        return cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])

    return {
        "Brusselator, 20 × 20": (brusselator, (2, 20, 20)),
        "Bratu, 30 × 30": (bratu, (30, 30)),
        "banded, 1,000": (banded, (1000,)),
        "arrowhead, 1,000": (arrowhead, (1000,)),
        "chained Rosenbrock, 1,000": (rosenbrock, (1000,)),
    }


def by_asdex(name: str) -> str:
    """Return the number of colours that asdex needs."""
    try:
        import asdex
        import jax
        import jax.numpy as jnp
    except ImportError:
        return "not installed"
    jax.config.update("jax_enable_x64", True)
    function, shape = problems(jnp)[name]
    coloring = asdex.jacobian_coloring(function, jnp.ones(shape))
    return str(coloring.num_colors)


def workloads() -> Iterator[Workload]:
    """Print the table and yield nothing to time."""
    RESULTS.mkdir(exist_ok=True)
    print(f"\n{'problem':28s}{'Jacobian':>16s}{'nonzeros':>10s}{'dense':>8s}{'jacops':>8s}{'asdex':>8s}")
    for name, (function, shape) in problems(torch).items():
        model = Function(function)
        plan = jacops.sparse_plan(model, torch.randn(shape, dtype=torch.float64), wrt="inputs")
        m, n = plan.shape
        theirs = by_asdex(name)
        print(
            f"{name:28s}{f'{m} × {n}':>16s}{plan.pattern.nnz:10d}{min(m, n):8d}{plan.sweeps:8d}{theirs:>8s}", flush=True
        )
        row = {"workload": name, "jacops": plan.sweeps, "asdex": theirs, "dense": min(m, n), **machine()}
        with (RESULTS / "sparse_problems.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    yield from ()
