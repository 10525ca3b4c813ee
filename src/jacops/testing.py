"""The properties that every operator must have, as tests for custom operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import adjoint_check
from ._keywords import keywords
from ._lazy import eager
from ._operators import Operator
from ._runtime.agreement import size, tolerance
from ._runtime.contexts import private_noise

__all__ = ["LawBrokenError", "check_operator"]


class LawBrokenError(AssertionError):
    """An operator breaks a law of linear maps."""


@keywords()
def check_operator(operator: Operator, *, seed: int = 0, rows: int = 3) -> None:
    r"""Check the properties of an operator: adjoint, linearity, `dense()` equal to products, and its marks.

    It checks $\langle A v, u\rangle = \langle v, A^\top u\rangle$, $A(2v + w) = 2Av + Aw$, that `dense()` gives what
    products with random vectors give on both sides, that many rows at once give what one by one gives, and that
    `symmetric` and `positive` are true on random vectors.

    Args:
        operator: Any operator small enough for `dense()`.
        seed: Of the random vectors; the global state is not drawn from.
        rows: How many vectors at once.

    Raises:
        LawBrokenError: A law does not hold; the message names it and by how much.

    Example:
        >>> import jacops
        >>> check_operator(jacops.jacobian(torch.nn.Linear(3, 2), torch.ones(4, 3)))
    """
    allowed = tolerance([operator.domain.dtype, operator.codomain.dtype])
    adjoint = adjoint_check(operator, seed)
    if not adjoint.error <= allowed:
        raise LawBrokenError(f"<Av, u> and <v, A'u> differ by {adjoint.error:.1e} (relative), of {operator!r}")
    v, w = _draw(operator, rows, seed), _draw(operator, rows, seed + 10)
    u = _draw(operator.T, rows, seed + 20)
    image, dense = operator._apply(v), operator.dense()
    _same("A(2v + w) = 2Av + Aw", operator, operator._apply(2 * v + w), 2 * image + operator._apply(w), allowed)
    _same("dense() = products", operator, image, v @ dense.T, allowed)
    _same("dense() = transposed products", operator, operator._apply_transpose(u), u @ dense, allowed)
    _same(
        "many rows = one by one", operator, image, torch.cat([operator._apply(row.unsqueeze(0)) for row in v]), allowed
    )
    if operator.symmetric:
        _same("symmetric", operator, dense, dense.T, allowed)
    if operator.positive and float((v * image).sum(1).min()) < -allowed * size(v) * max(size(image), 1.0):
        raise LawBrokenError(f"marked positive, but v'Av is {float((v * image).sum(1).min()):.1e}, of {operator!r}")


def _draw(operator: Operator, rows: int, seed: int) -> Tensor:
    space = operator.domain
    return private_noise(torch.empty(rows, space.dim, dtype=space.dtype, device=space.device), seed)


def _same(law: str, operator: Operator, a: Tensor, b: Tensor, allowed: float) -> None:
    scale = max(size(a), size(b))
    if a.shape != b.shape or not size(a - b) <= allowed * scale + torch.finfo(a.dtype).tiny:
        raise LawBrokenError(f"'{law}' fails by {size(a - b) / max(scale, 1e-300):.1e} (relative), of {operator!r}")


eager(__name__)
