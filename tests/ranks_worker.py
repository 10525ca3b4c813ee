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
from jacops.solvers import CG, EKFAC, MINRES, Direct, LiSSA, Nystrom

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


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def products(problem: jacops.Problem, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    found = {}
    for kind in kinds:
        operator = problem.curvature(kind)  # pyright: ignore[reportArgumentType]
        found[kind] = operator @ direction()
        found[f"{kind} again"] = operator @ direction()
        found[f"{kind} positive"] = number(operator.positive)
    return found


KINDS = ("hessian", "ggn", "fisher", "empirical_fisher", "monte_carlo_fisher")


def few(data: Data, loss: Any) -> dict[str, Tensor]:
    """Return what rests on how batches enter the whole."""
    problem = jacops.Problem(model(), loss, data)
    value, gradient = problem.value_and_gradient()
    found = {"value": number(value), "gradient": gradient, "denominator": number(problem.denominator)}
    factors = EKFAC(fisher="exact").approximate(problem.ggn())
    return {**found, **products(problem, ("hessian", "ggn")), "ekfac": factors @ direction()}


def everything(data: Data, loss: Any) -> dict[str, Tensor]:
    """Return all that a problem gives over some data."""
    problem = jacops.Problem(model(), loss, data, l2={"0.*": 0.1, "2.*": 0.3})
    value, gradient = problem.value_and_gradient()
    found = {"value": number(problem.value()), "value too": number(value), "gradient": gradient}
    found |= {"denominator": number(problem.denominator), "rows": number(problem.rows)}
    found |= products(problem, KINDS)
    ggn, found["noise"] = problem.ggn(), number(problem.fisher("monte_carlo").noise)
    found |= {"dense": ggn.dense(), "hessian dense": problem.hessian().dense(budget="1GiB")}
    found |= {"composed": (ggn + 0.5 * problem.hessian()).dense(), "square": (ggn @ ggn).dense(budget="1GiB")}
    found |= {"diagonal": jacops.linalg.diagonal(ggn), "hessian diagonal": jacops.linalg.diagonal(problem.hessian())}
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
    factors = jacops.kronecker_factors(problem, kind="monte_carlo", draws=2)
    found |= {f"factor {name} {i}": f for name, pair in factors.items() for i, f in enumerate(pair)}
    more = {"lissa": LiSSA(), "minres": MINRES(tolerance=1e-12)}
    found |= {f"{name} cg": jacops.solve(A, b, solver=how, damping=1.0).x for name, how in more.items()}
    pairs = jacops.linalg.eigenpairs(A, 3)
    trace = jacops.linalg.trace(A, 10)
    found |= {"norm": number(jacops.linalg.spectral_norm(A).value), "pairs cg": pairs.values}
    return {**found, "trace": number(trace.value)}


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
    found = {"ekfac": ekfac.values, "cg": cg.values, "top cg": top.values, "auto damping": scaled.values}
    own = jacops.self_influences(model(), data, solver="direct", **given)
    return {**found, "own": own}


def other_influences(data: Data) -> dict[str, Tensor]:
    given: Any = {"loss": nn.functional.cross_entropy, "damping": 0.1, "solver": "direct", "test_data": batches(4, 7)}
    sided = jacops.compute_influences(model(), data, leverage=True, **given)
    moved = jacops.compute_influences(model(), data, influence_type="perturbation", **given)
    grouped = jacops.influence.group_influences(model(), data, [i % 3 for i in range(ROWS)], **given)
    states = [model().state_dict(), model().state_dict()]
    tracked = jacops.influence.tracin(model(), data, states, loss=nn.functional.cross_entropy)
    return {"leverage": sided.values, "moved": moved.values, "grouped": grouped.values, "tracked": tracked.values}


CLASSES = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
SAME: dict[str, Callable[[], dict[str, Tensor]]] = {
    "plain": lambda: everything(batches(), nn.functional.cross_entropy),
    "two batches": lambda: few(batches(12), nn.functional.cross_entropy),
    "sum": lambda: few(batches(), nn.CrossEntropyLoss(reduction="sum")),
    "weights": lambda: few(weighted(), nn.functional.cross_entropy),
    "classes": lambda: few(batches(), CLASSES),
    "ignored": lambda: few(ignored(), nn.functional.cross_entropy),
    "solves": lambda: solves(batches()),
    "solves in one": lambda: solves(batches(30)),
    "solves float32": lambda: solves_in_single(batches()),
    "by samples": lambda: by_samples(batches(12)),
    "influences": lambda: influences(batches()),
    "other influences": lambda: other_influences(batches()),
}


def solves_in_single(data: Data) -> dict[str, Tensor]:
    single = [(x.float(), y) for x, y in data]
    A = jacops.Problem(model().float(), nn.functional.cross_entropy, single).ggn()  # noqa: N806
    return {"ekfac": EKFAC().solve(A, direction().T.float(), damping=0.1).x}


# ---- what goes wrong, and other data ---------------------------------------------------------------------------------

Said = dict[str, Any]


def said(call: Callable[[], Any]) -> str:
    """Return the error of a call as text, with the seconds that it took; no error is none."""
    started = time.monotonic()
    try:
        call()
    except Exception as error:
        seconds = time.monotonic() - started
        return f"{type(error).__name__} after {'long' if seconds > 10 else 'short'}: {error}"
    return ""


class Failing(nn.Module):
    """A model that fails on one batch."""

    def __init__(self, at: Tensor) -> None:
        super().__init__()
        self.inner, self.at = model(), at

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[0] == self.at).all()):
            raise ValueError("this batch is cursed")
        return self.inner(x)


class FailingData(Data):
    """Batches of which one rank cannot read the last in its second pass."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        for number in range(len(self)):
            if self.passes == 2 and dist.get_rank() == 1 and number == 3:
                raise OSError("the disk is gone")
            yield self[number]


CROSS = nn.functional.cross_entropy


def failing_model() -> Said:
    problem = jacops.Problem(Failing(rows()[0][5]), CROSS, batches())
    return {"error": said(problem.value), "again": said(problem.value)}


def failing_data() -> Said:
    problem = jacops.Problem(model(), CROSS, FailingData(batches()))
    return {"error": said(problem.value), "value": number(problem.value())}


def one_rank_only() -> Said:
    """A call on one rank alone, then one on all."""
    problem = jacops.Problem(model(), CROSS, batches(), timeout=1.0)
    alone = jacops.Problem(model(), CROSS, batches(), distributed=False)
    found: Said = {"first": number(problem.value())}
    if dist.get_rank() == 0:
        found |= {"error": said(problem.value), "alone": number(alone.value())}
        found["factors"] = said(lambda: jacops.hessian(model(), CROSS, *batches()[0]) @ direction())
    dist.barrier()
    ggn = jacops.Problem(model(), CROSS, batches()).ggn()
    if dist.get_rank() == 0:
        found["repr"] = repr(ggn) + repr(problem)
        found["operator"] = said(lambda: jacops.Problem(model(), CROSS, batches(), timeout=1.0).ggn() @ direction())
        found["influence"] = said(lambda: jacops.compute_influences(model(), batches(), loss=CROSS, timeout=1.0))
    dist.barrier()
    return {**found, "product": ggn @ direction(), "value": number(problem.value())}


def different_calls() -> Said:
    problem = jacops.Problem(model(), CROSS, batches())
    error = said(problem.value if dist.get_rank() == 0 else problem.value_and_gradient)
    return {"error": error, "value": number(problem.value())}


def other_on_rank_1(**changes: Any) -> str:
    """Return the error where rank 1 has other arguments of a problem."""
    given = {"model": model(), "loss": CROSS, "data": batches()}
    if dist.get_rank() == 1:
        given |= changes
    return said(lambda: jacops.Problem(**given).ggn())


def differing() -> Said:
    other = model()
    with torch.no_grad():
        other[0].bias[0] += 1e-9
    buffered = nn.Sequential(nn.BatchNorm1d(4), model()).double().eval()
    changed = nn.Sequential(nn.BatchNorm1d(4), model()).double().eval()
    changed[0].running_mean += 1.0
    trained = jacops.Problem(model(), CROSS, batches())
    trained.value()
    if dist.get_rank() == 1:
        with torch.no_grad():
            trained.objective.model[0].bias[0] += 1.0
    mine = rows(5 + dist.get_rank())
    of_rows = jacops.Problem(model(), CROSS, batches())
    return {
        "model": other_on_rank_1(model=other),
        "buffer": said(lambda: jacops.Problem(changed if dist.get_rank() else buffered, CROSS, batches()).ggn()),
        "trained": said(trained.value),
        "data": other_on_rank_1(data=batches(n=22)),
        "order": other_on_rank_1(data=batches()[::-1]),
        "loss": other_on_rank_1(loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
        "l2": other_on_rank_1(l2=0.5),
        "parameters": other_on_rank_1(parameters="0.*"),
        "budget": said(lambda: of_rows.hessian().dense(budget="1kB" if dist.get_rank() == 1 else "1GiB")),
        "v": said(lambda: of_rows.ggn() @ (direction() + dist.get_rank())),
        "test": said(lambda: jacops.compute_influences(model(), batches(), test_data=[mine], loss=CROSS, damping=0.1)),
        "samples": said(lambda: of_rows.sample_gradients(batches(3 + dist.get_rank()))),
    }


def sampled(n: int, **options: Any) -> DataLoader[Any]:
    data = TensorDataset(*rows(n))
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, **options))


def samplers() -> Said:
    """Loaders that a user's training has, whose ranks have rows of their own."""
    even, kinds = 4 * dist.get_world_size() * 3, ("hessian", "ggn", "empirical_fisher")
    problem = jacops.Problem(model(), CROSS, sampled(even), l2=0.1)
    dropped = jacops.Problem(model(), CROSS, sampled(even + 1, drop_last=True, shuffle=False))
    A = problem.ggn()  # noqa: N806
    epoch = sampled(even)
    epoch.sampler.set_epoch(dist.get_rank())
    return {
        **products(problem, kinds),
        "value": number(problem.value()),
        "rows": number(problem.rows),
        "denominator": number(problem.denominator),
        "solve": jacops.solve(A, direction().T, solver="auto", damping=0.1).x,
        "ekfac": EKFAC().solve(A, direction().T, damping=0.1).x,
        "dropped": number(dropped.value()),
        "padded": said(lambda: jacops.Problem(model(), CROSS, sampled(even + 1))),
        "drawn": said(lambda: problem.fisher("monte_carlo")),
        "drawn factors": said(lambda: EKFAC(fisher="monte_carlo").approximate(A)),
        "by rows": said(problem.sample_gradients),
        "influence": said(lambda: jacops.compute_influences(model(), sampled(even), loss=CROSS, solver="cg")),
        "other rank": said(lambda: jacops.Problem(model(), CROSS, sampled(even, num_replicas=2, rank=0))),
        "epoch": said(jacops.Problem(model(), CROSS, epoch).value),
        "opted out": number(jacops.Problem(model(), CROSS, sampled(even), distributed=False).rows),
    }


def shuffled() -> Said:
    """A loader that shuffles by each rank's own random state is read in the order of its data."""
    torch.manual_seed(dist.get_rank())
    loader = DataLoader(TensorDataset(*rows()), batch_size=5, shuffle=True)
    problem = jacops.Problem(model(), CROSS, loader)
    return {**products(problem, ("ggn", "monte_carlo_fisher"))}


def training_goes_on() -> Said:
    """DistributedDataParallel beside jacops, before and after an error."""
    net = nn.parallel.DistributedDataParallel(model())
    problem = jacops.Problem(net, CROSS, batches())
    first = problem.value()
    error = said(jacops.Problem(Failing(rows()[0][5]), CROSS, batches()).value)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    CROSS(net(rows()[0]), rows()[1]).backward()
    optimiser.step()
    return {"first": number(first), "error": error, "then": number(problem.value())}


def killed() -> Said:
    """The last rank dies in the middle of a solve."""
    A = jacops.Problem(model(), CROSS, batches()).ggn()  # noqa: N806
    apply, count = A.parts, [0]

    def dying() -> Any:
        count[0] += 1
        if count[0] == 4 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return apply()

    object.__setattr__(A, "parts", dying)
    return {"error": said(lambda: jacops.solve(A, direction().T, solver=CG(), damping=0.01))}


OTHER: dict[str, Callable[[], Said]] = {
    case.__name__: case
    for case in (
        *(failing_model, failing_data, one_rank_only, different_calls, differing, samplers, shuffled),
        *(training_goes_on, killed),
    )
}


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    for name in sys.argv[4:]:
        found = (SAME | OTHER)[name]()
        written = folder / f"{name}-{rank}.part"
        torch.save(found, written)
        written.rename(written.with_suffix(".pt"))
    if "killed" in sys.argv:
        os._exit(0)  # torch's own clean-up would wait for the dead
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
