"""The sketch behind XTrace and XDiag: a low-rank part with every probe left out once (Epperly, Tropp, Webber, 2024).

Probes are sketched, `Y = A Ω = Q R`. Leaving probe `i` out of the sketch takes one direction out of `Q`, namely
`Q s_i`, where `s_i` is orthogonal to the columns of `R` but the i-th. So each probe can test the sketch of the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._operators import Operator
from ._probes import product


class ProbeSketch(NamedTuple):
    """Probes, a basis of their images, and the directions that only one image brings in; all in float64.

    Attributes:
        basis: Q, (n, r).
        upper: R, (r, k).
        left_out: The directions s_i as columns, (k, k); None where the images are linearly dependent up to rounding,
            so that the basis holds the whole range of the operator.
        floor: What rounding amounts to in a product.
    """

    basis: Tensor
    upper: Tensor
    left_out: Tensor | None
    floor: float


def sketched(operator: Operator, probes: Tensor) -> ProbeSketch:
    """Return the sketch of an operator by probes, one to a row."""
    basis, upper = torch.linalg.qr(product(operator, probes).double().mT)
    left, sizes, _ = torch.linalg.svd(upper)
    # Some rounding errors of the largest: smaller ones do not count to the rank.
    floor = 10 * torch.finfo(operator.codomain.dtype).eps * float(sizes[0])
    rank = int((sizes > floor).sum())
    if rank < probes.shape[0]:
        return ProbeSketch(basis @ left[:, :rank], left[:, :rank].mT @ upper, None, floor)
    inverse = torch.linalg.solve_triangular(upper.mT, torch.eye(rank).to(upper), upper=False)
    return ProbeSketch(basis, upper, inverse / torch.linalg.vector_norm(inverse, dim=0), floor)
