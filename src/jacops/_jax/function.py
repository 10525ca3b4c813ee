"""A pure function of JAX with its parameters, as a model that the rest of the library records and maps over samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from torch import Tensor

from .._finite import is_finite
from .._ladder.protocol import SampleRows, Shift, SweepOptions, everything
from .._space import Space
from .._torch.protocol import Likelihood, computed_likelihood
from .._trees import flatten, output_leaves
from ..errors import InputError, InputTypeError
from .adapted import Apply, by_input, itself, key_of, selecting
from .crossing import filled, is_floating, to_jax, to_numpy, to_torch, tree_to_jax
from .layers import JaxLayers
from .linearized import JaxLinearization, JaxRecording
from .model import Model, model_of, weighted_loss
from .parameters import Parameters, Picked, Same, leaf_names
from .points import Point, floating
from .results import check_rows, digest_of, finite_gradient, finite_loss
from .samples import Apart, Sharing

JaxLoss = Callable[[Any, Any], Any]
_MODES = ("auto", "forward", "reverse")


class WeightedRows(NamedTuple):
    """A loss that is the sum of the rows' own losses times weights.

    Attributes:
        loss: Of one row.
        weights: One for each row.
    """

    loss: JaxLoss
    weights: Tensor


class JaxFunction:
    """A pure function of JAX with its parameters: a model, wherever a module goes.

    `jacobian`, `hessian`, `ggn`, `fisher`, `sample_gradients`, `sample_jacobians`, `compute_jacobian`, `model_jvp`,
    `model_vjp` and `Problem` take it as they take a module. Losses for it are functions of arrays of JAX.

    Any pytree holds the parameters: a dict, Flax's `variables` or NNX state, an Equinox module. Arrays of floating
    point are differentiated; whole numbers and random keys are passed on; what is no array (activation functions,
    rates, None) is part of the program. An Equinox module of single samples is
    `JaxFunction(lambda module, x: jax.vmap(module)(x), module)`, a Flax one `JaxFunction(module.apply, variables)`.

    Args:
        apply: `apply(params, x) -> output`, pure; `x` and the output may be trees of arrays, samples along the first
            axis.
        params: A pytree with arrays of floating point.

    Raises:
        InputTypeError: `apply` is not callable, or a leaf of `params` is no array and there is none to differentiate.
        InputError: JAX as it is configured cannot hold a leaf's dtype.
        ModelStateError: There is nothing to differentiate.
    """

    def __init__(self, apply: Apply, params: Any) -> None:
        if not callable(apply):
            came = f"a {type(apply).__name__}"
            raise InputTypeError.of("apply", came, "a callable `apply(params, x)` is needed")
        self.apply = apply
        self._all = Parameters.of(params)
        self.params = self._all.tree
        self._picked: tuple[Any, Parameters] = (None, self._all)

    def picked(self, picks: Picked | None = None) -> Parameters:
        """Return the parameters with those picked by name and array to be differentiated."""
        known, parameters = self._picked
        if known is not picks:
            parameters = self._all if picks is None else Parameters.of(self.params, picks)
            self._picked = picks, parameters
        return parameters

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all leaves, by their paths."""
        return leaf_names(self.params)

    def named(self) -> Iterable[tuple[str, Any]]:
        """Return the arrays that can be differentiated, by their paths."""
        return zip(self._all.names, self._all.given, strict=True)

    @property
    def total(self) -> int:
        """Entries of all arrays."""
        return self._all.total

    def space(self, parameters: Picked | None = None) -> Space:
        """Return the parameters that are differentiated."""
        return self.picked(parameters).space

    def point(self, parameters: Picked | None = None) -> Tensor:
        """Return those as they are, `(P,)`."""
        own = self.picked(parameters)
        return own.space.join([to_torch(leaf).unsqueeze(0) for leaf in own.leaves])[0]

    # ---- one batch -------------------------------------------------------------------------------------------------

    def value(self, loss: Any, x: Any, y: Any, options: SweepOptions, shift: Shift | None = None) -> float:
        """Return the loss of a batch, or at parameters that are moved by `shift`, where it may be NaN.

        Raises:
            NonFiniteError: It is NaN or Inf.
        """
        _, model, point = self.loss_at(loss, x, y, options)
        if shift is None:
            return finite_loss(model, model.value(point), point, options.call)
        moved = (leaf + to_jax(shift(to_torch(leaf), i), "params") for i, leaf in enumerate(point.leaves))
        return float(model.value(point._replace(leaves=tuple(moved))))

    def gradient(self, loss: Any, x: Any, y: Any, options: SweepOptions) -> Tensor:
        """Return the gradient `(P,)` of a batch's loss.

        Raises:
            NonFiniteError: The loss or its gradient is NaN or Inf.
        """
        own, model, point = self.loss_at(loss, x, y, options)
        return finite_gradient(model, point, own.space, options.call)

    def weighted(self, loss: JaxLoss, weights: Tensor) -> WeightedRows:
        """Return a loss that is the sum of the rows' own losses times weights."""
        return WeightedRows(loss, weights)

    def fingerprint(self, loss: Any, more: str) -> str:
        """Return a digest of all parameters, and of the functions' names and of what else distinguishes models."""
        return digest_of(self.params, (self.apply, loss), more)

    # ---- records: pushes and pulls at a point --------------------------------------------------------------------

    def record(self, inputs: Any, options: SweepOptions) -> JaxRecording:
        """Record the output by the parameters picked, or by the inputs.

        Raises:
            InputError: A dtype does not fit, or `at` is given.
            NotDifferentiableError: An output is not of floating point.
        """
        if options.at is not None:
            raise InputError.of("at", repr(options.at), "a JAX function has no submodules to cut at")
        own, model, point = self._at(inputs, None, options)
        connected = model.survey(point, options)
        raw = floating(model.computed_output(point))
        output = jax.tree.map(to_torch, raw)
        leaves, tree = output_leaves(output)
        codomain = Space.of(leaves, tree.names)
        lin = JaxLinearization(model, point, own.space, codomain, model.push, model.pull, options, leaves, connected)
        return JaxRecording(lin, tree, output, raw, model, point)

    def record_loss(self, loss: Any, x: Any, y: Any, options: SweepOptions) -> JaxRecording:
        """Record the gradient of the loss of one batch, by the parameters picked or by the inputs.

        Its Jacobian is the Hessian.

        Raises:
            InputError: The loss is not one number, a dtype does not fit, or `y` would broadcast against the output.
            NotDifferentiableError: No path leads from the loss to any of them, or a second derivative is wrong.
        """
        own, model, point = self._measured(loss, x, y, options)
        return _recorded_gradient(model, point, own, options)

    def record_at_output(self, found: JaxRecording, loss: Any, y: Any, call: str) -> JaxRecording:
        """Record the gradient of a loss by the model's output, at the output that was recorded."""
        output = Parameters.of(found.raw, root="output")
        loss, y = _weighted(loss, tree_to_jax(y, "y"), output)
        point = Point(output.leaves, output.frozen, None, y)
        model = model_of(itself, loss, output.structure)
        options = replace(found.lin.options, call=call)
        model.survey(point, options)
        return _recorded_gradient(model, point, output, options)

    def slope(self, found: JaxRecording) -> Tensor:
        """Return the gradient that was recorded, flat."""
        return to_torch(found.model.gradient(found.point, found.lin.call)[1])

    def likelihood(self, found: JaxRecording, loss: Any, y: Any) -> Likelihood | None:
        """Return the likelihood of a loss by its slopes; None where it has none, or several outputs or targets."""
        leaves, tree = jax.tree.flatten(found.raw)
        targets, form = ([], None) if y is None else jax.tree.flatten(tree_to_jax(y, "y"))
        if len(leaves) != 1 or len(targets) > 1:
            return None

        def slope(at: Tensor, labels: Tensor) -> Tensor:
            output = jnp.asarray(to_numpy(at))
            target = to_jax(labels, "y")
            if targets:
                target = jax.tree.unflatten(form, [target.astype(targets[0].dtype)])
            return to_torch(jax.grad(lambda leaf: loss(jax.tree.unflatten(tree, [leaf]), target))(output))

        return computed_likelihood(slope, to_torch(leaves[0]), to_torch(targets[0]) if targets else None)

    # ---- maps over samples -----------------------------------------------------------------------------------------

    def map_rows(self, x: Any, options: SweepOptions, y: Any = None, loss: Any = None) -> SampleRows:
        """Return the gradient of every sample's loss, or the Jacobian of its output, by parameters or by its input.

        Raises:
            InputError: The leading axes differ, the output is not one array, or `target` or `shared` does not fit.
            NonFiniteError: A derivative is NaN or Inf.
        """
        by_inputs = options.parameters is None
        apart, own, model, point = self._samples(loss, x, y, options)
        many, domain = apart.many, own.space if not by_inputs else apart.space
        if loss is not None:
            found = model.sample_gradients(point, domain.dim, options) if many else []
            shape = ()
        else:
            shape = _one_output(model, point) if many else ()
            narrow = domain.dim < math.prod(shape) and not model.custom
            forward = narrow if _checked_mode(options.mode) == "auto" else options.mode == "forward"
            width = math.prod(shape) * domain.dim
            found = model.sample_jacobians(point, width, options, forward=forward) if many and width else []
        rows = filled(found, (many, math.prod(shape), domain.dim), domain.dtype)
        how = "by JAX's vmap, checked one by one" if model.compiled else "one sample at a time, uncompiled"
        return SampleRows(domain, rows, shape, how)

    def mixed(self, loss: Any, x: Any, y: Any, rows: Tensor, options: SweepOptions) -> Tensor:
        """Return `(k, n, *x)`, the derivative of `rows @ g_i` by sample i's input.

        Raises:
            InputError: `x` has not just one array of floating point.
            NonFiniteError: A derivative is NaN or Inf.
        """
        apart, _, model, point = self._samples(loss, x, y, options)
        many, arrays = apart.many, [leaf for leaf in jax.tree.leaves(point.x) if is_floating(leaf)]
        if len(arrays) != 1:
            came = f"a tree with {len(arrays)} arrays of floating point"
            raise InputError.of("x", came, "a derivative by the input needs exactly one")
        one, like = arrays[0].shape[1:], to_torch(arrays[0][:0])
        width = math.prod(one)
        found = model.mixed(point, to_numpy(rows), width * len(rows), options) if many and len(rows) else []
        result = filled(found, (many, len(rows), width), like.dtype).transpose(0, 1).reshape(len(rows), many, *one)
        check_rows("mixed", result.reshape(len(rows), many * width), Space.flat(many * width, "x", like))
        return result

    def layers(self, x: Any, parameters: Picked | None, call: str) -> JaxLayers:
        """Return the gradients of single samples by layers, for Kronecker-factored curvature.

        Raises:
            NotDifferentiableError: A parameter enters by an operation without a rule; the message names both.
        """
        options = SweepOptions(call, parameters)
        _, own, model, point = self._samples(None, x, None, options)
        return JaxLayers(model, point, own, options)

    # ---- points ----------------------------------------------------------------------------------------------------

    def loss_at(self, loss: Any, x: Any, y: Any, options: SweepOptions) -> tuple[Parameters, Model, Point]:
        """Return the parameters, the compiled loss, and parameters and a batch as JAX's arrays, surveyed.

        Raises:
            InputTypeError: `loss` is not callable, or a leaf of the batch is not an array.
            InputError: A dtype does not fit, the loss is not one number, or `y` would broadcast against the output.
            NotDifferentiableError: No path leads from the loss to any parameter.
        """
        return self._measured(loss, x, y, replace(options, parameters=options.parameters or everything))

    def _measured(self, loss: Any, x: Any, y: Any, options: SweepOptions) -> tuple[Parameters, Model, Point]:
        if not callable(loss) and not isinstance(loss, WeightedRows):
            raise InputTypeError.of("loss", f"a {type(loss).__name__}", "a callable `loss(output, y)` is needed")
        own, model, point = self._at(x, y, options, loss)
        model.survey(point, options)
        return own, model, point

    def _at(self, x: Any, y: Any, options: SweepOptions, loss: Any = None) -> tuple[Parameters, Model, Point]:
        parameters = options.parameters
        own = self.picked(None if parameters is everything else parameters)
        own.check()
        x, y = tree_to_jax(x, "x"), tree_to_jax(y, "y")
        _check_dtypes(x, y, own.dtypes())
        apply = selecting(Same(self.apply), key_of(options.outputs))
        if loss is not None:
            loss, y = _weighted(loss, y, own)
        if parameters is not None:
            return own, model_of(apply, loss, own.structure), Point(own.leaves, own.frozen, x, y)
        inputs = Parameters.of(x, root="x")
        model = model_of(by_input(Same(apply), own.structure), loss, inputs.structure)
        return inputs, model, Point(inputs.leaves, inputs.frozen, (own.leaves, own.frozen), y)

    def _samples(self, loss: Any, x: Any, y: Any, options: SweepOptions) -> tuple[Apart, Parameters, Model, Point]:
        """Return a batch all of whose leaves have one row per sample, and what is known of it."""
        x, y = tree_to_jax(x, "x"), tree_to_jax(y, "y")
        apart = Apart.of(x, y, options.shared, options.target)
        own, model, point = self._at(x, y, replace(options, parameters=options.parameters or everything), loss)
        if not apart.is_plain:
            apart.check_target(model.apply, own.tree)
            structure = Sharing(own.structure, len(apart.held))
            model = model_of(apart.adapted(model.apply), model.loss if model.measured else None, structure)
            point = point._replace(frozen=(*point.frozen, *apart.held), x=apart.rows)
        if apart.many:
            model.survey(point, options)
        return apart, own, model, point


def _recorded_gradient(model: Model, point: Point, own: Parameters, options: SweepOptions) -> JaxRecording:
    value = to_torch(model.value(point))
    if is_finite(value):
        model.check_twice(point, options)
    space = own.space
    codomain = Space(tuple(f"d loss / d {n}" for n in space.names), space.shapes, space.dtypes, space.device)
    lin = JaxLinearization(model, point, space, codomain, model.second, model.second, options)
    return JaxRecording(lin, flatten(value, "loss")[1], value, value, model, point)


def _weighted(loss: Any, y: Any, own: Parameters) -> tuple[JaxLoss, Any]:
    if not isinstance(loss, WeightedRows):
        return loss, y
    return weighted_loss(loss.loss), (y, to_jax(loss.weights.to(own.space.dtype), "weights"))


def _check_dtypes(x: Any, y: Any, known: Sequence[str]) -> None:
    for name, part in (("x", x), ("y", y)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]:
            if is_floating(leaf) and str(leaf.dtype) not in known:
                needed = f"the parameters are of {', '.join(known)}; nothing is cast"
                raise InputError.of(name + jax.tree_util.keystr(path), f"of dtype {leaf.dtype}", needed)


def _one_output(model: Model, point: Point) -> tuple[int, ...]:
    """Return the shape of one sample's output."""
    leaves = jax.tree.leaves(floating(model.computed_output(point._replace(**_first(point)))))
    if len(leaves) != 1:
        came = f"in {len(leaves)} parts"
        raise InputError.of("the model's output", came, "one array is needed", "Pass `outputs=`.")
    shape = leaves[0].shape
    return tuple(shape[1:] if shape and shape[0] == 1 else shape)


def _first(point: Point) -> dict[str, Any]:
    return {"x": jax.tree.map(lambda leaf: leaf[:1], point.x)}


def _checked_mode(mode: str) -> str:
    if mode not in _MODES:
        raise InputError.of("mode", repr(mode), f"one of {_MODES} is needed for a JAX model")
    return mode
