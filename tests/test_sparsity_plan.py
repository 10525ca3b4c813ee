"""Sparse Jacobians equal dense ones, in few sweeps, and say so when a pattern no longer holds."""

import copy
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import jacops
import zoo
from jacops import JacopsWarning, sparse
from jacops.errors import InputError, NonFiniteError, NotDifferentiableError
from jacops.sparse import SparsePlan, _point, sparse_plan
from jacops.sparse._compress import probe_factor
from layer_cases import LastState
from small import Calls, draw, tied_net
from sparse_problems import F64, Chain, Problem, bundle, pose_graph, rosenbrock_residual, small, whole

SWEEPS = {
    "brusselator": 2,
    "bratu": 7,
    "banded": 5,
    "arrowhead": 2,
    "chained rosenbrock": 1,
    "bundle": 2,
    "bundle shared": 4,
}


def planned(problem: Problem, **options) -> SparsePlan:
    return sparse_plan(problem.model, problem.inputs, wrt=problem.wrt, **options)


def dense(problem: Problem) -> np.ndarray:
    return jacops.jacobian(problem.model, problem.inputs, wrt=problem.wrt).dense().numpy()


@pytest.mark.parametrize("problem", small(), ids=lambda p: p.name)
def test_problems_equal_dense(problem: Problem) -> None:
    plan, truth = planned(problem), dense(problem)
    found = plan.evaluate(problem.model, problem.inputs, certify=5)
    np.testing.assert_allclose(found.matrix.toarray(), truth, atol=1e-13 * abs(truth).max())
    assert plan.sweeps <= SWEEPS[problem.name]
    assert found.sweeps == plan.sweeps + 5
    assert found.error_bound <= 1e-12 * np.linalg.norm(truth)
    assert plan.pattern.shape == plan.shape == truth.shape
    assert not ((truth != 0) & ~plan.pattern.matrix.toarray()).any()
    for layout in ("coo", "csr", "bsr"):
        other = plan.evaluate(problem.model, problem.inputs, layout=layout).matrix
        assert_close(other.to_dense().numpy(), found.matrix.toarray(), rtol=0, atol=0)
    inputs = problem.inputs if isinstance(problem.inputs, tuple) else (problem.inputs,)
    assert_close(found.output, problem.model(*inputs).detach())


@pytest.mark.parametrize("options", [{"lift": False}, {"local": True}, {"local": True, "lift": False}])
@pytest.mark.parametrize("problem", small(), ids=lambda p: p.name)
def test_every_way_to_plan_equals_dense(problem: Problem, options: dict) -> None:
    found = planned(problem, **options).evaluate(problem.model, problem.inputs)
    truth = dense(problem)
    np.testing.assert_allclose(found.matrix.toarray(), truth, atol=1e-13 * abs(truth).max())


def test_the_number_of_sweeps_does_not_grow() -> None:
    small_one, large = bundle(5, 40, 100), bundle(20, 400, 2000)
    assert planned(small_one).sweeps == planned(large).sweeps == 2
    assert "2 sweeps instead of" in repr(planned(small_one))


def test_pose_graphs_take_six_sweeps() -> None:
    pytest.importorskip("pypose")
    problem = pose_graph(8, 16)
    plan = planned(problem)
    truth = jacops.modjac(problem.model, problem.inputs, flatten=True, tangent=True)
    found = plan.evaluate(problem.model, problem.inputs, certify=5)
    assert plan.shape == (96, 48)
    assert plan.sweeps == 6
    np.testing.assert_allclose(found.matrix.toarray(), truth.numpy(), atol=1e-13)
    wide = planned(problem, tangent=False)
    padded = wide.evaluate(problem.model, problem.inputs).matrix.toarray()
    assert wide.shape == (96, 56)
    assert not padded[:, 6::7].any()
    here = planned(problem, local=True).pattern
    assert (here.matrix.toarray() == (truth.numpy() != 0)).all()
    assert here.nnz == 16 * 2 * 27
    bsr = plan.evaluate(problem.model, problem.inputs, layout="bsr").matrix
    assert bsr.values().shape[1:] == (6, 6)
    assert bsr.values().shape[0] == 32


def test_reading_stored_numbers_of_a_lietensor_is_refused() -> None:
    pp = pytest.importorskip("pypose")

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.poses = pp.Parameter(pp.randn_SE3(4, dtype=F64))

        def forward(self) -> Tensor:
            return self.poses[1:].tensor() - self.poses[:-1].tensor()

    with pytest.raises(NotDifferentiableError, match="raw storage"):
        sparse_plan(Raw(), None)

    class Group(Raw):
        def forward(self) -> Tensor:
            return self.poses[1:] @ self.poses[:-1]

    with pytest.raises(NotDifferentiableError, match="Lie group"):
        sparse_plan(Group(), None)


# ---- a plan at other points ------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Neighbours by index, with a nonlinearity that has zeros."""

    def __init__(self, n: int = 12) -> None:
        super().__init__()
        self.x = nn.Parameter(draw(n))

    def forward(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.relu(self.x[i]) * self.x[j] + self.x[j] ** 2


def moved(model: nn.Module, seed: int) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw(*p.shape, seed=seed))
    return model


def check_equal(plan: SparsePlan, model: nn.Module, inputs: object) -> None:
    found = plan.evaluate(model, inputs)
    truth = jacops.jacobian(model, inputs).dense().numpy()
    np.testing.assert_allclose(found.matrix.toarray(), truth, atol=1e-12 * max(1, abs(truth).max()))


def test_one_plan_serves_many_points() -> None:
    model, inputs = Residual(), (whole(12, 30), whole(12, 30, seed=1))
    plan = sparse_plan(model, inputs)
    for seed in (3, 4, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_equal(plan, moved(model, seed), inputs)


def test_other_indices_of_the_same_number_need_no_new_plan() -> None:
    model = Residual()
    plan = sparse_plan(model, (whole(12, 30), whole(12, 30, seed=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(plan, model, (whole(12, 30, seed=2), whole(12, 30, seed=3)))


def test_a_local_plan_learns_when_it_no_longer_holds() -> None:
    model, inputs = moved(Residual(), 3), (whole(12, 30), whole(12, 30, seed=1))
    plan = sparse_plan(model, inputs, local=True)
    before = plan.pattern.nnz
    with pytest.warns(JacopsWarning, match="no longer holds"):
        check_equal(plan, moved(model, 4), inputs)
    assert plan.pattern.nnz > before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(plan, model, inputs)


class Switching(Residual):
    """Selects something else where a flag says so."""

    def forward(self, i: Tensor, flag: Tensor) -> Tensor:
        return self.x[i] ** 2 if bool(flag) else self.x[i] * self.x[i.flip(0)]


def test_another_branch_is_noticed() -> None:
    model, i = Switching(), whole(12, 20)
    plan = sparse_plan(model, (i, torch.tensor(True)))
    with pytest.warns(JacopsWarning, match="other parts"):
        check_equal(plan, model, (i, torch.tensor(False)))


def test_a_plan_for_another_model_is_refused() -> None:
    plan = sparse_plan(Residual(), (whole(12, 30), whole(12, 30, seed=1)))
    with pytest.raises(InputError, match="the plan is for"):
        plan.evaluate(Residual(13), (whole(12, 30), whole(12, 30, seed=1)))


def test_nothing_that_is_not_finite_comes_back() -> None:
    model = Calls(lambda x: (x[1:] * x[:-1]).sqrt())
    plan = sparse_plan(model, torch.ones(5, dtype=F64), wrt="inputs")
    with pytest.raises(NonFiniteError, match="output"):
        plan.evaluate(model, torch.tensor([1.0, -1, 1, 1, 1], dtype=F64))
    with pytest.raises(NonFiniteError, match="Jacobian"):
        plan.evaluate(model, torch.tensor([1.0, 0, 1, 1, 1], dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("problem", small(), ids=lambda p: p.name)
def test_lower_precision_raises_no_false_alarm(problem: Problem, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and problem.name.startswith("bundle"):
        pytest.skip("its rotations mean nothing in bfloat16")
    model = copy.deepcopy(problem.model).to(dtype)
    inputs = problem.inputs.to(dtype)
    plan = sparse_plan(model, inputs, wrt=problem.wrt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = plan.evaluate(model, inputs).matrix.toarray()
    truth = dense(problem)
    assert np.linalg.norm(found - truth) <= (1e-4 if dtype is torch.float32 else 0.1) * np.linalg.norm(truth)


class Awkward(nn.Module):
    """BatchNorm, dropout and a checkpoint, in train mode."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).to(F64)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant)
        return torch.cat([h, self.drop(x) ** 2], 1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("wrt", ["inputs", "parameters"])
def test_awkward_models(reentrant: bool, wrt: str) -> None:
    model, x = Awkward(reentrant), draw(6, 4)
    plan = sparse_plan(model, x, wrt=wrt)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = plan.evaluate(model, x).matrix.toarray()
            torch.manual_seed(seed)
            truth = jacops.jacobian(model, x, wrt=wrt, fallback="silent").dense().numpy()
        np.testing.assert_allclose(found, truth, atol=1e-9)


class Closure(nn.Module):
    """Reads its parameter both as its own and through a closure, which holds the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(draw(5))
        kept = self.p
        self.function = lambda x: kept[1:] * x[:4]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) + self.p[:4] ** 2


LAYERS = {
    "lstm": (LastState, draw(2, 5, 2)),
    "gru": (lambda: zoo.Recurrent(nn.GRU(3, 2)), draw(5, 2, 3)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3), draw(2, 2, 5, 5)),
    "attention": (zoo.SelfAttention, draw(2, 3, 4)),
    "tied": (tied_net, draw(4, 3)),
    "closure": (Closure, draw(5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), draw(3, 4, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(3), draw(4, 3, 2, 2)),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), (draw(4, 3), draw(4, 3, seed=1))),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), draw(5, 3)),
    "embedding": (lambda: nn.Embedding(5, 3, padding_idx=1), torch.tensor([0, 1, 4])),
    "bag": (lambda: nn.EmbeddingBag(6, 3), torch.tensor([[0, 1], [2, 2]])),
}


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("wrt", ["parameters", "inputs"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_dense(name: str, wrt: str, local: bool) -> None:
    make, x = LAYERS[name]
    if wrt == "inputs" and name in ("embedding", "bag"):
        pytest.skip("its inputs are integers")
    model = make().to(F64)
    truth = jacops.jacobian(model, x, wrt=wrt, fallback="silent").dense().numpy()
    plan = sparse_plan(model, x, wrt=wrt, local=local)
    np.testing.assert_allclose(plan.evaluate(model, x).matrix.toarray(), truth, atol=1e-12)


def test_others_may_inspect_what_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(_point, "inspectors", [lambda recording: seen.append(recording.lin)])
    problem = bundle(3, 8, 20)
    planned(problem).evaluate(problem.model, problem.inputs)
    assert len(seen[0].leaves) > 2
    assert len(seen) == 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_in_the_callers_modes(context: type) -> None:
    with context():
        problem = bundle(3, 8, 20)
        found = planned(problem).evaluate(problem.model, problem.inputs).matrix.toarray()
    truth = dense(bundle(3, 8, 20))
    np.testing.assert_allclose(found, truth, atol=1e-12 * abs(truth).max())


def test_several_outputs() -> None:
    model = Calls(lambda x: (x[1:] * x[:-1], {"sum": x.sum()}))
    found = sparse_plan(model, draw(9), wrt="inputs").evaluate(model, draw(9))
    assert found.matrix.shape == (9, 9)
    assert found.output[1]["sum"].shape == ()
    one = sparse_plan(model, draw(9), wrt="inputs", outputs=0)
    assert one.shape == (8, 9)


# ---- lifting is sound ------------------------------------------------------------------------------------------


class Uses(nn.Module):
    """Selections of selections, views, embeddings, and uses that are no selections."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(draw(24))
        self.s = nn.Parameter(draw(1, seed=1))
        self.table = nn.Embedding(5, 3).to(F64)

    def forward(self, i: Tensor, j: Tensor) -> Tensor:
        q = self.p.view(8, 3)
        a, b = q[i], q.flip(0)[1:][j]
        near = ((a - b) ** 2).sum(-1) * self.s
        names = (self.table(i % 5) * a).sum(-1)
        parts = torch.cat(list(q[:, 0].chunk(2))) * q.T.unbind(0)[1]
        return torch.cat([near, names, parts, self.p**3, self.s.expand(4) * q[:4, 2]])


def test_lifting_composes_selections() -> None:
    model, inputs = Uses(), (whole(8, 9), whole(7, 9, seed=1))
    for options in ({}, {"lift": False}, {"parameters": "p"}):
        plan = sparse_plan(model, inputs, **options)
        found = plan.evaluate(model, inputs).matrix.toarray()
        truth = jacops.jacobian(model, inputs, parameters=options.get("parameters")).dense().numpy()
        np.testing.assert_allclose(found, truth, atol=1e-12)


def test_writing_into_a_selection_stops_lifting() -> None:
    def write(x: Tensor) -> Tensor:
        y = x.clone()
        z = y[2:]
        y[2] = 7 * y[0]
        return z[:4] ** 2 + y[:4]

    x = draw(8)
    plan = sparse_plan(Calls(write), x, wrt="inputs")
    truth = jacops.jacobian(Calls(write), x, wrt="inputs").dense().numpy()
    np.testing.assert_allclose(plan.evaluate(Calls(write), x).matrix.toarray(), truth)


def test_nothing_of_the_model_changes() -> None:
    problem = bundle(3, 8, 20)
    before = {n: p.detach().clone() for n, p in problem.model.state_dict().items()}
    grads = [p.grad for p in problem.model.parameters()]
    state = torch.get_rng_state()
    plan = planned(problem)
    plan.evaluate(problem.model, problem.inputs)
    assert all(bool((problem.model.state_dict()[n] == v).all()) for n, v in before.items())
    assert [p.grad for p in problem.model.parameters()] == grads
    assert bool((torch.get_rng_state() == state).all())
    assert not torch.overrides._get_current_function_mode_stack()


# ---- declared patterns, certificates, the verb -------------------------------------------------------------------


def test_declared_patterns_are_verified() -> None:
    problem = rosenbrock_residual(15)
    truth = dense(problem)
    for pattern in (sp.csr_array(truth != 0), torch.from_numpy(truth != 0).to_sparse(), planned(problem).pattern):
        plan = planned(problem, pattern=pattern)
        np.testing.assert_allclose(plan.evaluate(problem.model, problem.inputs).matrix.toarray(), truth)
    holed = sp.lil_array(truth != 0)
    holed[3, 4] = False
    with pytest.raises(InputError, match="lacking entries"):
        planned(problem, pattern=holed)
    with pytest.raises(InputError, match="shape"):
        planned(problem, pattern=sp.eye_array(4))


def test_bounds_hold() -> None:
    """The factors of the certificate are those of the chi-squared quantiles."""
    assert [round(probe_factor(k), 1) for k in (1, 2, 3, 5, 10)] == [797.9, 31.6, 11.1, 4.9, 2.6]
    J = jacops.linalg.Matrix(draw(9, 9))
    nearly = (J.matrix.abs() > 0.3).numpy()
    for probes in (3, 5):
        with pytest.raises(InputError, match="lacking"):
            sparse.jacobian(J, pattern=nearly, certify=probes)
    whole_one = sparse.jacobian(J, pattern=np.ones((9, 9)), certify=0)
    assert math.isnan(whole_one.error_bound)
    assert_close(whole_one.matrix.to_dense(), J.matrix)


def test_sparse_jacobians_and_hessians() -> None:
    problem = bundle(4, 12, 40)
    J = jacops.jacobian(problem.model, problem.inputs)
    assert_close(sparse.jacobian(J, layout="coo").matrix.to_dense(), J.dense(), rtol=1e-12, atol=1e-9)
    H = jacops.hessian(Chain(60), lambda output, y: output, None, None)
    found = sparse.jacobian(H, layout="scipy", certify=2)
    assert_close(found.matrix.toarray(), H.dense().numpy(), rtol=1e-12, atol=1e-9)
    assert found.sweeps <= 3 + 2
    summed = J.T @ J
    with pytest.raises(InputError, match="pattern"):
        sparse.jacobian(summed)
    assert_close(
        sparse.jacobian(summed, pattern=summed.dense() != 0).matrix.to_dense(), summed.dense(), rtol=1e-12, atol=1e-6
    )


class Arrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(draw(40))

    def forward(self) -> Tensor:
        return (self.x[0] * self.x[1:] ** 2).sum() + (self.x**4).sum()


def test_an_arrowhead_hessian_takes_two_sweeps() -> None:
    H = jacops.hessian(Arrow(), lambda output, y: output, None, None)
    found = sparse.jacobian(H)
    assert found.sweeps == 2 + 1
    assert_close(found.matrix.to_dense(), H.dense())


# ---- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [None, "points"], ids=["all", "some"])
def test_plans_are_kept_on_disk(tmp_path: Path, parameters: str | None) -> None:
    problem = bundle(4, 12, 40)
    plan = sparse_plan(problem.model, problem.inputs, parameters=parameters)
    plan.save(tmp_path / "plan")
    again = SparsePlan.load(tmp_path / "plan")
    assert repr(again) == repr(plan)
    ours, theirs = (p.evaluate(problem.model, problem.inputs).matrix for p in (plan, again))
    assert (ours != theirs).nnz == 0


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    plan = planned(bundle(4, 12, 40))
    path = tmp_path / "plan"
    plan.save(path)
    data = path.read_bytes()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for changed in (data[:100], b"", data[: len(data) // 2], b"PK" + data[9:]):
        path.write_bytes(changed)
        with pytest.raises(jacops.errors.DataError):
            SparsePlan.load(path)
    broken = {
        "inner": arrays["inner"] + 10**6,
        "ends": arrays["ends"][::-1],
        "rows": arrays["rows"] * 0,
        "copies": arrays["copies"][:-1],
        "about": np.array(str(arrays["about"]).replace('"version": 2', '"version": 7')),
    }
    for name, value in broken.items():
        with path.open("wb") as file:
            np.savez(file, **(arrays | {name: value}))
        with pytest.raises(jacops.errors.DataError, match="damaged|version"):
            SparsePlan.load(path)
    with pytest.raises(FileNotFoundError):
        SparsePlan.load(tmp_path / "none")


# ---- random selections ------------------------------------------------------------------------------------------

CUTS = {
    "index": lambda p: p[torch.tensor([3, 0, 3, 5])],
    "slice": lambda p: p[1:5],
    "view": lambda p: p.view(2, 3, -1).transpose(0, 1).reshape(6, -1)[:4],
    "expand": lambda p: p[2].expand(4, -1),
    "roll": lambda p: p.roll(2, 0)[:4],
    "computed": lambda p: p.cumsum(0)[:4],
    "gather": lambda p: p.gather(0, torch.tensor([[1, 2], [5, 0], [0, 0], [4, 4]])),
    "mask": lambda p: p[torch.tensor([True, False, True, True, True, False])],
    "index_select": lambda p: p.index_select(0, torch.tensor([5, 1, 1, 2])),
}


@given(st.lists(st.sampled_from(sorted(CUTS)), min_size=1, max_size=5), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=60, database=None)
def test_random_selections_equal_dense(names: list[str], direct: bool) -> None:
    class Cuts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(draw(6, 2))

        def forward(self) -> Tensor:
            total = sum((k + 1) * CUTS[name](self.p) ** (k + 2) for k, name in enumerate(names))
            return total * self.p[:4].prod(0) + self.p[:4].sin() if direct else total

    model = Cuts()
    truth = jacops.jacobian(model, None).dense().numpy()
    found = sparse_plan(model, None).evaluate(model, None)
    np.testing.assert_allclose(found.matrix.toarray(), truth, atol=1e-12 * max(1, abs(truth).max()))
