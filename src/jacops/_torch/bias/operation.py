"""One operation of a running forward, and the same operation applied to other values of its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..._runtime.contexts import random_state_kept, random_states, set_random_states
from ..._runtime.side_effects import tensors_in
from ..._trees import map_nested
from .companions import Precision, wide


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Tables of torch's own operations save time; all others are examined where they are called. These are affine in
# all floating-point arguments together.
_AFFINE = _names(
    "add sub rsub neg sum mean cat stack clone copy _to_copy index gather index_select where masked_fill fill "
    "avg_pool2d _adaptive_avg_pool2d constant_pad_nd cumsum _unsafe_view"
)
# Affine in the arguments at these places together while the others are constant.
_PRODUCTS: dict[str, tuple[set[int], ...]] = {
    **dict.fromkeys(("mul", "mm", "bmm", "mv", "dot"), ({0}, {1})),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addbmm"), ({0, 1}, {0, 2})),
    "convolution": ({0, 2}, {1, 2}),
    "div": ({0},),
}
_NORMS = frozenset(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"))  # affine in x without training
# Results that are entries of the argument at place 0; a second result holds which ones, counted over its last axes.
_SELECTIONS = {
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
}
# Homogeneous and piecewise linear in the argument at place 0, on each entry alone.
_HOMOGENEOUS = frozenset(("leaky_relu", "_prelu_kernel", "abs"))
# Piecewise linear in all floating-point arguments together.
_PIECEWISE = _names(
    "hardtanh clamp clamp_min clamp_max threshold hardsigmoid hardshrink softshrink maximum minimum fmax fmin max min "
    "amax amin sort topk"
)
# Of the shape of an argument, whose values they do not read; some leave their result uninitialised.
_TEMPLATES = _names(
    "empty_like new_empty new_empty_strided zeros_like new_zeros ones_like new_ones full_like new_full rand_like "
    "randn_like randint_like"
)
_MODES = {"mode", "rounding_mode", "reduce"}  # arguments that change what an operation of the same name computes


class Shape(Enum):
    """What is known of a function before it is examined."""

    AFFINE = "affine"
    SELECTION = "some entries of its argument"
    GATE = "the argument where the result is positive, else zero"
    HOMOGENEOUS = "on each entry alone homogeneous of degree one and piecewise linear"
    PIECEWISE = "piecewise linear"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Signature:
    """The properties of an operation that its signature gives.

    Attributes:
        name: Its name, without overload and underscore.
        plain: It has no argument that selects another function.
        ignored: It computes nothing from values: it returns views of its arguments, turns one into a view in place, or
            reads a shape only.
        names: Of its arguments.
        written: Names of the arguments that it writes into.
        draws: It may draw random numbers.
    """

    name: str
    plain: bool
    ignored: bool
    names: tuple[str, ...]
    written: frozenset[str]
    draws: bool

    def shape(self, places: set[int], training: bool) -> Shape:
        """Return what is known of it as a function of the arguments at these places."""
        if not self.plain:
            return Shape.UNKNOWN
        if self.name in _AFFINE or any(places <= allowed for allowed in _PRODUCTS.get(self.name, ())):
            return Shape.AFFINE
        if places == {0} and self.name in ("relu", *_SELECTIONS):
            return Shape.GATE if self.name == "relu" else Shape.SELECTION
        if places == {0} and (self.name in _HOMOGENEOUS or (self.name in _NORMS and not training)):
            return Shape.AFFINE if self.name in _NORMS else Shape.HOMOGENEOUS
        return Shape.PIECEWISE if self.name in _PIECEWISE else Shape.UNKNOWN


@lru_cache(maxsize=4096)
def kind_of(func: Any) -> Signature:
    """Return the properties of an operation that its signature gives."""
    schema = func._schema
    names = tuple(a.name for a in schema.arguments)
    written = frozenset(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    views = bool(schema.returns) and not written and all(r.alias_info is not None for r in schema.returns)
    name = schema.name.partition("::")[2].removesuffix("_")
    ignored = views or torch.Tag.inplace_view in func.tags or name in _TEMPLATES
    draws = torch.Tag.nondeterministic_seeded in func.tags
    return Signature(name, not _MODES & set(names), ignored, names, written, draws)


class OperationCall:
    """A call of an operation, before it runs.

    Args:
        func: The operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        moving: The tensors among them that are replaced by other values; the rest is constant.

    Attributes:
        written: Floating-point tensors that it writes into.
    """

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], moving: Sequence[Tensor]) -> None:
        self.func, self.kind, self.moving = func, kind_of(func), list(moving)
        self._args = dict(zip(self.kind.names, args, strict=False)) | kwargs
        self._positional = len(args)
        self.written = [t for name in self.kind.written for t in tensors_in(self._args.get(name)) if is_followed(t)]
        self._random = random_states() if self.kind.draws else None
        # Copies: the values of these are overwritten by the operation.
        self._found = {id(t): t.detach().clone() for t in self.written}
        self._values: dict[tuple[int, torch.dtype], Tensor] = {}

    def shape(self) -> Shape:
        """Return what is known of the operation as a function of what moves."""
        moving = {id(t) for t in self.moving}
        held = (any(id(t) in moving for t in tensors_in(v)) for v in self._args.values())
        places = {self.kind.names.index(name) for name, holds in zip(self._args, held, strict=True) if holds}
        if any(t.is_complex() for t in self.moving) and self.kind.name not in _AFFINE | set(_PRODUCTS):
            return Shape.UNKNOWN
        return self.kind.shape(places, training=self._args.get("training") is not False)

    def points(self, precision: Precision = wide) -> list[Tensor]:
        """Return the values of what moves as the operation found them."""
        return [self._value(t, precision) for t in self.moving]

    def change(self, tensor: Tensor) -> Tensor:
        """Return by how much the operation changed a tensor that it wrote into, in double precision."""
        return tensor.detach().to(wide(tensor)) - self._found[id(tensor)]

    def gated(self, values: Tensor, result: Tensor) -> Tensor:
        """Return values where a result is positive, else zero: the backward of ReLU, faster than `torch.where`."""
        return torch.ops.aten.threshold_backward(values, result.detach().to(values.dtype), 0)

    def selected(self, values: Tensor, output: Any) -> Tensor:
        """Return the entries that a selection picked, of other values of its argument."""
        axes, indices = _SELECTIONS[self.kind.name], output[1]
        return values.flatten(-axes).gather(-1, indices.flatten(-axes)).view(indices.shape)

    def results(self, output: Any) -> list[Tensor]:
        """Return the floating-point tensors that the operation wrote into or made."""
        return [*self.written, *_made(output, self.written)]

    def at(self, points: Sequence[Tensor], precision: Precision = wide) -> list[Tensor]:
        """Return the results for other values of what moves.

        Args:
            points: These.
            precision: That of the points, in which the operation then runs.
        """
        table = {id(t): p for t, p in zip(self.moving, points, strict=True)}
        written: list[Tensor] = []

        def found(value: Any, writes: bool) -> Any:
            if not isinstance(value, Tensor):
                return _changed(value, self.moving[0], precision) if isinstance(value, torch.dtype) else value
            point = table.get(id(value))
            point = self._value(value, precision) if point is None else point
            if writes and is_followed(value):
                written.append(point := point.clone())
            return point

        given = {
            name: map_nested(value, partial(found, writes=name in self.kind.written))
            for name, value in self._args.items()
        }
        positional = [given.pop(name) for name in self.kind.names[: self._positional]]
        with self._same_draws():
            output = self.func(*positional, **given)
        return [*written, *_made(output, written)]

    def _value(self, tensor: Tensor, precision: Precision) -> Tensor:
        """Return a value as the operation found it; each precision is made once."""
        if not is_followed(tensor):
            return tensor
        key = id(tensor), precision(tensor)
        if key not in self._values:
            self._values[key] = self._found.get(id(tensor), tensor).detach().to(key[1])
        return self._values[key]

    @contextmanager
    def _same_draws(self) -> Iterator[None]:
        """Have a random operation draw what it drew in the forward."""
        if self._random is None:
            yield
            return
        with random_state_kept():
            set_random_states(self._random)
            yield


def _made(output: Any, written: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in tensors_in(output) if is_followed(t) and not any(t is w for w in written)]


def _changed(dtype: torch.dtype, like: Tensor, precision: Precision) -> torch.dtype:
    real = dtype.is_floating_point or dtype.is_complex
    return precision(torch.empty(0, dtype=dtype, device=like.device)) if real else dtype


def is_followed(tensor: Tensor) -> bool:
    """Return whether a tensor can have a derivative and a storage."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout is torch.strided
