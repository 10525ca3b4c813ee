"""Second derivatives: linearizations of gradients, and checks of what torch gives when it differentiates one again.

Torch drops a second derivative without a word where a backward is not differentiable itself, and some of its kernels
have wrong ones. Two things show it: a Hessian that is not symmetric, and products that differ from differences of
gradients. What rounding explains is no evidence: where a Hessian is zero but for rounding (a model that fits its data,
a constant loss), the size of that rounding is measured first.
"""

from __future__ import annotations

import copyreg
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._finite import check_finite, is_finite
from ..._ladder.names import Fact
from ..._runtime.agreement import difference_tolerance, inner, size
from ..._runtime.contexts import private_noise
from ..._runtime.rounding import rounding_error
from ...errors import NotDifferentiableError
from .gradient import Gradient
from .graph import refuse_cut
from .linearization import Linearization
from .record import Recording, refuse_copies

copyreg.pickle(Gradient, refuse_copies)


def gradient_linearization(found: Recording, call: str) -> Gradient:
    """Return the linearization of a loss's gradient, ready to be differentiated again.

    Raises:
        NotDifferentiableError: A `once_differentiable` Function cut the graph, or the Hessian is not symmetric.
    """
    gradient = Gradient(found.lin, call)
    _check_twice(found.lin, gradient, call)
    return gradient


def _check_twice(lin: Linearization, gradient: Gradient, call: str) -> None:
    """Refuse a gradient whose own derivative torch drops or gets wrong, as far as two sweeps show it.

    Raises:
        NotDifferentiableError: A backward is marked once_differentiable, or the Hessian is not symmetric.
        NonFiniteError: The loss is finite and a product with its Hessian is not.
    """
    if lin.graph_info.functions:
        refuse_cut(call, lin.graph_info.functions, gradient.outputs)
    if not gradient.proofs.needs(Fact.SYMMETRIC) or not is_finite(lin.outputs[0]):
        return  # a loss that is not finite proves nothing; the operator made of it names the row, if it checks
    u, v = ([private_noise(leaf, first + i) for i, leaf in enumerate(gradient.leaves)] for first in (0, 1000))

    def products() -> list[Tensor]:
        return [*gradient.gradient(u), *gradient.gradient(v)]

    found = products()
    check_finite(call, found, 2 * gradient.domain.names, lin)
    gap = abs(sum(float(inner(a, b.unsqueeze(0))) * sign for a, b, sign in _crossed(u, v, found)))
    scale = math.hypot(*map(size, found))
    if gap <= gradient.tolerance * scale:
        if scale:  # zero is symmetric whatever an operation's second derivative is
            gradient.proofs.remember(Fact.SYMMETRIC)
        gradient.probe = u, found[: len(u)]
        gradient.release()
    elif not gap <= rounding_error(products, found):
        raise asymmetric(call, gap / scale, lin.graph_info.functions)


def _crossed(u: list[Tensor], v: list[Tensor], found: list[Tensor]) -> list[tuple[Tensor, Tensor, int]]:
    """Return the pairs of which inner products are taken for `<v, H u> - <u, H v>`, with their signs."""
    along_u, along_v = found[: len(u)], found[len(u) :]
    return [(a, b, 1) for a, b in zip(v, along_u, strict=True)] + [(a, b, -1) for a, b in zip(u, along_v, strict=True)]


def asymmetric(call: str, error: float, functions: Sequence[str]) -> NotDifferentiableError:
    """Return the error for a second derivative that is not symmetric, and not because of rounding."""
    suspects = f", perhaps of the custom Function {', '.join(functions)}" if functions else ""
    return NotDifferentiableError(
        f"{call}: the second derivative that torch gives is not symmetric (off by {error:.1e}), so it is wrong for "
        f"some operation of this model{suspects}. Write that operation out with elementary ones."
    )


def difference_step(point: Sequence[Tensor]) -> float:
    """Return the length of a step for central differences around a point: eps ** (1/3) of its size, or of 1."""
    eps = max(torch.finfo(part.dtype).eps for part in point)
    return eps ** (1 / 3) * max(1.0, math.hypot(*map(size, point)))


def disagreement(product: Tensor, wide: Tensor, central: Callable[[float], Tensor], step: float) -> float | None:
    """Return by how much a product and central differences differ; None where that may be rounding or the step's error.

    Args:
        product: A derivative along a direction.
        wide: The central difference along that direction with a step of this length.
        central: The same with a given step.
        step: Its length.
    """
    tolerance = difference_tolerance(product.dtype)
    error = _relative(product, wide)
    if not error > tolerance:
        return None
    # A shorter step changes the difference by its truncation error; rounding is measured.
    # A quarter of the step has a sixteenth of its error: the rest has another cause.
    narrow = central(step / 4)
    error = _relative(product, narrow)
    explained = size(wide - narrow) + rounding_error(lambda: [central(step / 4)], [narrow])
    if not error > tolerance or size(product - narrow) <= tolerance * size(product) + explained:
        return None
    return error


def _relative(a: Tensor, b: Tensor) -> float:
    scale = max(size(a), size(b))
    return size(a - b) / scale if scale else 0.0


def dropped(call: str, what: str, error: float, functions: Sequence[str]) -> NotDifferentiableError:
    """Return the error for a derivative that differs from differences of the one before, not because of rounding."""
    return NotDifferentiableError(
        f"{call}: {what} disagree by {error:.1e}, probably because the backward of {', '.join(functions)} drops a "
        "second derivative. Write it with differentiable operations on ctx.saved_tensors."
    )
