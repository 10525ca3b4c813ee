"""Detection: which output depends on which input, from one traced backward pass.

Tracing the backward pass and not the forward one gives the pattern in autograd's own convention: for LieTensors, whose
stored numbers are not what their gradients count, and for every custom Function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._keywords import keywords
from .._picks import Picks, Wrt, variable
from .._runtime.contexts import math_attention, private_noise
from .._runtime.restoring import restoring
from .._runtime.rows import plain
from .._torch.protocol import Linearization
from .._trees import Selector
from ..errors import MemoryBudgetError
from ._matrix import Csr, csr
from ._point import record_point
from ._pool import Array, Pool
from ._routes import rule_of
from ._taint import Taint
from ._trace import CannotFollowError, Escapes, Tracer
from .pattern import Pattern

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
    """Return where the Jacobian of a model may be nonzero, without computing it.

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
    point = record_point(
        model, inputs, "detect_pattern", variable(model, wrt, parameters), outputs, lift=False, watch=not local
    )
    seen = traced(point.lin, point.taint)
    return Pattern(seen.matrix, local, seen.unknown)


@dataclass(frozen=True)
class Traced:
    """Index sets that arrived at the leaves of a linearization.

    Attributes:
        pool: Where the sets are.
        ids: One array of ids per leaf, in its shape; None where nothing arrived.
        unknown: Operations without a rule.
        dtypes: Of the floating-point numbers that carried sets.
    """

    pool: Pool
    ids: list[Array | None]
    unknown: dict[str, int]
    dtypes: frozenset[torch.dtype]


@restoring
def trace(lin: Linearization, members: Array, size: int, taint: Taint | None) -> Traced:
    """Send sets through one backward pass: entry i of the flat output starts as `{members[i]}`.

    Raises:
        CannotFollowError: Values leave for Python or NumPy on the way, or have a layout without storage.
    """
    pool = Pool(size)
    tracer = Tracer(pool, taint, rule_of)
    seeds = [_cotangent(o, i) for i, o in enumerate(lin.outputs)]
    starts = torch.from_numpy(pool.singletons(members))
    for seed, where in zip(seeds, lin.codomain.slices, strict=True):
        tracer.write(seed, starts[where].reshape(seed.shape))
    with math_attention(), Escapes(tracer).around(lin.graph_info.nodes), tracer:
        grads = lin.pull(list(seeds))
    ids: list[Array | None] = []
    for grad in grads:
        found = None if grad is None else tracer.read(plain(grad))
        ids.append(None if found is None else found.contiguous().numpy())
        if grad is not None and _has_hole(plain(grad.detach()), ids[-1]):
            raise CannotFollowError("a backward pass that leaves torch")
    return Traced(pool, ids, tracer.unknown, frozenset(tracer.dtypes))


def _has_hole(grad: Tensor, ids: Array | None) -> bool:
    """Say whether a gradient is nonzero where nothing should have reached it."""
    nonzero = ((grad != 0) & grad.isfinite()).cpu().numpy()
    return bool(nonzero.any() if ids is None else (nonzero & (ids == 0)).any())


def _cotangent(output: Tensor, seed: int) -> Tensor:
    """Return random numbers of size one or more: nothing cancels or falls below the smallest number by accident."""
    noise = private_noise(plain(output.detach()), seed)
    return (noise + torch.where(noise < 0, -1.0, 1.0).to(noise.dtype)).contiguous()


@dataclass(frozen=True, eq=False)
class Detected:
    """A pattern as it was traced.

    Attributes:
        matrix: Rows are entries of the output, columns entries of the leaves.
        unknown: Operations without a rule.
        dtypes: Of all floating-point numbers on the way.
    """

    matrix: Csr
    unknown: dict[str, int]
    dtypes: frozenset[torch.dtype]


def traced(lin: Linearization, taint: Taint | None) -> Detected:
    """Return the pattern of a linearization.

    Raises:
        MemoryBudgetError: It is too full to be held.
    """
    m, ends = lin.codomain.dim, frozenset((*lin.domain.dtypes, *lin.codomain.dtypes))
    try:
        found = trace(lin, np.arange(m), m, taint)
    except CannotFollowError as reason:
        _check_size(lin, lin.domain.dim * m, {str(reason): 1})
        return Detected(csr(np.ones((m, lin.domain.dim), bool)), {str(reason): 1}, ends)
    ids = [
        np.zeros(size, np.int64) if part is None else part.ravel()
        for part, size in zip(found.ids, lin.domain.sizes, strict=True)
    ]
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int64)
    _check_size(lin, int(found.pool.sizes(flat).sum()), found.unknown)
    return Detected(csr(found.pool.matrix(flat).T), found.unknown, ends | found.dtypes)


def _check_size(lin: Linearization, entries: int, unknown: dict[str, int]) -> None:
    if entries > _MOST:
        names = f" Operations without a rule count as dense: {', '.join(unknown)}." if unknown else ""
        raise MemoryBudgetError(
            f"{lin.call}: the pattern of {lin.codomain.dim} × {lin.domain.dim} would have {entries} entries.{names} "
            "Pass `pattern=` where you know it to be sparse, or use products (`jacobian(...) @ v`)."
        )
