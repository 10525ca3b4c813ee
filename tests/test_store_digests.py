"""Digests: the same in every process, and another as soon as anything that changes numbers does."""

import contextlib
import copy
import functools
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jacops.errors import InputError, InputTypeError
from jacops.store import DataDigest, digest_data, digest_function, digest_module, digest_tensors, surroundings
from small import draw, small_net

CASES = """
import torch, numpy as np
from torch import nn
from jacops.store import digest_data, digest_function, digest_module, digest_tensors
x = torch.arange(6.0).reshape(2, 3)
class Loss(nn.Module):
    def forward(self, output, y): return ((output - y) ** 2).mean()
torch.manual_seed(0)
print(digest_tensors({"x": x, "n": np.arange(3)}))
print(digest_module(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.LSTM(3, 3))))
print(digest_data([(x, x[0]), {"a": x, "label": "b"}]))
print(digest_function(lambda a, b: a in {"one", "two", "three"} or x @ b))
print(digest_function(torch.nn.functional.cross_entropy), digest_function(Loss()), digest_function(torch.dot))
"""


def test_digests_are_the_same_in_every_process():
    there = subprocess.run(
        [sys.executable, "-c", CASES], stdout=subprocess.PIPE, text=True, env={"PYTHONHASHSEED": "1"}
    )
    with contextlib.redirect_stdout(io.StringIO()) as here, torch.random.fork_rng(devices=[]):
        exec(CASES, {"__name__": "__main__"})
    assert there.stdout == here.getvalue()
    assert len(set(there.stdout.split())) == 7


X = draw(4, 3)
TENSORS: dict[str, dict[str, Any]] = {
    "as it is": {"x": X},
    "a value": {"x": X + 1e-15},
    "a name": {"y": X},
    "a shape": {"x": X.reshape(3, 4)},
    "a dtype": {"x": X.view(torch.int64)},
    "transposed": {"x": X.T},
    "one more": {"x": X, "y": X[:0]},
    "empty": {"x": X[:0]},
    "empty otherwise": {"x": X[:, :0]},
    "conjugated": {"x": X * 1j},
    "conjugate": {"x": (X * 1j).conj()},
    "half": {"x": X.bfloat16()},
    "a number": {"x": X[0, 0]},
}


def test_tensors_that_differ_have_other_digests():
    digests = {kind: digest_tensors(named) for kind, named in TENSORS.items()}
    assert len(set(digests.values())) == len(digests)


def test_tensors_that_are_equal_have_one_digest():
    assert digest_tensors({"a": X, "b": X.T}) == digest_tensors({"b": X.T.contiguous(), "a": nn.Parameter(X.clone())})
    assert (
        digest_tensors({"a": X}) == digest_tensors({"a": X.numpy()}) == digest_tensors({"a": X.numpy().astype(">f8")})
    )


def altered(change: Callable[[Any], Any]) -> nn.Module:
    model = nn.Sequential(*copy.deepcopy(list(small_net())), nn.BatchNorm1d(2))
    change(model)
    return model


MODULES: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda model: None,
    "a weight": lambda model: model[2].bias.data[1].add_(1e-3),
    "a buffer": lambda model: model[3].running_mean.add_(1),
    "an activation": lambda model: model.__setitem__(1, nn.ReLU()),
    "a setting": lambda model: setattr(model[3], "eps", 1e-3),
    "a mode": lambda model: model[3].eval(),
    "a tie": lambda model: model.append(model[0]),
}


def test_modules_that_differ_have_other_digests():
    digests = {kind: digest_module(altered(change)) for kind, change in MODULES.items()}
    assert len(set(digests.values())) == len(digests)
    assert digests["as it is"] == digest_module(altered(MODULES["as it is"]))


def mean_loss(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean()


def weighted(weight: Tensor | float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, y: (weight * (output - y) ** 2).mean()


FUNCTIONS: dict[str, Callable[[], Any]] = {
    "a function": lambda: mean_loss,
    "a lambda": lambda: lambda output, y: ((output - y) ** 2).mean(),
    "another lambda": lambda: lambda output, y: ((output - y) ** 2).sum(),
    "another constant": lambda: lambda output, y: ((output - y) ** 3).mean(),
    "a default": lambda: lambda output, y, power=2: ((output - y) ** power).mean(),
    "another default": lambda: lambda output, y, power=4: ((output - y) ** power).mean(),
    "closing over 1": lambda: weighted(1.0),
    "closing over 2": lambda: weighted(2.0),
    "closing over a tensor": lambda: weighted(draw(2)),
    "closing over another": lambda: weighted(draw(2, seed=1)),
    "from torch": lambda: F.mse_loss,
    "partly applied": lambda: functools.partial(F.mse_loss, reduction="sum"),
    "partly applied otherwise": lambda: functools.partial(F.mse_loss, reduction="mean"),
    "a module": lambda: nn.MSELoss(),
    "a module with a setting": lambda: nn.MSELoss(reduction="sum"),
    "a method": lambda: nn.MSELoss().forward,
    "built in": lambda: torch.dot,
    "another built in": lambda: torch.matmul,
}


def test_functions_that_differ_have_other_digests():
    digests = {kind: digest_function(make()) for kind, make in FUNCTIONS.items()}
    assert len(set(digests.values())) == len(digests)
    assert digests == {kind: digest_function(make()) for kind, make in FUNCTIONS.items()}


def test_a_function_that_closes_over_itself_has_a_digest():
    def descend(n: int) -> int:
        return n and descend(n - 1)

    assert len(digest_function(descend)) == 32


BATCHES: dict[str, list[Any]] = {
    "as it is": [(X, X[:, 0]), (X + 1, X[:, 1])],
    "other order": [(X + 1, X[:, 1]), (X, X[:, 0])],
    "other borders": [(torch.cat([X, X + 1]), torch.cat([X[:, 0], X[:, 1]]))],
    "one batch less": [(X, X[:, 0])],
    "a label": [(X, X[:, 0]), (X + 1, X[:, 1] + 1)],
    "a dict": [{"x": X, "y": X[:, 0]}, {"x": X + 1, "y": X[:, 1]}],
    "other keys": [{"x": X, "z": X[:, 0]}, {"x": X + 1, "z": X[:, 1]}],
    "with text": [(X, X[:, 0], "a"), (X + 1, X[:, 1], "b")],
    "nothing": [],
}


def test_data_that_differ_have_other_digests():
    digests = {kind: digest_data(batches) for kind, batches in BATCHES.items()}
    assert len(set(digests.values())) == len(digests)


def test_data_may_be_taken_in_as_they_are_read():
    digest = DataDigest()
    for batch in BATCHES["as it is"]:
        digest.update(batch)
    assert digest.hexdigest() == digest_data(iter(BATCHES["as it is"]))


def test_data_with_a_name_are_not_read():
    def never() -> Any:
        raise AssertionError("it was read")
        yield

    assert digest_data(never(), data_id="imagenet-2012") == "id:imagenet-2012"


def test_what_has_no_digest_is_named():
    with pytest.raises(InputTypeError, match=r"batch 0\[1\].*Path.*data_id"):
        digest_data([(X, Path("image.png"))])
    with pytest.raises(InputTypeError, match="object"):
        digest_tensors({"names": np.array([object()])})
    for tensor in (X.to_sparse(), X.to("meta"), nn.UninitializedParameter()):
        with pytest.raises(InputError, match="`x`"):
            digest_tensors({"x": tensor})
    with pytest.raises(InputError, match=r"0\.(weight|bias)"):
        digest_module(nn.Sequential(nn.LazyLinear(2)))


def test_surroundings_are_short_texts():
    found = surroundings("cuda:0")
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["device"] == "cuda:0"
    assert all(isinstance(value, str) for value in found.values())
