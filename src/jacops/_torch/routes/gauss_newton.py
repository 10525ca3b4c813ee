"""Gauss-Newton matrices through the outputs of layers: `J^T H J` with one sweep per output of a sample.

The sweeps, shared by all samples, give the cotangents at every layer's output (`delta`, one per output entry). Where
layers have one position per sample, `delta^T H delta` plays the part of second derivatives there and blocks follow as
for a Hessian; elsewhere H is factored, and gradients sample by sample are summed as squares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._cached import cached_property
from ..._runtime.memory import Meter
from ..._runtime.restoring import restoring
from ..layers.blocks import Chunk, Found, add_blocks
from ..layers.factors import LayerRows, add_rows
from ..layers.part import matrix_shape
from ..layers.sites import LayerOutput, find_sites, pays, settled, shadows
from ..layers.uses import ParameterUse
from ..model.output_curvature import Directions, Elementwise, Given, ProbedHessian
from ..sweeps.batched import at_once, passed
from ..sweeps.linearization import Linearization
from .by_layers import Rehearsal, Rows
from .by_products import ByProducts
from .curvature import is_plain
from .labelled import KnownSoftmax, RecordedLabels

# Columns at a time, above the diagonal only: 0.65 of the whole product's time at 1,930 columns; 128 takes 0.9.
_STRIPE = 512


def gauss_newton_layers(lin: Linearization, curvature: Rows, rows: Rows) -> GaussNewtonLayers | None:
    """Return what the layers say of `J^T H J`; None where this does not apply.

    Args:
        lin: A model's output by its parameters, first axis samples.
        curvature: Products with H, which keeps samples apart.
        rows: Products with `J^T H J` by ordinary sweeps.
    """
    if not _applies(lin):
        return None
    (output,) = lin.outputs
    layers = LayerRows(lin, output.shape[0])
    H = _blocks(_probed(curvature, output), curvature, output) if layers.sites else None
    described = {site.leaf for site in layers.sites}
    rows_at_layers = max((site.row_count for site in layers.sites), default=0)
    if H is None or not pays(lin.domain.sizes, described, rows_at_layers, 2 * output[0].numel()):
        return None
    return GaussNewtonLayers(lin, layers, _single_positions(layers), H, ByProducts.beside(lin, described, rows))


def _applies(lin: Linearization) -> bool:
    """Return whether there is one output, samples first, with fewer entries for each than there are parameters."""
    if len(lin.outputs) != 1 or lin.outputs[0].ndim == 0 or lin.outputs[0].numel() == 0:
        return False
    return is_plain(lin) and lin.outputs[0][0].numel() <= lin.domain.dim


def _single_positions(layers: LayerRows) -> list[LayerOutput]:
    """Return the layers' outputs where each has one position for a sample and channels that make all gradients."""
    many = layers.samples
    if not all(isinstance(site.order, int) and site.order == 1 and site.sum is None for site in layers.sites):
        return []
    found: dict[int, list[ParameterUse]] = {leaf: [layers.sites[i] for i in own] for leaf, own in layers.by_leaf}
    sites = [LayerOutput(site.uses, many) for site in find_sites(found)]
    single = all(site.positions == 1 and site.shape[0] == many for site in sites)
    sites = settled(sites, layers.lin.domain.slices) if single else []
    same = {use.leaf for site in sites for use in site.uses} == {site.leaf for site in layers.sites}
    return sites if same else []


def gauss_newton_diagonal(
    lin: Linearization, curvature: Rows, rows: Rows, labels: RecordedLabels, most: int
) -> tuple[Tensor, str] | None:
    """Return the diagonal of `J^T H J` and how it was found; None where no layer helps.

    With H = V S V^T sample by sample, it is the sum of squared gradients along the columns of V (Dangel, Kunstner and
    Hennig, 2020), and squares of outer products are outer products of squares.
    """
    if not _applies(lin) or lin.outputs[0][0].numel() == lin.domain.dim:
        return None
    (output,) = lin.outputs
    layers = LayerRows(lin, output.shape[0])
    signed = _signed_roots(curvature, output, labels.softmax()) if layers.sites else None
    if signed is None:
        return None
    before, slices = lin.sweeps, lin.domain.slices
    diagonal = torch.zeros(lin.domain.dim, dtype=lin.domain.dtype, device=lin.domain.device)
    operands = [site.sample_operand() for site in layers.sites]
    step = max(1, at_once(output.numel()))
    for sign, roots in signed:
        chunks = (range(start, min(start + step, roots.columns)) for start in range(0, roots.columns, step))
        seeds = (roots.chunk(some.start, some.stop).view(-1, *output.shape) for some in chunks)
        for leaf, squares in layers.column_squares(operands, seeds, most):
            diagonal[slices[leaf]].add_(squares.flatten(), alpha=sign)
    swept, lost = lin.sweeps - before, [slices[leaf] for leaf in layers.missing]
    beside = ByProducts(lin, rows, lost).add_diagonal(diagonal, most)
    return diagonal, f"through {len(layers.sites)} outputs of layers, {swept} sweeps{beside}"


def _signed_roots(
    curvature: Rows, output: Tensor, expected: KnownSoftmax | None
) -> Sequence[tuple[int, Directions]] | None:
    """Return directions s with signs such that H is the sum of all `sign * s s^T`; None where it mixes samples."""
    if expected is not None and not expected.is_due():
        return [(1, expected.form)]
    probed = _probed(curvature, output)
    if probed.mixes:
        return None
    found = probed.diagonal() if probed.is_finite else None
    if found is not None:
        return [(1, Elementwise(found.clamp_min(0).sqrt())), (-1, Elementwise(found.clamp_max(0).neg().sqrt()))][
            : 1 + bool((found < 0).any())
        ]
    if probed.is_finite and expected is not None and expected.agrees(probed):
        return [(1, expected.form)]
    softmax = probed.softmax() if probed.is_finite else None
    if softmax is not None:
        return [(1, softmax)]
    H = _blocks(probed, curvature, output)
    if H is None:
        return None
    values, factors = _factored(H)
    signed = ((sign, factors * (values.sign() == sign).unsqueeze(1)) for sign in (1, -1))
    return [(sign, Given(own[:, :, own.any(1).any(0)].permute(2, 0, 1))) for sign, own in signed if bool(own.any())]


@dataclass(eq=False)
class GaussNewtonLayers:
    """A Gauss-Newton matrix by what sweeps find at the outputs of layers.

    Attributes:
        lin: The model's output by its parameters.
        layers: The rows of its samples.
        sites: The outputs of layers; none unless each has one position for a sample.
        H: The loss's second derivatives, sample by sample, `(n, entries, entries)`.
        ordinary: The parameters that no rule describes.
    """

    lin: Linearization
    layers: LayerRows
    sites: Sequence[LayerOutput]
    H: Tensor
    ordinary: ByProducts

    def __post_init__(self) -> None:
        if not self.sites:
            _ = self._operands  # held from now on, so that they are counted with what is prepared

    @cached_property
    def _operands(self) -> list[Tensor | None]:
        return [site.sample_operand() for site in self.layers.sites]

    def add(self, matrix: Tensor, weight: float, most: int) -> str:
        """Add a half of it times a weight, and say how it was done."""
        before, many = self.lin.sweeps, len({site.node for site in self.layers.sites})
        if self._by_channels(most):
            _add_by_channels(self.lin, self.sites, self.H, matrix, weight, most)
        else:
            _add_by_rows(self.layers, self._operands, self.H, matrix, weight, most)
        swept = self.lin.sweeps - before
        return f"through {many} outputs of layers, {swept} sweeps{self.ordinary.add(matrix, weight, most)}"

    @restoring
    def working(self, most: int) -> float:
        """Return the bytes held on the way."""
        space, sites, H = self.lin.domain, shadows(self.sites), self.H.to("meta")
        nowhere = torch.empty(space.dim, space.dim, dtype=space.dtype, device="meta")
        sweep, like = self._sweep
        operands = [None if a is None else a.to("meta") for a in ([] if self._by_channels(most) else self._operands)]
        with Rehearsal() as meter:
            if self._by_channels(most):
                deltas = [H.new_empty(*H.shape[:2], site.channels) for site in sites]
                held = float(meter.live)
                place = max(range(len(sites)), key=lambda i: sites[i].channels)
                _add_channels(sites[place:], H, deltas[place:], nowhere, 1.0, most)
            else:
                factors, signs = H.new_empty(3, *H.shape), H.new_empty(H.shape[0], 1)
                deltas = [torch.empty_like(delta) for delta in like]
                held = float(meter.live)
                _add_signed(self.layers, operands, deltas, signs, nowhere, most)
                del factors
        return max(meter.peak, held + sweep, self.ordinary.working(most))

    def _by_channels(self, most: int) -> bool:
        # By channels all outputs' cotangents are held at once, which takes the place of a quarter of the entries.
        share = max(sum(site.entries for site in self.sites) // 4, 1)
        return bool(self.sites) and self.lin.outputs[0].numel() * share <= most

    @cached_property
    @restoring
    def _sweep(self) -> tuple[float, list[Tensor]]:
        """Bytes that one sweep holds, measured, and what it finds, without entries."""
        with Meter() as meter:
            (output,) = self.lin.outputs
            if self.sites:
                step = min(_at_once(self.sites, self.H.shape[0]), self.H.shape[1])
                _swept(self.lin, self.sites, output.new_zeros(step, *output.shape))
            found = self.layers.sweep([torch.zeros_like(output)])
        return float(meter.peak), [delta.to("meta") for delta in found]


def _probed(curvature: Rows, output: Tensor) -> ProbedHessian:
    many, entries = output.shape[0], output[0].numel()

    def product(rows: Tensor) -> Tensor:
        return curvature(rows.flatten(1)).view(-1, many, entries)

    return ProbedHessian(product, output.detach().reshape(many, entries), [output])


def _blocks(probed: ProbedHessian, curvature: Rows, output: Tensor) -> Tensor | None:
    """Return H sample by sample, `(n, entries, entries)`; None where it mixes samples, or is not finite."""
    if probed.mixes or not probed.is_finite:
        return None
    many, entries = output.shape[0], output[0].numel()
    H, step = output.new_empty(many, entries, entries), at_once(output.numel())
    for start in range(0, entries, step):
        some = range(start, min(start + step, entries))
        found = curvature(_units(some, output).flatten(1))
        H[:, start : some.stop] = found.view(-1, many, entries).transpose(0, 1)
    return H if probed.is_of(H) else None  # a pair of samples that were both moved may still mix


def _units(some: range, output: Tensor) -> Tensor:
    """Return cotangents `(m, n, entries)` that pick an entry of every sample."""
    units = output.new_zeros(len(some), output.shape[0], output[0].numel())
    units[range(len(some)), :, some] = 1
    return units


def _at_once(sites: Sequence[LayerOutput], many: int) -> int:
    """Return how many cotangents share a pass."""
    return at_once(many * sum(site.entries for site in sites))


def _swept(lin: Linearization, sites: Sequence[LayerOutput], seeds: Tensor) -> list[Tensor | None]:
    """Return cotangents at the outputs of sites, `(m, *as they are shaped there)`, for m of the model's output."""
    (output,) = lin.outputs
    return passed(lin, lin.outputs, [site.edge for site in sites], [seeds.view(-1, *output.shape)])


def _add_by_channels(
    lin: Linearization, sites: Sequence[LayerOutput], H: Tensor, matrix: Tensor, weight: float, most: int
) -> None:
    many, entries = H.shape[:2]
    (output,) = lin.outputs
    deltas = [output.new_zeros(many, entries, site.channels) for site in sites]
    step = _at_once(sites, many)
    for start in range(0, entries, step):
        some = range(start, min(start + step, entries))
        for site, into, grads in zip(sites, deltas, _swept(lin, sites, _units(some, output)), strict=True):
            if grads is not None:
                into[:, start : some.stop] = site.spread(grads)[:, :, 0].transpose(0, 1)
    for place in range(len(sites)):
        _add_channels(sites[place:], H, deltas[place:], matrix, weight, most)


def _add_channels(
    sites: Sequence[LayerOutput], H: Tensor, deltas: Sequence[Tensor], matrix: Tensor, weight: float, most: int
) -> None:
    """Add the first site's rows against its own and all later ones' columns."""
    site, many = sites[0], H.shape[0]
    left = (H @ deltas[0]).transpose(1, 2)
    step = max(1, most // max(1, many * max(s.channels for s in sites)))
    for start in range(0, site.channels, step):
        some = slice(start, min(start + step, site.channels))
        chunk = Chunk(slice(0, 1), some, most)
        for later, delta in zip(sites, deltas, strict=True):
            second = (left[:, some] @ delta).view(many, 1, -1, 1, later.channels)
            add_blocks(matrix, site, chunk, later, Found(second, {}), weight)


# ---- squares of gradients sample by sample -------------------------------------------------------------------------


def _add_by_rows(
    layers: LayerRows, operands: Sequence[Tensor | None], H: Tensor, matrix: Tensor, weight: float, most: int
) -> None:
    """Add `G^T S G / 2` stripe by stripe, with G the gradients along H's eigenvectors and S the signs of its values."""
    (output,) = layers.lin.outputs
    values, factors = _factored(H)
    for k in range(H.shape[1]):
        if bool(values[:, k].any()):
            deltas = layers.sweep([factors[:, :, k].reshape(output.shape)])
            signs = (values[:, k].sign() * weight).to(H.dtype).unsqueeze(1)
            _add_signed(layers, operands, deltas, signs, matrix, most)


def _factored(H: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, zero where they are no more than rounding, and H's factor V of `V S V^T`, S their signs."""
    values, vectors = torch.linalg.eigh(H)
    rounding = torch.finfo(H.dtype).eps * H.shape[1] * values.abs().amax(1, keepdim=True)
    values = values.where(values.abs() > rounding, 0)
    return values, vectors * values.abs().sqrt().unsqueeze(1)


def _add_signed(
    layers: LayerRows,
    operands: Sequence[Tensor | None],
    deltas: Sequence[Tensor],
    signs: Tensor,
    matrix: Tensor,
    most: int,
) -> None:
    for some in _samples(signs.shape[0], matrix.shape[0], most):
        G = _gradient_rows(layers, [None if a is None else a[some] for a in operands], [d[some] for d in deltas])
        _add_squares(matrix, G, G * signs[some])


def _samples(many: int, width: int, most: int) -> Iterator[slice]:
    step = max(1, most // max(1, width))
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


def _gradient_rows(layers: LayerRows, operands: Sequence[Tensor | None], deltas: Sequence[Tensor]) -> Tensor:
    """Return gradients of some samples, `(samples, P)`, from cotangents at the sites; zero for parameters elsewhere."""
    space, single = layers.lin.domain, [delta.unsqueeze(1) for delta in deltas]
    rows = deltas[0].new_zeros(len(deltas[0]), space.dim)
    for leaf, sites in layers.by_leaf:
        if sites:
            target = rows[:, space.slices[leaf]].view(-1, 1, *matrix_shape(space.shapes[leaf]))
            add_rows(layers, operands, single, sites, target)
    return rows
