"""The sparse engine on every awkward model: the same numbers as the dense operator, or the same refusal."""

import warnings

import pytest
import torch

import jacops
import zoo


@pytest.mark.parametrize("name", [c.name for c in zoo.ZOO if c.dtype is torch.float64])
def test_sparse_is_dense_on_every_model(name: str) -> None:
    case = zoo.BY_NAME[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jacops.JacopsWarning)
        try:
            with zoo.seeded():
                dense = jacops.jacobian(case.model(), case.x(), allow_zero=True).dense()
        except jacops.JacopsError as refusal:
            with pytest.raises(type(refusal)):
                jacops.sparse.jacobian(jacops.jacobian(case.model(), case.x(), allow_zero=True))
            return
        with zoo.seeded():
            found = jacops.sparse.jacobian(jacops.jacobian(case.model(), case.x(), allow_zero=True), layout="scipy")
    torch.testing.assert_close(torch.from_numpy(found.matrix.toarray()), dense, atol=1e-9, rtol=1e-9)
