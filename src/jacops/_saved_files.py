"""Reading whatever a `save` of this package wrote to one file."""

from __future__ import annotations

import os
from typing import Any

import torch

from . import _saving
from ._keywords import keywords
from .errors import InputError
from .sparse import SparsePlan


@keywords()
def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Any:
    """Return what the `save` of a result, of fitted factors or of a sparse plan wrote to a file.

    The file is read without pickle: nothing in it is executed. Everything in it is compared with checksums.

    Args:
        path: The file.
        device: Where its tensors are put.

    Returns:
        An object of the type that was saved, with the same fields; numbers are equal to the last bit.

    Raises:
        DataError: The file is of another program or of a newer version, or it is damaged.
        OSError: It cannot be read.

    Example:
        >>> import tempfile, jacops
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jacops.linalg.Estimate(1.5, 0.25).save(f"{folder}/trace.safetensors")
        ...     load(f"{folder}/trace.safetensors")
        1.50 ± 0.25
    """
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"  # a plan is NumPy's npz, which is a zip archive
    if is_zip:
        if torch.device(device).type != "cpu":
            raise InputError.of("device", repr(str(device)), "a sparse plan is kept on the CPU")
        return SparsePlan.load(path)  # pyright: ignore[reportArgumentType]
    return _saving.load(path, device=device)
