"""Right values or typed errors for recordings that once gave zeros, NaN or raw errors."""

import collections
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import jacops
from jacops.errors import NonFiniteError, NotDifferentiableError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# ---- reentrant checkpoints in closures -------------------------------------------------------------------------------


def reentrant(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True)


class TwoLayers(nn.Module):
    """Two layers, the first one under a reentrant checkpoint."""

    def __init__(self, first: nn.Module, last: nn.Module):
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(reentrant(self.first, x)))


def layers() -> tuple[nn.Linear, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), torch.randn(5, 3).double()


def losing_closures() -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Closures through checkpoints none of whose arguments requires grad, and the parameters that are asked for."""
    first, last, x = layers()
    params = [*first.parameters(), *last.parameters()]
    model, doubled = TwoLayers(first, last), first.weight * 2
    return {
        "a function": (lambda: last(torch.tanh(reentrant(first, x))), params),
        "a module": (lambda: model(x), params),
        "inside a reentrant one": (lambda: reentrant(model, x), params),
        "inside one that is not reentrant": (lambda: checkpoint(model, x, use_reentrant=False), params),
        "several": (lambda: last(torch.tanh(reentrant(first, reentrant(torch.sin, x)))), params),
        "a tensor computed before the call": (lambda: reentrant(lambda z: z @ doubled.T, x), params),
        "an operation in place": (
            lambda: last(reentrant(lambda z: torch.zeros(5, 4).double().addmm_(z, first.weight.T), x)),
            params,
        ),
        "some of the parameters": (lambda: reentrant(lambda z: z @ first.weight.T, x) + first.bias, params),
        "no argument at all": (lambda: last(reentrant(lambda: x @ first.weight.T)), params),
    }


def products(params: list[Tensor]) -> dict[str, Callable[[Callable[[], Tensor]], Any]]:
    ones = [torch.ones_like(p) for p in params]
    return {
        "full_jacobian": lambda f: jacops.full_jacobian(f, params),
        "jvp": lambda f: jacops.jvp(f, params, ones),
        "batch_jvp": lambda f: jacops.batch_jvp(f, params, [o.unsqueeze(0) for o in ones]),
        "vjp": lambda f: jacops.vjp(f, params, torch.ones_like(f())),
        "batch_vjp": lambda f: jacops.batch_vjp(f, params, torch.ones_like(f()).unsqueeze(0)),
    }


@pytest.mark.parametrize("name", losing_closures())
@pytest.mark.parametrize("call", products([]))
def test_a_closure_through_a_reentrant_checkpoint_is_refused(name: str, call: str) -> None:
    function, params = losing_closures()[name]
    with pytest.raises(NotDifferentiableError, match=rf"{call}.*use_reentrant=False"):
        products(params)[call](function)


@pytest.mark.parametrize("call", products([]))
def test_a_checkpoint_that_uses_none_of_the_parameters_is_no_reason_to_refuse(call: str) -> None:
    first, last, x = layers()
    params = list(last.parameters())
    plain = products(params)[call](lambda: last(torch.tanh(first(x))))
    found = products(params)[call](lambda: last(torch.tanh(reentrant(first, x))))
    torch.testing.assert_close(found, plain)


def test_a_model_whose_checkpoint_takes_integers_is_refused() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.last = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(reentrant(self.embedding, x))

    model, x = Words().double(), torch.tensor([0, 1, 3])
    for call in (
        lambda: jacops.modjac(model, x),
        lambda: jacops.jacobian(model, x).dense(),
        lambda: jacops.sample_gradients(model, lambda output, y: output.sum(), x, torch.zeros(3)).dense(),
    ):
        with pytest.raises(NotDifferentiableError, match="use_reentrant=False"):
            call()


def test_a_model_through_a_reentrant_checkpoint_stays_right() -> None:
    first, last, x = layers()
    plain = jacops.modjac(nn.Sequential(first, nn.Tanh(), last), x, flatten=True)
    torch.testing.assert_close(jacops.modjac(TwoLayers(first, last), x, flatten=True), plain)


# ---- NaN and Inf ----------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch(broken: str | None = None, value: float = torch.nan) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (3, 2))
    if broken is not None:
        {"x": x, "y": y}[broken][3, 1] = value
    return x, y


mse = nn.functional.mse_loss


def operators(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> dict[str, Callable[[], Any]]:
    return {
        "hessian": lambda: jacops.hessian(model, mse, x, y, **options),
        "ggn": lambda: jacops.ggn(model, mse, x, y, **options),
        "fisher": lambda: jacops.fisher(model, nn.MSELoss(), x, y, **options),
        "empirical_fisher": lambda: jacops.linalg.empirical_fisher(model, mse, x, y, **options),
        "sample_gradients": lambda: jacops.sample_gradients(model, mse, x, y, **options),
        "sample_jacobians": lambda: jacops.sample_jacobians(model, x, **options),
        "jacobian": lambda: jacops.jacobian(model, x, **options),
    }


def uses(make: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """What can be asked of an operator."""

    def ones(axis: int, *more: int) -> Tensor:
        return torch.ones(make().shape[axis], *more).double()

    return {
        "A @ v": lambda: make() @ ones(1),
        "A @ V": lambda: make() @ ones(1, 2),
        "A.T @ u": lambda: make().T @ ones(0),
        "(2 * A) @ v": lambda: (2.0 * make()) @ ones(1),
        "(A + A) @ v": lambda: (make() + make()) @ ones(1),
        "(A.T @ A) @ v": lambda: (make().T @ make()) @ ones(1),
        "A @ tree": lambda: make() @ list(make().domain.unflatten(ones(1))),
        "dense": lambda: make().dense(),
        "A.T.dense": lambda: make().T.dense(),
        "gram": lambda: make().gram(),
        "trace": lambda: jacops.linalg.trace(make().T @ make()),
        "trace with probes": lambda: jacops.linalg.trace(make().T @ make(), probes=3),
        "norm": lambda: jacops.linalg.norm(make()),
        "spectral_norm": lambda: jacops.linalg.spectral_norm(make()),
        "diagonal": lambda: jacops.linalg.diagonal(make().T @ make()),
    }


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
@pytest.mark.parametrize("name", operators(nn.Identity(), *batch()))
@pytest.mark.parametrize("use", uses(lambda: None))
def test_nan_in_the_data_is_named_by_row(name: str, use: str) -> None:
    model, (x, y) = net(), batch("x")
    with pytest.raises(NonFiniteError, match=r"holds nan in row 3"):
        uses(operators(model, x, y)[name])[use]()


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
@pytest.mark.parametrize("name", ["hessian", "ggn", "sample_gradients", "empirical_fisher"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_or_inf_in_the_targets_is_named_by_row(name: str, value: float) -> None:
    x, y = batch("y", value)
    with pytest.raises(NonFiniteError, match=rf"{name}.*y holds {value} in row 3"):
        uses(operators(net(), x, y)[name])["A.T @ u"]()


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
@pytest.mark.parametrize("name", operators(nn.Identity(), *batch()))
def test_the_check_can_be_turned_off(name: str) -> None:
    model, (x, y) = net(), batch("x")
    make = operators(model, x, y, check_finite=False)[name]
    for result in (make() @ torch.ones(26).double(), (2.0 * make()).dense(), make().T.dense()):
        assert result.isnan().any()
    assert operators(model, x, y)["jacobian"]().dense(check_finite=False).isnan().any()


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_overflows_is_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    x = torch.ones(5, 3, dtype=dtype) * torch.finfo(dtype).max ** 0.6
    y, v = torch.zeros(5, 2, dtype=dtype), torch.ones(26, dtype=dtype)
    for call in (
        lambda: jacops.hessian(model, mse, x, y) @ v,
        lambda: jacops.ggn(model, mse, x, y).dense(),
        lambda: jacops.hvp(model, mse, x, y, v),
        lambda: jacops.ggnvp(model, mse, x, y, v),
        lambda: jacops.sample_gradients(model, mse, x, y).norms(),
        lambda: jacops.sample_jacobians(model, x).gram(),
        lambda: jacops.sample_jacobians(model, x).column_squares(),
    ):
        with pytest.raises(NonFiniteError):
            call()


def test_nan_of_a_backward_is_refused_though_the_data_are_finite() -> None:
    """The double backward of a norm at zero is NaN in torch."""

    class Radial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(3).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(-(torch.linalg.norm(self.p) ** 2)) * x

    def total(output: Tensor, y: Any) -> Tensor:
        return output.sum()

    one, v = torch.ones(1).double(), torch.ones(3).double()
    for call in (
        lambda: jacops.hessian(Radial(), total, one, None) @ v,
        lambda: jacops.hessian(Radial(), total, one, None).dense(),
        lambda: jacops.hvp(Radial(), total, one, None, v),
        lambda: jacops.linalg.diagonal(jacops.hessian(Radial(), total, one, None)),
        lambda: jacops.linalg.eigenpairs(jacops.hessian(Radial(), total, one, None), 1),
    ):
        with pytest.raises(NonFiniteError):
            call()


@pytest.mark.parametrize("broken", ["x", "y"])
def test_a_problem_names_batch_and_row(broken: str) -> None:
    problem = jacops.Problem(net(), nn.MSELoss(), [batch(), batch(), batch(broken)])
    v = torch.ones(26).double()
    for call in (
        problem.value,
        problem.gradient,
        lambda: problem.hessian() @ v,
        lambda: problem.hessian().dense(),
        lambda: problem.ggn() @ v,
        lambda: problem.sample_gradients() @ v,
        lambda: jacops.linalg.diagonal(problem.ggn()),
    ):
        with pytest.raises(NonFiniteError, match=rf"batch 2: .*{broken} holds nan in row 3"):
            call()
    with pytest.raises(NonFiniteError, match=rf"batch 0: .*{broken} holds nan in row 3"):
        jacops.Problem(net(), nn.MSELoss(), [batch(broken)]).gradient()


def test_plain_matrices_and_contributions_are_checked_too() -> None:
    broken = jacops.linalg.Matrix(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
    large = jacops.linalg.Diagonal(torch.tensor([1e38, 1.0]))
    jacobian = torch.full((2, 3, 4), torch.nan)
    for call in (
        lambda: broken @ torch.ones(2),
        broken.dense,
        broken.gram,
        lambda: (broken + large).dense(),
        lambda: (large @ large).dense(),
        lambda: (10 * large) @ torch.tensor([10.0, 1.0]),
        lambda: jacops.project_jacobian(jacobian, torch.ones(4, 2)),
        lambda: jacops.reduce_contributions(jacobian),
        lambda: jacops.reduce_contributions(jacobian.numpy(), "max"),
    ):
        with pytest.raises(NonFiniteError):
            call()
    assert jacops.reduce_contributions(jacobian, check_finite=False).shape == (2, 4)


# ---- traced, exported and scripted modules --------------------------------------------------------------------------


class Convolutional(nn.Module):
    """A buffer, batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.dropout = nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Dropout(0.3)
        self.last = nn.Linear(4, 2)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.convolution(x.unsqueeze(1))))
        return self.last(self.dropout(hidden).flatten(1)) * self.scale


def model_calls(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    columns = sum(p.numel() for p in model.parameters())
    return {
        "compute_jacobian": lambda: jacops.compute_jacobian(model, x),
        "jacobian": lambda: jacops.jacobian(model, x) @ torch.ones(columns).double(),
        "modjac": lambda: jacops.modjac(model, x, flatten=True),
        "contributions": lambda: jacops.contributions(model, x).output,
        "hessian": lambda: jacops.hessian(model, mse, x, y).dense(),
        "ggn": lambda: jacops.ggn(model, mse, x, y).dense(),
        "sample_gradients": lambda: jacops.sample_gradients(model, mse, x, y).dense(),
        "input_hessian": lambda: jacops.input_hessian(model, x),
        "model_jvp": lambda: jacops.model_jvp(model, x, [torch.ones_like(p) for p in model.parameters()]),
        "full_jacobian": lambda: jacops.full_jacobian(lambda: model(x), list(model.parameters())),
    }


def converted(kind: str, model: nn.Module, x: Tensor) -> nn.Module:
    if kind == "fx":
        return torch.fx.symbolic_trace(model)
    if kind == "fx in a module":
        return nn.Sequential(torch.fx.symbolic_trace(model))
    if kind == "a copy of fx":
        return copy.deepcopy(torch.fx.symbolic_trace(model))
    if kind == "export":
        free = ({0: torch.export.Dim.DYNAMIC},)
        return torch.export.export(model, (x,), dynamic_shapes=free).module()
    return torch.jit.trace(model, (x,)) if kind == "trace" else torch.jit.script(model)


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["fx", "fx in a module", "a copy of fx", "export", "trace", "script"])
@pytest.mark.parametrize("make", [net, Convolutional])
def test_a_converted_module_gives_what_the_module_gives(kind: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, (x, y) = make().double().eval(), batch()
    given = converted(kind, model, x)
    for call, plain in model_calls(model, x, y).items():
        torch.testing.assert_close(model_calls(given, x, y)[call](), plain(), msg=lambda text, call=call: call + text)


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_module_exported_for_one_batch_size_is_refused_by_samples_and_right_as_a_whole() -> None:
    model, (x, y) = net(), batch()
    program = torch.export.export(model, (x,))
    for given in (program.module(), torch.export.unflatten(program)):
        for call, plain in model_calls(model, x, y).items():
            if call in ("compute_jacobian", "contributions", "sample_gradients", "input_hessian"):
                with pytest.raises(jacops.errors.ModelStateError, match="dynamic_shapes"):
                    model_calls(given, x, y)[call]()
            else:
                torch.testing.assert_close(model_calls(given, x, y)[call](), plain())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_frozen_script_module_has_an_input_jacobian() -> None:
    model, (x, _) = net().eval(), batch()
    plain = jacops.compute_jacobian(model, x)
    torch.testing.assert_close(jacops.compute_jacobian(torch.jit.freeze(torch.jit.script(model)), x), plain)


# ---- parameters of three and more axes ------------------------------------------------------------------------------


class Weighted(nn.Module):
    """`function(T, x)` with one parameter T."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], value: Tensor):
        super().__init__()
        self.function, self.T = function, nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.T, x).flatten(1)


def heads(x: Tensor, many: int) -> Tensor:
    return x.unsqueeze(0).expand(many, -1, -1)


einsum = torch.einsum
WITH_AXES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "bilinear": ((2, 2, 3), lambda T, x: einsum("ni,ijk,nj->nk", x, T, x)),
    "bilinear, output first": ((3, 2, 2), lambda T, x: einsum("ni,kij,nj->nk", x, T, x)),
    "summed": ((2, 2, 3), lambda T, x: einsum("ni,ijk->nk", x, T)),
    "a diagonal": ((2, 2, 3), lambda T, x: einsum("ni,iik->nk", x, T)),
    "heads": ((3, 2, 2), lambda T, x: einsum("ni,hid->nhd", x, T)),
    "heads, inputs last": ((3, 4, 2), lambda T, x: einsum("ni,hdi->nhd", x, T)),
    "a sequence": ((2, 2, 3), lambda T, x: einsum("nti,hid->nhtd", torch.stack([x, x.sin(), x.cos()], 1), T)),
    "four axes": ((2, 2, 2, 3), lambda T, x: einsum("na,abcd,nb,nc->nd", x, T, x, x)),
    "four axes turned": ((3, 2, 2, 2), lambda T, x: einsum("na,dcba,nb->ndc", x, T, x)),
    "used twice": ((2, 2, 3), lambda T, x: einsum("nj,ijk->nk", einsum("ni,ijk->nj", x, T).tanh(), T)),
    "permuted": ((2, 3, 2), lambda T, x: einsum("ni,ijk->njk", x, T.permute(2, 0, 1))),
    "expanded": ((1, 2, 3), lambda T, x: einsum("ni,aik->nak", x, T.expand(4, -1, -1))),
    "chunks": ((3, 2, 2), lambda T, x: sum(einsum("ni,ik->nk", x, t[0]).sin() for t in T.chunk(3))),  # type: ignore[return-value]
    "unbound": ((3, 2, 2), lambda T, x: (x @ T[0]) * torch.tanh(x @ T[1]) + x @ T[2]),
    "bmm": ((3, 2, 4), lambda T, x: torch.bmm(heads(x, 3), T).transpose(0, 1)),
    "bmm transposed": ((3, 4, 2), lambda T, x: torch.bmm(heads(x, 3), T.mT).transpose(0, 1)),
    "matmul": ((2, 3, 2, 2), lambda T, x: x[:, None, None, None] @ T),
    "matmul transposed": ((3, 4, 2), lambda T, x: x[:, None, None] @ T.mT),
    "matmul from the left": ((3, 4, 2), lambda T, x: T @ x[:, None, :, None]),
    "tensordot": ((3, 2, 2), lambda T, x: torch.tensordot(x, T, dims=([1], [1]))),
    "reshaped": ((3, 2, 2), lambda T, x: x @ T.permute(1, 0, 2).reshape(2, -1)),
    "elementwise": ((3, 2, 4), lambda T, x: x[:, None, :, None] * T),
}


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("name", WITH_AXES)
def test_parameters_of_many_axes_are_right_in_every_operation(name: str, contiguous: bool) -> None:
    shape, function = WITH_AXES[name]
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    model = Weighted(function, value if contiguous else value.mT.contiguous().mT)
    x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(model(x).shape, generator=generator, dtype=torch.float64)
    grads, rows = [], []
    for i in range(3):
        output = model(x[i : i + 1])
        grads.append(torch.autograd.grad(mse(output, y[i : i + 1]), model.T, retain_graph=True)[0].flatten())
        rows += [torch.autograd.grad(o, model.T, retain_graph=True)[0].flatten() for o in output.flatten()]
    G, J = torch.stack(grads), torch.stack(rows)
    found = jacops.sample_gradients(model, mse, x, y)
    torch.testing.assert_close(found.dense(), G)
    torch.testing.assert_close(found.norms(), G.norm(dim=1))
    torch.testing.assert_close(found.gram(), G @ G.T)
    torch.testing.assert_close(found.column_squares(), G.square().sum(0))
    torch.testing.assert_close(jacops.sample_jacobians(model, x).dense(), J)
    torch.testing.assert_close(jacops.linalg.empirical_fisher(model, mse, x, y).dense(), G.T @ G / 3)
    torch.testing.assert_close(jacops.modjac(model, x, flatten=True), J)
    torch.testing.assert_close(jacops.linalg.diagonal(jacops.ggn(model, mse, x, y)), 2 * J.square().sum(0) / len(J))


# ---- fields that are None -------------------------------------------------------------------------------------------


class Returning(nn.Module):
    """A layer whose output stands in a tree."""

    def __init__(self, tree: Callable[[Tensor], Any]):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.tree = nn.Linear(3, 2).double(), tree

    def forward(self, x: Tensor) -> Any:
        return self.tree(torch.tanh(self.layer(x)))


Fields = collections.namedtuple("Fields", "logits cache")
WITH_NONE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "a tuple": (lambda o: (o, None), lambda tree: tree[0]),
    "None first": (lambda o: (None, o), lambda tree: tree[1]),
    "a list": (lambda o: [None, o, None], lambda tree: tree[1]),
    "a dict": (lambda o: {"logits": o, "cache": None}, lambda tree: tree["logits"]),
    "a named tuple": (lambda o: Fields(o, None), lambda tree: tree.logits),
    "nested": (lambda o: {"a": (None, [None]), "b": (None, {"c": o})}, lambda tree: tree["b"][1]["c"]),
}


def emptied(tree: Any) -> Any:
    """The tree with None in place of tensors, to compare shapes of trees."""
    return torch.utils._pytree.tree_map(lambda leaf: None if isinstance(leaf, Tensor) else leaf, tree)


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
@pytest.mark.parametrize("name", WITH_NONE)
def test_fields_of_an_output_that_are_none_stay_none(name: str) -> None:
    wrap, pick = WITH_NONE[name]
    model, plain, (x, y) = Returning(wrap), Returning(lambda o: o), batch()
    params, bare = list(model.parameters()), list(plain.parameters())
    ones = [torch.ones_like(p) for p in params]
    u = torch.ones(5, 2).double()

    def loss(output: Any, y: Tensor) -> Tensor:
        return mse(pick(output), y)

    for with_none, without in (
        (lambda: jacops.compute_jacobian(model, x), lambda: jacops.compute_jacobian(plain, x)),
        (lambda: jacops.input_hessian(model, x), lambda: jacops.input_hessian(plain, x)),
        (lambda: jacops.model_jvp(model, x, ones), lambda: jacops.model_jvp(plain, x, ones)),
        (lambda: jacops.jvp(lambda: model(x), params, ones), lambda: jacops.jvp(lambda: plain(x), bare, ones)),
        (
            lambda: jacops.directional_derivative(model, x, torch.ones_like(x)),
            lambda: jacops.directional_derivative(plain, x, torch.ones_like(x)),
        ),
    ):
        tree = with_none()
        assert str(emptied(tree)) == str(emptied(wrap(x)))
        torch.testing.assert_close(pick(tree), without())
    for with_none, without in (
        (lambda: pick(jacops.modjac(model, x)), lambda: jacops.modjac(plain, x)),
        (lambda: jacops.modjac(model, x, flatten=True), lambda: jacops.modjac(plain, x, flatten=True)),
        (lambda: jacops.jacobian(model, x).dense(), lambda: jacops.jacobian(plain, x).dense()),
        (lambda: jacops.hessian(model, loss, x, y).dense(), lambda: jacops.hessian(plain, mse, x, y).dense()),
        (lambda: jacops.ggn(model, loss, x, y).dense(), lambda: jacops.ggn(plain, mse, x, y).dense()),
        (
            lambda: jacops.sample_gradients(model, loss, x, y).dense(),
            lambda: jacops.sample_gradients(plain, mse, x, y).dense(),
        ),
        (lambda: jacops.sample_jacobians(model, x).dense(), lambda: jacops.sample_jacobians(plain, x).dense()),
        (lambda: jacops.vjp(lambda: model(x), params, wrap(u)), lambda: jacops.vjp(lambda: plain(x), bare, u)),
        (lambda: jacops.vjp(lambda: model(x), params, [u]), lambda: jacops.vjp(lambda: plain(x), bare, u)),
        (lambda: jacops.full_jacobian(lambda: model(x), params), lambda: jacops.full_jacobian(lambda: plain(x), bare)),
    ):
        torch.testing.assert_close(with_none(), without())


@pytest.mark.parametrize("tree", [lambda o: None, lambda o: (None, None), lambda o: {}])
def test_an_output_without_tensors_is_refused(tree: Callable[[Tensor], Any]) -> None:
    with pytest.raises(jacops.errors.InputTypeError, match="without tensors"):
        jacops.jacobian(Returning(tree), batch()[0])


# ---- modes of the caller --------------------------------------------------------------------------------------------


class Forbidden(RuntimeError):
    """What a mode of the caller's raises."""


class Forbidding(TorchDispatchMode):
    """Raises where an operation runs."""

    def __init__(self, operation: str):
        super().__init__()
        self.operation = operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.operation in str(func):
            raise Forbidden(str(func))
        return func(*args, **(kwargs or {}))


class ForbiddingFunctions(TorchFunctionMode):
    def __init__(self, operation: str):
        super().__init__()
        self.operation = operation

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.operation in getattr(func, "__name__", ""):
            raise Forbidden(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
@pytest.mark.parametrize("name", model_calls(nn.Identity(), *batch()))
@pytest.mark.parametrize(
    "mode", [Forbidding("tanh_backward"), Forbidding("aten.tanh."), Forbidding("mm"), ForbiddingFunctions("linear")]
)
def test_what_a_mode_of_the_caller_raises_surfaces_as_itself(name: str, mode: Any) -> None:
    call = model_calls(net(), *batch())[name]
    for _ in range(2):  # the first call also makes proofs
        with pytest.raises(Forbidden), mode:
            call()
        call()


# ---- what has no values, and what cannot be copied -------------------------------------------------------------------

OF_LOSSES: list[Callable[[nn.Module, Tensor], Any]] = [
    lambda model, x: jacops.kronecker_factors(model, nn.functional.mse_loss, x, x[:, :2]),
    lambda model, x: jacops.Problem(model, nn.functional.mse_loss, [(x, x[:, :2])]).ggn(),
    lambda model, x: jacops.compute_influences(model, [(x, x[:, :2])], loss=nn.functional.mse_loss, damping=0.1),
]


@pytest.mark.parametrize("call", OF_LOSSES)
def test_lazy_models_are_refused_by_calls_over_data_too(call: Callable[[nn.Module, Tensor], Any]) -> None:
    with pytest.raises(jacops.errors.ModelStateError, match="'1' .LazyLinear. is lazy"):
        call(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2)), torch.randn(4, 3))


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "jacobian"])
def test_operators_over_a_graph_refuse_copies_in_words(kind: str, copier: Callable[[Any], Any]) -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    given = (model, x) if kind == "jacobian" else (model, nn.functional.mse_loss, x, x[:, :2])
    operator = getattr(jacops, kind)(*given)
    with pytest.raises(jacops.errors.InputTypeError, match=f"graph of {kind}.*dense"):
        copier(operator)
    torch.testing.assert_close(copy.copy(operator).dense(), operator.dense())


# ---- a backward whose own derivative is another one at a kink --------------------------------------------------------


class Gated(nn.Module):
    """A net with a PReLU, which torch differentiates otherwise at zero the second time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.gate, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.inner(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("before", [0, 2])
def test_inputs_of_a_prelu_that_become_zero_keep_the_slope_of_its_backward(before: int) -> None:
    model, x, y = Gated(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 1, 0])
    loss, v = nn.functional.cross_entropy, torch.randn(59).double()

    def products() -> list[Tensor]:
        J = jacops.jacobian(model, x)  # noqa: N806
        return [J @ v, jacops.ggnvp(model, loss, x, y, v), jacops.Problem(model, loss, [(x, y)]).ggn() @ v]

    for _ in range(before):
        products()
    with torch.no_grad():
        model.inner.weight.zero_()
        model.inner.bias.zero_()
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in model(x).reshape(-1)]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])  # noqa: N806
    H = torch.autograd.functional.hessian(lambda o: loss(o, y), model(x).detach()).reshape(15, 15)  # noqa: N806
    for found, wanted in zip(products(), [J @ v, J.T @ H @ J @ v, J.T @ H @ J @ v], strict=True):
        torch.testing.assert_close(found, wanted)
