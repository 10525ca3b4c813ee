"""Every model of the zoo through curvature, sample gradients and influence: the right value, or a typed error."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import jacops
import oracle
import zoo
from jacops._trees import flatten
from jacops.errors import JacopsError
from oracle import leaves, mapped
from zoo import BY_NAME, ZOO, Case

NAMES = [case.name for case in ZOO]


def close(actual: Tensor, expected: Tensor, case: Case, where: str) -> None:
    assert actual.shape == expected.shape, f"{where}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((actual.double() - expected).abs().max()) if expected.numel() else 0.0
    assert error <= 10 * case.tolerance * (scale or 1.0), f"{where}: off by {error:.1e} of {scale:.1e}"


def quiet(call: Any) -> Any:
    """Run with the zoo's seed; the warnings of slow routes are other tests' matter."""
    with warnings.catch_warnings(), zoo.seeded():
        warnings.simplefilter("ignore")
        return call()


@pytest.mark.parametrize("name", NAMES)
def test_products_with_the_hessian_and_the_gauss_newton_matrix(name: str):
    case = BY_NAME[name]
    if "hessian" in case.expect:
        with pytest.raises(JacopsError):
            quiet(lambda: jacops.hessian(case.model(), case.loss, case.x(), case.y()).dense())
        return
    whole = quiet(lambda: oracle.second_derivatives(case.model(), case.loss, case.x(), case.y(), case.copy)[0])
    H = quiet(lambda: jacops.hessian(case.model(), case.loss, case.x(), case.y()))  # noqa: N806
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(H.domain.dtype)
    P = H.shape[0]  # noqa: N806
    if whole.shape == (P, P):
        close(quiet(lambda: H @ v), whole @ v.double(), case, "H v")
        close(quiet(lambda: H.dense()), whole, case, "H")
    blocks = quiet(lambda: oracle.parameter_jacobian(case.model(), case.x(), case.copy, case.by_backward))
    output = case.output()
    rows = [
        torch.cat([b.reshape(o.numel(), -1) for b in line], 1) for line, o in zip(blocks, leaves(output), strict=True)
    ]
    J = torch.cat(rows)  # noqa: N806
    if J.shape[1] != P:
        return
    parts, tree = flatten(output, "output")
    places = [part.detach().double().clone().requires_grad_() for part in parts]
    with zoo.seeded():
        inner = _hessian_by_output(case.loss(tree.build(places), case.y().double()), places)
    G = quiet(lambda: jacops.ggn(case.model(), case.loss, case.x(), case.y()))  # noqa: N806
    close(quiet(lambda: G @ v), J.T @ (inner @ (J @ v.double())), case, "G v")
    close(quiet(lambda: G.dense()), J.T @ inner @ J, case, "G")


def _hessian_by_output(value: Tensor, places: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(value, places, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [
        torch.autograd.grad(entry, places, retain_graph=True, materialize_grads=True)
        if entry.requires_grad
        else [torch.zeros_like(p) for p in places]
        for entry in flat
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def outcome(call: Any) -> tuple[Any, str]:
    """The answer, or the message of the typed error in its place."""
    try:
        return quiet(call), ""
    except JacopsError as error:
        return None, str(error) or type(error).__name__


def sliced(case: Case) -> tuple[Any, Tensor, int] | None:
    """Inputs and targets with one leading axis; None where they have none."""
    x, y = case.x(), case.y()
    arrays = [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in [*arrays, y]}
    return None if len(lengths) != 1 or None in lengths or not arrays else (x, y, y.shape[0])


@pytest.mark.parametrize("name", NAMES)
def test_sample_gradients_and_influences(name: str):
    case = BY_NAME[name]
    found = sliced(case)
    if found is None:
        pytest.skip("inputs and targets share no axis of samples")
    x, y, many = found
    rows, refusal = outcome(lambda: jacops.sample_gradients(case.model(), case.loss, x, y).dense())
    if refusal:
        assert "grad" in case.expect or case.mode != "eval" or _alone_fails(case, x, y), f"refused: {refusal}"
        return
    expected = []
    for i in range(many):
        one = mapped(lambda t, i=i: t[i : i + 1] if isinstance(t, Tensor) else t, x)
        gradient = quiet(
            lambda one=one, i=i: oracle.gradient(
                case.model(), case.loss, one, y[i : i + 1], case.copy, case.by_backward
            )
        )
        expected.append(gradient)
    trained = [p.requires_grad for p in case.model().parameters() for _ in range(p.numel())]
    G = torch.stack(expected)  # noqa: N806
    G = G[:, torch.tensor(trained)] if G.shape[1] == len(trained) else G  # noqa: N806
    if rows.shape[1] != G.shape[1]:
        pytest.skip("other parameters than the oracle's")
    close(rows, G, case, "sample gradients")
    wrapped = jacops.TorchTwiceDifferentiable(case.model(), case.loss)
    options = {"curvature": "empirical_fisher", "damping": 1.0}
    actual, refusal = outcome(lambda: jacops.compute_influences(wrapped, [(x, y)], **options))
    if refusal:
        low = case.dtype == torch.float16 and "solves need float32" in refusal
        assert low or _not_a_mean(case, x, y) or "grad" in case.expect, f"refused: {refusal}"
        return
    terms = y.numel() / many  # the loss is a mean over entries, of which a row has so many
    matrix = terms * G.T @ G / many + torch.eye(G.shape[1]).double()
    close(actual.values, G @ torch.linalg.solve(matrix, G.T), case, "influences")


def _alone_fails(case: Case, x: Any, y: Tensor) -> bool:
    """Whether the model takes no batch of one."""
    one = mapped(lambda t: t[:1] if isinstance(t, Tensor) else t, x)
    try:
        quiet(lambda: oracle.gradient(case.model(), case.loss, one, y[:1], case.copy, case.by_backward))
    except Exception:  # whatever the model says
        return True
    return False


def _not_a_mean(case: Case, x: Any, y: Tensor) -> bool:
    """Whether the loss of the batch is another number than the mean of its rows' own, because samples mix."""
    with torch.no_grad():
        whole = float(quiet(lambda: case.loss(oracle.called(case.model(), x), y)))
        alone = []
        for i in range(y.shape[0]):
            one = mapped(lambda t, i=i: t[i : i + 1] if isinstance(t, Tensor) else t, x)
            alone.append(float(quiet(lambda one=one, i=i: case.loss(oracle.called(case.model(), one), y[i : i + 1]))))
    return abs(whole - sum(alone) / len(alone)) > 1e-4 * max(abs(whole), 1e-12)
