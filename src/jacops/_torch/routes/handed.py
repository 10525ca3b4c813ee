"""What a model returned for all samples, taken in batch by batch while their rows are swept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._trees import Tree, flatten


class Handed:
    """Outputs and losses of all samples, as the sweeps need them anyway.

    Args:
        count: Samples altogether.

    Attributes:
        losses: `(n,)`; None where there is no loss.
    """

    def __init__(self, count: int) -> None:
        self.count, self.losses = count, None
        self._outputs: list[Tensor] | None = []  # None: they have no axis of samples
        self._tree: Tree | None = None

    def take(self, where: slice, output: Any, losses: Tensor | None) -> None:
        """Take in what is known of some samples."""
        leaves, tree = flatten(output, "output")
        if losses is not None:
            self.losses = losses.new_empty(self.count) if self.losses is None else self.losses
            self.losses[where] = losses
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        if self._outputs is None or len(tensors) < len(leaves):
            self._outputs = None
            return
        if not self._outputs:
            self._tree = tree
            self._outputs = [leaf.new_empty(self.count, *leaf.shape[1:]) for leaf in tensors]
        places = [place[where] for place in self._outputs]
        if [place.shape for place in places] != [leaf.shape for leaf in tensors]:
            self._outputs = None
            return
        for place, leaf in zip(places, tensors, strict=True):
            place.copy_(leaf)

    @property
    def output(self) -> Any:
        """In the model's structure; None where it has no axis of samples."""
        return self._tree.build(self._outputs) if self._outputs and self._tree is not None else None
