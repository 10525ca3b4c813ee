r"""Charts: how parameters that live on a group are stored, and how a flat step moves them.

SO(2), SE(2), SO(3) and SE(3) as plain tensors, for optimisation without any class of tensors of its own. One
convention throughout: a step $d$ of tangent width moves an element from the left, $X \leftarrow \exp(d)\,X$, which is
also PyPose's, and storage is laid out as in PyPose (SO(3): quaternion x y z w; SE(3): translation, quaternion) and in
the common graph files (SE(2): x y angle).

Functions of an angle are series where the closed form would cancel, so values and derivatives of any order hold to
rounding at zero and up to half a turn. At exactly half a turn the logarithm takes one of its two values.
"""

from ._base import Chart
from ._groups import SE2, SE3, SO2, SO3

__all__ = ["SE2", "SE3", "SO2", "SO3", "Chart"]
