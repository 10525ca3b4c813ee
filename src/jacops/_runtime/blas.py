"""The BLAS of NumPy and SciPy on one thread, for many small matrices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from .restoring import Guard, ProcessSetting, ProcessState


@cache
def _blas_libraries() -> list[Any]:
    import scipy.linalg.blas  # loads the library of SciPy  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas").lib_controllers


def _set_blas_threads(numbers: Sequence[int]) -> None:
    for library, number in zip(_blas_libraries(), numbers, strict=True):
        library.set_num_threads(number)


_BLAS = ProcessState(lambda: [library.get_num_threads() for library in _blas_libraries()], _set_blas_threads)


def one_blas_thread() -> Guard:
    """Return a context in which the BLAS of NumPy and SciPy takes one thread.

    Several threads that share matrices of a hundred columns mostly wait for one another.
    """
    return ProcessSetting(_BLAS, [1] * len(_blas_libraries()))
