"""Functions of an angle without cancellation, and quaternions `(x, y, z, w)`."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import comb, factorial, pi

import torch
from torch import Tensor

_SERIES_BELOW = 1.0  # squared angles below which the series are used
_TERMS = 12  # at angles up to 1 what is left out is below 1e-19
_RATIO_BELOW = 1e-3  # squared tangents of the half angle, the same for the arctangent


def _even(squared: Tensor, series: list[float], closed: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a function of a squared angle: a power series in it near zero, else `closed(angle)`."""
    small = squared < _SERIES_BELOW
    near = torch.where(small, squared, torch.zeros_like(squared))
    far = torch.where(small, torch.ones_like(squared), squared).sqrt()
    total = torch.full_like(near, series[-1])
    for coefficient in reversed(series[:-1]):
        total = total * near + coefficient
    return torch.where(small, total, closed(far))


def _taylor(offset: int) -> list[float]:
    """Return the coefficients of sum_k (-x)^k / (2k + offset)!."""
    return [(-1.0) ** k / factorial(2 * k + offset) for k in range(_TERMS)]


def _cotangent_series() -> list[float]:
    """Return the coefficients of (1 - (a/2) cot(a/2)) / a^2 in a^2: |B_2k| / (2k)!."""
    numbers: list[Fraction] = []
    for m in range(2 * _TERMS + 1):
        known = sum((comb(m + 1, k) * numbers[k] for k in range(m)), Fraction(0))
        numbers.append(Fraction(1) if m == 0 else -known / (m + 1))
    return [float(abs(numbers[2 * k]) / factorial(2 * k)) for k in range(1, _TERMS + 1)]


_COTANGENT = _cotangent_series()


def sinc(squared: Tensor) -> Tensor:
    return _even(squared, _taylor(1), lambda a: a.sin() / a)


def cosine(squared: Tensor) -> Tensor:
    return _even(squared, _taylor(0), torch.cos)


def versine(squared: Tensor) -> Tensor:
    return _even(squared, _taylor(2), lambda a: 2 * (a / 2).sin() ** 2 / a**2)


def sine_rest(squared: Tensor) -> Tensor:
    return _even(squared, _taylor(3), lambda a: (a - a.sin()) / a**3)


def cotangent_rest(squared: Tensor) -> Tensor:
    return _even(squared, _COTANGENT, lambda a: (1 - a / 2 * (a / 2).cos() / (a / 2).sin()) / a**2)


def wrapped(angle: Tensor) -> Tensor:
    return angle - 2 * pi * (angle / (2 * pi)).detach().round()


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def cross(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.cross(a, b)


def turned_2d(angle: Tensor, p: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    x, y = p[..., :1], p[..., 1:]
    return torch.cat([c * x - s * y, s * x + c * y], -1)


def quarter_turn(p: Tensor) -> Tensor:
    return torch.cat([-p[..., 1:], p[..., :1]], -1)


def turned(q: Tensor, p: Tensor) -> Tensor:
    v, w = q[..., :3], q[..., 3:]
    twice = 2 * cross(v, p)
    return p + w * twice + cross(v, twice)


def product(a: Tensor, b: Tensor) -> Tensor:
    v, w, u, z = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    return torch.cat([w * u + z * v + cross(v, u), w * z - dot(v, u)], -1)


def conjugate(q: Tensor) -> Tensor:
    return torch.cat([-q[..., :3], q[..., 3:]], -1)


def quaternion_exp(d: Tensor) -> Tensor:
    quarter = dot(d, d) / 4
    return torch.cat([d * sinc(quarter) / 2, cosine(quarter)], -1)


def quaternion_log(q: Tensor) -> Tensor:
    """Return rotation vectors: 2 atan2(|v|, w) v / |v| on the side w >= 0; the length of `q` does not matter."""
    q = torch.where(q[..., 3:] < 0, -q, q)
    v, w = q[..., :3], q[..., 3:]
    squared = dot(v, v)
    small = squared < _RATIO_BELOW * w * w
    ratio = torch.where(small, squared, torch.zeros_like(w)) / torch.where(small, w, torch.ones_like(w)) ** 2
    total = torch.zeros_like(ratio)
    # Eight terms at ratios up to 1e-3: what is left out is below 1e-24.
    for k in reversed(range(8)):
        total = total * ratio + (-1.0) ** k / (2 * k + 1)
    size = torch.where(small, torch.ones_like(w), squared).sqrt()
    near = 2 * total / torch.where(small, w, torch.ones_like(w))
    return v * torch.where(small, near, 2 * torch.atan2(size, w) / size)
