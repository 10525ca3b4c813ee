"""What a problem is made of: the objective of its model, on a batch too, and its quadratic term."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._data import Batch
from ._ladder.protocol import is_framework_model
from ._objective import Objective, ObjectiveOptions
from ._operators import Operator
from ._requirements import check_range
from ._space import Space
from ._torch.protocol import bare
from .errors import InputError, InputTypeError, ModelStateError


class BatchPoint(NamedTuple):
    """A batch, and the objective for it, which keeps what it records of it."""

    batch: Batch
    objective: Objective

    def gradients(self) -> Operator:
        """Return the gradients of the rows' own losses."""
        return self.objective.sample_gradients(self.batch.x, self.batch.y)


def objective_of(model: Any, loss: Any, options: ObjectiveOptions) -> Objective:
    """Return the objective that a problem is of.

    Raises:
        InputTypeError: The loss is left out, and the model carries none.
    """
    own = model if isinstance(model, Objective) else getattr(model, "objective", None)
    if isinstance(own, Objective):
        given: Any = {name: value for name, value in options.items() if value not in (None, "error")}
        return own.changed(loss=loss, **given) if loss is not None or given else own
    if not is_framework_model(model):
        bare(model)  # refuses what is no module
    if loss is None:
        raise InputTypeError.of("loss", "left out", "a callable `loss(output, y)` is needed with a module")
    return Objective(model, loss, **options)


def check_dimension(objective: Objective) -> None:
    """Refuse a model without parameters to differentiate.

    Raises:
        ModelStateError: There are none.
    """
    if not objective.space.dim:
        came = f"a {type(objective.model).__name__} without parameters to differentiate"
        raise ModelStateError.of("model", came, "at least one must be a floating-point parameter that is trainable")


def ridge_of(l2: float | Mapping[str, float], space: Space) -> Tensor | None:
    """Return the quadratic term's diagonal; None where it is zero everywhere."""
    by_pattern = l2 if isinstance(l2, Mapping) else {"*": l2}
    for pattern, value in by_pattern.items():
        check_range("l2", value, zero=True)
        if not any(fnmatchcase(name, pattern) for name in space.names):
            raise InputError.of("l2", f"for {pattern!r}", f"no parameter fits; there are {space.layout}")
    if not any(by_pattern.values()):
        return None
    ridge = torch.zeros(space.dim, dtype=space.dtype, device=space.device)
    for name, where in zip(space.names, space.slices, strict=True):
        fitting = [value for pattern, value in by_pattern.items() if fnmatchcase(name, pattern)]
        ridge[where] = fitting[-1] if fitting else 0.0
    return ridge
