"""Checks of a chart: widths, independence of elements, and retraction against step and derivative."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .._keywords import keywords
from .._requirements import check_kind
from .._runtime.agreement import difference_tolerance, few_operations_tolerance
from .._runtime.contexts import arithmetic, private_noise
from .._runtime.restoring import restoring
from ..errors import InputError
from ._base import Chart

_SIZES = (1e-1, 1e-4, 1e-9)  # of steps: an ordinary one, one where closed forms cancel, and one that is almost none


@keywords()
@restoring
def check_laws(chart: Chart, x: Tensor) -> None:
    """Check that a chart has the properties that least squares require, at given elements.

    Checks the shapes, that `x` is left as it is and each element moves by itself, that `retract(x, 0)` is `x`,
    that `local(x, retract(x, d))` is `d` for random steps of lengths up to 0.1, 1e-4 and 1e-9, and that
    `storage_jacobian` is finite and agrees with central differences of `retract`.

    Args:
        chart: The chart.
        x: Elements `(*, storage)`, best in float64, since tolerances are those of the dtype.

    Raises:
        InputTypeError: `chart` is no chart, or `x` no tensor of floating-point numbers.
        InputError: `x` does not hold elements, or a law is broken; the message names it.
        NotDifferentiableError: `retract` is not recorded by autograd.

    Example:
        >>> from jacops.charts import S2, check_laws
        >>> check_laws(S2, torch.eye(3))
    """
    check_kind("chart", chart, Chart, "a chart such as jacops.charts.SE3 is needed")
    chart.check(x)
    x = x.detach()
    before = x.clone()
    with arithmetic(False):
        check_shapes(chart, x)
        _check_steps(chart, x)
        _check_derivative(chart, x)
    if not torch.equal(x, before):
        _broken(chart, "writing into `x`", "methods must leave their arguments as they are")


def check_shapes(chart: Chart, x: Tensor, argument: str = "chart") -> None:
    """Check the shapes of what a chart gives.

    Raises:
        InputError: One is another.
    """
    zero, lead = x.new_zeros(*x.shape[:-1], chart.tangent), x.shape[:-1]
    found = {
        "retract": (chart.retract(x, zero), x.shape),
        "local": (chart.local(x, x), zero.shape),
        "storage_jacobian": (chart.storage_jacobian(x), (*lead, chart.storage, chart.tangent)),
        "magnitudes": (chart.magnitudes(x), zero.shape),
    }
    for name, (result, needed) in found.items():
        if not isinstance(result, Tensor) or result.shape != torch.Size(needed):
            came = f"a {type(result).__name__}" if not isinstance(result, Tensor) else f"of shape {tuple(result.shape)}"
            raise InputError.of(
                argument,
                f"{chart!r} with `{name}` {came}",
                f"shape {tuple(needed)} is needed for elements of shape {tuple(x.shape)}",
            )


def _check_steps(chart: Chart, x: Tensor) -> None:
    x = chart.normalize(x)  # elements that pass `check` may be of a length that is not quite one
    noise = private_noise(x.new_empty(*x.shape[:-1], chart.tangent), 1)
    noise = noise / noise.norm(dim=-1).amax() if noise.numel() else noise  # steps of different lengths
    _compare(chart, "`retract(x, 0)`", chart.retract(x, 0 * noise), "`x`", x)
    for size in _SIZES:
        d = size * noise
        moved = chart.retract(x, d)
        _compare(chart, f"`local(x, retract(x, d))` for |d| <= {size:g}", chart.local(x, moved), "`d`", d, x)
        alone = [chart.retract(a, b) for a, b in zip(_rows(x), _rows(d), strict=True)]
        if alone:
            together = "`retract` of elements alone"
            _compare(chart, together, torch.cat(alone), "`retract` of them together", torch.cat(list(_rows(moved))))


def _check_derivative(chart: Chart, x: Tensor) -> None:
    x = chart.normalize(x)
    J = chart.storage_jacobian(x)
    if not bool(J.isfinite().all()):
        todo = "Where it divides by the length of `d`, use a series near zero."
        _broken(chart, "with a derivative at d = 0 that is not finite", "`retract` must be differentiable there", todo)
    step = torch.finfo(x.dtype).eps ** (1 / 3)  # where truncation and rounding of a central difference are alike
    for k in range(chart.tangent):
        d = x.new_zeros(*x.shape[:-1], chart.tangent)
        d[..., k] = step
        slope = (chart.retract(x, d) - chart.retract(x, -d)) / (2 * step)
        off = (J[..., k] - slope).abs().amax() if slope.numel() else slope.sum()
        if not float(off) <= difference_tolerance(x.dtype) * float(1 + slope.abs().max() if slope.numel() else 1):
            came = f"with a column {k} of `storage_jacobian` that is off central differences by {float(off):.2g}"
            _broken(chart, came, "it must be the derivative of `retract(x, d)` at d = 0")


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    return x.reshape(-1, x.shape[-1]).split(1)


def _compare(chart: Chart, name: str, found: Tensor, other: str, right: Tensor, beside: Tensor | None = None) -> None:
    """Refuse what differs by more than a few roundings of the numbers that it was made of."""
    if not right.numel():
        return
    sizes = [float(t.abs().max()) for t in (right, beside) if t is not None]
    off = float((found - right).abs().max())
    if not off <= few_operations_tolerance(right.dtype) * max(sizes):
        _broken(chart, f"with {name} off {other} by {off:.2g}", f"they must agree for {chart!r} to be a chart")


def _broken(chart: Chart, came: str, needed: str, todo: str = "") -> NoReturn:
    raise InputError.of("chart", f"{chart!r} {came}", needed, todo)
