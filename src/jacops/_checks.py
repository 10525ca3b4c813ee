"""Checks a user can run: is this derivative what finite differences say, is this operator's transpose its adjoint?"""

from __future__ import annotations

from collections.abc import Sequence
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
from ._torch.protocol import ModelRun

_BENDS = 2.0  # kinks ahead and behind add up in both differences with either sign: to about the same size, if many


@dataclass(frozen=True, repr=False)
class Check(Savable, Described):
    """A comparison of two computations of the same values.

    Attributes:
        name: What was compared.
        error: Relative distance, minus what kinks explain.
        allowed: What rounding explains.
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


def _apart(product: Sequence[Tensor], at: Sequence[Tensor], moved: Sequence[Sequence[Tensor]], h: float) -> float:
    """Return how far products `(1, *output)` are from central differences, less what kinks between do to these."""
    error = scale = bend = 0.0
    for p, middle, right, left in zip(product, at, *moved, strict=True):
        middle, right, left = middle.detach(), right.detach(), left.detach()
        difference = (right - left) / (2 * h)
        error, scale = error + size(p[0] - difference) ** 2, scale + max(size(p), size(difference)) ** 2
        bend += size((right - 2 * middle + left) / (2 * h)) ** 2  # one kink changes `difference` by just as much
    return max(0.0, error**0.5 - _BENDS * bend**0.5) / scale**0.5 if scale else 0.0


@keywords()
@eager
def check(model: nn.Module, inputs: Any, *, seed: int = 0, parameters: Picks = None) -> Check:
    r"""Return how far a Jacobian-vector product is from a central difference along one random direction.

    It detects errors that autograd does not report: a wrong backward, `.item()` or `detach()` in the forward, a value
    taken out and put back. It takes three forward passes and one product. Kinks (a ReLU whose input changes sign)
    change the difference too, by at most about the second difference, twice which is tolerated. An error below the
    curvature along one step, some `eps ** (1/3) / 8` of the derivative, is tolerated as well.

    Args:
        model: A module, differentiated in its current mode.
        inputs: Its input: a tuple is unpacked into positional arguments, a mapping into keyword arguments.
        seed: Of the random direction.
        parameters: Which parameters are moved: names with patterns (`fnmatch`), tensors or a predicate; None for all.

    Returns:
        A `Check`; where its `passed` is False, the derivative is not that of the function.

    Raises:
        ModelStateError: There are no parameters to move.
        NotDifferentiableError: The output has no path to them.

    Example:
        >>> check(torch.nn.Linear(2, 1), torch.ones(3, 2)).passed
        True
    """
    picks = picked(model, parameters)
    found = ModelRun(model, inputs, call="check", parameters=picks).recorded()
    lin = found.lin
    check_usable(lin)
    # Every tensor moves by the same share of its own typical entry.
    direction = [private_noise(leaf, seed + i) * (_typical(leaf) or 1.0) for i, leaf in enumerate(lin.leaves)]
    eps = max(torch.finfo(d).eps for d in (*lin.domain.dtypes, *lin.codomain.dtypes))
    # An eighth of the step that is best for a smooth function: fewer kinks on the way, and rounding is a tenth of what
    # is allowed. With it 1 of 288 right nets failed, up to 30 layers deep, and 1 of 45 wrong ones passed.
    step = eps ** (1 / 3) / 8
    product = lin.push_rows([d.unsqueeze(0) for d in direction])
    moved = []
    for sign in (1, -1):
        shift = {name: sign * step * d for name, d in zip(lin.domain.names, direction, strict=True)}
        moved.append(ModelRun(model, inputs, call="check", parameters=picks, shift=shift).recorded().lin.outputs)
    relative = _apart(product, lin.outputs, moved, step)
    # The error of central differences is about eps ** (2/3) times that of third derivatives: room for 100.
    return Check("central difference", relative, 100 * eps ** (2 / 3))
