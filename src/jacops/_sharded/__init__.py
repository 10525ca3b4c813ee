"""Products with models whose parameters are sharded over ranks (FSDP2, DTensor), by reverse over reverse.

All ranks make the same call. Where every rank has data of its own, what is differentiated is the sum over ranks; where
all have the same, that of one of them. Which it is shows in digests of the data, which the ranks exchange first.
"""

from ._closures import closure_jvp, closure_vjp, sharded_closure
from ._models import sharded_ggnvp, sharded_hvp, sharded_jvp, sharded_vjp

__all__ = [
    "closure_jvp",
    "closure_vjp",
    "sharded_closure",
    "sharded_ggnvp",
    "sharded_hvp",
    "sharded_jvp",
    "sharded_vjp",
]
