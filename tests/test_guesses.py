"""What users of torch, NumPy and SciPy try first: it has the value that they expect, or an error says what to write."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch.nn.functional import cross_entropy

import jacops
from jacops.errors import InputTypeError, JacopsError
from small import draw


def apply(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return x @ params["weight"].T + params["bias"]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Return what the guesses are written with; `right` holds matrices by plain autograd."""
    torch.manual_seed(0)
    net, x, y = torch.nn.Linear(3, 2).double(), draw(6, 3), torch.arange(6) % 2
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return cross_entropy(x @ flat[:6].view(2, 3).T + flat[6:], y)

    flat = torch.cat([params["weight"].flatten(), params["bias"]])
    hessian: Any = torch.autograd.functional.hessian(loss, flat)
    model = jacops.TorchTwiceDifferentiable(net, cross_entropy)
    return {
        **{"torch": torch, "np": np, "sl": scipy.sparse.linalg, "jacops": jacops, "eye": torch.eye(8).double()},
        **{"net": net, "x": x, "y": y, "P": params, "apply": apply, "loss": cross_entropy, "v": draw(8, seed=1)},
        "H": jacops.hessian(net, cross_entropy, x, y),
        "I": jacops.compute_influences(model, [(x, y)], curvature="ggn", damping=0.1),
        "right": SimpleNamespace(H=hessian, J=params["weight"].expand(6, 2, 3)),
    }


VALUES = {
    "H @ v": "right.H @ v",
    "v @ H": "right.H @ v",
    "H @ eye": "right.H",
    "H.T @ v": "right.H @ v",
    "(2 * H) @ v": "2 * right.H @ v",
    "(H / 2) @ v": "right.H @ v / 2",
    "(H @ H) @ v": "right.H @ (right.H @ v)",
    "(H - H) @ v": "0 * v",
    "(H + 0.1 * eye) @ v": "right.H @ v + 0.1 * v",
    "(H + 0.1 * jacops.linalg.eye).dense()": "right.H + 0.1 * eye",
    "H.T.dense()": "right.H",
    "torch.tensor(H.shape)": "torch.tensor([8, 8])",
    "torch.zeros(1, dtype=H.dtype, device=H.device)": "torch.zeros(1).double()",
    "torch.tensor(bool(H))": "torch.tensor(True)",
    "torch.tensor(hasattr(H, 'numpy') or hasattr(H, 'cpu'))": "torch.tensor(False)",
    "torch.tensor(float(jacops.linalg.trace(H))).double()": "right.H.trace()",
    "jacops.linalg.diagonal(H)": "right.H.diagonal()",
    "torch.as_tensor(H.to_scipy() @ v.numpy())": "right.H @ v",
    "torch.as_tensor(sl.eigsh(H.to_scipy(), k=1)[0])": "torch.linalg.eigvalsh(right.H)[-1:]",
    "jacops.solve(H, v, damping=0.1).x[0]": "torch.linalg.solve(right.H + 0.1 * eye, v)",
    "jacops.inverse(H, damping=0.1) @ v": "torch.linalg.solve(right.H + 0.1 * eye, v)",
    "torch.as_tensor(np.asarray(I)).sum(1)": "torch.as_tensor(I).sum(1)",
    "jacops.compute_jacobian(net, x)": "right.J",
    "jacops.compute_jacobian(net, x, target=y)": "right.J[:, 0] * (1 - y[:, None]) + right.J[:, 1] * y[:, None]",
    "jacops.compute_jacobian(net, x, outputs=0)": "right.J[:, 0]",
    "jacops.hessian(jacops.Function(apply, P), loss, x, y).dense()": "right.H",
}
ADVICE = {
    "H[0]": "`A.dense()`",
    "H[:2, :2]": "`u @ A`",
    "len(H)": "`A.shape[0]`",
    "list(H)": "Iterate over the rows of `A.dense()`",
    "torch.as_tensor(H)": "`A.dense()` for a tensor",
    "np.asarray(H)": "`.dense()`",
    "H.numpy()": "`A.dense().numpy()`",
    "H.toarray()": "`A.dense()`",
    "H.size()": "`A.shape`",
    "H.t()": "`A.T`",
    "H.mv(v)": "`A @ v`",
    "H.cpu()": "where its model and data are",
    "H * v": "`A @ B`",
    "v * H": "`jacops.linalg.Diagonal(v) @ A`",
    "H * H": "`A @ B`",
    "H ** 2": "`A @ A`",
    "H + 1": "`A + 0.1 * jacops.linalg.eye`",
    "H @ v.numpy()": "torch.as_tensor",
    "H.inverse()": "`jacops.inverse(A, damping=...)`",
    "H.solve(v)": "`jacops.solve(A, b, damping=...)`",
    "H.trace()": "`jacops.linalg.trace(A)`",
    "H.diag()": "`jacops.linalg.diagonal(A)`",
    "H.eigvals()": "`jacops.linalg.eigenpairs(A)`",
    "H.norm()": "`jacops.linalg.norm(A)`",
    "H.logdet()": "`jacops.linalg.logdet(A)`",
    "torch.linalg.inv(H)": "`jacops.inverse(A, damping=...)`",
    "torch.linalg.eigvalsh(H)": "`torch.linalg.eigvalsh(A.dense())`",
    "torch.matmul(H, v)": "`A @ v`",
    "torch.allclose(H, eye)": "`A.dense()`",
    "sl.aslinearoperator(H)": "`A.to_scipy()`",
    "jacops.linalg.eye(8)": "`A + 0.1 * eye`",
    "jacops.jacobian(apply, (P, x))": "`jacops.Function(f, params)`",
    "jacops.modjac(apply, (P, x))": "`jacops.Function(f, params)`",
    "jacops.hessian(net, 'cross_entropy', x, y)": "a callable `loss(output, y)`",
    "jacops.compute_jacobian(x, net)": "`model`",
    "jacops.compute_jacobian(net, x, chunksize=3)": "batch_size",
    "jacops.solve(H.dense(), v)": "operator",
}


@pytest.mark.parametrize("code", VALUES)
def test_a_guess_has_the_value_expected(code: str, names: dict[str, Any]) -> None:
    torch.testing.assert_close(eval(code, dict(names)), eval(VALUES[code], dict(names)))


@pytest.mark.parametrize("code", ADVICE)
def test_a_guess_is_answered_by_what_to_write(code: str, names: dict[str, Any]) -> None:
    with pytest.raises(JacopsError) as caught:
        eval(code, dict(names))
    assert isinstance(caught.value, InputTypeError)
    assert ADVICE[code] in str(caught.value)


def test_a_property_that_fails_says_why(names: dict[str, Any]) -> None:
    class Broken(jacops.linalg.Operator):
        @property
        def domain(self) -> Any:
            return self.space  # pyright: ignore[reportAttributeAccessIssue]

        codomain = domain  # pyright: ignore[reportIncompatibleMethodOverride]

        def _apply(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

        _apply_transpose = _apply

    with pytest.raises(AttributeError, match="no attribute 'space'"):
        _ = Broken().shape
