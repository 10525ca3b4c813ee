"""Reading a recorded graph: which Python Functions it holds, and which leaves it ends in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

_REENTRANT = "CheckpointFunctionBackward"
_TWICE_REFUSED = "Error"


@dataclass(frozen=True)
class Survey:
    """What one walk over a graph saw.

    Attributes:
        functions: Names of custom autograd Functions.
        reentrant: A reentrant checkpoint is among them, which answers `backward()` only.
        refuses_twice: A node stands where a `once_differentiable` backward cut the graph.
        leaves: Identities of the leaf tensors the graph ends in.
        nodes: All nodes, to look up where a tensor that is no leaf was made.
    """

    functions: tuple[str, ...]
    reentrant: bool
    refuses_twice: bool
    leaves: frozenset[int]
    nodes: frozenset[Any]


def survey(tensors: Iterable[Tensor]) -> Survey:
    """Walk the graph behind `tensors` once."""
    tensors = list(tensors)
    stack = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen, functions = set(stack), {}
    leaves = {id(t) for t in tensors if t.requires_grad and t.grad_fn is None}
    refuses = False
    while stack:
        node = stack.pop()
        if isinstance(node, BackwardCFunction):
            functions[node.name()] = None
        elif node.name().rpartition("::")[2] == _TWICE_REFUSED:
            refuses = True
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    named = tuple(name.removesuffix("Backward") for name in functions)
    return Survey(named, _REENTRANT in functions, refuses, frozenset(leaves), frozenset(seen))


def reaches(tensor: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Return whether `tensor` is one of these or was computed from one, as far as its graph shows."""
    leaves = list(leaves)
    behind = survey([tensor])
    made = {leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None}
    return any(leaf is tensor or id(leaf) in behind.leaves for leaf in leaves) or bool(made & behind.nodes)


def passed_bytes(nodes: Iterable[Any]) -> int:
    """Return the bytes of all cotangents of one backward pass."""
    kinds = (kind for node in nodes for kind in getattr(node, "_input_metadata", ()))
    return sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in kinds)


def saved_bytes(nodes: Iterable[Any], apart_from: Iterable[Tensor] = ()) -> int:
    """Return the bytes of memory that the nodes' saved tensors keep, each piece counted once."""
    known = {t.untyped_storage().data_ptr() for t in apart_from}
    total = 0
    for node in nodes:
        for name in dir(node):
            if not name.startswith("_saved_"):
                continue
            try:
                value = getattr(node, name)
            except RuntimeError:  # freed, or written into since
                continue
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in known:
                        known.add(storage.data_ptr())
                        total += storage.nbytes()
    return total
