"""Gauss-Newton matrices through the outputs of layers: `J^T H J` with one sweep per output of a sample.

The sweeps, shared by all samples, give the cotangents at every layer's output (`delta`, one per output entry). Where
layers have one position per sample, `delta^T H delta` plays the part of second derivatives there and blocks follow as
for a Hessian; elsewhere H is factored, and gradients sample by sample are summed as squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..surroundings import private_noise, sweeping
from ..tape import Tape
from .blocks import Chunk, Found, add_blocks
from .curvature import add_ordinary, describable, laid
from .sites import Panel, Site, pays, settled

_ENTRIES = 2**22
_STRIPE = 512

Rows = Callable[[Tensor], Tensor]


def add_gauss_newton(tape: Tape, curvature: Rows, rows: Rows, matrix: Tensor, weight: float) -> str | None:
    """Add half of `J^T H J`, times `weight`, to `matrix`.

    Args:
        tape: A model's output by its parameters, first axis samples.
        curvature: Products with H, which keeps samples apart.
        rows: Products with `J^T H J` by ordinary sweeps.
        matrix: (P, P).
        weight: What to multiply by.

    Returns:
        How it was done, or None, with nothing added, where this does not apply.
    """
    if len(tape.outputs) != 1 or tape.outputs[0].ndim == 0 or tape.outputs[0].numel() == 0:
        return None
    sites, before = describable(tape), tape.sweeps
    (output,) = tape.outputs
    H = _blocks(curvature, output) if sites and output[0].numel() <= tape.domain.dim else None
    sites = _proved(tape, sites) if H is not None else []
    if H is None or not sites or not pays(sites, tape.domain.sizes, 2 * output[0].numel()):
        return None
    if all(site.positions == 1 for site in sites) and _held(sites, output) <= _ENTRIES:
        _add_by_channels(tape, sites, H, matrix, weight)
    else:
        _add_by_rows(tape, sites, H, matrix, weight)
    swept = tape.sweeps - before
    left = add_ordinary(tape, sites, rows, matrix, weight)
    return f"through {len(sites)} outputs of layers, {swept} sweeps{left}"


def _held(sites: Sequence[Site], output: Tensor) -> int:
    return output.numel() * max(sum(site.entries for site in sites) // 4, 1)


def _blocks(curvature: Rows, output: Tensor) -> Tensor | None:
    """Return H sample by sample, `(n, entries, entries)`; None where it mixes samples."""
    many, entries = output.shape[0], output[0].numel()
    kept = _half(many, output)
    noise = (private_noise(output) * kept.to(output.dtype).view(-1, *[1] * (output.ndim - 1))).reshape(1, -1)
    if many > 1 and bool(curvature(noise).reshape(many, entries)[~kept].any()):
        return None
    H = output.new_empty(many, entries, entries)
    seed = torch.zeros(many, entries, dtype=output.dtype, device=output.device)
    for entry in range(entries):
        seed[:, entry] = 1
        H[:, entry] = curvature(seed.reshape(1, -1)).reshape(many, entries)
        seed[:, entry] = 0
    return H


def _half(many: int, like: Tensor) -> Tensor:
    return (torch.randperm(many, generator=torch.Generator().manual_seed(0)) < (many + 1) // 2).to(like.device)


def _swept(tape: Tape, sites: Sequence[Site], seed: Tensor) -> list[Tensor | None]:
    """Return the cotangents at the outputs of sites, as they are shaped there."""
    tape.sweeps += 1
    with sweeping(tape.outputs[0]):
        edges = [site.edge for site in sites]
        return list(torch.autograd.grad(tape.outputs, edges, [seed], retain_graph=True, allow_unused=True))


def _proved(tape: Tape, sites: Sequence[Site]) -> list[Site]:
    """Return the sites at which a cotangent on half of the samples leaves exact zeros at the others."""
    (output,) = tape.outputs
    many, slices = output.shape[0], tape.domain.slices
    if many == 1:
        return settled(sites, slices)
    kept = _half(many, output)
    seed = private_noise(output) * kept.to(output.dtype).view(-1, *[1] * (output.ndim - 1))
    layouts: dict[int, int] = {}
    for i, (site, grad) in enumerate(zip(sites, _swept(tape, sites, seed), strict=True)):
        for ahead in site.layouts(many):
            if grad is None or not bool(Site(site.uses, many, ahead).spread(grad)[~kept].any()):
                layouts[i] = ahead
                break
    return settled(laid(sites, many, layouts), slices)


def _add_by_channels(tape: Tape, sites: Sequence[Site], H: Tensor, matrix: Tensor, weight: float) -> None:
    many, entries = H.shape[:2]
    (output,) = tape.outputs
    deltas = [output.new_zeros(many, entries, site.channels) for site in sites]
    seed = torch.zeros(many, entries, dtype=output.dtype, device=output.device)
    for entry in range(entries):
        seed[:, entry] = 1
        for site, into, grad in zip(sites, deltas, _swept(tape, sites, seed.view(output.shape)), strict=True):
            if grad is not None:
                into[:, entry] = site.spread(grad)[:, 0]
        seed[:, entry] = 0  # only now: what came back may be this very tensor
    for place, site in enumerate(sites):
        left = (H @ deltas[place]).transpose(1, 2)
        widest = max(s.channels for s in sites)
        step = max(1, _ENTRIES // max(1, many * widest))
        for start in range(0, site.channels, step):
            some = slice(start, min(start + step, site.channels))
            chunk = Chunk(slice(0, 1), some)
            for later, delta in zip(sites[place:], deltas[place:], strict=True):
                second = (left[:, some] @ delta).view(many, 1, -1, 1, later.channels)
                add_blocks(matrix, site, chunk, later, Found(second, {}), weight)


# ---- squares of gradients sample by sample -------------------------------------------------------------------------


def _add_by_rows(tape: Tape, sites: Sequence[Site], H: Tensor, matrix: Tensor, weight: float) -> None:
    """Add `G^T S G / 2` stripe by stripe, with G the gradients along H's eigenvectors and S the signs of its values."""
    (output,) = tape.outputs
    values, vectors = torch.linalg.eigh(H.to(torch.promote_types(H.dtype, torch.float32)))
    factors = (vectors * values.abs().sqrt().unsqueeze(1)).to(H.dtype)
    for k in range(H.shape[1]):
        if not bool(values[:, k].any()):
            continue
        grads = _swept(tape, sites, factors[:, :, k].reshape(output.shape))
        deltas = [None if grad is None else site.spread(grad) for site, grad in zip(sites, grads, strict=True)]
        signs = (values[:, k].sign() * weight).to(H.dtype).unsqueeze(1)
        for some in _samples(H.shape[0], matrix.shape[0]):
            G = gradient_rows(sites, deltas, some, matrix)
            _add_squares(matrix, G, G * signs[some])


def _samples(many: int, width: int) -> Iterator[slice]:
    step = max(1, _ENTRIES // max(1, width))
    for start in range(0, many, step):
        yield slice(start, min(start + step, many))


def _add_squares(matrix: Tensor, G: Tensor, signed: Tensor) -> None:
    """Add half of the symmetric `G^T signed`: blocks on the diagonal by half, those above it whole."""
    size = matrix.shape[0]
    for start in range(0, size, _STRIPE):
        stop = min(start + _STRIPE, size)
        left = G[:, start:stop].T
        matrix[start:stop, start:stop].addmm_(left, signed[:, start:stop], alpha=0.5)
        matrix[start:stop, stop:].addmm_(left, signed[:, stop:])


def gradient_rows(sites: Sequence[Site], deltas: Sequence[Tensor | None], some: slice, like: Tensor) -> Tensor:
    """Return gradients of some samples, `(samples, P)`, from cotangents at the sites; zero for parameters elsewhere."""
    rows = like.new_zeros(some.stop - some.start, like.shape[0])
    for site, delta in zip(sites, deltas, strict=True):
        if delta is not None:
            for panel in site.panels:
                _add_gradients(panel, delta[some], some, rows)
    return rows


def _add_gradients(panel: Panel, delta: Tensor, some: slice, rows: Tensor) -> None:
    if panel.operand is None:
        values = delta if panel.factor is None else delta * panel.factor[some]
        panel.parts[0].split(rows, 1)[..., 0].add_(panel.reduced(values))
        return
    found = delta[..., panel.channels].transpose(1, 2) @ panel.operand[some]
    for part in panel.parts:
        part.split(rows, 1).add_(found[..., part.columns])
