"""`Function`: a pure function of parameters and inputs, as a model wherever a module goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ._trees import Tree, flatten, is_differentiable
from .errors import InputError, InputTypeError


class Function(nn.Module):
    """A pure function `function(params, *inputs)` with its parameters, accepted wherever a module is.

    Tensors of floating point in `params` are its parameters, named by their paths (`"layer.weight"`; `"params"` for one
    bare tensor). Those that require grad are trainable; where none does, all are. They share memory with the tensors
    given, and with `create_graph=True` results are differentiable by those that require grad, leaves of a graph or not.

    Args:
        function: `function(params, *inputs, **keywords)`, pure; called with the tree of parameters first.
        params: A tensor, or any tree of tensors (dicts, lists, tuples); other leaves are passed on as they are.

    Raises:
        InputTypeError: `function` is no callable, or is a module, which needs no wrapping.
        InputError: There is no tensor of floating point in `params`, or two paths give one name.

    Example:
        >>> line = Function(lambda params, x: x @ params["w"] + params["b"], {"w": torch.ones(2), "b": torch.zeros(())})
        >>> line(torch.tensor([[1.0, 2.0]]))
        tensor([3.], grad_fn=<AddBackward0>)
        >>> [name for name, _ in line.named_parameters()]
        ['w', 'b']
    """

    def __init__(self, function: Callable[..., Any], params: Any) -> None:
        super().__init__()
        if isinstance(function, nn.Module) or not callable(function):
            todo = "Pass the module itself." if isinstance(function, nn.Module) else ""
            needed = "a callable `function(params, *inputs)` is needed"
            raise InputTypeError.of("function", f"a {type(function).__name__}", needed, todo)
        leaves, self._tree = flatten(params, "params")
        if not any(is_differentiable(leaf) for leaf in leaves):
            raise InputError.of("params", f"a {type(params).__name__} without parameters", _NEEDED)
        self._paths = _paths(params, self._tree)
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.function = function
        marked = any(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))
        for path, leaf in zip(self._paths, leaves, strict=True):
            if is_differentiable(leaf):  # by the dict, since paths hold dots and tensors of a graph are no Parameters
                self._parameters[path] = leaf if marked else nn.Parameter(leaf.detach())
            elif isinstance(leaf, Tensor):
                self._buffers[path] = leaf

    @property
    def params(self) -> Any:
        """The tree of parameters that is passed to the function."""
        held = {**self._parameters, **self._buffers}
        return self._tree.build(
            held.get(path, constant) for path, constant in zip(self._paths, self._constants, strict=True)
        )

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Return the function's value at its parameters."""
        return self.function(self.params, *inputs, **keywords)

    def extra_repr(self) -> str:
        """Return the function's name and its parameters' shapes."""
        shapes = (f"{name}: {tuple(p.shape)}" for name, p in self._parameters.items() if p is not None)
        return f"{getattr(self.function, '__qualname__', repr(self.function))}; {', '.join(shapes)}"


_NEEDED = "at least one tensor of floating point is needed"


def _paths(params: Any, tree: Tree) -> Sequence[str]:
    """Return one name per leaf: its path, joined by dots.

    Raises:
        InputError: Two leaves have one name.
    """
    found = [".".join(map(_step, path)) or "params" for path, _ in pytree.tree_flatten_with_path(params)[0]]
    for name in found:
        if found.count(name) > 1:
            both = [full for full, path in zip(tree.names, found, strict=True) if path == name]
            raise InputError.of("params", " and ".join(both), f"both would be named {name!r}", "Rename a key.")
    return found


def _step(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
