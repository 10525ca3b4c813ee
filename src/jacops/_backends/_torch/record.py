"""Recording: run a function or a model once and keep the graph as a `Tape`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import InputError, InputTypeError, JacopsError, ModelStateError, NotDifferentiableError, explain
from ...trees import Selector, Tree, flatten, is_differentiable, output_leaves, select
from .replica import Replica, bare, parameter_names, replicate
from .surroundings import out_of_inference, random_state_kept, recording
from .tape import Tape
from .trust import Trust, trust_in
from .watch import Watch, WritesState

At = None | str | tuple[str | None, str | None]


@dataclass(frozen=True)
class Recorded:
    """A tape, and the shape of the output it was recorded from.

    Attributes:
        tape: The linearisation point.
        tree: The output's structure.
        output: The output itself, as the user's function gave it.
        inputs: For each input of the caller's that has derivatives, by identity: itself and the leaf that stood for it.
    """

    tape: Tape
    tree: Tree
    output: Any
    inputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def record_closure(func: Callable[[], Any], params: Any, call: str, fallback: str = "warn") -> Recorded:
    """Call `func` once and record it over the caller's own tensors.

    Raises:
        InputTypeError: `func` or `params` is of the wrong kind.
        InputError: A parameter is repeated or does not require grad.
    """
    if not callable(func) or isinstance(func, nn.Module):
        raise InputTypeError(explain("func", f"a {type(func).__name__}", "a callable without arguments is needed",
                                     "Write `lambda: model(x)`."))  # fmt: skip
    leaves = check_params(params)
    with recording():
        output = func()
    tensors, tree = output_leaves(output, "func()")
    names = [f"params[{i}]" for i in range(len(leaves))]
    tape = Tape(
        leaves, tensors, leaf_names=names, output_names=tree.names, call=call, fallback=check_fallback(fallback),
        coarse=_autocast_on(tensors),
    )  # fmt: skip
    return Recorded(tape, tree, output)


def check_fallback(fallback: str) -> str:
    """Return `fallback` if it is one of the known words.

    Raises:
        InputError: It is not.
    """
    if fallback not in ("warn", "silent", "error"):
        raise InputError(explain("fallback", repr(fallback), "one of 'warn', 'silent', 'error' is needed"))
    return fallback


def check_params(params: Any) -> list[Tensor]:
    """Return `params` as a list: one tensor, or any iterable of tensors, read once.

    Raises:
        InputTypeError: An entry is not a tensor.
        InputError: An entry is repeated, frozen, made in inference mode or sparse.
    """
    try:
        leaves = [params] if isinstance(params, Tensor) else list(params.values() if isinstance(params, Mapping) else params)
    except TypeError:
        raise InputTypeError(explain("params", f"a {type(params).__name__}", "a tensor or an iterable of tensors is needed")) from None
    seen: dict[int, int] = {}
    for i, leaf in enumerate(leaves):
        name = f"params[{i}]"
        if not isinstance(leaf, Tensor):
            raise InputTypeError(explain(name, f"a {type(leaf).__name__}", "a tensor is needed"))
        if id(leaf) in seen:
            raise InputError(explain(name, f"the same tensor as params[{seen[id(leaf)]}]", "each may stand there once"))
        if not leaf.requires_grad:
            todo = "Call `.requires_grad_()` on it before the function uses it, leave it out, or use the model_* calls."
            if leaf.is_inference():
                todo = "Make it outside torch.inference_mode(), or use the calls that take the model."
            raise InputError(explain(name, f"a tensor {tuple(leaf.shape)} that does not require grad", "its uses must be recorded", todo))
        if leaf.layout is not torch.strided:
            raise InputError(explain(name, f"of layout {leaf.layout}", "it must be dense", "Call `.to_dense()` on it."))
        seen[id(leaf)] = i
    return leaves


def split_input(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: a tuple or a mapping is unpacked, None is no argument."""
    if value is None:
        return (), {}
    if isinstance(value, tuple):
        return value, {}
    if isinstance(value, Mapping):
        return (), dict(value)
    return (value,), {}


def private_inputs(value: Any, connected: bool = False) -> tuple[Any, list[tuple[str, Tensor]]]:
    """Return a copy of the inputs, and the leaves in it that have derivatives.

    Leaves are used through a clone, so that a forward may write into its input. With `connected`, an input of the
    caller's that requires grad is its own leaf.
    """
    values, tree = flatten(value, "input")
    leaves: list[tuple[str, Tensor]] = []
    copies = []
    for name, item in zip(tree.names, values, strict=True):
        if not isinstance(item, Tensor):
            copies.append(item)
            continue
        item = out_of_inference(item)
        if not is_differentiable(item):
            copies.append(item.detach().clone() if item.layout is torch.strided else item)
            continue
        leaf = item if connected and item.requires_grad else item.detach().requires_grad_()
        leaves.append((name, leaf))
        copies.append(leaf.clone())
    return tree.build(copies), leaves


class Hooked:
    """A forward cut at submodules: `source`'s output becomes a leaf, `target`'s output the result.

    Raises:
        InputError: The path names no submodule.
        ModelStateError: The submodule was not reached, or more than once, or its output is no tensor.
    """

    def __init__(self, module: nn.Module, at: At) -> None:
        self.source, self.target = (at, None) if isinstance(at, str) or at is None else at
        self.module, self.leaves, self.captured = module, [], []
        for path in (self.source, self.target):
            if path is not None:
                self._submodule(path)

    def _submodule(self, path: str) -> nn.Module:
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            from difflib import get_close_matches

            known = [n for n, _ in self.module.named_modules() if n]
            near = get_close_matches(path, known, 3) or known[:5]
            raise InputError(explain("at", repr(path), f"the model has no such submodule; near it: {near}")) from None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Cut the forward while inside; the module is a replica, so hooks on it are nobody's business."""
        handles = []
        if self.source is not None:
            handles.append(self._submodule(self.source).register_forward_hook(self._cut))
        if self.target is not None:
            handles.append(self._submodule(self.target).register_forward_hook(self._keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _cut(self, module: nn.Module, args: Any, output: Any) -> Any:
        tensor = _first_tensor(output, self.source)
        if self.leaves:
            raise ModelStateError(explain("at", repr(self.source), "the forward must use that submodule once, not more often"))
        leaf = tensor.detach().requires_grad_()
        self.leaves.append(leaf)
        return leaf.clone() if isinstance(output, Tensor) else (leaf.clone(), *output[1:])

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.captured.append(_first_tensor(output, self.target))

    def result(self, output: Any) -> Any:
        """Return what stands for the output: the target's if there is one."""
        for path, found in ((self.source, self.leaves), (self.target, self.captured)):
            if path is not None and len(found) != 1:
                raise ModelStateError(explain("at", repr(path), f"the forward must use that submodule once; it did {len(found)} times"))
        return self.captured[0] if self.target is not None else output


def _first_tensor(output: Any, path: str | None) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) and output else output
    if not is_differentiable(tensor):
        raise ModelStateError(explain("at", repr(path), f"its output is a {type(output).__name__}, not a floating-point tensor"))
    return tensor


@dataclass(frozen=True)
class Habits:
    """What a forward was seen to do; kept with the trust in it."""

    reads: tuple[str, ...]
    draws: tuple[str, ...]
    writes: bool


def setting(model: nn.Module, inputs: Sequence[Tensor], *more: Any) -> tuple[Any, ...]:
    """Return a key under which trust in a model holds: its modules, modes and shapes, and the inputs'."""
    parts = [(id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    weights = [(p.shape, p.dtype, p.device) for p in model.parameters()]
    arrays = [(t.shape, t.dtype, t.device) for t in inputs]
    context = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda") if torch.cuda.is_available() else False
    return (tuple(parts), tuple(weights), tuple(arrays), context, *more)


def run_watched(
    model: nn.Module, run: Callable[[Replica], Any], trust: Trust, guarded: Sequence[Tensor], **options: Any
) -> tuple[Any, Replica, Habits]:
    """Run `run(replica)` and learn the forward's habits the first time; copy the weights if it writes into them."""
    habits: Habits | None = trust.notes.get("habits")
    if habits is not None and not habits.reads and trust.checks != "always":
        replica = replicate(model, cloned=habits.writes, **options)
        with recording(), random_state_kept():
            return run(replica), replica, habits
    for cloned in (False, True):
        replica = replicate(model, cloned=cloned, **options)
        watch = Watch([] if cloned else guarded)
        try:
            with recording(), random_state_kept(), watch:
                output = run(replica)
        except WritesState:
            continue
        habits = trust.notes["habits"] = Habits(tuple(watch.reads), tuple(watch.draws), cloned)
        return output, replica, habits
    raise ModelStateError(explain("model", "writing into a tensor that is not its own", "its forward must leave such tensors alone"))


def record_model(
    model: Any,
    value: Any,
    *,
    call: str,
    parameters: Callable[[str, Tensor], bool] | None,
    outputs: Selector = None,
    at: At = None,
    checks: str = "first",
    fallback: str = "warn",
    training: bool | None = None,
    finish: Callable[[Any], Any] | None = None,
    connected: bool = False,
    shift: Mapping[str, Tensor] | None = None,
) -> Recorded:
    """Run a model once on private copies and record it.

    Args:
        model: The caller's module.
        value: Its input: a tuple or a mapping is unpacked, None is no argument.
        call: The public call on whose behalf this is done.
        parameters: Which parameters are the leaves; None takes the floating-point inputs instead.
        outputs: Which part of the output.
        at: A cut at submodules.
        checks: How often routes are checked.
        fallback: What happens when a fast route is left.
        training: A mode for all modules, None for their own.
        finish: Applied to the output last (a loss).
        connected: Keep the result connected to the caller's trainable parameters, for derivatives of derivatives.
        shift: Added to the private copies of parameters, by name, for finite differences.

    Raises:
        ModelStateError: The model has no parameters to differentiate.
        InputError: An input does not fit, `outputs` or `at` pick nothing.
        NotDifferentiableError: Nothing among the inputs has a derivative.
    """
    module = bare(model)
    check_fallback(fallback)
    chosen = {n: p for n, p in parameter_names(module).items() if parameters is not None and parameters(n, p)}
    if parameters is not None and not chosen:
        raise ModelStateError(explain("model", f"a {type(module).__name__} without parameters to differentiate",
                                      "at least one must be a floating-point parameter that is asked for"))  # fmt: skip
    tensors = [t for t in flatten(value, "input")[0] if isinstance(t, Tensor)]
    trust = trust_in(module, setting(module, tensors, "whole", training, at, repr(outputs)), checks)
    kept: dict[str, Any] = {}

    def run(replica: Replica) -> Any:
        # Inputs are recorded too: a reentrant checkpoint passes gradients on to weights only if its input asks for one.
        copied, kept["inputs"] = private_inputs(value, connected)
        for name, change in (shift or {}).items():
            replica.parameters[name].data = replica.originals[name].detach() + change
        hooked = Hooked(replica.module, at)
        args, kwargs = split_input(copied)
        with hooked.active(), forward_explained(module, tensors):
            output = hooked.result(replica(args, kwargs))
        kept["hidden"] = hooked.leaves
        output = select(output, outputs)
        return finish(output) if finish is not None else output

    output, replica, _ = run_watched(
        module, run, trust, list(module.parameters()), wrt=lambda n, p: n in chosen, training=training, connected=connected
    )
    leaves, names, twins = _leaves(replica, chosen, kept, at)
    outputs_flat, tree = output_leaves(output)
    tape = Tape(
        leaves, outputs_flat, leaf_names=names, output_names=tree.names, call=call, twins=(), private=True, trust=trust,
        fallback=fallback, coarse=_autocast_on(outputs_flat),
    )  # fmt: skip
    tape.protected = [p for p in module.parameters() if p.requires_grad]
    # The caller's own parameter in the graph of a private copy: something outside the module holds on to it.
    tape.twins = tuple((i, p) for i, p in twins if id(p) in tape.survey.leaves and not connected)
    given = dict(zip(flatten(value, "input")[1].names, flatten(value, "input")[0], strict=True))
    return Recorded(tape, tree, output, {id(given[name]): (given[name], leaf) for name, leaf in kept["inputs"]})


def _leaves(
    replica: Replica, chosen: dict[str, Tensor], kept: dict[str, Any], at: At
) -> tuple[list[Tensor], list[str], list[tuple[int, Tensor]]]:
    if chosen:
        names = list(chosen)
        return [replica.parameters[n] for n in names], names, [(i, replica.originals[n]) for i, n in enumerate(names)]
    if kept["hidden"]:
        return kept["hidden"], [at if isinstance(at, str) else str(at and at[0])], []
    if not kept["inputs"]:
        raise NotDifferentiableError(explain("input", "without floating-point tensors", "integer inputs have no derivative",
                                             "Differentiate by the embedding's output with `at='path.to.embedding'`."))  # fmt: skip
    return [leaf for _, leaf in kept["inputs"]], [name for name, _ in kept["inputs"]], []


def _autocast_on(tensors: Sequence[Tensor]) -> bool:
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class _NoBroadcast(TorchFunctionMode):
    """Refuse a target that broadcasts against the output, which torch's elementwise losses only warn about."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _ELEMENTWISE_LOSSES:
            shapes = [tuple(t.shape) for t in [*args, *kwargs.values()] if isinstance(t, Tensor)][:2]
            if len(set(shapes)) > 1:
                raise InputError(explain("y", f"of shape {shapes[1]}", f"the model's output has shape {shapes[0]} and the loss "
                                         "is elementwise", "Give both the same shape, e.g. `y.unsqueeze(-1)`."))  # fmt: skip
        return func(*args, **kwargs)


_ELEMENTWISE_LOSSES = frozenset({"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"})


def call_loss(loss: Callable[[Any, Any], Any], output: Any, target: Any) -> Any:
    """Return `loss(output, target)`.

    Raises:
        InputError: The target would broadcast against the output.
    """
    with _NoBroadcast():
        return loss(output, target)


@contextmanager
def forward_explained(module: Any, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Say what does not fit when a forward fails because an input has another dtype or device than the weights."""
    try:
        yield
    except RuntimeError as error:
        weight = next((p for p in module.parameters() if p.is_floating_point()), None) if isinstance(module, nn.Module) else None
        for tensor in tensors if weight is not None and not isinstance(error, JacopsError) else ():
            if tensor.device != weight.device:
                raise InputError(explain("input", f"on device {tensor.device}", f"the model is on {weight.device}",
                                         f"Call `.to('{weight.device}')` on one of them.")) from error  # fmt: skip
            if tensor.is_floating_point() and tensor.dtype != weight.dtype:
                raise InputError(explain("input", f"of dtype {tensor.dtype}", f"the model is of dtype {weight.dtype}",
                                         "Cast one of them; nothing is cast silently.")) from error  # fmt: skip
        raise
