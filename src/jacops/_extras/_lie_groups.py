"""The groups of PyPose: how elements are stored, how `X <- Exp(d) X` moves them, and what Log and Exp owe to it."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

_PARTS = {"SO3": (0, 0), "SE3": (1, 0), "RxSO3": (0, 1), "Sim3": (1, 1)}  # has a translation, has a scale
_SMALL = 0.1  # angles in radians from which on PyPose's figures for SE3 hold all digits
ALGEBRAS = {name.lower(): name for name in _PARTS}


def group_of(tensor: Any) -> str:
    """Return the name of the group a LieTensor is in, empty for algebras and plain tensors."""
    ltype: Any = getattr(tensor, "ltype", None)
    name = type(ltype).__name__.removesuffix("Type")
    return name if name in _PARTS and tensor.shape[-1:] == ltype.dimension else ""


def storage_width(group: str) -> int:
    """Return how many numbers an element is stored in: translation (3), quaternion (4), scale (1)."""
    translation, scale = _PARTS[group]
    return 3 * translation + 4 + scale


def parts_of(group: str) -> dict[tuple[int, int], tuple[str, str]]:
    """Return parts of storage by `(start, width)`: `(group, "")` of elements of a group, `("", method)` of numbers."""
    translation, scale = _PARTS[group]
    at = 3 * translation
    parts = {(0, storage_width(group)): (group, ""), (at, 4): ("SO3", "")}
    if translation:
        parts[0, 3] = "", "translation"
    if scale:
        parts[at + 4, 1] = "", "scale"
    if translation and scale:
        parts[at, 5] = "RxSO3", ""
    return parts


def storage_jacobian(group: str, elements: Tensor) -> Tensor:
    r"""Return how stored `elements` (n, width) move with $d$ in $\exp(d) X$ at $d = 0$, (n, width, tangent).

    With $d = (\rho, \varphi, \sigma)$ as far as the group has them: $\dot t = \rho + \varphi \times t + \sigma t$,
    $\dot q = \tfrac12 \varphi \otimes q$ and $\dot s = \sigma s$.
    """
    translation, scale = _PARTS[group]
    free, at = storage_width(group) - 1, 3 * translation
    d = torch.eye(free, dtype=elements.dtype, device=elements.device).expand(len(elements), free, free)
    x = elements.unsqueeze(1).expand(-1, free, -1)
    turn, grow = d[..., at : at + 3], d[..., -1:] * scale
    vector, real = x[..., at : at + 3], x[..., at + 3 : at + 4]
    moved = [(turn * real + torch.linalg.cross(turn, vector)) / 2, -(turn * vector).sum(-1, keepdim=True) / 2]
    if translation:
        moved.insert(0, d[..., :3] + torch.linalg.cross(turn, x[..., :3]) + grow * x[..., :3])
    if scale:
        moved.append(grow * x[..., -1:])
    return torch.cat(moved, -1).mT


def exact_series(function: str, vectors: Tensor, noise: float) -> Tensor | None:
    r"""Return the derivative of Log or Exp at tangent vectors, (*, m, m), where PyPose's own figures for it are off.

    PyPose cuts the series for Sim3 off after six terms, and loses digits on SE3 at small angles (in float32, all).
    The left Jacobian is $J(x) = \sum_k \mathrm{ad}(x)^k / (k + 1)!$, summed here until nothing is added.

    Args:
        function: PyPose's name, such as `SE3_Log`.
        vectors: The result of Log, or the argument of Exp.
        noise: Relative errors from here on count.
    """
    from pypose.lietensor import operation

    algebra, verb = function.lower().split("_")
    if algebra not in ("se3", "sim3") or not vectors.numel() or not bool(torch.isfinite(vectors).all()):
        return None
    radii = vectors.detach()[..., 3:].norm(dim=-1)
    # On SE3 only small angles lose digits; everything is summed where the sum itself is to be differentiated.
    off = radii <= _SMALL if noise and algebra == "se3" else torch.ones_like(radii, dtype=torch.bool)
    if not bool(off.any()):
        return None
    of_pypose = getattr(operation, f"{algebra}_Jl" + ("_inv" if verb == "log" else ""))
    total = _summed(getattr(operation, f"{algebra}_adj")(vectors[off].double()), float(radii[off].max()), verb == "log")
    error = (of_pypose(vectors.detach()[off]) - total).norm(dim=(-2, -1)) / total.norm(dim=(-2, -1))
    if not bool((error >= noise).any()):
        return None
    if bool(off.all()):
        return total.reshape(*radii.shape, *total.shape[-2:]).to(vectors.dtype)
    exact = of_pypose(vectors.detach()).clone()
    exact[off] = total.to(vectors.dtype)
    return exact


def _summed(bracket: Tensor, radius: float, inverse: bool) -> Tensor:
    """Return the left Jacobian, or its inverse, by its series in the bracket, up to angles of `radius`."""
    one = torch.eye(bracket.shape[-1], dtype=bracket.dtype, device=bracket.device)
    total = one
    # Terms r**k / (k + 1)!: at r = 0.1 twelve leave 1e-22; beyond e r of them they fall, and 24 more end below eps.
    for k in range(12 if radius <= _SMALL else 24 + math.ceil(4 * radius), 0, -1):
        total = one + bracket @ total / (k + 1)
    return torch.linalg.inv(total) if inverse else total


class Mended:
    """A hook on a Log or Exp that puts its gradient right; it holds the node weakly, which holds it."""

    def __init__(self, node: Any, name: str, exact: Tensor) -> None:
        self.node, self.name, self.exact = weakref.ref(node), name, exact

    def __call__(self, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> tuple[Tensor] | None:
        (grad,), exact, node = outputs, self.exact, self.node()
        if grad is None:
            return None
        if torch.is_grad_enabled() and node is not None and (vectors := node.saved_tensors[0]).requires_grad:
            again = exact_series(self.name, vectors, noise=0)
            exact = exact if again is None else again
        if self.name.endswith("Exp"):
            return ((grad[..., :-1].unsqueeze(-2) @ exact).squeeze(-2),)
        moved = (grad.unsqueeze(-2) @ exact).squeeze(-2)
        return (torch.cat([moved, torch.zeros_like(moved[..., :1])], -1),)
