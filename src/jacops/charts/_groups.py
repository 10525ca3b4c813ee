"""Rotations and poses of the plane and of space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..errors import InputError
from ._angles import (
    axis_and_rest,
    conjugate,
    cotangent_rest,
    cross,
    dot,
    lengths,
    product,
    quarter_turn,
    quaternion_exp,
    quaternion_log,
    rotation_vector,
    sinc,
    sine_rest,
    turned,
    turned_2d,
    versine,
    wrapped,
)
from ._group import GroupChart


def check_unit(name: str, argument: str, q: Tensor, what: str = "quaternion") -> None:
    """Refuse rows that are not of length one.

    Raises:
        InputError: One is not.
    """
    sizes = q.detach().norm(dim=-1)
    # Numbers written with four digits pass; in half precision a few roundings do.
    tolerance = 1e-3 if q.dtype in (torch.float32, torch.float64) else 5e-2
    if sizes.numel() and not bool(((sizes - 1).abs() <= tolerance).all()):
        worst = int((sizes - 1).abs().nan_to_num(torch.inf).argmax())
        came = f"holding a {what} of length {float(sizes.reshape(-1)[worst]):.3g} (element {worst})"
        raise InputError.of(argument, came, f"{name} needs length one", f"Call `{name}.normalize` on it.")


@final
@dataclass(frozen=True, repr=False)
class _SO2(GroupChart):
    def magnitudes(self, x: Tensor) -> Tensor:
        return x.abs().clamp(min=1.0)

    def storage_jacobian(self, x: Tensor) -> Tensor:
        return torch.ones_like(x).unsqueeze(-1)

    def _exp(self, d: Tensor) -> Tensor:
        return d.clone()

    def _log(self, x: Tensor) -> Tensor:
        return wrapped(x)

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def _inverse(self, x: Tensor) -> Tensor:
        return -x

    def _act(self, x: Tensor, p: Tensor) -> Tensor:
        return turned_2d(x, p)

    def _matrix(self, x: Tensor) -> Tensor:
        return self._linear(x)


@final
@dataclass(frozen=True, repr=False)
class _SE2(GroupChart):
    def magnitudes(self, x: Tensor) -> Tensor:
        moved, angle = x.split([2, 1], -1)
        return torch.cat([lengths(moved, 2), SO2.magnitudes(angle)], -1)

    def storage_jacobian(self, x: Tensor) -> Tensor:
        move = torch.eye(3, dtype=x.dtype, device=x.device).expand(*x.shape, 3).clone()
        move[..., :2, 2] = quarter_turn(x[..., :2])
        return move

    def _exp(self, d: Tensor) -> Tensor:
        step, angle = d[..., :2], d[..., 2:]
        squared = angle * angle
        return torch.cat([sinc(squared) * step + versine(squared) * angle * quarter_turn(step), angle], -1)

    def _log(self, x: Tensor) -> Tensor:
        return self._log_of(*x.split([2, 1], -1))

    def _log_of(self, moved: Tensor, angle: Tensor) -> Tensor:
        angle = wrapped(angle)
        squared = angle * angle
        step = (1 - squared * cotangent_rest(squared)) * moved - angle / 2 * quarter_turn(moved)
        return torch.cat([step, angle], -1)

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        (moved, angle), (step, turn) = a.split([2, 1], -1), b.split([2, 1], -1)
        return torch.cat([moved + turned_2d(angle, step), angle + turn], -1)

    def _inverse(self, x: Tensor) -> Tensor:
        moved, angle = x.split([2, 1], -1)
        return torch.cat([-turned_2d(-angle, moved), -angle], -1)

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        moved, turn = (b - a).split([2, 1], -1)
        return torch.cat([turned_2d(-a[..., 2:], moved), turn], -1)

    def _edge_error(self, expected: Tensor, a: Tensor, b: Tensor) -> Tensor:
        (place, back), (start, angle), (end, turn) = (x.split([2, 1], -1) for x in (expected, a, b))
        back = back - angle
        return self._log_of(place + turned_2d(back, end - start), back + turn)

    def _act(self, x: Tensor, p: Tensor) -> Tensor:
        return x[..., :2] + turned_2d(x[..., 2:], p)


@final
@dataclass(frozen=True, repr=False)
class _SO3(GroupChart):
    def magnitudes(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[..., 1:])

    def normalize(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def check(self, x: Any, argument: str = "x") -> None:
        super().check(x, argument)
        check_unit(self.name, argument, x)

    def storage_jacobian(self, x: Tensor) -> Tensor:
        turn = torch.eye(3, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 3, 3)
        v, w = x[..., None, :3].expand_as(turn), x[..., None, 3:]
        return torch.cat([turn * w + cross(turn, v), -x[..., :3].unsqueeze(-1)], -1).mT / 2

    def _exp(self, d: Tensor) -> Tensor:
        return quaternion_exp(d)

    def _log(self, x: Tensor) -> Tensor:
        return quaternion_log(x)

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        return product(a, b)

    def _inverse(self, x: Tensor) -> Tensor:
        return conjugate(x)

    def _act(self, x: Tensor, p: Tensor) -> Tensor:
        return turned(x, p)

    def _matrix(self, x: Tensor) -> Tensor:
        return self._linear(x)


@final
@dataclass(frozen=True, repr=False)
class _SE3(GroupChart):
    def magnitudes(self, x: Tensor) -> Tensor:
        return torch.cat([lengths(x[..., :3], 3), SO3.magnitudes(x[..., 3:])], -1)

    def normalize(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :3], SO3.normalize(x[..., 3:])], -1)

    def check(self, x: Any, argument: str = "x") -> None:
        super().check(x, argument)
        check_unit(self.name, argument, x[..., 3:])

    def storage_jacobian(self, x: Tensor) -> Tensor:
        move = torch.zeros(*x.shape, 6, dtype=x.dtype, device=x.device)
        eye = torch.eye(3, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 3, 3)
        move[..., :3, :3] = eye
        move[..., :3, 3:] = cross(eye, x[..., None, :3].expand_as(eye)).mT
        move[..., 3:, 3:] = SO3.storage_jacobian(x[..., 3:])
        return move

    def _exp(self, d: Tensor) -> Tensor:
        step, turn = d[..., :3], d[..., 3:]
        squared = dot(turn, turn)
        once = cross(turn, step)
        moved = step + versine(squared) * once + sine_rest(squared) * cross(turn, once)
        return torch.cat([moved, quaternion_exp(turn)], -1)

    def _log(self, x: Tensor) -> Tensor:
        moved, turn = axis_and_rest(x)
        return self._log_of(moved, quaternion_log(turn))

    def _log_of(self, moved: Tensor, turn: Tensor) -> Tensor:
        once = cross(turn, moved)
        step = moved - once / 2 + cotangent_rest(dot(turn, turn)) * cross(turn, once)
        return torch.cat([step, turn], -1)

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        (moved, q), (step, r) = axis_and_rest(a), axis_and_rest(b)
        return torch.cat([moved + turned(q, step), product(q, r)], -1)

    def _inverse(self, x: Tensor) -> Tensor:
        moved, q = axis_and_rest(x)
        back = conjugate(q)
        return torch.cat([-turned(back, moved), back], -1)

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        (moved, q), (place, r) = axis_and_rest(a), axis_and_rest(b)
        back = conjugate(q)
        return torch.cat([turned(back, place - moved), product(back, r)], -1)

    def _edge_error(self, expected: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # Quaternions as (v, w), without putting them together in between; first Q = Z^-1 A^-1, which turns once.
        (place, e, e_w), (start, v, w), (end, u, u_w) = (x.split([3, 3, 1], -1) for x in (expected, a, b))
        q = torch.addcmul(torch.addcmul(cross(v, e), w, e), e_w, v, value=-1)
        q_w = e_w * w + dot(e, v)
        twice = 2 * cross(q, end - start)
        moved = place + (end - start) + torch.addcmul(cross(q, twice), q_w, twice)
        v = torch.addcmul(torch.addcmul(cross(q, u), q_w, u), u_w, q)
        return self._log_of(moved, rotation_vector(v, q_w * u_w - dot(q, u)))

    def _act(self, x: Tensor, p: Tensor) -> Tensor:
        return x[..., :3] + turned(x[..., 3:], p)


SO2: GroupChart = _SO2("SO2", 1, 1, 2)
"""Rotations of the plane, stored as an angle `(*, 1)`."""
SE2: GroupChart = _SE2("SE2", 3, 3, 2)
"""Poses in the plane, stored as `(x, y, angle)`; tangent `(step, turn)`."""
SO3: GroupChart = _SO3("SO3", 4, 3, 3)
"""Rotations of space, stored as unit quaternions `(x, y, z, w)`; tangent: rotation vectors."""
SE3: GroupChart = _SE3("SE3", 7, 6, 3)
"""Poses in space, stored as translation and unit quaternion; tangent `(step, turn)`."""
