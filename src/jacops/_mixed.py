"""Derivatives of samples' gradients by the samples' inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._data import Batch
from ._runtime.contexts import sweeping
from ._runtime.restoring import restoring
from ._torch.protocol import Recording, gradient_linearization
from .errors import InputError


def mixed_rows(record: Callable[[Batch], Recording], x: Any, y: Any, rows: Tensor) -> Tensor:
    """Return `(k, n, *x)`, the derivative of `rows @ g_i` by sample i's input.

    All samples share the sweeps where one sample, taken alone, gives what it gives in the batch.

    Args:
        record: Records the sum of the own losses of a batch's rows.
        x: The model's input.
        y: The target.
        rows: Directions in the space of parameters, `(k, P)`.

    Raises:
        InputError: `x` is not one floating-point tensor.
        NotDifferentiableError: There is no second derivative.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        came = f"of dtype {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError.of("x", came, "perturbations need one floating-point tensor")
    batch, many = Batch(x, y, x.shape[0]), x.shape[0]
    if many == 0:
        return rows.new_zeros(rows.shape[0], *x.shape)
    last = batch.part(slice(many - 1, many))
    alone = _swept(record(last), last, rows)
    if many > 1 and rows.shape[0]:
        found = _swept(record(batch), batch, rows)
        scale = float(alone.abs().max()) + float(found.abs().max())
        # Roundings of a sum over as many terms as layers have, as in `mixing`.
        if float((found[:, -1:] - alone).abs().max()) <= 1e3 * torch.finfo(x.dtype).eps * scale:
            return found
    singles = [batch.part(slice(i, i + 1)) for i in range(many - 1)]
    return torch.cat([*(_swept(record(one), one, rows) for one in singles), alone], 1)


@restoring
def _swept(found: Recording, batch: Batch, rows: Tensor) -> Tensor:
    gradient = gradient_linearization(found, "mixed")
    leaf = next(leaf for given, leaf in found.inputs.values() if given is batch.x)
    result = rows.new_zeros(rows.shape[0], *leaf.shape)
    with sweeping(leaf):
        flat = gradient.domain.join([g.unsqueeze(0) for g in gradient.outputs])[0]
        for place, row in zip(result, rows if flat.requires_grad else (), strict=False):
            place.copy_(torch.autograd.grad(flat, leaf, row, retain_graph=True, materialize_grads=True)[0].detach())
    return result
