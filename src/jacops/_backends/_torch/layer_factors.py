"""Parameter Jacobians of every sample at once, through the outputs of layers.

A layer's weight enters by `z_n = W a_n + b`, so a row of the Jacobian for sample n is the outer product of the
cotangent at `z_n` with `a_n` (Goodfellow, 2015). One sweep per output entry, shared by all samples, gives the
cotangents at all layers; no gradient of a weight is ever formed. That holds where samples do not mix and every weight
is used once, by its own layer; a plain sweep over a random cotangent says whether it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .agreement import worst_disagreement
from .rows import plain
from .surroundings import private_noise, sweeping
from .tape import Tape

Blocks = list[list[Tensor]]


@dataclass
class Sites:
    """Where the parameters of a model enter its forward.

    Attributes:
        uses: For each layer with a rule: the layer, its input and its output.
        versions: Those tensors as they were: one that was written into since is of no use.
        spoiled: A layer ran more than once, or under conditions that no rule covers.
    """

    uses: dict[str, tuple[nn.Module, Tensor, Tensor]] = field(default_factory=dict)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    spoiled: bool = False

    @contextmanager
    def noted(self, module: nn.Module) -> Iterator[None]:
        """Note inputs and outputs of layers while `module`, a replica, runs."""
        handles = [
            part.register_forward_hook(lambda m, args, output, path=path: self._note(path, m, args, output))
            for path, part in module.named_modules()
            if type(part) in _RULES
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        fits = len(args) == 1 and isinstance(output, Tensor) and output.requires_grad and path not in self.uses
        self.spoiled |= not fits
        if fits:
            self.uses[path] = (module, args[0], output)
            self.versions += [(t, t._version) for t in (args[0], output)]


def _tokens(module: Any, a: Tensor) -> Tensor:
    return a.reshape(a.shape[0], -1, a.shape[-1])


def _patches(module: Any, a: Tensor) -> Tensor:
    options = {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}
    return F.unfold(a, module.kernel_size, **options).transpose(1, 2)


def _normal(module: Any, a: Tensor) -> Tensor:
    return F.layer_norm(a, module.normalized_shape, None, None, module.eps)


def _linear(rows: Tensor, delta: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    deltas = delta.reshape(delta.shape[0], -1, delta.shape[-1])
    if weight is not None and rows.shape[1] == 1:
        torch.mul(deltas.transpose(1, 2), rows, out=weight)
    elif weight is not None:
        weight.copy_(torch.bmm(deltas.transpose(1, 2), rows))
    if bias is not None:
        bias.copy_(deltas.sum(1))


def _conv2d(patches: Tensor, delta: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is not None:
        weight.copy_(torch.bmm(delta.flatten(2), patches).view(weight.shape))
    if bias is not None:
        bias.copy_(delta.flatten(2).sum(2))


def _layer_norm(normal: Tensor, delta: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    for target, value in ((weight, delta * normal), (bias, delta)):
        if target is not None:
            extra = tuple(range(1, delta.ndim - target.ndim + 1))
            target.copy_(value.sum(extra) if extra else value)


# What a layer does to its input once, and how cotangents at its output then become rows.
_RULES: dict[type[nn.Module], tuple[Callable[[Any, Tensor], Tensor], Callable[..., None]]] = {
    nn.Linear: (_tokens, _linear),
    nn.Conv2d: (_patches, _conv2d),
    nn.LayerNorm: (_normal, _layer_norm),
}


def _has_rule(module: nn.Module, a: Tensor, output: Tensor, many: int) -> bool:
    if a.ndim < 2 or a.shape[0] != many or output.shape[0] != many:
        return False
    plainly = a.layout is torch.strided and type(a) is Tensor and type(output) is Tensor
    if not plainly or any(t.dtype != output.dtype for t in (a, *module.parameters(recurse=False))):
        return False
    if isinstance(module, nn.Conv2d):
        return (
            module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and a.ndim == 4
        )
    return True


def by_layers(tape: Tape, sites: Sites) -> Blocks | None:
    """Return `per_sample_blocks` where they were or can be proved right; None elsewhere."""
    if tape.trust.refused("pull", "by layers"):
        return None
    fresh = tape.trust.needs("by layers")
    blocks = per_sample_blocks(tape, sites, fresh)
    if blocks is None:
        tape.trust.refuse("pull", "by layers")
        return None
    tape.trust.remember("by layers")
    tape.routes["pull"] = (
        f"all {tape.outputs[0].shape[0]} samples to a sweep, by the outputs of {len(sites.uses)} layers"
    )
    return blocks


def per_sample_blocks(tape: Tape, sites: Sites, fresh: bool) -> Blocks | None:
    """Return `J[0][leaf]`, `(n * k, *leaf)`, by one sweep per output entry for all samples; None where that fails.

    Args:
        tape: A model's output, first axis samples, by its parameters.
        sites: Where they enter.
        fresh: Hold the result against a plain sweep.
    """
    places = _placed(tape, sites)
    if places is None:
        return None
    (output,) = tape.outputs
    many, entries = output.shape[0], output.shape[1:].numel()
    blocks = [torch.empty(many, entries, *leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in tape.leaves]
    layers = list(places.values())
    if fresh and not _apart(tape, [z for _, _, z, _ in layers]):
        return None
    prepared = [_RULES[type(module)][0](module, a.detach()) for module, a, _, _ in layers]
    seed = torch.zeros(many, entries, dtype=output.dtype, device=output.device)
    for entry in range(entries):
        seed[:, entry] = 1
        with sweeping(output):
            deltas = torch.autograd.grad(
                output, [z for _, _, z, _ in layers], seed.view(output.shape), retain_graph=True, materialize_grads=True
            )
        tape.sweeps += 1
        for (module, _, _, indices), ready, delta in zip(layers, prepared, deltas, strict=True):
            weight, bias = (None if i is None else blocks[i][:, entry] for i in indices)
            _RULES[type(module)][1](ready, plain(delta), weight, bias)
        seed[:, entry] = 0  # only now: the cotangent at the last layer may be this very tensor
    found = [[block.view(many * entries, *block.shape[2:]) for block in blocks]]
    return found if not fresh or _confirmed(tape, found) else None


def _placed(tape: Tape, sites: Sites) -> dict[str, Any] | None:
    """Match parameters with layers; None unless every parameter is the weight or bias of one layer with a rule."""
    if sites.spoiled or any(t._version != version for t, version in sites.versions):
        return None
    if len(tape.outputs) != 1 or tape.twins or tape.survey.reentrant:
        return None
    (output,) = tape.outputs
    if output.ndim < 1 or output.shape[0] < 2 or not output.requires_grad or output.is_complex():
        return None
    index = {id(leaf): i for i, leaf in enumerate(tape.leaves)}
    places: dict[str, Any] = {}
    covered: list[int] = []
    for path, (module, a, z) in sites.uses.items():
        indices = [index.get(id(module._parameters.get(name))) for name in ("weight", "bias")]
        if indices == [None, None]:
            continue
        if not _has_rule(module, a, z, output.shape[0]):
            return None
        covered += [i for i in indices if i is not None]
        places[path] = (module, a, z, indices)
    return places if sorted(covered) == list(range(len(tape.leaves))) else None


def _apart(tape: Tape, layers: list[Tensor]) -> bool:
    """Say whether a cotangent on half of the samples leaves exact zeros at the others, in every layer."""
    (output,) = tape.outputs
    half = torch.arange(output.shape[0], device=output.device) % 2 == 0
    seed = private_noise(output) * half.to(output.dtype).view(-1, *[1] * (output.ndim - 1))
    tape.sweeps += 1
    with sweeping(output):
        deltas = torch.autograd.grad(output, layers, seed, retain_graph=True, materialize_grads=True)
    return not any(bool(delta[~half].any()) for delta in deltas)


def _confirmed(tape: Tape, blocks: Blocks) -> bool:
    """Hold the blocks against a plain sweep over a random cotangent."""
    (output,) = tape.outputs
    seed = private_noise(output)
    pulled = zip(tape.leaves, tape.pull([seed]), strict=True)
    pairs = []
    for block, (leaf, grad) in zip(blocks[0], pulled, strict=True):
        found = torch.tensordot(seed.reshape(-1).to(block.dtype), block, 1)
        pairs.append((found, torch.zeros_like(leaf) if grad is None else plain(grad)))
    return worst_disagreement(pairs) <= tape.tolerance
