"""The parameters of a JAX model: a pytree in parts, arrays to differentiate by, other arrays, and what is no array."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .._space import Space
from ..errors import InputTypeError, ModelStateError, NotDifferentiableError
from .crossing import is_floating, to_jax, torch_dtype

Picked = Callable[[str, Any], bool]
Kind = Literal["picked", "frozen", "static"]


class Same:
    """Any object compared by identity, also where it has no hash of its own; a bound method by what it is bound to."""

    def __init__(self, of: Any) -> None:
        self.of = of
        bound = isinstance(of, MethodType)
        self._parts = (of.__self__, of.__func__) if bound else (of,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and [*map(id, self._parts)] == [*map(id, other._parts)]

    def __hash__(self) -> int:
        return hash(tuple(map(id, self._parts)))


@dataclass(frozen=True)
class Structure:
    """The shape of a tree of parameters; a None in it is no leaf, as JAX has it, and is returned in its place.

    Attributes:
        spec: JAX's own description of it.
        kinds: Of the leaves, in the order of the tree: differentiated, other arrays, and everything that is no array.
        static: Those that are no arrays, such as activation functions and rates: part of the program, not of the data.
    """

    spec: Any
    kinds: tuple[Kind, ...]
    static: tuple[Same, ...] = ()

    def build(self, leaves: Sequence[Any], frozen: Sequence[Any]) -> Any:
        """Return the tree with these leaves to be differentiated and these other arrays."""
        parts = {"picked": iter(leaves), "frozen": iter(frozen), "static": (held.of for held in self.static)}
        return jax.tree_util.tree_unflatten(self.spec, [next(parts[kind]) for kind in self.kinds])


@dataclass(frozen=True, eq=False)
class Parameters:
    """Named arrays, some of them differentiated.

    Attributes:
        structure: How they make the caller's tree.
        leaves: What is differentiated.
        frozen: Other arrays: whole numbers, and what was not picked.
        given: The caller's own objects, one per leaf.
        names: Of the leaves, such as `encoder.0.kernel`.
        space: What a flat vector of them means, on torch's side.
        total: Number of entries of all arrays.
    """

    structure: Structure
    leaves: tuple[jax.Array, ...]
    frozen: tuple[jax.Array, ...]
    given: tuple[Any, ...]
    names: tuple[str, ...]
    space: Space
    total: int

    @classmethod
    def of(cls, params: Any, picks: Picked | None = None, root: str = "params") -> Parameters:
        """Return the parameters in a tree; `picks` returns by name and array which ones are differentiated.

        Args:
            params: A tree of arrays; leaves that are no arrays are kept as they are and passed on.
            picks: Which arrays; those of floating point by default.
            root: What messages call the tree.

        Raises:
            InputTypeError: There is nothing to differentiate, and a leaf is not an array.
            NotDifferentiableError: A leaf that was picked is complex.
            ModelStateError: There is nothing to differentiate.
        """
        paths, spec = jax.tree_util.tree_flatten_with_path(params)
        names, values = leaf_names(params, root), list(_arrays(paths, root))
        kinds: tuple[Kind, ...] = tuple(_kind(name, value, picks) for name, value in zip(names, values, strict=True))
        if "picked" not in kinds:
            raise _nothing(params, root, [v for v, kind in zip(values, kinds, strict=True) if kind != "static"])
        picked = [(n, v, leaf) for n, v, (_, leaf), k in zip(names, values, paths, kinds, strict=True) if k == "picked"]
        kept, leaves, given = zip(*picked, strict=True)
        frozen = tuple(v for v, kind in zip(values, kinds, strict=True) if kind == "frozen")
        static = tuple(Same(v) for v, kind in zip(values, kinds, strict=True) if kind == "static")
        shapes = tuple(torch.Size(a.shape) for a in leaves)
        dtypes = tuple(torch_dtype(a.dtype, n) for n, a, _ in picked)
        space = Space(kept, shapes, dtypes, torch.device("cpu"))
        total = sum(a.size for a in (*leaves, *frozen))
        return cls(Structure(spec, kinds, static), leaves, frozen, given, kept, space, total)

    @property
    def tree(self) -> Any:
        """The caller's tree, its arrays as JAX holds them."""
        return self.structure.build(self.leaves, self.frozen)

    def dtypes(self) -> list[str]:
        """Return the names of all floating-point dtypes among the arrays, in order."""
        return sorted({str(a.dtype) for a in (*self.leaves, *self.frozen) if is_floating(a)})

    def check(self) -> None:
        """Refuse parameters of a precision that JAX is not configured for at the moment.

        Raises:
            InputError: There are some; the message names one.
        """
        for leaf, name in zip(self.leaves, self.names, strict=True):
            to_jax(leaf, name)


def leaf_names(params: Any, root: str = "params") -> tuple[str, ...]:
    """Return a name for every leaf of a tree: its path joined by dots, or as JAX writes it where that is ambiguous."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    short = tuple(jax.tree_util.keystr(path, simple=True, separator=".") or root for path in paths)
    if len(set(short)) == len(short):
        return short
    return tuple(root + jax.tree_util.keystr(path) for path in paths)  # {"a.b": …, "a": {"b": …}}


def _arrays(paths: Sequence[tuple[Any, Any]], root: str) -> Iterator[Any]:
    """Yield every array as one of its own, so that one that is used in two places is distinguished by identity."""
    places = Counter(id(leaf) for _, leaf in paths)
    for path, leaf in paths:
        if not _is_array(leaf):
            yield leaf
            continue
        array = to_jax(leaf, root + jax.tree_util.keystr(path))
        yield jnp.array(array) if places[id(leaf)] > 1 else array


def _is_array(leaf: Any) -> bool:
    kind = getattr(getattr(leaf, "dtype", None), "kind", "f")
    return isinstance(leaf, jax.Array | torch.Tensor | np.ndarray | np.generic) and kind not in "OSUMm"


def _kind(name: str, value: Any, picks: Picked | None) -> Kind:
    if not isinstance(value, jax.Array):
        return "static"
    if picks is not None and not picks(name, value):
        return "frozen"
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        todo = "Hold real and imaginary parts as two arrays."
        raise NotDifferentiableError.of(name, f"of dtype {value.dtype}", "operators are real", todo)
    return "picked" if is_floating(value) else "frozen"


def _nothing(params: Any, root: str, arrays: Sequence[Any]) -> InputTypeError | ModelStateError:
    """Return the error for a tree without anything to differentiate: arrays may have been lost on the way."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: node is None)[0]:
        if not _is_array(leaf):
            name = root + jax.tree_util.keystr(path)
            return InputTypeError.of(name, f"a {type(leaf).__name__}", "an array is needed to differentiate by")
    todo = "Pass a pytree with arrays of floating-point numbers, or pick some of them."
    came = f"a tree of {len(arrays)} arrays in which none is to be differentiated"
    return ModelStateError.of(root, came, "there is nothing to differentiate", todo)
