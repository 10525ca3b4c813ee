"""Trees of tensors: tuples, lists, dicts and all types in torch's pytree registry (transformers' outputs too).

A tree is flattened once into named leaves at the edge of a call; everything inside works on flat lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ._requirements import check_dense
from .errors import InputError, InputTypeError, NotDifferentiableError, warn


@dataclass(frozen=True)
class Tree:
    """The shape of a tree: its leaves' names and how to build it again.

    Attributes:
        names: One readable path per leaf, such as `output['logits']`.
        single: True where the tree is one bare leaf.
        spec: torch's own description of the structure.
        held: Places of leaves that stay as they are, and these; they have no name.
    """

    names: tuple[str, ...]
    single: bool
    spec: pytree.TreeSpec
    held: tuple[tuple[int, Any], ...] = ()

    def build(self, leaves: Iterable[Any]) -> Any:
        """Return the tree with these leaves in place of its own."""
        leaves = list(leaves)
        if self.single and not self.held:  # what most calls build
            (leaf,) = leaves
            return leaf
        for place, leaf in self.held:
            leaves.insert(place, leaf)
        return pytree.tree_unflatten(leaves, self.spec)

    def holding(self, leaves: Sequence[Any], places: Iterable[int]) -> tuple[list[Any], Tree]:
        """Return the leaves elsewhere than at some places, and the tree that holds those at these.

        Args:
            leaves: All leaves of a tree that holds none.
            places: Where to hold them.
        """
        held = {place: leaves[place] for place in places}
        if not held:
            return list(leaves), self
        names = tuple(name for i, name in enumerate(self.names) if i not in held)
        free = [leaf for i, leaf in enumerate(leaves) if i not in held]
        return free, replace(self, names=names, held=tuple(sorted(held.items(), key=lambda item: item[0])))

    def free(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the leaves that are not held, given all leaves of such a tree, or these alone."""
        held = dict(self.held) if len(leaves) == len(self.names) + len(self.held) else {}
        return [leaf for i, leaf in enumerate(leaves) if i not in held]

    def map_held(self, change: Callable[[Any], Any]) -> Tree:
        """Return the tree with other leaves in place of those that it holds."""
        return replace(self, held=tuple((place, change(leaf)) for place, leaf in self.held)) if self.held else self


class _Opened:
    """A mapping that torch's registry does not know (a UserDict, transformers' BatchEncoding), as a node of a tree."""

    def __init__(self, mapping: Mapping[Any, Any]) -> None:
        self.mapping = mapping

    def children(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Return keys and values, and what it is built again from."""
        return [(pytree.MappingKey(key), value) for key, value in self.mapping.items()], self.mapping

    @staticmethod
    def built(values: Iterable[Any], mapping: Any) -> Any:
        """Return a copy with other values; a plain dict where it cannot be written into."""
        pairs = dict(zip(mapping, values, strict=True))
        if not isinstance(mapping, MutableMapping):
            return pairs
        made = copy(mapping)
        made.update(pairs)
        return made


pytree.register_pytree_node(
    _Opened,
    lambda node: ([value for _, value in node.children()[0]], node.mapping),
    _Opened.built,
    flatten_with_keys_fn=_Opened.children,
)


def flatten(tree: Any, name: str) -> tuple[list[Any], Tree]:
    """Return the leaves of `tree` and its shape; paths in error messages start with `name`."""
    if type(tree) in _LEAVES:  # what most calls are given
        return [tree], Tree((name,), True, _LEAF)
    if type(tree) is tuple and _FLAT.issuperset(map(type, tree)):  # inputs of a model, or these and a target
        return [*tree], Tree(tuple([f"{name}[{i}]" for i in range(len(tree))]), False, _of_tuple(len(tree)))
    paths, spec = paths_in(tree)
    names = tuple(name + pytree.keystr(path) for path, _ in paths)
    return [leaf for _, leaf in paths], Tree(names, len(paths) == 1 and not paths[0][0], spec)


_LEAVES = (Tensor, torch.nn.Parameter)
_FLAT = frozenset({*_LEAVES, type(None), bool, int, float, str})
_LEAF = pytree.tree_structure(0)


@lru_cache(maxsize=32)
def _of_tuple(length: int) -> pytree.TreeSpec:
    return pytree.tree_structure((0,) * length)


def map_nested(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return lists and tuples with a function applied to what they hold, at any depth.

    Inner functions that call themselves are in a reference cycle, which keeps all that they refer to until the garbage
    collector runs; this takes one that does not.
    """
    if isinstance(value, list | tuple):
        return type(value)([map_nested(entry, function) for entry in value])
    return function(value)


def paths_in(tree: Any) -> tuple[list[tuple[pytree.KeyPath, Any]], pytree.TreeSpec]:
    """Return the leaves of `tree` with their paths, and its structure; every mapping in it is looked into."""
    paths, spec = pytree.tree_flatten_with_path(tree)
    if any(isinstance(leaf, Mapping) for _, leaf in paths):
        return paths_in(pytree.tree_map(lambda leaf: _Opened(leaf) if isinstance(leaf, Mapping) else leaf, tree))
    return paths, spec


def is_differentiable(value: Any) -> bool:
    """Return whether `value` is a tensor of a dtype that has derivatives."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def is_dtensor(value: Any) -> bool:
    """Return whether a value is a tensor that is spread over processes (torch.distributed.tensor)."""
    return type(value).__name__ == "DTensor"


def leaves_for(value: Any, tree: Tree, name: str) -> Any:
    """Return the leaves of a value that is a tree like an output's; tensors and lists of leaves stay as they are."""
    if not isinstance(value, Tensor | list) and not tree.single:
        return [leaf for leaf in flatten(value, name)[0] if leaf is not None]
    if isinstance(value, list) and tree.held:
        return [leaf for leaf in value if leaf is not None]
    return value


class SetAside:
    """A placeholder for a part of a model's output without a derivative (such as a cache) in what a loss is given.

    Args:
        name: The part's path.
        part: The part; it is not kept.
    """

    def __init__(self, name: str, part: Any) -> None:
        came = f"of dtype {part.dtype}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
        self._refusal = name, came

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to be read.

        Raises:
            NotDifferentiableError: Always; the message names the part.
        """
        needed = "no derivative leads through it, so a loss cannot read it"
        todo = "Let the loss read tensors of floating point alone, and pass anything else with the target."
        raise NotDifferentiableError.of(*self._refusal, needed, todo)

    __getitem__ = __iter__ = __len__ = __call__ = __bool__ = __float__ = __int__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions
            raise AttributeError(name)
        return self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = [part for part in (*args, *(kwargs or {}).values()) if isinstance(part, cls)]
        return own[0]._refuse() if own else NotImplemented


_CONSTANTS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


def output_leaves(output: Any, name: str = "output", aside: bool = False) -> tuple[list[Tensor], Tree]:
    """Return the tensors of a model's output and its shape; fields that are None are left out and stay None.

    Args:
        output: A tensor, or a tree of tensors.
        name: How messages call it.
        aside: It goes into a loss, which reads what it needs: leaves without a derivative are held too, constants as
            they are and anything else as `SetAside`.

    Raises:
        InputTypeError: A leaf is not a tensor; the message names it. With `aside`, none is one with a derivative.
        NotDifferentiableError: A leaf is of an integer dtype.
    """
    leaves, tree = flatten(output, name)
    if tree.single and type(output) is Tensor and output.is_floating_point() and output.layout is torch.strided:
        return leaves, tree  # what most models return
    if aside and any(is_differentiable(leaf) for leaf in leaves):
        held = [i for i, leaf in enumerate(leaves) if not is_differentiable(leaf)]
        for i in held:
            leaves[i] = leaves[i] if isinstance(leaves[i], _CONSTANTS) else SetAside(tree.names[i], leaves[i])
    else:
        held = [i for i, leaf in enumerate(leaves) if leaf is None]
    leaves, tree = tree.holding(leaves, held)
    if not leaves:
        came = f"a {type(output).__name__} without tensors"
        raise InputTypeError.of(name, came, "a tensor or a tree of tensors is needed")
    for leaf, path in zip(leaves, tree.names, strict=True):
        if not isinstance(leaf, Tensor):
            todo = "Pick the tensors with `outputs=` (a key, an index or a callable)."
            raise InputTypeError.of(path, f"a {type(leaf).__name__}", "every leaf must be a tensor", todo)
        if not is_differentiable(leaf):
            came = f"of dtype {leaf.dtype}"
            todo = "Return scores rather than labels, or pick another output with `outputs=`."
            raise NotDifferentiableError.of(path, came, "a derivative needs a floating-point output", todo)
        check_dense(path, leaf)
    return leaves, tree


Selector = None | int | str | slice | Sequence[int] | Tensor | Callable[[Any], Any]


def select(output: Any, outputs: Selector, name: str = "output") -> Any:
    """Return the part of `output` that `outputs` picks.

    A callable is applied to the output. For a tuple or a mapping, an index or a name picks an entry; a tensor is
    indexed along its last axis, an integer dropping that axis as in NumPy.

    Raises:
        InputError: There is no such entry; the message lists what there is.
    """
    if outputs is None:
        return output
    if callable(outputs):
        return outputs(output)
    if isinstance(output, Tensor):
        return _select_last(output, outputs, name)
    try:
        if isinstance(outputs, list | tuple) and isinstance(output, Mapping):
            return {key: output[key] for key in outputs}
        if isinstance(outputs, list | tuple):
            return tuple(output[key] for key in outputs)
        return output[outputs]
    except (KeyError, IndexError, TypeError):
        known = (
            list(output) if isinstance(output, Mapping) else range(len(output)) if hasattr(output, "__len__") else "?"
        )
        raise InputError.of("outputs", repr(outputs), f"{name} has {known}") from None


def hint_at_labels(call: str, outputs: Selector, inputs: Any, todo: str = "take all outputs and index the result "
                   "with [torch.arange(n), labels]") -> None:  # fmt: skip
    """Warn where `outputs` looks like one label per sample: it picks the same columns for every sample.

    That is an integer tensor or array with an entry per sample, or a list with an entry per sample and repetitions.

    Args:
        call: The public call.
        outputs: As given to it.
        inputs: The model's.
        todo: How the call gives the output at each sample's own label.
    """
    if outputs is None or callable(outputs) or isinstance(outputs, int | str | slice):
        return
    if isinstance(outputs, list | tuple) and not all(isinstance(o, int) for o in outputs):
        return
    picked = torch.as_tensor(outputs)
    tensors = (leaf for leaf in flatten(inputs, "x")[0] if isinstance(leaf, Tensor) and leaf.ndim)
    samples = next((leaf.shape[0] for leaf in tensors), 0)
    if picked.is_floating_point() or picked.dtype == torch.bool or picked.ndim == 0 or samples < 2:
        return
    columns = isinstance(outputs, list | tuple) and len(set(picked.flatten().tolist())) == picked.numel()
    if picked.shape[0] == picked.numel() == samples and not columns:
        warn(
            f"{call}: `outputs` holds {samples} indices for {samples} samples, and each of them picks a column of "
            f"every sample's output. For the output at each sample's own label {todo}; if columns are meant, pass "
            "`outputs=lambda output: output[..., columns]`."
        )


def _select_last(output: Tensor, outputs: Any, name: str) -> Tensor:
    if isinstance(outputs, str):
        needed = f"{name} is one tensor, which has no names"
        raise InputError.of("outputs", repr(outputs), needed, "Pass indices along its last axis, or a callable.")
    if output.ndim == 0:
        raise InputError.of("outputs", repr(outputs), f"{name} is a scalar, which has no axis to pick from")
    try:
        return output[..., outputs if isinstance(outputs, int | slice | Tensor) else list(outputs)]
    except IndexError:
        came = repr(outputs)
        raise InputError.of("outputs", came, f"the last axis of {name} has {output.shape[-1]} entries") from None
