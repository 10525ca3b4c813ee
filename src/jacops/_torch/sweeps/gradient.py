"""The linearization of a loss's gradient, whose products are those with the Hessian, and the routes of one product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..._cached import cached_property
from ..._ladder.failures import RouteWrongError
from ..._ladder.names import Question
from ..._ladder.plan import Cost
from ..._ladder.route import answer
from ..._runtime.agreement import size, tolerance
from ..._runtime.contexts import out_of_inference, private_noise
from ..._runtime.rounding import rounding_error
from ..._runtime.rows import Rows, written
from ..._space import Space
from .ask import SweepAsk
from .graph import passed_bytes
from .linearization import Linearization
from .pulls import PULLS, MatchesPlain
from .second_nodes import HessianByNodes, leaf_places, second_plan
from .weights import check_kept

# Bytes of a loss's cotangents from which on several products in one pass gain nothing. With 16 products one pass took,
# of the time of passes one by one by one thread and by two, 0.73 and 0.52 at 380 KB, 0.92 and 0.72 at 590 KB, and 1.14
# to 1.26 and 1.03 to 1.11 at 830 to 880 KB (MLPs); 0.47 and 0.34 at 560 KB, and 0.85 and 0.74 at 2 MB (CNNs).
_LARGE = 700_000
_DTYPES = (torch.float32, torch.float64)


@dataclass
class ProductAsk:
    """One product with a Hessian; the fields of `Ask`."""

    lin: Gradient
    vector: Tensor

    question, asked, shape = Question.HESSIAN, None, ()

    def __post_init__(self) -> None:
        lin = self.lin
        self.call, self.fallback, self.verdicts, self.routes = lin.call, lin.fallback, lin.proofs, lin.routes


class MatchesSweep:
    """Along a random direction, it is the product of a sweep over the recorded gradient."""

    name, always = "matches a sweep", False

    def evidence(self, route: Any, ask: ProductAsk, found: Tensor) -> bool:
        """Return whether the products agree.

        Raises:
            RouteWrongError: They do not.
        """
        lin = ask.lin
        direction, wanted = lin.probe or ([private_noise(leaf, i) for i, leaf in enumerate(lin.leaves)], None)
        lin.probe = None

        def products() -> Rows:
            return lin.gradient(direction)

        wanted = products() if wanted is None else wanted
        own = lin.multiplied(direction)
        gap = math.hypot(*(size(a - b) for a, b in zip(own, wanted, strict=True)))
        scale = math.hypot(*map(size, wanted))
        if not gap <= lin.tolerance * scale:
            products()  # which records the gradient where it was dropped: no errors get into what is kept
            if not gap <= rounding_error(products, wanted):
                raise RouteWrongError(f"a product node by node differs from a sweep (by {gap:.1e} of {scale:.1e})")
        return 0 < scale < math.inf


class ProductByNodes:
    """Tangents forward, and cotangents' changes back, node by node through the graph of the loss."""

    name, claims, leaving = "node by node", (MatchesSweep(),), "silent"

    def refuses(self, ask: ProductAsk) -> str | None:
        """The vector has to fit the leaves as it is."""
        space, vector = ask.lin.domain, ask.vector
        fits = vector.shape[0] == space.dim and vector.dtype is space.dtype and type(vector) is Tensor
        return None if fits and ask.lin.has_nodes else ""

    def cost(self, ask: ProductAsk) -> Cost:
        """Cheaper than the sweep, which needs a graph of the gradient."""
        return _CHEAPER

    def describe(self, ask: ProductAsk) -> str:
        """Name it."""
        return "node by node through the graph of the loss"

    def value(self, ask: ProductAsk) -> Tensor:
        """Return the product, flat."""
        lin = ask.lin
        return _flatten_dense_tensors(lin.multiplied(_unflatten_dense_tensors(ask.vector, lin.leaves)))


class ProductBySweep:
    """One backward pass over the recorded gradient."""

    name, claims, leaving = "sweep", (), "never"

    def refuses(self, ask: ProductAsk) -> str | None:
        """It always applies."""
        return None

    def cost(self, ask: ProductAsk) -> Cost:
        """One sweep."""
        return _SWEEP

    def describe(self, ask: ProductAsk) -> str:
        """Name it."""
        return "a backward pass over the recorded gradient"

    def value(self, ask: ProductAsk) -> Tensor:
        """Return the product, flat."""
        return ask.lin.swept(ask.vector)


_CHEAPER, _SWEEP = Cost(0.5), Cost(1)
PRODUCTS = (ProductByNodes(), ProductBySweep())


class MatchesPlainOnce(MatchesPlain):
    """The same, of a gradient that is not needed for later products."""

    def evidence(self, route: Any, ask: SweepAsk, found: Rows) -> bool:
        """Return whether the rows were distinguished from rounding, and drop what was recorded for that."""
        lin: Any = ask.lin
        proved = super().evidence(route, ask, found)
        lin.release()
        return proved


class RowsByNodes:
    """Many products, one by one."""

    name, claims, leaving = "node by node", (MatchesPlainOnce(),), "silent"

    def refuses(self, ask: SweepAsk) -> str | None:
        """No graph of the products is made."""
        lin: Any = ask.lin
        plain = not ask.create_graph and all([type(rows) is Tensor for rows in ask.rows])
        return None if plain and lin.has_nodes else ""

    def cost(self, ask: SweepAsk) -> Cost:
        """A product for each."""
        return Cost(ask.many)

    def describe(self, ask: SweepAsk) -> str:
        """Name the number of products."""
        return f"{ask.many} products node by node through the graph of the loss"

    def value(self, ask: SweepAsk) -> Rows:
        """Return `(k, *leaf)` per leaf."""
        lin: Any = ask.lin
        given = _contiguous(ask.rows)
        out = ask.out or [torch.empty_like(rows) for rows in given]
        for i in range(ask.many):
            for rows, part in zip(out, lin.multiplied([rows[i] for rows in given]), strict=True):
                rows[i] = part
        return out


class RowsByNodesTogether(RowsByNodes):
    """Many products in one pass."""

    name = "node by node, batched"

    def refuses(self, ask: SweepAsk) -> str | None:
        """One product needs no batch, and large ones gain nothing from it."""
        lin: Any = ask.lin
        return "" if ask.many == 1 or lin.is_large else super().refuses(ask)

    def describe(self, ask: SweepAsk) -> str:
        """Name the number of products."""
        return f"{super().describe(ask)}, in one batched pass"

    def value(self, ask: SweepAsk) -> Rows:
        """Return `(k, *leaf)` per leaf."""
        lin: Any = ask.lin
        return written(lin.multiplied(_contiguous(ask.rows), together=True), ask.out)


def _contiguous(rows: Sequence[Tensor]) -> Rows:
    """Return rows, which are columns of the caller's, in memory of their own order: they are read several times."""
    return [part.contiguous() for part in rows]


def _slopes(lin: Linearization, call: str) -> Rows:
    """Return the gradient of one number, with its graph."""
    check_kept(lin.weights, call)
    grads = lin.pull([out_of_inference(torch.ones_like(lin.outputs[0]))], create_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, lin.leaves, strict=True)]


class Gradient(Linearization):
    """The gradient of one number, recorded when its graph is first needed.

    Args:
        lin: The number, by its leaves.
        call: The public call on whose behalf this is done.

    Attributes:
        loss: `lin`.
        probe: A direction and the product with it, where one was computed to check the gradient.
    """

    pulls = (RowsByNodesTogether(), RowsByNodes(), *PULLS)

    def __init__(self, lin: Linearization, call: str) -> None:
        known = {"private": lin.private, "fallback": lin.fallback, "domain": lin.domain}
        self._record = partial(_slopes, lin, call)
        super().__init__(lin.leaves, self._record, leaf_names=(), output_names=(), call=call, **known)
        self.depend_on(lin, lin.aliased_leaves)
        self.loss = lin
        self.plain = not lin.graph_info.functions  # torch's own backward passes are made of torch's own operations
        self.probe: tuple[Rows, Rows] | None = None
        self._by_nodes: HessianByNodes | None = None

    def release(self) -> None:
        """Drop the recorded gradient where products do not need it; it is recorded again if something does."""
        if self.has_nodes:
            self._outputs, self._graph_info = self._record, None

    @cached_property
    def tolerance(self) -> float:
        """To which routes have to agree: slopes have the leaves' dtypes."""
        return tolerance([*self.domain.dtypes, *self._coarse])

    @property
    def codomain(self) -> Space:
        """The space of the slopes, which are like the leaves."""
        if self._codomain is None:
            names = tuple([f"d loss / d {name}" for name in self.domain.names])
            self._codomain = Space(names, self.domain.shapes, self.domain.dtypes, self.domain.device)
        return self._codomain

    @property
    def held_bytes(self) -> int:
        """Bytes of the values that the graph keeps, leaves left out; the loss's, where no gradient was recorded."""
        return self.loss.held_bytes if callable(self._outputs) else super().held_bytes

    def pull_vector(self, vector: Tensor) -> Tensor:
        """Return the product with a flat vector `(dim,)`."""
        return answer(ProductAsk(self, vector), PRODUCTS)

    def swept(self, vector: Tensor) -> Tensor:
        """Return the product by a sweep over the recorded gradient, which is right by definition."""
        return super().pull_vector(vector)

    @property
    def has_nodes(self) -> bool:
        """Whether products may go node by node: over torch's own operations, for plain leaves of one kind.

        Tensors that are saved through hooks (checkpoints) would be computed again at every look; other hooks would not
        run. Formulas of several operations round too much in half precision, where torch's kernels use float32 inside.
        """
        effects, space = self.proofs.effects, self.domain
        plain = self.plain and not (self.aliased_leaves or self.hooks) and not (effects is not None and effects.packs)
        kinds = [type(leaf) for leaf in self.leaves]
        alike = space.is_uniform and space.dtype in _DTYPES and self.loss.outputs[0].dtype is space.dtype
        return plain and alike and {Tensor, nn.Parameter}.issuperset(kinds)

    @property
    def is_large(self) -> bool:
        """Whether products are as fast one by one on a processor; a device is always faster with all in one pass."""
        return self.domain.device.type == "cpu" and self._loss_bytes > _LARGE

    @cached_property
    def _loss_bytes(self) -> int:
        return passed_bytes(self.loss.graph_info.nodes)

    @cached_property
    def _passed_bytes(self) -> int:
        return 5 * self._loss_bytes // 2  # 2 to 2.7 times, for MLPs and CNNs: known before the gradient is recorded

    def multiplied(self, direction: Sequence[Tensor], together: bool = False) -> Rows:
        """Return products node by node, as `HessianByNodes.product`.

        Raises:
            RouteFailedError: The graph holds something that there is no rule for.
        """
        self.sweeps += 1
        return self.by_nodes.product(self.loss, direction, together)

    @property
    def by_nodes(self) -> HessianByNodes:
        """The loss's graph in the order of such a product, made when it is first needed.

        Raises:
            RouteFailedError: It holds something that there is no rule for.
        """
        if self._by_nodes is None:
            lin = self.loss
            places = leaf_places(lin)
            key = (Question.HESSIAN, places, len(lin.graph_info.nodes))
            plan = self.proofs.measured.take(key, lambda: second_plan(lin, places))
            self._by_nodes = HessianByNodes(lin, plan)
        return self._by_nodes
