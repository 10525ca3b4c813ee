"""Reading a recorded graph: its wiring, which Python Functions it holds, and which leaves it ends in."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle

from ...errors import NotDifferentiableError

_REENTRANT = "CheckpointFunctionBackward"
_TWICE_REFUSED = "Error"
_SAVED, _RAW = "_saved_", "_raw_saved_"
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_PLAIN_TYPES = frozenset(_PLAIN)


class GraphInfo(NamedTuple):
    """The result of one walk over a graph.

    Attributes:
        functions: Names of custom autograd Functions.
        reentrant: A reentrant checkpoint is among them, which answers `backward()` only.
        refuses_twice: A `once_differentiable` backward cuts the graph at a node.
        leaves: The leaf tensors the graph ends in, by identity, with the places of their nodes; -1 for one walked from.
        nodes: All nodes with their places in the walk, which are the same for every graph of this wiring.
        wiring: Types of nodes, their connections, and the numbers, flags and words that they hold.
        sizes: Shapes of the tensors walked from, and those that nodes hold.
    """

    functions: tuple[str, ...]
    reentrant: bool
    refuses_twice: bool
    leaves: Mapping[int, int]
    nodes: Mapping[Any, int]
    wiring: tuple[Any, ...]
    sizes: tuple[Any, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What graphs share that a proof is about: by a flag, a forward may view values in other shapes."""
        return self.wiring, self.sizes


@dataclass(frozen=True)
class _Kind:
    """What is the same for all nodes of a type.

    Attributes:
        name: The node's name.
        scalars: Reads the saved values that are no tensors and no sizes.
        sizes: Reads the sizes.
        tensors: Attributes of the saved tensors.
        custom: It is a Python Function's.
        leaf: It ends in a leaf.
        refuses: It stands where a `once_differentiable` backward cut the graph.
    """

    name: str
    scalars: attrgetter[Any] | None
    sizes: attrgetter[Any] | None
    tensors: tuple[str, ...]
    custom: bool
    leaf: bool
    refuses: bool = False


_kinds: dict[type, _Kind] = {}


def _kind(node: Any) -> _Kind:
    if isinstance(node, BackwardCFunction):  # not kept: its type may be one of many that a program makes
        return _Kind(node.name(), None, None, ("saved_tensors",), True, False)  # pyright: ignore[reportAttributeAccessIssue]
    names, name = dir(type(node)), node.name()
    tensors = tuple(_SAVED + n.removeprefix(_RAW) for n in names if n.startswith(_RAW))
    others = [n for n in names if n.startswith(_SAVED) and n not in tensors and not n.endswith("strides")]
    scalars, sizes = [n for n in others if not _is_size(n)], [n for n in others if _is_size(n)]
    last = name.rpartition("::")[2]
    read, refuses = _reader(scalars), last == _TWICE_REFUSED
    found = _Kind(name, None if refuses else read, _reader(sizes), tensors, False, last == "AccumulateGrad", refuses)
    return _kinds.setdefault(type(node), found)


def _reader(names: Sequence[str]) -> attrgetter[Any] | None:
    return attrgetter(*names) if names else None


def _is_size(name: str) -> bool:
    """Sizes are kept apart from the wiring, in which graphs of other batches are alike."""
    return "_sym_" in name or name.endswith("sizes")


def saved_tensors(node: Any) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors that a node keeps, by attribute; several in one attribute are numbered."""
    for name in (_kinds.get(type(node)) or _kind(node)).tensors:
        try:
            value = getattr(node, name)
        except RuntimeError:  # freed, or written into since
            continue
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            yield from ((f"{name}.{i}", v) for i, v in enumerate(value) if isinstance(v, Tensor))


def refuse_cut(call: str, functions: Sequence[str], results: Sequence[Tensor | None]) -> None:
    """Refuse derivatives that cannot be differentiated again because a backward on the way cut their graph.

    Args:
        call: The public call.
        functions: The custom autograd Functions that were met; without any nothing is cut.
        results: What cotangents that require grad gave.

    Raises:
        NotDifferentiableError: A backward is marked once_differentiable.
    """
    if functions and inspect_graph([t for t in results if t is not None]).refuses_twice:
        raise NotDifferentiableError(
            f"{call}: the graph holds {', '.join(functions)}, whose backward is marked once_differentiable: its second "
            "derivative does not exist, and torch would drop it silently. Write its backward with differentiable "
            "operations."
        )


def inspect_graph(tensors: Iterable[Tensor], hooks: int = 0) -> GraphInfo:
    """Walk the graph behind `tensors` once; of its `hooks`, which no node shows, the number is noted."""
    pairs = [(tensor, tensor.grad_fn) for tensor in tensors]
    wiring: list[Any] = [hooks, *[tensor.output_nr for tensor, _ in pairs]]
    sizes: list[Any] = [tensor.shape for tensor, _ in pairs]
    leaves = {id(tensor): -1 for tensor, root in pairs if root is None and tensor.requires_grad}
    stack: list[Any] = list(dict.fromkeys([root for _, root in pairs if root is not None]))
    numbers: dict[Any, int] = {root: i for i, root in enumerate(stack)}
    functions, refuses = {}, False
    while stack:
        node = stack.pop()
        type_ = type(node)
        wiring.append(type_)
        kind = _kinds[type_] if type_ in _kinds else _kind(node)
        if kind.leaf:
            leaves[id(node.variable)] = numbers[node]
            continue
        for parent, number in node.next_functions:
            if parent is not None and parent not in numbers:
                numbers[parent] = len(numbers)
                stack.append(parent)
            place = None if parent is None else numbers[parent]
            wiring.append((place, number) if number else place)
        if kind.sizes is not None:
            sizes.append(kind.sizes(node))
        if kind.scalars is not None:
            value = kind.scalars(node)
            wiring.append(value if type(value) in _PLAIN_TYPES else _frozen(value))
        elif kind.custom:
            functions[kind.name] = None
            wiring.append(_context(node))
        elif kind.refuses:
            refuses = True
    named = tuple([name.removesuffix("Backward") for name in functions]) if functions else ()
    return GraphInfo(named, _REENTRANT in functions, refuses, leaves, numbers, tuple(wiring), tuple(sizes))


def _frozen(value: Any) -> Any:
    if type(value) is tuple and _PLAIN_TYPES.issuperset(map(type, value)):
        return value
    if isinstance(value, _PLAIN):
        return value
    return tuple([_frozen(item) for item in value]) if isinstance(value, tuple | list) else str(value)


def _context(node: Any) -> Any:
    """Return the numbers, flags and words that a Python Function keeps on its context."""
    kept = getattr(node, "__dict__", None) or {}
    return tuple((name, value) for name, value in kept.items() if isinstance(value, _PLAIN))


def shows_all(info: GraphInfo, start: int) -> bool:
    """Return whether a graph holds all that torch recorded in this thread from its node `start` on, and no more.

    Every node gets a number, also one that nothing refers to: that of a Python Function whose arguments need no
    gradient, as a reentrant checkpoint is that loses those of the weights inside. No wiring shows these. What runs
    inside of a Python Function does not show either.
    """
    made, held = next_node() - start, len(info.nodes) - len(info.leaves)
    return not info.functions and made == held and min(map(_number, info.nodes), default=start) >= start


_number = methodcaller("_sequence_nr")
# Torch's counter of nodes is not public; without one it is not known what a graph shows.
next_node: Callable[[], int] = getattr(torch.autograd, "_get_sequence_nr", lambda: -1)


def next_hook() -> int:
    """Return the number of the next hook of this process: no node shows its hooks, which torch counts."""
    return RemovableHandle.next_id


def parents_first(roots: Iterable[Any], ends: Collection[Any] = ()) -> list[Any]:
    """Return all nodes behind `roots`, each after those it was computed from; nothing behind `ends`."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if node not in ends:
                stack += [
                    (parent, False) for parent, _ in node.next_functions if parent is not None and parent not in seen
                ]
    return order


def reaches(tensor: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Return whether `tensor` is one of these or was computed from one, as far as its graph shows."""
    leaves = list(leaves)
    behind = inspect_graph([tensor])
    made = {leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None}
    return any(leaf is tensor or id(leaf) in behind.leaves for leaf in leaves) or not made.isdisjoint(behind.nodes)


def passed_bytes(nodes: Iterable[Any]) -> int:
    """Return the bytes of all cotangents of one backward pass, apart from nested tensors, which have no sizes."""
    kinds = (kind for node in nodes for kind in getattr(node, "_input_metadata", ()))
    return sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in kinds if not kind.is_nested_tensor)


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor has sizes and entries in memory: nested ones and torch's implicit zeros have not."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor._is_zerotensor()  # pyright: ignore[reportAttributeAccessIssue]


def saved_bytes(nodes: Iterable[Any], apart_from: Iterable[Tensor] = ()) -> int:
    """Return the bytes of memory that the nodes' saved tensors keep, each piece counted once."""
    known = {t.untyped_storage().data_ptr() for t in apart_from}
    total = 0
    for node in nodes:
        for _, tensor in saved_tensors(node):
            if is_dense(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    known.add(storage.data_ptr())
                    total += storage.nbytes()
    return total
