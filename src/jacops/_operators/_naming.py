"""Names of operators: by what they are, not by what they are made of."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

Named = TypeVar("Named")


class Meaning(NamedTuple):
    """What an operator is.

    Attributes:
        name: As its class would be called.
        formula: In terms of loss, model output f and parameters θ.
    """

    name: str
    formula: str


MEANINGS = {
    "jacobian": Meaning("Jacobian", "df / dθ"),
    "jacobian by inputs": Meaning("Jacobian", "df / dx"),
    "hessian": Meaning("Hessian", "d²loss / dθ²"),
    "hessian by inputs": Meaning("Hessian", "d²loss / dx²"),
    "ggn by inputs": Meaning("GaussNewton", "Jᵀ (d²loss / df²) J, J = df / dx"),
    "ggn": Meaning("GaussNewton", "Jᵀ (d²loss / df²) J"),
    "fisher": Meaning("Fisher", "E[g gᵀ] over the model's labels, g = d log p / dθ"),
    "monte_carlo_fisher": Meaning("MonteCarloFisher", "mean of g gᵀ over drawn labels, g = d log p / dθ"),
    "empirical_fisher": Meaning("EmpiricalFisher", "mean of g gᵀ over the data's labels, g = d log p / dθ"),
    "sample_gradients": Meaning("SampleGradients", "gradient of every sample's loss"),
    "sample_jacobians": Meaning("SampleJacobians", "df / dθ of every sample"),
}
"""By the public call or the word for a curvature."""


def named(operator: Named, meaning: str) -> Named:
    """Return an operator that carries its name, unless it has one or there is none for `meaning`."""
    known: Any = operator
    if known.meaning is None and meaning in MEANINGS:
        object.__setattr__(operator, "meaning", MEANINGS[meaning])
    return operator
