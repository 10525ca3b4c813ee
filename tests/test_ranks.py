"""Sums over data that ranks of a process group share: equal to one process, and what happens where a rank fails.

Every group is started once and runs many cases (`ranks_worker.py`); tests wait for the files of theirs.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import jacops
import ranks_worker
from jacops._runtime import memory
from jacops._runtime.ranks import ALONE, ranks_here
from jacops.errors import InputError, InputTypeError
from ranks_worker import CROSS, OTHER, ROWS, SAME, batches, direction, model, number, rows

HERE = Path(__file__).parent
SIZES = 2, 3
PATIENCE = 90.0  # seconds for one case on a busy machine; nothing here waits where all is well
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)]),
}
EXACT = 1e-13  # of float64: sums in another order
WITHIN = {"cg": 1e-11, "float32": 5e-6}  # of a solve to a tolerance of 1e-12, and of single precision


class World:
    """A group of processes that run cases one after the other."""

    def __init__(self, folder: Path, size: int, cases: list[str]) -> None:
        self.folder, self.size = folder, size
        worker = [sys.executable, str(HERE / "ranks_worker.py")]
        self.logs = [(folder / f"log{rank}").open("wb") for rank in range(size)]
        self.ranks = [
            subprocess.Popen(
                [*worker, str(rank), str(size), str(folder), *cases], env=ENVIRONMENT, stdout=log, stderr=log
            )
            for rank, log in enumerate(self.logs)
        ]

    def found(self, name: str, ranks: int | None = None) -> list[dict[str, Any]]:
        """What each rank found in a case."""
        files = [self.folder / f"{name}-{rank}.pt" for rank in range(self.size if ranks is None else ranks)]
        deadline = time.monotonic() + PATIENCE
        while not all(file.exists() for file in files):
            ended = [rank.poll() for rank in self.ranks]
            if time.monotonic() > deadline or any(code not in (None, 0, -9) for code in ended):
                said = "\n".join((self.folder / f"log{rank}").read_text()[-3000:] for rank in range(self.size))
                pytest.fail(f"{name} on {self.size} ranks: {ended}\n{said}")
            time.sleep(0.02)
        return [torch.load(file, weights_only=True) for file in files]

    def close(self) -> None:
        for rank, log in zip(self.ranks, self.logs, strict=True):
            rank.kill()
            rank.wait()
            log.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], World]]:
    started: dict[int, World] = {}

    def get(size: int) -> World:
        if size not in started:
            started[size] = World(tmp_path_factory.mktemp(f"ranks{size}"), size, [*SAME, *OTHER])
        return started[size]

    yield get
    for one in started.values():
        one.close()


@cache
def in_one_process(name: str) -> dict[str, Tensor]:
    return SAME[name]()


def check_equal(name: str, found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for key, value in right.items():
        limit = next((own for word, own in WITHIN.items() if word in name or word in key), EXACT)
        assert found[key].shape == value.shape, key
        off = (found[key].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-300)
        assert off <= limit, (key, float(off))


def check_same_bits(found: list[dict[str, Any]]) -> None:
    for other in found[1:]:
        for key, value in found[0].items():
            if isinstance(value, Tensor):
                assert torch.equal(value, other[key]), key


# ---- torchrun, first: nothing else runs yet -------------------------------------------------------------------------

SCRIPT = """
import sys, torch, torch.distributed as dist, jacops
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(3, 2).double()
data = [(torch.randn(n, 3).double(), torch.randint(2, (n,))) for n in (4, 4, 2)]
influences = jacops.compute_influences(model, data, loss=torch.nn.functional.cross_entropy, damping=0.1)
torch.save(influences.values, f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def test_torchrun_runs_a_script_as_it_is(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, str(script), str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).double()
    data = [(torch.randn(n, 3).double(), torch.randint(2, (n,))) for n in (4, 4, 2)]
    right = jacops.compute_influences(net, data, loss=CROSS, damping=0.1).values
    torch.testing.assert_close(first, right, rtol=1e-11, atol=1e-13)


# ---- equal to one process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("size", SIZES)
def test_ranks_equal_one_process(world: Callable[[int], World], size: int, name: str) -> None:
    found = world(size).found(name)
    check_same_bits(found)
    check_equal(name, found[0], in_one_process(name))


def test_shared_sums_are_what_autograd_defines(world: Callable[[int], World]) -> None:
    net, (x, y) = model(), rows()
    names, flat = list(dict(net.named_parameters())), torch.cat([p.detach().flatten() for p in net.parameters()])
    shapes = [p.shape for p in net.parameters()]
    ridge = torch.cat([torch.full_like(p, 0.1 if n[0] == "0" else 0.3).flatten() for n, p in net.named_parameters()])

    def objective(point: Tensor) -> Tensor:
        parts = point.split([s.numel() for s in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return CROSS(torch.func.functional_call(net, named, (x,)), y) + 0.5 * (ridge * point**2).sum()

    hessian = torch.autograd.functional.hessian(objective, flat)
    gradient = torch.autograd.functional.jacobian(objective, flat)
    for found in world(3).found("plain"):
        torch.testing.assert_close(found["value"], objective(flat), rtol=1e-13, atol=0)
        torch.testing.assert_close(found["gradient"], gradient, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(found["hessian"], hessian @ direction(), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(found["hessian dense"], hessian, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_a_loader_that_shuffles_is_read_in_the_order_of_its_data(world: Callable[[int], World], size: int) -> None:
    found = world(size).found("shuffled")
    check_same_bits(found)
    right = ranks_worker.products(jacops.Problem(model(), CROSS, batches()), ("ggn", "monte_carlo_fisher"))
    check_equal("shuffled", found[0], right)


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_a_distributed_sampler_are_summed(world: Callable[[int], World], size: int) -> None:
    found = world(size).found("samplers")
    check_same_bits([{k: v for k, v in one.items() if k != "opted out"} for one in found])
    whole = jacops.Problem(model(), CROSS, batches(4, 12 * size), l2=0.1)
    A = whole.ggn()  # noqa: N806
    right = ranks_worker.products(whole, ("hessian", "ggn", "empirical_fisher"))
    right |= {"value": number(whole.value()), "rows": number(12 * size)}
    right |= {"denominator": number(12 * size), "dropped": number(_without_ridge(12 * size, 12 * size + 1))}
    right |= {"solve": jacops.solve(A, direction().T, damping=0.1).x, "opted out": number(12)}
    right |= {"ekfac": ranks_worker.EKFAC().solve(A, direction().T, damping=0.1).x}
    check_equal("samplers", {key: found[0][key] for key in right}, right)


def _without_ridge(n: int, drawn: int) -> float:
    """Return the loss of the first n of as many rows as were drawn."""
    x, y = rows(drawn)
    return jacops.Problem(model(), CROSS, (x[:n], y[:n])).value()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("padded", ["repeats 1 of 25 rows", "drop_last=True", "multiple"]),
        ("drawn", ["DistributedSampler", "places", "plain DataLoader"]),
        ("drawn factors", ["DistributedSampler", "places", "plain DataLoader"]),
        ("by rows", ["DistributedSampler", "order", "plain DataLoader"]),
        ("influence", ["`training_data`", "DistributedSampler", "plain DataLoader"]),
        ("epoch", ["PeerFailedError", "epoch 0", "epoch 1"]),
    ],
)
def test_a_distributed_sampler_is_refused_where_it_has_no_meaning(
    world: Callable[[int], World], case: str, words: list[str]
) -> None:
    for found in world(2).found("samplers"):
        assert found[case].startswith("PeerFailedError" if case == "epoch" else "DataError"), found[case]
        assert all(word in found[case] for word in words), found[case]


def test_a_sampler_of_another_group_is_refused(world: Callable[[int], World]) -> None:
    said = [found["other rank"] for found in world(3).found("samplers")]
    assert all("rank 0 of 2" in text and f"rank {rank} of 3" in text for rank, text in enumerate(said)), said


# ---- where a rank fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("case", "own", "text"),
    [("failing_model", "ValueError", "this batch is cursed"), ("failing_data", "OSError", "the disk is gone")],
)
def test_all_ranks_end_with_the_message_of_one_that_fails(
    world: Callable[[int], World], size: int, case: str, own: str, text: str
) -> None:
    found = world(size).found(case)
    for rank, one in enumerate(found):
        kind = own if rank == 1 else "PeerFailedError"
        assert one["error"].startswith(f"{kind} after short")
        assert text in one["error"]
        assert rank == 1 or f"rank 1 of {size} failed: {own}" in one["error"]
        if "value" in one:
            assert abs(float(one["value"]) - _without_ridge(ROWS, ROWS)) < 1e-13


@pytest.mark.parametrize("size", SIZES)
def test_a_call_on_one_rank_ends(world: Callable[[int], World], size: int) -> None:
    found = world(size).found("one_rank_only")
    absent = "rank 1 of 2" if size == 2 else "ranks 1, 2 of 3"
    calls = {"error": "Problem.value", "operator": "Problem.ggn", "influence": "compute_influences (Problem.ggn)"}
    for case, call in calls.items():
        text = found[0][case]
        assert text.startswith("PeerFailedError after short")
        assert f"{call}: {absent} did not make this call within 1 s" in text
        assert "distributed=False" in text
    assert found[0]["factors"] == ""  # a call on tensors is local
    assert "GaussNewton" in found[0]["repr"]  # and so is a repr
    right = jacops.Problem(model(), CROSS, batches())
    assert float(found[0]["alone"]) == right.value()
    for one in found:  # the group is good for calls on all ranks
        assert abs(float(one["value"]) - right.value()) < 1e-13
        torch.testing.assert_close(one["product"], right.ggn() @ direction(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_different_calls_end(world: Callable[[int], World], size: int) -> None:
    first, *others = world(size).found("different_calls")
    assert "Problem.value: rank 1 called Problem.value_and_gradient" in first["error"]
    for one in others:
        assert "Problem.value_and_gradient: rank 0 called Problem.value instead" in one["error"]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *(("model", "the model"), ("buffer", "the model"), ("trained", "the model"), ("loss", "the loss")),
        *(
            ("data", "`data`"),
            ("order", "`data`"),
            ("samples", "`data`"),
            ("v", "`v`"),
            ("test", "`test_data`"),
            ("l2", "`l2`"),
            ("parameters", "`parameters`"),
        ),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_what_differs_between_ranks_is_named(world: Callable[[int], World], size: int, case: str, name: str) -> None:
    for found in world(size).found("differing"):
        assert found[case].startswith("PeerFailedError after short"), found[case]
        assert f"{name} of rank 0 (" in found[case]
        assert "of rank 1 (" in found[case]


@pytest.mark.parametrize("size", SIZES)
def test_the_smallest_budget_is_that_of_all_ranks(world: Callable[[int], World], size: int) -> None:
    for found in world(size).found("differing"):
        assert found["budget"].startswith("MemoryBudgetError"), found["budget"]


def test_training_goes_on_after_an_error(world: Callable[[int], World]) -> None:
    found = world(2).found("training_goes_on")
    check_same_bits(found)
    assert all("cursed" in one["error"] for one in found)
    assert found[0]["then"] < found[0]["first"]


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_is_killed_ends_the_others(world: Callable[[int], World], size: int) -> None:
    for found in world(size).found("killed", ranks=size - 1):
        assert found["error"].startswith("PeerFailedError after short")
        assert "was lost" in found["error"]


# ---- arguments, budgets ----------------------------------------------------------------------------------------------


def test_without_a_group_there_is_one_rank() -> None:
    assert not dist.is_initialized()
    assert ranks_here() is ALONE
    assert jacops.Problem(model(), CROSS, batches()).ranks is ALONE


@pytest.mark.parametrize(("option", "value"), [("distributed", "no"), ("timeout", 0.0), ("timeout", -1.0)])
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises((InputError, InputTypeError), match=option):
        jacops.Problem(model(), CROSS, batches(), **{option: value})


def test_budgets_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_ram", lambda: iter([2**30]))
    monkeypatch.setattr(memory, "_cgroup_room", lambda: iter([2**31]))
    monkeypatch.setattr(memory, "_address_room", lambda: iter([2**40]))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.free_bytes(torch.device("cpu")) == 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(torch.device("cpu")) == 2**28
