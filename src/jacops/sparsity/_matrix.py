"""scipy's sparse arrays, whose shapes and results no type checker can follow: one name for them, checked nowhere."""

from __future__ import annotations

from typing import Any, TypeAlias

import scipy.sparse as sp

Csr: TypeAlias = Any


def csr(given: Any, shape: Any = None, copy: bool = False) -> Csr:
    """Return a matrix by rows."""
    return sp.csr_array(given, shape=shape, copy=copy)


def csc(given: Any) -> Any:
    """Return a matrix by columns."""
    return sp.csc_array(given)
