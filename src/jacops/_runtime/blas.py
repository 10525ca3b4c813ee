"""The BLAS and LAPACK of SciPy: with how many threads they work, and their routines on tensors in place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .restoring import Guard, ProcessSetting, ProcessState, restoring

_LETTERS = {torch.float32: "s", torch.float64: "d"}
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


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
    return most_blas_threads(1)


def most_blas_threads(most: int) -> Guard:
    """Return a context in which the BLAS of NumPy and SciPy takes at most so many threads."""
    return ProcessSetting(_BLAS, [min(number, most) for number in _BLAS.read()])


def runs_in_place(matrix: Tensor) -> bool:
    """Return whether `in_place` takes a tensor: real entries on the processor, row by row, and LAPACK's usual int."""
    plain = matrix.device.type == "cpu" and matrix.dtype in _LETTERS and matrix.is_contiguous()
    return plain and max(matrix.shape, default=0) < 2**31 and _routine("cython_lapack", "spotrf") is not None


@restoring
def in_place(module: str, name: str, *arguments: str | int | Tensor) -> int:
    """Call a routine of SciPy's on tensors in place, with no more threads than torch takes.

    The wrappers in `scipy.linalg.lapack` would hold the interpreter's lock meanwhile, and all threads with it.

    Args:
        module: `"cython_blas"` or `"cython_lapack"`.
        name: The routine without the letter of its dtype, which is that of the first tensor.
        arguments: Its arguments but for `info`. LAPACK reads tensors by columns, so the rows of one are its columns.

    Returns:
        `info` of a routine of LAPACK, 0 for one of BLAS.

    Raises:
        RuntimeError: SciPy has no such routine for the usual int.
    """
    dtype = next(value.dtype for value in arguments if isinstance(value, Tensor))
    call = _routine(module, _LETTERS[dtype] + name)
    if call is None:
        raise RuntimeError(f"SciPy's {name} is not as expected")
    info = ctypes.c_int(0)
    words: list[Any] = [_word(value) for value in arguments]
    if module == "cython_lapack":
        words.append(ctypes.byref(info))
    with most_blas_threads(torch.get_num_threads()):
        call(*words)
    return info.value


def _word(value: str | int | Tensor) -> Any:
    match value:
        case Tensor():
            return ctypes.c_void_p(value.data_ptr())
        case str():
            return ctypes.byref(ctypes.c_char(value.encode()))
        case _:
            return ctypes.byref(ctypes.c_int(value))


@cache
def _routine(module: str, name: str) -> Any:
    """Return a routine that is called without the interpreter's lock; None where its integers are no plain int."""
    capsule = import_module(f"scipy.linalg.{module}").__pyx_capi__.get(name)
    signature = b"" if capsule is None else _capsule_name(capsule)
    if b"(char *, " not in signature or b", int *" not in signature:
        return None
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (signature.count(b",") + 1))
    return kind(_capsule_pointer(capsule, signature))
