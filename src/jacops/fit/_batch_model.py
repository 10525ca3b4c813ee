"""A residual function of one problem, run for many: their residuals in one forward, and each one's Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._requirements import check_flag
from .._runtime.contexts import arithmetic, must_surface, out_of_inference, random_state_kept
from .._runtime.restoring import restoring
from .._torch.protocol import (
    ModelRun,
    Shared,
    check_state,
    input_leaves,
    problem_jacobians,
    rows_apart,
    split_input,
    structure_of,
)
from .._trees import Tree, output_leaves
from ..errors import InputError, InputTypeError, ModelStateError, warn
from ._functions import FunctionModule, function_module
from ._layout import Values

FEW = 64  # problems that are not worth making fewer when some have stopped: a pass costs what its calls cost
_CHECKED = 3  # problems that are run alone to compare: the first, the last and one between
_AGREE = 1e3  # rounding errors that sums of as many terms as residuals have may differ by


@dataclass(eq=False)
class ProblemFunction:
    """A function of one problem's parameters and data, both flat.

    Attributes:
        function: `f(*params, *input)`, or with `keyword` `f(*input, **params)`.
        names: Names of its parameters.
        keyword: They are keyword arguments.
        tree: The structure of the input, which holds what is shared by all problems; None without an input.
        vectorized: The function takes all problems at once.
        call: The public call.
        looped: It is run for one problem after another.
        outputs: The structure of its output, once it has been run.
    """

    function: Callable[..., Any]
    names: tuple[str, ...]
    keyword: bool
    tree: Tree | None
    vectorized: bool
    call: str
    looped: bool = False
    outputs: Tree | None = field(default=None, init=False)

    def alone(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Return the residuals for parameters and data as the function takes them; it may write into them."""
        own, data = flat[: len(self.names)], flat[len(self.names) :]
        args, kwargs = split_input(None if self.tree is None else self.tree.map_held(private).build(data))
        named = dict(zip(self.names, own, strict=True))
        found = self.function(*args, **named, **kwargs) if self.keyword else self.function(*own, *args, **kwargs)
        tensors, self.outputs = output_leaves(found)
        return tuple(tensors)

    def together(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Return the residuals of many problems, stacked."""
        if self.looped:
            rows = [self.seeded(*(private(v[i]) for v in flat)) for i in range(len(flat[0]))]
            shapes = {tuple(tuple(part.shape) for part in row) for row in rows}
            if len(shapes) > 1:
                came = f"returning {' or '.join(map(str, shapes))}"
                raise ModelStateError.of("model", came, "residuals of all problems must have the same shapes")
            return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
        flat = tuple(private(v) for v in flat)
        if self.vectorized:
            return self.alone(*flat)
        return torch.func.vmap(self.alone, randomness="same")(*flat)

    @restoring
    def seeded(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Return the residuals of one problem, which draws what every other one draws."""
        with random_state_kept():
            return self.alone(*flat)


@dataclass(eq=False)
class ProblemBatch:
    """Problems of one shape with their data.

    Attributes:
        function: Their function.
        data: What each problem's own data are, (n, ...) each.
        given: The same of all problems as the caller gave them, for derivatives by them.
        module: Holds their parameters where they are linearised.
        evaluations: Forward passes so far.
        linearisations: Jacobians so far.
        route: How Jacobians are taken.
    """

    function: ProblemFunction
    data: list[Tensor]
    given: list[Tensor]
    module: FunctionModule | None = None
    evaluations: int = 0
    linearisations: int = 0
    route: str = ""

    def some(self, which: np.ndarray) -> ProblemBatch:
        """Return some of the problems."""
        picked = torch.from_numpy(which)
        return replace(self, data=[v[picked.to(v.device)] for v in self.data], module=None)

    def connected(self, values: Values, rows: Tensor | None) -> Any:
        """Return the outputs of all problems, or of those in these rows, connected to what the caller gave."""
        given = self.given if rows is None else [v[rows.to(v.device)] for v in self.given]
        found = self.function.together(*values.values(), *given)
        tree = self.function.outputs
        return found if tree is None else tree.build(found)

    @restoring
    def residuals(self, values: Values) -> list[Tensor]:
        """Return the outputs, (n, ...) each."""
        self.evaluations += 1
        with arithmetic(False), random_state_kept():
            return [o.detach() for o in self.function.together(*values.values(), *self.data)]

    @restoring
    def linearised(self, values: Values) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return the outputs and their Jacobians `J[output][parameter]`, `(n, *out, *in)`, by stored numbers."""
        self.evaluations += 1
        self.linearisations += 1
        if self.module is None:
            together, data = self.function.together, self.data
            places = {f"p{i}": value for i, value in enumerate(values.values())}
            self.module = FunctionModule(lambda *own: together(*own, *data), places, keyword=False)
        else:
            with arithmetic(False):
                for held, value in zip(self.module.parameters(), values.values(), strict=True):
                    held.detach().copy_(value)
        checks = "always" if self.function.vectorized else "first"
        run = ModelRun(
            self.module, None, call=self.function.call, parameters=lambda n, p: True, checks=checks, fallback="silent"
        )
        lin = run.recorded().lin
        blocks = problem_jacobians(lin)
        self.route = lin.routes["problems"]
        outputs = [o.detach() for o in lin.outputs]
        if self.function.vectorized and len(outputs[0]) > 1:
            self._check_apart(list(values.values()), outputs)
        return outputs, blocks

    def _check_apart(self, values: list[Tensor], outputs: list[Tensor]) -> None:
        """Run few problems without the others: what is detached couples them without a trace in the Jacobian.

        Raises:
            InputError: They have other residuals then, or the function fails and would do so later.
        """
        flat, many = [*values, *self.data], len(values[0])
        picked = _few(many)
        needed = "each problem's residual must be its own, whichever others are given with it"
        todo = "Write it for one problem, without `vectorized=True`."
        try:
            found = self._detached([v[picked.to(v.device)] for v in flat])
        except (RuntimeError, ValueError, IndexError) as error:
            if must_surface(error):
                raise
            if many > FEW:
                came = f"one that fails for {len(picked)} of {many} problems ({error})"
                need = f"{needed}; tensors of all problems belong in `input`"
                raise InputError.of("model", came, need, todo) from error
            picked = torch.arange(0, many, 2)  # it holds tensors of all problems: move the others instead
            found = [o[picked.to(o.device)] for o in self._detached([*map(_odd_ones_moved, values), *self.data])]
        for whole, few in zip(outputs, found, strict=True):
            rows = whole[picked.to(whole.device)]
            if few.shape != rows.shape or not all(map(_agree, rows, few)):
                raise InputError.of("model", "one whose residuals of some problems depend on others", needed, todo)

    @restoring
    def _detached(self, flat: Sequence[Tensor]) -> list[Tensor]:
        with arithmetic(False), random_state_kept():
            return [o.detach() for o in self.function.together(*flat)]


# ---- what the caller gives ---------------------------------------------------------------------------------------


def problems_of(
    model: Any, params: Any, value: Any, shared: Shared, vectorized: bool, call: str
) -> tuple[ProblemBatch, Values, type]:
    """Return the problems that a caller means, the parameters they begin at, (n, ...) by name, and their form.

    Raises:
        InputTypeError: An argument is of the wrong kind, or the function cannot be called as it would be.
        InputError: First axes differ, or there is no problem.
    """
    check_flag("vectorized", vectorized)
    stacked = _stacked(model, params)
    values = {name: stacked._parameters[name].detach() for name in stacked.names}  # pyright: ignore[reportOptionalMemberAccess]
    input_leaves(value)
    leaves, tree = rows_apart(value, "input", shared) if value is not None else ([], None)
    many = _many(params, {f"params{_label(params, n)}": v for n, v in values.items()}, leaves, tree)
    function = ProblemFunction(stacked.function, stacked.names, stacked.keyword, tree, vectorized, call)
    one = function_module(stacked.function, _one(params)) if isinstance(params, Mapping) else None
    (one or stacked).check_arguments(value)
    given = [out_of_inference(leaf) for leaf in leaves]
    data = [leaf.detach() for leaf in given]
    kind = Tensor if isinstance(params, Tensor) else dict if isinstance(params, Mapping) else type(params)
    batch = ProblemBatch(function, data, given)
    if not vectorized:
        _settle_way(function, [*values.values(), *data], many)
    return batch, values, kind


def _one(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[0] for name, value in params.items()}


def _label(params: Any, name: str) -> str:
    return f"['{name}']" if isinstance(params, Mapping) else name.removeprefix("x")


def _stacked(model: Any, params: Any) -> FunctionModule:
    """Return the function and its stacked parameters; of a module, those that `params` names are its own, stacked."""
    if not isinstance(model, nn.Module):
        return function_module(model, params)
    if not isinstance(params, Mapping):
        came, todo = f"a {type(params).__name__}", "`torch.func.stack_module_state([...])[0]` makes it of many modules."
        raise InputTypeError.of("params", came, "a module needs a dict of stacked parameters by name", todo)
    structure = structure_of(model)
    check_state(structure)
    module = structure.model
    known = dict(module.named_parameters(remove_duplicate=False))
    for name in params:
        if name not in known:
            raise InputError.of("params", f"naming {name!r}", f"the module's parameters are {list(known)}")
    state = {n: v for n, v in known.items() if n not in params}
    buffers = dict(module.named_buffers())

    def function(*args: Any, **kwargs: Any) -> Any:
        own = {name: kwargs.pop(name) for name in params}
        kept = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        return functional_call(module, {**state, **kept, **own}, args, kwargs)

    return function_module(function, params)


def _many(params: Any, named: Mapping[str, Tensor], leaves: Sequence[Any], tree: Tree | None) -> int:
    """Return how many problems there are.

    Raises:
        InputTypeError: An input is no tensor.
        InputError: First axes differ, or there is no problem.
    """
    first = next(iter(named))
    for name, value in named.items():
        if not value.ndim:
            needed = "a first axis that counts the problems is needed"
            raise InputError.of(name, "of shape ()", needed, "Call `.unsqueeze(-1)` on a vector of numbers.")
    many = len(named[first])
    if not many:
        raise InputError.of(first, "empty", "at least one problem is needed")
    for name, value in (*named.items(), *zip(tree.names if tree else (), leaves, strict=True)):
        if not isinstance(value, Tensor):
            raise InputTypeError.of(
                name, f"a {type(value).__name__}", "a tensor is needed", "Name others in `shared=`."
            )
        if not value.ndim or len(value) != many:
            came, needed = (
                f"of shape {tuple(value.shape)}",
                f"a first axis of {many} problems, as `{first}` has, is needed",
            )
            raise InputError.of(name, came, needed, "Name in `shared=` what all problems have in common.")
    return many


@restoring
def _settle_way(function: ProblemFunction, flat: list[Tensor], many: int) -> None:
    """Find out whether the function can be run for all problems at once; it is looped over where it cannot."""
    picked = sorted({0, many // 2, many - 1})[:_CHECKED]
    with arithmetic(False):
        alone = [function.seeded(*(private(v[i]) for v in flat)) for i in picked]
    function.looped = False
    reason = _disagreement(function, flat, picked, alone)
    if reason:
        function.looped = True
        warn(f"{function.call}: the function was run for one problem after another, since {reason}.")


@restoring
def _disagreement(
    function: ProblemFunction, flat: list[Tensor], picked: list[int], alone: list[tuple[Tensor, ...]]
) -> str:
    """Return why the function cannot be vectorised, empty where it can."""
    rows = torch.tensor(picked)
    try:
        with arithmetic(False), random_state_kept():
            found = function.together(*(v[rows.to(v.device)] for v in flat))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if must_surface(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torch.func.vmap does not take it ({first[:120].rstrip('.')})"
    for own, batched in zip(zip(*alone, strict=True), found, strict=True):
        if not all(map(_agree, own, batched)):
            return "torch.func.vmap gives other values than the function alone"
    return ""


def _agree(one: Tensor, row: Tensor) -> bool:
    """Return whether residuals of a problem are those that it has alone, up to rounding."""
    size = float(one.abs().nan_to_num(0.0).amax()) if one.numel() else 0.0
    most = _AGREE * torch.finfo(one.dtype).eps * size
    return one.shape == row.shape and torch.allclose(one, row, rtol=0.0, atol=most, equal_nan=True)


def _few(many: int) -> Tensor:
    """Return a few of many problems, or one of few."""
    return torch.tensor(sorted({0, many // 2, many - 1}) if many > _CHECKED else [many // 2])


def _odd_ones_moved(value: Tensor) -> Tensor:
    moved = value.clone()
    moved[1::2] += 0.01 * (1 + moved[1::2].abs())  # far more than rounding, and near enough to be in the domain
    return moved


def private(value: Any) -> Any:
    """Return a copy of a tensor, with its graph, that a function may write into; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = out_of_inference(value)
    return value.clone() if value.layout is torch.strided else value
