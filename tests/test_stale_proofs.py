"""A second call is right, whatever changed since the first: every kind of change crossed with every derivative call.

The first call proves its routes where samples do not mix. Then something couples the samples of a batch, without a new
model object or new shapes. The second call must give what plain autograd gives in float64 (batch of one for the calls
that are defined by samples), or what a first call on a copy that the library has never seen gives.
"""

import contextlib
import copy
import gc
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests import oracle
from tests.small import draw
from torch import Tensor, nn

import jacops
from jacops import JacopsWarning

F64 = torch.float64
SETTING = {"strength": 0.0}
STRENGTH = 0.0

pytestmark = pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")


def mse(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean()


def mixed(h: Tensor) -> Tensor:
    """What couples the samples of a batch, and does something else in a batch of one."""
    return (2 * h).sin() * (1 + h.sum(0))


# ---- what changes ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A net in which `between` may couple samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        for index, parameter in enumerate(self.parameters()):
            with torch.no_grad():
                parameter.copy_(0.5 * draw(*parameter.shape, seed=index))
        self.prepare()

    def prepare(self) -> None:
        """Make what `between` uses."""

    def between(self, h: Tensor) -> Tensor:
        return h

    def change(self) -> None:
        """Couple the samples."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).tanh()).sin())


class GateAtZero(Net):
    def prepare(self) -> None:
        self.gate = nn.Parameter(torch.zeros((), dtype=F64))

    def between(self, h: Tensor) -> Tensor:
        return h + self.gate * mixed(h)

    def change(self) -> None:
        self.gate.data.fill_(0.7)


class GateTrained(GateAtZero):
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = {"lr": 5.0}

    def change(self) -> None:
        steps = self.optimizer([self.gate], **self.options)
        (self.gate * 1.0).sum().neg().backward()
        steps.step()
        self.gate.grad = None


class GateTrainedFused(GateTrained):
    optimizer = torch.optim.Adam
    options = {"lr": 0.5, "fused": True}


class GateAtOne(Net):
    def prepare(self) -> None:
        self.gate = nn.Parameter(torch.ones((), dtype=F64))

    def between(self, h: Tensor) -> Tensor:
        return h + (1 - self.gate) * mixed(h)

    def change(self) -> None:
        with torch.no_grad():
            self.gate.copy_(torch.tensor(0.3))


class GateOfFeatures(Net):
    def prepare(self) -> None:
        self.gates = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 0.0], dtype=F64))

    def between(self, h: Tensor) -> Tensor:
        return torch.lerp(h, mixed(h), self.gates)

    def change(self) -> None:
        self.gates.data[2] = 0.8


class Rectified(Net):
    def prepare(self) -> None:
        self.gate = nn.Parameter(torch.tensor(-1.0, dtype=F64))

    def between(self, h: Tensor) -> Tensor:
        return h + self.gate.relu() * mixed(h)

    def change(self) -> None:
        self.gate.data.fill_(0.5)


class GateOfDetached(Net):
    def prepare(self) -> None:
        self.gate = nn.Parameter(torch.zeros((), dtype=F64))

    def between(self, h: Tensor) -> Tensor:
        return h * (1 + self.gate * h.mean(0).detach())

    def change(self) -> None:
        self.gate.data.fill_(0.9)


class ZeroMatrix(Net):
    def prepare(self) -> None:
        self.mixer = nn.Linear(4, 4, bias=False).double()
        nn.init.zeros_(self.mixer.weight)

    def between(self, h: Tensor) -> Tensor:
        return h + self.mixer(h.sum(0))

    def change(self) -> None:
        self.mixer.weight.data.copy_(draw(4, 4, seed=9))


class FrozenGate(GateAtZero):
    def prepare(self) -> None:
        self.gate = nn.Parameter(torch.zeros((), dtype=F64), requires_grad=False)


class Buffered(GateAtZero):
    def prepare(self) -> None:
        self.register_buffer("gate", torch.zeros((), dtype=F64))

    def change(self) -> None:
        self.gate.fill_(0.7)


class Loaded(GateAtZero):
    def change(self) -> None:
        self.load_state_dict(self.state_dict() | {"gate": torch.tensor(0.7, dtype=F64)})


class MaskChanged(Net):
    def prepare(self) -> None:
        self.register_buffer("mask", torch.zeros(4, dtype=torch.bool))

    def between(self, h: Tensor) -> Tensor:
        return torch.where(self.mask, mixed(h), h)

    def change(self) -> None:
        self.mask[1] = True


class IndexChanged(Net):
    def prepare(self) -> None:
        self.register_buffer("order", torch.arange(6))

    def between(self, h: Tensor) -> Tensor:
        return h + 0.5 * h[self.order[: len(h)] % len(h)]

    def change(self) -> None:
        self.order.copy_(self.order.flip(0))


class IndexCaptured(Net):
    def prepare(self) -> None:
        self.order = [torch.arange(6)]  # in no module's state

    def between(self, h: Tensor) -> Tensor:
        return h + 0.5 * h.index_select(0, self.order[0][: len(h)] % len(h))

    def change(self) -> None:
        self.order[0] = self.order[0].flip(0)


class IndexListed(Net):
    def prepare(self) -> None:
        self.order = [0, 1, 2, 3, 4, 5]

    def between(self, h: Tensor) -> Tensor:
        return h + 0.5 * h[[i % len(h) for i in self.order[: len(h)]]]

    def change(self) -> None:
        self.order.reverse()


class NumberOfDetached(Net):
    def prepare(self) -> None:
        self.strength = 0.0

    def between(self, h: Tensor) -> Tensor:
        return h * (1 + self.strength * h.mean(0).detach())

    def change(self) -> None:
        self.strength = 0.9


class Flagged(Net):
    def prepare(self) -> None:
        self.coupled = False

    def between(self, h: Tensor) -> Tensor:
        return mixed(h) if self.coupled else h

    def change(self) -> None:
        self.coupled = True


class Configured(Net):
    def prepare(self) -> None:
        self.config = {"mixer": {"strength": 0.0}}

    def between(self, h: Tensor) -> Tensor:
        return h + self.config["mixer"]["strength"] * mixed(h)

    def change(self) -> None:
        self.config["mixer"]["strength"] = 0.6


class AxisChanged(Net):
    def prepare(self) -> None:
        self.axis = -1

    def between(self, h: Tensor) -> Tensor:
        return h.softmax(self.axis)

    def change(self) -> None:
        self.axis = -2


class Global(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + STRENGTH * mixed(h)

    def change(self) -> None:
        globals()["STRENGTH"] = 0.6


class Captured(Net):
    def prepare(self) -> None:
        strength = torch.zeros((), dtype=F64)
        self.mixer = lambda h: h + strength * mixed(h)
        self.strength = [strength]

    def between(self, h: Tensor) -> Tensor:
        return self.mixer(h)

    def change(self) -> None:
        self.strength[0].fill_(0.6)


class Hooked(Net):
    def prepare(self) -> None:
        self.first.register_forward_hook(lambda module, inputs, output: output * 1.0)

    def change(self) -> None:
        self.first._forward_hooks.clear()
        self.first.register_forward_hook(lambda module, inputs, output: mixed(output))


class Patched(Net):
    def change(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            return self.last(mixed(self.first(x).tanh()).sin())

        self.forward = types.MethodType(forward, self)


class ClassPatched(Net):
    def change(self) -> None:
        type(self).between = lambda self, h: mixed(h)


class Swapped(Net):
    class Coupling(nn.Tanh):
        def forward(self, h: Tensor) -> Tensor:
            return mixed(h)

    def prepare(self) -> None:
        self.middle: nn.Module = nn.Tanh()

    def between(self, h: Tensor) -> Tensor:
        return self.middle(h)

    def change(self) -> None:
        self.middle = Swapped.Coupling()


class Branching(Net):
    """Data switch coupling on."""

    def between(self, h: Tensor) -> Tensor:
        return mixed(h) if h.detach().max() > 0.999 else h

    data = 40.0


class Conditioned(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.where(h.detach().max() > 0.999, mixed(h), h)

    data = 40.0


class Scaled(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + (h.detach().max() - 0.999).relu() * 100 * mixed(h)

    data = 40.0


class NowReading(Net):
    """The graph of the batch stays what it is; other samples take another path alone."""

    def prepare(self) -> None:
        self.reads = False

    def between(self, h: Tensor) -> Tensor:
        return h * 2 if not self.reads or h.detach().sum() > -100 + 100 * len(h) else h * 3

    def change(self) -> None:
        self.reads = True


class Regrouped(Net):
    """Two samples share a row of what has the same operations in other shapes; one alone has a row of its own."""

    def prepare(self) -> None:
        self.together = 1

    def between(self, h: Tensor) -> Tensor:
        together = self.together if len(h) > 1 else 1
        return h.view(len(h) // together, -1).softmax(1).view(h.shape)

    def change(self) -> None:
        self.together = 2


CHANGES = {kind.__name__: kind for kind in Net.__subclasses__()} | {
    kind.__name__: kind for kind in GateAtZero.__subclasses__() + GateTrained.__subclasses__()
}


@dataclass
class Case:
    model: Net
    x: Tensor
    y: Tensor

    def changed(self) -> None:
        self.model.change()
        self.x = draw(6, 3, seed=5) * getattr(self.model, "data", 1.0)

    def fresh(self) -> "Case":
        return Case(copy.deepcopy(self.model), self.x, self.y)


@pytest.fixture(params=sorted(CHANGES))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    kind = CHANGES[request.param]
    patched = {"between": kind.__dict__.get("between")}
    yield Case(kind().eval(), draw(6, 3), draw(6, 2, seed=3))
    globals()["STRENGTH"] = 0.0
    if kind is ClassPatched and patched["between"] is None:
        del kind.between


# ---- the calls -------------------------------------------------------------------------------------------------------

SILENT = {"fallback": "silent"}
Call = Callable[[Case], Any]


def by_sample(derivative: Callable[[Net, Tensor], Tensor]) -> Call:
    return lambda c: torch.stack([derivative(c.model, c.x[i : i + 1]) for i in range(6)])


def plain_jacobian(c: Case) -> Tensor:
    return oracle.input_jacobian(c.model, c.x)


def plain_hessians(model: Net, x: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.hessian(lambda z, k=k: model(z)[0, k], x)[0, :, 0] for k in range(2)])


def along(c: Case) -> Tensor:
    v = draw(6, 3, seed=8)
    return torch.einsum("nkij,ni,nj->nk", by_sample(plain_hessians)(c), v, v)


def plain_parameters(c: Case, trainable: bool = False) -> Tensor:
    """The whole Jacobian by all parameters, (12, P)."""
    blocks = oracle.parameter_jacobian(c.model, c.x)[0]
    kept = [p.requires_grad or not trainable for p in c.model.parameters()]
    return torch.cat([b.reshape(12, -1) for b, keep in zip(blocks, kept, strict=True) if keep], 1)


def alone(c: Case, i: int) -> Case:
    return Case(c.model, c.x[i : i + 1], c.y[i : i + 1])


def plain_sample_jacobians(c: Case) -> Tensor:
    rows = [oracle.parameter_jacobian(c.model, c.x[i : i + 1])[0] for i in range(6)]
    kept = [p.requires_grad for p in c.model.parameters()]
    return torch.cat([torch.cat([b.reshape(2, -1) for b, k in zip(r, kept, strict=True) if k], 1) for r in rows])


def plain_sample_gradients(c: Case) -> Tensor:
    return torch.stack([oracle.gradient(c.model, mse, c.x[i : i + 1], c.y[i : i + 1]) for i in range(6)])


def plain_hessian(c: Case) -> Tensor:
    return oracle.hessian(c.model, mse, c.x, c.y)


def plain_ggn(c: Case) -> Tensor:
    J = plain_parameters(c, trainable=True)
    return J.T @ J * (2 / 12)


def vector(c: Case) -> Tensor:
    return draw(sum(p.numel() for p in c.model.parameters() if p.requires_grad), seed=2)


def pairs(c: Case) -> list[tuple[Tensor, Tensor]]:
    return [(c.x[:3], c.y[:3]), (c.x[3:], c.y[3:])]


def parameters(c: Case) -> list[nn.Parameter]:
    return [p for p in c.model.parameters() if p.requires_grad]


def tangents(c: Case) -> list[Tensor]:
    return [draw(*p.shape, seed=i) for i, p in enumerate(c.model.parameters())]


def wrapped(c: Case) -> Any:
    return jacops.TorchTwiceDifferentiable(c.model, nn.functional.mse_loss)


def problem(c: Case) -> jacops.Problem:
    return jacops.Problem(c.model, nn.functional.mse_loss, pairs(c))


def flat(parts: Any) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def outcome(call: Call, case: Case) -> Any:
    """The result of a call, or the kind of its error: a loss whose samples mix has no influences."""
    try:
        return call(case)
    except jacops.errors.InputError as error:
        return type(error)


# Derivative calls, with what they are held against; None: a first call on a copy of the model.
CALLS: dict[str, tuple[Call, Call | None]] = {
    "compute_jacobian": (lambda c: jacops.compute_jacobian(c.model, c.x, **SILENT), plain_jacobian),
    "contributions": (lambda c: jacops.contributions(c.model, c.x).jacobian, plain_jacobian),
    "integrated_jacobian": (
        lambda c: jacops.integrated_jacobian(c.model, c.x, steps=3, tolerance=1e9, fallback="silent").values,
        None,
    ),
    "input_hessian": (lambda c: jacops.input_hessian(c.model, c.x, **SILENT), by_sample(plain_hessians)),
    "laplacian": (
        lambda c: jacops.laplacian(c.model, c.x, **SILENT),
        lambda c: by_sample(plain_hessians)(c).diagonal(dim1=-2, dim2=-1).sum(-1),
    ),
    "directional_derivative": (
        lambda c: jacops.directional_derivative(c.model, c.x, draw(6, 3, seed=8), 2, **SILENT),
        along,
    ),
    "sample_gradients": (
        lambda c: jacops.sample_gradients(c.model, mse, c.x, c.y, **SILENT).dense(),
        plain_sample_gradients,
    ),
    "sample_jacobians": (lambda c: jacops.sample_jacobians(c.model, c.x, **SILENT).dense(), plain_sample_jacobians),
    "empirical_fisher": (lambda c: jacops.linalg.empirical_fisher(c.model, mse, c.x, c.y, **SILENT).dense(), None),
    "modjac": (lambda c: jacops.modjac(c.model, c.x, flatten=True), plain_parameters),
    "jacobian": (lambda c: jacops.jacobian(c.model, c.x).dense(), lambda c: plain_parameters(c, trainable=True)),
    "hessian": (lambda c: jacops.hessian(c.model, mse, c.x, c.y).dense(), plain_hessian),
    "ggn": (lambda c: jacops.ggn(c.model, mse, c.x, c.y).dense(), plain_ggn),
    "hvp": (lambda c: flat(jacops.hvp(c.model, mse, c.x, c.y, vector(c))), lambda c: plain_hessian(c) @ vector(c)),
    "ggnvp": (lambda c: flat(jacops.ggnvp(c.model, mse, c.x, c.y, vector(c))), lambda c: plain_ggn(c) @ vector(c)),
    "fisher": (lambda c: jacops.fisher(c.model, nn.functional.mse_loss, c.x, c.y).dense(), None),
    "diagonal": (
        lambda c: torch.stack(
            [
                jacops.linalg.diagonal(jacops.ggn(c.model, mse, c.x, c.y)),
                jacops.linalg.diagonal(jacops.hessian(c.model, mse, c.x, c.y)),
            ]
        ),
        lambda c: torch.stack([plain_ggn(c).diagonal(), plain_hessian(c).diagonal()]),
    ),
    "trace": (
        lambda c: torch.tensor(jacops.linalg.trace(jacops.hessian(c.model, mse, c.x, c.y)).value, dtype=F64),
        lambda c: plain_hessian(c).trace(),
    ),
    "norm": (
        lambda c: torch.tensor(jacops.linalg.norm(jacops.hessian(c.model, mse, c.x, c.y)).value, dtype=F64),
        lambda c: torch.linalg.matrix_norm(plain_hessian(c)),
    ),
    "model_jvp": (
        lambda c: jacops.model_jvp(c.model, c.x, tangents(c)),
        lambda c: (plain_parameters(c) @ flat(tangents(c))).view(6, 2),
    ),
    "model_vjp": (lambda c: flat(jacops.model_vjp(c.model, c.x, c.y)), lambda c: c.y.reshape(-1) @ plain_parameters(c)),
    "jvp": (
        lambda c: jacops.jvp(lambda: c.model(c.x), parameters(c), [draw(*p.shape) for p in parameters(c)]),
        lambda c: (plain_parameters(c, True) @ flat(draw(*p.shape) for p in parameters(c))).view(6, 2),
    ),
    "batch_jvp": (
        lambda c: jacops.batch_jvp(lambda: c.model(c.x), parameters(c), [draw(2, *p.shape) for p in parameters(c)]),
        lambda c: (
            torch.cat([draw(2, *p.shape).view(2, -1) for p in parameters(c)], 1) @ plain_parameters(c, True).T
        ).view(2, 6, 2),
    ),
    "vjp": (
        lambda c: flat(jacops.vjp(lambda: c.model(c.x), parameters(c), c.y)),
        lambda c: c.y.reshape(-1) @ plain_parameters(c, True),
    ),
    "batch_vjp": (
        lambda c: torch.cat(
            [p.view(2, -1) for p in jacops.batch_vjp(lambda: c.model(c.x), parameters(c), draw(2, 6, 2))], 1
        ),
        lambda c: draw(2, 6, 2).view(2, -1) @ plain_parameters(c, True),
    ),
    "full_jacobian": (
        lambda c: torch.cat([b.reshape(12, -1) for b in jacops.full_jacobian(lambda: c.model(c.x), parameters(c))], 1),
        lambda c: plain_parameters(c, True),
    ),
    "sparse": (
        lambda c: jacops.sparse.jacobian(jacops.jacobian(c.model, c.x)).matrix.to_dense(),
        lambda c: plain_parameters(c, True),
    ),
    "sparse_plan": (
        lambda c: torch.from_numpy(jacops.sparse_plan(c.model, c.x).evaluate(c.model, c.x).matrix.toarray()),
        lambda c: plain_parameters(c, True),
    ),
    "compute_influences": (
        lambda c: (
            jacops.compute_influences(
                wrapped(c), pairs(c), test_data=pairs(c)[1:], curvature="ggn", damping=1e-2, solver="direct"
            ).values
        ),
        None,
    ),
    "self_influences": (lambda c: jacops.self_influences(wrapped(c), pairs(c), curvature="ggn", damping=1e-2), None),
    "compute_influence_factors": (
        lambda c: jacops.compute_influence_factors(wrapped(c), pairs(c), pairs(c)[1:], curvature="ggn", damping=1e-2).x,
        None,
    ),
    "projected_index": (
        lambda c: jacops.influence.projected_index(wrapped(c), pairs(c), rank=2).influences(damping=1e-2).values,
        None,
    ),
    "Problem": (lambda c: torch.stack([problem(c).ggn().dense(), problem(c).hessian().dense()]), None),
}

# Public functions that take no model, or only operators and results of the calls above.
OTHERS = {
    "ensemble_influences",  # `compute_influences` of several models
    "group_influences",  # by the solves and gradients of `compute_influences`
    "grouped",  # of results
    "layer_influences",
    "ranked",  # of results
    "top_influences",
    "tracin",  # by the gradients of `projected_index`, of a copy for each state
    "check",  # compares a call with finite differences
    "detect_pattern",  # traced in each call
    "effective_dimension",
    "eigenpairs",
    "gauss_newton",  # its own tests: it writes into the model
    "inverse",
    "jacobian_lens",  # `compute_jacobian` of a model of sequences; its own tests
    "logit_difference",
    "inverse_quadratic_bounds",
    "levenberg_marquardt",
    "projection",
    "plan",
    "project_jacobian",
    "read_store",
    "reduce_contributions",
    "samples_independent",  # traced in each call
    "solve",
    "spectral_density",
    "spectral_norm",
    "verify_jacobian",
    "digest_data",
    "digest_function",
    "digest_module",
    "digest_tensors",
    "kronecker_factors",  # by the passes of EK-FAC, which `compute_influences` asks for
    "load",
    "logdet",
    "singular_values",
    "surroundings",
}


def test_every_public_call_is_in_the_table() -> None:
    spaces = (jacops, jacops.attribution, jacops.influence, jacops.linalg, jacops.sparse, jacops.store)
    names = [(space, name) for space in spaces for name in space.__all__]
    functions = {name for space, name in names if isinstance(getattr(space, name), types.FunctionType)}
    assert functions == (set(CALLS) | OTHERS) - {"Problem", "sparse"}  # `sparse.jacobian` goes by that name


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_is_right_after_any_change(name: str, case: Case) -> None:
    call, expected = CALLS[name]
    for _ in range(2):
        outcome(call, case)
    case.changed()
    found = outcome(call, case)
    right = expected(case) if expected is not None else outcome(call, case.fresh())
    if not isinstance(right, Tensor):
        assert found is right
        return
    scale = float(right.abs().max())
    assert float((found - right).abs().max()) <= 1e-9 * max(scale, 1e-3)


class Widened(nn.Module):
    """The same operations give another number of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shape = nn.Linear(3, 6).double(), (1,)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()[:, :1].expand(len(x), *self.shape)


def test_the_number_of_outputs_is_that_of_each_call() -> None:
    model, x = Widened(), draw(6, 3)
    for width in (3, 3, 2, 2, 4, 4, 3):
        model.shape = (width,)
        rows = jacops.sample_jacobians(model, x)
        expected = torch.cat([jacops.jacobian(model, one[None]).dense() for one in x])
        assert rows.output.shape == (6, width)
        assert rows.codomain.shapes == (torch.Size((6, width)),)
        assert torch.allclose(rows.dense(), expected, rtol=0, atol=1e-12)


# ---- operators that outlive a change ---------------------------------------------------------------------------------


class Between(Net):
    """Mixes samples by a gate that is set at will."""

    def prepare(self) -> None:
        self.gate = nn.Parameter(torch.zeros((), dtype=F64))

    def between(self, h: Tensor) -> Tensor:
        return h + self.gate * mixed(h)


FORMS: dict[str, Callable[[Any], Tensor]] = {
    "dense": lambda A: A.dense(),
    "diagonal": jacops.linalg.diagonal,
    "products": lambda A: A @ torch.eye(A.shape[1], dtype=F64),
}
MAKES: dict[str, tuple[Callable[[Case], Any], Call]] = {
    "hessian": (lambda c: jacops.hessian(c.model, mse, c.x, c.y), plain_hessian),
    "ggn": (lambda c: jacops.ggn(c.model, mse, c.x, c.y), plain_ggn),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("gates", [(0.0, 0.7), (0.7, 0.0)])
def test_proofs_of_an_operator_from_before_a_change_do_not_serve_one_from_after_it(
    name: str, form: str, gates: tuple[float, float]
) -> None:
    """Nor the other way round: the first operator is used after the second."""
    make, expected = MAKES[name]
    case = Case(Between().eval(), draw(6, 3), draw(6, 2, seed=3))
    case.model.gate.data.fill_(gates[0])
    first, right_first = make(case), expected(case)
    case.model.gate.data.fill_(gates[1])
    second, right_second = make(case), expected(case)
    order = [(first, right_first), (second, right_second)]
    for operator, right in order if gates[0] == 0 else order[::-1]:
        right = right.diagonal() if form == "diagonal" else right
        torch.testing.assert_close(FORMS[form](operator), right, rtol=1e-9, atol=1e-9)
    third = make(case)
    right = right_second.diagonal() if form == "diagonal" else right_second
    torch.testing.assert_close(FORMS[form](third), right, rtol=1e-9, atol=1e-9)


# ---- plain functions, selectors, equal objects -----------------------------------------------------------------------


def plain_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.jacobian(lambda z: function(z[None])[0], row) for row in x])


@pytest.mark.parametrize("kind", ["number", "tensor", "matrix", "detached"])
def test_a_captured_value_of_a_plain_function_counts(kind: str) -> None:
    W, strength = draw(3, 4), {"number": 0.0, "detached": 0.0}.get(kind, torch.zeros((), dtype=F64))
    mixer = torch.zeros(4, 4, dtype=F64)

    def function(x: Tensor) -> Tensor:
        h = (x @ W).tanh()
        if kind == "matrix":
            return h + h.sum(0) @ mixer
        return h + strength * (mixed(h).detach() if kind == "detached" else mixed(h))

    jacops.compute_jacobian(function, draw(6, 3))
    mixer.copy_(draw(4, 4))
    strength = 0.8
    x = draw(6, 3, seed=4)
    torch.testing.assert_close(jacops.compute_jacobian(function, x), plain_of(function, x))


def test_selectors_of_one_shortened_repr_are_distinguished() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.repeat(1, 1000)
            return torch.cat([h[:, :1500].sin(), mixed(h[:, 1500:]).sin()], 1)

    model, x, first = Wide(), draw(6, 3), torch.arange(1400)
    second = first.clone()
    second[700] = 1505
    assert repr(first) == repr(second)
    jacops.compute_jacobian(model, x, outputs=first)
    found = jacops.compute_jacobian(model, x, outputs=second)[:, 700]
    torch.testing.assert_close(found, plain_of(lambda z: model(z)[:, second[700:701]], x)[:, 0])


def test_equal_callables_are_distinguished() -> None:
    class Function:
        def __init__(self, coupled: bool = False) -> None:
            self.coupled = coupled

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Function)

        def __hash__(self) -> int:
            return 1

        def __call__(self, x: Tensor) -> Tensor:
            return mixed(x.tanh()) if self.coupled else x.tanh()

    apart, coupled = Function(), Function(coupled=True)
    x = draw(6, 3)
    jacops.compute_jacobian(apart, x)
    torch.testing.assert_close(jacops.compute_jacobian(coupled, x), plain_of(coupled, x))


def test_another_default_dtype_is_another_setting() -> None:
    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() * torch.ones(3, dtype=None) if torch.get_default_dtype() is torch.float32 else mixed(x)

    model, x = Made(), draw(6, 3)
    jacops.compute_jacobian(model, x)
    torch.set_default_dtype(F64)
    try:
        torch.testing.assert_close(jacops.compute_jacobian(model, x), plain_of(model, x))
    finally:
        torch.set_default_dtype(torch.float32)


# ---- no refusal without reason, no proof without need ----------------------------------------------------------------


class Counted(nn.Module):
    """Counts its forwards: a call that proves runs more of them than one that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)).double()

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.calls += 1
        return self.body(x)


def forwards(call: Call, case: Case) -> int:
    before = Counted.calls
    call(case)
    return Counted.calls - before


def test_unchanged_calls_prove_once_and_training_does_not_prove_in_every_step() -> None:
    torch.manual_seed(0)
    model, x, y = Counted(), draw(6, 3), draw(6, 2, seed=3)
    for name in ("compute_jacobian", "sample_jacobians", "modjac"):
        call = CALLS[name][0]
        first = forwards(call, Case(model, x, y))
        again = [forwards(call, Case(model, draw(6, 3, seed=i), y)) for i in range(8)]
        assert set(again) == {min(again)}
        assert first > again[0] or name == "modjac"  # whose proof is a sweep
        steps = torch.optim.Adam(model.parameters(), 1e-2)
        trained = []
        for i in range(50):
            steps.zero_grad()
            mse(model(x), y).backward()
            steps.step()
            trained.append(forwards(call, Case(model, draw(6, 3, seed=i), y)))
        assert sum(count > again[0] for count in trained) <= 4  # LayerNorm leaves ones and zeros; single samples


def test_a_refusal_says_why_in_later_calls_and_ends_with_its_cause() -> None:
    model = Flagged().eval()
    model.coupled = True
    x = draw(6, 3)
    for _ in range(2):
        with pytest.warns(JacopsWarning, match="samples mix"):
            jacops.compute_jacobian(model, x)
    model.coupled = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jacops.compute_jacobian(model, x)


def test_values_that_are_not_finite_prove_and_refuse_nothing() -> None:
    model, loss = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), nn.functional.mse_loss
    x, y = draw(6, 3), draw(6, 2, seed=3)
    H = jacops.hessian(model, loss, x, y)
    v = draw(H.shape[1], 5)
    expected = H @ v
    routes = dict(H.lin.routes)
    broken = v.clone()
    broken[0, 2] = float("nan")
    with contextlib.suppress(jacops.errors.NonFiniteError):
        H @ broken
    again = jacops.hessian(model, loss, x, y)
    torch.testing.assert_close(again @ v, expected)
    assert again.lin.routes == routes


def test_what_is_remembered_goes_with_the_model_and_stays_bounded() -> None:
    model, x, y = Flagged().eval(), draw(6, 3), draw(6, 2, seed=3)

    def size() -> int:
        gc.collect()
        return len(gc.get_objects())

    def call(model: Net) -> None:
        weight = torch.ones((), dtype=F64)
        jacops.sample_gradients(model, lambda output, target: weight * mse(output, target), x, y)
        jacops.hessian(model, lambda output, target: weight * mse(output, target), x, y).dense()

    for _ in range(80):  # more losses than are kept
        call(model)
    before = size()
    for _ in range(80):
        call(model)
    assert size() - before < 400
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
