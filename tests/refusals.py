"""One table of what is refused: an argument, a wrong value, the calls that take it; the error's type and its words."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import data as loading

import jacops
import zoo
from jacops import TorchTensorUtilities, TorchTwiceDifferentiable
from jacops import _estimators as estimators
from jacops import _second_order as second_order
from jacops.errors import (
    DataError,
    InputError,
    InputTypeError,
    JacopsError,
    ModelStateError,
    NonFiniteError,
    NotDifferentiableError,
)
from jacops.linalg import Matrix
from small import Calls, draw, settled, small_net, square, tangents, tied_net

X, Y = draw(5, 3), draw(5, 2, seed=1)
F32, F64, INF, NAN = torch.float32, torch.float64, math.inf, math.nan
Arguments = Callable[[Any], dict[str, Any]]  # for a model
SHOWN = {"NoneType": "None", "int": "an int", "ndarray": "an ndarray"}  # values, as messages name them
LAYOUT = "0.weight (4, 3), 0.bias (4,), 2.weight (2, 4), 2.bias (2,)"


# ---- the calls, each with arguments that are right ------------------------------------------------------------------


def kind_of(model: Any) -> torch.dtype:
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    return next((p.dtype for p in parameters if p.is_floating_point() or p.is_complex()), F64)


def directions(model: Any, *batch: int) -> list[Tensor]:
    able = isinstance(model, nn.Module) and not any(nn.parameter.is_lazy(p) or p.is_meta for p in model.parameters())
    return tangents(model, *batch) if able else []


def of_model(model: Any) -> dict[str, Any]:
    return {"model": model, "x": X}


def with_loss(model: Any) -> dict[str, Any]:
    return {"model": model, "loss": square, "x": X, "y": Y.to(kind_of(model))}


def of_closure(vector: Callable[[], Any] = dict) -> Callable[[Any], dict[str, Any]]:
    def make(_: Any) -> dict[str, Any]:
        W, b = draw(3, 2).requires_grad_(), draw(2, seed=1).requires_grad_()
        return {"func": lambda: X @ W + b, "params": [W, b], **vector()}

    return make


def twice(method: str, **options: Any) -> Callable[..., Any]:
    return lambda model, loss, x, y: getattr(TorchTwiceDifferentiable(model, loss), method)(x, y, **options)


def influences(verb: Callable[..., Any]) -> Callable[..., Any]:
    def call(model: Any, loss: Any, x: Any = X, y: Any = Y, training_data: Any = None, **options: Any) -> Any:
        data = [(x, y)] if training_data is None else training_data
        return verb(TorchTwiceDifferentiable(model, loss), data, **{"damping": 1.0, "curvature": "ggn", **options})

    return call


def mvp(v: Any, backprop_on: Any = None) -> Tensor:
    wrapped = TorchTwiceDifferentiable(small_net(), F.mse_loss)
    recorded = wrapped.grad(X, Y, create_graph=True)
    return wrapped.mvp(recorded, v, wrapped.parameters if backprop_on is None else backprop_on)


def jax_net(loss: Any = None, apply: Any = None, params: Any = None) -> Any:
    import jax_cases
    from jacops._influence._jax import JaxTwiceDifferentiable

    params = jax_cases.weights(small_net()) if params is None else params
    return JaxTwiceDifferentiable(apply or jax_cases.mlp, params, loss or jax_cases.mse)


def jax_mvp(v: Any, backprop_on: Any = None) -> Any:
    own = jax_net()
    return own.mvp(own.grad(X, Y, create_graph=True), v, own.parameters if backprop_on is None else backprop_on)


def jax_second(of: Callable[[Any], Callable[..., Any]]) -> tuple[Callable[..., Any], Arguments]:
    return lambda x, y, **model: of(jax_net(**model))(x, y), lambda m: {"x": X, "y": Y}


def jax_tensors(name: str, *arguments: Any) -> Any:
    from jacops._influence._jax import JaxTensorUtilities
    from jax_cases import as_jax

    return getattr(JaxTensorUtilities, name)(*(as_jax(a) if isinstance(a, Tensor) else a for a in arguments))


ALL = "trace, diagonal, norm, eigenpairs, spectral_norm, spectral_density"
OPERATORS: dict[str, Callable[[], jacops.linalg.Operator]] = {
    "J": lambda: jacops.jacobian(small_net(), X),
    "H": lambda: jacops.hessian(small_net(), square, X, Y),
    "G": lambda: jacops.ggn(small_net(), square, X, Y),
    "E": lambda: jacops.linalg.empirical_fisher(small_net(), square, X, Y),
    "J.T": lambda: jacops.jacobian(small_net(), X).T,
}
SPREAD = Matrix(torch.diag(torch.linspace(1, 3, 60).double()), symmetric=True, positive=True)

# fmt: off
CALLS: dict[str, tuple[Callable[..., Any], Arguments]] = {
    **{name: (getattr(jacops, name), of_model) for name in ("compute_jacobian", "contributions", "modjac", "jacobian",
                                                           "check")},
    **{name: (getattr(jacops, name), with_loss) for name in ("hessian", "ggn", "sample_gradients")},
    "empirical_fisher": (jacops.linalg.empirical_fisher, with_loss),
    **{f"{name} @": ((lambda v, name=name: OPERATORS[name]() @ v), lambda m: {"v": draw(26)}) for name in OPERATORS},
    **{name: (getattr(estimators, name), lambda m: {"operator": SPREAD}) for name in ALL.split(", ")},
    "effective_dimension": (estimators.effective_dimension, lambda m: {"operator": SPREAD, "damping": 1.0}),
    "input jacobian": (lambda model, x: jacops.jacobian(model, x, "inputs"), of_model),
    "jacobian dense": (lambda model, x: jacops.jacobian(model, x).dense(), of_model),
    "hessian dense": (lambda **arguments: jacops.hessian(**arguments).dense(), with_loss),
    "input_hessian": (second_order.input_hessian, of_model),
    "directional_derivative": (second_order.directional_derivative, lambda m: {**of_model(m), "v": X}),
    "model_jvp": (jacops.model_jvp, lambda m: {**of_model(m), "v": directions(m)}),
    "model_vjp": (jacops.model_vjp, lambda m: {**of_model(m), "v": torch.ones(5, 2, dtype=kind_of(m))}),
    "hvp": (jacops.hvp, lambda m: {**with_loss(m), "v": draw(26)}),
    "wrap": (TorchTwiceDifferentiable, lambda m: {"model": m, "loss": square}),
    "grad": (twice("grad"), with_loss),
    "grad with a graph": (twice("grad", create_graph=True), with_loss),
    "second": (twice("hessian"), with_loss),
    "mvp": (mvp, lambda m: {"v": draw(2, 26)}),
    "influences": (influences(jacops.compute_influences), with_loss),
    "self_influences": (influences(jacops.self_influences), with_loss),
    "influences as wrapped": (jacops.compute_influences, lambda m: {"training_data": [(X, Y)]}),
    "jvp": (jacops.jvp, of_closure(lambda: {"v": [draw(3, 2), draw(2)]})),
    "vjp": (jacops.vjp, of_closure(lambda: {"v": draw(5, 2)})),
    "batch_jvp": (jacops.batch_jvp, of_closure(lambda: {"vs": [draw(4, 3, 2), draw(4, 2)]})),
    "batch_vjp": (jacops.batch_vjp, of_closure(lambda: {"vs": draw(4, 5, 2)})),
    "full_jacobian": (jacops.full_jacobian, of_closure()),
    "project_jacobian": (jacops.project_jacobian, lambda m: {"jacobian": draw(5, 2, 3), "proj_tensor": draw(3, 7)}),
    "reduce_contributions": (jacops.reduce_contributions, lambda m: {"contributions": np.ones((2, 3, 4))}),
    "verify_jacobian": (jacops.verify_jacobian, lambda m: dict(zip("ZJX", linear_case(), strict=True))),
    "projection": (jacops.attribution.projection, lambda m: {}),
    "get_element": (TorchTensorUtilities.get_element, lambda m: {}),
    "cat_gen": (lambda a: TorchTensorUtilities.cat_gen(a, (5, 2), TorchTwiceDifferentiable(small_net(), square)),
                lambda m: {}),
    "jax get_element": (lambda x, idx: jax_tensors("get_element", x, idx), lambda m: {}),
    "jax cat_gen": (lambda a: jax_tensors("cat_gen", map(np.asarray, a), (5, 2), jax_net()), lambda m: {}),
    "jax mvp": (jax_mvp, lambda m: {"v": draw(2, 26)}),
    "jax wrap": (jax_net, lambda m: {}),
    "jax grad": jax_second(lambda own: own.grad),
    "jax second": jax_second(lambda own: own.hessian),
    "jax ggn": jax_second(lambda own: own.objective.ggn),
}
# fmt: on


def linear_case(samples: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    weight, x = draw(2, 3), draw(samples, 3, seed=1)
    return x @ weight.T, weight.expand(samples, 2, 3).clone(), x


CLOSURES = "jvp, vjp, batch_jvp, batch_vjp, full_jacobian"
VECTORS = "jvp, vjp, batch_jvp, batch_vjp"
PRODUCTS = "J @, H @, G @, E @"
BY_MODEL = "compute_jacobian, model_jvp, model_vjp, modjac, jacobian, grad, second"
BY_SAMPLE = "sample_gradients, empirical_fisher, influences, self_influences"
TARGETED = "hessian, ggn, grad, grad with a graph, second, sample_gradients, influences"


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Wrong values by the names of their arguments, or what makes them anew; the calls, the error and its words."""

    wrong: dict[str, Any] | Callable[[], dict[str, Any]]
    calls: tuple[str, ...]
    error: type[Exception]
    words: tuple[str, ...]


TABLE: dict[str, Refusal] = {}


def refuse(label: str, wrong: Any, calls: str, error: type[Exception], words: str) -> None:
    """Enter a row: the message holds the words that are divided by two dots, in this order."""
    assert label not in TABLE, label
    TABLE[label] = Refusal(wrong, tuple(calls.split(", ")), error, tuple(words.split(" .. ")))


def cells() -> Iterator[tuple[str, str]]:
    return ((label, call) for label, row in TABLE.items() for call in row.calls)


def asked(label: str, call: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The call with its arguments, all of them right but for what the row says."""
    wrong = TABLE[label].wrong
    given = wrong() if callable(wrong) else wrong
    function, arguments = CALLS[call]
    right = arguments(given.get("model", small_net()))
    at = {"v": "vs"} if "vs" in right else {"x": "input"} if call == "modjac" else {}
    at |= {"x": "inputs"} if call in ("jacobian", "check") else {}
    return function, {at.get(name, name): value for name, value in {**right, **given}.items()}


# fmt: off
# What stands for the model

ANY = "modjac, model_jvp, model_vjp, jacobian, hessian, ggn, sample_gradients, check, wrap"
for label, model, words in (("class", nn.Linear, "`model` .. the class Linear .. Did you mean Linear()?"),
                            ("path", "model.pt", "`model` is a str .. torch.nn.Module"),
                            ("state dict", small_net().state_dict(), "`model` is an OrderedDict .. torch.nn.Module")):
    refuse(f"the model is a {label}", {"model": model}, f"compute_jacobian, {ANY}", InputTypeError, words)
refuse("the model is a lambda", {"model": lambda x: x}, ANY, InputTypeError, "`model` is a function .. torch.nn.Module")
refuse("a closure is a module", {"func": nn.Linear(3, 2)}, CLOSURES, InputTypeError, "`func` is a Linear .. lambda")
refuse("a closure is a tensor", {"func": torch.ones(3)}, CLOSURES, InputTypeError, "`func` is a Tensor")
refuse("the model is bare and has no loss", {"model": small_net()}, "influences as wrapped", InputTypeError,
       "`loss` is left out .. Sequential .. TorchTwiceDifferentiable")
refuse("the model is a number", {"model": 3}, "influences as wrapped", InputTypeError, "`model` is an int .. Module")
refuse("a wrapped model gets another loss", {"model": TorchTwiceDifferentiable(small_net(), nn.CrossEntropyLoss()),
       "loss": nn.MSELoss()}, "influences as wrapped", InputError, "`loss` is given .. carries its own .. plain model")
refuse("the loss is text", {"loss": "mse"}, "wrap", InputTypeError, "`loss` is 'mse' .. callable")
refuse("the loss is a class", {"loss": nn.MSELoss}, "wrap, hessian, ggn, sample_gradients", InputTypeError,
       "`loss` is the class MSELoss .. Did you mean MSELoss()?")
refuse("the operator is a tensor", {"operator": torch.eye(3)}, f"{ALL}, effective_dimension", InputTypeError,
       "`operator` is a Tensor .. an Operator is needed .. jacops.linalg.Matrix(tensor)")
refuse("the operator is a problem", lambda: {"operator": jacops.Problem(small_net(), square, [(X, Y)])},
       f"{ALL}, effective_dimension", InputTypeError, "`operator` is a Problem .. `.hessian()`")
refuse("parameters are a module", lambda: {"parameters": nn.Linear(3, 4)}, "jacobian, hessian, modjac, check",
       InputTypeError, "`parameters` is a Linear module .. module.parameters()")
refuse("a module is lazy", lambda: {"model": nn.Sequential(nn.Identity(), nn.LazyLinear(2))},
       f"{BY_MODEL}, contributions, hessian, check, sample_gradients", ModelStateError,
       "1.weight .. module '1' (LazyLinear) .. forward pass")
refuse("parameters are on meta", lambda: {"model": nn.Linear(3, 2, device="meta")},
       "compute_jacobian, modjac, jacobian, check", ModelStateError, "weight .. meta .. Load")


class Quantised(nn.Module):
    """A frozen integer table, scaled by a weight."""

    def __init__(self, frozen: bool = False):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([[1, -2], [3, 4], [-5, 6]], dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(draw(2), requires_grad=not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.to(x.dtype) * self.scale


refuse("a parameter is of integers", lambda: {"model": Quantised(), "v": draw(5, 2)}, "model_jvp, model_vjp",
       ModelStateError, "table .. integer")
refuse("all floating-point parameters are frozen", lambda: {"model": Quantised(frozen=True)}, "jacobian",
       ModelStateError, "`model` .. without parameters")
refuse("no parameters", lambda: {"model": nn.ReLU()}, "model_jvp, model_vjp, modjac, jacobian, check, hessian, ggn, "
       "sample_gradients", ModelStateError, "`model` is a ReLU without parameters .. floating-point parameter")
refuse("no parameters to train", lambda: {"model": nn.ReLU()}, "wrap", ModelStateError,
       "`model` .. ReLU .. no parameter requires grad .. requires_grad_()")
refuse("all parameters are frozen", lambda: {"model": small_net().requires_grad_(False)},
       "jacobian, hessian, ggn, sample_gradients, check, wrap", ModelStateError, "`model` is a Sequential")
refuse("only trainable columns of frozen ones", lambda: {"model": small_net().requires_grad_(False),
       "parameters": "trainable"}, "modjac", ModelStateError, "`model` is a Sequential without parameters")


def between(layer: nn.Module) -> nn.Module:
    return settled(nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2))).train()


class Only(nn.Module):
    """The first output of a layer over a sequence."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return found[0] if isinstance(found, tuple) else found


for many in (5, 1):
    refuse(f"batch norm is in train mode over {many}", lambda many=many: {"model": between(nn.BatchNorm1d(4)),
           "x": X[:many], "y": Y[:many]}, BY_SAMPLE, ModelStateError, "'1' (BatchNorm1d) .. train mode .. eval()")
refuse("dropout is in train mode", lambda: {"model": between(nn.Dropout(0.25))}, BY_SAMPLE, ModelStateError,
       "'1' (Dropout .. 0.25 .. eval()")
for name, layer in {
    "LSTM": lambda: nn.LSTM(4, 4, 2, dropout=0.3, batch_first=True),
    "GRU": lambda: nn.GRU(4, 4, 2, dropout=0.3, batch_first=True),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True),
    "layer.": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True),
}.items():
    refuse(f"{name} has dropout of its own", lambda layer=layer: {"model": Only(layer()).double().train(),
           "x": draw(3, 5, 4), "y": draw(3, 5, 4)}, BY_SAMPLE, ModelStateError, f"{name} .. 0.3")

# What goes into it

for label, value, words in (("list", [[1.0, 2.0, 3.0]] * 5, "list .. torch.as_tensor"),
                            ("array", np.ones((5, 3)), "ndarray .. torch.as_tensor"),
                            ("reversed array", np.ones((5, 3))[::-1], "ndarray .. torch.as_tensor .. copy()")):
    refuse(f"the input is a {label}", {"x": value}, BY_MODEL, InputTypeError, words)
for value in ([1.0, 2.0], "x", None, 3.0, {1.0}, type("DataFrame", (), {"to_numpy": lambda _: np.ones((5, 3))})()):
    kind = type(value).__name__
    refuse(f"the input is no tensor but a {kind}", {"x": value}, "compute_jacobian, input_hessian", InputTypeError,
           f"`x` is {SHOWN.get(kind, 'a ' + kind)} .. tensor"
           + (" .. torch.as_tensor" if kind in ("list", "DataFrame") else ""))
refuse("inputs of several lengths", {"model": Calls(lambda a, b: a), "x": (X, X[:4])}, "compute_jacobian", InputError,
       "`x` .. x[0] .. 5 .. x[1] .. 4 .. one row per sample")
for own, given in ((F32, F64), (F64, F32), (F32, torch.bfloat16), (F32, torch.int64)):
    calls = f"{BY_MODEL}, hessian, ggn, check, sample_gradients"
    refuse(f"the input is of {given}, the model of {own}", lambda own=own, given=given: {"model": small_net().to(own),
           "x": torch.ones(5, 3).to(given)}, calls if given.is_floating_point else calls.partition(", ")[2], InputError,
           f"`input` is of {given} .. {own} .. Cast one of them .. nothing is cast silently")
refuse("an input of integers has no derivative", {"x": torch.ones(5, 3).long()}, "compute_jacobian",
       NotDifferentiableError, "integer inputs have no derivative")
refuse("the input is of words", lambda: {"model": nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)),
       "x": torch.tensor([[1, 2]])}, "compute_jacobian, input jacobian, input_hessian", NotDifferentiableError,
       "without floating-point tensors .. integer .. embedding .. at=")
refuse("the input is on another device", {"x": torch.ones(5, 3, dtype=F64, device="meta")},
       "compute_jacobian, modjac, jacobian", InputError, "`input` .. meta .. cpu")
refuse("samples are a data set", {"x": loading.TensorDataset(X)}, "compute_jacobian", InputTypeError,
       "`x` is a TensorDataset .. DataLoader(dataset")
refuse("the input is a data set", {"x": loading.TensorDataset(X)}, "modjac, jacobian, hessian", InputTypeError,
       "`input` is a TensorDataset .. one batch is needed .. DataLoader(dataset")
refuse("the training data are a data set", {"training_data": loading.TensorDataset(X, Y)}, "influences",
       InputTypeError, "`training_data` is a TensorDataset .. batches (x, y) .. DataLoader(dataset")
for name in ("coo", "csr"):
    refuse(f"the input is sparse by {name}", lambda name=name: {"x": torch.eye(3, dtype=F64).to_sparse(
           layout=getattr(torch, f"sparse_{name}"))}, "compute_jacobian", InputError, f"`x` .. {name} .. to_dense()")


def sparse_weight() -> nn.Module:
    model = Calls(lambda W, x: torch.sparse.mm(W, x))
    model.weights.append(nn.Parameter(torch.eye(3, dtype=F64).to_sparse()))
    return model


refuse("a parameter is sparse", lambda: {"model": sparse_weight(), "x": draw(3, 2)},
       "compute_jacobian, modjac, jacobian", JacopsError, "weights.0 .. to_dense()")

# Tangents and cotangents


def of(*shape: int, dtype: torch.dtype = F64, v: Any = None) -> Callable[[], dict[str, Any]]:
    """The squares of one parameter."""

    def make() -> dict[str, Any]:
        W = torch.ones(shape, dtype=dtype, requires_grad=True)
        return {"func": lambda: W**2, "params": [W], "v": v}

    return make


VS = tangents(small_net())
for shape in ((25,), (27,), (1,), (0,), (25, 26), (1, 26)):
    refuse(f"a flat vector of {shape}", {"v": draw(*shape)}, PRODUCTS, InputError, f"`v` .. {shape} .. 26 .. {LAYOUT}")
refuse("a flat vector of 25 for hvp", {"v": draw(25)}, "hvp", InputError, f"(25,) .. 26 .. {LAYOUT}")
refuse("a flat vector of 9 outputs", {"v": draw(9)}, "J.T @", InputError, "(9,) .. 10 .. output (5, 2)")
refuse("two tensors for four", {"v": VS[:2]}, PRODUCTS, InputError, f"2 tensor .. 2.weight .. {LAYOUT}")
for v, words in ((VS[:3], "3 tensor .. 2.bias"), (VS[0], "1 tensor"), ([*VS, VS[0]], "5 tensor")):
    refuse(f"{words[:8]} for four", {"v": v}, "model_jvp", InputError, f"`v` is .. {words} .. 4 are needed .. {LAYOUT}")
V, C = draw(3, 2), draw(2)
for label, v, words in (("list without b", [V], "1 tensor .. first one missing is params[1] .. 2 are needed"),
                        ("bare tensor", V, "1 tensor .. params[1] .. 2 are needed"),
                        ("tuple without b", (V,), "params[1]"),
                        ("list of three", [V, C, C], "3 tensor .. 2 are needed"),
                        ("list of none", [], "0 tensor .. params[0]"),
                        ("dict by another name", {"params[0]": V, "b": C}, "['b'] .. params[1]")):
    refuse(f"a direction is a {label}", {"v": v}, "jvp", InputError, words)
for label, v in (("list without b", [V[None]]), ("bare tensor", V[None])):
    refuse(f"directions are a {label}", {"v": v}, "batch_jvp", InputError, "params[1]")
refuse("no cotangent at all", {"v": []}, "model_vjp", InputError, "0 tensor .. output")
ONES = [torch.ones(1).double() for _ in range(4)]
refuse("vectors could be broadcast", {"v": ONES}, "model_jvp, H @", InputError, "0.weight .. (1,) .. (4, 3)")
refuse("vectors are never broadcast", {"v": ONES}, "model_jvp", InputError, "nothing is broadcast")
for shape, given in (((3,), (3, 1)), ((3,), (1, 3)), ((3, 2), (2,)), ((3, 2), (1,)), ((3, 2), ()), ((), (1,)),
                     ((3, 2), (2, 3)), ((3, 2), (6,)), ((3,), (0,))):
    refuse(f"a direction {given} for a parameter {shape}", of(*shape, v=draw(*given)), "jvp", InputError,
           f"`v` is of shape {given} .. shape {shape} is needed")
for shape in ((2, 5), (10,), (5, 2, 1), (1,), (), (5, 1), (1, 2)):
    refuse(f"a cotangent {shape}", {"v": draw(*shape)}, "vjp, model_vjp", InputError, f"{shape} .. 5, 2) is needed")
    refuse(f"cotangents {shape}", {"v": draw(3, *shape)}, "batch_vjp", InputError, f"{(3, *shape)} .. 5, 2) is needed")
for a, b in ((4, 5), (5, 4)):
    refuse(f"batches of {a} and {b} directions", {"v": [draw(a, 3, 2), draw(b, 2)]}, "batch_jvp", InputError,
           f"batch of {b}, but the first tensor is a batch of {a}")
for shape in ((3, 2), (2,), ()):
    refuse(f"directions {shape} without a batch axis", of(3, 2, v=draw(*shape)), "batch_jvp", InputError,
           "`vs` is of shape .. (batch, 3, 2) is needed")
for v in (1.0, 2, True, "v", None, np.ones(3)):
    kind = type(v).__name__
    words = f"`v` is {SHOWN.get(kind, 'a ' + kind)}"
    refuse(f"a direction is a {kind}", of(3, v=v), "jvp", InputTypeError, words)
    refuse(f"a direction is a list of a {kind}", of(3, v=[v]), "jvp", InputTypeError, words)
for own, given in ((F32, F64), (F64, F32), (F32, torch.bfloat16), (F32, torch.int64), (F64, torch.complex128),
                   (torch.complex64, F32)):
    for calls, v in (("jvp, vjp", torch.ones(3, dtype=given)), ("batch_jvp, batch_vjp", torch.ones(2, 3, dtype=given))):
        refuse(f"{given} for {own}, {calls}", of(3, dtype=own, v=v), calls, InputError, f"{given} .. {own}")
refuse("a direction of one parameter is of another dtype", lambda: {"model": nn.Linear(3, 2), "x": torch.ones(5, 3),
       "v": [torch.ones(2, 3), torch.ones(2).double()]}, "model_jvp", InputError,
       "`v for bias` is of dtype torch.float64 .. torch.float32")
for calls, v in (("model_jvp, G @", [v.float() for v in VS]), ("J @, H @", torch.ones(26)),
                 ("model_vjp", torch.ones(5, 2)), ("J.T @", torch.ones(10))):
    refuse(f"float32 for float64, {calls}", {"v": v}, calls, InputError, "torch.float32 .. torch.float64")
refuse("a vector is on another device", of(3, v=torch.ones(3, device="meta").double()), "jvp", InputError,
       "`v` .. meta .. cpu")
refuse("a vector is sparse", of(3, 3, v=torch.eye(3, dtype=F64).to_sparse()), "jvp, vjp", InputError,
       "`v` .. to_dense()")
for name in ("coo", "csr"):
    refuse(f"columns are sparse by {name}", lambda name=name: {"v": torch.eye(26, dtype=F64).to_sparse(
           layout=getattr(torch, f"sparse_{name}"))}, f"hvp, {PRODUCTS}", InputError, f"`v` .. {name} .. to_dense()")
refuse("a vector of all parameters is sparse", {"v": draw(26).to_sparse()}, f"hvp, {PRODUCTS}", InputError,
       "`v` .. to_dense()")
refuse("a vector of all parameters is nested", lambda: {"v": torch.nested.nested_tensor([draw(13), draw(13)],
       layout=torch.jagged)},
       "hvp, J @, H @", InputError, "`v` is nested .. to_padded_tensor")
refuse("samples are sparse", {"x": X.to_sparse()}, "sample_gradients, influences", InputError, "x .. to_dense()")
refuse("targets are sparse", {"y": Y.to_sparse()}, "sample_gradients, influences", InputError, "y .. to_dense()")
for bad in (NAN, INF):
    vector = torch.where(torch.arange(26) == 17, bad, 1.0).double()
    parts = [f.reshape(p.shape) for f, p in zip(vector.split([12, 4, 8, 2]), VS, strict=True)]
    refuse(f"entry 17 is {bad}", {"v": vector}, PRODUCTS, NonFiniteError, "`v` .. 1 of 26 .. 17")
    refuse(f"entry 1 of tensor 2 is {bad}", {"v": parts}, "model_jvp", NonFiniteError, "`v` .. tensor 2 .. (0, 1)")
    refuse(f"all cotangents are {bad}", {"v": torch.full((5, 2), bad).double()}, "model_vjp", NonFiniteError,
           "`v` .. 10 of 10 .. (0, 0)")
    for call in VECTORS.split(", "):
        name, v = ("vs", vector[12:18].view(2, 3)) if "batch" in call else ("v", vector[16:19])
        refuse(f"an entry for {call} is {bad}", of(3, v=v), call, NonFiniteError,
               f"{call}: in `{name}`, 1 of {v.numel()} entries")
refuse("a vector is a number", {"v": 3.0}, "J @", InputTypeError, "float")
refuse("a vector lacks tensors", {"v": VS[:1]}, "J @", InputError, "0.bias")
for shape in ((4, 1), (1,), (1, 1), (25,), (27,), (4, 25), (2, 3, 26), (26, 1), (), (0,)):
    refuse(f"directions {shape} of 26 parameters", {"v": draw(*shape)}, "mvp, jax mvp", InputError,
           f"`v` is of shape .. {shape} .. [D, 26] or [26]")
for v, calls, error, words in ((np.ones(26, np.float32), "mvp, jax mvp", InputError, "float32"),
                               (torch.full((26,), NAN).double(), "mvp, jax mvp", NonFiniteError, "`v`"),
                               ("v", "mvp, jax mvp", InputTypeError, "`v` is a str"),
                               (None, "mvp, jax mvp", InputTypeError, "`v` is None"),
                               (torch.ones(26), "mvp", InputError, "torch.float32"),
                               (np.ones(26, int), "jax mvp", InputError, "int64")):
    refuse(f"directions say {words}", {"v": v}, calls, error, words)
for on, calls, error, words in (([], "mvp, jax mvp", InputError, "is empty"),
                                ([None], "mvp, jax mvp", InputTypeError, "[0]` is None"),
                                (3, "mvp, jax mvp", InputTypeError, "` is an int"),
                                (torch.ones(3), "mvp", InputError, "[0]` is neither a parameter"),
                                (torch.ones(3), "jax mvp", InputError, "` is neither a parameter"),
                                ({"w": np.ones(3)}, "jax mvp", InputError, "['w']` is neither a parameter")):
    refuse(f"backprop_on {words}", {"backprop_on": on}, calls, error, f"`backprop_on .. {words}")
for v, error, words in ((X[0], InputError, "`v` is of shape (3,)"), (X.float(), InputError, "`v` .. float32"),
                        ((X, X), InputError, "2 tensors"), (X * NAN, NonFiniteError, "`v`")):
    refuse(f"a direction of inputs is {words}", {"v": v}, "directional_derivative", error, words)

# Parameters of closures, and names of parameters

for value in (None, 3, "W", [1.0], [None], [np.ones(3)]):
    refuse(f"params are {value!r:.9}", {"params": value}, CLOSURES, InputTypeError, "params")
for label, empty in (("a list", list), ("a tuple", tuple), ("used up", lambda: iter([]))):
    refuse(f"params are {label} without entries", lambda empty=empty: {"params": empty()}, VECTORS, InputError,
           "`params` is empty .. at least one tensor .. generator .. pass a list")


def closure_of(function: Callable[[Tensor, Tensor], Any], *more: Callable[[Tensor], Any], **rest: Any) -> Any:
    def make() -> dict[str, Any]:
        W = draw(3, 2).requires_grad_()
        return {"func": lambda: function(W, X), "params": [W, *(made(W) for made in more)], **rest}

    return make


def made_in_inference_mode() -> dict[str, Any]:
    with torch.inference_mode():
        made = torch.ones(3, 2).double()
    return {"func": lambda: X @ made, "params": [made], "v": made}


def sparse_parameter() -> dict[str, Any]:
    W = torch.eye(3, dtype=F64).to_sparse().requires_grad_()
    return {"func": lambda: (W * 2).to_dense(), "params": [W], "v": [W]}


refuse("a parameter is given twice", closure_of(lambda W, x: x @ W, lambda W: W), CLOSURES, InputError,
       "`params[1]` is the same tensor as params[0]")
refuse("a parameter is frozen", closure_of(lambda W, x: x @ W, lambda W: draw(2)), CLOSURES, InputError,
       "`params[1]` is a tensor (2,) that does not require grad .. requires_grad_()")
refuse("a parameter was made in inference mode", made_in_inference_mode, "jvp", InputError,
       "`params[0]` .. inference_mode")
refuse("a parameter of a closure is sparse", sparse_parameter, "jvp", InputError, "params[0] .. to_dense()")
MISSPELT = dict(zip(("0.wieght", "0.bias", "2.weight", "2.bias"), VS, strict=True))
refuse("a parameter's name is misspelt", {"v": MISSPELT}, "model_jvp, H @", InputError, "0.wieght .. 0.weight")
refuse("a tied weight is given under both names", lambda: {"model": tied_net(), "v": dict.fromkeys(("0.weight",
       "2.weight"), draw(3, 3))}, "model_jvp", InputError, "2.weight")
refuse("no parameter fits", {"parameters": lambda name, p: name == "0.wieght"}, "jacobian", InputError,
       "a function that picks none")
IDLE = Calls(lambda idle, W, x: (x @ W).tanh(), (4,), (3, 2))
refuse("an unused parameter is refused by strict", {"model": IDLE, "strict": True}, "modjac", NotDifferentiableError,
       "output does not depend on parameter weights.0")
refuse("only an unused parameter is asked for", {"model": IDLE, "parameters": lambda name, p: name[-1] == "0"},
       "jacobian", NotDifferentiableError, "weights.0 .. allow_zero=True")

# Options

for size in (0, -1, True, False, 2.5, 2.0, "4", None):
    refuse(f"the batch size is {size!r}", {"batch_size": size}, "compute_jacobian, input_hessian", InputError,
           f"`batch_size` is {size!r}")
for size in (0, -1, True, False, 2.5, 2.0, "4"):
    refuse(f"the chunk size is {size!r}", {"chunk_size": size}, "full_jacobian", InputError,
           f"`chunk_size` is {size!r} .. positive whole number")
for damping in (-1e-9, -1, NAN, INF, "0.1", "Auto", None, True, torch.tensor([1.0, 2.0])):
    refuse(f"damping is {damping!r}", {"damping": damping}, "influences", InputError,
           f"`damping` is {damping!r} .. not negative")
for order in (0, -1, True, 1.5):
    refuse(f"the order is {order}", {"order": order}, "directional_derivative", InputError, "`order`")
for argument, word, known, calls in (
    ("influence_type", "sideways", "'up', 'perturbation'", "influences"),
    ("solver", "magic", "'direct'", "influences"),
    ("curvature", "newton", "'hessian', 'ggn'", "influences"),
    ("on_failure", "ignore", "'raise', 'return'", "influences"),
    ("reduction", "avg", "'mean', 'sum'", "influences"),
    ("checks", "sometimes", "'first' .. 'always' .. 'never'", "compute_jacobian, jacobian, hessian, ggn"),
    ("fallback", "sometimes", "'warn', 'silent', 'error'", "compute_jacobian, jacobian, hessian, ggn, jvp, batch_jvp"),
    ("wrt", "input", "'parameters', 'inputs'", "jacobian"),
    *(("strategy", word, "'reverse-mode', 'forward-mode'", "modjac") for word in ("forwards", "", None, 1)),
    *(("method", word, "'l2', 'l1', 'max'", "reduce_contributions") for word in ("L2", None, "l3", "", 2)),
):
    refuse(f"{argument} is {word!r}", {argument: word}, calls, InputError, f"`{argument}` is {word!r} .. {known}")
for pick in (6, -7, "logits", [0, 9]):
    refuse(f"there are no outputs {pick}", {"outputs": pick}, "compute_jacobian", InputError, f"outputs .. {pick!r}")
refuse("there is no output 2", {"outputs": 2}, "modjac, jacobian", InputError,
       "`outputs` is 2, but the last axis of output has 2 entries")
refuse("there is no output of this name", {"model": Calls(lambda x: {"logits": x}), "outputs": "scores"},
       "compute_jacobian", InputError, "'scores' .. 'logits'")


class Odd(nn.Module):
    """Leaves one layer idle and uses another twice."""

    def __init__(self):
        super().__init__()
        self.idle, self.twice = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(x))


refuse("there is no module of this name", {"at": "00"}, "compute_jacobian", InputError, "`at` .. '00' .. '0'")
refuse("a module's name is misspelt", lambda: {"model": Odd(), "at": "twcie"}, "compute_jacobian", InputError,
       "'twcie' .. twice")
for path in ("idle", "twice"):
    refuse(f"a hidden layer is {path}", lambda path=path: {"model": Odd(), "at": path}, "compute_jacobian",
           ModelStateError, path)
for at in ("0", ("0", None), ("0", "1")):
    refuse(f"parameters from a hidden layer at {at}", {"at": at}, "jacobian", InputError, "`at` is .. wrt='inputs'")
refuse("samples that mix may not be taken alone", {"model": Calls(lambda x: x - x.mean(0)), "fallback": "error"},
       "compute_jacobian", NotDifferentiableError, "mix")

# What comes out of a model or closure

for label, function, error, words in (
    ("none", lambda W, x: None, InputTypeError, "None .. tensor"),
    ("text in a tuple", lambda W, x: (x @ W, "me"), InputTypeError, "[1] .. str .. outputs="),
    ("text in a dict", lambda W, x: {"y": x @ W, "name": "me"}, InputTypeError, "['name'] .. str .. outputs="),
    ("a number", lambda W, x: float((x @ W).detach().sum()), InputTypeError, "float .. tensor"),
    ("numpy", lambda W, x: (x @ W).detach().numpy(), InputTypeError, "ndarray .. tensor"),
    ("labels", lambda W, x: (x @ W).argmax(1), NotDifferentiableError, "torch.int64 .. floating-point .. scores"),
    ("a mask", lambda W, x: x @ W > 0, NotDifferentiableError, "torch.bool .. floating-point"),
    ("nothing", lambda W, x: (), InputTypeError, "tuple .. tensor"),
    ("sparse", lambda W, x: (x @ W).to_sparse(), InputError, "sparse .. to_dense"),
):
    model = Calls(function, (3, 2))
    refuse(f"output: {label}", {"model": model}, "compute_jacobian, modjac, jacobian", error, f"output .. {words}")
    refuse(f"a pushed output is {label}", {"model": model, "v": [V]}, "model_jvp", error, f"output .. {words}")
    refuse(f"a closure gives {label}", closure_of(function), "full_jacobian", error, f"func() .. {words}")
    refuse(f"a pushed closure gives {label}", closure_of(function, v=V), "jvp", error, f"func() .. {words}")
TURN = Calls(lambda W, x: torch.complex(x @ W, x @ W * 2), (3, 2))
refuse("the output is complex", {"model": TURN}, "compute_jacobian", NotDifferentiableError,
       "output .. complex .. view_as_real")
refuse("the output of an operator is complex", {"model": TURN}, "jacobian", NotDifferentiableError,
       "complex .. view_as_real")
refuse("the input is complex", {"model": torch.abs, "x": torch.complex(X, X)}, "compute_jacobian",
       NotDifferentiableError, "`x` .. complex .. view_as_real")
refuse("the input and the model are complex", lambda: {"model": nn.Linear(3, 2).to(torch.complex128),
       "x": torch.complex(X, X)}, "compute_jacobian", NotDifferentiableError, "complex")
refuse("a value written into is needed", {"model": Calls(lambda W, x: (x @ W).exp_().mul_(2) * 1 + (x @ W).exp()
       .add_(1), (3, 2))}, "compute_jacobian, modjac, model_vjp, jacobian dense", NotDifferentiableError,
       "inplace operation")
refuse("the output is detached", {"model": Calls(lambda W, x: (x @ W).detach(), (3, 2))}, "jacobian",
       NotDifferentiableError, "no path leads .. output .. weights.0 .. allow_zero=True")
for label, function in (("infinite", lambda W, x: (W * 0).sqrt() * x),
                        ("undefined behind a mask", lambda W, x: torch.where(W > 1e9, (W * 0).sqrt(), W) * x)):
    model, one = Calls(function, (3,)), torch.ones(3).double()
    refuse(f"a slope is {label}", {"model": model, "x": one}, "modjac", NonFiniteError, "weights.0")
    refuse(f"a pulled slope is {label}", {"model": model, "x": one, "v": one}, "model_vjp", NonFiniteError, "weights.0")
refuse("a slope by the input is infinite", {"model": torch.sqrt, "x": torch.zeros(2, 3)}, "compute_jacobian",
       NonFiniteError, "by x")


class Dropping(zoo.Cube):
    """x³ with a backward that drops the second derivative."""

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0].detach() ** 2 * slope


ONCE = Calls(lambda W, x: zoo.OnceCube.apply(x @ W), (3, 2))
refuse("a checkpoint is reentrant", lambda: {"model": zoo.Checkpointed(True).double(), "x": X.clone().requires_grad_()},
       "hessian", NotDifferentiableError, "reentrant .. use_reentrant=False")
refuse("a Function is differentiable once", {"model": ONCE}, "hessian, second, grad with a graph",
       NotDifferentiableError, "OnceCube .. once_differentiable")
refuse("a Function in hvp is differentiable once", {"model": ONCE, "v": draw(6)}, "hvp", NotDifferentiableError,
       "OnceCube .. once_differentiable")
refuse("a Function drops its second derivative", {"model": Calls(lambda W, x: Dropping.apply(x @ W), (3, 2))},
       "hessian dense", NotDifferentiableError, "Dropping")

# Losses and targets


def calls_backward(output: Tensor, y: Tensor) -> Tensor:
    value = square(output, y)
    value.backward()
    return value


refuse("the loss calls backward itself", {"loss": calls_backward}, "hessian dense, grad, sample_gradients",
       NotDifferentiableError, "backward")
for shape, loss in (((5,), lambda o, y: o.sum(1)), ((1,), lambda o, y: o.sum().reshape(1)),
                    ((5, 2), lambda o, y: 2 * o)):
    refuse(f"the loss is of shape {shape}", {"loss": loss}, "hessian, ggn, grad, second, jax grad, jax second, jax ggn",
           InputError, f"`the loss` is of shape {shape} .. reduction")
for label, loss, words in (("a number", lambda o, y: 1.0, "`the loss` is a float"),
                           ("an index", lambda o, y: o.argmax(), "`the loss` is of dtype int"),
                           ("a tuple", lambda o, y: (o.sum(), o), "`the loss` is a tuple .. auxiliary"),
                           ("of targets", lambda o, y: (y**2).mean(), "no path leads from the loss"),
                           ("constant", lambda o, y: 0 * y[0, 0] + 1, "no path leads from the loss")):
    refuse(f"the loss for JAX is {label}", {"loss": loss}, "jax grad, jax second", NotDifferentiableError, words)
refuse("a model of JAX leaves its parameters out", {"apply": lambda w, x: x, "y": X}, "jax grad",
       NotDifferentiableError, "no path leads from the loss")
for argument, value, error, words in (
    ("apply", "mlp", InputTypeError, "`apply` is a str"), ("loss", "mse", InputTypeError, "`loss` is 'mse'"),
    ("params", (), ModelStateError, "a tree of 0 arrays"),
    ("params", {"ids": np.arange(3)}, ModelStateError, "a tree of 1 arrays in which none"),
    ("params", {"w": 1.0}, InputTypeError, "`params['w']` is a float .. array"),
    ("params", {"w": None}, InputTypeError, "`params['w']` is None"),
    ("params", ["w"], InputTypeError, "`params[0]` is a str"),
    ("params", {"w": np.ones(2, complex)}, NotDifferentiableError, "`w` is of dtype complex128 .. real"),
    ("params", {"w": np.array(["a"])}, InputTypeError, "`params['w']` is an ndarray"),
):
    refuse(f"to JAX {words}", {argument: value}, "jax wrap", error, words)
refuse("the loss is not reduced", {"loss": nn.MSELoss(reduction="none")}, "hessian, ggn, grad", InputError,
       "the loss .. (5, 2) .. reduction")
refuse("the loss is a Python number", {"loss": lambda output, y: float(square(output.detach(), y))},
       "hessian, ggn, grad", NotDifferentiableError, "`the loss` is a float .. .item()")
for label, loss in (("an index", lambda o, y: o.argmax()), ("a count", lambda o, y: (o > 0).sum())):
    refuse(f"the loss is {label}", {"loss": loss}, "hessian, ggn", NotDifferentiableError, "torch.int64")
refuse("the loss is detached", {"loss": lambda output, y: square(output.detach(), y)}, "hessian",
       NotDifferentiableError, "no path leads")
for loss in (F.mse_loss, nn.MSELoss(), F.l1_loss, F.smooth_l1_loss, nn.SmoothL1Loss(), F.huber_loss):
    refuse(f"the target of {getattr(loss, '__name__', loss)} lacks an axis", {"model": settled(nn.Linear(3, 1)),
           "loss": loss, "y": draw(5)}, TARGETED, InputError, "`y` is of shape ( .. ,) .. , 1) .. unsqueeze")
refuse("a sum passes for a mean", {"loss": lambda o, y: ((o - y) ** 2).sum(), "training_data": [(X[:3], Y[:3]),
       (X[3:], Y[3:])]}, "influences", InputError, "`reduction` is 'mean', but the loss of 3 rows")

# Data


def loader(**options: Any) -> loading.DataLoader:
    return loading.DataLoader(loading.TensorDataset(X, Y), batch_size=2, **options)


class Turning(loading.Sampler):
    """Another order at each pass, or one row less, without any random number."""

    def __init__(self, less: bool):
        self.less, self.passes = less, 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(range(6 - self.passes) if self.less else [(i + self.passes) % 5 for i in range(5)])

    def __len__(self) -> int:
        return 5


RANDOM: dict[str, Callable[[], loading.DataLoader]] = {
    "shuffles": lambda: loader(shuffle=True),
    "shuffles with its own generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(0)),
    "draws a subset": lambda: loader(sampler=loading.SubsetRandomSampler(range(5))),
    "draws by weights": lambda: loader(sampler=loading.WeightedRandomSampler([1.0] * 5, 5)),
    "shuffles in a batch sampler": lambda: loading.DataLoader(
        loading.TensorDataset(X, Y), batch_sampler=loading.BatchSampler(loading.RandomSampler(range(5)), 2, False)),
}
EMPTY: dict[str, Callable[[], Any]] = {"list": list, "loader": lambda: loading.DataLoader(loading.TensorDataset(X[:0]))}
ONCE_ONLY: dict[str, Callable[[], Any]] = {"generator": lambda: ((x, y) for x, y in [(X, Y)]),
                                      "iterator": lambda: iter([(X, Y)]), "zip": lambda: zip([X], [Y], strict=True)}
for where in ("training_data", "test_data", "input_data"):
    for label, make in RANDOM.items():
        refuse(f"{where} {label}", lambda where=where, make=make: {where: make()}, "influences", DataError,
               f"`{where}` is a loader with a .. RandomSampler .. shuffle=False")
for where in ("training_data", "test_data"):
    for label, make in EMPTY.items():
        refuse(f"{where} is an empty {label}", lambda where=where, make=make: {where: make()}, "influences", DataError,
               f"`{where}` .. empty .. at least one batch")
    for label, make in ONCE_ONLY.items():
        refuse(f"{where} is a {label}", lambda where=where, make=make: {where: make()}, "influences", DataError,
               f"`{where}` .. read once .. DataLoader")
refuse("the one batch has no row", {"training_data": [(X[:0], Y[:0])]}, "influences", DataError, "training_data .. row")
refuse("the data is a number", {"training_data": 3}, "influences", InputTypeError,
       "`training_data` .. an int .. batches (x, y)")
for less, words in ((False, "different in batch 0"), (True, "batch")):
    refuse(f"passes differ {'in length' if less else 'in order'}", lambda less=less: {"training_data": loader(
           sampler=Turning(less))}, "influences", DataError, f"`training_data` is .. {words}")
for sizes, said in (((), "0 rows"), ((2,), "2 rows"), ((2, 2), "4 rows"), ((6,), "a .. (6, 2) at row 0"),
                    ((2, 2, 2), "a .. (2, 2) at row 4")):
    refuse(f"rows come in pieces of {sizes}", lambda sizes=sizes: {"a": (draw(size, 2) for size in sizes)},
           "cat_gen, jax cat_gen", InputError, f"`a` is giving {said}, but (5, 2) was promised")
refuse("rows are of another width", lambda: {"a": iter([draw(2, 3)])}, "cat_gen, jax cat_gen", InputError,
       "(2, 3) at row 0 .. (5, 2)")
for shape, idx in (((1, 3, 2), 3), ((), 0), ((4,), -5), ((4,), 4)):
    refuse(f"there is no element {idx} of {shape}", {"x": draw(*shape), "idx": idx}, "get_element, jax get_element",
           InputError, f"`idx` is {idx}")

# Projections, contributions, verifications

for a, b in (((5, 2, 1), (3, 7)), ((5, 2, 3), (1, 7)), ((5, 2, 3), (7, 3)), ((5, 2, 3), (4, 7))):
    for kind, J, P in (("torch", draw(*a), draw(*b)), ("numpy", draw(*a).numpy(), draw(*b).numpy())):
        refuse(f"{kind} projection of {a} by {b}", {"jacobian": J, "proj_tensor": P}, "project_jacobian", InputError,
               f"`proj_tensor` is of shape {b} .. {a[2]}")
for a, b in (((2, 3), (3, 7)), ((5, 2, 3), (3,)), ((5, 2, 3), (1, 3, 7)), ((5, 2, 2, 3), (3, 7))):
    refuse(f"axes of a projection of {a} by {b}", {"jacobian": draw(*a), "proj_tensor": draw(*b)}, "project_jacobian",
           InputError, "axes")
refuse("a projection is of numpy", {"proj_tensor": draw(3, 7).numpy()}, "project_jacobian", InputTypeError,
       "proj_tensor")
refuse("a projection is of float32", {"proj_tensor": draw(3, 7).float()}, "project_jacobian", InputError, "float32")
refuse("a PCA is an array", {"estimator": np.eye(3)}, "projection", InputTypeError, "`estimator` is an ndarray .. PCA")
for shape in ((4, 3), (4,), ()):
    for kind, given in (("numpy", np.ones(shape)), ("torch", torch.ones(shape)), ("lists", np.ones(shape).tolist()),
                        ("a graph", torch.ones(shape, requires_grad=True))):
        refuse(f"contributions {shape} of {kind}", {"contributions": given}, "reduce_contributions", InputError,
               "`contributions` .. 3 axes")
for label, cut in {
    "one output column": lambda Z, J, x: (Z[:, :1], J, x),
    "outputs without their axis": lambda Z, J, x: (Z[:, 0], J[:, :1], x),
    "one input row": lambda Z, J, x: (Z, J, x[:1]),
    "one input column": lambda Z, J, x: (Z, J, x[:, :1]),
    "one Jacobian": lambda Z, J, x: (Z, J[:1], x),
    "outputs transposed": lambda Z, J, x: (Z.T, J, x),
    "one sample without its axis": lambda Z, J, x: (Z[0], J[0], x[0]),
    "images": lambda Z, J, x: (Z, J[..., None], x[..., None]),
}.items():
    given = dict(zip("ZJX", cut(*linear_case()), strict=True))
    shapes = " .. ".join(str(tuple(tensor.shape)) for tensor in given.values())
    refuse(f"to verify: {label}", given, "verify_jacobian", InputError, f"`Z` .. `J` .. `X` .. {shapes}")
refuse("to verify: no samples", dict(zip("ZJX", linear_case(0), strict=True)), "verify_jacobian", InputError,
       "at least one sample")
for name, tensor in zip("ZJX", linear_case(), strict=True):
    spoilt = torch.where(torch.arange(tensor.numel()) == 3, NAN, tensor.flatten()).reshape(tensor.shape)
    refuse(f"to verify: NaN in {name}", {name: spoilt}, "verify_jacobian", NonFiniteError, f"`{name}`")

# Estimators

SPOILT = Matrix(torch.full((60, 60), NAN), symmetric=True)
refuse("an operator is not square", {"operator": Matrix(draw(3, 5))}, "trace, diagonal, eigenpairs, spectral_density",
       InputError, "square")
refuse("an operator is not symmetric", {"operator": Matrix(draw(5, 5))}, "eigenpairs, spectral_density", InputError,
       "symmetric .. A.T @ A")
refuse("an operator is not finite", {"operator": SPOILT}, ALL, NonFiniteError, "not finite")
refuse("probes of an operator are not finite", {"operator": SPOILT, "probes": 4}, "trace, diagonal, norm",
       NonFiniteError, "not finite")
for probes in (1, 0, -3, True, 2.0):
    refuse(f"probes are {probes}", {"probes": probes}, "trace, diagonal, norm, spectral_density", InputError,
           f"`probes` is {probes}")
refuse("a method of probing is unknown", {"probes": 4, "method": "guess"}, "trace", InputError, "`method`")
refuse("an end of the spectrum is unknown", {"which": "best"}, "eigenpairs", InputError, "`which`")
refuse("a width is negative", {"width": -1.0}, "spectral_density", InputError, "`width`")
refuse("an effective dimension is undamped", {"damping": 0.0}, "effective_dimension", InputError, "`damping`")
refuse("an effective dimension is of an indefinite operator", {"operator": Matrix(torch.diag(torch.linspace(-1, 2,
       60).double()), symmetric=True)}, "effective_dimension", InputError, "positive")
