"""Linearisations: one recorded point of a function, and the ladder of routes for sweeps over it.

`pull` is a backward pass (cotangents to gradients), `push` its transpose (tangents to changes of the output). Plain
`autograd.grad`, one cotangent at a time, defines what is right. Faster routes are taken where they apply and agree:
many cotangents in one batched pass, compared with one plain pass over a random mix of them; pushes node by node
(`nodewise`), compared with one pull; and pushes by a differentiated pull (`double_backward`), compared with that pull.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..._cached import cached_property
from ..._ladder.names import Question
from ..._ladder.route import answer
from ..._progress import track
from ..._runtime.agreement import tolerance
from ..._runtime.chunks import MOST_COLUMNS, to_a_pass
from ..._runtime.contexts import autocast_on, is_sweeping, must_surface, sweeping
from ..._runtime.engine import swept
from ..._runtime.restoring import restoring
from ..._runtime.rows import Rows, basis, cut_length, plain, stacked, zero_rows
from ..._runtime.side_effects import SideEffects
from ..._space import Space
from ...errors import JacopsError
from .ask import SweepAsk
from .double_backward import DoubleBackward
from .graph import GraphInfo, inspect_graph, passed_bytes, refuse_cut, saved_bytes
from .linear_nodes import has_fused_attention
from .nodewise import Nodewise
from .proofs import Proofs, ProofStore
from .pulls import PULLS
from .pushes import BY_DOUBLE_BACKWARD, COLUMNS, NEVER_BY_ROWS, PUSHES
from .reentrant import backward
from .weights import Weights, not_swept

Names = Sequence[str] | str | Callable[[], Sequence[str]]
Gradients = Sequence[Tensor | None]


class Linearization:
    """One recorded point and the sweeps over it.

    Args:
        leaves: What is differentiated by, one tensor each.
        outputs: What is differentiated, or a function that records it when it is first read.
        leaf_names: How messages call the leaves: a name for each, or one that they are numbered under.
        output_names: The same of the outputs, or a function that returns names once they are needed.
        call: The public call on whose behalf this is done.
        private: Nobody but this linearization holds the leaves, so `.backward` may write into them.
        fallback: `"warn"`, `"silent"` or `"error"` when a fast route is left.
        domain: The leaves' space, where it is known.

    Attributes:
        aliased_leaves: More tensors that stand for leaf `j`: the caller's own parameter, beside a private copy.
        protected: Tensors whose `.grad` a backward pass must leave as it is.
        plain: The graph is known to hold no custom Functions, without a walk over it.
        hooks: How many hooks its forward registered.
        pulls: Routes for many cotangents.
    """

    pulls: Sequence[Any] = PULLS

    def __init__(
        self,
        leaves: Sequence[Tensor],
        outputs: Sequence[Tensor] | Callable[[], Sequence[Tensor]],
        *,
        leaf_names: Names,
        output_names: Names,
        call: str,
        private: bool = False,
        fallback: str = "warn",
        domain: Space | None = None,
    ) -> None:
        self.leaves, self._outputs = list(leaves), outputs if callable(outputs) else list(outputs)
        device = None if self.leaves or not self.outputs else self.outputs[0].device
        self.domain = domain or Space.of(self.leaves, _names(leaf_names, self.leaves), device)
        self.call, self.private, self.fallback = call, private, fallback
        self._output_names, self._codomain = output_names, None
        self._whole: int | None = None
        self._coarse = [torch.bfloat16] if autocast_on(self.leaves or self.outputs) else []
        self.aliased_leaves: tuple[tuple[int, Tensor], ...] = ()
        self.routes: dict[str, str] = {}
        self.store: ProofStore | None = None
        self.protected: Sequence[Tensor] = ()
        self.weights: Weights | None = None
        self.sweeps, self.plain, self.hooks = 0, False, 0
        self._double_backward: DoubleBackward | None = None
        self._nodewise: Nodewise | None = None
        self._graph_info: GraphInfo | None = None

    @property
    def outputs(self) -> list[Tensor]:
        """What is differentiated."""
        found = self._outputs  # read once: another thread may be recording, too
        if callable(found):
            found = self._outputs = list(found())
        return found

    @property
    def codomain(self) -> Space:
        """The outputs' space, made when it is first read: no sweep over tensors needs it."""
        if self._codomain is None:
            self._codomain = Space.of(self.outputs, _names(self._output_names, self.outputs), self.domain.device)
        return self._codomain

    @cached_property
    def proofs(self) -> Proofs:
        """What earlier calls proved about this graph; nothing where none were looked up."""
        return Proofs()

    @cached_property
    def tolerance(self) -> float:
        """To which routes have to agree; under autocast values are coarser than their dtypes say."""
        return tolerance([*self.domain.dtypes, *[o.dtype for o in self.outputs], *self._coarse])

    @property
    def graph_info(self) -> GraphInfo:
        """What the graph holds; read once."""
        if self._graph_info is None:
            self._graph_info = inspect_graph(self.outputs, self.hooks)
        return self._graph_info

    def look_up(self, store: ProofStore, effects: SideEffects | None = None) -> SideEffects | None:
        """Use the proofs of this graph in `store`, recorded with these effects if observed; return as `rely_on`."""
        self.store = store
        return self.rely_on(store.proofs(self.graph_info, effects))

    def compare(self, other: Linearization) -> None:
        """Take from another recording, of fewer samples, which tensors in the graph are constants."""
        if self.store is not None:
            self.rely_on(self.proofs.beside(self.store.refined(self.graph_info, other.graph_info)))

    def rely_on(self, proofs: Proofs) -> SideEffects | None:
        """Use these proofs; return what the forward does besides arithmetic, None where that is not known."""
        self.proofs = proofs
        effects = proofs.effects
        if effects is not None and effects.coarse is not None:
            self._coarse.append(effects.coarse)
            self.__dict__.pop("tolerance", None)
        return effects

    def to(
        self,
        outputs: Sequence[Tensor],
        names: Names,
        call: str = "",
        leaves: Sequence[int] | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> Linearization:
        """Return a linearization of other outputs, computed from the same leaves: some of them, and `more` by name."""
        kept, leaf_names, domain, aliased = self.leaves, self.domain.names, self.domain, self.aliased_leaves
        if leaves is not None or more or not kept:
            some, more, domain = range(len(kept)) if leaves is None else leaves, more or {}, None
            leaf_names = [*(leaf_names[i] for i in some), *more]
            kept = [*(kept[i] for i in some), *more.values()]
            aliased = tuple((some.index(i), tensor) for i, tensor in aliased if i in some)
        options = {"call": call or self.call, "private": self.private, "fallback": self.fallback, "domain": domain}
        other = Linearization(kept, outputs, leaf_names=leaf_names, output_names=names, **options)
        other.depend_on(self, aliased)
        if len(outputs) == len(self.outputs) and all(a is b for a, b in zip(outputs, self.outputs, strict=True)):
            other._graph_info = self._graph_info
        return other

    def depend_on(self, lin: Linearization, aliased: tuple[tuple[int, Tensor], ...]) -> None:
        """Take over what is known of another one, from the same point."""
        self.proofs, self.protected, self.weights, self.aliased_leaves = lin.proofs, lin.protected, lin.weights, aliased
        self.hooks = lin.hooks
        self._coarse += [*lin._coarse, *lin.domain.dtypes, *[o.dtype for o in lin.outputs]]

    @property
    def held_bytes(self) -> int:
        """Bytes of the values that the graph keeps, leaves left out."""
        return saved_bytes(self.graph_info.nodes, self.leaves)

    @property
    def is_pulled_only(self) -> bool:
        """Attention is on a fused kernel, whose backward has no derivative."""
        return has_fused_attention(self.graph_info.nodes)

    def is_connected(self) -> bool:
        """Return whether a path leads from an output to any leaf, as far as a walk over the graph can see."""
        known, targets = self.graph_info, [*self.leaves, *[t for _, t in self.aliased_leaves]]
        made = any(id(t) in known.leaves or (t.grad_fn is not None and t.grad_fn in known.nodes) for t in targets)
        return made or known.reentrant

    # ---- one backward pass -----------------------------------------------------------------------------------

    def pull(
        self, cotangents: Sequence[Tensor | None], create_graph: bool = False, batched: bool = False
    ) -> list[Tensor | None]:
        """Return one gradient per leaf by one backward pass; None where no path leads to the leaf."""
        live = [(o, c) for o, c in zip(self.outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        if not live or not self.leaves:
            return [None] * len(self.leaves)
        return self._pulled([o for o, _ in live], [c for _, c in live], create_graph, batched)

    def _pulled(
        self, outputs: Rows, seeds: Rows, create_graph: bool = False, batched: bool = False, fit: bool = False
    ) -> list[Tensor | None]:
        """Return one gradient per leaf, from outputs that require grad; `fit` where the seeds are made for them."""
        cuts = self.graph_info.functions if create_graph else ()
        if cuts:  # with seeds that require grad, once_differentiable backwards leave a mark instead of dropping a part
            seeds = [c if c.requires_grad else c.detach().requires_grad_() for c in seeds]
        self.sweeps += 1
        sweep = self._sweep if is_sweeping(outputs[0]) else self._sweep_elsewhere
        grads = sweep(outputs, seeds, create_graph, batched, fit)
        if cuts:
            refuse_cut(self.call, cuts, grads)
        grads = [g if g is None or g.layout is torch.strided else g.to_dense() for g in grads]
        return self._merged(grads) if self.aliased_leaves else grads

    @restoring
    def _sweep_elsewhere(self, outputs: Rows, *args: Any) -> Gradients:
        """Sweep where the caller has switched gradients off, or autocast on."""
        with sweeping(outputs[0]):
            return self._sweep(outputs, *args)

    def _sweep(self, outputs: Rows, seeds: Rows, create_graph: bool, batched: bool, fit: bool) -> Gradients:
        targets = [*self.leaves, *(tensor for _, tensor in self.aliased_leaves)] if self.aliased_leaves else self.leaves
        if not self.plain and self.graph_info.reentrant:
            return backward(self, outputs, seeds, targets, create_graph, batched)
        try:
            return swept(outputs, targets, seeds, create_graph, batched, fit)
        except RuntimeError as error:
            if batched or must_surface(error) or isinstance(error, JacopsError):
                raise
            raise not_swept(self.call, error, self.graph_info.functions) from error

    def _merged(self, grads: Gradients) -> list[Tensor | None]:
        merged = [*grads[: len(self.leaves)]]
        for (index, _), extra in zip(self.aliased_leaves, grads[len(self.leaves) :], strict=True):
            own = merged[index]
            merged[index] = extra if own is None else own if extra is None else own + extra
        return merged

    def gradient(self, cotangents: Sequence[Tensor | None]) -> Rows:
        """Return one gradient per leaf by one backward pass, zeros where no path leads to the leaf."""
        return self._filled(self.pull(cotangents))

    def _filled(self, grads: Gradients) -> Rows:
        return [torch.zeros_like(plain(p)) if g is None else plain(g) for g, p in zip(grads, self.leaves, strict=True)]

    def pull_vector(self, vector: Tensor) -> Tensor:
        """Return `(dim,)` from a flat cotangent `(dim,)` by one backward pass, which is right by definition."""
        if Question.PULL not in self.routes:
            self.routes[Question.PULL] = PULLS[-1].describe(None)
        if self._whole is None:
            self._whole = cut_length(self.outputs) if self.leaves else 0
        if vector.shape[0] != self._whole or vector.dtype is not self.outputs[0].dtype:
            return self.domain.join_row(self.gradient(self.codomain.unflatten(vector)))[0]
        # Torch cuts a vector into pieces, and joins them, in two thirds of the time of a view for each.
        grads = self._pulled(self.outputs, list(_unflatten_dense_tensors(vector, self.outputs)), fit=True)
        for grad in grads:
            if type(grad) is not Tensor or grad.dtype is not vector.dtype:
                return self.domain.join_row(self._filled(grads))[0]
        return _flatten_dense_tensors(grads)

    # ---- many cotangents -------------------------------------------------------------------------------------

    def pull_rows(
        self, cotangents: Sequence[Tensor | None], create_graph: bool = False, out: Rows | None = None
    ) -> Rows:
        """Return `(k, *leaf)` per leaf from `(k, *output)` per output (None: zero), written into `out` if given."""
        many = next(c.shape[0] for c in cotangents if c is not None)
        if many == 0:
            return [zero_rows(0, leaf) for leaf in self.leaves]
        chunk = self.chunk(many)
        if many > chunk and not create_graph:
            out = [zero_rows(many, leaf) for leaf in self.leaves] if out is None else out
            for start in range(0, many, chunk):
                where = slice(start, start + chunk)
                self.pull_rows([None if c is None else c[where] for c in cotangents], out=[o[where] for o in out])
            return out
        return answer(SweepAsk(Question.PULL, self, cotangents, many, create_graph, out), self.pulls)

    def stacked(self, grads: list[Tensor | None], leaf: int) -> Tensor:
        """Return gradients by one leaf as rows, zeros where no path leads to it."""
        found, space = stacked(grads), self.domain
        if found is not None:
            return found
        return torch.zeros(len(grads), *space.shapes[leaf], dtype=space.dtypes[leaf], device=space.device)

    def filled(self, grads: Sequence[Tensor | None], many: int) -> Rows:
        """Return batched gradients with zeros where no path leads to a leaf."""
        kinds = zip(self.domain.shapes, self.domain.dtypes, strict=True)
        return [
            torch.zeros(many, *shape, dtype=dtype, device=self.domain.device) if g is None else plain(g)
            for g, (shape, dtype) in zip(grads, kinds, strict=True)
        ]

    # ---- tangents --------------------------------------------------------------------------------------------

    def push_rows(self, tangents: Sequence[Tensor], create_graph: bool = False) -> Rows:
        """Return `(k, *output)` per output from `(k, *leaf)` per leaf."""
        many = tangents[0].shape[0] if tangents else 1
        if many == 0:
            return [zero_rows(0, o) for o in self.outputs]
        chunk = many if create_graph or not tangents or self.live <= max(many, 1) else self.chunk(many)
        parts = [
            self._pushed([t[start : start + chunk] for t in tangents], create_graph, PUSHES)
            for start in range(0, many, chunk)
        ]
        return parts[0] if len(parts) == 1 else [torch.cat(rows) for rows in zip(*parts, strict=True)]

    @cached_property
    def live(self) -> int:
        """Entries of outputs that lead anywhere."""
        return sum(o.numel() for o in self.outputs if o.requires_grad)

    def _pushed(self, tangents: Sequence[Tensor], create_graph: bool, routes: Sequence[Any]) -> Rows:
        many = tangents[0].shape[0] if tangents else 1
        return answer(SweepAsk(Question.PUSH, self, tangents, many, create_graph), routes)

    def push_alone(self, tangents: Sequence[Tensor]) -> Rows:
        """Return `(k, *output)` per output, never by rows.

        Raises:
            RouteFailedError: The function has no such route, or it fails its check.
        """
        return answer(SweepAsk(Question.PUSH, self, tangents, tangents[0].shape[0], alone=True), NEVER_BY_ROWS)

    def push_by_double_backward(self, tangents: Sequence[Tensor], create_graph: bool = False) -> Rows:
        """Return `(k, *output)` per output by the differentiated backward pass.

        Raises:
            RouteFailedError: The function has no such route, or it fails its check.
        """
        return self._pushed(tangents, create_graph, BY_DOUBLE_BACKWARD)

    def push_columns(self, leaf: int, tangents: Tensor) -> Rows:
        """Return `(k, *output)` per output from tangents `(k, *leaf)` of one leaf alone.

        Raises:
            RouteFailedError: The function has no route that pushes, or they fail their checks.
        """
        rows = [tangents if i == leaf else None for i in range(len(self.leaves))]
        return answer(SweepAsk(Question.PUSH, self, rows, tangents.shape[0]), COLUMNS)

    @property
    def double_backward(self) -> DoubleBackward:
        """The recorded backward pass, made when it is first needed."""
        if self._double_backward is None:
            self._double_backward = DoubleBackward(self)
        return self._double_backward

    @property
    def nodewise(self) -> Nodewise:
        """The graph in the order of pushes; a recorded backward pass of the same point is then no longer needed."""
        if self._nodewise is None:
            self._nodewise = Nodewise(self)
        self._double_backward = None
        return self._nodewise

    # ---- whole matrices --------------------------------------------------------------------------------------

    def rows(
        self, create_graph: bool = False, chunk_size: int | None = None
    ) -> Iterator[tuple[int, slice, Rows, Rows | None]]:
        """Yield what `autograd.grad` gives for unit cotangents, over all entries of all outputs.

        Each item is the output's index, the entries, `(k, *leaf)` per leaf, and for a complex output the same for
        cotangents of size i, else None.
        """
        for index, output in enumerate(self.outputs):
            chunk = chunk_size or self.chunk(output.numel())
            for start in track(range(0, output.numel(), chunk), self.call):
                where = slice(start, min(start + chunk, output.numel()))
                seeds = [basis(output, where) if i == index else None for i in range(len(self.outputs))]
                rows = self.pull_rows(seeds, create_graph)
                turned = [None if s is None else s * 1j for s in seeds] if output.is_complex() else None
                yield index, where, rows, None if turned is None else self.pull_rows(turned, create_graph)

    def chunk(self, rows: int) -> int:
        """Return how many cotangents go into one batched pass."""
        # A pass fits a processor's cache or not; devices have room for more cotangents than that, and need them.
        on_processor = rows > 1 and self.domain.device.type == "cpu"
        return to_a_pass(rows, self.domain.dim + self.codomain.dim, self._passed_bytes if on_processor else 0)

    def column_chunk(self, leaf: int, create_graph: bool = False) -> int:
        """Return how many tangents of one leaf go into one batched pass."""
        columns = self.domain.sizes[leaf]
        if create_graph or self.domain.device.type != "cpu":
            return self.chunk(columns)
        return to_a_pass(columns, columns + self.codomain.dim, self._passed_bytes, MOST_COLUMNS)

    @cached_property
    def _passed_bytes(self) -> int:
        return passed_bytes(self.graph_info.nodes)


def _names(names: Names, tensors: Sequence[Tensor]) -> Sequence[str]:
    names = names() if callable(names) else names
    return [f"{names}[{i}]" for i in range(len(tensors))] if isinstance(names, str) else names
