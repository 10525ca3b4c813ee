"""Functions of an angle without cancellation, and quaternions `(x, y, z, w)`."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import comb, factorial, pi

import torch
from torch import Tensor

SERIES_BELOW = 1.0  # squared angles below which the series are used
_TERMS = 12  # at angles up to 1 what is left out is below 1e-19
_RATIO_BELOW = 1e-3  # squared tangents of the half angle, the same for the arctangent
_ARCTANGENT = [(-1.0) ** k / (2 * k + 1) for k in range(8)]  # what is left out is below 1e-24


def _even(squared: Tensor, series: list[float], closed: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a function of a squared angle: a power series in it near zero, else `closed(angle)`."""
    small = squared < SERIES_BELOW
    near = polynomial(series, torch.where(small, squared, torch.zeros_like(squared)))
    return torch.where(small, near, closed(torch.where(small, torch.ones_like(squared), squared).sqrt()))


def polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    """Return a polynomial's values, by Horner's rule with one operation a term, which is one node to differentiate."""
    *others, last, highest = x.new_tensor(coefficients).unbind()
    total = torch.addcmul(last, highest, x)
    for coefficient in reversed(others):
        total = torch.addcmul(coefficient, total, x)
    return total


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
    return angle.cos() * p + angle.sin() * quarter_turn(p)


def quarter_turn(p: Tensor) -> Tensor:
    x, y = p.split(1, -1)
    return torch.cat([-y, x], -1)


def axis_and_rest(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first three numbers and the others."""
    first, rest = q.split([3, q.shape[-1] - 3], -1)
    return first, rest


def turned(q: Tensor, p: Tensor) -> Tensor:
    v, w = axis_and_rest(q)
    twice = 2 * cross(v, p)
    return p + torch.addcmul(cross(v, twice), w, twice)


def product(a: Tensor, b: Tensor) -> Tensor:
    (v, w), (u, z) = axis_and_rest(a), axis_and_rest(b)
    return torch.cat([torch.addcmul(torch.addcmul(cross(v, u), w, u), z, v), w * z - dot(v, u)], -1)


def conjugate(q: Tensor) -> Tensor:
    v, w = axis_and_rest(q)
    return torch.cat([-v, w], -1)


def quaternion_exp(d: Tensor) -> Tensor:
    quarter = dot(d, d) / 4
    return torch.cat([d * sinc(quarter) / 2, cosine(quarter)], -1)


def quaternion_log(q: Tensor) -> Tensor:
    """Return rotation vectors: 2 atan2(|v|, w) v / |v| on the side w >= 0; the length of `q` does not matter."""
    return rotation_vector(*axis_and_rest(q))


def rotation_vector(v: Tensor, w: Tensor) -> Tensor:
    """Return `quaternion_log` of `(v, w)`."""
    side = torch.where(w.detach() < 0, -torch.ones_like(w), torch.ones_like(w))
    return (2 * side) * v * angle_per_length(dot(v, v), side * w)


def angle_per_length(squared: Tensor, w: Tensor) -> Tensor:
    """Return atan2(|v|, w) / |v| for a squared length of v; at v = 0 with w < 0, where there is none, some number."""
    ones = torch.ones_like(w)
    small = (squared < _RATIO_BELOW * w * w) & (w > 0)
    divisor = torch.where(small, w, ones)
    near = polynomial(_ARCTANGENT, torch.where(small, squared, torch.zeros_like(w)) / divisor**2) / divisor
    size = torch.where(small | (squared == 0), ones, squared).sqrt()
    return torch.where(small, near, torch.atan2(size, w) / size)


def lengths(v: Tensor, width: int) -> Tensor:
    """Return the lengths of vectors, each `width` times along the last axis."""
    return v.norm(dim=-1, keepdim=True).expand(*v.shape[:-1], width)
