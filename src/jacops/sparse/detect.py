"""Detection: which output depends on which input, from one traced backward pass.

Tracing the backward pass and not the forward one gives the pattern in autograd's own convention: for LieTensors, whose
stored numbers are not what their gradients count, and for every custom Function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .._keywords import keywords
from .._picks import Picks, Wrt, variable
from .._runtime.attention import math_attention
from .._runtime.contexts import private_noise
from .._runtime.restoring import restoring
from .._runtime.rows import plain
from .._torch.protocol import Linearization
from .._trees import Selector
from ..errors import MemoryBudgetError
from ._matrix import csr
from ._point import record_point
from ._pool import Array, Pool
from ._routes import rule_of
from ._taint import Taint
from ._trace import CannotFollowError, Escapes, Tracer
from .pattern import Pattern

_WIDEST = 12  # entries of a block of outputs whose sets are masks: wider rows of residuals are rare
_MOST = 2**27  # entries of a pattern; beyond, it is as good as dense


@keywords()
@restoring
def detect_pattern(
    model: nn.Module,
    inputs: Any,
    *,
    wrt: Wrt = "parameters",
    parameters: Picks = None,
    outputs: Selector = None,
    local: bool = False,
) -> Pattern:
    """Return the sparsity pattern of the Jacobian of a model, without computing it.

    One forward and one backward pass are run, with index sets following the backward one. The pattern never lacks a
    nonzero entry. Operations without a rule count as dense and are named in the result.

    Args:
        model: A module.
        inputs: Its input, as in `jacobian`.
        wrt: `"parameters"` or `"inputs"`.
        parameters: Which parameters, as in `jacobian`.
        outputs: Part of the output, as in `jacobian`.
        local: Leave out what is zero at this very point (a ReLU that is off); the pattern then holds here only.

    Returns:
        Rows are entries of the output, columns entries of what it is differentiated by, as they are stored.

    Raises:
        NotDifferentiableError: No path leads from the output to what it is differentiated by.
        MemoryBudgetError: The pattern would have more than 134 million entries.

    Example:
        >>> model = torch.nn.Conv1d(1, 1, 3, padding=1)
        >>> detect_pattern(model, torch.randn(1, 1, 5), wrt="inputs").nnz
        13
    """
    by = variable(model, wrt, parameters)
    point = record_point(model, inputs, "detect_pattern", by, outputs, lift=False, watch=not local)
    return traced(point.lin, point.taint).pattern


@dataclass(frozen=True)
class Traced:
    """Index sets that arrived at the leaves of a linearization.

    Attributes:
        pool: Where the sets are.
        ids: One array of ids per leaf, in its shape.
        unknown: Operations without a rule.
        dtypes: Of the floating-point numbers that carried sets.
        here_only: Whether they depend on indices or conditions that may be others elsewhere.
    """

    pool: Pool
    ids: list[Array]
    unknown: dict[str, int]
    dtypes: frozenset[torch.dtype]
    here_only: bool


@restoring
def trace(lin: Linearization, members: Array, size: int, taint: Taint | None) -> Traced:
    """Send sets through one backward pass: entry i of the flat output starts as `{members[i]}`.

    Raises:
        CannotFollowError: Values leave for Python or NumPy on the way, or have a layout without storage.
    """
    pool = Pool(size, _blocks(lin) if size == lin.codomain.dim else None)
    tracer = Tracer(pool, taint, rule_of)
    seeds = [_cotangent(o, i) for i, o in enumerate(lin.outputs)]
    starts = torch.from_numpy(pool.singletons(members))
    for seed, where in zip(seeds, lin.codomain.slices, strict=True):
        tracer.write(seed, starts[where].reshape(seed.shape))
    with math_attention(), Escapes(tracer).around(lin.graph_info.nodes), tracer:
        grads = lin.pull(list(seeds))
    ids: list[Array] = []
    for grad, shape in zip(grads, lin.domain.shapes, strict=True):
        found = np.zeros(shape, np.int64) if grad is None else tracer.array(plain(grad))
        nonzero = None if grad is None else ((plain(grad) != 0) & plain(grad).isfinite()).cpu().numpy()
        if nonzero is not None and (nonzero & (found == 0)).any():  # where nothing should have reached it
            raise CannotFollowError("a backward pass that leaves torch")
        ids.append(found)
    return Traced(pool, ids, tracer.unknown, frozenset(tracer.dtypes), tracer.holds_here_only)


def _blocks(lin: Linearization) -> Array:
    """Return where blocks of the flat output begin: its last axes, where these are short, else every entry."""
    parts = [np.zeros(0, np.int64)]
    for shape, where in zip(lin.codomain.shapes, lin.codomain.slices, strict=True):
        wide = shape[-1] if shape and 0 < shape[-1] <= _WIDEST else 1
        parts.append(np.arange(where.start, where.stop, wide))
    return np.concatenate(parts)


def _cotangent(output: Tensor, seed: int) -> Tensor:
    """Return random numbers of size one or more: nothing cancels or falls below the smallest number by accident."""
    noise = private_noise(plain(output.detach()), seed)
    return (noise + torch.where(noise < 0, -1.0, 1.0).to(noise.dtype)).contiguous()


class Seen(NamedTuple):
    """What one traced backward pass shows.

    Attributes:
        pattern: Where the Jacobian may be nonzero.
        dtypes: Of all floating-point numbers on the way.
        here_only: Whether the pattern depends on indices made of values at this point.
    """

    pattern: Pattern
    dtypes: frozenset[torch.dtype]
    here_only: bool


def traced(lin: Linearization, taint: Taint | None) -> Seen:
    """Return what is seen of a linearization.

    Raises:
        MemoryBudgetError: The pattern is too full to be held.
    """
    m, ends = lin.codomain.dim, frozenset((*lin.domain.dtypes, *lin.codomain.dtypes))
    try:
        found = trace(lin, np.arange(m), m, taint)
    except CannotFollowError as reason:
        unknown = {str(reason): 1}
        _check_size(lin, lin.domain.dim * m, unknown)
        return Seen(Pattern(csr(np.ones((m, lin.domain.dim), bool)), taint is None, unknown), ends, True)
    flat = np.concatenate([np.zeros(0, np.int64), *(part.ravel() for part in found.ids)])
    _check_size(lin, int(found.pool.sizes(flat).sum()), found.unknown)
    pattern = Pattern(csr(found.pool.matrix(flat).T), taint is None, found.unknown)
    return Seen(pattern, ends | found.dtypes, found.here_only)


def _check_size(lin: Linearization, entries: int, unknown: dict[str, int]) -> None:
    if entries > _MOST:
        names = f" Operations without a rule count as dense: {', '.join(unknown)}." if unknown else ""
        raise MemoryBudgetError(
            f"{lin.call}: the pattern of {lin.codomain.dim} × {lin.domain.dim} would have {entries} entries.{names} "
            "Pass `pattern=` if it is known to be sparse, or use products (`jacobian(...) @ v`)."
        )
