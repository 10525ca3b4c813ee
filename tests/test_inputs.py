"""What goes into calls: one output per sample, settings, shared tensors, mappings and loaders, against plain loops."""

from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian as plain_hessian
from torch.autograd.functional import jacobian as plain_jacobian
from torch.nn import functional as F
from torch.utils import data as loading

import jacops
from jacops.errors import DataError, InputError, InputTypeError, JacopsWarning

torch.manual_seed(0)
F64, N, C = torch.float64, 7, 4
X, V, Y = torch.randn(N, 3, dtype=F64), torch.randn(N, 3, dtype=F64), torch.tensor([0, 3, 1, 1, 2, 0, 3])
TABLE, MASK = torch.randn(C, C, dtype=F64), torch.rand(C, dtype=F64)


class Model(nn.Module):
    """A model with settings, an input without an axis of samples, and one that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, C).double()

    def forward(self, x: Tensor, table: Tensor, flag: bool | None = None, power: float = 1, kind: str = "relu",
                mask: Tensor | None = None) -> Tensor:  # fmt: skip
        hidden = (torch.tanh if kind == "tanh" else torch.relu)(self.lin(x) @ table) ** power
        hidden = hidden if mask is None else hidden * mask
        return hidden if flag is None else hidden.exp()


class Bound(nn.Module):
    """The same with everything but `x` bound, whose calls need none of the forms."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, TABLE, True, 2, "tanh", MASK)


class Batched:
    """Batches with a length, of no loader's class."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


MODEL = Model()
BOUND = Bound(MODEL)
NAMED = {"x": X, "table": TABLE, "flag": True, "power": 2, "kind": "tanh", "mask": MASK}
FORMS: dict[str, tuple[Any, Any]] = {
    "a mapping": (NAMED, ["table", "mask"]),
    "another mapping": (UserDict(NAMED), ("mask", "table")),
    "a tuple": (tuple(NAMED.values()), [1, 5]),
}
LOADER = loading.DataLoader(loading.TensorDataset(X, Y), batch_size=3)


def loader(**options: Any) -> loading.DataLoader:
    return loading.DataLoader(loading.TensorDataset(X, Y), batch_size=3, **options)


def loss(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y)


def one_by_one(of: Callable[[Callable[[Tensor], Tensor], int], Tensor], target: Tensor | None = None) -> Tensor:
    """Return what `of` gives for every sample of the bound model alone: its function, and its place."""

    def function(i: int) -> Callable[[Tensor], Tensor]:
        return lambda x: BOUND(x[None])[0] if target is None else BOUND(x[None])[0, target[i]]

    return torch.stack([of(function(i), i) for i in range(N)])


def slope_along(f: Callable[[Tensor], Tensor], i: int) -> Tensor:
    return plain_jacobian(f, X[i]) @ V[i]


def hessians(f: Callable[[Tensor], Tensor], i: int) -> Tensor:
    outputs = f(X[i]).numel()
    parts = [plain_hessian(lambda x, k=k: f(x).reshape(-1)[k], X[i]) for k in range(outputs)]
    return torch.stack(parts).reshape(*f(X[i]).shape, 3, 3)  # pyright: ignore[reportCallIssue, reportArgumentType]


def parameter_rows(f: Callable[[Tensor], Tensor], i: int) -> Tensor:
    outputs = f(X[i])
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(o, list(MODEL.parameters()), retain_graph=True)])
            for o in outputs.reshape(-1)]  # fmt: skip
    return torch.stack(rows).reshape(*outputs.shape, -1)


def gradients(f: Callable[[Tensor], Tensor], i: int) -> Tensor:
    found = torch.autograd.grad(loss(f(X[i])[None], Y[i : i + 1]), list(MODEL.parameters()))
    return torch.cat([g.flatten() for g in found])


Asked = tuple[Callable[..., Any], Callable[[Callable[[Tensor], Tensor], int], Tensor]]
BY_INPUT: dict[str, Asked] = {  # how a call is made, and what it gives for one sample
    "compute_jacobian": (jacops.compute_jacobian, lambda f, i: plain_jacobian(f, X[i])),  # pyright: ignore
    "input_hessian": (jacops.input_hessian, hessians),
    "laplacian": (jacops.laplacian, lambda f, i: hessians(f, i).diagonal(dim1=-2, dim2=-1).sum(-1)),
    "directional_derivative": (
        lambda model, x, **o: jacops.directional_derivative(model, x, along(x), **o),
        slope_along,
    ),
}
BY_PARAMETERS: dict[str, Asked] = {
    "sample_jacobians": (lambda *a, **o: matrix(jacops.sample_jacobians(*a, **o)), parameter_rows),
    "sample_gradients": (
        lambda model, x, **o: jacops.sample_gradients(model, loss, x, *y_beside(x), **o).dense(), gradients),
}  # fmt: skip
ASKED = BY_INPUT | BY_PARAMETERS


def matrix(rows: Any) -> Tensor:
    return rows.dense().reshape(*rows.codomain.shapes[0], -1)


def y_beside(x: Any) -> tuple[Tensor, ...]:
    return () if isinstance(x, loading.DataLoader | list | Batched) else (Y,)


def along(x: Any) -> Any:
    """Return directions in the structure of `x`."""
    if isinstance(x, tuple):
        return (V, *x[1:])
    named = isinstance(x, Batched) and isinstance(x.batches[0], dict)
    return {**x, "x": V} if isinstance(x, dict | UserDict) else {"x": V} if named else V


def by_x(found: Any) -> Tensor:
    """Return the part of a result that is by `x`; all others are None."""
    if isinstance(found, Tensor):
        return found
    parts = list(found.values()) if isinstance(found, dict | UserDict) else list(found)
    assert all(part is None for part in parts[1:])
    return by_x(parts[0])


# ---- every call, every form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", ASKED)
def test_settings_and_shared_tensors_are_passed_on(call: str, form: str) -> None:
    (made, alone), (given, shared) = ASKED[call], FORMS[form]
    torch.testing.assert_close(by_x(made(MODEL, given, shared=shared)), one_by_one(alone))


@pytest.mark.parametrize("batch_size", [1, 3, 1024])
@pytest.mark.parametrize("call", BY_INPUT)
def test_one_output_per_sample(call: str, batch_size: int) -> None:
    made, alone = BY_INPUT[call]
    found = made(BOUND, X, target=Y, batch_size=batch_size)
    torch.testing.assert_close(found, one_by_one(alone, Y))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_one_output_per_sample_along_directions_of_any_order(order: int) -> None:
    whole = jacops.directional_derivative(BOUND, X, V, order)
    found = jacops.directional_derivative(BOUND, X, V, order, target=Y)
    torch.testing.assert_close(found, whole[torch.arange(N), Y])


def test_one_output_per_sample_by_parameters() -> None:
    found = jacops.sample_jacobians(BOUND, X, target=Y)
    assert found.shape == (N, 16)
    torch.testing.assert_close(found.dense(), one_by_one(parameter_rows, Y))


@pytest.mark.parametrize("mode", ["reverse", "forward", "auto"])
@pytest.mark.parametrize("checks", ["first", "always", "strict", "never"])
def test_one_output_per_sample_on_every_route(mode: Any, checks: str) -> None:
    found = jacops.compute_jacobian(BOUND, X, 3, target=Y, mode=mode, checks=checks)
    torch.testing.assert_close(found, one_by_one(BY_INPUT["compute_jacobian"][1], Y))


def test_one_output_per_sample_of_samples_that_mix() -> None:
    def mixing(x: Tensor) -> Tensor:
        return BOUND(x - x.mean(0) + x[:1] * 0)

    with pytest.warns(JacopsWarning, match="samples mix|one at a time|alone"):
        found = jacops.compute_jacobian(mixing, X, target=Y)
    assert torch.equal(found, torch.zeros_like(found)), "a batch of one minus its mean is zero whatever x is"


def test_places_are_along_the_last_axis_after_outputs() -> None:
    def model(x: Tensor) -> dict[str, Tensor]:
        hidden = BOUND(x)
        return {"logits": torch.stack([hidden, hidden**2, hidden**3], 1), "hidden": hidden}

    found = jacops.compute_jacobian(model, X, outputs="logits", target=Y)
    whole = jacops.compute_jacobian(model, X, outputs="logits")
    torch.testing.assert_close(found, whole[torch.arange(N), :, Y])
    with pytest.raises(InputError, match="`target` is given with an output that is a dict"):
        jacops.compute_jacobian(model, X, target=Y)


def test_no_samples_have_no_outputs() -> None:
    assert jacops.compute_jacobian(BOUND, X[:0], target=Y[:0]).shape == (0, 3)
    assert jacops.input_hessian(BOUND, X[:0], target=Y[:0]).shape == (0, 3, 3)


class Counted(torch.autograd.Function):
    """The identity, counting how often a derivative passes it, and for how many cotangents at once."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        Counted.passes += 1
        return grads[0]


@pytest.mark.parametrize("outputs", [4, 50])
def test_a_batch_takes_one_sweep(outputs: int) -> None:
    model = nn.Sequential(nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, outputs)).double()
    x, y = torch.randn(6, 60, dtype=F64), torch.randint(outputs, (6,))

    def counted(x: Tensor) -> Tensor:
        return model(Counted.apply(x))

    def sweeps(batches: int) -> int:
        jacops.compute_jacobian(counted, x, 6 // batches, target=y, checks="never", mode="reverse")
        Counted.passes = 0
        jacops.compute_jacobian(counted, x, 6 // batches, target=y, checks="never", mode="reverse")
        return Counted.passes

    assert [sweeps(batches) for batches in (1, 2, 3)] == [1, 2, 3]


def test_contributions_of_one_output_per_sample() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, C)).double()
    whole, found = jacops.contributions(model, X), jacops.contributions(model, X, target=Y, batch_size=2)
    rows = torch.arange(N)
    for name in ("values", "bias", "output", "jacobian"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name)[rows, Y])
    assert found.verification.relative_error < 1e-12


WHOLE: dict[str, Callable[[Any], Tensor]] = {
    "jacobian": lambda x: jacops.jacobian(MODEL, x).dense(),
    "hessian": lambda x: jacops.hessian(MODEL, loss, x, Y).dense(),
    "ggn": lambda x: jacops.ggn(MODEL, loss, x, Y).dense(),
    "fisher": lambda x: jacops.fisher(MODEL, loss, x, Y).dense(),
    "modjac": lambda x: jacops.modjac(MODEL, x, flatten=True),
    "modjac, sparse": lambda x: jacops.modjac(MODEL, x, sparse=True).to_dense(),
    "hvp": lambda x: jacops.hvp(MODEL, loss, x, Y, torch.linspace(0, 1, 16, dtype=F64)),
}
BOUND_WHOLE = {
    "jacobian": lambda: plain_jacobian_by_parameters(),
    "modjac": lambda: plain_jacobian_by_parameters(),
    "modjac, sparse": lambda: plain_jacobian_by_parameters(),
    "hessian": lambda: jacops.hessian(BOUND, loss, X, Y).dense(),
    "ggn": lambda: jacops.ggn(BOUND, loss, X, Y).dense(),
    "fisher": lambda: jacops.fisher(BOUND, loss, X, Y).dense(),
    "hvp": lambda: jacops.hvp(BOUND, loss, X, Y, torch.linspace(0, 1, 16, dtype=F64)),
}


def plain_jacobian_by_parameters() -> Tensor:
    return one_by_one(parameter_rows).reshape(N * C, -1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", WHOLE)
def test_calls_on_a_whole_batch_pass_on_what_a_model_takes(call: str, form: str) -> None:
    torch.testing.assert_close(WHOLE[call](FORMS[form][0]), BOUND_WHOLE[call]())


def test_a_mapping_in_a_tuple_is_passed_whole() -> None:
    class Reader(nn.Module):
        def forward(self, inputs: Any) -> Tensor:
            assert type(inputs) is kind, "it is of the kind that was given"
            return BOUND(inputs["x"])

    for kind in (dict, UserDict):
        found = jacops.compute_jacobian(Reader(), (kind(x=X, note="passed on"),))[0]
        assert found["note"] is None
        torch.testing.assert_close(found["x"], jacops.compute_jacobian(BOUND, X))


def test_what_is_proved_for_one_setting_is_not_taken_for_another() -> None:
    def model(x: Tensor, mixed: bool, gate: Tensor) -> Tensor:
        return BOUND(x.flip(0) if mixed else x) + gate * x.mean(0, keepdim=True).sum(1, keepdim=True)

    closed, opened = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    for mixed, gate in ((False, closed), (True, closed), (False, opened), (True, opened), (False, closed)):

        def alone(x: Tensor, mixed: bool = mixed, gate: Tensor = gate) -> Tensor:
            return model(x[None], mixed, gate)[0]

        apart = not mixed and gate is closed
        how = "error" if apart else "silent"
        found = jacops.compute_jacobian(model, (X, mixed, gate), shared=2, fallback=how)[0]
        torch.testing.assert_close(found, torch.stack([plain_jacobian(alone, x) for x in X]))  # pyright: ignore


def test_a_forward_may_write_into_what_it_is_given() -> None:
    kept = TABLE.clone()

    def model(x: Tensor, table: Tensor) -> Tensor:
        return BOUND(x) @ table.mul_(2)

    found = jacops.compute_jacobian(model, (X, TABLE), 3, shared=1)[0]
    assert torch.equal(TABLE, kept)
    torch.testing.assert_close(found, torch.einsum("noi,op->npi", jacops.compute_jacobian(BOUND, X), 2 * TABLE))


# ---- loaders ----------------------------------------------------------------------------------------------------


PAIRS = [(X[:3], Y[:3]), (X[3:6], Y[3:6]), (X[6:], Y[6:])]
LOADERS: dict[str, Callable[[], Any]] = {
    "a loader": lambda: LOADER,
    "a collated loader": lambda: loader(collate_fn=lambda rows: [torch.stack(c) for c in zip(*rows, strict=True)]),
    "a list of pairs": lambda: PAIRS,
    "an iterable": lambda: Batched(PAIRS),
    "mappings": lambda: Batched([{"x": x, "labels": y} for x, y in PAIRS]),
}  # fmt: skip


@pytest.mark.parametrize("form", LOADERS)
@pytest.mark.parametrize("call", ASKED)
def test_every_call_by_samples_takes_a_loader(call: str, form: str) -> None:
    made, alone = ASKED[call]
    found = made(BOUND, LOADERS[form]())
    torch.testing.assert_close(by_x(found), one_by_one(alone))


@pytest.mark.parametrize("call", [name for name in ASKED if name not in ("directional_derivative", "sample_gradients")])
def test_a_loader_goes_with_one_output_per_sample_and_with_unpack(call: str) -> None:
    made, alone = ASKED[call]
    triples = Batched([(len(y), y, x) for x, y in PAIRS])
    found = made(BOUND, triples, target=Y, unpack=lambda batch: (batch[2], batch[1]))
    torch.testing.assert_close(found, one_by_one(alone, Y))


def test_inputs_alone_are_batches() -> None:
    expected = jacops.compute_jacobian(BOUND, X)
    only = loading.DataLoader(loading.TensorDataset(X), batch_size=2)
    for given in (only, Batched([X[:2], X[2:]]), Batched([(X[:2],), (X[2:],)])):
        torch.testing.assert_close(jacops.compute_jacobian(BOUND, given), expected)
    with_settings = Batched([({**NAMED, "x": x}, y) for x, y in PAIRS])
    shared = ["table", "mask"]
    torch.testing.assert_close(jacops.compute_jacobian(MODEL, with_settings, shared=shared)["x"], expected)
    rows = jacops.sample_jacobians(MODEL, with_settings, shared=shared).dense()
    torch.testing.assert_close(rows, jacops.sample_jacobians(BOUND, X).dense())
    both = jacops.sample_gradients(MODEL, loss, with_settings, shared=shared).dense()
    torch.testing.assert_close(both, jacops.sample_gradients(BOUND, loss, X, Y).dense())


def test_a_loader_fills_the_places_of_the_caller(tmp_path: Any) -> None:
    expected = jacops.compute_jacobian(BOUND, X)
    kept = np.memmap(tmp_path / "j", dtype=np.float64, mode="w+", shape=(N, C, 3))
    found = jacops.compute_jacobian(BOUND, LOADER, out=kept)
    torch.testing.assert_close(torch.from_numpy(np.array(kept)), expected)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
    for rows, words in ((9, "of 9 rows, but the loader gives 7"), (5, "of 5 rows, but the loader gives 6 or more")):
        with pytest.raises(InputError, match=words):
            jacops.compute_jacobian(BOUND, LOADER, out=torch.empty(rows, C, 3, dtype=F64))


def test_contributions_take_a_loader() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, C)).double()
    found, whole = jacops.contributions(model, LOADER, target=Y), jacops.contributions(model, X, target=Y)
    torch.testing.assert_close(found.values, whole.values)
    torch.testing.assert_close(found.bias, whole.bias)


SHUFFLED: list[Callable[[], Any]] = [
    lambda: loader(shuffle=True),
    lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(5)),
    lambda: loader(sampler=loading.SubsetRandomSampler(range(N))),
    lambda: loading.DataLoader(loading.TensorDataset(X, Y), batch_sampler=loading.BatchSampler(
        loading.RandomSampler(range(N)), 2, False)),
]  # fmt: skip


@pytest.mark.parametrize("made", [*LOADERS.values(), *SHUFFLED])
def test_an_empirical_fisher_takes_a_loader_in_any_order(made: Callable[[], Any]) -> None:
    rows = one_by_one(gradients)
    torch.testing.assert_close(jacops.linalg.empirical_fisher(BOUND, loss, made()).dense(), rows.T @ rows / N)


def test_an_empirical_fisher_passes_on_what_sample_gradients_take() -> None:
    rows = one_by_one(gradients)
    batches = Batched([({**NAMED, "x": x}, len(y), y) for x, y in PAIRS])
    options: dict[str, Any] = {"shared": ["table", "mask"], "unpack": lambda batch: (batch[0], batch[2])}
    torch.testing.assert_close(
        jacops.linalg.empirical_fisher(MODEL, loss, batches, **options).dense(), rows.T @ rows / N
    )
    with pytest.raises(InputTypeError, match="`y` is left out"):
        jacops.linalg.empirical_fisher(BOUND, loss, X)
    with pytest.raises(InputError, match="`y` is given beside a loader"):
        jacops.linalg.empirical_fisher(BOUND, loss, LOADER, Y)


@pytest.mark.parametrize("made", SHUFFLED)
def test_a_problem_takes_a_shuffled_loader(made: Callable[[], Any]) -> None:
    problem, plain = (jacops.Problem(BOUND, nn.CrossEntropyLoss(), data) for data in (made(), [(X, Y)]))
    for what in ("hessian", "ggn", "fisher"):
        torch.testing.assert_close(getattr(problem, what)().dense(), getattr(plain, what)().dense())
    torch.testing.assert_close(problem.gradient(), plain.gradient())
    assert problem.value() == pytest.approx(plain.value())
    H = problem.hessian()
    assert torch.equal(H @ torch.ones(16, dtype=F64), H @ torch.ones(16, dtype=F64)), "passes are the same pass"
    with pytest.raises(DataError, match=r"`data` is a loader with a .*RandomSampler.*one order.*shuffle=False"):
        problem.sample_gradients()


@pytest.mark.parametrize(("made", "words"), [
    (lambda: loader(shuffle=True, drop_last=True), "drops 1 of 7 rows.*every row once.*drop_last=False"),
    (lambda: loader(sampler=loading.RandomSampler(range(N), replacement=True)), "every row once"),
    (lambda: loader(sampler=loading.RandomSampler(range(N), num_samples=3)), "every row once"),
    (lambda: loader(sampler=loading.WeightedRandomSampler([1.0] * N, N)), "WeightedRandomSampler.*every row once"),
])  # fmt: skip
def test_a_problem_refuses_passes_that_miss_rows(made: Callable[[], Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        jacops.Problem(BOUND, nn.CrossEntropyLoss(), made())


@pytest.mark.parametrize("call", ASKED)
def test_rows_need_an_order(call: str) -> None:
    with pytest.raises(DataError, match=r"`x` is a loader with a RandomSampler.*one order.*shuffle=False"):
        ASKED[call][0](BOUND, loader(shuffle=True))


# ---- words ------------------------------------------------------------------------------------------------------


def jac(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: jacops.compute_jacobian(*args, **kwargs)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "target is a number": (jac(BOUND, X, target=3), InputTypeError, r"an int.*`outputs=3` for the same output"),
    "target is a list": (jac(BOUND, X, target=Y.tolist()), InputTypeError, r"a list.*torch.as_tensor"),
    "target is floating": (jac(BOUND, X, target=Y.double()), InputTypeError, r"torch.float64.*integer tensor \(n,\)"),
    "target is too short": (jac(BOUND, X, target=Y[:5]), InputError, r"of shape \(5,\) for 7 samples"),
    "target is too large": (jac(BOUND, X, target=Y + 2), InputError, r"holding 5, but the last axis has 4 entries"),
    "target is negative": (jac(BOUND, X, target=Y - 1), InputError, r"holding -1, but places count from 0"),
    "target without classes": (jac(lambda x: x.sum(1), X, target=Y), InputError, r"of shape \(\d,\) for \d samples"),
    "target beside a longer loader": (jac(BOUND, LOADER, target=Y[:5]), InputError, "of 5 rows.*loader gives 6"),
    "target beside a shorter loader": (jac(BOUND, LOADER, target=torch.cat([Y, Y])), InputError, "14 rows.*7"),
    "shared is not there": (jac(MODEL, NAMED, shared="tabel"), InputError, "`shared` is 'tabel'.*nearest are table"),
    "shared with one tensor": (jac(BOUND, X, shared="x"), InputError, "the input is one tensor"),
    "shared is a tensor": (jac(MODEL, NAMED, shared=[TABLE]), InputTypeError, "names of keyword inputs"),
    "shared is left out": (jac(MODEL, NAMED), InputError, r"of lengths.*one row per sample.*`shared=`"),
    "unpack without a loader": (jac(BOUND, X, unpack=lambda b: b), InputError, "`x` is a Tensor.*no loader"),
    "a list of numbers": (jac(BOUND, [1.0, 2.0]), InputTypeError, r"a list.*torch.as_tensor\(x\)"),
    "an array": (jac(BOUND, X.numpy()), InputTypeError, r"ndarray.*torch.as_tensor\(x.copy\(\)\)"),
    "a generator": (jac(BOUND, iter(PAIRS)), DataError, "read once"),
    "an empty loader": (jac(BOUND, Batched([])), DataError, "`x` is empty.*at least one batch"),
    "batches of three": (jac(BOUND, Batched([(X, Y, Y)])), DataError, "3 things as batch 0.*`unpack=`"),
    "y is left out": (lambda: jacops.sample_gradients(BOUND, loss, X), InputTypeError, "`y` is left out"),
    "y beside a loader": (lambda: jacops.sample_gradients(BOUND, loss, LOADER, Y), InputError, "is given beside"),
    "weights in batches": (lambda: jacops.sample_gradients(BOUND, loss, LOADER, unpack=lambda b: (*b, torch.ones(3))),
                           DataError, "giving weights.*`unpack=`"),
    "settings that change": (lambda: jacops.sample_jacobians(MODEL, Batched([({**NAMED, "x": X, "power": p}, Y) for p in
                             (1, 2)]), shared=["table", "mask"]), DataError, "batch 1 .*same in all batches"),
    "a loader for one batch": (lambda: jacops.jacobian(BOUND, LOADER), InputTypeError, "a DataLoader.*one batch"),
    "a loader for modjac": (lambda: jacops.modjac(BOUND, LOADER), InputTypeError, "a DataLoader.*one batch"),
}  # fmt: skip


CONVOLUTION = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(18, C)).double()
IMAGE, PARAMS = torch.randn(3, 5, 5, dtype=F64), torch.ones(2, dtype=F64)
POSITIVE = jacops.linalg.Matrix(torch.diag(torch.tensor([1.0, 4.0], dtype=F64)), symmetric=True, positive=True)
MISSES = r"\(3, 5, 5\).*axis of samples is missing.*unsqueeze\(0\)"


def line(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return a * t + b


WRONG |= {
    "an image alone": (jac(CONVOLUTION, IMAGE), InputError, MISSES),
    "an image alone, one output": (jac(CONVOLUTION, IMAGE, target=Y[:3]), InputError, MISSES),
    "an image alone, twice": (lambda: jacops.input_hessian(CONVOLUTION, IMAGE), InputError, MISSES),
    "an image alone, summed": (lambda: jacops.laplacian(CONVOLUTION, IMAGE), InputError, MISSES),
    "an image alone, by parameters": (lambda: jacops.sample_jacobians(CONVOLUTION, IMAGE), InputError, MISSES),
    "an image alone, with a loss": (
        lambda: jacops.sample_gradients(CONVOLUTION, loss, IMAGE, Y[:3]),
        InputError,
        MISSES,
    ),
    "a sample of another width": (jac(CONVOLUTION, torch.ones(3, 2, 5, 5, dtype=F64)), RuntimeError, "3 channels"),
    "one tensor for two arguments": (
        lambda: jacops.levenberg_marquardt(line, X[:, 0], X[:, 1], params=PARAMS),
        InputTypeError,
        r"`params` is one tensor, but f\(a.*, b.*, t.*\).*f\(\*params, \*input\).*'t'.*list of tensors",
    ),
    "names that are no arguments": (
        lambda: jacops.levenberg_marquardt(line, X[:, 0], X[:, 1], params={"a": PARAMS[:1], "c": PARAMS[1:]}),
        InputTypeError,
        r"with a, c.*dict by their names",
    ),
    "rows of another width": (
        lambda: jacops.linalg.inverse_quadratic_bounds(POSITIVE, torch.ones(3, dtype=F64), damping=0.1),
        InputError,
        "`rows`",
    ),
    "a word for wrt": (
        lambda: jacops.jacobian(BOUND, X, wrt="weight"),  # pyright: ignore[reportArgumentType]
        InputError,
        "'parameters', 'inputs' .and `parameters=` for some",
    ),
}


@pytest.mark.parametrize("label", WRONG)
def test_what_does_not_fit_is_said(label: str) -> None:
    made, error, words = WRONG[label]
    with pytest.raises(error, match=words):
        made()


def test_labels_as_outputs_are_pointed_to_target() -> None:
    for call in (jacops.compute_jacobian, jacops.sample_jacobians):
        with pytest.warns(JacopsWarning, match="pass `target=labels`"):
            call(BOUND, X, outputs=Y)


def test_bounds_of_one_row_are_those_of_a_stack_of_one() -> None:
    row = torch.tensor([1.0, 2.0], dtype=F64)
    one, stack = (jacops.linalg.inverse_quadratic_bounds(POSITIVE, b, damping=0.5) for b in (row, row[None]))
    assert torch.equal(one.lower, stack.lower)
    assert torch.equal(one.upper, stack.upper)
    torch.testing.assert_close(one.lower, torch.tensor([1 / 1.5 + 4 / 4.5], dtype=F64))


def test_a_function_of_several_parameters_fits() -> None:
    found = jacops.levenberg_marquardt(line, X[:, 0], 2 * X[:, 0] + 1, params=[PARAMS[:1] * 0, PARAMS[:1] * 0])
    torch.testing.assert_close(torch.cat(list(found.x)), torch.tensor([2.0, 1.0], dtype=F64))
