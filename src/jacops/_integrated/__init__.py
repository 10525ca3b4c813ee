"""Integrated Jacobians: averages along paths from baselines, refined until contributions add up."""

from ._call import integrated_jacobian

__all__ = ["integrated_jacobian"]
