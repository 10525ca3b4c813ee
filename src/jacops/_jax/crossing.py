"""Arrays on their way into JAX and out of it: nothing is cast, and nothing is shared that somebody might change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer
from torch import Tensor

from .._requirements import check_dense
from ..errors import InputError, InputTypeError, NotDifferentiableError

_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_X64 = "Call `jax.config.update('jax_enable_x64', True)` before anything else, or give float32."


def torch_dtype(dtype: Any, name: str) -> torch.dtype:
    """Return torch's dtype for one of JAX's.

    Raises:
        InputError: There is none of the same name.
    """
    if str(dtype) not in _TORCH:
        raise InputError.of(name, f"of dtype {dtype}", f"one of {', '.join(_TORCH)} is needed")
    return _TORCH[str(dtype)]


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a dense tensor of any dtype as NumPy's, on the processor; memory may be shared."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def to_torch(array: Any) -> Tensor:
    """Return a copy of an array of NumPy's or JAX's as a tensor on the processor, in its own dtype."""
    return viewed(np.array(array))


def viewed(array: np.ndarray) -> Tensor:
    """Return an array of NumPy's that nobody else holds as a tensor, in the same memory."""
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def filled(chunks: Sequence[np.ndarray], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return chunks of rows one below the other as one tensor; `dtype` is for where there are none."""
    if not chunks:
        return torch.empty(*shape, dtype=dtype)
    result, start = np.empty(tuple(shape), chunks[0].dtype), 0
    for chunk in chunks:
        result[start : start + len(chunk)] = chunk.reshape(len(chunk), *shape[1:])
        start += len(chunk)
    return viewed(result)


def to_jax(leaf: Any, name: str) -> Any:
    """Return one leaf of a batch or of parameters for JAX: its arrays as they are, others copied, numbers untouched.

    Raises:
        InputTypeError: It is neither an array nor a number.
        InputError: JAX, as it is configured, cannot hold its dtype.
        NotDifferentiableError: It belongs to a transformation of JAX's that is under way around the call.
    """
    if isinstance(leaf, Tracer):
        came = "an array inside a transformation of JAX's (jit, vmap, grad, …)"
        raise NotDifferentiableError.of(name, came, "values are needed", "Call jacops outside of it.")
    if isinstance(leaf, bool | int | float):
        return leaf
    if isinstance(leaf, jax.Array):
        _check_precision(leaf.dtype, name)
        return leaf
    if isinstance(leaf, Tensor):
        check_dense(name, leaf)
    array = to_numpy(leaf) if isinstance(leaf, Tensor) else leaf
    if not isinstance(array, np.ndarray | np.generic) or array.dtype.kind in "OSUMm":
        raise InputTypeError.of(name, f"a {type(leaf).__name__}", "an array is needed")
    return jnp.array(_narrowed(np.asarray(array), name))


def _narrowed(array: np.ndarray, name: str) -> np.ndarray:
    """Return whole numbers in the width that JAX is configured for, where none of them is lost."""
    if array.dtype.kind in "iu":
        narrow = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        if np.array_equal(narrow, array):
            return narrow
    _check_precision(array.dtype, name)
    return array


def _check_precision(dtype: Any, name: str) -> None:
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # random keys
        return
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        came = f"of dtype {dtype}"
        raise InputError.of(name, came, f"JAX would make it {jax.dtypes.canonicalize_dtype(dtype)}", _X64)


def tree_to_jax(tree: Any, name: str) -> Any:
    """Return a tree of arrays with every leaf as `to_jax` gives it; messages call leaves by their path.

    Raises:
        InputTypeError: A leaf is neither an array nor a number.
        InputError: JAX, as it is configured, cannot hold the dtype of a leaf.
        NotDifferentiableError: A leaf belongs to a transformation of JAX around the call.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: to_jax(leaf, name + jax.tree_util.keystr(path)), tree)


def is_floating(leaf: Any) -> bool:
    """Return whether a leaf is an array of floating-point numbers, real ones."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
