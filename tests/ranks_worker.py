"""One rank of a gloo group: runs a scenario of `CASES` by name and writes what it finds, for tests/test_ranks.py."""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import jacops
from jacops.solvers import CG, EKFAC, Direct, Nystrom

ROWS = 23
Data = list[Any]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def rows(n: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def batches(size: int = 5, n: int = ROWS) -> Data:
    x, y = rows(n)
    return list(zip(x.split(size), y.split(size), strict=True))


def weighted() -> Data:
    x, y = rows()
    w = torch.linspace(0.0, 2.0, ROWS, dtype=torch.float64)
    return [{"input": a, "y": b, "weights": c} for a, b, c in zip(x.split(5), y.split(5), w.split(5), strict=True)]


def ignored() -> Data:
    """The first batch has no label that counts, and so have some rows of others."""
    x, y = rows()
    y = y.clone()
    y[:5] = y[7] = y[20:] = -100
    return list(zip(x.split(5), y.split(5), strict=True))


def direction(many: int = 2) -> Tensor:
    return torch.randn(51, many, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def products(problem: jacops.Problem, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    found = {}
    for kind in kinds:
        operator = problem.curvature(kind)  # pyright: ignore[reportArgumentType]
        found[kind] = operator @ direction()
        found[f"{kind} again"] = operator @ direction()
        found[f"{kind} positive"] = torch.tensor(operator.positive)
    return found


KINDS = ("hessian", "ggn", "fisher", "empirical_fisher", "monte_carlo_fisher")


def everything(data: Data, loss: Any, **options: Any) -> dict[str, Tensor]:
    """Return all that a problem gives over some data."""
    problem = jacops.Problem(model(), loss, data, l2={"0.*": 0.1, "2.*": 0.3}, **options)
    value, gradient = problem.value_and_gradient()
    found = {"value": torch.tensor(problem.value()), "value too": torch.tensor(value), "gradient": gradient}
    found |= {"denominator": torch.tensor(problem.denominator), "rows": torch.tensor(problem.rows)}
    plain = getattr(loss, "weight", None) is None and not isinstance(data[0], dict)
    found |= products(problem, KINDS if plain else ("hessian", "ggn"))
    ggn, noisy = problem.ggn(), problem.curvature("monte_carlo_fisher") if plain else None
    found |= {"dense": ggn.dense(), "hessian dense": problem.hessian().dense(budget="1GiB")}
    found |= {"composed": (ggn + 0.5 * problem.hessian()).dense(), "square": (ggn @ ggn).dense(budget="1GiB")}
    found |= {"diagonal": jacops.linalg.diagonal(ggn), "hessian diagonal": jacops.linalg.diagonal(problem.hessian())}
    if noisy is not None:
        found["noise"] = torch.tensor(noisy.noise)
    return found


def solves(data: Data) -> dict[str, Tensor]:
    problem = jacops.Problem(model(), nn.functional.cross_entropy, data, l2=0.01)
    A, b = problem.ggn(), direction().T  # noqa: N806
    solvers = {"cg": CG(tolerance=1e-12), "direct": Direct(), "nystrom": Nystrom(rank=20), "auto": "auto"}
    found = {name: jacops.solve(A, b, solver=how, damping=0.1).x for name, how in solvers.items()}
    for name, how in {"exact": "exact", "drawn": "monte_carlo", "labels": "empirical"}.items():
        solution = EKFAC(fisher=how).solve(A, b, damping=0.1)  # pyright: ignore[reportArgumentType]
        found |= {f"ekfac {name}": solution.x, f"ekfac {name} residual": solution.residual}
    found["kfac"] = EKFAC(corrected=False, weighted=False).solve(A, b, damping=0.1).x
    factors = jacops.linalg.kronecker_factors(problem, kind="monte_carlo", draws=2)
    found |= {f"factor {name} {i}": f for name, pair in factors.items() for i, f in enumerate(pair)}
    found |= {"norm": torch.tensor(jacops.linalg.spectral_norm(A).value)}
    return found


def by_samples(data: Data) -> dict[str, Tensor]:
    problem = jacops.Problem(model(), nn.functional.cross_entropy, data)
    rows_, outputs = problem.sample_gradients(), problem.jacobian()
    back = torch.linspace(-1, 1, outputs.shape[0], dtype=torch.float64)
    return {
        "rows": rows_.dense(),
        "rows applied": rows_ @ direction(),
        "rows transposed": rows_.T @ back[: rows_.shape[0]],
        "jacobian": outputs.dense(),
        "jacobian transposed": outputs.T @ back,
    }


def influences(data: Data) -> dict[str, Tensor]:
    given: Any = {"loss": nn.functional.cross_entropy, "damping": 0.1}
    test = batches(4, 7)
    ekfac = jacops.compute_influences(model(), data, test_data=test, solver="ekfac", **given)
    cg = jacops.compute_influences(model(), data, test_data=test, solver="cg", **given)
    top = jacops.influence.top_influences(model(), data, 3, test_data=test, solver="cg", **given)
    scaled = jacops.compute_influences(model(), data, loss=nn.functional.cross_entropy)
    return {"ekfac": ekfac.values, "cg": cg.values, "top": top.values, "auto damping": scaled.values}


CLASSES = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
SAME: dict[str, Callable[[], dict[str, Tensor]]] = {
    "plain": lambda: everything(batches(), nn.functional.cross_entropy),
    "two batches": lambda: everything(batches(12), nn.functional.cross_entropy),
    "sum": lambda: everything(batches(), nn.CrossEntropyLoss(reduction="sum")),
    "weights": lambda: everything(weighted(), nn.functional.cross_entropy),
    "classes": lambda: everything(batches(), CLASSES),
    "ignored": lambda: everything(ignored(), nn.functional.cross_entropy),
    "solves": lambda: solves(batches()),
    "solves in one": lambda: solves(batches(30)),
    "solves float32": lambda: solves_in_single(batches()),
    "by samples": lambda: by_samples(batches()),
    "influences": lambda: influences(batches()),
}


def solves_in_single(data: Data) -> dict[str, Tensor]:
    single = [(x.float(), y) for x, y in data]
    A = jacops.Problem(model().float(), nn.functional.cross_entropy, single).ggn()  # noqa: N806
    return {"ekfac": EKFAC().solve(A, direction().T.float(), damping=0.1).x}


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for name in sys.argv[4:]:
        started = time.perf_counter()
        found[name] = SAME[name]()
        print(rank, name, round(time.perf_counter() - started, 2), flush=True)
    torch.save(found, folder / f"found{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
