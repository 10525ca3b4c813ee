"""A model of sequences as a function of one shift of a layer's output: its Jacobian is pooled over all positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._trees import Selector, select
from ...errors import InputError, ModelStateError
from ..model.cut import Cut, first_tensor
from ..model.inputs import split_input

SHIFT = "shift"  # the path of what the Jacobian is by


class Met:
    """What a forward met: no container, so that private copies of a model share it.

    Attributes:
        positions: Of a sequence.
    """

    positions = 0


class PooledModel(nn.Module):
    """A model whose layer's output is shifted alike at all positions of a sequence, and whose result is summed.

    With weights of 1 over the number of positions the Jacobian of the sum by the shift is the mean over positions t of
    the sum over positions t' of the Jacobian of the result at t' by the layer's output at t.

    Args:
        model: The model.
        source: The layer's path.
        target: The path of the layer whose output is the result; None for the model's.
        outputs: Which part of that.
        skip: How many positions of every sequence are left out, from the first on.

    Attributes:
        met: The number of positions in the last forward.
    """

    def __init__(self, model: nn.Module, source: str, target: str | None, outputs: Selector, skip: int) -> None:
        super().__init__()
        self.model, self.shift = model, nn.Identity()
        self.source, self.target, self.outputs, self.skip = source, target, outputs, skip
        self.met = Met()

    def forward(self, mask: Tensor | None, value: Any) -> Tensor:
        """Return the sum of the results over the positions that count, `(n, out)`.

        Args:
            mask: Which positions are no padding, `(n, positions)`; None for all.
            value: The model's input.
        """
        cut, counted, seen = Cut(self.model, (None, self.target)), list[Tensor](), [self.source, self.target]

        def moved(module: nn.Module, _: Any, output: Any) -> Any:
            hidden = first_tensor(output, self.source)
            if counted:
                raise self._used("more often than once")
            if cut.captured:
                needed = f"'{self.target}' returns before '{self.source}' does and cannot depend on it"
                raise InputError.of("at", repr(tuple(seen)), needed, f"Swap them: at={tuple(seen[::-1])!r}.")
            counted.append(self._counted(hidden, mask))
            weights = counted[0] / counted[0].sum(1, keepdim=True).clamp_min(1)
            shift = self.shift(hidden.new_zeros(hidden.shape[0], hidden.shape[2]))
            hidden = hidden + weights.unsqueeze(-1) * shift.unsqueeze(1)
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        handle = cut.submodule(self.source).register_forward_hook(moved)
        try:
            args, kwargs = split_input(value)
            with cut.active():
                output = select(cut.result(self.model(*args, **kwargs)), self.outputs)
        finally:
            handle.remove()
        if not counted:
            raise self._used("never")
        self._check_result(output, counted[0])
        return (output * counted[0].to(output.dtype).unsqueeze(-1)).sum(1)

    def _used(self, often: str) -> ModelStateError:
        return ModelStateError.of("at", repr(self.source), f"the forward must use that submodule once; it did {often}")

    def _counted(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return 1 for positions that count and 0 for others, `(n, positions)`."""
        if hidden.ndim != 3:
            came = f"{self.source!r}, whose output has shape {tuple(hidden.shape)}"
            raise InputError.of("at", came, "a layer with output (sequences, positions, width) is needed")
        self.met.positions = hidden.shape[1]
        real = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask.to(hidden.device)
        if real.shape != hidden.shape[:2]:
            needed = f"it must be of shape {tuple(hidden.shape[:2])}, sequences and positions of {self.source!r}"
            raise InputError.of("attention_mask", f"of shape {tuple(real.shape)}", needed)
        return counted_positions(real, self.skip).to(hidden.dtype)

    def _check_result(self, output: Any, counted: Tensor) -> None:
        fits = isinstance(output, Tensor) and output.ndim == 3 and output.shape[:2] == counted.shape
        if not fits:
            kind = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            needed = f"a result {(*counted.shape, 'width')} is needed, sequences and positions first"
            raise InputError.of("outputs", f"giving a result that is {kind}", needed, "Pick it, as with 'logits'.")


def counted_positions(mask: Tensor, skip: int) -> Tensor:
    """Return which positions count: no padding, and not among the first `skip` of their sequence."""
    real = mask != 0
    return real & (real.cumsum(1) > skip)
