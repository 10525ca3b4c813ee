r"""Charts: the storage of parameters on a manifold, and their change by a step in the tangent space.

Groups (SO(2), SE(2), SO(3), SE(3), Sim(3), vectors), directions (S2), several of them side by side and custom charts,
as plain tensors, without a tensor subclass. One convention throughout for groups: a
step $d$ of tangent width moves an element from the left, $X \leftarrow \exp(d)\,X$, which is also PyPose's, and storage
is laid out as in PyPose (SO(3): quaternion x y z w; SE(3): translation, quaternion; Sim(3): scale after these) and in
the common graph files (SE(2): x y angle). A `GroupChart` has `exp`, `log`, `compose` and what follows from them; a
`Chart` that is no group has `retract` and `local` alone.

Functions of an angle are series where the closed form would cancel, so values and derivatives of any order hold to
rounding at zero and up to half a turn. At exactly half a turn the logarithm takes one of its two values.
"""

from .._lazy import eager
from ._base import Chart
from ._group import GroupChart
from ._groups import SE2, SE3, SO2, SO3
from ._laws import check_laws
from ._side_by_side import Product, R
from ._similarities import Sim3
from ._sphere import S2

__all__ = ["S2", "SE2", "SE3", "SO2", "SO3", "Chart", "GroupChart", "Product", "R", "Sim3", "check_laws"]

eager(__name__)
