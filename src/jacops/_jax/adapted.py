"""Functions made of the caller's, the same ones for the same arguments, so that they compile once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from .._trees import select
from ..errors import InputError
from .parameters import Same, Structure

Apply = Callable[[Any, Any], Any]


def itself(output: Any, x: Any) -> Any:
    """Return the output as a function of itself, which a loss is differentiated by."""
    return output


def key_of(outputs: Any) -> Any:
    """Return a selection of outputs in a form that compares by value; callables compare by identity."""
    if outputs is None or isinstance(outputs, int | str):
        return outputs
    if callable(outputs):
        return Same(outputs)
    if isinstance(outputs, slice):
        return "slice", outputs.start, outputs.stop, outputs.step
    return tuple(np.asarray(outputs).tolist()) if hasattr(outputs, "shape") else tuple(outputs)


@lru_cache(maxsize=64)  # as many as compiled programs are kept
def selecting(apply: Same, outputs: Any) -> Apply:
    """Return a function that gives part of the output."""
    return apply.of if outputs is None else lambda params, x: _selected(apply.of(params, x), outputs)


def _selected(output: Any, outputs: Any) -> Any:
    if isinstance(outputs, Same):
        return outputs.of(output)
    index = slice(*outputs[1:]) if isinstance(outputs, tuple) and outputs[:1] == ("slice",) else outputs
    if hasattr(output, "shape"):
        if isinstance(index, str) or not output.ndim:
            raise InputError.of("outputs", repr(index), "indices along the output's last axis are needed")
        length = output.shape[-1]
        asked = index if isinstance(index, tuple) else (index,) if isinstance(index, int) else ()
        if any(not -length <= i < length for i in asked):  # JAX would clamp it
            raise InputError.of("outputs", repr(outputs), f"the last axis of the output has {length} entries")
        return output[..., np.asarray(index) if isinstance(index, tuple) else index]
    return select(output, index)


@lru_cache(maxsize=64)  # as above
def by_input(apply: Same, structure: Structure) -> Apply:
    """Return the function with its input and its parameters exchanged."""
    return lambda inputs, arrays: apply.of(structure.build(*arrays), inputs)
