"""Scales of parameters: what lengths of steps and damping are measured with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._requirements import check_choice
from .._words import ScaleRule
from ..errors import InputError, InputTypeError
from ._layout import Layout, ParameterPart, by_name, in_double
from ._system import LinearizedFit


@dataclass(eq=False)
class Scaling:
    """Scales of the free columns.

    Attributes:
        given: One over the scales that the caller gave, (columns,); None for those of the Jacobian.
        largest: The largest norm of each column so far (Moré, The Levenberg-Marquardt algorithm: implementation and
            theory, 1978, section 6).
    """

    given: np.ndarray | None
    largest: np.ndarray | None = field(default=None)

    def apply(self, system: LinearizedFit, *, keep: bool = True) -> None:
        """Set the scales of a new linearised problem; its norms count later on if they are to be kept."""
        largest = system.norms if self.largest is None else np.maximum(self.largest, system.norms)
        if keep:
            self.largest = largest
        if self.given is None:
            system.lengths = largest
        else:
            system.lengths = self.given
            system.unit = float((largest / self.given).max(initial=0.0)) or 1.0


def scaling_of(x_scale: Any, layout: Layout) -> Scaling:
    """Return the scales that the caller means.

    Raises:
        InputTypeError: `x_scale` is of the wrong kind.
        InputError: A name or a shape does not fit, or a scale is not positive.
    """
    if isinstance(x_scale, str):
        check_choice("x_scale", x_scale, ScaleRule, ", a number or tensors like the parameters")
        return Scaling(None)
    parts = layout.parts
    if isinstance(x_scale, float | int) and not isinstance(x_scale, bool):
        found: dict[str, Any] = dict.fromkeys((p.name for p in parts), x_scale)
    else:
        tree = dict(enumerate(x_scale)) if isinstance(x_scale, list | tuple) else x_scale
        found = by_name("x_scale", tree, [p.name for p in parts])
    missing = [p.name for p in parts if p.name not in found]
    if missing:
        needed = f"a scale for every free parameter is needed, for {missing} too"
        raise InputError.of("x_scale", f"given for {list(found)}", needed)
    return Scaling(1 / np.concatenate([_free_scales(p, found[p.name]) for p in parts]))


def _free_scales(part: ParameterPart, scale: Any) -> np.ndarray:
    if isinstance(scale, bool) or not isinstance(scale, float | int | Tensor | np.ndarray):
        came = f"a {type(scale).__name__} for '{part.name}'"
        raise InputTypeError.of("x_scale", came, "a number or a tensor is needed")
    value = in_double(scale)
    shape = part.tangent_shape
    if value.ndim and tuple(value.shape) != shape:
        came = f"of shape {tuple(value.shape)} for '{part.name}'"
        raise InputError.of("x_scale", came, f"a number or the shape {shape} of its directions is needed")
    if not bool((torch.isfinite(value) & (value > 0)).all()):
        raise InputError.of("x_scale", f"not positive for '{part.name}'", "positive finite numbers are needed")
    return value.expand(shape).reshape(-1).numpy()[part.kept]
