r"""Robust kernels: how much a residual block of squared length $s$ counts, $\rho(s)$, and the correction for it.

The objective is $\tfrac12 \sum_k \rho(s_k)$, $s_k = \lVert r_k \rVert^2$. Kernels are those of Ceres, SciPy and PyPose,
under their names; each class documents its formula.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, isfinite, log1p
from typing import Any, final

import numpy as np
import torch

from .._requirements import check_choice, check_number
from .._runtime.contexts import arithmetic
from .._runtime.restoring import restoring
from .._words import KernelName
from ..errors import InputError, InputTypeError

Array = np.ndarray
_FLOOR = 1e-2  # least curvature along a residual that Triggs' correction keeps, relative to that without a kernel


@dataclass(frozen=True)
class Kernel(ABC):
    """A robust kernel: `kernel(s)` returns value, first and second derivative at squared lengths `s`."""

    def __post_init__(self) -> None:
        """Refuse a scale that is not positive.

        Raises:
            InputError: It is not a positive finite number.
        """
        for name, value in vars(self).items():
            if isinstance(value, float | int):
                check_number(name, value)

    @abstractmethod
    def __call__(self, s: Array) -> tuple[Array, Array, Array]:
        """Return value, first and second derivative."""


@dataclass(frozen=True)
class _Scaled(Kernel):
    """A kernel with a scale."""

    delta: float = 1.0


@final
@dataclass(frozen=True)
class Huber(_Scaled):
    r"""$s$ up to $\delta^2$, then $2\delta\sqrt{s} - \delta^2$ (Huber, 1964); SciPy's `huber` with `f_scale=delta`.

    Example:
        >>> Huber()(np.array([0.25, 4.0]))[0]
        array([0.25, 3.  ])
    """

    def __call__(self, s: Array) -> tuple[Array, Array, Array]:
        """Return value, first and second derivative."""
        out = s > self.delta**2
        root = np.sqrt(np.where(out, s, 1.0))
        value = np.where(out, 2 * self.delta * root - self.delta**2, s)
        return value, np.where(out, self.delta / root, 1.0), np.where(out, -self.delta / (2 * root**3), 0.0)


@final
@dataclass(frozen=True)
class PseudoHuber(_Scaled):
    r"""$2\delta^2(\sqrt{1 + s/\delta^2} - 1)$ (Charbonnier et al., 1997); SciPy's `soft_l1` with `f_scale=delta`."""

    def __call__(self, s: Array) -> tuple[Array, Array, Array]:
        """Return value, first and second derivative."""
        root = np.sqrt(1 + s / self.delta**2)
        return 2 * s / (root + 1), 1 / root, -0.5 / (self.delta**2 * root**3)


@final
@dataclass(frozen=True)
class SoftLOne(_Scaled):
    r"""$2(\sqrt{1 + \delta^2 s} - 1)$, PyPose's formula; SciPy's `soft_l1` is `PseudoHuber(f_scale)`."""

    def __call__(self, s: Array) -> tuple[Array, Array, Array]:
        """Return value, first and second derivative."""
        squared = self.delta**2
        root = np.sqrt(1 + squared * s)
        return 2 * squared * s / (root + 1), squared / root, -0.5 * squared**2 / root**3


@final
@dataclass(frozen=True)
class Cauchy(_Scaled):
    r"""$\delta^2 \ln(1 + s/\delta^2)$; SciPy's `cauchy` with `f_scale=delta`."""

    def __call__(self, s: Array) -> tuple[Array, Array, Array]:
        """Return value, first and second derivative."""
        squared = self.delta**2
        z = 1 + s / squared
        return squared * np.log1p(s / squared), 1 / z, -1 / (squared * z**2)


@final
@dataclass(frozen=True)
class Arctan(_Scaled):
    r"""$\delta^2 \arctan(s/\delta^2)$; SciPy's `arctan` with `f_scale=delta`."""

    def __call__(self, s: Array) -> tuple[Array, Array, Array]:
        """Return value, first and second derivative."""
        squared = self.delta**2
        z = s / squared
        return squared * np.arctan(z), 1 / (1 + z**2), -2 * z / (squared * (1 + z**2) ** 2)


@final
@dataclass(frozen=True)
class Tolerant(Kernel):
    r"""$b\ln(1 + e^{(s-a)/b}) - b\ln(1 + e^{-a/b})$ with $b > 0$, Ceres' tolerant loss: nearly nothing below $a$.

    (PyPose's documentation requires $b < 0$, with which the kernel levels off at $a$ instead: `b=-1.0` gives that one.)
    """

    a: float = 1.0
    b: float = -1.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            InputError: `a` is not positive or `b` is zero.
        """
        check_number("a", self.a)
        if not (self.b != 0 and isfinite(self.b)):
            raise InputError.of("b", repr(self.b), "a number other than zero is needed")

    def __call__(self, s: Array) -> tuple[Array, Array, Array]:
        """Return value, first and second derivative."""
        z = (s - self.a) / self.b
        start = -self.a / self.b
        offset = start + log1p(exp(-start)) if start > 0 else log1p(exp(start))
        slope = np.where(z > 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))
        return self.b * (np.logaddexp(0, z) - offset), slope, slope * (1 - slope) / self.b


@final
@dataclass(frozen=True)
class Scale(_Scaled):
    r"""$\delta s$: the block counts `delta` times."""

    def __call__(self, s: Array) -> tuple[Array, Array, Array]:
        """Return value, first and second derivative."""
        return self.delta * s, np.full_like(s, self.delta), np.zeros_like(s)


@final
@dataclass(frozen=True)
class _Given(Kernel):
    """A kernel of the caller's, a function of torch tensors (PyPose's modules too), differentiated by torch."""

    function: Callable[[torch.Tensor], torch.Tensor]

    @restoring
    def __call__(self, s: Array) -> tuple[Array, Array, Array]:
        with arithmetic(True):
            leaf = torch.from_numpy(s.copy()).requires_grad_()
            value = self.function(leaf)
            if not isinstance(value, torch.Tensor) or value.shape != leaf.shape or not value.requires_grad:
                came = f"giving a {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
                needed = f"a differentiable tensor of the shape of its argument, {tuple(leaf.shape)}, is needed"
                raise InputError.of("kernel", came, needed)
            (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            second = torch.autograd.grad(first.sum(), leaf, allow_unused=True)[0] if first.requires_grad else None
        curve = torch.zeros_like(first) if second is None else second.nan_to_num(0.0)
        return value.detach().numpy(), first.detach().numpy(), curve.detach().numpy()


_NAMES: dict[KernelName, Callable[[float], Kernel]] = {
    "huber": Huber,
    "soft_l1": PseudoHuber,
    "cauchy": Cauchy,
    "arctan": Arctan,
}


def kernel_of(kernel: Any, f_scale: float) -> Kernel | None:
    """Return the kernel meant by a name of SciPy's, a kernel, or a function of squared lengths.

    Raises:
        InputError: The name is unknown, or `f_scale` is not positive.
        InputTypeError: It is none of these.
    """
    if kernel is None:
        return None
    if isinstance(kernel, str):
        name: KernelName = check_choice("kernel", kernel, KernelName, " or a Kernel")
        if name == "linear":
            return None
        check_number("f_scale", f_scale)
        return _NAMES[name](float(f_scale))
    if isinstance(kernel, Kernel):
        return kernel
    if callable(kernel) and not isinstance(kernel, type):
        return _Given(kernel)  # pyright: ignore[reportArgumentType] - what it gives is checked when it is called
    came = f"the class {kernel.__name__}" if isinstance(kernel, type) else f"a {type(kernel).__name__}"
    raise InputTypeError.of("kernel", came, "a name, a Kernel or a function of squared lengths is needed")


def correction(kernel: Kernel, r: Array, second_order: bool) -> tuple[Array, Array, Array, Array | None]:
    r"""Return the kernel's values, corrected residuals, and what the rows of the Jacobian are multiplied by.

    First order: residual and Jacobian times $\sqrt{\rho'}$. Second order (Triggs et al., Bundle adjustment: a modern
    synthesis, 1999, section 4.3): with $D = 1 + 2 s \rho''/\rho'$, residuals times $\sqrt{\rho'/D}$ and Jacobians times
    $\sqrt{\rho'}\,(I - (1 - \sqrt{D})\, r r^\top / s)$, so that $J^\top r$ is the gradient and $J^\top J$ the Hessian
    without second derivatives of the residual. $D$ is kept above 0.01, since it may vanish or be negative.

    Args:
        kernel: The kernel.
        r: Residuals `(blocks, d)`.
        second_order: Take the second derivative into account.

    Returns:
        Values $\rho(s)$ per block; corrected residuals `(blocks, d)`; the factor $\sqrt{\rho'}$ per block; and per
        block $(1 - \sqrt{D})\, r / s$, None in the first order.
    """
    s = np.einsum("kd,kd->k", r, r)
    value, first, second = kernel(s)
    if not (np.isfinite(first) & (first >= 0)).all():
        raise InputError.of("kernel", "falling somewhere, or without a slope", "it must rise with its argument")
    factor = np.sqrt(first)
    if not second_order:
        return value, r * factor[:, None], factor, None
    curvature = 1 + 2 * s * np.divide(second, first, out=np.zeros_like(s), where=first > 0)
    root = np.sqrt(np.maximum(curvature, _FLOOR))
    share = np.divide(1 - root, s, out=np.zeros_like(s), where=s > 0)
    return value, r * (factor / root)[:, None], factor, share[:, None] * r


def left_curvature(kernel: Kernel, r: Array, second_order: bool) -> Array:
    r"""Return per block the curvature along its residual, by that which corrected Jacobians have: $D$, or one."""
    s = np.einsum("kd,kd->k", r, r)
    _, first, second = kernel(s)
    curvature = 1 + 2 * s * np.divide(second, first, out=np.zeros_like(s), where=first > 0)
    return curvature / np.maximum(curvature, _FLOOR) if second_order else curvature
