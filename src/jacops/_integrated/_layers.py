"""Paths of a hidden layer's outputs, and the model as a function of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.protocol import At, Samples, split_input
from .._trees import Tree
from ..errors import InputError
from ._baselines import Paths

_SHOWN = 32  # samples on which it is seen whether samples mix


class LayerInput(nn.Module):
    """A model as a function of a layer's output, the model's inputs being those of given rows.

    Args:
        model: The model.
        path: The layer.
        values: The inputs' tensors with a row per sample.
        tree: The structure of the input.
    """

    def __init__(self, model: nn.Module, path: str, values: Sequence[Tensor], tree: Tree) -> None:
        super().__init__()
        self.model, self.path, self.values, self.tree = model, path, tuple(values), tree

    def forward(self, hidden: Tensor, rows: Tensor) -> Any:
        """Return the model's output with `hidden` in the place of the layer's."""
        args, kwargs = split_input(self.tree.build([v[rows] for v in self.values]))
        handle = self.model.get_submodule(self.path).register_forward_hook(partial(_replaced, hidden))
        try:
            return self.model(*args, **kwargs)
        finally:
            handle.remove()


def _replaced(hidden: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def source_of(at: At) -> str | None:
    """Return the hidden layer that is differentiated by, None where that is the input."""
    return at if isinstance(at, str) or at is None else at[0]


def from_layer(paths: Paths, at: At, target: Any, options: Mapping[str, Any]) -> Paths:
    """Return the paths of a layer's outputs from those at baselines to those at samples.

    Args:
        paths: Of the inputs, of a model that is differentiated from that layer on.
        at: The layer, and the one that is differentiated, as given.
        target: As given.
        options: Others of `Samples`.

    Raises:
        InputError: No input begins elsewhere than at the sample.
    """
    samples = paths.samples
    source, end = source_of(at), None if isinstance(at, str) or at is None else at[1]
    if all(start is None for start in paths.starts):
        needed = "inputs without derivatives have no baseline of their own"
        raise InputError.of("baseline", "without a tensor", needed, "Pass such inputs as padding tokens.")
    fallback = "error" if samples.fallback == "error" else "silent"  # the same is seen again, along paths
    some = samples.over([v[:_SHOWN] for v in samples.values], fallback=fallback)
    alone, model = some.jacobians().alone, samples.runner.model
    rows = len(samples.input_tree.names)
    given = samples.input_tree.build(samples.values[:rows])
    head = Samples(model, given, call=samples.call, at=(source, source), checks=samples.checks, fallback=fallback)
    batch_size = samples.batch_size
    ends, starts = (
        head.over(of.values[:rows]).outputs(batch_size, alone)[0]
        for of in (samples, paths.begin(torch.arange(paths.count)))
    )
    layer = LayerInput(model, str(source), samples.values[:rows], samples.input_tree)
    x = (ends, torch.arange(samples.count, device=ends.device))
    inside = None if end is None else (None, f"model.{end}")
    found = Samples(layer, x, call=samples.call, at=inside, target=target, **options)
    return Paths(found, (starts, None), paths.baselines)
