"""Inputs by samples: rows apart from what all samples share, and one output picked for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .._space import Space
from .._torch.protocol import SampleTarget, Shared, shared_places
from ..errors import InputError
from .adapted import Apply
from .crossing import to_numpy, to_torch
from .jaxpr import READS
from .parameters import Parameters, Same, Structure, leaf_names


@dataclass(frozen=True)
class Apart:
    """An input whose rows are samples, apart from what all of them share.

    Attributes:
        x: The input, in arrays of JAX.
        many: How many samples.
        places: Which of its leaves are shared.
        target: One output per sample.
    """

    x: Any
    many: int
    places: tuple[int, ...] = ()
    target: SampleTarget | None = None

    @classmethod
    def of(cls, x: Any, y: Any, shared: Shared, target: Any) -> Apart:
        """Take an input apart.

        Raises:
            InputError: Its leading axes, or that of `y`, differ; or `shared` or `target` does not fit.
            InputTypeError: `shared` or `target` is of the wrong kind.
        """
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(x)[0]]
        places = tuple(sorted(set(shared_places(paths, shared))))
        leaves = [*_split(jax.tree.leaves(x), places)[0], *jax.tree.leaves(y)]
        lengths = {leaf.shape[0] if getattr(leaf, "ndim", 0) else -1 for leaf in leaves}
        if len(lengths) != 1 or -1 in lengths:
            todo = "Name those that have no axis of samples with `shared=`."
            names = "x" if y is None else "x, y"
            raise InputError.of(names, f"of lengths {sorted(lengths)}", "all need one row per sample", todo)
        many = lengths.pop()
        given = to_torch(target) if isinstance(target, np.ndarray | jax.Array) else target
        return cls(x, many, places, SampleTarget.of(given, many, torch.device("cpu")))

    @property
    def is_plain(self) -> bool:
        """Whether nothing is shared, and no output picked."""
        return not self.places and self.target is None

    @property
    def rows(self) -> tuple[Any, ...]:
        """Leaves with a row per sample, the places of outputs behind them."""
        rows, _ = _split(jax.tree.leaves(self.x), self.places)
        return tuple(rows) if self.target is None else (*rows, jnp.asarray(to_numpy(self.target.places.int())))

    @property
    def held(self) -> tuple[Any, ...]:
        """Shared leaves."""
        return tuple(_split(jax.tree.leaves(self.x), self.places)[1])

    @property
    def space(self) -> Space:
        """What one sample is differentiated by: arrays of floating point with a row for each."""
        names = leaf_names(self.x, "x")
        shared = {names[i] for i in self.places}
        space = Parameters.of(self.x, lambda name, _: name not in shared, root="x").space
        return Space(space.names, tuple(torch.Size(shape[1:]) for shape in space.shapes), space.dtypes, space.device)

    def adapted(self, apply: Apply) -> Apply:
        """Return the function of `rows`, and of its parameters and `held`."""
        return _by_rows(Same(apply), jax.tree.structure(self.x), self.places, self.target is not None)

    def check_target(self, apply: Apply, params: Any) -> None:
        """Refuse places beyond the output's last axis, which JAX would not.

        Raises:
            InputError: There is one.
        """
        if self.target is None or not self.many:
            return
        leaves, spec = jax.tree.flatten(self.x)
        one = jax.tree.unflatten(spec, [leaf if i in self.places else leaf[:1] for i, leaf in enumerate(leaves)])
        try:
            output = jax.eval_shape(apply, params, one)
        except READS:
            output = apply(params, one)
        shape = getattr(output, "shape", ())
        if shape and self.target.largest >= shape[-1]:
            raise InputError.of("target", f"holding {self.target.largest}", f"the last axis has {shape[-1]} entries")


def _split(leaves: Sequence[Any], places: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    """Return the entries elsewhere, and those at some places."""
    return [leaf for i, leaf in enumerate(leaves) if i not in places], [leaves[i] for i in places]


@dataclass(frozen=True)
class Sharing:
    """A structure of parameters, with inputs beside them that all samples share.

    Attributes:
        structure: Of the parameters.
        many: How many inputs.
    """

    structure: Structure
    many: int

    def build(self, leaves: Sequence[Any], frozen: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Return the parameters, and the inputs, which stand behind other arrays that are not differentiated."""
        cut = len(frozen) - self.many
        return self.structure.build(leaves, frozen[:cut]), frozen[cut:]


@lru_cache(maxsize=64)  # as many as compiled programs are kept
def _by_rows(apply: Same, spec: Any, places: tuple[int, ...], picks: bool) -> Apply:
    def of_rows(params: Any, rows: Any) -> Any:
        own, held = params
        shared, each = dict(zip(places, held, strict=True)), iter(rows)
        x = jax.tree.unflatten(spec, [shared[i] if i in shared else next(each) for i in range(spec.num_leaves)])
        output = apply.of(own, x)
        return _picked(output, rows[-1]) if picks else output

    return of_rows


def _picked(output: Any, places: Any) -> Any:
    """Return one output of each sample along the last axis.

    Raises:
        InputError: The output is not one array with an axis to pick from.
    """
    if not hasattr(output, "shape"):
        came = f"given with an output that is a {type(output).__name__}"
        raise InputError.of("target", came, "one array is needed", "Pick one with `outputs=`.")
    many = len(places)
    if many == 1 and output.ndim and output.shape[0] != 1:
        output = output[None]  # the function drops the axis of a single sample
    if output.ndim < 2 or output.shape[0] != many:
        came = f"given with an output of shape {tuple(output.shape)} for {many} samples"
        raise InputError.of("target", came, "an output (n, ..., classes) is needed")
    index = places.reshape(-1, *[1] * (output.ndim - 1))
    return jnp.take_along_axis(output, index, -1).squeeze(-1)
