"""Kronecker factors of the curvature of a model with a loss, as a public call."""

from __future__ import annotations

from typing import Any

from ._keywords import keywords
from ._one_batch import OneBatch
from ._picks import Picks
from ._problem import Problem
from ._requirements import check_choice, check_positive
from ._runtime.contexts import eager
from ._words import FactorBias, FactorKind, FisherSource, Sharing
from .errors import InputTypeError
from .solvers._kronecker_factors import KroneckerFactors
from .solvers._kronecker_passes import Passes, summed
from .solvers._kronecker_sums import Basis

_FISHERS: dict[FactorKind, FisherSource] = {
    "ggn": "exact", "exact": "exact", "monte_carlo": "monte_carlo", "empirical": "empirical",
}  # fmt: skip


@keywords()
@eager
def kronecker_factors(
    problem: Any,
    loss: Any = None,
    x: Any = None,
    y: Any = None,
    *,
    kind: FactorKind = "ggn",
    bias: FactorBias = "joint",
    sharing: Sharing = "expand",
    draws: int = 1,
    seed: int = 0,
    weighted: bool = False,
    parameters: Picks = None,
    exact_up_to: int = 512,
    widest: int = 4096,
) -> KroneckerFactors:
    r"""Return Kronecker factors (K-FAC) of a curvature: a mapping from parameter names to `(B, A)`.

    The block of a weight $W$ (`nn.Linear`: outputs × inputs), in the row-major order of its entries, is approximated by
    $B \otimes A$ in the scale of the objective. For $z_{nt} = W a_{nt}$ with cotangents $\delta_{nt}$ at z, at T
    positions t (tokens, pixels, repeated uses) of N samples n:

    - `sharing="expand"`: $B = \sum_{nt} \delta_{nt} \delta_{nt}^\top$, $A = \frac{1}{NT} \sum_{nt} a_{nt} a_{nt}^\top$;
    - `sharing="reduce"`: $B = \sum_n d_n d_n^\top$ with $d_n = \sum_t \delta_{nt}$, and $A = \frac1N \sum_n \bar a_n
      \bar a_n^\top$ with $\bar a_n = \frac1T \sum_t a_{nt}$. It is exact for deep linear nets with a sum or mean over
      positions before the loss.

    Cotangents run over the columns of a root of the loss's Hessian by the output (`kind="ggn"`), over drawn labels or
    over the data's own. With one position the two are equal; then B ⊗ A is exact for one sample, and for one layer
    whose cotangents do not depend on the sample. `KroneckerFactors` describes how other parameters are represented.

    Sources: Martens and Grosse (2015); Grosse and Martens (2016) for convolutions; Eschenhagen, Immer, Turner,
    Schneider and Hennig (2023) for the two kinds of sharing.

    Args:
        problem: A `Problem`, whose quadratic term is left out; or a model, with `loss`, `x` and `y` for one batch.
        loss: `loss(output, y)`, with a model.
        x: The model's input, with a model.
        y: The target, with a model.
        kind: `"ggn"`; or a Fisher matrix as in `fisher`: `"exact"`, which is the GGN for the usual losses and is
            computed as that, `"monte_carlo"` or `"empirical"`.
        bias: `"joint"` takes a bias as one more input of its weight, `"separate"` as a block of its own.
        sharing: How the positions of a sample are combined.
        draws: Labels drawn for each target, for `"monte_carlo"`.
        seed: Of those, as in `fisher`.
        weighted: Weight every row of one factor by the size of its counterpart in the other, as `EKFAC` does by
            default; then only the product of two factors has a scale.
        parameters: Which parameters, with a model, as in `jacobian`.
        exact_up_to: Parameters outside Kronecker form are kept exactly up to this many entries.
        widest: Sides of a weight longer than this keep their own axes as eigenbasis.

    Returns:
        A mapping; `a + b` adds batches or problems, `c * a` scales, `to_operator()` gives the operator, and
        `EKFAC().approximate(operator, factors)` corrects its eigenvalues.

    Raises:
        InputError: An option is unknown, or the loss has no positive curvature by samples.
        InputTypeError: A loss or data are given with a `Problem`, or left out with a model.
        NonFiniteError: An output or a gradient is NaN or Inf.
        ModelStateError: Batch statistics or dropout are in train mode.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> factors = kronecker_factors(model, torch.nn.functional.mse_loss, torch.eye(2), torch.zeros(2, 1))
        >>> factors["weight"]
        (tensor([[2.]]), tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]]))
    """
    check_choice("kind", kind, FactorKind)
    check_choice("bias", bias, FactorBias)
    check_choice("sharing", sharing, Sharing)
    check_positive("draws", draws)
    of = _problem(problem, loss, x, y, parameters)
    passes = Passes(of, _FISHERS[kind], draws, seed, "kronecker_factors")
    sums, drawn = summed(passes, of.space, Basis(weighted, widest, sharing == "reduce"), exact_up_to)
    return KroneckerFactors(of.space, sums, bias, sharing, kind, drawn)


def _problem(problem: Any, loss: Any, x: Any, y: Any, parameters: Picks) -> Problem | OneBatch:
    if not isinstance(problem, Problem):
        return OneBatch(problem, loss, x, y, parameters)
    given = {"loss": loss, "x": x, "y": y, "parameters": parameters}
    for name, value in given.items():
        if value is not None:
            raise InputTypeError.of(name, "given", "a `Problem` has its own", "Pass the model instead.")
    return problem
