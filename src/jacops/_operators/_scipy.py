"""An operator as SciPy's LinearOperator: products of NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._interop import as_array


def as_linear_operator(operator: Any) -> Any:
    """Return an operator as a `scipy.sparse.linalg.LinearOperator`."""
    from scipy.sparse.linalg import LinearOperator

    def adjoint(rows: Tensor) -> Tensor:
        return operator.T.apply(rows.conj()).conj()  # `rmatvec` is the conjugate transpose

    forward = _by_columns(operator, operator.domain, operator.apply)
    backward = _by_columns(operator, operator.codomain, adjoint)
    products: dict[str, Any] = {"matvec": forward, "matmat": forward, "rmatvec": backward, "rmatmat": backward}
    return LinearOperator(dtype=_presented(operator.dtype), shape=operator.shape, **products)


def _presented(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the NumPy dtype of products; LAPACK and ARPACK have no half precision, NumPy no bfloat16."""
    wide = torch.promote_types(dtype, torch.float32)
    return torch.empty(0, dtype=wide).numpy().dtype


def _by_columns(operator: Any, space: Any, rows_to_rows: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def product(columns: Any) -> Any:
        """Map `(n,)`, `(n, 1)` or `(n, k)`, as SciPy passes them."""
        given: Any = np.asarray(columns)
        if np.iscomplexobj(given) and not space.dtype.is_complex:
            return product(given.real) + 1j * product(given.imag)
        flat = np.ascontiguousarray(given.T if given.ndim == 2 else given[None])
        rows = torch.tensor(flat, dtype=space.dtype, device=space.device)
        image = as_array(rows_to_rows(rows)).astype(np.result_type(_presented(operator.dtype), given.dtype))
        return image.T if given.ndim == 2 else image[0]

    return product
