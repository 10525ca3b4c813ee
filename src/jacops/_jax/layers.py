"""Gradients of single samples of a JAX model by layers, as EK-FAC adds them up: cotangents and operands of weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from .._ladder.protocol import SweepOptions
from .._runtime.agreement import tolerance, worst_disagreement
from .._torch.protocol import Group, OuterGradients
from ..errors import NotDifferentiableError
from .crossing import filled, to_numpy, to_torch
from .model import Model
from .parameters import Parameters
from .points import Point, alone, floating, joined, split
from .rules import Entries, Follower, Weight
from .sweeps import Each, Kernel, shapes


@dataclass(frozen=True, eq=False)
class _Trace:
    """What compiled sweeps need of a batch; they live longer than it, and hold nothing of its data.

    Attributes:
        model: The compiled sweeps.
        names: Of the parameters.
        call: The public call.
    """

    model: Model
    names: tuple[str, ...]
    call: str

    def kernel(self, weights: Sequence[Weight], rows: tuple[int, ...]) -> Kernel:
        """Return the function of one sample and its cotangents that `JaxLayers` sweeps."""

        def kernel(each: Each, shared: Point, samples: Any) -> Any:
            def one(sample: tuple[Any, Any]) -> Any:
                x, directions = sample
                taps = [jnp.zeros(w.rows, w.dtype) for w in weights]
                kept = [shared.leaves[i] for i in rows]

                def function(taps: Any, kept: Any) -> Any:
                    leaves = list(shared.leaves)
                    for i, leaf in zip(rows, kept, strict=True):
                        leaves[i] = leaf
                    return self.followed(shared._replace(leaves=tuple(leaves)), x, taps)

                output, pull, met = jax.vjp(function, taps, kept, has_aux=True)
                like = jax.tree.leaves(output)
                spec = jax.tree.structure(output)

                def pulled(row: Any) -> tuple[Any, ...]:
                    return tuple(jax.tree.leaves(pull(jax.tree.unflatten(spec, split(row, like)))))

                found = jax.vmap(pulled)(directions)
                return joined([*met, *found])

            return each(one, samples)

        return kernel

    def followed(
        self, point: Point, x: Any, taps: Any = None, noted: list[Entries] | None = None
    ) -> tuple[Any, list[Any]]:
        """Return one sample's output with taps at the uses of weights, and what multiplies each of them there."""
        here = alone(point._replace(y=None), (x, None))

        def function(leaves: Any, rest: Point) -> Any:
            return floating(self.model.output(rest._replace(leaves=leaves)))

        traced, output = jax.make_jaxpr(function, return_shape=True)(here.leaves, here)
        follower = Follower(self.names, self.call, taps)
        found = follower.run(traced, jax.tree.leaves((here.leaves, here)))
        if noted is not None:
            noted.append(follower.found)
        return jax.tree.unflatten(jax.tree.structure(output), found), follower.found.operands


@final
class JaxLayers:
    """Where the parameters of a batch enter, and the gradients of its samples, each as a batch of one.

    Args:
        model: The compiled sweeps.
        point: Parameters and the batch's input.
        own: The parameters.
        options: Of the public call.

    Raises:
        NotDifferentiableError: A parameter enters by an operation without a rule, or the model reads values.
    """

    def __init__(self, model: Model, point: Point, own: Parameters, options: SweepOptions) -> None:
        self._model, self._point, self._own, self._options = model, point, own, options
        self._call = call = options.call
        self._trace = _Trace(model, own.names, call)
        if not model.compiled:
            raise NotDifferentiableError(f"{call}: the model reads values out of its arrays, so it cannot be traced.")
        first, noted = jax.tree.map(lambda leaf: leaf[0], point.x), list[Entries]()
        output, self._operands = jax.eval_shape(lambda x: self._trace.followed(point, x, noted=noted), first)
        (self._found,) = noted
        self._outputs = [leaf.size for leaf in jax.tree.leaves(output)]
        self._pairs = _pairs(self._found)

    # ---- which parameters go together ------------------------------------------------------------------------------

    def groups(self) -> tuple[Group, ...]:
        """Return the parameters in groups, each parameter once, in the order of their weights."""
        taken = set(self._pairs.values())
        return tuple(self._group(leaf) for leaf in range(len(self._own.leaves)) if leaf not in taken)

    def _group(self, leaf: int) -> Group:
        turned = next((w.turned for w in self._found.weights if w.leaf == leaf), None)
        if turned is None or leaf in self._found.others:
            return Group("rows", (leaf,))
        bias = self._pairs.get(leaf)
        return Group("outer", (leaf,) if bias is None else (leaf, bias), turned)

    def misfit(self, groups: Sequence[Group]) -> int | None:
        """Return a parameter that enters in another way than its group has."""
        return next((own.leaves[0] for own, group in zip(self.groups(), groups, strict=True) if own != group), None)

    def entries(self, groups: Sequence[Group]) -> int:
        """Return how many numbers one cotangent at the output costs."""
        samples = jax.tree.leaves(self._point.x)[0].shape[0]
        return samples * sum(math.prod(w.rows) for w in self._found.weights)

    # ---- gradients -------------------------------------------------------------------------------------------------

    def gradients(self, groups: Sequence[Group], seeds: Tensor) -> list[Any]:
        """Return what each group's gradients are made of, under cotangents `(k, n, entries)` at the output.

        Raises:
            NotDifferentiableError: Put together they are not the gradient of the batch: samples influence each other.
        """
        rows = tuple(group.leaves[0] for group in groups if group.form == "rows")
        many, n = seeds.shape[:2]
        uses = self._found.weights
        wide = [operand.shape[1] for operand in self._operands]
        sizes = [w.rows[0] * q for w, q in zip(uses, wide, strict=True)]
        sizes += [many * math.prod(w.rows) for w in uses] + [many * self._own.leaves[i].size for i in rows]
        found = self._swept(rows, seeds, sum(sizes))
        parts = filled(found, (n, sum(sizes)), seeds.dtype).split(sizes, 1)
        operands = [p.reshape(n, w.rows[0], 1, q) for p, w, q in zip(parts, uses, wide, strict=False)]
        deltas = [
            p.reshape(n, many, w.rows[0], 1, w.rows[1]).movedim(1, 0)
            for p, w in zip(parts[len(uses) :], uses, strict=False)
        ]
        swept = {i: p.reshape(n, many, -1).movedim(1, 0) for i, p in zip(rows, parts[2 * len(uses) :], strict=True)}
        result = [
            swept[group.leaves[0]] if group.form == "rows" else self._outer(group, operands, deltas) for group in groups
        ]
        self._confirm(groups, seeds, result)
        return result

    def _outer(self, group: Group, operands: list[Tensor], deltas: list[Tensor]) -> list[OuterGradients]:
        (leaf, *bias), own = group.leaves, list[OuterGradients]()
        for weight, operand, delta in zip(self._found.weights, operands, deltas, strict=True):
            if weight.leaf == leaf:
                if bias:
                    operand = torch.cat([operand, operand.new_ones(*operand.shape[:-1], 1)], -1)
                swapped = weight.turned != group.turned
                sides = (operand[None], delta) if swapped else (delta, operand[None])
                own.append(OuterGradients(*sides, swapped))
        return own

    def _swept(self, rows: tuple[int, ...], seeds: Tensor, width: int) -> list[np.ndarray]:
        """Return operands, cotangents at the uses, and whole gradients of some parameters, one row for each sample."""
        key = "layers", rows, seeds.shape[0], tuple(self._found.weights), self._call
        sweep = self._model.sweep(key, self._trace.kernel(self._found.weights, rows), linear=False)
        samples = self._point.x, to_numpy(seeds.movedim(1, 0))
        return sweep(self._point._replace(x=None, y=None), samples, width, self._options)

    def _confirm(self, groups: Sequence[Group], seeds: Tensor, found: Sequence[Any]) -> None:
        """Compare gradients, put together under random weights, with a plain sweep of the batch, once a shape."""
        key = "layers", seeds.shape, shapes(self._point)
        if key in self._model.confirmed:
            return
        mix = torch.randn(seeds.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(seeds)
        row = torch.cat([p.reshape(1, -1) for p in torch.tensordot(mix, seeds, 1).split(self._outputs, 1)], 1)
        space = self._own.space
        plain = space.unflatten(to_torch(self._model.pull(self._point, to_numpy(row), space.dim, self._options)[0])[0])
        pairs = []
        for group, gradients in zip(groups, found, strict=True):
            pairs += zip(_assembled(gradients, mix, group), [plain[i].reshape(-1) for i in group.leaves], strict=True)
        gap = worst_disagreement(pairs)
        if gap > tolerance(list(space.dtypes)):
            raise NotDifferentiableError(
                f"{self._call}: gradients of single samples do not add up to the batch's (off by {gap:.1e}): samples "
                "influence each other, or an operation's rule is wrong. Use `CG()`."
            )
        if gap == gap:  # NaN proves nothing
            self._model.confirmed.add(key)


def _pairs(found: Entries) -> dict[int, int]:
    """Return the bias of each weight that has one at all of its uses, one way round, and nowhere else."""
    uses, biases, pairs = Counter(w.leaf for w in found.weights), Counter(found.others), {}
    for leaf, times in uses.items():
        turned = {w.turned for w in found.weights if w.leaf == leaf}
        own = {found.biases.get(i) for i, w in enumerate(found.weights) if w.leaf == leaf}
        bias = own.pop() if len(own) == 1 else None
        alone = bias not in uses and leaf not in found.others
        if bias is not None and alone and len(turned) == 1 and biases[bias] == times:
            pairs[leaf] = bias
    return pairs


def _assembled(gradients: Any, mix: Tensor, group: Group) -> list[Tensor]:
    """Return the flat gradients of a group's parameters, summed over samples, and over cotangents under weights."""
    if isinstance(gradients, Tensor):
        return [torch.einsum("k,kne->e", mix, gradients)]
    parts = []
    for use in gradients:
        along, other = (use.right, use.left[0]) if use.swapped else (use.left, use.right[0])
        part = torch.einsum("k,kntgp,ntgq->pq", mix, along, other)
        parts.append(part.T if use.swapped else part)
    total = torch.stack(parts).sum(0)
    weight = total[:, :-1] if len(group.leaves) > 1 else total
    return [(weight.T if group.turned else weight).reshape(-1), *[total[:, -1]] * (len(group.leaves) - 1)]
