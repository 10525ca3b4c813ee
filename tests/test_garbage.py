"""No call leaves tensors in reference cycles: memory is free when a call returns, not when the collector runs next.

Budgets rely on that. A cycle is easily made: an inner function that calls itself is one, an object that holds a closure
over itself another.
"""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops.fit import least_squares_batch
from small import draw, settled


def net() -> nn.Module:
    return settled(nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)))


def convolutions() -> nn.Module:
    return settled(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(0, 1, 40).double())

    def forward(self) -> Tensor:
        return torch.cat([self.x[1:] - self.x[:-1] ** 2, 1 - self.x])


MODEL, X, Y = net(), draw(20, 6), torch.randint(3, (20,), generator=torch.Generator().manual_seed(0))
CHAIN = Chain()
IMAGES = draw(8, 1, 6, 6)
LOADER = [(X[:12], Y[:12]), (X[12:], Y[12:])]
VECTOR = draw(sum(p.numel() for p in MODEL.parameters()))
LOSS = F.cross_entropy
CALLS: dict[str, Callable[[], Any]] = {
    "compute_jacobian": lambda: jacops.compute_jacobian(MODEL, X),
    "compute_jacobian, forward": lambda: jacops.compute_jacobian(MODEL, X, mode="forward"),
    "compute_jacobian, budget": lambda: jacops.compute_jacobian(MODEL, X, budget="200MiB"),
    "contributions": lambda: jacops.contributions(MODEL, X),
    "contributions, budget": lambda: jacops.contributions(MODEL, X, budget="200MiB"),
    "contributions, frozen": lambda: jacops.contributions(MODEL, X, freeze="GELU"),
    "contributions of images": lambda: jacops.contributions(convolutions(), IMAGES),
    "integrated_jacobian": lambda: jacops.integrated_jacobian(MODEL, X[:2], steps=3, on_failure="return"),
    "input_hessian": lambda: jacops.input_hessian(MODEL, X[:3]),
    "laplacian": lambda: jacops.laplacian(MODEL, X[:3]),
    "jvp": lambda: jacops.model_jvp(MODEL, X, list(MODEL.parameters())),
    "modjac": lambda: jacops.modjac(MODEL, X),
    "modjac, forward": lambda: jacops.modjac(MODEL, X, strategy="forward-mode"),
    "modjac, sparse": lambda: jacops.modjac(CHAIN, None, sparse=True),
    "hvp": lambda: jacops.hvp(MODEL, LOSS, X, Y, VECTOR),
    "hessian": lambda: jacops.hessian(MODEL, LOSS, X, Y).dense(),
    "ggn": lambda: jacops.ggn(MODEL, LOSS, X, Y).dense(),
    "diagonal": lambda: jacops.linalg.diagonal(jacops.ggn(MODEL, LOSS, X, Y)),
    "sample_gradients": lambda: jacops.sample_gradients(MODEL, LOSS, X, Y).gram(),
    "kronecker_factors": lambda: jacops.kronecker_factors(MODEL, LOSS, X, Y),
    "solve": lambda: jacops.solve(jacops.ggn(MODEL, LOSS, X, Y), VECTOR, "cg", damping=0.1),
    "influences": lambda: jacops.compute_influences(MODEL, LOADER, loss=LOSS, damping=0.1),
    "influences, EK-FAC": lambda: jacops.compute_influences(MODEL, LOADER, loss=LOSS, damping=0.1, solver="ekfac"),
    "fit": lambda: jacops.levenberg_marquardt(lambda p: p**2 - 2, params=torch.ones(3).double()),
    "fit, sparse": lambda: jacops.levenberg_marquardt(CHAIN, inplace=False),
    "fits": lambda: least_squares_batch(lambda p: p**2 - 2, params=torch.ones(5, 3).double()),
}


def left_by(call: Callable[[], Any]) -> list[Tensor]:
    """Return the tensors that only the garbage collector frees after a call whose result is dropped."""
    for _ in range(3):  # what other tests left, such as compiled code, takes more than one pass
        gc.collect()
    gc.disable()
    try:
        call()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [thing for thing in gc.garbage if type(thing) in (Tensor, nn.Parameter)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_no_tensor_to_the_garbage_collector(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CALLS[name]()  # proofs are made and kept
        left = left_by(CALLS[name])
    assert not left, f"{len(left)} tensors, {sum(t.untyped_storage().nbytes() for t in left):,} bytes"


def test_what_is_left_is_seen() -> None:
    def cyclic() -> None:
        tensor = torch.zeros(3)

        def walk(depth: int) -> Any:
            return walk(depth - 1) if depth else tensor

        walk(2)

    assert len(left_by(cyclic)) == 1
