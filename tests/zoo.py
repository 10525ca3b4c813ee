"""Small awkward models, and what every call must answer on each of them: a value, or an error stated beforehand.

A cell is one case and one call. `Case.expect` names the cells that are ill-posed; every other cell has a value, the
one that plain row-by-row autograd defines in float64. `Case.warns` names the cells that must warn. In `Case.may_warn`
a call may say that it took a slower route; everywhere else it must be silent.
"""

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import jacops
from oracle import called, mapped
from small import Calls

SEED = 20_240  # of the global generator, which seeds models and which random forwards draw from
ROWS = 3  # vectors in a batch of tangents or cotangents

CLOSURES = ("jvp", "vjp", "batch_jvp", "batch_vjp", "full_jacobian")
PRODUCTS = ("model_jvp", "model_vjp")
FORWARD = ("modjac_forward", "modjac_forward_plain")
MODJACS = ("modjac", "modjac_vectorize", "modjac_flatten", *FORWARD)
SECOND = ("hessian", "mvp", "mvp_inputs")
TWICE = ("grad", *SECOND)
CALLS = ("compute_jacobian", "jacobian", *CLOSURES, *PRODUCTS, *MODJACS, *TWICE)


class Refusal(NamedTuple):
    """The error of an ill-posed cell and a pattern for the cause that its message names."""

    error: str
    names: str


@dataclass(frozen=True, eq=False)
class Case:
    """One model with its inputs, and what the calls must answer on it.

    Attributes:
        name: The test id.
        make: Builds the model; the same one each time, as the seed is fixed around it.
        inputs: Builds the inputs: a tuple of positional arguments, a dict of keyword arguments, or the one argument.
        mode: The mode the model stands in; "mixed" leaves it as `make` built it.
        expect: The cells with an error instead of a value.
        warns: The calls that must warn.
        may_warn: The calls that may say they took a slower route.
        pick: The tensor of the output that the loss reads.
        copier: Copies the model for the oracle; None: by building another one and loading the state.
        by_backward: The oracle must use `.backward`.
        dtype: The dtype of parameters, buffers and inputs.
        tolerance: The error allowed, relative to the largest entry.
        notes: Why the case is here, or why a cell may raise.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    mode: Literal["eval", "train", "mixed"] = "eval"
    expect: Mapping[str, Refusal] = field(default_factory=dict)
    warns: tuple[str, ...] = ()
    may_warn: tuple[str, ...] = ()
    pick: Callable[[Any], Tensor] = lambda output: output
    copier: Callable[[nn.Module], nn.Module] | None = copy.deepcopy
    by_backward: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    notes: str = ""

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a new model, always the same one, in the mode of this case."""
        with seeded():
            model = self.make().to(dtype or self.dtype)
        return model if self.mode == "mixed" else model.train(self.mode == "train")

    def x(self, dtype: torch.dtype | None = None) -> Any:
        """Return new inputs, always the same ones."""
        return mapped(lambda tensor: cast(tensor, dtype or self.dtype), self.inputs())

    def copy(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model that shares nothing with it."""
        return (self.copier or self.rebuilt)(model)

    def rebuilt(self, model: nn.Module) -> nn.Module:
        """Return a new model in the state of this one: a copy of models that cannot be deep-copied."""
        twin = self.model(next(model.parameters()).dtype)
        twin.load_state_dict(model.state_dict())
        return twin.train(model.training)

    def output(self, dtype: torch.dtype | None = None) -> Any:
        """Return what the model answers: one plain call of a new model, the random state left alone."""
        with seeded(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a checkpoint without a gradient to come says so
            return called(self.model(dtype), self.x(dtype))

    def y(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the target that the loss compares with."""
        return like(self.pick(self.output(dtype)), 77)

    def loss(self, output: Any, y: Tensor) -> Tensor:
        """Return the mean square error of the picked output."""
        return (self.pick(output) - y).square().mean()

    @property
    def calls(self) -> tuple[str, ...]:
        """The calls that apply: a mixed derivative needs one floating point input."""
        single = isinstance(x := self.inputs(), Tensor) and x.is_floating_point()
        return CALLS if single else tuple(call for call in CALLS if call != "mvp_inputs")


@contextmanager
def seeded(seed: int = SEED):
    """Draw from a known random state inside, and leave the caller's state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype, if it holds floating point numbers."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def draw(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers from a private generator, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def like(tensor: Tensor, seed: int, *axes: int) -> Tensor:
    """Normal numbers in the shape and dtype of a tensor, with more axes in front."""
    return draw(*axes, *tensor.shape, seed=seed).to(tensor.dtype)


def tangents(model: nn.Module, *axes: int, trainable: bool = False) -> list[Tensor]:
    """One direction per parameter, or a batch of them."""
    chosen = [p for p in model.parameters() if p.requires_grad or not trainable]
    return [like(parameter, 100 + index, *axes) for index, parameter in enumerate(chosen)]


def cotangents(output: Any, *axes: int) -> Any:
    """A tree of weights on the outputs, or of batches of them."""
    seeds = iter(range(200, 300))
    return mapped(lambda tensor: like(tensor, next(seeds), *axes), output)


# The calls


def question(call: str, case: Case, model: nn.Module, inputs: Any) -> Callable[[], Any]:
    """The call on this model and these inputs, ready to be made; all that it needs is prepared before."""
    dtype = next((p.dtype for p in model.parameters()), case.dtype)
    return _QUESTIONS[call](case, model, inputs, dtype)


Question = Callable[[Case, nn.Module, Any, torch.dtype], Callable[[], Any]]
Vectors = Callable[[Case, nn.Module, torch.dtype], list[Any]]  # the arguments after the parameters or the inputs


def pushed(*axes: int) -> Vectors:
    return lambda case, model, dtype: [tangents(model, *axes)]


def pulled(*axes: int) -> Vectors:
    return lambda case, model, dtype: [cotangents(case.output(dtype), *axes)]


def of_closure(verb: Callable[..., Any], vectors: Vectors = lambda case, model, dtype: []) -> Question:
    def prepared(case: Case, model: nn.Module, inputs: Any, dtype: torch.dtype) -> Callable[[], Any]:
        more = vectors(case, model, dtype)
        return lambda: verb(lambda: called(model, inputs), list(model.parameters()), *more)

    return prepared


def of_model(verb: Callable[..., Any], vectors: Vectors = lambda case, model, dtype: [], **options: Any) -> Question:
    def prepared(case: Case, model: nn.Module, inputs: Any, dtype: torch.dtype) -> Callable[[], Any]:
        more = vectors(case, model, dtype)
        return lambda: verb(model, inputs, *more, **options)

    return prepared


def of_loss(verb: Callable[[jacops.TorchTwiceDifferentiable, Any, Tensor, Any], Any]) -> Question:
    def prepared(case: Case, model: nn.Module, inputs: Any, dtype: torch.dtype) -> Callable[[], Any]:
        y, v = case.y(dtype), directions(model)
        return lambda: verb(jacops.TorchTwiceDifferentiable(model, case.loss), inputs, y, v)

    return prepared


def directions(model: nn.Module) -> Tensor:
    """Rows of numbers for the trainable parameters, (2, P)."""
    return torch.cat([v.reshape(2, v[0].numel()) for v in tangents(model, 2, trainable=True)] or [torch.ones(2, 1)], 1)


def by_parameters(twice: jacops.TorchTwiceDifferentiable, x: Any, y: Tensor, v: Tensor) -> Tensor:
    return twice.mvp(twice.grad(x, y, create_graph=True), v, backprop_on=twice.parameters)


def by_inputs(twice: jacops.TorchTwiceDifferentiable, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return twice.mvp(twice.grad(x, y, create_graph=True), v, backprop_on=x)


_QUESTIONS: dict[str, Question] = {
    "compute_jacobian": of_model(jacops.compute_jacobian),
    "jacobian": of_model(lambda model, inputs: jacops.jacobian(model, inputs).dense()),
    "jvp": of_closure(jacops.jvp, pushed()),
    "vjp": of_closure(jacops.vjp, pulled()),
    "batch_jvp": of_closure(jacops.batch_jvp, pushed(ROWS)),
    "batch_vjp": of_closure(jacops.batch_vjp, pulled(ROWS)),
    "full_jacobian": of_closure(jacops.full_jacobian),
    "model_jvp": of_model(jacops.model_jvp, pushed()),
    "model_vjp": of_model(jacops.model_vjp, pulled()),
    "modjac": of_model(jacops.modjac),
    "modjac_vectorize": of_model(jacops.modjac, vectorize=True),
    "modjac_forward": of_model(jacops.modjac, vectorize=True, strategy="forward-mode"),
    "modjac_forward_plain": of_model(jacops.modjac, strategy="forward-mode"),
    "modjac_flatten": of_model(jacops.modjac, flatten=True),
    "grad": of_loss(lambda twice, x, y, v: twice.grad(x, y)),
    "hessian": of_loss(lambda twice, x, y, v: twice.hessian(x, y)),
    "mvp": of_loss(by_parameters),
    "mvp_inputs": of_loss(by_inputs),
}


# Refusals stated beforehand


def refuse(error: str, names: str, *calls: str) -> dict[str, Refusal]:
    """The same refusal for several calls."""
    return dict.fromkeys(calls, Refusal(error, names))


PUSHES = ("jvp", "batch_jvp", "model_jvp")  # one backward pass of the backward pass, where that exists
INTEGER_INPUTS = refuse("NotDifferentiableError", r"at=", "compute_jacobian")


# Models


class Lambda(nn.Module):
    """A function of the tensor as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def between(*layers: nn.Module) -> Callable[[], nn.Module]:
    """Layers from 4 to 4 features between two linear maps: 3 features to 2."""
    return lambda: nn.Sequential(nn.Linear(3, 4), *(copy.deepcopy(layer) for layer in layers), nn.Linear(4, 2))


def function(body: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A function of 4 features between two linear maps."""
    return between(Lambda(body))


def points(count: int = 3, features: int = 3) -> Callable[[], Tensor]:
    """A batch of points."""
    return lambda: draw(count, features)


def sequences(count: int = 2, steps: int = 3, width: int = 4) -> Callable[[], Tensor]:
    """A batch of sequences."""
    return lambda: draw(count, steps, width)


def conv() -> nn.Module:
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
    model = nn.Sequential(*layers)
    model[1].running_mean.copy_(draw(2, seed=5))
    model[1].running_var.copy_(draw(2, seed=6).square() + 0.5)
    return model


def images(count: int = 3) -> Callable[[], Tensor]:
    """A batch of pictures."""
    return lambda: draw(count, 1, 4, 4)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, the weights not returned: the fused kernel."""

    def __init__(self, batch_first: bool = True, need_weights: bool = False):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class DotProduct(nn.Module):
    """`scaled_dot_product_attention` called directly on (batch, heads, steps, width)."""

    def __init__(self, **options: Any):
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(*heads, **self.options).transpose(1, 2).flatten(2)


class Recurrent(nn.Module):
    """A recurrent layer, its output unpacked, and a linear map."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


class Words(nn.Module):
    """An embedding of integers and a linear map."""

    def __init__(self, **options: Any):
        super().__init__()
        self.embedding = nn.Embedding(5, 3, **options)
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


class Bag(nn.Module):
    """A bag of embedded integers, weighted if weights come with them, and a linear map."""

    def __init__(self, mode: str = "mean"):
        super().__init__()
        self.embedding = nn.EmbeddingBag(5, 3, mode=mode)
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids, per_sample_weights=weights)))


class Marked(nn.Module):
    """An embedding of integers, scaled by numbers that come with them."""

    def __init__(self):
        super().__init__()
        self.words = Words()

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.words(ids) * x


def ids(count: int = 3, steps: int = 2) -> Tensor:
    """Integers below 5."""
    return torch.randint(5, (count, steps), generator=torch.Generator().manual_seed(3))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def with_weight_norm_hook() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is on its way out, and still met
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def with_weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def with_orthogonal_weights() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2))


def with_spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def with_spectral_norm_hook() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


class Checkpointed(nn.Module):
    """Recomputes its middle part in the backward pass."""

    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.use_reentrant = use_reentrant

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(checkpoint(self.middle, self.first(x), use_reentrant=self.use_reentrant))


class InPlace(nn.Module):
    """Writes into its input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1.0)
        return self.linear(x).mul_(2.0).tanh()


class Cube(torch.autograd.Function):
    """x³ with a differentiable backward: no forward rule, no `setup_context`, no rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * slope


class OnceCube(Cube):
    """x³ whose backward cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * slope


def branch(x: Tensor) -> Tensor:
    return torch.sin(x) if x.sum() > 0 else x**2


def masked(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[x > 0] = x[x > 0].sin()
    return out


def constant_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.sigmoid(x)
    return x * scale


class Force(nn.Module):
    """The slope of an energy, as models of molecules return: a derivative inside the forward."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x if x.requires_grad else x.clone().requires_grad_()
            return torch.autograd.grad(self.energy(place).sum(), place, create_graph=True)[0]


class CalledTwice(nn.Module):
    """Runs one submodule twice."""

    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self.step(x).tanh()).tanh())


class Several(nn.Module):
    """Two inputs and, as asked, one output, a tuple of them, or a dict."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(2, 3)
        self.pack = pack

    def forward(self, left: Tensor, right: Tensor) -> Any:
        return self.pack(self.left(left).tanh() * right, self.right(right).tanh() * left)


class TwoOutputs(nn.Module):
    """One input, outputs of different shapes in a container."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 4)
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.first(x).tanh(), self.second(x).sin().unflatten(-1, (2, 2)))


def as_model_output(logits: Tensor, states: Tensor) -> Any:
    """A dataclass that is also an ordered dict, with a field left at None."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(logits=logits, hidden_states=states)


def frozen(*names: str) -> Callable[[], nn.Module]:
    """An MLP with these parameters frozen."""

    def make() -> nn.Module:
        model = between(nn.Tanh())()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(name.startswith(start) for start in names))
        return model

    return make


class Spare(nn.Module):
    """Has parameters that its output does not use."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 2)
        self.used = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).tanh()


class OddParameters(nn.Module):
    """A parameter without entries, one without axes, one that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.weight = nn.Parameter(torch.randn(2, 3).t())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * (x @ self.weight)) + self.empty.sum()


class ListOfParts(nn.Module):
    """Runs its submodules from a plain Python list."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.order = [self.first, nn.Tanh(), self.second]

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda value, part: part(value), self.order, x)


class Locked(nn.Module):
    """Holds a lock and an open generator, which cannot be copied."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.lock, self.stream = threading.Lock(), (i for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.linear(x).tanh()


class BoundMethod(nn.Module):
    """Keeps one of its own methods as an attribute."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.body = self.hidden

    def hidden(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.body(x))


class OwnClosure(BoundMethod):
    """Keeps a function that closes over the model itself; a deep copy still runs the original."""

    def __init__(self):
        super().__init__()
        self.body = lambda x: self.hidden(x)


class Remembering(nn.Module):
    """Keeps its last activation, a tensor with a graph, which stops deep copies."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.last = self.first(torch.ones(3)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.first(x).tanh()
        return self.second(self.last)


class Counting(nn.Module):
    """Counts its calls in a buffer, and its answer depends on the count."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x - self.mean).tanh() * self.count


def hooked() -> nn.Module:
    model = between(nn.Tanh())()
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    return model


def mixed_modes() -> nn.Module:
    model = conv().append(nn.Dropout(0.5)).train()
    model[1].eval()
    return model


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 5, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 4}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    return scaled_up(GPT2LMHeadModel(GPT2Config(**sizes, **tokens)))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 5, "max_position_embeddings": 4, "hidden_size": 4, "num_hidden_layers": 1}
    return scaled_up(BertModel(BertConfig(**sizes, num_attention_heads=2, intermediate_size=4)))


def scaled_up(model: nn.Module) -> nn.Module:
    """The model with larger weights: the usual 0.02 makes most derivatives vanish."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


# The zoo

PLAIN = [
    Case("mlp_relu", between(nn.ReLU()), points()),
    Case("mlp_gelu", between(nn.GELU()), points()),
    Case("mlp_batchnorm", between(nn.BatchNorm1d(4), nn.PReLU()), points()),
    Case("mlp_layernorm", between(nn.LayerNorm(4), nn.Tanh()), points()),
    Case("mlp_groupnorm", between(nn.GroupNorm(2, 4), nn.Tanh()), points()),
    Case("one_parameter", lambda: nn.Linear(3, 2, bias=False), points(), notes="jacobians come bare, not in tuples"),
    Case("affine", lambda: nn.Linear(3, 2), points()),
    Case("prelu", between(nn.PReLU()), points(2), notes="as many rows in a chunk as outputs"),
    Case(
        "prelu_alone",
        nn.PReLU,
        lambda: torch.tensor([[-1.0, -2.0], [3.0, -4.0]]),
        notes="vmap of jacrev is wrong here, without a word",
    ),
    Case("sequence", between(nn.Tanh()), sequences(2, 3, 3)),
    Case("matrix_output", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Unflatten(1, (2, 2))), points()),
    Case("tied_weights", tied, points()),
    Case("unused_parameter", Spare, points()),
    Case("odd_parameters", OddParameters, points()),
    Case("called_twice", CalledTwice, points()),
    Case("maxpool", lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten()), images()),
    Case("fft", function(lambda x: torch.fft.rfft(x).abs().square().repeat(1, 2)[:, :4].sin()), points()),
    Case("hooked", hooked, points(), notes="a forward hook is a part of the function"),
    Case("mlp_float32", between(nn.GELU()), points(), dtype=torch.float32, tolerance=1e-5),
    Case("mlp_bfloat16", between(nn.GELU()), points(), dtype=torch.bfloat16, tolerance=5e-2),
    Case("mlp_float16", between(nn.GELU()), points(), dtype=torch.float16, tolerance=1e-2),
    Case(
        "numbers",
        lambda: nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2), nn.Tanh()),
        lambda: draw(5),
        notes="one number a sample",
    ),
]

MODES = [
    Case("conv_batchnorm_eval", conv, images()),
    Case("conv_batchnorm_train", conv, images(), "train", notes="batch statistics; running ones stay put"),
    Case("conv_float32", conv, images(), dtype=torch.float32, tolerance=1e-5),
    Case("conv_bfloat16", conv, images(), dtype=torch.bfloat16, tolerance=8e-2),
    Case("dropout_eval", between(nn.Dropout(0.5)), points()),
    Case("dropout_train", between(nn.Dropout(0.5)), points(), "train", notes="one mask per call"),
    Case("rrelu_train", between(nn.RReLU(0.1, 0.9)), points(), "train"),
    Case(
        "dropout_hard_coded",
        function(lambda x: F.dropout(x, 0.5, training=True)),
        points(),
        warns=("compute_jacobian",),
        notes="random in eval mode too",
    ),
    Case("rrelu_eval", between(nn.RReLU(0.1, 0.9)), points()),
    Case("mixed_modes", mixed_modes, images(), "mixed", notes="each submodule in a mode of its own"),
]

ATTENTION = [
    Case("self_attention", SelfAttention, sequences()),
    Case("attention_with_weights", lambda: SelfAttention(need_weights=True), sequences()),
    Case(
        "attention_sequence_first",
        lambda: SelfAttention(batch_first=False),
        sequences(),
        warns=("compute_jacobian",),
        notes="what looks like samples are steps of a sequence, which attend to each other",
    ),
    Case(
        "multihead_attention",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda: (draw(2, 3, 4), draw(2, 2, 4, seed=2), draw(2, 2, 4, seed=3)),
        pick=lambda output: output[0],
        notes="three inputs, a tuple of outputs",
    ),
    Case(
        "transformer_layer",
        lambda: nn.TransformerEncoderLayer(4, 2, 4, batch_first=True),
        sequences(),
        notes="has a fast path without grad mode",
    ),
    Case(
        "transformer_layer_train",
        lambda: nn.TransformerEncoderLayer(4, 2, 4, 0.3, batch_first=True),
        sequences(),
        "train",
    ),
    Case("dot_product", DotProduct, sequences()),
    Case("dot_product_causal", lambda: DotProduct(is_causal=True), sequences()),
    Case("attention_float32", SelfAttention, sequences(), dtype=torch.float32, tolerance=1e-5),
    Case("attention_bfloat16", SelfAttention, sequences(), dtype=torch.bfloat16, tolerance=8e-2),
]

RECURRENT = [
    Case("lstm", lambda: Recurrent(nn.LSTM(3, 2, batch_first=True)), sequences(2, 3, 3)),
    Case("rnn", lambda: Recurrent(nn.RNN(3, 2, batch_first=True)), sequences(2, 3, 3)),
    Case("gru", lambda: Recurrent(nn.GRU(3, 2, batch_first=True)), sequences(2, 3, 3)),
    Case(
        "lstm_nested_output",
        lambda: nn.LSTM(3, 2, batch_first=True),
        sequences(2, 3, 3),
        pick=lambda output: output[0],
        may_warn=("compute_jacobian",),
        notes="(out, (h, c)), with the samples on the second axis of h and c",
    ),
    Case(
        "lstm_dropout_train",
        lambda: Recurrent(nn.LSTM(3, 2, 2, batch_first=True, dropout=0.5)),
        sequences(2, 3, 3),
        "train",
        notes="draws its masks inside one kernel",
    ),
    Case(
        "lstm_float32",
        lambda: Recurrent(nn.LSTM(3, 2, batch_first=True)),
        sequences(2, 3, 3),
        dtype=torch.float32,
        tolerance=1e-5,
        notes="a fused kernel without a forward rule",
    ),
]

EMBEDDED = [
    Case("embedding", Words, ids, expect=INTEGER_INPUTS),
    Case("embedding_sparse", lambda: Words(sparse=True), ids, expect=INTEGER_INPUTS),
    Case(
        "embedding_max_norm",
        lambda: Words(max_norm=0.5),
        ids,
        expect=INTEGER_INPUTS,
        notes="the forward rewrites the weight; of a whole batch the function is taken as it stands",
    ),
    Case(
        "embedding_bag",
        Bag,
        ids,
        expect=INTEGER_INPUTS | refuse("NotDifferentiableError", "embedding_bag", *SECOND),
        warns=PUSHES,
        may_warn=FORWARD,
        notes="no second derivative rule: plain autograd has no answer either",
    ),
    Case(
        "embedding_bag_weighted",
        lambda: Bag("sum"),
        lambda: (ids(), draw(3, 2)),
        expect=refuse("NotDifferentiableError", "embedding_bag", *SECOND),
        warns=PUSHES,
        may_warn=FORWARD,
        notes="integers and numbers; jacobians by the numbers alone",
    ),
    Case("mixed_inputs", Marked, lambda: (ids(), draw(3, 2, 2)), notes="None in place of the integers' jacobian"),
]

WEIGHTS = [
    Case("weight_norm_hook", with_weight_norm_hook, points(), copier=None),
    Case("weight_norm", with_weight_norm, points()),
    Case("orthogonal", with_orthogonal_weights, points()),
    Case("spectral_norm_eval", with_spectral_norm, points()),
    Case("spectral_norm_train", with_spectral_norm, points(), "train"),
    Case("spectral_norm_hook_train", with_spectral_norm_hook, points(), "train", copier=None),
]

GRAPHS = [
    Case(
        "checkpoint_reentrant",
        lambda: Checkpointed(True),
        points(),
        "train",
        expect=refuse("NotDifferentiableError", "use_reentrant", *CLOSURES, *SECOND),
        by_backward=True,
        may_warn=("model_jvp", *FORWARD),
        notes="a recorded graph answers None, and the backward pass makes no graph",
    ),
    Case("checkpoint", lambda: Checkpointed(False), points(), "train"),
    Case("inplace_first", lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), points()),
    Case("inplace_add", InPlace, points(), notes="writes into the caller's input"),
    Case("custom_function", function(Cube.apply), points(), notes="old style: no forward rule, no setup_context"),
    Case(
        "once_differentiable",
        function(OnceCube.apply),
        points(),
        expect=refuse("NotDifferentiableError", "OnceCube", *SECOND),
        warns=PUSHES,
        may_warn=FORWARD,
        notes="double backward would drop a term",
    ),
    Case("force", Force, points(), notes="calls autograd itself"),
    Case("detached_inside", function(lambda x: x * x.detach().sin()), points()),
    Case(
        "no_grad_inside",
        function(constant_no_grad),
        points(),
        notes="forward mode differentiates through no_grad, autograd does not",
    ),
    Case("straight_through", function(lambda x: x + ((4 * x).round() / 4 - x).detach()), points()),
]

SAMPLES = [
    Case("item", function(lambda x: x * x.abs().max().item()), points(), warns=("compute_jacobian",)),
    Case("nonzero", function(lambda x: x * len(x.detach().nonzero())), points(), warns=("compute_jacobian",)),
    Case("branch", function(branch), points(), may_warn=("compute_jacobian",)),
    Case(
        "branch_on_weights",
        lambda: Calls(lambda a, x: x * a if float(a.detach().sum()) > 0 else x - a, (3,)),
        points(),
        may_warn=("compute_jacobian",),
    ),
    Case("boolean_index", function(masked), points(), may_warn=("compute_jacobian",)),
    Case("samples_mixed", function(lambda x: (x - x.mean(0)).sin()), points(), warns=("compute_jacobian",)),
    Case(
        "detached_mean",
        function(lambda x: x * x.mean(0).detach()),
        points(),
        warns=("compute_jacobian",),
        notes="block diagonal, and still no sample stands for itself",
    ),
    Case("squeezed", lambda: nn.Sequential(nn.Linear(3, 1), Lambda(torch.squeeze)), points()),
    Case(
        "batch_summed",
        function(lambda x: x.sin().sum(0)),
        points(),
        warns=("compute_jacobian",),
        notes="the batch axis is summed away",
    ),
    Case(
        "scalar_output",
        lambda: nn.Sequential(nn.Linear(3, 2), Lambda(lambda x: x.square().sum())),
        points(),
        warns=("compute_jacobian",),
        notes="one number for the whole batch",
    ),
]

CONTAINERS = [
    Case("tuple_output", lambda: TwoOutputs(lambda *parts: parts), points(), pick=lambda output: output[1]),
    Case("dict_output", lambda: TwoOutputs(lambda a, b: {"a": a, "b": b}), points(), pick=lambda output: output["b"]),
    Case("list_output", lambda: TwoOutputs(lambda *parts: list(parts)), points(), pick=lambda output: output[0]),
    Case(
        "nested_output",
        lambda: TwoOutputs(lambda a, b: (a, (a**2, {"last": b.sum(1)}))),
        points(),
        pick=lambda output: output[1][1]["last"],
    ),
    Case("model_output", lambda: TwoOutputs(as_model_output), points(), pick=lambda output: output.logits),
    Case("tuple_input", lambda: Several(lambda a, b: a), lambda: (draw(3, 3), draw(3, 2, seed=2))),
    Case("dict_input", lambda: Several(lambda a, b: b), lambda: {"right": draw(3, 2), "left": draw(3, 3, seed=2)}),
    Case(
        "tuple_to_dict",
        lambda: Several(lambda a, b: {"a": a, "b": b}),
        lambda: (draw(3, 3), draw(3, 2, seed=2)),
        pick=lambda output: output["a"],
    ),
]

PARAMETERS = [
    Case(
        "frozen",
        frozen("0."),
        points(),
        expect=refuse("InputError", r"(?s)\b0\b.*requires_grad|requires_grad.*\b0\b", *CLOSURES),
        notes="a recorded graph does not reach a frozen parameter",
    ),
    Case(
        "all_frozen",
        frozen(""),
        points(),
        expect=refuse("InputError", "requires_grad", *CLOSURES)
        | refuse("ModelStateError", "requires_grad", *TWICE)
        | refuse("ModelStateError", "Sequential", "jacobian"),
    ),
    Case(
        "no_parameters",
        nn.Tanh,
        points(),
        expect=refuse("InputError", "params", *CLOSURES[:-1])
        | refuse("ModelStateError", "Tanh", "jacobian", *PRODUCTS, *MODJACS, *TWICE),
        notes="full_jacobian of no parameters is an empty list, as the original's was",
    ),
    Case(
        "constant_output",
        lambda: nn.Sequential(nn.Linear(3, 2), Lambda(torch.ones_like)),
        points(),
        expect=refuse("NotDifferentiableError", "parameter", *TWICE)
        | refuse("NotDifferentiableError", r"no path.*output.*0\.weight.*allow_zero=True", "jacobian"),
        warns=(*CLOSURES, *PRODUCTS, *MODJACS),
        may_warn=("compute_jacobian",),
        notes="no path from any parameter to the output",
    ),
]

OBJECTS = [
    Case("list_of_parts", ListOfParts, points()),
    Case("locked", Locked, points(), copier=None),
    Case("bound_method", BoundMethod, points()),
    Case("own_closure", OwnClosure, points(), copier=None),
    Case("remembering", Remembering, points(), copier=None),
    Case("counting", Counting, points(), notes="a second call of the model answers differently"),
]

TRANSFORMERS = [
    Case("gpt2", gpt2, lambda: ids(2, 3), expect=INTEGER_INPUTS, pick=lambda output: output.logits),
    Case(
        "gpt2_embedded",
        gpt2,
        lambda: {"inputs_embeds": draw(2, 3, 4)},
        may_warn=("compute_jacobian",),
        pick=lambda output: output.logits,
    ),
    Case(
        "bert",
        bert,
        lambda: {"input_ids": ids(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])},
        expect=INTEGER_INPUTS,
        pick=lambda output: output.last_hidden_state,
    ),
]

ZOO = [
    *PLAIN,
    *MODES,
    *ATTENTION,
    *RECURRENT,
    *EMBEDDED,
    *WEIGHTS,
    *GRAPHS,
    *SAMPLES,
    *CONTAINERS,
    *PARAMETERS,
    *OBJECTS,
    *TRANSFORMERS,
]
BY_NAME = {case.name: case for case in ZOO}
