"""What is registered for tensors of PyPose when jacops is imported, without the modules that it takes."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from .._hooks import SUBCLASSES, inspectors
from ..errors import MissingExtraError


def _inspect(recorded: Any) -> None:
    if "pypose" in sys.modules:
        from .lie import inspect

        inspect(recorded)


def _ltype(tensor: Tensor) -> str:
    """Return the name of a LieTensor's type, empty for other tensors."""
    ltype: Any = getattr(tensor, "ltype", None)
    return "" if ltype is None else type(ltype).__name__.removesuffix("Type")


def _of_ltype(plain: Tensor, name: str) -> Tensor:
    try:
        import pypose
    except ImportError as error:
        raise MissingExtraError("pypose", "pypose") from error
    return pypose.LieTensor(plain, ltype=getattr(pypose, f"{name}_type"))


inspectors.append(_inspect)
SUBCLASSES["pypose"] = _ltype, _of_ltype
