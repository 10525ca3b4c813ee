"""The parameters of a JAX model: a pytree of arrays as named leaves, those that are differentiated and the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch

from ..errors import InputTypeError, ModelStateError, NotDifferentiableError, explain
from ..space import Space
from .crossing import is_floating, to_jax, torch_dtype

Picks = Callable[[str, Any], bool]


@dataclass(frozen=True)
class Structure:
    """The shape of a tree of parameters; a None in it is no leaf, as JAX has it, and is handed back in its place.

    Attributes:
        spec: JAX's own description of it.
        picked: Which leaves are differentiated, in the order of the tree.
    """

    spec: Any
    picked: tuple[bool, ...]

    def build(self, leaves: Sequence[Any], frozen: Sequence[Any]) -> Any:
        """Return the tree with these leaves to be differentiated and these others."""
        first, second = iter(leaves), iter(frozen)
        return jax.tree_util.tree_unflatten(self.spec, [next(first if pick else second) for pick in self.picked])


@dataclass(frozen=True, eq=False)
class Parameters:
    """Named arrays, some of them differentiated.

    Attributes:
        structure: How they make the caller's tree.
        leaves: What is differentiated.
        frozen: Everything else: whole numbers, and what was not picked.
        given: The caller's own objects, one per leaf.
        names: Of the leaves, such as `encoder.0.kernel`.
        space: What a flat vector of them means, on torch's side.
        total: Number of entries of the whole tree.
    """

    structure: Structure
    leaves: tuple[jax.Array, ...]
    frozen: tuple[jax.Array, ...]
    given: tuple[Any, ...]
    names: tuple[str, ...]
    space: Space
    total: int

    @classmethod
    def of(cls, params: Any, picks: Picks | None = None) -> Parameters:
        """Return the parameters in a tree; `picks` says by name and array which ones are differentiated.

        Raises:
            InputTypeError: A leaf is not an array.
            NotDifferentiableError: A leaf that was picked is complex.
            ModelStateError: There is nothing to differentiate.
        """
        paths, spec = jax.tree_util.tree_flatten_with_path(params)
        if not paths:  # a tree of nothing but None: its arrays were lost on the way
            list(_arrays(jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: node is None)[0]))
        names, arrays = leaf_names(params), list(_arrays(paths))
        wanted = [picks is None or bool(picks(name, array)) for name, array in zip(names, arrays, strict=True)]
        picked = tuple(w and _differentiable(n, a) for w, n, a in zip(wanted, names, arrays, strict=True))
        if not any(picked):
            todo = "Pass a pytree with arrays of floating-point numbers, or pick some of them."
            came = f"a tree of {len(arrays)} arrays in which none is to be differentiated"
            raise ModelStateError(explain("params", came, "there is nothing to differentiate", todo))
        leaves = [a for a, pick in zip(arrays, picked, strict=True) if pick]
        kept = tuple(n for n, pick in zip(names, picked, strict=True) if pick)
        return cls(
            Structure(spec, picked),
            tuple(leaves),
            tuple(a for a, pick in zip(arrays, picked, strict=True) if not pick),
            tuple(leaf for (_, leaf), pick in zip(paths, picked, strict=True) if pick),
            kept,
            Space(
                kept,
                tuple(torch.Size(a.shape) for a in leaves),
                tuple(torch_dtype(a.dtype, n) for a, n in zip(leaves, kept, strict=True)),
                torch.device("cpu"),
            ),
            sum(a.size for a in arrays),
        )

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


def leaf_names(params: Any) -> tuple[str, ...]:
    """Return a name for every leaf of a tree: its path joined by dots, or as JAX writes it where that is ambiguous."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    short = tuple(jax.tree_util.keystr(path, simple=True, separator=".") or "params" for path in paths)
    if len(set(short)) == len(short):
        return short
    return tuple("params" + jax.tree_util.keystr(path) for path in paths)  # {"a.b": …, "a": {"b": …}}


def _arrays(paths: Sequence[tuple[Any, Any]]) -> Iterator[jax.Array]:
    """Yield every leaf as an array of its own, so that one that stands in two places is told apart by identity."""
    places = Counter(id(leaf) for _, leaf in paths)
    for path, leaf in paths:
        name = "params" + jax.tree_util.keystr(path)
        array = to_jax(leaf, name)
        if not isinstance(array, jax.Array):
            raise InputTypeError(explain(name, f"a {type(leaf).__name__}", "every leaf must be an array"))
        yield jnp.array(array) if places[id(leaf)] > 1 else array


def _differentiable(name: str, array: jax.Array) -> bool:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        todo = "Hold real and imaginary parts as two arrays."
        raise NotDifferentiableError(explain(name, f"of dtype {array.dtype}", "operators are real", todo))
    return is_floating(array)
