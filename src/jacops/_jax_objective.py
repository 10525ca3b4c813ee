"""JaxObjective: a JAX model with its loss, one batch at a time, spoken to in torch tensors and operators."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from ._finite import check_outputs, is_finite, where_first
from ._jax.crossing import is_floating, to_jax, to_numpy, to_torch, tree_to_jax, viewed
from ._jax.model import Model, Point, model_of, weighted_loss
from ._jax.parameters import Parameters, leaf_names
from ._picks import Picks, picked
from ._reduction import offset
from ._runtime.contexts import eager
from ._torch.protocol import Likelihood, Reduction, computed_likelihood
from .errors import InputError, InputTypeError, NonFiniteError, explain
from .objective import Objective
from .operators import Matrix, Operator
from .space import Space

Apply = Callable[[Any, Any], Any]
JaxLoss = Callable[[Any, Any], Any]


class JaxObjective(Objective):
    """A JAX model with its loss.

    Batches may hold arrays of JAX or NumPy, or torch tensors; results are torch tensors on the processor. Nothing is
    cast: inputs, targets and parameters of floating point have one precision, the one JAX is configured for.

    Args:
        apply: `apply(params, x) -> output`, pure.
        params: A pytree of arrays; those of whole numbers are passed on and not differentiated, as is a None.
        loss: `loss(output, y)`, one number, pure.
        parameters: Which parameters: None takes all of floating point; name patterns (`"encoder.*"`), one or several,
            or a function of name and array pick some.
        reduction: How the loss reduces a batch; by default what `loss.reduction` says, else the mean.

    Raises:
        InputTypeError: `apply` or `loss` is not callable, or a leaf of `params` is not an array.
        InputError: A pattern fits no parameter, or JAX as it is configured cannot hold a dtype.
        ModelStateError: There is nothing to differentiate.
    """

    def __init__(
        self, apply: Apply, params: Any, loss: JaxLoss, *, parameters: Picks = None, reduction: Reduction | None = None
    ) -> None:
        for name, value, needed in (("apply", apply, "apply(params, x)"), ("loss", loss, "loss(output, y)")):
            if not callable(value):
                raise InputTypeError(explain(name, f"a {type(value).__name__}", f"a callable `{needed}` is needed"))
        if reduction not in (None, "mean", "sum"):
            raise InputError(explain("reduction", repr(reduction), "one of ('mean', 'sum') is needed"))
        self._options = {"parameters": parameters, "reduction": reduction}
        self.apply, self.loss = apply, loss
        self.reduction = reduction or ("sum" if getattr(loss, "reduction", "mean") == "sum" else "mean")
        self.parameters = Parameters.of(params, picked(parameters, leaf_names(params)))
        self.params = self.parameters.structure.build(self.parameters.leaves, self.parameters.frozen)
        self._weights: Tensor | None = None

    @property
    def space(self) -> Space:
        """The parameters that are differentiated, named by their place in the tree."""
        return self.parameters.space

    @property
    def parameters_total(self) -> int:
        """Entries of the whole tree."""
        return self.parameters.total

    @cached_property
    def model(self) -> Model:
        """The compiled derivatives, shared by all objectives with these functions."""
        loss = self.loss if self._weights is None else weighted_loss(self.loss)
        return model_of(self.apply, loss, self.parameters.structure)

    def changed(
        self, *, loss: JaxLoss | None = None, parameters: Picks = None, reduction: Reduction | None = None, **other: Any
    ) -> JaxObjective:
        """Return the objective with other options, or with another loss.

        Raises:
            InputError: There is no such option: JAX draws no random numbers by itself.
        """
        if other:
            todo = "Pass the random key to `apply` as a part of `params` or `x`."
            raise InputError(explain(next(iter(other)), "given", "a JAX model is a pure function", todo))
        given = {"parameters": parameters, "reduction": reduction}
        options = {**self._options, **{name: value for name, value in given.items() if value is not None}}
        return JaxObjective(self.apply, self.params, loss or self.loss, **options)

    def weighted(self, weights: Tensor) -> JaxObjective:
        """Return the objective whose batch loss is the sum of its rows' own losses times `weights`."""
        other = copy(self)
        other.reduction, other._weights = "sum", weights
        vars(other).pop("model", None)  # its loss is another one
        return other

    def point(self) -> Tensor:
        """Return the parameters as they are, `(P,)`."""
        return self.space.join([to_torch(leaf).unsqueeze(0) for leaf in self.parameters.leaves])[0]

    def batch(self, x: Any, y: Any, call: str) -> Point:
        """Return a point for the model: parameters and a batch as JAX's arrays, surveyed.

        Raises:
            InputError: A dtype does not fit, the loss is not one number, or `y` would broadcast against the output.
            InputTypeError: A leaf of the batch is not an array.
            NotDifferentiableError: No path leads from the loss to any parameter.
        """
        self.parameters.check()
        x, y = tree_to_jax(x, "x"), tree_to_jax(y, "y")
        known = self.parameters.dtypes()
        for name, part in (("x", x), ("y", y)):
            for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]:
                if is_floating(leaf) and str(leaf.dtype) not in known:
                    needed = f"the parameters are of {', '.join(known)}; nothing is cast"
                    came = f"of dtype {leaf.dtype}"
                    raise InputError(explain(name + jax.tree_util.keystr(path), came, needed))
        if self._weights is not None:
            y = (y, to_jax(self._weights.to(self.space.dtype), "weights"))
        point = Point(self.parameters.leaves, self.parameters.frozen, x, y)
        self.model.survey(point, call)
        return point

    @eager
    def value(self, x: Any, y: Any) -> float:
        """Return the loss of a batch.

        Raises:
            NonFiniteError: It is NaN or Inf.
        """
        point = self.batch(x, y, "value")
        return self._finite(self.model.value(point), point, "value")

    def value_near(self, x: Any, y: Any) -> float:
        """Return the loss of a batch at parameters that are a little off, always the same ones; it may be NaN."""
        point = self.batch(x, y, "value")
        moved = [leaf + to_jax(offset(to_torch(leaf), i), "params") for i, leaf in enumerate(point.leaves)]
        return float(self.model.value(point._replace(leaves=tuple(moved))))

    @eager
    def gradient(self, x: Any, y: Any) -> Tensor:
        """Return the gradient `(P,)` of a batch's loss.

        Raises:
            NonFiniteError: The loss or its gradient is NaN or Inf.
        """
        return self.gradient_at(self.batch(x, y, "gradient"), "gradient")

    def gradient_at(self, point: Point, call: str) -> Tensor:
        """Return the gradient `(P,)` at a point that `batch` made.

        Raises:
            NonFiniteError: The loss or its gradient is NaN or Inf.
        """
        value, flat = self.model.gradient(point, call)
        self._finite(value, point, call)
        gradient = to_torch(flat)
        check_rows(call, gradient.unsqueeze(0), self.space)
        return gradient

    def _finite(self, value: Any, point: Point, call: str) -> float:
        """Return a loss as a number, if it is one."""
        if not np.isfinite(value):
            leaves = jax.tree.leaves(self.model.output(point))
            check_outputs(call, [to_torch(leaf) for leaf in leaves], [f"output {i}" for i in range(len(leaves))])
            raise NonFiniteError(f"{call}: the loss is {float(value)}; the model's output is finite.")
        return float(value)

    @eager
    def hessian(self, x: Any, y: Any) -> Operator:
        """Return the Hessian of a batch's loss, one sweep per product.

        Raises:
            NotDifferentiableError: What JAX gives is not symmetric, so a part of it was dropped.
            NonFiniteError: The loss is NaN or Inf.
        """
        point = self.batch(x, y, "hessian")
        self._finite(self.model.value(point), point, "hessian")
        self.model.check_twice(point, "hessian")
        return JaxCurvature("hessian", point, self.space, self.model)

    @eager
    def ggn(self, x: Any, y: Any) -> Operator:
        r"""Return $J^\top H_{loss} J$ of a batch's loss; it is positive where the loss is convex.

        Raises:
            NotDifferentiableError: An output is not of floating point.
            NonFiniteError: The loss is NaN or Inf.
        """
        point = self.batch(x, y, "ggn")
        self._finite(self.model.value(point), point, "ggn")
        return JaxCurvature("ggn", point, self.space, self.model)

    @eager
    def sample_gradients(self, x: Any, y: Any) -> Operator:
        """Return the gradients of `loss(apply(params, x[i:i+1]), y[i:i+1])`, `(n, P)`.

        Raises:
            InputError: The leading axes differ.
            NonFiniteError: A gradient is NaN or Inf.
        """
        many, point = self._rows(x, y, "sample_gradients")
        found = self.model.sample_gradients(point, self.space.dim) if many else []
        matrix = filled(found, (many, self.space.dim), self.space.dtype)
        check_rows("sample_gradients", matrix, self.space)
        return Matrix(matrix, domain=self.space)

    def fisher(self, kind: str, x: Any, y: Any, first: int = 0) -> Operator:
        r"""Return the empirical Fisher matrix of a batch in the scale of its loss, as `jacops.fisher` defines it.

        Raises:
            InputError: Another kind is asked for; they need the distribution that the loss stands for.
        """
        if kind != "empirical":
            name = "fisher" if kind == "exact" else f"{kind}_fisher"
            came = f"{name!r}, the Fisher matrix of kind {kind!r}"
            raise InputError(explain("curvature", came, "JAX models have 'hessian', 'ggn' and 'empirical_fisher'"))
        gradients = self.sample_gradients(x, y)
        many = gradients.shape[0]
        if many == 0:
            return gradients.T @ gradients
        terms, total = self._scale(x, y, many)
        if bool((terms == terms[0]).all()):
            return float(terms[0]) ** 2 / total * (gradients.T @ gradients)
        scaled = Matrix(gradients.dense() * terms.to(self.space.dtype).unsqueeze(1), domain=self.space)
        return (1.0 / total) * (scaled.T @ scaled)

    def _scale(self, x: Any, y: Any, many: int) -> tuple[Tensor, float]:
        """Return of how many terms each row's own loss is the mean, and the denominator of the loss."""
        ones = torch.ones(many, dtype=torch.float64)
        if self.reduction == "sum":
            return ones, 1.0
        found = self._likelihood(self.batch(x, y, "fisher"))
        return (ones, float(many)) if found is None else found.scale(many)

    def _likelihood(self, point: Point) -> Likelihood | None:
        """Return the likelihood of the loss by its slopes; None where it has none, or several outputs or targets."""
        leaves, tree = jax.tree.flatten(self.model.output(point))
        targets, form = jax.tree.flatten(point.y)
        if len(leaves) != 1 or len(targets) != 1 or not is_floating(leaves[0]):
            return None
        # Classes stand last here, after the samples in torch.
        turned = leaves[0].ndim > 2 and not is_floating(targets[0])

        def slope(at: Tensor, labels: Tensor) -> Tensor:
            output = jnp.asarray(to_numpy(at.movedim(1, -1) if turned else at))
            target = jax.tree.unflatten(form, [jnp.asarray(to_numpy(labels)).astype(targets[0].dtype)])
            found = jax.grad(lambda leaf: self.model.loss(jax.tree.unflatten(tree, [leaf]), target))(output)
            return to_torch(found).movedim(-1, 1) if turned else to_torch(found)

        output = to_torch(leaves[0])
        return computed_likelihood(slope, output.movedim(-1, 1) if turned else output, to_torch(targets[0]))

    @eager
    def mixed(self, x: Any, y: Any, rows: Tensor) -> Tensor:
        """Return `(k, n, *x)`, the derivative of `rows @ g_i` by sample i's input.

        Raises:
            InputError: `x` has not just one array of floating point.
            NonFiniteError: A derivative is NaN or Inf.
        """
        many, point = self._rows(x, y, "mixed")
        floating = [leaf for leaf in jax.tree.leaves(point.x) if is_floating(leaf)]
        if len(floating) != 1:
            came = f"a tree with {len(floating)} arrays of floating point"
            raise InputError(explain("x", came, "a derivative by the input needs exactly one"))
        leaf = floating[0]
        shape = (rows.shape[0], many, *leaf.shape[1:])
        width = int(np.prod(leaf.shape[1:], dtype=int))
        found = self.model.mixed(point, to_numpy(rows), width * len(rows)) if many and len(rows) else []
        like = to_torch(leaf[:0]).dtype
        result = filled(found, (many, rows.shape[0], width), like).transpose(0, 1).reshape(shape)
        check_rows("mixed", result.reshape(rows.shape[0], many * width), Space.flat(many * width, "x", result))
        return result

    def _rows(self, x: Any, y: Any, call: str) -> tuple[int, Point]:
        """Return a batch whose leaves all have one row per sample, and how many."""
        leaves = jax.tree.leaves((x, y))
        lengths = {leaf.shape[0] if getattr(leaf, "ndim", 0) else -1 for leaf in leaves}
        if len(lengths) != 1 or -1 in lengths:
            raise InputError(explain("x, y", f"of lengths {sorted(lengths)}", "all need one row per sample"))
        many = lengths.pop()
        if many:
            return many, self.batch(x, y, call)
        return 0, Point(self.parameters.leaves, self.parameters.frozen, tree_to_jax(x, "x"), tree_to_jax(y, "y"))

    def fingerprint(self) -> str:
        """Return a digest of all parameters, and of the functions' names and options."""
        digest = hashlib.blake2b(digest_size=16)
        for path, leaf in jax.tree_util.tree_flatten_with_path(self.params)[0]:
            random = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            array = np.ascontiguousarray(jax.random.key_data(leaf) if random else leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode() + array.tobytes())
        tree = jax.tree_util.tree_structure(self.params)
        digest.update(f"{tree} {_named(self.apply)} {_named(self.loss)} {self.reduction} {self.space}".encode())
        return digest.hexdigest()


@final
@dataclass(frozen=True, eq=False, repr=False)
class JaxCurvature(Operator):
    """A curvature of one batch's loss by the parameters of a JAX model.

    Attributes:
        kind: `"hessian"` or `"ggn"`.
        point: Parameters and batch.
        space: The parameters.
        model: The compiled sweeps.
    """

    kind: str
    point: Point
    space: Space
    model: Model
    symmetric = True

    @property
    def domain(self) -> Space:
        """The parameters."""
        return self.space

    @property
    def codomain(self) -> Space:
        """The parameters."""
        return self.space

    @property
    def nbytes(self) -> int:
        """Bytes of the batch; the parameters are the model's own."""
        return sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves((self.point.x, self.point.y)))

    def _apply(self, rows: Tensor) -> Tensor:
        if not rows.shape[0]:
            return torch.zeros_like(rows)
        width = self.space.dim
        sweep = self.model.ggn if self.kind == "ggn" else self.model.second
        found = sweep(self.point, to_numpy(rows), width)
        result = filled(found, (rows.shape[0], width), rows.dtype)
        check_rows(self.kind, result, self.space)
        return result

    _apply_transpose = _apply

    def __repr__(self) -> str:
        how = "compiled" if self.model.compiled else "row by row, uncompiled"
        return f"{super().__repr__().removesuffix(')')}: {self.kind} by {self.space.layout}, JAX, {how})"


def filled(chunks: Sequence[np.ndarray], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return chunks of rows one below the other as one tensor; `dtype` is for where there are none."""
    if not chunks:
        return torch.empty(*shape, dtype=dtype)
    result, start = np.empty(tuple(shape), chunks[0].dtype), 0
    for chunk in chunks:
        result[start : start + len(chunk)] = chunk.reshape(len(chunk), *shape[1:])
        start += len(chunk)
    return viewed(result)


def check_rows(call: str, rows: Tensor, space: Space) -> None:
    """Refuse rows of derivatives that hold NaN or Inf.

    Raises:
        NonFiniteError: Some do; the message names the parameter.
    """
    if is_finite(rows):
        return
    for name, part in zip(space.names, space.split(rows), strict=True):
        if not is_finite(part):
            raise NonFiniteError(
                f"{call}: in the derivative's part for {name}, {where_first(part)} (first axis: row of the result)."
            )


def _named(function: Any) -> str:
    named = getattr(function, "func", function)  # functools.partial
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', type(named).__qualname__)}"
