"""Checks a user can run: is this derivative what finite differences say, is this operator's transpose its adjoint?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._display import Described, Description
from ._keywords import keywords
from ._operators import Operator
from ._picks import Picks, picked
from ._recorded_loss import check_usable
from ._runtime.agreement import inner, size, tolerance
from ._runtime.contexts import eager, private_noise
from ._saving import Savable
from ._torch.protocol import record_model


@dataclass(frozen=True, repr=False)
class Check(Savable, Described):
    """How far two ways to the same number are apart.

    Attributes:
        name: What was compared.
        error: Relative distance.
        allowed: What rounding accounts for.
    """

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether rounding accounts for the distance."""
        return self.error <= self.allowed

    def _describe(self) -> Description:
        verdict = "passed" if self.passed else "FAILED"
        return Description(f"Check({self.name}: {verdict}, error {self.error:.1e}, allowed {self.allowed:.1e})")


def adjoint_check(operator: Operator, seed: int = 0) -> Check:
    r"""Return how far $\langle A v, u \rangle$ and $\langle v, A^\top u \rangle$ are apart, for random u and v."""
    domain, codomain = operator.domain, operator.codomain
    v = private_noise(torch.empty(domain.dim, dtype=domain.dtype, device=domain.device), seed)
    u = private_noise(torch.empty(codomain.dim, dtype=codomain.dtype, device=codomain.device), seed + 1)
    image, preimage = operator._apply(v.unsqueeze(0)), operator._apply_transpose(u.unsqueeze(0))
    left, right = float(inner(u, image)), float(inner(v, preimage))
    scale = max(size(image), size(preimage), torch.finfo(torch.float64).tiny)
    return Check("adjoint", abs(left - right) / scale, tolerance([domain.dtype, codomain.dtype]))


def _typical(tensor: Tensor) -> float:
    return size(tensor) / max(tensor.numel(), 1) ** 0.5


@keywords()
@eager
def check(model: nn.Module, inputs: Any, *, seed: int = 0, parameters: Picks = None) -> Check:
    r"""Return how far a Jacobian-vector product is from a central difference along one random direction.

    It finds what autograd itself is silent about: a wrong backward, `.item()` or `detach()` in the forward, a value
    taken out and put back. Three forwards and one product.

    Args:
        model: A module, differentiated as it stands.
        inputs: Its input: a tuple is unpacked into positional arguments, a mapping into keyword arguments.
        seed: Of the random direction.
        parameters: Which parameters are moved, as in `jacobian`.

    Returns:
        A `Check`; where its `passed` is False, the derivative is not that of the function.

    Raises:
        ModelStateError: There are no parameters to move.
        NotDifferentiableError: The output has no path to them.
    """
    picks = picked(model, parameters)
    found = record_model(model, inputs, call="check", parameters=picks)
    lin = found.lin
    check_usable(lin)
    # Every tensor moves by the same share of its own typical entry.
    direction = [private_noise(leaf, seed + i) * (_typical(leaf) or 1.0) for i, leaf in enumerate(lin.leaves)]
    eps = max(torch.finfo(d).eps for d in (*lin.domain.dtypes, *lin.codomain.dtypes))
    step = eps ** (1 / 3)
    product = lin.push_rows([d.unsqueeze(0) for d in direction])
    moved = []
    for sign in (1, -1):
        shift = {name: sign * step * d for name, d in zip(lin.domain.names, direction, strict=True)}
        moved.append(record_model(model, inputs, call="check", parameters=picks, shift=shift).lin.outputs)
    error = scale = 0.0
    for p, up, down in zip(product, *moved, strict=True):
        difference = (up.detach() - down.detach()) / (2 * step)
        error, scale = error + size(p[0] - difference) ** 2, scale + max(size(p), size(difference)) ** 2
    relative = (error / scale) ** 0.5 if scale else 0.0
    # The error of central differences is about eps ** (2/3) times that of third derivatives: room for 100.
    return Check("central difference", relative, 100 * eps ** (2 / 3))
