"""Layout: which parameters move, on which chart, and the place of each in the flat step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._extras._lie_groups import group_of
from .._runtime.contexts import arithmetic
from .._runtime.restoring import restoring
from ..charts import Chart
from ..charts._laws import check_shapes
from ..errors import InputError, InputTypeError
from ._columns import FitColumns, ParameterColumns

Values = dict[str, Tensor]
_TRANSLATED = ("SE3", "Sim3")  # PyPose's groups that begin with a translation


def in_double(value: Any) -> Tensor:
    """Return a number, array or tensor in double precision on the processor; Python's floats are not rounded before."""
    dtype = None if hasattr(value, "dtype") else torch.float64
    return torch.as_tensor(value, dtype=dtype).detach().as_subclass(Tensor).to("cpu", torch.float64)


def array(output: Tensor) -> np.ndarray:
    """Return a tensor's numbers, flat, in double precision."""
    return output.detach().as_subclass(Tensor).reshape(-1).to("cpu", torch.float64).numpy()


@dataclass(frozen=True)
class ParameterPart:
    """One parameter.

    Attributes:
        name: Its name.
        shape: Its shape.
        chart: How its elements move; None for ordinary numbers and LieTensors.
        group: PyPose's name of a LieTensor's group, else empty.
        free: Which columns of its tangent move, as positions; None for all.
        batch: How many first axes count problems.
    """

    name: str
    shape: torch.Size
    chart: Chart | None
    group: str
    free: np.ndarray | None
    batch: int = 0

    @property
    def lead(self) -> torch.Size:
        """Axes of its elements; one number is an element where there is no chart."""
        return self.shape[:-1] if self.chart or self.group else self.shape

    @property
    def width(self) -> int:
        """Tangent directions per element."""
        return self.chart.tangent if self.chart else self.shape[-1] - 1 if self.group else 1

    @property
    def columns(self) -> int:
        """How many tangent columns there are, fixed ones included."""
        return self.lead.numel() * self.width

    @property
    def stored(self) -> int:
        """How many columns there are for a Jacobian without charts."""
        return self.shape.numel() if self.chart else self.columns

    @cached_property
    def kept(self) -> np.ndarray:
        """Positions of the columns of its tangent that move."""
        return np.arange(self.columns) if self.free is None else self.free

    @property
    def tangent_shape(self) -> tuple[int, ...]:
        """The shape of its steps."""
        return (*self.lead, self.width) if self.chart or self.group else tuple(self.shape)

    def moved(self, value: Tensor, step: np.ndarray) -> Tensor:
        """Return the parameter moved by a flat step over its free columns."""
        full = np.zeros(self.columns)
        full[slice(None) if self.free is None else self.free] = step
        d = torch.from_numpy(full).to(value.device, value.dtype).reshape(self.tangent_shape)
        if self.chart is not None:
            return self.chart.retract(value.detach(), d)
        return _retracted(value, d) if self.group else value + d

    def magnitudes(self, value: Tensor) -> np.ndarray:
        """Return the magnitude of what each column moves: a number, the length of a translation, or an angle."""
        stored = value.detach().as_subclass(Tensor).to("cpu", torch.float64)
        if not self.chart and not self.group:
            return stored.abs().reshape(-1).numpy()
        stored = stored.reshape(self.lead.numel(), -1)
        if self.chart:
            return self.chart.magnitudes(stored).reshape(-1).numpy()
        sizes = torch.ones(self.lead.numel(), self.width, dtype=torch.float64)
        if self.group in _TRANSLATED:
            sizes[:, :3] = stored[:, :3].norm(dim=1, keepdim=True)
        return sizes.reshape(-1).numpy()

    def moves(self, value: Tensor) -> np.ndarray:
        """Return how stored numbers move with the tangent: one `(elements,)`, or `(elements, storage, tangent)`."""
        if self.chart is None:
            return np.ones(self.columns)
        blocks = self.chart.storage_jacobian(value.detach().to("cpu", torch.float64))
        return blocks.reshape(self.lead.numel(), self.chart.storage, self.width).numpy()

    def of_problems(self, many: int) -> ParameterPart:
        """Return the part of as many problems, stacked along a new first axis."""
        free = None if self.free is None else np.add.outer(np.arange(many) * self.columns, self.free).reshape(-1)
        return ParameterPart(self.name, torch.Size((many, *self.shape)), self.chart, self.group, free, self.batch + 1)

    @property
    def preferred_block(self) -> int:
        """How many neighbouring columns belong together, for block-Jacobi."""
        if self.chart or self.group:
            return self.width
        # Rows of a parameter that are points or poses have up to 16 numbers (4 x 4 matrices).
        return self.shape[-1] if len(self.shape) > 1 and self.shape[-1] <= 16 else 1


def _retracted(value: Tensor, d: Tensor) -> Tensor:
    """Return PyPose's own retraction, `Exp(d) X`."""
    import pypose

    element: Any = value
    algebra = group_of(value).lower()
    return pypose.LieTensor(d, ltype=getattr(pypose, f"{algebra}_type")).Exp() @ element


@dataclass(frozen=True)
class Layout:
    """All parameters, in the order of the columns."""

    parts: tuple[ParameterPart, ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Free columns per parameter."""
        return [len(p.kept) for p in self.parts]

    @cached_property
    def columns(self) -> int:
        """Free columns altogether."""
        return sum(self.sizes)

    @cached_property
    def kept(self) -> np.ndarray | None:
        """Positions of the free columns among all; None if all are free."""
        found = self._placed([p.kept for p in self.parts])
        return None if self.columns == sum(p.columns for p in self.parts) else found

    @cached_property
    def blocks(self) -> np.ndarray:
        """For every free column the number of the block it is in, rising."""
        return np.unique(self._placed([p.kept // p.preferred_block for p in self.parts]), return_inverse=True)[1]

    @cached_property
    def named(self) -> FitColumns:
        """The free columns by parameter, for what is asked of a result."""
        starts = np.cumsum([0, *self.sizes]).tolist()
        parts = zip(self.parts, starts, strict=False)
        return FitColumns(tuple(ParameterColumns(p.name, tuple(p.lead), p.width, p.free, start) for p, start in parts))

    def _placed(self, positions: list[np.ndarray]) -> np.ndarray:
        starts = np.cumsum([0, *(p.columns for p in self.parts)])
        return np.concatenate([start + own for start, own in zip(starts, positions, strict=False)])

    @restoring
    def moved(self, values: Values, step: np.ndarray) -> Values:
        """Return all parameters moved by a flat step."""
        cuts = np.split(step, np.cumsum(self.sizes)[:-1])
        with arithmetic(False):
            return {p.name: p.moved(values[p.name], cut) for p, cut in zip(self.parts, cuts, strict=True)}

    def magnitudes(self, values: Values) -> np.ndarray:
        """Return the magnitude of what each free column moves; rounding of a parameter moves it by eps times that."""
        return np.concatenate([p.magnitudes(values[p.name])[p.kept] for p in self.parts])


def layout_of(parameters: Mapping[str, Tensor], manifolds: Any, fixed: Any) -> Layout:
    """Return the layout of parameters, charts by name, and what stays fixed by name.

    Raises:
        InputTypeError: An argument is of the wrong kind, or a parameter is complex.
        InputError: A name is unknown, or a chart or a selection does not fit.
    """
    names = list(parameters)
    charts, held = by_name("manifolds", manifolds, names), _held(fixed, names)
    parts = []
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            needed = "least squares need real numbers"
            raise InputTypeError.of(name, f"of dtype {parameter.dtype}", needed, "Use torch.view_as_real.")
        chart, group = charts.get(name), group_of(parameter)
        if chart is not None:
            if not isinstance(chart, Chart):
                came = f"{chart!r} for '{name}'"
                raise InputTypeError.of("manifolds", came, "a chart such as jacops.charts.SE3 is needed")
            if group:
                needed = "a LieTensor has its own retraction"
                raise InputError.of("manifolds", f"{chart} for the LieTensor '{name}'", needed, "Leave it out.")
            chart.check(parameter.detach(), name)
            check_shapes(chart, parameter.detach().to("cpu", torch.float64), "manifolds")
        part = ParameterPart(name, parameter.shape, chart, group, None)
        parts.append(replace(part, free=_free(part, held[name])) if name in held else part)
    layout = Layout(tuple(parts))
    if not layout.columns:
        raise InputError.of("fixed", "everything", "at least one parameter must be free")
    return layout


def by_name(argument: str, given: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return what the caller gave by parameter name, or by position; one thing belongs to the only parameter.

    Raises:
        InputTypeError: It is not a mapping and there are several parameters.
        InputError: A name is unknown.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if len(names) == 1:
            return {names[0]: given}
        came = f"a {type(given).__name__}"
        raise InputTypeError.of(argument, came, f"a dict by parameter name is needed, the names being {names}")
    found: dict[Any, Any] = {names[k] if isinstance(k, int) and 0 <= k < len(names) else k: v for k, v in given.items()}
    for name in found:
        if name not in names:
            raise InputError.of(argument, f"naming {name!r}", f"the free parameters are {names}")
    return found


def _held(fixed: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return what stays where it is by parameter name, where names may be patterns.

    Raises:
        InputTypeError: It is not a mapping and there are several parameters.
        InputError: A name or pattern fits no parameter.
    """
    if isinstance(fixed, str):
        fixed = {fixed: True}
    elif isinstance(fixed, list | tuple | set) and fixed and all(isinstance(name, str) for name in fixed):
        fixed = dict.fromkeys(fixed, True)
    if not isinstance(fixed, Mapping):
        return by_name("fixed", fixed, names)
    spread: dict[Any, Any] = {}
    for key, value in fixed.items():
        fitting = [key] if key in names or not isinstance(key, str) else [n for n in names if fnmatchcase(n, key)]
        spread |= dict.fromkeys(fitting or [key], value)
    return by_name("fixed", spread, names)


def _free(part: ParameterPart, fixed: Any) -> np.ndarray:
    """Return the columns that are left when the elements that `fixed` indexes stay where they are."""
    mask = torch.zeros(part.lead, dtype=torch.bool)
    if isinstance(fixed, Tensor):
        fixed = fixed.detach().cpu()
    try:
        mask[fixed] = True
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        came = f"{fixed!r} for '{part.name}'"
        needed = f"an index or a mask over its elements {tuple(part.lead)} is needed ({error})"
        raise InputError.of("fixed", came, needed) from None
    return np.repeat(~mask.reshape(-1).numpy(), part.width).nonzero()[0]
