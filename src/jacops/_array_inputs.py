"""Arrays as the input of a model: NumPy arrays and SciPy's sparse rows, as tensors that the model takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._trees import flatten
from .errors import InputTypeError


def from_arrays(x: Any, model: Any) -> Any:
    """Return an input with tensors in place of its arrays and sparse matrices.

    Floating-point arrays and all sparse matrices get the dtype of the model's first floating-point parameter, and
    everything its device; a model without one takes arrays as they are. Integer arrays keep their dtype: they may be
    indices. Sparse rows become dense, which is less than the result takes.

    Args:
        x: A tensor or array, or a tree of them.
        model: A module or a function.

    Raises:
        InputTypeError: An array holds something else than numbers, or has masked entries.
    """
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    like = next((weight for weight in weights if weight.is_floating_point()), None)
    if is_array(x):  # some of SciPy's matrices are dicts, which a tree would look into
        return as_tensor(x, "x", like)
    leaves, tree = flatten(x, "x")
    if not any(map(is_array, leaves)):
        return x
    pairs = zip(tree.names, leaves, strict=True)
    return tree.build([as_tensor(leaf, name, like) if is_array(leaf) else leaf for name, leaf in pairs])


def is_array(value: Any) -> bool:
    """Return whether a value is an array of NumPy's or a sparse one of SciPy's."""
    return isinstance(value, np.ndarray) or _is_sparse(value)


def _is_sparse(value: Any) -> bool:
    return not isinstance(value, Tensor) and hasattr(value, "tocsr") and hasattr(value, "toarray")


def as_tensor(value: Any, name: str, like: Tensor | None) -> Tensor:
    """Return an array as a tensor of its own memory.

    Args:
        value: An array, dense or sparse.
        name: How messages call it.
        like: Whose dtype and device floating-point numbers get; None keeps the array's.

    Raises:
        InputTypeError: It holds something else than numbers, or has masked entries.
    """
    given = value.toarray() if _is_sparse(value) else value
    if given.dtype.kind not in "biufc":
        raise InputTypeError.of(name, f"an array of dtype {given.dtype}", "numbers are needed")
    if np.ma.is_masked(given):
        todo = "Fill them with `.filled(value)`."
        raise InputTypeError.of(name, "an array with masked entries", "every entry needs a value", todo)
    tensor = torch.from_numpy(np.array(given, dtype=given.dtype.newbyteorder("="), order="C"))
    if like is None:
        return tensor
    real = tensor.is_floating_point() or _is_sparse(value)
    return tensor.to(like.device, like.dtype if real else tensor.dtype)
