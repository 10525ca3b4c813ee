"""Results on disk: what was saved is loaded bit by bit, a damaged or foreign file is reported, nothing is executed."""

import dataclasses
import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops._extras.report import Report
from jacops._saving import Savable, load, saved_fields
from jacops.errors import DataError, InputError, InputTypeError
from jacops.linalg import Diagonal, Estimate, Identity, Matrix, eye
from jacops.results import Contributions, Influences, LeastSquaresResult, Solution
from jacops.solvers import EKFAC
from small import draw, refused, small_net

X, Y = draw(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
DATA = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_dense() if type(tensor) is Tensor else tensor.as_subclass(Tensor)  # one of PyPose's


def same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, of the same kinds."""
    if isinstance(a, str) and isinstance(b, str):  # a member of a StrEnum comes back as its text
        assert a == b, where
        return
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape, a.layout) == (b.dtype, b.shape, b.layout), where
        torch.testing.assert_close(plain(a), plain(b), rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, sp.csr_array):
        same(a.toarray(), b.toarray(), where)
    elif isinstance(a, Savable):
        for field in saved_fields(type(a)):
            same(getattr(a, field.name), getattr(b, field.name), f"{where}.{field.name}")
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            same(one, other, f"{where}[{number}]")
    else:
        assert a == b or (a != a and b != b), where


def wrapped() -> Any:
    return jacops.TorchTwiceDifferentiable(small_net(), F.cross_entropy)


def problem(**options: Any) -> jacops.Problem:
    return jacops.Problem(small_net(), F.cross_entropy, DATA, **options)


class Chain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[1:] - x[:-1] ** 2


def sparse(layout: Any) -> Any:
    return jacops.sparse_plan(Chain(), draw(30), wrt="inputs").evaluate(Chain(), draw(30), layout=layout)


def relu_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def odd_keys() -> dict[Any, Any]:
    return {"a": math.inf, 3: None, (1, "b"): -math.inf}


RESULTS: dict[str, Callable[[], Any]] = {
    **{
        f"influences by {solver}": lambda solver=solver: jacops.compute_influences(
            wrapped(), DATA, solver=solver, curvature="ggn", damping=0.1
        )
        for solver in ("direct", "cg", "minres", "ekfac", "nystrom", "arnoldi")
    },
    "influences, perturbation": lambda: jacops.compute_influences(
        wrapped(), DATA, influence_type="perturbation", curvature="ggn", damping=0.1
    ),
    "influences, leverage": lambda: jacops.compute_influences(
        wrapped(), DATA, curvature="ggn", damping=0.1, leverage=True
    ),
    "influence factors": lambda: jacops.compute_influence_factors(wrapped(), DATA, DATA, curvature="ggn", damping=0.1),
    "contributions": lambda: jacops.contributions(relu_net(), X),
    "eigenpairs": lambda: jacops.linalg.eigenpairs(problem().ggn(), 3),
    "density": lambda: jacops.linalg.spectral_density(problem().ggn(), probes=3),
    "estimate": lambda: jacops.linalg.trace(problem().ggn(), probes=4),
    "diagonal": lambda: jacops.linalg.diagonal(problem().ggn(), probes=4),
    "norm": lambda: jacops.linalg.spectral_norm(problem().ggn()),
    "solution": lambda: jacops.solve(problem().ggn() + 0.1 * eye, draw(2, 26)),
    "a failed solution": lambda: jacops.solve(
        -1.0 * problem().ggn() - 0.1 * eye, draw(2, 26), "cg", on_failure="return"
    ),
    "fit, dense": lambda: jacops.gauss_newton(lambda x: x**2 - torch.tensor([1.0, 3.0]), params=torch.ones(2)),
    "fit, module": lambda: jacops.levenberg_marquardt(small_net(), X, draw(6, 2), max_steps=3, on_failure="return"),
    "fit, list": lambda: jacops.gauss_newton(
        lambda a, b: torch.stack([a - 1.0, b - 2.0, a + b]), params=[torch.ones(()), torch.zeros(())]
    ),
    "EK-FAC": lambda: EKFAC().approximate(problem(l2=0.1).ggn()),
    "plan": lambda: jacops.plan(jacops.compute_jacobian, small_net(), X),
    "check": lambda: jacops.check(small_net(), X),
    "projection": lambda: jacops.results.Projection(draw(2, 3), draw(3)),
    **{f"sparse, {layout}": lambda layout=layout: sparse(layout) for layout in ("scipy", "csr", "coo", "bsr")},
    "matrix": lambda: 2 * Matrix(draw(3, 3)) + Diagonal(draw(3)) - 0.5 * eye,
    "complex matrix": lambda: Matrix(torch.complex(draw(3, 3), draw(3, 3, seed=1)).mH),
    "identity": lambda: Identity(problem().ggn().domain),
    "solution, half": lambda: Solution(draw(2, 3).bfloat16(), ("converged",), draw(2), (1, 2), 0.0, "none", {}),
    "empty": lambda: Solution(torch.empty(0, 3), (), torch.empty(0), (), math.nan, "", odd_keys()),
    "scalars": lambda: Solution(
        torch.tensor(3),
        (),
        torch.empty(0),
        (),
        0.5,
        "ü",
        {"b": True, "s": slice(1, None), "n": np.float64(2), "t": F64},
    ),
}
F64 = torch.float64


@pytest.mark.parametrize("name", RESULTS)
def test_what_was_saved_comes_back(name: str, tmp_path: Path):
    result = RESULTS[name]()
    path = tmp_path / "result.safetensors"
    result.save(path)
    for found in (jacops.load(path), type(result).load(str(path))):
        if name == "scalars":
            result.info["n"] = 2.0
        same(result, found)
        assert repr(found) == repr(result)
    assert os.listdir(tmp_path) == [path.name], "something was left behind"


def test_a_loaded_fit_still_has_its_covariance(tmp_path: Path):
    for number, name in enumerate(("fit, dense", "fit, list")):
        fit = RESULTS[name]()
        fit.save(tmp_path / str(number))
        found = LeastSquaresResult.load(tmp_path / str(number))
        np.testing.assert_array_equal(found.covariance(absolute=True), fit.covariance(absolute=True))
        assert found.success == fit.success
        assert str(found) == str(fit)


def test_lie_tensors_keep_their_group(tmp_path: Path):
    pp = pytest.importorskip("pypose")
    pose = pp.randn_SE3(2).double()
    result = Solution(pose, ("converged",) * 2, draw(2), (1, 1), 0.0, "none", {"algebra": pose.Log()})
    result.save(tmp_path / "f")
    found = jacops.load(tmp_path / "f")
    assert (found.x.ltype, found.info["algebra"].ltype) == (pose.ltype, pose.Log().ltype)
    same(found, result)


def test_fitted_factors_solve_again_without_data(tmp_path: Path):
    A, b = problem().ggn(), draw(2, 26)
    prepared = EKFAC().prepare(A, 0.1)
    prepared.curvature.save(tmp_path / "factors")
    factors = jacops.load(tmp_path / "factors")
    expected = prepared.solve(b).x
    A.problem.data.loader = []  # not read again
    again = EKFAC(factors=factors, report_residual=False).prepare(A, 0.1)
    assert torch.equal(again.solve(b).x, expected)
    assert torch.equal(factors.inverse(0.1) @ b[0], prepared.curvature.inverse(0.1) @ b[0])
    refused(
        InputError,
        lambda: EKFAC(factors=factors).prepare(jacops.Problem(nn.Linear(3, 2).double(), F.cross_entropy, DATA).ggn()),
        "factors",
    )


def test_tensors_have_the_names_of_the_fields(tmp_path: Path):
    result = RESULTS["influences, leverage"]()
    result.save(tmp_path / "f")
    found = safetensors.torch.load_file(tmp_path / "f")
    assert torch.equal(found["values"], result.values)
    assert torch.equal(found["info.leverage"], result.info["leverage"])


def test_a_plan_is_read_by_the_same_call(tmp_path: Path):
    plan = jacops.sparse_plan(Chain(), draw(30), wrt="inputs")
    plan.save(tmp_path / "plan.npz")
    found = jacops.load(tmp_path / "plan.npz")
    assert (type(found), found.shape, found.sweeps) == (type(plan), plan.shape, plan.sweeps)


def written_plan(path: Path, columns: int) -> None:
    jacops.sparse_plan(nn.Linear(columns, 2), draw(6, columns).float()).save(path)


WRITERS: dict[str, tuple[Callable[[Path, int], Any], tuple[Any, str]]] = {  # writes a number to a path; what by
    "result": (lambda path, number: Estimate(float(number), 0.5).save(path), (safetensors.torch, "save_file")),
    "plan": (written_plan, (np, "savez_compressed")),
    "report": (lambda path, number: Report(f"number {number}").write(path), (Path, "write_text")),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_replaced_whole_or_not_at_all(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write, written_by = WRITERS[kind]
    path = tmp_path / "f"
    write(path, 1)
    write(path, 2)
    second = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for place, call in (written_by, (os, "replace"), (os, "fsync")):
        with monkeypatch.context() as patched:
            patched.setattr(place, call, full)
            refused(OSError, lambda: write(path, 1), "No space")
        assert path.read_bytes() == second
        assert os.listdir(tmp_path) == ["f"]
    write(path, 1)
    assert path.read_bytes() != second


def test_saved_tensors_are_those_of_the_moment(tmp_path: Path):
    whole = draw(4, 6)
    views = Matrix(whole[::2, ::3].mT.requires_grad_())
    views.save(tmp_path / "f")
    found = jacops.load(tmp_path / "f")
    assert torch.equal(found.matrix, whole[::2, ::3].mT)
    assert not found.matrix.requires_grad
    Matrix(draw(2, 2)).save(tmp_path / "f")  # a file that was read may be replaced
    assert torch.equal(found.matrix, whole[::2, ::3].mT)


# ---- what is refused ---------------------------------------------------------------------------------------------


class Mine(Matrix.__base__):  # type: ignore[name-defined, misc]
    pass


def test_what_cannot_be_saved_is_named(tmp_path: Path):
    path = tmp_path / "f"
    rests_on_a_model = jacops.ggn(small_net(), F.cross_entropy, X, Y)
    refused(InputTypeError, lambda: (2 * rests_on_a_model).save(path), "of.")
    refused(InputTypeError, lambda: problem().ggn().save(path), "parts")
    for value in (small_net(), lambda: 1, np.array(["a"]), {1, 2}):
        result = Influences(draw(2, 2), "up", "", "", 0.1, {"odd": {"one": value}})
        refused(InputTypeError, lambda it=result: it.save(path), "info.odd.one")
    assert not os.listdir(tmp_path)


def test_a_type_of_the_user_is_refused_where_it_is_saved(tmp_path: Path):
    @dataclasses.dataclass
    class Estimate(Savable):  # of the name of one of ours
        value: float

    refused(InputTypeError, lambda: Estimate(1.0).save(tmp_path / "f"), "only types of this package")
    assert type(Savable._types["Estimate"]) is type
    assert Savable._types["Estimate"] is jacops.linalg.Estimate


def test_another_type_is_reported(tmp_path: Path):
    Estimate(1.0, 0.5).save(tmp_path / "f")
    refused(DataError, lambda: Contributions.load(tmp_path / "f"), "Estimate", "Contributions")
    refused(FileNotFoundError, lambda: jacops.load(tmp_path / "none"), "none")
    with pytest.raises(OSError, match="directory"):
        jacops.load(tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("exploded",))


def test_foreign_files_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "f"
    safetensors.torch.save_file({"values": X}, path)
    refused(DataError, lambda: jacops.load(path), "another program")
    torch.save({"a": X}, path)
    refused(DataError, lambda: jacops.load(path), "not a plan")
    for content in (
        b"",
        b"x",
        b"{}",
        pickle.dumps(Bomb()),
        b"\x00" * 100,
        struct.pack("<Q", 2**60) + b"{}",
        b"PK\x03\x04",
    ):
        path.write_bytes(content)
        refused(DataError, lambda: jacops.load(path), "f: ")
    assert not (tmp_path / "exploded").exists()


def test_damage_anywhere_is_reported(tmp_path: Path):
    path = tmp_path / "f"
    RESULTS["eigenpairs"]().save(path)
    whole = path.read_bytes()
    places = [*range(0, 64), *range(64, len(whole), max(1, len(whole) // 300)), len(whole) - 1]
    for place in places:
        for mask in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[place] ^= mask
            path.write_bytes(damaged)
            with pytest.raises(DataError):
                jacops.load(path)
    for length in (0, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            jacops.load(path)
    path.write_bytes(whole + b"\x00")
    with pytest.raises(DataError):
        jacops.load(path)
    path.write_bytes(whole)
    jacops.load(path)


def forged(path: Path, change: Callable[[Any], Any], tensors: dict[str, Tensor] | None = None) -> None:
    """Write what a careful forger would: right checksums, another header."""
    import zlib

    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["jacops"])
        kept = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    about = change(about)
    text = json.dumps(about)
    safetensors.torch.save_file(tensors or kept, path, {"jacops": text, "jacops_crc32": str(zlib.crc32(text.encode()))})


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda a: {**a, "format": 99}, "newer version"),
    "no version": (lambda a: {**a, "format": "x"}, "version"),
    "a list": (lambda a: [], "version"),
    "unknown type": (lambda a: {**a, "value": {"type": "os.system", "fields": {}}}, "no type"),
    "abstract type": (lambda a: {**a, "value": {"type": "Operator", "fields": {}}}, "no type"),
    "field more": (lambda a: {**a, "value": {"type": "Estimate", "fields": {"value": 1, "x": 2}}}, "another version"),
    "field less": (lambda a: {**a, "value": {"type": "Eigenpairs", "fields": {"values": 1.0}}}, "another version"),
    "unknown entry": (lambda a: {**a, "value": {"eval": "1"}}, "no entry of kind 'eval'"),
    "private entry": (lambda a: {**a, "value": {"place": "1"}}, "no entry"),
    "no tensor": (lambda a: {**a, "value": {"tensor": "none"}}, "none"),
    "no dtype": (lambda a: {**a, "value": {"dtype": "load"}}, "no dtype"),
    "empty entry": (lambda a: {**a, "value": {}}, "damaged"),
    "other sums": (lambda a: {**a, "crc32": {}}, "numbers"),
    "bad layout": (lambda a: {**a, "value": {"sparse": ["csr", [2, 2], []]}}, "damaged"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_header_makes_nothing_but_an_error(name: str, tmp_path: Path):
    path = tmp_path / "f"
    RESULTS["eigenpairs"]().save(path)
    forged(path, FORGED[name][0])
    refused(DataError, lambda: load(path), FORGED[name][1])


def test_a_header_too_deep_is_reported(tmp_path: Path):
    path = tmp_path / "f"
    Estimate(1.0, 0.5).save(path)
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    forged(path, lambda a: {**a, "value": {"type": "Estimate", "fields": {"value": deep, "standard_error": 0}}})
    load(path)  # no limit of ours; the interpreter's is an error of ours
    text = "[" * 100_000 + "]" * 100_000
    import zlib

    safetensors.torch.save_file({}, path, {"jacops": text, "jacops_crc32": str(zlib.crc32(text.encode()))})
    refused(DataError, lambda: load(path), "Recursion")
