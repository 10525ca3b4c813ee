"""The values that a model's tensors had when an operator was made: copied where they are small, digested otherwise.

A recorded graph holds on to the memory of the weights, which optimisers, `.data` and NumPy write into without torch
seeing it; products would then mix old activations and new weights. Operators therefore record copies of the weights,
one for all operators at the same values, so that they go on answering for the point where they were made. Models whose
weights take more than `COPIED` bytes are recorded as they are, and their digest is compared before every product.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..._digests import byte_view
from ..._runtime.agreement import identical
from ..._runtime.contexts import arithmetic
from ..._runtime.restoring import process_lock, restoring
from ...errors import JacopsError, ModelStateError, NotDifferentiableError
from ..model.structure import ModelStructure

# Copies of 9 MiB took 35 ms, as long as recording such a model, and digests of them 0.8 ms, one percent of a product
# with one row; below 1 MiB a copy takes microseconds, and digests 5 to 10 percent of a product.
COPIED = 2**20
_BLOCKS = 64  # sums of so many blocks: a permutation of a whole tensor shows too


class Weights:
    """The values of a module's parameters and buffers at one time, and what else it consisted of.

    Args:
        structure: Of the module, as it is now.
    """

    @restoring
    def __init__(self, structure: ModelStructure) -> None:
        held = _tensors(structure)
        self._modes, self._settings = structure.modes, structure.settings
        self._digests: dict[str, Tensor] = {}
        self._recorded: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        with arithmetic(False):
            if sum(t.nbytes for t in held.values()) <= COPIED:
                self._values = {name: t.detach().clone() for name, t in held.items()}
            else:
                self._recorded = {name: p.detach() for name, p in structure.parameters.items()}
                self._digests = {name: _digest(t) for name, t in held.items()}

    def copies(self, structure: ModelStructure) -> dict[int, Tensor]:
        """Return copies of a module's parameters by the identity of its own; none where they are too large."""
        named = zip(structure.places, structure.parameters, strict=True)
        return {here: self._values[name] for here, name in named} if self._values else {}

    def fits(self, structure: ModelStructure) -> bool:
        """Return whether a recording of a module now would have these values, in this memory if it is not copied."""
        here = {name: p.data_ptr() for name, p in structure.parameters.items()} if self._recorded else {}
        if here != {name: p.data_ptr() for name, p in self._recorded.items()}:
            return False
        return self.changed_in(structure) is None

    def changed_in(self, structure: ModelStructure) -> str | None:
        """Return what of a module differs from what it was, as messages call it; None where nothing does."""
        name = self._changed(_tensors(structure))
        if name is not None:
            kind = "parameter" if name in structure.parameters else "buffer"
            return f"{kind} '{name}'"
        if self._modes != structure.modes:
            return "its mode (train or eval)"
        return None if self._settings == structure.settings else "a module, a hook or a plain attribute"

    def check(self, structure: ModelStructure, call: str) -> None:
        """Refuse a module that differs from what it was.

        Raises:
            ModelStateError: It does; the message names the parameter.
        """
        what = self.changed_in(structure)
        if what is not None:
            raise _changed(call, what)

    def check_recorded(self, call: str) -> None:
        """Refuse weights that a recorded graph holds and that were written into since.

        Raises:
            ModelStateError: Some were; the message names the parameter.
        """
        name = self._changed(self._recorded) if self._recorded else None
        if name is not None:
            raise _changed(call, f"parameter '{name}'")

    def _changed(self, tensors: Mapping[str, Tensor]) -> str | None:
        known = self._values or self._digests
        for name, tensor in tensors.items():
            now = tensor.detach() if self._values else _digest(tensor)
            if name not in known or not identical(now, known[name]):
                return name
        return None


def _changed(call: str, what: str) -> ModelStateError:
    return ModelStateError(
        f"{call}: the model changed since this operator was made: {what} has changed. Make the operator again, or "
        "make it on a copy of the model (`copy.deepcopy`) to keep the old point."
    )


def check_kept(weights: Weights | None, call: str) -> None:
    """Refuse to use a recording whose weights were written into since.

    Raises:
        ModelStateError: Some were; the message names the parameter.
    """
    if weights is not None:
        weights.check_recorded(call)


def not_swept(call: str, error: Exception, functions: Sequence[str]) -> JacopsError:
    """Return the error for a backward pass that torch refused, by its cause as far as torch names it."""
    if "modified by an inplace operation" in str(error):
        return NotDifferentiableError(
            f"{call}: a tensor that the derivative needs was modified by an inplace operation, in the forward itself "
            "or since it was recorded. Write the operation out of place, or make it again after the change."
        )
    where = f" (custom Functions in the graph: {', '.join(functions)})" if functions else ""
    return NotDifferentiableError(f"{call}: torch.autograd cannot take this derivative{where}: {error}")


_taken: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Weights]] = weakref.WeakKeyDictionary()


def weights_of(structure: ModelStructure) -> Weights:
    """Return the values of a module's tensors, the same object for as long as they stay and somebody holds it."""
    with process_lock:
        known = _taken.get(structure.model)
    weights = None if known is None else known()
    if weights is None or not weights.fits(structure):
        weights = Weights(structure)
        with process_lock:
            _taken[structure.model] = weakref.ref(weights)
    return weights


def _tensors(structure: ModelStructure) -> dict[str, Tensor]:
    return {**structure.parameters, **structure.buffers}


def _digest(tensor: Tensor) -> Tensor:
    """Return sums of a tensor's bits, block by block, which every single change alters, in any order of summation."""
    flat = byte_view(tensor)
    start = -flat.storage_offset() % 8  # words begin at whole multiples of their size
    stop = flat.numel() - (flat.numel() - start) % (8 * _BLOCKS)
    if stop <= start:
        return flat.clone()
    sums = flat[start:stop].view(torch.int64).view(_BLOCKS, -1).sum(1)
    return torch.cat([flat[:start], sums, flat[stop:]]) if len(flat) != stop - start else sums
