"""Hostile inputs, a numbered row of the catalogue each: it works and equals plain autograd, or a typed error says why.

After the rows: calls inside the caller's own transforms (`vmap`, `grad`, `torch.compile`).
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import jacops
import jacops.testing
import oracle
from jacops import JacopsWarning, TorchTwiceDifferentiable, compute_influences, compute_jacobian, modjac
from jacops.errors import (
    DataError,
    InputError,
    InputTypeError,
    JacopsError,
    ModelStateError,
    NonFiniteError,
    NotDifferentiableError,
)
from small import Calls, draw, settled, small_net

Row = Callable[[], None]
ROWS: dict[str, Row] = {}


def row(label: str) -> Callable[[Row], Row]:
    """Enter a check under the number and words of its row."""

    def enter(check: Row) -> Row:
        assert label not in ROWS
        ROWS[label] = check
        return check

    return enter


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    for a, b in zip(oracle.leaves(actual), oracle.leaves(expected), strict=True):
        assert a.shape == b.shape, f"shape {tuple(b.shape)} expected, got {tuple(a.shape)}"
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol)


def refused(kind: type[JacopsError], call: Callable[[], Any], *parts: str) -> None:
    """The call raises an error of this kind whose message holds all parts; it may warn of a route it left before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        with pytest.raises(kind) as error:
            call()
    for part in parts:
        assert part in str(error.value), f"{part!r} is missing in: {error.value}"


def square(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean()


def tangents(model: nn.Module) -> list[Tensor]:
    return [draw(*p.shape, seed=30 + i).to(p.dtype) for i, p in enumerate(model.parameters())]


def right(
    model: nn.Module, x: Any, *, second: bool = True, first: bool = True, by_backward: bool = False, rtol: float = 1e-9
) -> None:
    """Every model call equals plain autograd in float64."""
    blocks = oracle.parameter_jacobian(model, x, by_backward=by_backward)
    output = [
        torch.zeros(b.shape[: b.ndim - p.ndim])
        for row in blocks
        for b, p in zip(row[:1], model.parameters(), strict=False)
    ]
    kinds = {p.dtype for p in model.parameters()}
    vs = tangents(model)
    close(modjac(model, x), blocks, rtol)
    close(jacops.model_jvp(model, x, vs), oracle.jvp(blocks, vs), rtol)
    us = [draw(*o.shape, seed=60 + i).to(kinds.pop()) for i, o in enumerate(output[:1])]
    if len(output) == 1:
        close(jacops.model_vjp(model, x, us[0]), oracle.vjp(blocks, us), rtol)
    if first:
        close(compute_jacobian(model, x), oracle.input_jacobian(model, x, by_backward=by_backward), rtol)
    if second:
        y = torch.zeros(output[0].shape, dtype=next(model.parameters()).dtype)
        close(TorchTwiceDifferentiable(model, square).hessian(x, y), oracle.hessian(model, square, x, y), rtol)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


# 1-6: the model and its input


@row("01 the model is a class, a path or a state dict")
def _() -> None:
    for thing, name in (
        (nn.Linear, "the class Linear"),
        ("model.pt", "a str"),
        (small_net().state_dict(), "a OrderedDict"),
    ):
        for call in (
            lambda thing=thing: modjac(thing, draw(5, 3)),
            lambda thing=thing: jacops.model_jvp(thing, draw(5, 3), []),
            lambda thing=thing: compute_jacobian(thing, draw(5, 3)),
            lambda thing=thing: TorchTwiceDifferentiable(thing, square),
        ):
            refused(InputTypeError, call, "`model`", name, "torch.nn.Module" if name[:3] != "the" else "Linear()?")


class DataFrame:
    """A table that is no tensor."""

    values = np.ones((5, 3))


@row("02 the input is a list, a table or a numpy array")
def _() -> None:
    for x in ([[1.0, 2.0, 3.0]], DataFrame(), np.ones((5, 3))):
        refused(InputTypeError, lambda x=x: compute_jacobian(small_net(), x), "x", type(x).__name__, "as_tensor")
        if not isinstance(x, DataFrame):
            refused(InputTypeError, lambda x=x: modjac(small_net(), x), "input", type(x).__name__, "as_tensor")


@row("03 a numpy array has a negative stride or is read-only")
def _() -> None:
    reverse = np.ones((5, 3))[::-1]
    refused(InputTypeError, lambda: compute_jacobian(small_net(), reverse), "`x`", "ndarray", "copy()")
    wrapped = TorchTwiceDifferentiable(small_net(), square)
    recorded = wrapped.grad(draw(5, 3), draw(5, 2), create_graph=True)
    close(
        wrapped.mvp(recorded, np.ones(26)[::-1], wrapped.parameters),
        wrapped.mvp(recorded, torch.ones(26).double(), wrapped.parameters),
    )
    locked = np.ones(26)
    locked.flags.writeable = False
    close(wrapped.mvp(recorded, locked, wrapped.parameters), wrapped.mvp(recorded, np.ones(26), wrapped.parameters))


@row("04 the input is float64 and the model float32")
def _() -> None:
    model, x = small_net().float(), draw(5, 3)
    y = torch.zeros(5, 2)
    for call in (
        lambda: compute_jacobian(model, x),
        lambda: modjac(model, x),
        lambda: jacops.model_jvp(model, x, tangents(model)),
        lambda: jacops.model_vjp(model, x, torch.ones(5, 2)),
        lambda: jacops.jacobian(model, x),
        lambda: jacops.hessian(model, square, x, y),
        lambda: jacops.ggn(model, square, x, y),
        lambda: TorchTwiceDifferentiable(model, square).grad(x, y),
        lambda: jacops.check(model, x),
        lambda: jacops.sample_gradients(model, square, x, y),
    ):
        refused(InputError, call, "`input`", "torch.float64", "torch.float32", "nothing is cast silently")


@row("05 the input is on another device")
def _() -> None:
    x = torch.ones(5, 3, device="meta").double()
    for call in (compute_jacobian, modjac, jacops.jacobian):
        refused(InputError, lambda call=call: call(small_net(), x), "`input`", "meta", "cpu")
    W = draw(3).requires_grad_()
    refused(
        InputError, lambda: jacops.jvp(lambda: W**2, [W], torch.ones(3, device="meta").double()), "`v`", "meta", "cpu"
    )


@row("06 an input Jacobian is asked for an integer input")
def _() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    for call in (compute_jacobian, lambda model, x: jacops.jacobian(model, x, "inputs")):
        refused(NotDifferentiableError, lambda call=call: call(model, torch.tensor([[1, 2]])), "integer", "embedding")


# 7-12: vectors


def operators() -> dict[str, jacops.Operator]:
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    return {
        "J": jacops.jacobian(model, x),
        "H": jacops.hessian(model, square, x, y),
        "G": jacops.ggn(model, square, x, y),
        "F": jacops.empirical_fisher(model, square, x, y),
    }


LAYOUT = "0.weight (4, 3), 0.bias (4,), 2.weight (2, 4), 2.bias (2,)"


@row("07 a vector has the wrong length")
def _() -> None:
    for operator in operators().values():
        for v in (draw(25), draw(27), draw(1), draw(0), draw(25, 26), draw(1, 26)):
            refused(InputError, lambda operator=operator, v=v: operator @ v, "`v`", str(tuple(v.shape)), "26", LAYOUT)
    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    refused(InputError, lambda: jacops.hvp(model, square, x, y, draw(25)), "(25,)", "26", LAYOUT)
    refused(InputError, lambda: operators()["J"].T @ draw(9), "(9,)", "10", "output (5, 2)")


@row("08 a list of vectors is shorter than the parameters")
def _() -> None:
    model, x = small_net(), draw(5, 3)
    for operator in operators().values():
        refused(InputError, lambda operator=operator: operator @ tangents(model)[:2], "2 tensor", "2.weight", LAYOUT)
    refused(InputError, lambda: jacops.model_jvp(model, x, tangents(model)[:3]), "3 tensor", "2.bias", LAYOUT)
    refused(InputError, lambda: jacops.jvp(lambda: model(x), model.parameters(), tangents(model)[:1]), "params[1]")
    refused(InputError, lambda: jacops.model_vjp(model, (x,), []), "0 tensor", "output")


@row("09 a vector could be broadcast")
def _() -> None:
    model, x = small_net(), draw(5, 3)
    ones = [torch.ones(1).double() for _ in range(4)]
    refused(InputError, lambda: jacops.model_jvp(model, x, ones), "0.weight", "(1,)", "(4, 3)", "nothing is broadcast")
    refused(InputError, lambda: operators()["H"] @ ones, "0.weight", "(1,)", "(4, 3)")
    refused(InputError, lambda: jacops.model_vjp(model, x, torch.ones(1).double()), "(1,)", "(5, 2)")


@row("10 a cotangent is transposed")
def _() -> None:
    model, x = small_net(), draw(3, 3)
    refused(InputError, lambda: jacops.model_vjp(model, x, draw(2, 3)), "(2, 3)", "(3, 2)")
    refused(InputError, lambda: jacops.vjp(lambda: model(x), model.parameters(), draw(2, 3)), "(2, 3)", "(3, 2)")
    refused(InputError, lambda: jacops.batch_vjp(lambda: model(x), model.parameters(), draw(4, 2, 3)), "(4, 2, 3)")


@row("11 a tangent or cotangent has another dtype")
def _() -> None:
    model, x = small_net(), draw(5, 3)
    singles = [v.float() for v in tangents(model)]
    for call in (
        lambda: jacops.model_jvp(model, x, singles),
        lambda: jacops.model_vjp(model, x, torch.ones(5, 2)),
        lambda: jacops.jvp(lambda: model(x), model.parameters(), singles),
        lambda: jacops.vjp(lambda: model(x), model.parameters(), torch.ones(5, 2)),
        lambda: operators()["H"] @ torch.ones(26),
        lambda: operators()["G"] @ singles,
        lambda: operators()["J"].T @ torch.ones(10),
    ):
        refused(InputError, call, "torch.float32", "torch.float64")


@row("12 a given vector holds NaN or Inf")
def _() -> None:
    model, x = small_net(), draw(5, 3)
    for bad in (float("nan"), float("inf")):
        flat = torch.ones(26).double()
        flat[17] = bad
        parts = [part.reshape(p.shape) for part, p in zip(flat.split([12, 4, 8, 2]), model.parameters(), strict=True)]
        for operator in operators().values():
            refused(NonFiniteError, lambda operator=operator, flat=flat: operator @ flat, "`v`", "1 of 26", "17")
        refused(NonFiniteError, lambda parts=parts: jacops.model_jvp(model, x, parts), "`v`", "tensor 2", "(0, 1)")
        u = torch.full((5, 2), bad).double()
        refused(NonFiniteError, lambda u=u: jacops.model_vjp(model, x, u), "`v`", "10 of 10", "(0, 0)")


# 13-17: sizes


@row("13 there are no rows")
def _() -> None:
    model, none = small_net(), torch.zeros(0, 3).double()
    assert compute_jacobian(model, none).shape == (0, 2, 3)
    assert modjac(model, none, flatten=True).shape == (0, 26)
    assert jacops.model_jvp(model, none, tangents(model)).shape == (0, 2)
    assert not any(g.any() for g in jacops.model_vjp(model, none, torch.zeros(0, 2).double()))
    assert jacops.jacobian(model, none).dense().shape == (0, 26)
    assert jacops.sample_gradients(model, square, none, torch.zeros(0, 2).double()).shape == (0, 26)
    for call in (compute_jacobian, modjac):
        assert all(leaf.dtype == torch.float64 for leaf in oracle.leaves(call(model, none)))


@row("14 there is one row, and the model squeezes")
def _() -> None:
    model = settled(nn.Sequential(nn.Linear(3, 1), nn.Tanh()))
    squeezing = nn.Sequential(model, Calls(lambda out: out.squeeze()))
    for x in (draw(1, 3), draw(4, 3)):
        close(compute_jacobian(squeezing, x), oracle.input_jacobian(squeezing, x))
        close(modjac(squeezing, x), oracle.parameter_jacobian(squeezing, x))
        y = draw(*squeezing(x).shape)
        close(jacops.hessian(squeezing, square, x, y).dense(), oracle.hessian(squeezing, square, x, y))
    one = draw(1, 3), draw(1, 1)
    found = jacops.sample_gradients(model, square, *one).matrix
    close(found[0], oracle.gradient(model, square, *one))


@row("15 a feature or output axis has no entries")
def _() -> None:
    narrow = Calls(lambda W, b, x: x @ W + b, (0, 2), (2,))
    x = torch.zeros(5, 0).double()
    assert compute_jacobian(narrow, x).shape == (5, 2, 0)
    assert [tuple(block.shape) for block in modjac(narrow, x)] == [(5, 2, 0, 2), (5, 2, 2)]
    assert jacops.jacobian(narrow, x).dense().shape == (10, 2)
    silent = Calls(lambda W, x: x @ W, (3, 0))
    assert compute_jacobian(silent, draw(5, 3)).shape == (5, 0, 3)
    assert modjac(silent, draw(5, 3)).shape == (5, 0, 3, 0)
    assert jacops.model_jvp(silent, draw(5, 3), [torch.zeros(3, 0).double()]).shape == (5, 0)


@row("16 a batch or chunk size is no positive whole number")
def _() -> None:
    W = draw(3).requires_grad_()
    for size in (0, -1, True, False, 2.5, 2.0, "4", None):
        refused(
            InputError, lambda size=size: compute_jacobian(small_net(), draw(5, 3), size), "`batch_size`", repr(size)
        )
        if size is not None:
            call = lambda size=size: jacops.full_jacobian(lambda: W**2, [W], chunk_size=size)  # noqa: E731
            refused(InputError, call, "`chunk_size`", repr(size), "positive whole number")
    for probes in (0, 1, -3):
        refused(
            InputError, lambda probes=probes: jacops.trace(operators()["H"], probes=probes), "`probes`", str(probes)
        )


@row("17 damping is negative, not finite or no number")
def _() -> None:
    data = [(draw(5, 3), draw(5, 2))]
    for damping in (-1e-9, -1, float("nan"), float("inf"), "0.1", None, True, torch.tensor([1.0, 2.0])):
        call = lambda damping=damping: compute_influences(  # noqa: E731
            TorchTwiceDifferentiable(small_net(), square), data, damping=damping
        )
        refused(InputError, call, "`damping`", repr(damping), "not negative")


# 18-23: modules that mix or randomise samples, or write state, in train mode


PER_SAMPLE: dict[str, Callable[[nn.Module, Any, Tensor], Any]] = {
    "sample_gradients": lambda model, x, y: jacops.sample_gradients(model, square, x, y),
    "empirical_fisher": lambda model, x, y: jacops.empirical_fisher(model, square, x, y),
    "influences": lambda model, x, y: compute_influences(
        TorchTwiceDifferentiable(model, square), [(x, y)], damping=1.0, curvature="ggn"
    ),
    "self_influences": lambda model, x, y: jacops.self_influences(
        TorchTwiceDifferentiable(model, square), [(x, y)], damping=1.0, curvature="ggn"
    ),
}


def refused_per_sample(model: nn.Module, x: Any, *parts: str) -> None:
    """Every per-sample quantity names the module; nothing of the model moves."""
    before, y = state_of(model), draw(x.shape[0], 2)
    for call in PER_SAMPLE.values():
        refused(ModelStateError, lambda call=call: call(model, x, y), *parts, "eval()")
        unchanged(model, before)
        assert model.training


@row("18 batch norm is in train mode")
def _() -> None:
    model, x = settled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))).train(), draw(5, 3)
    refused_per_sample(model, x, "'1'", "BatchNorm1d")
    before = state_of(model)
    right(model, x)  # the whole batch's derivative is of the function as it stands
    unchanged(model, before)


@row("19 batch norm is in train mode and the batch is of one")
def _() -> None:
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))).train()
    before = state_of(model)
    for call in PER_SAMPLE.values():
        refused(ModelStateError, lambda call=call: call(model, draw(1, 3), draw(1, 2)), "'1'", "BatchNorm1d", "eval()")
    close(compute_jacobian(model, draw(1, 3)), oracle.input_jacobian(model, draw(1, 3)))  # in eval mode by itself
    unchanged(model, before)


@row("20 dropout is in train mode")
def _() -> None:
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.25), nn.Linear(4, 2))).train()
    refused_per_sample(model, draw(5, 3), "'1'", "Dropout", "0.25")
    torch.manual_seed(7)
    right(model, draw(5, 3))


@row("20b dropout in train mode is allowed with one mask for all samples")
def _() -> None:
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))).train()
    x, y = draw(1, 3).expand(6, 3).contiguous(), draw(1, 2).expand(6, 2).contiguous()
    before = torch.get_rng_state()
    rows = jacops.sample_gradients(model, square, x, y, randomness="same", seed=3).matrix
    assert torch.equal(rows, rows[:1].expand(6, -1))
    assert torch.equal(rows, jacops.sample_gradients(model, square, x, y, randomness="same", seed=3).matrix)
    others = [jacops.sample_gradients(model, square, x, y, randomness="same", seed=s).matrix for s in range(8)]
    assert any(not torch.equal(rows, other) for other in others)
    assert torch.equal(torch.get_rng_state(), before)


@row("21 recurrent layers and attention have dropout of their own")
def _() -> None:
    class First(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            found = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
            return found[0] if isinstance(found, tuple) else found

    for layer, name in (
        (nn.LSTM(4, 4, 2, dropout=0.3, batch_first=True), "LSTM"),
        (nn.GRU(4, 4, 2, dropout=0.3, batch_first=True), "GRU"),
        (nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True), "MultiheadAttention"),
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True), "layer."),
    ):
        model = First(layer).double().train()
        for call in PER_SAMPLE.values():
            refused(
                ModelStateError, lambda call=call, model=model: call(model, draw(3, 5, 4), draw(3, 5, 4)), name, "0.3"
            )


def per_sample_or_refused(model: nn.Module, name: str, x: Tensor) -> None:
    """Refused by name, or right for each sample from the state as it stands; nothing moves either way."""
    before, y = state_of(model), draw(len(x), 2)
    said, rows = None, torch.zeros(0)
    try:
        rows = jacops.sample_gradients(model, square, x, y).matrix
    except ModelStateError as error:
        said = str(error)
    assert said is None or name in said
    for i, found in enumerate(rows):
        close(found, oracle.gradient(model, square, x[i : i + 1], y[i : i + 1]))
    unchanged(model, before)


@row("22 spectral norm is in train mode")
def _() -> None:
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).double().train()
    before = state_of(model)
    right(model, draw(5, 3), second=False)
    unchanged(model, before)
    per_sample_or_refused(model, "SpectralNorm", draw(5, 3))


@row("23 an embedding limits the norm of its rows")
def _() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 2)).double()
    before, ids = state_of(model), torch.tensor([0, 3, 4])
    close(modjac(model, ids), oracle.parameter_jacobian(model, ids))
    unchanged(model, before)
    assert (model[0].weight.norm(dim=1) > 0.5).any()
    per_sample_or_refused(model, "Embedding", ids)


# 24-31: parameters of every kind


@row("24 an embedding has sparse gradients")
def _() -> None:
    model = settled(nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)))
    dense = settled(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)))
    ids, y = torch.tensor([0, 3, 3]), draw(3, 2)
    close(modjac(model, ids), oracle.parameter_jacobian(dense, ids))
    close(jacops.hessian(model, square, ids, y).dense(), oracle.hessian(dense, square, ids, y))
    rows = jacops.sample_gradients(model, square, ids, y).matrix
    close(rows[1], oracle.gradient(dense, square, ids[1:2], y[1:2]))
    assert model[0].sparse


@row("25 a module is lazy")
def _() -> None:
    model = nn.Sequential(nn.Identity(), nn.LazyLinear(2))
    for call in (compute_jacobian, modjac, jacops.jacobian, jacops.check):
        refused(
            ModelStateError, lambda call=call: call(model, torch.ones(5, 3)), "1.weight", "LazyLinear", "forward pass"
        )
    refused(
        ModelStateError,
        lambda: jacops.sample_gradients(model, square, torch.ones(5, 3), torch.ones(5, 2)),
        "LazyLinear",
    )


@row("26 parameters are on the meta device")
def _() -> None:
    model = nn.Linear(3, 2, device="meta")
    for call in (compute_jacobian, modjac, jacops.jacobian, jacops.check):
        refused(ModelStateError, lambda call=call: call(model, torch.ones(5, 3)), "weight", "meta", "Load")


class Quantised(nn.Module):
    """A frozen integer table, scaled by a weight."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([[1, -2], [3, 4], [-5, 6]], dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(draw(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.to(x.dtype) * self.scale


@row("27 a parameter is of integers")
def _() -> None:
    model, x, y = Quantised(), draw(5, 3), draw(5, 2)
    for call in (
        lambda: jacops.model_jvp(model, x, [torch.zeros(2).double()]),
        lambda: jacops.model_vjp(model, x, draw(5, 2)),
    ):
        refused(ModelStateError, call, "table", "integer")
    product = x @ model.table.double()
    close(modjac(model, x), torch.diag_embed(product))
    close(compute_jacobian(model, x), (model.table.double() * model.scale.detach()).T.expand(5, 2, 3))
    close(jacops.hessian(model, square, x, y).dense(), torch.diag((product**2).mean(0)))
    model.scale.requires_grad_(False)
    refused(ModelStateError, lambda: jacops.jacobian(model, x), "without parameters")


@row("28 parameters are in half precision")
def _() -> None:
    for dtype, rtol in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        model, x = small_net().to(dtype), draw(5, 3).to(dtype)
        right(model, x, rtol=rtol)
        assert modjac(model, x, flatten=True).dtype == dtype


@row("29 parameters, inputs or outputs are complex")
def _() -> None:
    turn = Calls(lambda W, x: torch.complex(x @ W, x @ W * 2), (3, 2))
    z = torch.complex(draw(5, 3), draw(5, 3, seed=1))
    refused(NotDifferentiableError, lambda: compute_jacobian(turn, draw(5, 3)), "output", "complex", "view_as_real")
    refused(NotDifferentiableError, lambda: compute_jacobian(lambda z: z.abs(), z), "`x`", "complex", "view_as_real")
    refused(NotDifferentiableError, lambda: jacops.jacobian(turn, draw(5, 3)), "complex", "view_as_real")
    close(torch.view_as_real(modjac(turn, draw(5, 3)) / (1 + 2j)).select(-1, 0), oracle_linear(draw(5, 3)))


def oracle_linear(x: Tensor) -> Tensor:
    """d (x W) / d W of a 3 by 2 weight."""
    return torch.einsum("ni,oj->noij", x, torch.eye(2).double())


@row("30 an input or parameter is sparse")
def _() -> None:
    model = small_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, on the state of sparse CSR
        sparse = [torch.eye(3).double().to_sparse(), torch.eye(3).double().to_sparse_csr()]
    for x in sparse:
        refused(InputError, lambda x=x: compute_jacobian(model, x), "`x`", str(x.layout), "to_dense()")
        close(modjac(model, x), oracle.parameter_jacobian(model, x.to_dense()))  # nothing is differentiated by it
    W = torch.eye(3).double().to_sparse().requires_grad_()
    refused(InputError, lambda: jacops.jvp(lambda: (W * 2).to_dense(), [W], [W]), "params[0]", "to_dense()")
    v = torch.eye(3).double().requires_grad_()
    for call in (jacops.jvp, jacops.vjp):
        refused(
            InputError,
            lambda call=call: call(lambda: v**2, [v], torch.eye(3).double().to_sparse()),
            "`v`",
            "to_dense()",
        )
    model = Calls(lambda W, x: torch.sparse.mm(W, x))
    model.weights.append(nn.Parameter(torch.eye(3).double().to_sparse()))
    for call in (modjac, jacops.jacobian, compute_jacobian):
        refused(JacopsError, lambda call=call, model=model: call(model, draw(3, 2)), "weights.0", "to_dense()")


@row("31 all parameters are frozen")
def _() -> None:
    model, x, y = small_net().requires_grad_(False), draw(5, 3), draw(5, 2)
    for call in (
        lambda: jacops.jacobian(model, x),
        lambda: jacops.hessian(model, square, x, y),
        lambda: jacops.ggn(model, square, x, y),
        lambda: jacops.sample_gradients(model, square, x, y),
        lambda: TorchTwiceDifferentiable(model, square),
        lambda: jacops.check(model, x),
        lambda: modjac(model, x, trainable_only=True),
    ):
        refused(ModelStateError, call, "`model`", "Sequential")


# 32-40: sets of parameters, and wrappers


@row("32 some parameters are frozen")
def _() -> None:
    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    model[0].requires_grad_(False)
    H = jacops.hessian(model, square, x, y)
    assert H.domain.names == ("2.weight", "2.bias")
    close(H.dense(), oracle.hessian(model, square, x, y))
    assert "2.weight" in repr(jacops.jacobian(model, x))
    assert "0.weight" not in repr(jacops.jacobian(model, x))
    found = compute_influences(TorchTwiceDifferentiable(model, square), [(x, y)], damping=1.0)
    assert "10 of 26 parameters" in repr(found)


def tied() -> nn.Sequential:
    model = settled(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)))
    model[2].weight = model[0].weight
    return model


@row("33 weights are tied")
def _() -> None:
    right(tied(), draw(5, 3))
    assert jacops.jacobian(tied(), draw(5, 3)).shape == (15, 9)


@row("34 a tied weight is given under both names")
def _() -> None:
    model, x, v = tied(), draw(5, 3), draw(3, 3, seed=1)
    both = [model[0].weight, model[2].weight]
    refused(InputError, lambda: jacops.jvp(lambda: model(x), both, [v, v]), "params[1]", "same tensor as params[0]")
    refused(InputError, lambda: jacops.full_jacobian(lambda: model(x), both), "params[1]", "params[0]")
    refused(InputError, lambda: jacops.model_jvp(model, x, {"0.weight": v, "2.weight": v}), "2.weight")


@row("35 a parameter's name is misspelt")
def _() -> None:
    model, x = small_net(), draw(5, 3)
    vs = dict(zip(("0.wieght", "0.bias", "2.weight", "2.bias"), tangents(model), strict=True))
    refused(InputError, lambda: jacops.model_jvp(model, x, vs), "0.wieght", "0.weight")
    refused(InputError, lambda: operators()["H"] @ vs, "0.wieght", "0.weight")
    refused(InputError, lambda: compute_jacobian(model, x, at="00"), "`at`", "'00'", "'0'")
    refused(ModelStateError, lambda: jacops.jacobian(model, x, lambda name, p: name == "0.wieght"), "asked for")


@row("36 a parameter is unused")
def _() -> None:
    model = Calls(lambda idle, W, x: (x @ W).tanh(), (4,), (3, 2))
    right(model, draw(5, 3))
    refused(NotDifferentiableError, lambda: modjac(model, draw(5, 3), strict=True), "output", "weights.0")


@row("37 there are no parameters at all")
def _() -> None:
    model, x = nn.ReLU(), draw(5, 3)
    for call in (
        lambda: modjac(model, x),
        lambda: jacops.model_jvp(model, x, []),
        lambda: jacops.model_vjp(model, x, draw(5, 3)),
        lambda: jacops.jacobian(model, x),
        lambda: jacops.hessian(model, square, x, x),
        lambda: jacops.sample_gradients(model, square, x, x),
        lambda: jacops.check(model, x),
    ):
        refused(ModelStateError, call, "`model`", "ReLU", "without parameters")
    close(jacops.jacobian(model, x, "inputs").dense(), torch.diag((x > 0).double().flatten()))


@row("38 the model is wrapped by TorchScript or DataParallel")
def _() -> None:
    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        wrappers = [torch.jit.script(model), torch.jit.trace(model, x), nn.DataParallel(model)]
    for wrapped in wrappers:
        close(modjac(wrapped, x), oracle.parameter_jacobian(model, x))
        close(compute_jacobian(wrapped, x), oracle.input_jacobian(model, x))
        close(
            jacops.model_jvp(wrapped, x, tangents(model)),
            oracle.jvp(oracle.parameter_jacobian(model, x), tangents(model)),
        )
        close(jacops.hessian(wrapped, square, x, y).dense(), oracle.hessian(model, square, x, y))


@row("38b the model is wrapped for several processes")
def _() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = small_net(), draw(5, 3)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        close(modjac(wrapped, x), oracle.parameter_jacobian(model, x))
        close(compute_jacobian(wrapped, x), oracle.input_jacobian(model, x))
        spread = small_net()
        fully_shard(spread, mesh=init_device_mesh("cpu", (1,)))
        for call in (modjac, compute_jacobian, jacops.jacobian):
            refused(ModelStateError, lambda call=call: call(spread, x), "FSDP", "whole")
    finally:
        torch.distributed.destroy_process_group()


@row("39 the model is compiled")
def _() -> None:
    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    compiled = torch.compile(model, backend="eager")
    close(modjac(compiled, x), oracle.parameter_jacobian(model, x))
    close(compute_jacobian(compiled, x), oracle.input_jacobian(model, x))
    close(jacops.hessian(compiled, square, x, y).dense(), oracle.hessian(model, square, x, y))
    inside = nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:])
    close(modjac(inside, x), oracle.parameter_jacobian(model, x))
    assert jacops.jacobian(compiled, x).domain.names[0] == "0.weight"


@row("40 weights are parametrised")
def _() -> None:
    for parametrise in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        torch.manual_seed(0)
        model = nn.Sequential(parametrise(nn.Linear(3, 3)), nn.Tanh()).double()
        right(model, draw(5, 3), second=False)
        names = jacops.jacobian(model, draw(5, 3)).domain.names
        assert set(names) == {name for name, _ in model.named_parameters()}
        assert any("parametrizations" in name for name in names)


# 41-46: functions that some transforms refuse


class First(nn.Module):
    """The first output of a layer that has several."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@row("41 recurrent layers in float32")
def _() -> None:
    for kind in (nn.LSTM, nn.GRU):
        torch.manual_seed(0)
        model, x = First(kind(3, 2, batch_first=True)), draw(3, 4, 3, dtype=torch.float32)
        right(model, x, rtol=1e-4)
        J = jacops.jacobian(model, x)
        jacops.testing.check_operator(J)


@row("42 attention")
def _() -> None:
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*self.mix(x).chunk(3, -1))

    torch.manual_seed(0)
    right(Attention().double(), draw(2, 3, 4))
    single = Attention()
    right(single, draw(2, 3, 4, dtype=torch.float32), rtol=1e-4)
    jacops.testing.check_operator(jacops.jacobian(single, draw(2, 3, 4, dtype=torch.float32)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.inner, self.outer, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(lambda h: self.inner(h).tanh(), x, use_reentrant=self.reentrant))


@row("43 activations are checkpointed")
def _() -> None:
    right(settled(Checkpointed(False)), draw(5, 3))
    model, x, y = settled(Checkpointed(True)), draw(5, 3), draw(5, 2)
    plain = settled(Checkpointed(False))  # the same function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)  # products go row by row
        close(modjac(model, x), oracle.parameter_jacobian(plain, x))
        close(compute_jacobian(model, x), oracle.input_jacobian(plain, x))
        close(
            jacops.model_jvp(model, x, tangents(model)),
            oracle.jvp(oracle.parameter_jacobian(plain, x), tangents(model)),
        )
        close(jacops.sample_gradients(model, square, x, y).matrix[2], oracle.gradient(plain, square, x[2:3], y[2:3]))
    refused(NotDifferentiableError, lambda: jacops.hessian(model, square, x, y), "reentrant", "use_reentrant=False")
    leaf = x.clone().requires_grad_()
    closure = lambda: jacops.vjp(lambda: model(leaf), model.parameters(), torch.ones(5, 2).double())  # noqa: E731
    refused(NotDifferentiableError, closure, "reentrant", "use_reentrant=False")
    assert all(p.grad is None for p in model.parameters())


class OldStyle(torch.autograd.Function):
    """x³ with a context in its forward, twice differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class OnceOnly(OldStyle):
    """The same, once differentiable."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Detached(OldStyle):
    """The same, with a backward that drops the second derivative."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0].detach() ** 2 * grad


class Wrong(OldStyle):
    """The same, with a backward that is off by a factor."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] ** 2 * grad


def cubic(function: type) -> nn.Module:
    return Calls(lambda W, x: function.apply(x @ W), (3, 2))


@row("44 a custom Function keeps its context in the forward")
def _() -> None:
    right(cubic(OldStyle), draw(5, 3))


@row("45 a second derivative is asked of a once differentiable Function")
def _() -> None:
    model, x, y = cubic(OnceOnly), draw(5, 3), draw(5, 2)
    close(modjac(model, x), oracle.parameter_jacobian(cubic(OldStyle), x))
    for call in (
        lambda: jacops.hessian(model, square, x, y),
        lambda: jacops.hvp(model, square, x, y, torch.ones(6).double()),
        lambda: TorchTwiceDifferentiable(model, square).hessian(x, y),
        lambda: TorchTwiceDifferentiable(model, square).grad(x, y, create_graph=True),
    ):
        refused(NotDifferentiableError, call, "OnceOnly", "once_differentiable")
    close(TorchTwiceDifferentiable(model, square).grad(x, y), oracle.gradient(cubic(OldStyle), square, x, y))


@row("46 a backward is wrong, or wrong in its second derivative")
def _() -> None:
    x, y = draw(5, 3), draw(5, 2)
    refused(NotDifferentiableError, lambda: jacops.hessian(cubic(Detached), square, x, y).dense(), "Detached")
    found = jacops.check(cubic(Wrong), x)
    assert not found.passed
    assert found.error > 0.1
    assert jacops.check(cubic(OldStyle), x).passed
    assert jacops.check(cubic(Detached), x).passed  # its first derivative is right


# 47-53: what a forward or a loss may do


@row("47 a value is read out of a tensor and put back")
def _() -> None:
    for read in (
        lambda W, x: x @ W * (x @ W).detach().sum().item(),
        lambda W, x: x @ W * float((x @ W).detach().max()),
        lambda W, x: x @ W * (x @ W).detach(),
    ):
        found = jacops.check(Calls(read, (3, 2)), draw(5, 3))
        assert not found.passed
        assert found.error > 0.1


@row("48 a branch depends on the data")
def _() -> None:
    model, x = Calls(lambda W, x: (x @ W).tanh() if x.sum() > 0 else x @ W, (3, 2)), draw(6, 3)
    assert 0 < int((x.sum(1) > 0).sum()) < 6
    with pytest.warns(JacopsWarning, match="reads values out of tensors") as said:
        found = compute_jacobian(model, x)
    assert len(said) == 1
    close(found, oracle.input_jacobian(model, x))
    right(model, x, first=False)


@row("49 a forward writes into a tensor that is needed or captured")
def _() -> None:
    broken = Calls(lambda W, x: (x @ W).exp_().mul_(2) * 1 + (x @ W).exp().add_(1), (3, 2))
    for call in (
        lambda: modjac(broken, draw(5, 3)),
        lambda: jacops.model_vjp(broken, draw(5, 3), draw(5, 2)),
        lambda: jacops.jacobian(broken, draw(5, 3)).dense(),
        lambda: compute_jacobian(broken, draw(5, 3)),
    ):
        refused(NotDifferentiableError, call, "inplace operation")
    kept = torch.zeros(5, 2).double()
    harmless = Calls(lambda W, x: kept.copy_((x @ W).detach()).mul(0) + (x @ W).tanh(), (3, 2))
    close(
        modjac(harmless, draw(5, 3)), oracle.parameter_jacobian(Calls(lambda W, x: (x @ W).tanh(), (3, 2)), draw(5, 3))
    )
    fine = Calls(lambda W, x: (x @ W).tanh().mul(2).add_(1).relu_(), (3, 2))
    right(fine, draw(5, 3))


@row("50 the loss calls backward itself")
def _() -> None:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        value = square(output, y)
        value.backward()
        return value

    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    for call in (
        lambda: jacops.hessian(model, loss, x, y).dense(),
        lambda: TorchTwiceDifferentiable(model, loss).grad(x, y),
        lambda: jacops.sample_gradients(model, loss, x, y),
    ):
        refused(NotDifferentiableError, call, "backward")
    assert all(p.grad is None for p in model.parameters())


@row("51 a loss is not one number")
def _() -> None:
    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    for loss, shape in ((nn.MSELoss(reduction="none"), "(5, 2)"), (lambda output, y: square(output, y)[None], "(1,)")):
        for call in (jacops.hessian, jacops.ggn):
            refused(InputError, lambda call=call, loss=loss: call(model, loss, x, y), "the loss", shape, "reduction")
        refused(InputError, lambda loss=loss: TorchTwiceDifferentiable(model, loss).grad(x, y), "the loss", shape)


@row("52 a loss is a Python number")
def _() -> None:
    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    loss = lambda output, y: float(square(output.detach(), y))  # noqa: E731
    for call in (jacops.hessian, jacops.ggn):
        refused(NotDifferentiableError, lambda call=call: call(model, loss, x, y), "the loss", "float", ".item()")


@row("53 a loss or output is of integers")
def _() -> None:
    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    labels = nn.Sequential(model, Calls(lambda out: out.argmax(1)))
    for call in (
        lambda: compute_jacobian(labels, x),
        lambda: modjac(labels, x),
        lambda: jacops.jacobian(labels, x),
        lambda: jacops.full_jacobian(lambda: labels(x), model.parameters()),
        lambda: jacops.hessian(model, lambda output, y: output.argmax(), x, y),
        lambda: jacops.ggn(model, lambda output, y: (output > 0).sum(), x, y),
    ):
        refused(NotDifferentiableError, call, "torch.int64")


# 54-58: outputs, modes, values


@row("54 the output is detached from the parameters")
def _() -> None:
    model, x = Calls(lambda W, x: (x @ W).detach(), (3, 2)), draw(5, 3)
    refused(NotDifferentiableError, lambda: jacops.jacobian(model, x), "no path leads", "weights.0", "allow_zero=True")
    assert not jacops.jacobian(model, x, allow_zero=True).dense().any()
    W = draw(3, 2).requires_grad_()
    for call in (
        lambda: modjac(model, x),
        lambda: jacops.model_jvp(model, x, [draw(3, 2)]),
        lambda: jacops.model_vjp(model, x, draw(5, 2)),
        lambda: jacops.jvp(lambda: (x @ W).detach(), [W], draw(3, 2)),
        lambda: jacops.full_jacobian(lambda: (x @ W).detach(), [W]),
    ):
        with pytest.warns(JacopsWarning, match="no path leads") as said:
            found = call()
        assert len(said) == 1
        assert not any(leaf.any() for leaf in oracle.leaves(found))


@row("54b a loss is detached from the parameters")
def _() -> None:
    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    loss = lambda output, y: square(output.detach(), y)  # noqa: E731
    with pytest.raises(NotDifferentiableError, match="no path leads"):
        jacops.hessian(model, loss, x, y)


@row("55 the output is a tree, or has an entry that is no tensor")
def _() -> None:
    x = draw(5, 3)
    trees = (lambda W, x: {"a": x @ W, "b": (x @ W).tanh()}, lambda W, x: (x @ W, [(x @ W).tanh()]))
    for tree in trees:
        close(modjac(Calls(tree, (3, 2)), x), oracle.parameter_jacobian(Calls(tree, (3, 2)), x))
        close(compute_jacobian(Calls(tree, (3, 2)), x), oracle.input_jacobian(Calls(tree, (3, 2)), x))
    for call in (compute_jacobian, modjac, jacops.jacobian):
        holey = Calls(lambda W, x: {"a": x @ W, "cache": "words"}, (3, 2))
        refused(InputTypeError, lambda call=call, holey=holey: call(holey, x), "output['cache']", "str", "outputs=")
        close(
            oracle.leaves(
                call(holey, x, outputs="a").dense() if call is jacops.jacobian else call(holey, x, outputs="a")
            ),
            None,
        ) if False else None
        assert call(holey, x, outputs="a") is not None


@row("55b the output is of a kind that transformers return")
def _() -> None:
    output_type = pytest.importorskip("transformers.modeling_outputs").BaseModelOutput

    def function(W: Tensor, x: Tensor) -> Any:
        return output_type(last_hidden_state=x @ W, hidden_states=(x @ W, (x @ W).tanh()))

    model, x = Calls(function, (3, 2)), draw(5, 3)
    found = modjac(model, x)
    assert type(found) is output_type
    close(found["last_hidden_state"][0], oracle_linear(x))
    close(compute_jacobian(model, x, outputs="last_hidden_state"), model.weights[0].detach().T.expand(5, 2, 3))
    assert compute_jacobian(model, x)["hidden_states"][1].shape == (5, 2, 3)


@row("56 the call is made under no_grad, in inference mode or under autocast")
def _() -> None:
    model, x, y = small_net(), draw(5, 3), draw(5, 2)
    hessian = oracle.hessian(model, square, x, y)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            close(jacops.hessian(model, square, x, y).dense(), hessian)
            close(jacops.ggn(model, square, x, y).dense(), jacops.ggn(model, square, x, y).dense())
            rows = jacops.sample_gradients(model, square, x, y).matrix
            assert not torch.is_grad_enabled()
        close(rows[2], oracle.gradient(model, square, x[2:3], y[2:3]))
    single, x, y = small_net().float(), x.float(), y.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert modjac(single, x, flatten=True).dtype == torch.float32
        close(modjac(single, x), oracle.parameter_jacobian(small_net(), x), rtol=0.05)
        close(jacops.hessian(single, square, x, y).dense(), hessian, rtol=0.05)
        assert torch.is_autocast_enabled("cpu")
    close(modjac(single, x), oracle.parameter_jacobian(small_net(), x), rtol=1e-5)


@row("57 a derivative is infinite or undefined at the point")
def _() -> None:
    zero = torch.zeros(3).double()
    cases: tuple[tuple[Callable[..., Tensor], bool], ...] = (
        (lambda W, x: (W * 0).sqrt() * x, True),
        (lambda W, x: torch.where(W > 1e9, (W * 0).sqrt(), W) * x, True),
        (lambda W, x: (W * 0).norm() * x, False),
    )
    for function, bad in cases:
        model = Calls(function, (3,))
        if bad:
            for call in (modjac, lambda model, x: jacops.model_vjp(model, x, torch.ones(3).double())):
                refused(NonFiniteError, lambda call=call, model=model: call(model, torch.ones(3).double()), "weights.0")
        else:
            close(modjac(model, torch.ones(3).double()), zero.expand(3, 3))
    refused(NonFiniteError, lambda: compute_jacobian(lambda x: x.sqrt(), torch.zeros(2, 3)), "by x")


@row("58 a Hessian is zero in a block")
def _() -> None:
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)))
    x, y = draw(5, 3), draw(5, 1)
    loss = lambda output, y: (output * y).sum()  # noqa: E731
    expected = oracle.hessian(model, loss, x, y)
    assert not expected[:16, :16].any()
    close(jacops.hessian(model, loss, x, y).dense(), expected)
    linear = settled(nn.Linear(3, 1))
    assert not jacops.hessian(linear, loss, x, y).dense().any()
    assert not jacops.hvp(linear, loss, x, y, torch.ones(4).double()).any()


# 63, 66-69: data


@row("63 the target lacks the output's last axis")
def _() -> None:
    model, x, y = settled(nn.Linear(3, 1)), draw(5, 3), draw(5)
    for loss in (F.mse_loss, nn.MSELoss(), F.l1_loss, F.smooth_l1_loss, F.huber_loss):
        for call in (jacops.hessian, jacops.ggn):
            refused(
                InputError, lambda call=call, loss=loss: call(model, loss, x, y), "`y`", "(5,)", "(5, 1)", "unsqueeze"
            )
        refused(InputError, lambda loss=loss: TorchTwiceDifferentiable(model, loss).grad(x, y), "`y`", "(5,)", "(5, 1)")
        refused(InputError, lambda loss=loss: jacops.sample_gradients(model, loss, x, y), "`y`", "(1,)", "(1, 1)")


def influences(data: Any, **options: Any) -> Any:
    model = settled(nn.Linear(3, 1))
    return compute_influences(TorchTwiceDifferentiable(model, F.mse_loss), data, damping=0.5, **options)


@row("66 the last batch is smaller")
def _() -> None:
    x, y = draw(10, 3), draw(10, 1)
    whole = influences([(x, y)]).values
    for size in (1, 3, 4, 9):
        close(influences(DataLoader(TensorDataset(x, y), batch_size=size)).values, whole)


@row("67 a loader is empty")
def _() -> None:
    data = [(draw(5, 3), draw(5, 1))]
    nothing = DataLoader(TensorDataset(torch.zeros(0, 3), torch.zeros(0, 1)), batch_size=2)
    for empty in ([], nothing):
        refused(DataError, lambda empty=empty: influences(empty), "`training_data`", "empty", "at least one batch")
        refused(DataError, lambda empty=empty: influences(data, test_data=empty), "`test_data`", "empty")
    refused(
        DataError,
        lambda: influences([(torch.zeros(0, 3).double(), torch.zeros(0, 1).double())]),
        "training_data",
        "row",
    )


@row("68 a loader is a generator")
def _() -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield draw(5, 3), draw(5, 1)

    for once in (batches(), iter([(draw(5, 3), draw(5, 1))]), zip([draw(5, 3)], [draw(5, 1)], strict=True)):
        refused(DataError, lambda once=once: influences(once), "`training_data`", "read once", "Dataset")
    data = [(draw(5, 3), draw(5, 1))]
    refused(DataError, lambda: influences(data, test_data=batches()), "`test_data`", "read once")
    refused(InputTypeError, lambda: influences(3), "`training_data`", "a int", "batches (x, y)")


@row("69 a loader shuffles")
def _() -> None:
    loader = DataLoader(TensorDataset(draw(10, 3), draw(10, 1)), batch_size=4, shuffle=True)
    refused(DataError, lambda: influences(loader), "`training_data`", "RandomSampler", "shuffle=False")


@pytest.mark.parametrize("label", ROWS)
def test_hostile_row(label: str):
    ROWS[label]()


def test_hostile_every_row_that_touches_these_calls_is_here():
    assert {int(label[:2]) for label in ROWS} == {*range(1, 59), 63, 66, 67, 68, 69}


# The caller's own transforms around a call


def calls_on(x: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """Every call, of an input that a transform may have wrapped."""
    model, y = small_net(), draw(5, 2, seed=1)
    W, u, v = draw(3, 2).requires_grad_(), draw(5, 2, seed=2), draw(3, 2)
    wrapped = TorchTwiceDifferentiable(model, square)
    vs = tangents(model)
    return {
        "compute_jacobian": lambda x: compute_jacobian(model, x),
        "modjac": lambda x: modjac(model, x, flatten=True),
        "model_jvp": lambda x: jacops.model_jvp(model, x, vs),
        "model_vjp": lambda x: jacops.model_vjp(model, x, u)[0],
        "jvp": lambda x: jacops.jvp(lambda: (x @ W).tanh(), [W], v),
        "vjp": lambda x: jacops.vjp(lambda: (x @ W).tanh(), [W], u),
        "full_jacobian": lambda x: jacops.full_jacobian(lambda: (x @ W).tanh(), [W])[0],
        "jacobian": lambda x: jacops.jacobian(model, x).dense(),
        "hessian": lambda x: jacops.hessian(model, square, x, y).dense(),
        "ggn": lambda x: jacops.ggn(model, square, x, y).dense(),
        "sample_gradients": lambda x: jacops.sample_gradients(model, square, x, y).matrix,
        "grad": lambda x: wrapped.grad(x, y),
        "influences": lambda x: compute_influences(wrapped, [(x, y)], damping=5.0).values,
    }


CALLS = list(calls_on(draw(5, 3)))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "vmap": lambda function, x: torch.func.vmap(function)(x),
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x[0]),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x[0]),
    "jvp": lambda function, x: torch.func.jvp(function, (x[0],), (x[1],)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_callers_transform_around_a_call_is_a_clear_error(call: str, transform: str):
    x = draw(2, 5, 3)
    function = calls_on(x)[call]
    with pytest.raises(NotDifferentiableError, match=r"inside a torch.func transform.*Call it outside"):
        TRANSFORMS[transform](function, x)
    function(x[0])  # and afterwards it works again


@pytest.mark.parametrize("call", CALLS)
def test_callers_compile_around_a_call_works_or_says_that_it_does_not(call: str):
    x = draw(5, 3)
    function = calls_on(x)[call]
    expected, found, said = function(x), None, ""
    try:
        found = torch.compile(function, backend="eager")(x)
    except JacopsError as error:
        said = str(error)
    finally:
        torch.compiler.reset()
    assert found is not None or "compile" in said
    if found is not None:
        close(found, expected)
