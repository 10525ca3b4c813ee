"""Parts of scipy whose shapes and results no type checker can follow: one name for each, checked nowhere.

They are loaded when first used, since that takes as long as a seventh of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeAlias

Csr: TypeAlias = Any


class _Loaded:
    """A module that is imported when it is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


sp: Any = _Loaded("scipy.sparse")
blas: Any = _Loaded("scipy.linalg.blas")
lapack: Any = _Loaded("scipy.linalg.lapack")


def csr(given: Any, shape: Any = None, copy: bool = False) -> Csr:
    """Return a matrix by rows."""
    return sp.csr_array(given, shape=shape, copy=copy)


def csc(given: Any) -> Any:
    """Return a matrix by columns."""
    return sp.csc_array(given)
