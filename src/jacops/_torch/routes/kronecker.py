"""Gradients of single samples as outer products, by groups of parameters, over one recorded batch.

A weight's gradient for one sample is a sum over positions (tokens, pixels, uses) of `left outer right`: the cotangent
at its output and what it multiplied there. A bias is one more input that is always one. Nothing here forms a gradient
of a whole weight, except to check itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError, succeeds
from ..._runtime.agreement import worst_disagreement
from ..._runtime.contexts import must_surface, private_noise
from ..._runtime.rows import plain
from ...errors import JacopsError
from ..layers.factors import LayerRows
from ..layers.part import matrix_shape
from ..layers.uses import ParameterUse
from ..sweeps.linearization import Linearization
from ..sweeps.weights import not_swept

Form = Literal["outer", "lookup", "rows", "swept"]


@dataclass(frozen=True)
class Group:
    """Parameters whose curvature is one block.

    Attributes:
        form: `"outer"` and `"lookup"` come as `OuterGradients`; `"rows"` as rows, by cotangents; `"swept"` as rows, by
            ordinary sweeps, one for each sample.
        leaves: The weight, and its bias if there is one.
        turned: The weight is stored as input times output.
    """

    form: Form
    leaves: tuple[int, ...]
    turned: bool = False


@dataclass(frozen=True, eq=False)
class OuterGradients:
    """Gradients `sum_t left[k, n, t, g] outer right[k, n, t, g]` of samples n under cotangents k, in g groups.

    One side is the cotangent, with k; the other is what it multiplies, with 1 in place of k.

    Attributes:
        left: `(k or 1, n, t, g, p)`; or the entries looked up, `(n, t)`, integers.
        right: `(k or 1, n, t, g, q)`.
        swapped: The cotangent is on the right.
    """

    left: Tensor
    right: Tensor
    swapped: bool = False

    @property
    def looks_up(self) -> bool:
        """Whether the left side holds entries of a table."""
        return not self.left.is_floating_point()


Gradients = list[OuterGradients] | Tensor  # uses of a weight, or rows (k, n, entries) of everything in the group


class RecordedBatch:
    """A recorded batch and where its parameters enter.

    Args:
        lin: A model's output `(samples, entries)` by its parameters.
    """

    def __init__(self, lin: Linearization) -> None:
        self.lin = lin
        (self.output,) = lin.outputs
        found: list[LayerRows] = []
        # Whether torch takes any sweep, and why not, ordinary ones tell.
        swept = succeeds(lambda: found.append(LayerRows(lin, self.samples)))
        self._layers = found[0] if swept else LayerRows(lin, self.samples, plainly=True)
        self.uses = self._layers.uses

    @property
    def samples(self) -> int:
        """How many."""
        return self.output.shape[0]

    def entries(self, groups: Sequence[Group]) -> int:
        """Return how many numbers one cotangent at the output costs."""
        return sum(s.shape.numel() for group in groups for s in self.uses.get(group.leaves[0], []))

    # ---- which parameters go together --------------------------------------------------------------------------

    @cached_property
    def _forms(self) -> dict[int, set[str]]:
        """In what ways each parameter enters."""
        return {leaf: {"derived" if site.derived else site.kind for site in own} for leaf, own in self.uses.items()}

    def groups(self) -> tuple[Group, ...]:
        """Return the parameters in groups, each parameter once, in the order of their weights."""
        made = self._layers.made
        if self.uses and "groups" in made:
            return made["groups"]
        partners, grouped = self._biases(), []
        taken = set(partners.values())
        for leaf in range(len(self.lin.leaves)):
            if leaf not in taken:
                grouped.append(self._group(leaf, partners.get(leaf)))
        if "_noise" not in vars(self) and self.uses:  # no values took part in it
            made["groups"] = tuple(grouped)
        return tuple(grouped)

    def misfit(self, groups: Sequence[Group]) -> int | None:
        """Return a leaf that enters this batch in another way than its group has."""
        for group in groups:
            for place, leaf in enumerate(group.leaves):
                forms = self._forms.get(leaf, set())
                wanted = {"outer": {"outer", "lookup"}, "lookup": {"lookup"}}.get(group.form, forms)
                known = group.form == "swept" or leaf in self.uses
                if not known or not forms <= ({"vector"} if place else wanted):
                    return leaf
        return None

    def _group(self, leaf: int, bias: int | None) -> Group:
        uses = self.uses.get(leaf)
        if uses is None:
            return Group("swept", (leaf,))
        forms = self._forms[leaf]
        if not uses or forms & {"vector", "derived"} or (len(uses) > 1 and len(set(map(_sides, uses))) > 1):
            return Group("rows", (leaf,))
        if forms == {"lookup"}:
            return Group("lookup", (leaf,))
        turned = next(site for site in uses if site.kind == "outer").turned
        return Group("outer", (leaf,) if bias is None else (leaf, bias), turned)

    def _biases(self) -> dict[int, int]:
        """Return the bias of each weight that has one: added at the weight's own output, use by use."""
        weights = {i: self.uses[i] for i, forms in self._forms.items() if forms == {"outer"}}
        vectors = {i: self.uses[i] for i, forms in self._forms.items() if forms == {"vector"}}
        partners: dict[int, int] = {}
        for fits in (_added_there, self._same_cotangents):  # the same operation first: a later sum has its cotangent
            for weight, own in weights.items():
                if weight in partners or not vectors or len({site.turned for site in own}) > 1:
                    continue
                bias = next((i for i, vector in vectors.items() if len(own) == len(vector) and fits(own, vector)), None)
                if bias is not None:
                    partners[weight] = bias
                    del vectors[bias]
        return partners

    @cached_property
    def _noise(self) -> dict[ParameterUse, Tensor]:
        """Cotangents at all uses of weights and vectors, for noise at the output."""
        sites = [site for i, own in self.uses.items() if self._forms[i] in ({"outer"}, {"vector"}) for site in own]
        (found,) = self._swept(private_noise(self.output).unsqueeze(0), sites)
        return {site: own[0] for site, own in zip(sites, found, strict=True)}

    def _same_cotangents(self, weights: Sequence[ParameterUse], vectors: Sequence[ParameterUse]) -> bool:
        """Return whether vectors are added, multiplied by nothing, where the cotangents are those of weights."""
        if any(site.operand is not None for site in vectors):
            return False
        pairs = [(self._noise[w].flatten(2), self._noise[v].flatten(2)) for w, v in zip(weights, vectors, strict=True)]
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)

    # ---- gradients ---------------------------------------------------------------------------------------------

    def gradients(self, groups: Sequence[Group], seeds: Tensor) -> Iterator[Gradients]:
        """Yield what each group's gradients are made of, under cotangents `(k, n, entries)` at the output.

        The cotangents come from one sweep; what they multiply is computed group by group, and neither is held longer
        than whoever takes them does.
        """
        own = [self.uses[group.leaves[0]] if group.form != "swept" else [] for group in groups]
        deltas = iter(self._at_sites([site for sites in own for site in sites], seeds))
        waiting = [[next(deltas) for _ in sites] for sites in own]
        del deltas
        swept = self._by_sweeps([group.leaves[0] for group in groups if group.form == "swept"], seeds)
        for group, sites in zip(groups, own, strict=True):
            found = waiting.pop(0)
            yield swept.pop(group.leaves[0]) if group.form == "swept" else self._gradients(group, sites, found, seeds)

    def _at_sites(self, sites: Sequence[ParameterUse], seeds: Tensor) -> list[Tensor]:
        """Return the rows `(k, n, t, …)` at every site."""
        found = self._swept(seeds, sites)
        return [own[0] if len(own) == 1 else _joined(own) for own in zip(*found, strict=True)]

    def _swept(self, seeds: Tensor, sites: Sequence[ParameterUse]) -> list[list[Tensor]]:
        try:
            return list(self._layers.sweeps(seeds, sites))
        except RuntimeError as error:
            if must_surface(error) or isinstance(error, JacopsError):
                raise
            raise not_swept(self.lin.call, error, self.lin.graph_info.functions) from error

    def _gradients(
        self, group: Group, sites: Sequence[ParameterUse], deltas: Sequence[Tensor], seeds: Tensor
    ) -> Gradients:
        pairs = list(zip(sites, deltas, strict=True))
        if group.form != "rows":
            return [self._outer(group, site, delta, len(group.leaves) > 1) for site, delta in pairs]
        like = self.lin.leaves[group.leaves[0]].detach()
        rows = like.new_zeros(self.samples, seeds.shape[0], *matrix_shape(like.shape))
        for site, delta in pairs:
            site.part(site.sample_operand(), delta.transpose(0, 1)).into(rows, add=True)
        return rows.flatten(2).transpose(0, 1)

    def _outer(self, group: Group, site: ParameterUse, delta: Tensor, with_one: bool) -> OuterGradients:
        operand = _given(site.sample_operand())
        if site.kind == "lookup":
            if group.form == "lookup":
                return OuterGradients(operand, delta, swapped=True)
            table = self.lin.leaves[group.leaves[0]]
            entries = torch.nn.functional.one_hot(operand, table.shape[0]).to(table.dtype)[None, :, :, None]
            sides = (delta, entries) if group.turned else (entries, delta)
            return OuterGradients(*sides, swapped=not group.turned)
        if with_one:
            operand = _with_one(site, operand)
        swapped = site.turned != group.turned
        return OuterGradients(operand[None], delta, swapped) if swapped else OuterGradients(delta, operand[None])

    def _by_sweeps(self, leaves: Sequence[int], seeds: Tensor) -> dict[int, Tensor]:
        """Return rows `(k, n, entries)` of some leaves by ordinary sweeps, one for each cotangent and sample."""
        if not leaves:
            return {}
        own, (many, n) = self.lin.to(self.lin.outputs, self.lin.codomain.names, leaves=leaves), seeds.shape[:2]
        kinds = zip(own.domain.sizes, own.domain.dtypes, strict=True)
        rows = [seeds.new_empty(many * n, entries, dtype=dtype) for entries, dtype in kinds]
        chunk = own.chunk(many * n)
        for start in range(0, many * n, chunk):
            where = torch.arange(start, min(start + chunk, many * n), device=seeds.device)
            alone = seeds.new_zeros(len(where), *seeds.shape[1:])
            alone[torch.arange(len(where)), where % n] = seeds[where // n, where % n]
            for whole, found in zip(rows, own.pull_rows([alone]), strict=True):
                whole[where] = found.flatten(1)
        self.lin.sweeps += own.sweeps
        return {leaf: whole.unflatten(0, (many, n)) for leaf, whole in zip(leaves, rows, strict=True)}

    # ---- are they right? ---------------------------------------------------------------------------------------

    def confirmed(self, groups: Sequence[Group], seeds: Tensor, found: Sequence[Gradients]) -> bool:
        """Compare gradients, put together under random weights, with one plain sweep."""
        mix = private_noise(seeds[:, 0, 0])
        pulled = self.lin.pull([torch.tensordot(mix, seeds, 1)])
        pairs = []
        for group, gradients in zip(groups, found, strict=True):
            own = assembled(gradients, mix, [self.lin.leaves[i] for i in group.leaves], group.turned)
            for leaf, value in zip(group.leaves, own, strict=True):
                gradient = pulled[leaf]
                expected = torch.zeros_like(self.lin.leaves[leaf]) if gradient is None else gradient
                pairs.append((value, plain(expected)))
        return worst_disagreement(pairs) <= self.lin.tolerance

    def distrust(self) -> None:
        """Take ordinary sweeps for all parameters from now on."""
        self.uses = {}
        vars(self).pop("_forms", None)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors joined along the first axis, laid out as the first is: channels of images stay outside pixels."""
    strides = parts[0].stride()
    order = [0, *sorted(range(1, parts[0].ndim), key=lambda axis: -strides[axis])]
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat([part.permute(order) for part in parts]).permute(back)


def _sides(use: ParameterUse) -> tuple[int, int]:
    """Return how many groups a weight is seen in, and how long the second side of each is as it is stored."""
    if use.operand is None or use.kind != "outer":
        return 1, use.entry.weight[-1]
    groups, inner = use.operand.shape[1:]
    return groups, use.entry.weight.numel() // (groups * inner) if use.turned else inner


def _added_there(weights: Sequence[ParameterUse], vectors: Sequence[ParameterUse]) -> bool:
    """Return whether vectors are added, multiplied by nothing, by the operations that take weights."""
    pairs = zip(weights, vectors, strict=True)
    return all(w.node is v.node and w.layout is not None and v.operand is None for w, v in pairs)


def _given(operand: Tensor | None) -> Tensor:
    if operand is None:
        raise RouteFailedError("an operation kept nothing that multiplies its parameter")
    return operand


def _with_one(site: ParameterUse, operand: Tensor) -> Tensor:
    """Return operands of a weight and its bias in the layout of the weight's: of patches the last axis is outermost."""
    if operand.stride(-1) == 1 and not isinstance(site.order, Tensor):
        return torch.constant_pad_nd(operand, (0, 1), 1.0)
    ones = site.ones(operand)
    if operand.stride(-1) == 1:
        return torch.cat([operand, ones], -1)
    return torch.cat([operand.movedim(-1, 0), ones.movedim(-1, 0)]).movedim(0, -1)


def assembled(gradients: Gradients, mix: Tensor, leaves: Sequence[Tensor], turned: bool) -> list[Tensor]:
    """Return one tensor per leaf: the sum over samples, and over cotangents under weights, of a group's gradients."""
    if isinstance(gradients, Tensor):
        return [torch.tensordot(mix.to(gradients.dtype), gradients.sum(1), 1).reshape(leaves[0].shape)]
    total = None
    for use in gradients:
        if use.looks_up:
            right = torch.tensordot(mix.to(use.right.dtype), use.right, 1).flatten(0, 1)[:, 0]
            part = right.new_zeros(1, leaves[0].shape[0], right.shape[1])
            part[0].index_add_(0, use.left.flatten(), right)
        else:
            along, other = (use.right, use.left) if use.swapped else (use.left, use.right)
            mixed = torch.tensordot(mix.to(along.dtype), along, 1)
            left, right = (other[0], mixed) if use.swapped else (mixed, other[0])
            part = torch.einsum("ntgp,ntgq->gpq", left, right)
        total = part if total is None else total + part
    return [] if total is None else matrices_to_leaves(total, [leaf.shape for leaf in leaves], turned)


def matrices_to_leaves(blocks: Tensor, shapes: Sequence[torch.Size], turned: bool) -> list[Tensor]:
    """Return `(…, *weight)` and `(…, *bias)` from blocks `(…, g, p, q)`, whose last column is the bias."""
    weight, *bias = shapes
    lead = blocks.shape[:-3]
    parts = [blocks[..., -1].reshape(*lead, *shape) for shape in bias]
    body = blocks[..., :-1] if bias else blocks
    return [(body.mT if turned else body).reshape(*lead, *weight), *parts]
