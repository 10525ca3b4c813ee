"""Contributions of any input and output: values, bias parts and Jacobians against a plain loop in float64.

The loop takes one sample at a time and one number of its output at a time. Bias parts have two oracles, neither of
which the library uses: what is left of the output when `J x` is taken off, and, for networks of ReLU and max pooling,
the output for an input of zeros with every gate and every choice held as the sample sets them.
"""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
from jacops import JacopsWarning, contributions
from jacops._runtime.memory import Meter
from jacops.errors import (
    InputError,
    InputTypeError,
    MemoryBudgetError,
    ModelStateError,
    NonFiniteError,
    NotDifferentiableError,
)
from jacops.results import Contributions
from oracle import leaves, mapped
from small import draw, refused, settled
from zoo import ZOO

F64 = torch.float64


# ---- models ------------------------------------------------------------------------------------------------------


def image_net() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    model = settled(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, stride=2),
                      nn.ReLU(), nn.Flatten(), nn.Linear(5, 3))
    )  # fmt: skip
    norm.running_mean.copy_(draw(4, seed=7))
    norm.running_var.copy_(draw(4, seed=8).abs() + 0.5)
    return model.eval()


def gene_net() -> nn.Module:
    """One-hot DNA, `(n, 4, length)`."""
    return settled(
        nn.Sequential(nn.Conv1d(4, 6, 5), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 4, 3), nn.ReLU(), nn.Flatten(),
                      nn.Linear(16, 2))
    )  # fmt: skip


def dna(count: int = 4, length: int = 16) -> Tensor:
    letters = torch.randint(4, (count, length), generator=torch.Generator().manual_seed(0))
    return F.one_hot(letters, 4).mT.double()


class Words(nn.Module):
    """Embedded tokens, mixed by a convolution, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.act, self.last = (
            nn.Embedding(9, 4),
            nn.Conv1d(4, 5, 3),
            nn.ReLU(),
            nn.Linear(5, 2),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.act(self.mix(self.embedding(ids).mT)).mean(-1))


class Several(nn.Module):
    """Two differentiable inputs, integers, a mask and settings."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.table = nn.Linear(3, 6), nn.Conv1d(2, 6, 2), nn.Embedding(5, 6)
        self.act, self.last = nn.ReLU(), nn.Linear(6, 2)

    def forward(self, a: Tensor, b: Tensor, ids: Any = None, mask: Any = None, scale: float = 1.0, flip: bool = False):
        h = self.a(a) + self.act(self.b(b)).sum(-1)
        h = h if ids is None else h + self.table(ids)
        h = h if mask is None else h * mask
        return self.last(self.act((-h if flip else h) * scale))


class Vae(nn.Module):
    def __init__(self, kind: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.act, self.mu, self.logvar = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.Linear(6, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.body(x))
        return self.kind(self.mu(h), self.logvar(h))


def named(mu: Tensor, logvar: Tensor) -> dict[str, Any]:
    return {"mu": mu, "logvar": logvar, "extra": None}


class Positions(nn.Module):
    """A number per position and unit: `(n, length, 2)`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        return self.last(h + h.cumsum(1))


class Tree(nn.Module):
    """A mapping with a tuple in it, one part without an axis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.first(x))
        return {"pair": (self.last(h), h.sum(-1)), "maps": [h.unflatten(1, (5, 1))]}


def scalar_net() -> nn.Module:
    return settled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1), nn.Flatten(0)))


def classifier() -> nn.Module:
    return settled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any]
    inputs: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)


X = draw(5, 4, seed=2)
MIXED = {
    "a": draw(5, 3),
    "b": draw(5, 2, 3, seed=1),
    "ids": torch.tensor([0, 3, 1, 4, 2]),
    "mask": None,
    "scale": 2.0,
    "flip": True,
}
CASES = {
    "image": Case(image_net, lambda: draw(4, 3, 8, 8)),
    "one-hot DNA": Case(gene_net, dna),
    "sequence": Case(lambda: settled(Positions()), lambda: draw(3, 4, 3)),
    "two inputs": Case(lambda: settled(Several()), lambda: (draw(5, 3), draw(5, 2, 3, seed=1))),
    "keywords, integers and settings": Case(lambda: settled(Several()), lambda: dict(MIXED)),
    "mapping": Case(lambda: settled(Vae(named)), lambda: X),
    "tuple": Case(lambda: settled(Vae(lambda mu, logvar: (mu, logvar))), lambda: X),
    "list": Case(lambda: settled(Vae(lambda mu, logvar: [mu, logvar])), lambda: X),
    "tree": Case(lambda: settled(Tree()), lambda: X),
    "one-dimensional output": Case(scalar_net, lambda: X),
    "feature without an axis": Case(lambda: settled(nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4), nn.ReLU(),
                                                                  nn.Linear(4, 2))), lambda: draw(5)),
    "one sample": Case(image_net, lambda: draw(1, 3, 8, 8)),
    "many samples": Case(image_net, lambda: draw(40, 3, 8, 8), {"batch_size": 16}),
}  # fmt: skip
GATED = [name for name in CASES if name not in ("keywords, integers and settings", "sequence")]


# ---- oracles -----------------------------------------------------------------------------------------------------


def total(jacobian: Any, inputs: Any, output: Tensor) -> Tensor:
    """`J x` of one output, over all inputs, a sample at a time."""
    blocks, points = leaves(jacobian), [t for t in leaves(tensors_of(inputs)) if t.is_floating_point()]
    whole = torch.zeros(output.shape, dtype=F64)
    for block, point in zip(blocks, points, strict=True):
        for n in range(len(output)):
            whole[n] += (block[n] * point[n].double()).reshape(*output.shape[1:], -1).sum(-1)
    return whole


def tensors_of(inputs: Any) -> Any:
    """The inputs with None in place of what is no tensor."""
    if isinstance(inputs, dict):
        return {k: v if isinstance(v, Tensor) else None for k, v in inputs.items()}
    return inputs


def plain(case: Case) -> tuple[Any, list[tuple[Tensor, Tensor, Any]]]:
    """The Jacobian, and for every output itself, its bias part and its Jacobian, by a loop over samples."""
    model, inputs = case.make(), case.inputs()
    if isinstance(inputs, dict):  # the oracle supports tensors only
        settings = {k: v for k, v in inputs.items() if not isinstance(v, Tensor)}
        bound = Bound(model, settings)
        jacobian = oracle.input_jacobian(bound, {k: v for k, v in inputs.items() if isinstance(v, Tensor)})
    else:
        jacobian = oracle.input_jacobian(model, inputs)
    count = len(leaves(tensors_of(inputs))[0])
    alone = [run(model, one(inputs, n)) for n in range(count)]
    outputs = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    entries = by_output(jacobian, run_whole(model, inputs))
    return jacobian, [(o, o - total(j, inputs, o), j) for o, j in zip(outputs, entries, strict=True)]


class Bound(nn.Module):
    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs, **self.settings)


def one(inputs: Any, n: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[n : n + 1]
    if isinstance(inputs, tuple):
        return tuple(one(part, n) for part in inputs)
    return {k: one(v, n) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def run_whole(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return oracle.called(model, inputs)


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    return leaves(run_whole(model, inputs))


def by_output(tree: Any, output: Any) -> list[Any]:
    """The entries of a tree at the places of an output's tensors."""
    if output is None:
        return []
    if isinstance(output, Tensor):
        return [tree]
    keys = list(output) if isinstance(output, dict) else range(len(output))
    return [entry for key in keys for entry in by_output(tree[key], output[key])]


class Held:
    """Gates and choices of a network, noted at one input and held at another."""

    def __init__(self, model: nn.Module) -> None:
        self.noted, self.at, self.holds = list[Tensor](), 0, False
        for module in model.modules():
            if isinstance(module, nn.ReLU | nn.MaxPool1d | nn.MaxPool2d):
                module.register_forward_hook(self.hook)

    def hook(self, module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        (h,) = args
        if not self.holds:
            if isinstance(module, nn.ReLU):
                self.noted.append(h > 0)
            else:
                pool = F.max_pool2d if isinstance(module, nn.MaxPool2d) else F.max_pool1d
                self.noted.append(pool(h, module.kernel_size, return_indices=True)[1])
            return output
        note, self.at = self.noted[self.at], self.at + 1
        if isinstance(module, nn.ReLU):
            return h * note
        axes = 2 if isinstance(module, nn.MaxPool2d) else 1
        return h.flatten(-axes).gather(-1, note.flatten(-axes)).reshape(note.shape)


def bias_by_gates(case: Case) -> list[Tensor]:
    """The outputs for an input of zeros, gates held as each sample sets them."""
    model, inputs = case.make(), case.inputs()
    count, found = len(leaves(tensors_of(inputs))[0]), list[list[Tensor]]()
    for n in range(count):
        twin, sample = copy.deepcopy(model), one(inputs, n)
        held = Held(twin)
        run(twin, sample)
        held.holds = True
        found.append(run(twin, mapped(torch.zeros_like, sample)))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def close(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    actual, expected = leaves(actual), leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        scale = float(e.abs().max()) if e.numel() else 1.0
        assert not e.numel() or float((a.double() - e.double()).abs().max()) <= rtol * (scale or 1.0)


# ---- against the loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_input_and_output_is_as_a_plain_loop_gives_it(name: str):
    case = CASES[name]
    model, inputs = case.make(), case.inputs()
    before, kept = copy.deepcopy(model.state_dict()), mapped(torch.clone, tensors_of(inputs))
    found = contributions(model, inputs, **case.options)
    jacobian, outputs = plain(case)
    close(found.jacobian, jacobian)
    close(found.output, [output for output, _, _ in outputs], 1e-13)
    close(found.bias, [bias for _, bias, _ in outputs])
    points = [t for t in leaves(tensors_of(inputs)) if t.is_floating_point()]
    for values, (output, _, entry) in zip(by_output(found.values, found.output), outputs, strict=True):
        expected = []
        for block, point in zip(leaves(entry), points, strict=True):
            expected.append(block * point.reshape(len(point), *[1] * (output.ndim - 1), *point.shape[1:]))
        close(values, expected)
    assert found.verification.relative_error < 1e-12
    assert found.slope_error is not None
    assert found.slope_error < 1e-8
    assert found.notes == ()
    assert found.method == "exact"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    close(tensors_of(inputs), kept, 0.0)


@pytest.mark.parametrize("name", GATED)
def test_bias_parts_are_outputs_for_zeros_with_gates_held(name: str):
    case = CASES[name]
    close(contributions(case.make(), case.inputs(), **case.options).bias, bias_by_gates(case))


@pytest.mark.parametrize("name", CASES)
def test_no_samples_have_the_shapes_of_one(name: str):
    case = CASES[name]
    inputs, tensor = case.inputs(), Tensor
    none = {k: v[:0] if isinstance(v, tensor) else v for k, v in inputs.items()} if isinstance(inputs, dict) else (
        mapped(lambda t: t[:0], inputs)
    )  # fmt: skip
    found, whole = contributions(case.make(), none), contributions(case.make(), inputs)
    for part in ("values", "bias", "output", "jacobian"):
        shapes = [t.shape for t in leaves(getattr(found, part))]
        assert shapes == [(0, *t.shape[1:]) for t in leaves(getattr(whole, part))]
    assert found.verification.max_error == found.slope_error == 0.0
    assert "0 samples" in repr(found)
    assert jacops.plan(contributions, case.make(), none).result_bytes == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [c for c in ZOO if "compute_jacobian" not in c.expect], ids=lambda c: c.name)
def test_whatever_compute_jacobian_takes_has_contributions(case: Any):
    model, inputs = case.model(), case.x()
    torch.manual_seed(3)
    found = contributions(model, inputs)
    torch.manual_seed(3)
    jacobian = jacops.compute_jacobian(case.model(), inputs)
    close(found.jacobian, jacobian, case.tolerance)
    points = [t.double() for t in leaves(inputs) if t.is_floating_point()]
    for one_of in [found] if isinstance(found.output, Tensor) else [part for _, part in found._each()]:
        lead = one_of.output.ndim
        assert one_of.bias.shape == one_of.output.shape
        added = torch.zeros(one_of.output.shape, dtype=F64)
        for values, block, point in zip(leaves(one_of.values), leaves(one_of.jacobian), points, strict=True):
            product = block.double() * point.reshape(len(point), *[1] * (lead - 1), *point.shape[1:])
            close(values, product, max(case.tolerance, 1e-12))
            added += values.double().reshape(*added.shape, -1).sum(-1)
        if not found.notes:
            close(one_of.bias.double() + added, one_of.output, max(case.tolerance, 1e-12))


# ---- what a model may be -----------------------------------------------------------------------------------------


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", ["image", "mapping", "two inputs"])
def test_functions_and_plain_callables_are_models(name: str):
    case = CASES[name]
    model, inputs = case.make(), case.inputs()
    expected = contributions(model, inputs)
    pure = jacops.Function(
        lambda params, *args: torch.func.functional_call(model, params, args), parameters(copy.deepcopy(model))
    )
    for other in (pure, lambda *args: model(*args), model.forward):
        found = contributions(other, inputs)
        for part in ("values", "bias", "output", "jacobian"):
            close(getattr(found, part), getattr(expected, part))
        assert found.notes == ()


def test_a_tensor_that_a_function_captures_is_a_constant():
    weight, shift = draw(4, 3).requires_grad_(), draw(3, seed=1).requires_grad_()
    derived = 2 * shift
    found = contributions(lambda x: (x @ weight + derived).relu(), X)
    close(found.bias, (derived * (X @ weight + derived > 0)).detach())
    assert found.notes == ()
    assert weight.grad is None


@pytest.mark.parametrize("checks", ["first", "always", "never"])
def test_model_outputs_of_transformers_are_taken(checks: Any):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 8, "vocab_size": 11}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False, "activation_function": "relu"}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).double().eval()
    ids = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    found = contributions(model, ids, at="transformer.ln_f", checks=checks)  # what follows is linear
    assert type(found.output) is type(model(**ids))
    hidden = model.transformer(**ids).last_hidden_state.detach()
    logits = found["logits"]
    close(logits.output, model(**ids).logits.detach(), 1e-13)
    close(logits.values.sum((-1, -2)), logits.output)
    expected = torch.einsum("vd,ntd->ntvd", model.lm_head.weight.detach(), hidden)
    for t in range(3):
        close(logits.values[:, t, :, t], expected[:, t])
    close(logits.bias, torch.zeros_like(logits.output))
    inside = ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj")
    part = contributions(model, ids, at=inside)
    linear = model.transformer.h[0].mlp.c_proj
    close(part.bias, linear.bias.detach().expand(part.bias.shape))
    assert part.notes == found.notes == ()
    assert contributions(model, ids, at="transformer.ln_f", outputs="logits").values.shape == logits.values.shape


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("name", ["image", "one-hot DNA", "two inputs", "mapping", "one-dimensional output"])
def test_lower_precisions_are_right_to_their_rounding(name: str, dtype: torch.dtype, rtol: float):
    case = CASES[name]
    inputs = mapped(lambda t: t.to(dtype), case.inputs())
    found = contributions(case.make().to(dtype), inputs)
    rounded = Case(lambda: case.make().to(dtype).double(), lambda: mapped(torch.Tensor.double, inputs))
    _, outputs = plain(rounded)
    close(found.bias, [bias for _, bias, _ in outputs], 4 * rtol)
    close(found.output, [output for output, _, _ in outputs], 4 * rtol)
    assert all(t.dtype == dtype for t in leaves(found.bias) + leaves(found.values))
    assert found.notes == ()


def test_inputs_of_two_dtypes_are_followed_each_in_its_own():
    first, second = draw(4, 3).float(), draw(4, 3, seed=1)
    found = contributions(lambda a, b: (a.double() * 2 + b).clamp(-0.5, 0.5) + 0.25, (first, second))
    inside = (first.double() * 2 + second).abs() < 0.5
    close(found.bias, torch.where(inside, 0.25, 0.25 + 0.5 * (first.double() * 2 + second).sign()), 1e-6)
    assert found.notes == ()


def test_inputs_that_are_shared_have_no_part_of_their_own():
    model, mask = settled(Several()), draw(6, seed=5).sign()
    given = {"a": MIXED["a"], "b": MIXED["b"]}
    found = contributions(model, {**given, "mask": mask}, shared="mask")
    jacobian = oracle.input_jacobian(Bound(model, {"mask": mask}), given)
    assert found.values["mask"] is None
    close([found.jacobian[key] for key in "ab"], jacobian)
    output = model(**given, mask=mask).detach()
    close(found.output, output, 1e-13)
    close(found.bias, output - total(jacobian, given, output))
    assert found.notes == ()


# ---- arrays and sparse rows --------------------------------------------------------------------------------------


ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "float64": lambda a: a,
    "float32": lambda a: a.astype(np.float32),
    "big-endian": lambda a: a.astype(">f8"),
    "strided": lambda a: np.repeat(a, 2, 1)[:, ::2],
    "read-only": lambda a: np.frombuffer(a.tobytes()).reshape(a.shape),
    "csr": scipy.sparse.csr_matrix,
    "csr array": scipy.sparse.csr_array,
    "csc": scipy.sparse.csc_array,
    "coo": scipy.sparse.coo_array,
    "dok": scipy.sparse.dok_matrix,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_and_sparse_rows_get_the_dtype_of_the_model(kind: str, dtype: torch.dtype):
    rows = (X * (X > 0)).numpy()
    model = classifier().to(dtype)
    found = contributions(model, ARRAYS[kind](rows))
    given = torch.from_numpy(ARRAYS[kind](rows).astype(np.float32) if kind == "float32" else rows).to(dtype)
    expected = contributions(model, given)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.bias, expected.bias)
    assert found.output.dtype == dtype
    sizes = jacops.reduce_contributions(found)
    assert isinstance(sizes, np.ndarray)
    assert sizes.shape == (5, 4)


def test_counts_in_sparse_rows_are_numbers_and_integers_in_arrays_may_be_indices():
    counts = scipy.sparse.csr_array(np.arange(20).reshape(5, 4) % 3)
    found = contributions(classifier(), counts)
    close(found.values, contributions(classifier(), torch.from_numpy(counts.toarray()).double()).values, 0.0)
    with pytest.raises(NotDifferentiableError, match="integer"):
        contributions(classifier(), counts.toarray())
    words = np.array([[1, 2, 3, 4], [0, 5, 8, 8]])
    model = settled(Words())
    found = contributions(model, words, at="embedding")
    close(found.values, contributions(model, torch.from_numpy(words), at="embedding").values, 0.0)


def test_arrays_in_a_mapping_and_in_a_tuple_are_converted():
    model, ids = settled(Several()), MIXED["ids"].numpy()
    given = {**MIXED, "a": MIXED["a"].numpy(), "b": MIXED["b"].numpy(), "ids": ids}
    close(contributions(model, given).values, contributions(model, MIXED).values, 0.0)
    pair = (MIXED["a"].numpy(), MIXED["b"])
    close(contributions(model, pair).bias, contributions(model, (MIXED["a"], MIXED["b"])).bias, 0.0)


def test_a_function_without_parameters_takes_arrays_as_they_are():
    assert contributions(lambda x: x.abs(), X.numpy()).values.dtype == F64
    assert contributions(lambda x: x.abs(), X.float().numpy()).values.dtype == torch.float32


def test_features_before_a_projection_may_be_arrays_or_sparse():
    features = draw(7, 8) * (draw(7, 8, seed=9) > 0)
    projection = jacops.results.Projection(draw(4, 8, seed=1), draw(8, seed=2))
    model, reduced = settled(Vae(named)), projection(features)
    expected = contributions(model, reduced, projection=projection, features=features)
    for given in (features.numpy(), scipy.sparse.csr_array(features.numpy())):
        found = contributions(model, reduced.numpy(), projection=projection, features=given)
        close(found.values, expected.values)
    for key in ("mu", "logvar"):
        one_of = expected[key]
        close(one_of.values.sum(-1) + one_of.bias, one_of.output)
        assert one_of.values.shape == (*one_of.output.shape, 8)
    flat = contributions(scalar_net(), reduced, projection=projection, features=features)
    assert flat.values.shape == (7, 8)
    close(flat.values.sum(-1) + flat.bias, flat.output)
    none = contributions(scalar_net(), reduced[:0], projection=projection, features=features[:0])
    assert none.values.shape == (0, 8)
    wide = jacops.results.Projection(torch.zeros(4, 300_000).double(), torch.zeros(300_000).double())
    with pytest.raises(MemoryBudgetError, match="by 300,000 features"):
        contributions(scalar_net(), X * 0, projection=wide, features=torch.zeros(5, 300_000), budget="20MiB")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (np.array([["a", "b"]]), InputTypeError, "`x` is an array of dtype <U1, but numbers are needed"),
        (np.array([[None]]), InputTypeError, "`x` is an array of dtype object"),
        (np.ma.masked_invalid([[1.0, np.nan]]), InputTypeError, "masked entries"),
        (np.array([[1j, 2.0]]), NotDifferentiableError, "complex"),
        (np.array(3.0), InputError, "first axis must run over samples"),
        ((np.ones((3, 4)), np.ones((2, 4))), InputError, "of lengths"),
        ({"a": np.array(["x"])}, InputTypeError, r"`x\['a'\]` is an array of dtype"),
        ([1.0, 2.0], InputTypeError, "`x` is a list"),
        (torch.ones(2, 4).to_sparse(), InputError, "must be dense"),
        (np.array([[1.0, np.nan, 0.0, 0.0]]), NonFiniteError, "contributions"),
        (None, InputTypeError, "`x` is None"),
    ],
    ids=str,
)
def test_what_is_no_input_is_refused_by_name(given: Any, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        contributions(classifier(), given)


def test_arrays_are_refused_where_tensors_are_meant():
    """Elsewhere nothing is converted: contributions are where data come from other packages."""
    with pytest.raises(InputTypeError, match="torch.as_tensor"):
        jacops.compute_jacobian(classifier(), X.numpy())
    with pytest.raises(InputTypeError, match="both must be"):
        jacops.project_jacobian(draw(2, 3, 4), np.ones((4, 5)))


# ---- which outputs, from where to where --------------------------------------------------------------------------


def test_target_picks_an_output_per_sample_and_drops_its_axis():
    labels = torch.tensor([0, 2, 1, 1, 0])
    rows, whole = torch.arange(5), contributions(classifier(), X)
    found = contributions(classifier(), X, target=labels, batch_size=2)
    for part in ("values", "bias", "output", "jacobian"):
        close(getattr(found, part), getattr(whole, part)[rows, labels])
    assert found.values.shape == jacops.compute_jacobian(classifier(), X, target=labels).shape == (5, 4)
    predicted = classifier()(X).argmax(1)
    close(contributions(classifier(), X.numpy(), target=predicted).output, classifier()(X).max(1).values.detach())
    image = contributions(image_net(), draw(4, 3, 8, 8), target=labels[:4])
    assert image.values.shape == (4, 3, 8, 8)
    assert jacops.reduce_contributions(image).shape == (4, 3, 8, 8)
    one_of = contributions(settled(Vae(named)), X, outputs="logvar", target=labels)
    close(one_of.output, settled(Vae(named))(X)["logvar"][rows, labels].detach())
    with pytest.raises(InputError, match="`target`.*dict"):
        contributions(settled(Vae(named)), X, target=labels)


@pytest.mark.parametrize(
    ("outputs", "shape"),
    [(1, (5, 4)), ([2, 0], (5, 2, 4)), (slice(0, 1), (5, 1, 4)), (lambda o: o.clamp(max=0.1).sum(1), (5, 4))],
    ids=["index", "list", "slice", "callable"],
)
def test_outputs_pick_as_in_compute_jacobian(outputs: Any, shape: tuple[int, ...]):
    found = contributions(classifier(), X, outputs=outputs)
    assert found.values.shape == jacops.compute_jacobian(classifier(), X, outputs=outputs).shape == shape
    close(found.values.sum(-1) + found.bias, found.output)
    assert found.notes == ()


def test_outputs_pick_entries_of_a_mapping():
    whole = contributions(settled(Vae(named)), X)
    close(contributions(settled(Vae(named)), X, outputs="mu").values, whole["mu"].values)
    pair = contributions(settled(Vae(named)), X, outputs=["logvar", "mu"])
    assert list(pair.output) == ["logvar", "mu"]
    close(pair["logvar"].bias, whole["logvar"].bias)


def test_from_an_embedding_contributions_are_of_tokens():
    model = settled(Words())
    ids = torch.tensor([[1, 2, 3, 4], [0, 5, 8, 8], [7, 7, 1, 0]])
    found = contributions(model, ids, at="embedding")
    hidden = model.embedding(ids).detach()
    tail = nn.Sequential(Transposed(), model.mix, model.act, Mean(), model.last)
    close(found.jacobian, oracle.input_jacobian(tail, hidden))
    close(found.bias, bias_by_gates(Case(lambda: tail, lambda: hidden)))
    assert found.values.shape == (3, 2, 4, 4)
    assert contributions(model, ids[:0], at="embedding").values.shape == (0, 2, 4, 4)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


def test_to_the_logit_before_a_sigmoid_contributions_are_exact():
    model = nn.Sequential(*classifier(), nn.Sigmoid())
    with pytest.warns(JacopsWarning, match="sigmoid"):
        assert contributions(model, X).verification.relative_error > 1e-3
    found = contributions(model, X, at=(None, "2"))
    close(found.values, contributions(classifier(), X).values)
    assert found.notes == ()
    labelled = contributions(model, X, at=(None, "2"), target=torch.tensor([0, 2, 1, 1, 0]))
    assert labelled.values.shape == (5, 4)


def test_a_connection_around_the_layer_is_a_constant_of_it():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.layer(x) + x.tanh()))

    model = settled(Around())
    found = contributions(model, X, at="layer")
    hidden = model.layer(X).detach()
    gate = (hidden + X.tanh() > 0).double()
    close(found.bias, (gate * X.tanh()) @ model.last.weight.detach().T + model.last.bias.detach())
    assert found.notes == ()
    with pytest.raises(InputError, match="near it: .*'layer'"):
        contributions(model, X, at="layr")
    with pytest.raises(InputTypeError, match="plain function has no submodules"):
        contributions(lambda x: x, X, at="layer")
    with pytest.raises(ModelStateError, match="use that submodule once"):
        contributions(nn.Sequential(layer := nn.Linear(4, 4), layer).double(), X, at="0")


# ---- memory ------------------------------------------------------------------------------------------------------


MEMORY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (image_net, (3, 32, 32)),
    "perceptron": (lambda: settled(nn.Sequential(nn.Linear(60, 300), nn.ReLU(), nn.Linear(300, 9))), (60,)),
    "hard": (lambda: settled(nn.Sequential(nn.Linear(60, 300), nn.Hardtanh(), nn.Linear(300, 9))), (60,)),
    "smooth": (lambda: settled(nn.Sequential(nn.Linear(60, 300), nn.GELU(), nn.Linear(300, 9))), (60,)),
    # To examine what is curved takes sixteen times as much as a sweep.
    "smooth and wide": (lambda: settled(nn.Sequential(nn.Linear(20, 4000), nn.GELU(), nn.Linear(4000, 1))), (20,)),
}


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MEMORY)
def test_a_budget_holds_for_all_that_is_held(name: str, dtype: torch.dtype):
    make, shape = MEMORY[name]
    model = make().to(dtype)
    if name == "convolutions":
        model = nn.Sequential(*list(model)[:-1], nn.Linear(245, 3)).to(dtype).eval()
    x = draw(120, *shape).to(dtype)
    contributions(model, x[:2])  # what torch loads for its first derivative
    wide = contributions(model, x)
    for budget in ("28MiB", "40MiB", "100MiB"):
        plan = jacops.plan(contributions, model, x, budget=budget)
        if not plan.fits:
            with pytest.raises(MemoryBudgetError, match="contributions: .* would be held"):
                contributions(model, x, budget=budget)
            continue
        with Meter() as meter:
            found = contributions(model, x, budget=budget)
        assert meter.peak <= plan.peak_bytes <= 2**20 * int(budget[:-3])
        close(found.values, wide.values, 1e-5 if dtype == torch.float32 else 1e-11)
        if "smooth" not in name:  # which has no bias part
            close(found.bias, wide.bias, 1e-5 if dtype == torch.float32 else 1e-11)
    with pytest.raises(MemoryBudgetError, match="nothing was allocated"):
        contributions(model, x, budget="13MiB" if name == "convolutions" else "12.1MiB")


def test_a_plan_counts_contributions_beside_the_jacobian():
    model, x = image_net(), draw(4, 3, 8, 8)
    own, jacobian = (jacops.plan(call, model, x) for call in (contributions, jacops.compute_jacobian))
    assert own.call == "contributions"
    assert own.result_bytes == 2 * jacobian.result_bytes == 2 * 4 * 3 * 3 * 64 * 8
    assert own.peak_bytes > jacobian.peak_bytes
    assert jacops.plan("contributions", model, x.numpy(), target=torch.zeros(4).long()).result_bytes == 2 * 4 * 192 * 8
    with pytest.raises(InputTypeError, match="no keyword `targets`. Did you mean `target`"):
        jacops.plan(contributions, model, x, targets=None)
    with pytest.raises(InputTypeError, match="needs|missing"):
        jacops.plan(contributions, model)


def test_the_jacobian_is_written_where_out_says():
    place = torch.empty(5, 3, 4, dtype=F64)
    found = contributions(classifier(), X, out=place)
    assert found.jacobian.data_ptr() == place.data_ptr()
    close(place, oracle.input_jacobian(classifier(), X))


# ---- the result --------------------------------------------------------------------------------------------------


def test_one_of_several_outputs_is_a_result_of_its_own():
    found = contributions(settled(Vae(named)), X)
    plain_one = contributions(settled(Vae(named)), X, outputs="mu")
    for one_of in (found["mu"], found[0], found[-2]):
        assert isinstance(one_of, Contributions)
        for part in ("values", "bias", "output", "jacobian"):
            assert torch.equal(getattr(one_of, part), getattr(plain_one, part))
        assert one_of.verification == plain_one.verification
    by_itself = contributions(settled(Vae(named)), X, outputs="logvar").verification
    assert found["logvar"].verification == by_itself != found["mu"].verification
    worst = max(found[key].verification.relative_error for key in ("mu", "logvar"))
    assert found.verification.relative_error == worst
    tree = contributions(settled(Tree()), X)
    assert tree["pair"][1].values.shape == (5, 4)
    assert tree["maps"][0].values.shape == (5, 5, 1, 4)
    assert isinstance(tree["pair"].output, tuple)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("mi", "Did you mean 'mu'"),
        ("logvars", "Did you mean 'logvar'"),
        ("extra", "the outputs are 'mu', 'logvar'"),
        (2, "the outputs are"),
        (1.5, "1.5"),
    ],
)
def test_an_output_that_is_not_there_is_named(key: Any, words: str):
    with pytest.raises(InputError, match=words):
        contributions(settled(Vae(named)), X)[key]
    with pytest.raises(InputError, match="there is one output only"):
        contributions(classifier(), X)[key]


def test_tuples_with_names_give_outputs_by_name_and_by_position():
    from collections import namedtuple

    kind = namedtuple("kind", ["mu", "logvar"])  # noqa: PYI024 - a type that users have
    found = contributions(settled(Vae(lambda mu, logvar: kind(mu, logvar))), X)
    assert torch.equal(found["logvar"].values, found[1].values)
    assert type(found.values).__name__ == "kind"


@pytest.mark.parametrize("name", CASES)
def test_results_are_saved_and_loaded_with_their_structure(name: str, tmp_path: Path):
    case = CASES[name]
    found = contributions(case.make(), case.inputs())
    found.save(tmp_path / "found")
    again = Contributions.load(tmp_path / "found")
    for part in ("values", "bias", "output", "jacobian"):
        mine, its = getattr(found, part), getattr(again, part)
        assert type(mine) is type(its)
        assert all(torch.equal(a, b) for a, b in zip(leaves(mine), leaves(its), strict=True))
    assert (again.verification, again.slope_error, again.notes, again.method) == (
        found.verification, found.slope_error, found.notes, found.method,
    )  # fmt: skip
    assert repr(again) == repr(found)
    assert repr(pickle.loads(pickle.dumps(found))) == repr(found)


REPRS = {
    "image": ("4 samples, 3 outputs, 3x8x8 features", "bias: ", "slopes: "),
    "one-dimensional output": ("5 samples, 1 output, 4 features",),
    "sequence": ("3 samples, 4x2 outputs, 4x3 features",),
    "two inputs": ("5 samples, 2 outputs, [0] 3, [1] 2x3 features", "x[1][0, 1]"),
    "keywords, integers and settings": ("['a'] 3, ['b'] 2x3 features",),
    "mapping": ("5 samples, 2 outputs", "['mu']", "['logvar']", "features + bias up to"),
    "tree": ("5 samples, 3 outputs", "['pair'][1]", "['maps'][0]"),
    "feature without an axis": ("5 samples, 2 outputs",),
}


@pytest.mark.parametrize("name", REPRS)
def test_a_result_says_what_it_is_of(name: str):
    found = contributions(CASES[name].make(), CASES[name].inputs())
    text = repr(found)
    assert all(words in text for words in REPRS[name]), text
    assert 4 <= len(text.splitlines()) <= 12
    assert "<table>" in found._repr_html_()


def test_the_features_of_largest_contribution_are_named_first():
    found = contributions(lambda a, b: a.sum(1) + 10 * b.sum(1), (torch.ones(2, 3), torch.full((2, 2), 2.0)))
    rows = [line.split() for line in repr(found).splitlines() if line.strip().startswith("x[")]
    assert rows[0][:2] == ["x[1][0]", "20"]
    assert rows[2][:2] == ["x[0][0]", "1"]


def test_what_takes_one_output_says_how_to_pick_it():
    found = contributions(settled(Vae(named)), X)
    for call in (found.plot, found.to_pandas, lambda: jacops.reduce_contributions(found)):
        refused(InputError, call, "found['mu']")
    refused(InputTypeError, lambda: np.asarray(found), "several outputs")
    several = contributions(settled(Several()), (draw(5, 3), draw(5, 2, 3)))
    refused(InputError, lambda: jacops.reduce_contributions(several), "by several inputs", ".values")


def test_reductions_use_which_axes_are_outputs():
    for name, axes in (("image", 1), ("sequence", 2), ("one-dimensional output", 0)):
        found = contributions(CASES[name].make(), CASES[name].inputs())
        whole = found.values.reshape(len(found.output), -1, *found.values.shape[1 + axes :]).numpy()
        for method, order in (("l2", 2), ("l1", 1), ("max", np.inf)):
            expected = np.linalg.norm(whole, order, axis=1)
            np.testing.assert_allclose(jacops.reduce_contributions(found, method), expected, rtol=1e-13)


def test_tables_count_outputs_of_any_shape():
    pytest.importorskip("pandas")
    flat = contributions(scalar_net(), X).to_pandas(bias=True)
    assert len(flat) == 5 * 5
    close(torch.tensor(flat.groupby("sample")["value"].sum().to_numpy()), scalar_net()(X).detach())
    grid = contributions(settled(Positions()), draw(3, 4, 3)).to_pandas()
    assert list(grid.columns) == ["sample", "output_0", "output_1", "feature_0", "feature_1", "value"]
    assert set(zip(grid["output_0"], grid["output_1"], strict=True)) == set(itertools.product(range(4), range(2)))


def test_figures_draw_outputs_of_any_shape():
    pytest.importorskip("matplotlib")
    assert (
        contributions(scalar_net(), X).plot(sample=1).axes[0].get_xlabel() == "contribution to the output, in its units"
    )
    assert contributions(image_net(), draw(2, 3, 8, 8)).plot().axes


# ---- what is wrong is seen ---------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """The identity with a backward that is off by a thousandth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.001 * grad


def test_a_wrong_derivative_of_one_output_or_of_one_input_is_seen():
    class Off(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"good": (a + b).relu(), "bad": [a, Doubled.apply(b).unflatten(1, (2, 2))]}

    with pytest.warns(JacopsWarning, match=r"output\['bad'\]\[1\] \(\d, \d\)") as said:
        found = contributions(Off(), (X, X + 1))
    assert "the output's changes and the Jacobian differ" in str(said[0].message)
    assert found["good"].verification.relative_error < 1e-12
    assert found["bad"][1].verification.relative_error > 1e-4
    assert found.slope_error is not None
    assert found.slope_error > 1e-4


def test_of_many_outputs_that_fail_the_worst_is_named():
    with pytest.warns(JacopsWarning, match=r"and 2 more outputs") as said:
        found = contributions(lambda x: [x.tanh(), x.exp(), (3 * x).sin(), x.relu()], X)
    assert len(said) == 1
    assert found[3].verification.relative_error < 1e-12
    assert any("tanh, exp, sin" in note for note in found.notes)


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
def test_bad_values_are_named_by_output_and_can_be_let_through():
    model = settled(Vae(lambda mu, logvar: {"mu": mu, "inverse": 1 / (logvar * 0)}))
    with pytest.raises(NonFiniteError, match=r"output\['inverse'\]"):
        contributions(model, X)
    found = contributions(model, X, check_finite=False)
    assert found["mu"].verification.relative_error < 1e-12


def test_nothing_of_the_callers_state_is_in_the_result():
    model, expected = classifier(), contributions(classifier(), X)
    asked = contributions(model, X.clone().requires_grad_())
    with torch.inference_mode():
        inferred = X.clone()
        inside = contributions(model, inferred)
    with torch.no_grad():
        recorded_off = contributions(model, X)
    for found in (asked, inside, recorded_off, contributions(model, inferred)):
        for part in ("values", "bias", "output", "jacobian"):
            assert torch.equal(getattr(found, part), getattr(expected, part))
            assert not getattr(found, part).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_under_autocast_parts_add_up_to_its_precision():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contributions(classifier().float(), X.float())
    assert found.output.dtype == torch.bfloat16
    close(found.values.float().sum(-1) + found.bias, found.output, 2e-2)
    assert found.notes == ()


class Doubles(torch.autograd.Function):
    """The identity, with a wrong derivative on request."""

    wrong = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0] if Doubles.wrong else grads[0]


class Counted(nn.Module):
    forwards = 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = settled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))

    def forward(self, x: Tensor) -> Tensor:
        Counted.forwards += 1
        return Doubles.apply(self.layers(x))


@pytest.mark.parametrize(("rows", "batch_size"), [(5, 1024), (5, 2), (1, 1024)])
def test_what_is_known_of_a_model_is_followed_in_its_one_forward(rows: int, batch_size: int):
    model, x = Counted(), draw(rows, 4, seed=6)
    first = contributions(model, x, batch_size=batch_size)
    for _ in range(3):
        Counted.forwards = 0
        again = contributions(model, x, batch_size=batch_size)
        assert Counted.forwards == -(-rows // batch_size)
        for part in ("values", "bias", "output", "jacobian"):
            torch.testing.assert_close(getattr(again, part), getattr(first, part), rtol=1e-12, atol=1e-12)
        assert again.slope_error == first.slope_error
        assert (again.notes, again.verification.relative_error < 1e-12) == ((), True)


def test_slopes_of_a_verified_model_are_compared_in_some_calls_and_always_where_asked():
    model = Counted()
    contributions(model, X)
    Doubles.wrong = True
    try:
        with pytest.warns(JacopsWarning, match="and the Jacobian differ"):
            contributions(model, X, checks="always")
        said = 0
        for _ in range(16):
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                contributions(model, X)
            texts = [str(one.message) for one in warned]
            assert all("output and features + bias differ" in text for text in texts)  # in every call
            assert texts
            said += any("the output's changes and the Jacobian differ" in text for text in texts)
        assert said == 1
    finally:
        Doubles.wrong = False


class PartlySingle(nn.Module):
    """Double precision around a layer that computes in single precision, as norms of language models do."""

    def __init__(self, act: nn.Module, reads: bool = False) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 64), nn.Linear(64, 64), nn.Linear(64, 2)
        self.act, self.reads = act, reads

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).float()
        hidden = self.act(F.linear(hidden, self.inner.weight.float(), self.inner.bias.float()))
        return self.last(hidden.double()) * (2 if self.reads and bool((x > 1e9).any()) else 1)


def test_rounding_is_that_of_the_coarsest_part_of_the_forward():
    x = draw(4, 5, seed=3)
    found = contributions(settled(PartlySingle(nn.ReLU())), x)
    assert found.notes == ()
    assert 1e-10 < found.verification.relative_error < 1e-5
    frozen = contributions(settled(PartlySingle(nn.GELU())), x, freeze=("GELU",))
    assert [note.partition(":")[0] for note in frozen.notes] == ["frozen"]
    along = jacops.integrated_jacobian(settled(PartlySingle(nn.GELU())), x, tolerance=1e-12)
    assert along.verification.relative_error < 1e-5
    assert along.steps is not None
    assert along.steps < 200


def test_samples_that_differ_by_rounding_in_single_precision_share_sweeps():
    model, x = settled(PartlySingle(nn.ReLU(), reads=True)), draw(16, 5, seed=3)
    alone = torch.cat([model(row) for row in x.split(1)]).detach()
    assert float((model(x).detach() - alone).abs().max()) > 1e-11
    jacops.compute_jacobian(model, x)  # one at a time would be a warning


def test_constants_of_single_precision_are_no_excuse():
    table = draw(4, seed=5).float()

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * (1 + 1e-6)

    with pytest.warns(JacopsWarning, match="output and features \\+ bias differ"):
        contributions(lambda x: Off.apply(x * (2 * table).double()), X)


def test_a_result_is_not_gone_through():
    with pytest.raises(TypeError, match="not iterable"):
        list(contributions(settled(Vae(named)), X))


def test_lists_of_batches_and_loaders_of_several_inputs_are_joined():
    model = settled(Several())
    batches = [({k: v[:2] for k, v in MIXED.items() if isinstance(v, Tensor)}, torch.zeros(2)),
               ({k: v[2:] for k, v in MIXED.items() if isinstance(v, Tensor)}, torch.zeros(3))]  # fmt: skip
    found = contributions(model, batches)
    close(found.values, contributions(model, {k: v for k, v in MIXED.items() if isinstance(v, Tensor)}).values)
    with pytest.raises(InputTypeError, match="giving a ndarray in batch 1, but batches of tensors are needed"):
        contributions(classifier(), [(X, X), (X.numpy(), X.numpy())])
