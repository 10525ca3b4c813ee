"""`sparse.jacobian`: any operator as a sparse matrix, by few products."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .._keywords import keywords
from .._operators import LinearizedMap, Operator
from .._operators._finite_results import check_result
from .._progress import shows_progress
from .._requirements import check_choice, check_whole
from .._torch.protocol import Linearization
from .._words import Layout
from ..errors import InputError, NotDifferentiableError
from ._coloring import color
from ._compress import Assembly, Compression
from ._declared import check_declared
from ._matrix import csr
from ._probe import Prober
from .detect import traced
from .layouts import SparseJacobian, arranged, block_of
from .pattern import declared


@keywords()
@shows_progress()
def jacobian(
    operator: Operator,
    *,
    layout: Layout = "csr",
    certify: int = 1,
    pattern: Any = None,
    progress: bool | None = None,
) -> SparseJacobian:
    """Return an operator as a sparse matrix, by as many products as its colours.

    For a recorded Jacobian or Hessian (`jacobian`, `hessian`) the pattern at this point is detected; a Hessian needs
    fewer sweeps, since an entry may be read from its mirror. Any other operator needs `pattern=`. Random probes compare
    the matrix with the operator.

    Args:
        operator: The operator to form.
        layout: torch's `"csr"`, `"coo"` or `"bsr"`, or `"scipy"`.
        certify: Number of random probes; 5 give a useful `error_bound`, 0 none.
        pattern: Where entries may be nonzero: a scipy or torch sparse matrix, or a `Pattern`.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.

    Returns:
        The matrix with its error bound and sweeps; `output` is the function's where the operator was recorded.

    Raises:
        InputError: A pattern is missing, has another shape or lacks entries.
        NotDifferentiableError: The operator is no linear map.
        NonFiniteError: An entry is NaN or Inf.

    Example:
        >>> import jacops
        >>> J = jacops.jacobian(torch.nn.Conv1d(1, 1, 3, padding=1), torch.randn(1, 1, 100), wrt="inputs")
        >>> found = jacobian(J)
        >>> found.matrix.shape, found.sweeps
        (torch.Size([100, 100]), 4)
    """
    check_choice("layout", layout, Layout)
    check_whole("certify", certify, 0)
    dtypes: frozenset[torch.dtype] = frozenset()
    if pattern is not None:
        known = declared(pattern, operator.shape)
    elif isinstance(operator, LinearizedMap) and isinstance(operator.lin, Linearization):
        known, dtypes, _ = traced(operator.lin, None)
    else:
        todo = "Detection needs a recorded Jacobian or Hessian; pass a scipy or torch sparse matrix."
        raise InputError.of("pattern", "missing", f"a {type(operator).__name__} does not have one of its own", todo)
    matrix = csr(known.matrix + known.matrix.T).astype(bool) if operator.symmetric else known.matrix
    n = operator.domain.dim
    assembly = Assembly.of(matrix, color(matrix, symmetric=operator.symmetric), np.arange(n), n)
    compression = Compression(operator, assembly, Prober.of(operator, dtypes))
    found = compression.evaluate(certify)
    error = 0.0 if found.verdict is None else found.verdict.error
    if pattern is not None:
        found = compression.probed_by_rows(found)
        check_declared(compression, found)
    elif error > compression.prober.whole and not compression.is_rounding(error):
        raise NotDifferentiableError(
            f"sparse.jacobian: products with {operator!r} disagree by {error:.1e} with each other. A backward "
            "pass is random or not linear, or the result is smaller than the rounding errors of this dtype; use "
            "float64 then."
        )
    check_result(operator, found.values, "the matrix")
    block = block_of(operator.codomain), block_of(operator.domain)
    result = arranged(assembly, found, layout, block)
    return SparseJacobian(result, getattr(operator, "output", None), found.bound, found.sweeps)
