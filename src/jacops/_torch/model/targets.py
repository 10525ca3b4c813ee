"""`target=`: one output per sample, by its place along the last axis of the output.

It travels with the samples as one more tensor with a row for each, which is never differentiated, and the selection is
the last step of the function: chunks, samples alone and proofs do not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError, InputTypeError

_NEEDED = "an integer tensor (n,) is needed, one place along the output's last axis for every sample"
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


@dataclass(frozen=True)
class SampleTarget:
    """One output per sample.

    Attributes:
        places: Along the last axis of the output, `(n,)`.
        largest: The largest of them; -1 for no samples. It is known without reading from a tensor in a forward.
    """

    places: Tensor
    largest: int

    @classmethod
    def of(cls, target: Any, many: int, device: torch.device) -> SampleTarget | None:
        """Return the selection that `target=` of a call makes; None where it was left out.

        Raises:
            InputTypeError: It is no tensor of whole numbers.
            InputError: Its shape is not `(n,)`, it is on another device, or a place is negative.
        """
        if target is None:
            return None
        if not isinstance(target, Tensor) or target.dtype not in _WHOLE:
            came = f"a tensor of {target.dtype}" if isinstance(target, Tensor) else f"a {type(target).__name__}"
            raise InputTypeError.of("target", came, _NEEDED, _advice(target))
        if target.shape != (many,):
            raise InputError.of("target", f"of shape {tuple(target.shape)} for {many} samples", _NEEDED)
        if target.device != device:
            todo = f"Call `.to('{device}')` on it."
            raise InputError.of("target", f"on {target.device}", f"the samples are on {device}", todo)
        if many and int(target.min()) < 0:
            raise InputError.of("target", f"holding {int(target.min())}", "places count from 0")
        return cls(target.detach().long(), int(target.max()) if many else -1)

    def pick(self, output: Any, places: Tensor) -> Tensor:
        """Return the outputs at the places of some samples.

        Raises:
            InputError: The output is not one tensor with an axis to pick from, or has too few entries.
        """
        if not isinstance(output, Tensor):
            came = f"given with an output that is a {type(output).__name__}"
            raise InputError.of("target", came, "one tensor is needed", "Pick one with `outputs=`.")
        many = len(places)
        if many == 1 and output.ndim and output.shape[0] != 1:
            output = output.unsqueeze(0)  # the forward drops the axis of a single sample
        if output.ndim < 2 or output.shape[0] != many:
            came = f"given with an output of shape {tuple(output.shape)} for {many} samples"
            raise InputError.of("target", came, "an output (n, ..., classes) is needed")
        if self.largest >= output.shape[-1]:
            raise InputError.of("target", f"holding {self.largest}", f"the last axis has {output.shape[-1]} entries")
        index = places.view(-1, *[1] * (output.ndim - 1)).expand(*output.shape[:-1], 1)
        return output.gather(-1, index).squeeze(-1)


def _advice(target: Any) -> str:
    if isinstance(target, int) and not isinstance(target, bool):
        return f"Pass `outputs={target}` for the same output of every sample."
    if isinstance(target, np.ndarray | list | tuple):
        return "Convert it with torch.as_tensor(target)."
    return ""
