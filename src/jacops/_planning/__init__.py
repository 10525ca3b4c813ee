"""Planning: what a call will take in sweeps and in bytes, known before it runs."""

from ._base import Plan, PlannedRoute, plan, planned_by
from ._calls import plan_contributions, plan_dense, plan_full_jacobian, plan_modjac, plan_samples

__all__ = [
    "Plan",
    "PlannedRoute",
    "plan",
    "plan_contributions",
    "plan_dense",
    "plan_full_jacobian",
    "plan_modjac",
    "plan_samples",
    "planned_by",
]
