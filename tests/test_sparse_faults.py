"""Reused sparse plans, their files, and the samples that mix: right at any scale of rows, or one clear error."""

import io
import json
import random
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops import JacopsError, JacopsWarning
from jacops._extras.graph_files import read_bal, read_g2o, read_toro
from jacops.errors import DataError, InputError, NotDifferentiableError
from jacops.sparse import SparsePlan
from jacops.sparse import samples_independent as samples_independent

F32, F64 = torch.float32, torch.float64


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


class Plain(nn.Module):
    """A function of its input."""

    def __init__(self, function: Any, **held: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def rows_of(model: nn.Module, inputs: Any, wrt: Any = "parameters") -> np.ndarray:
    """The oracle: one backward pass a row, in the model's own precision."""
    given = inputs if isinstance(inputs, tuple) else () if inputs is None else (inputs,)
    given = tuple(t.detach().clone().requires_grad_(wrt == "inputs" and t.is_floating_point()) for t in given)
    output = model(*given)
    outputs = output if isinstance(output, tuple) else (output,)
    leaves = [t for t in given if t.requires_grad] if wrt == "inputs" else list(model.parameters())
    rows = []
    for entry in torch.cat([o.flatten().double() for o in outputs]):
        grads = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, leaves, strict=True)]
        rows.append(torch.cat([p.flatten().double() for p in parts]))
    return torch.stack(rows).numpy()


def assert_rows_right(found: np.ndarray, right: np.ndarray, tolerance: float) -> None:
    """Every row is right at its own scale."""
    off, size = abs(found - right).max(1), abs(right).max(1)
    assert (off <= tolerance * size).all(), f"rows {np.flatnonzero(off > tolerance * size)[:5]}"


def silently(call: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        return call()


# ---- a plan at points where new entries appear ---------------------------------------------------------------------


def switched(on: Tensor, rows: Tensor) -> Tensor:
    """Rows that are on, by an index made of data; of a `where` both branches are in the pattern from the start."""
    return torch.stack([torch.zeros_like(rows), rows])[on.long(), torch.arange(len(rows))]


class Switch(nn.Module):
    """Each row reads a neighbour where its switch is on; rows have sizes of their own."""

    def __init__(self, dtype: torch.dtype, lifted: bool, shared: bool, many: int = 40) -> None:
        super().__init__()
        self.p = nn.Parameter(noise(many, dtype=dtype).abs() + 0.5)
        self.s = nn.Parameter(torch.ones(1, dtype=dtype))
        self.lifted, self.shared = lifted, shared

    def forward(self, i: Tensor, j: Tensor, scale: Tensor, on: Tensor) -> Tensor:
        p = self.p if self.lifted else self.p * 1
        rows = scale * p[i].sin() + switched(on, scale * p[j] ** 2)
        return rows + scale * self.s if self.shared else rows


SCALES = [(F64, 1e-12), (F64, 1e-10), (F64, 1e-6), (F64, 1.0), (F32, 1e-5), (F32, 1e-3), (F32, 1.0)]


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared column"])
@pytest.mark.parametrize("lifted", [False, True], ids=["computed", "selected"])
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_new_entries_of_small_rows_are_found(dtype: torch.dtype, scale: float, lifted: bool, shared: bool) -> None:
    for seed, certify in enumerate((1, 1, 3)):
        model, many = Switch(dtype, lifted, shared), 40
        draw = np.random.default_rng(seed)
        i, j = torch.arange(many), torch.from_numpy(draw.integers(0, many, many))
        small = draw.integers(0, many, 3)
        sizes, on = torch.full((many,), [1.0, 1e-6, 1e5][seed], dtype=dtype), torch.zeros(many, dtype=torch.bool)
        plan = jacops.sparse_plan(model, (i, j, sizes, on))
        if seed:  # the sizes of rows are known from another point
            plan.evaluate(model, (i, j, sizes, on), certify=certify)
        sizes[small] *= scale
        on[small] = True
        with pytest.warns(JacopsWarning, match="no longer holds"):
            found = plan.evaluate(model, (i, j, sizes, on), certify=certify)
        right = rows_of(model, (i, j, sizes, on))
        assert_rows_right(found.matrix.toarray(), right, 1e-12 if dtype is F64 else 1e-5)
        assert found.error_bound >= np.linalg.norm(found.matrix.toarray() - right) * 0.99


def test_a_row_that_was_empty_is_found_at_any_scale() -> None:
    def model(self: nn.Module, scale: Tensor) -> Tensor:
        x = self.x * 1
        return torch.cat([1e3 * x**2, switched(scale > 0, scale * x[:3] * x[5:8])])

    off = torch.zeros(3, dtype=F64)
    for scale in (1e-9, 1e-6, 1.0):
        net = Plain(model, x=nn.Parameter(noise(10).abs() + 1))
        plan = jacops.sparse_plan(net, off)
        plan.evaluate(net, off)
        given = torch.full_like(off, scale)
        with pytest.warns(JacopsWarning, match="no longer holds"):
            found = plan.evaluate(net, given)
        assert_rows_right(found.matrix.toarray(), rows_of(net, given), 1e-12)


def test_a_plan_holds_for_both_branches_of_a_where() -> None:
    net = Plain(lambda self, x: torch.where(x > 0, x * x.roll(1), x.roll(2) ** 2))
    plan = jacops.sparse_plan(net, -noise(8).abs(), wrt="inputs")
    for x in (noise(8).abs(), noise(8), -noise(8).abs()):
        found = plan.evaluate(net, x).matrix.toarray()  # warnings are errors
        assert_rows_right(found, rows_of(net, x, "inputs"), 1e-12)


def test_sizes_may_change_from_one_evaluation_to_the_next() -> None:
    model, many = Switch(F64, False, True), 40
    i, j, off = torch.arange(many), torch.arange(many).roll(7), torch.zeros(many, dtype=torch.bool)
    plan = jacops.sparse_plan(model, (i, j, torch.ones(many, dtype=F64), off))
    for k in range(6):
        sizes, on = torch.ones(many, dtype=F64), off.clone()
        sizes[k * 3 : k * 3 + 3] = 10.0 ** (-2 * k)
        on[k * 3] = True
        found = silently(lambda given=(i, j, sizes, on): plan.evaluate(model, given))
        assert_rows_right(found.matrix.toarray(), rows_of(model, (i, j, sizes, on)), 1e-12)


# ---- least squares -------------------------------------------------------------------------------------------------

KNOTS, YOUNG, AREA, FORCE, GAP, SPRING = 20, 2.1e11, 1e-4, 3000.0, 1e-4, 1e7
STEP = 1 / (KNOTS - 1)
TIP = (FORCE + SPRING * GAP) / (YOUNG * AREA + SPRING)
BAR = torch.cat(
    [
        torch.tensor([1e4], dtype=F64),
        torch.full((KNOTS - 2,), STEP**2 / YOUNG * 1e4, dtype=F64),
        torch.tensor([1 / FORCE, 1e4], dtype=F64),
    ]
)


class Bar(nn.Module):
    """A bar pressed on a spring: rows in pascal, newton and metres; contact couples the last row to the tip."""

    def __init__(self, inside: bool, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.zeros(KNOTS, dtype=dtype)), nn.Parameter(torch.zeros(1, dtype=dtype))
        self.inside = inside

    def forward(self) -> Tensor:
        u, v = self.u, self.v
        inner = YOUNG * (u[2:] - 2 * u[1:-1] + u[:-2]) / STEP**2
        end = YOUNG * AREA * (u[-1:] - u[-2:-1]) / STEP + SPRING * v - FORCE
        contact = torch.where(u[-1:] > GAP, v - (u[-1:] - GAP), v)
        rows = torch.cat([u[:1], inner, end, contact])
        return BAR * rows if self.inside else rows


WEIGHTS = {
    "inside": None,
    "sqrt_weight": {"sqrt_weight": BAR},
    "weight": {"weight": BAR**2},
    "matrix": {"weight": torch.diag_embed(BAR**2)},
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("kept", [False, True], ids=["new plan", "kept plan"])
def test_least_squares_end_where_contact_is(kind: str, kept: bool) -> None:
    model = Bar(WEIGHTS[kind] is None)
    jacobian: Any = jacops.sparse_plan(model, None) if kept else "sparse"
    if kept:
        jacobian.evaluate(model, None)
    options: dict[str, Any] = {"jacobian": jacobian, "max_steps": 60, "progress": False, "on_failure": "return"}
    fit = silently(lambda: jacops.levenberg_marquardt(model, None, **(WEIGHTS[kind] or {}), **options))
    assert float(fit.x["u"][-1]) == pytest.approx(TIP, rel=1e-9)
    assert float(fit.x["v"][0]) == pytest.approx(TIP - GAP, rel=1e-9)
    assert fit.cost < 1e-20


def test_evaluation_at_contact_is_that_of_a_new_plan() -> None:
    model = Bar(False)
    plan = jacops.sparse_plan(model, None)
    with torch.no_grad():
        model.u.copy_(torch.linspace(0, 2e-4, KNOTS))
    found = silently(lambda: plan.evaluate(model, None).matrix.toarray())
    assert_rows_right(found, rows_of(model, None), 1e-12)
    assert found[-1, -2:].tolist() == [-1.0, 1.0]
    whole = jacops.modjac(model, sparse=True).to_dense().numpy()
    assert_rows_right(whole, rows_of(model, None), 1e-12)


# ---- rounding is no missing entry ----------------------------------------------------------------------------------

NOISY = {
    "saturated softmax": lambda self, x: (60 * x).softmax(-1),
    "log softmax": lambda self, x: (30 * x).log_softmax(-1),
    "differences": lambda self, x: torch.cat([x, x * 1e6 - (x * 1e6) + 1e-9 * x.sin(), x.sin() - x.sin()]),
    "half of the rows off": lambda self, x: torch.relu(x - 0.5) * x.roll(1, 1),
    "powers": lambda self, x: x**7,
    "norm": lambda self, x: x / x.norm(dim=-1, keepdim=True),
    "saturated sigmoid": lambda self, x: (40 * x).sigmoid() * x.roll(1, 1),
    "round trip": lambda self, x: (x.exp().log() - x) * x + 1e-8 * x.roll(1, 1),
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", NOISY)
def test_rounding_raises_no_alarm(name: str, dtype: torch.dtype) -> None:
    model = Plain(NOISY[name])
    plan = jacops.sparse_plan(model, noise(3, 8, dtype=dtype), wrt="inputs")
    before = plan.pattern.nnz
    for seed in range(5):
        x = noise(3, 8, seed=seed, dtype=dtype) * (1 + seed % 2) * (1 if dtype is F64 or "soft" not in name else 0.1)
        found = plan.evaluate(model, x).matrix.toarray()  # warnings are errors
        right = rows_of(model, x, "inputs")
        assert abs(found - right).max() <= (1e-9 if dtype is F64 else 1e-3) * abs(right).max()
    assert plan.pattern.nnz == before


def test_probes_still_see_after_rounding_was_met() -> None:
    def model(self: nn.Module, x: Tensor, on: Tensor) -> Tensor:
        y = x * 1
        extra = switched(on, y.roll(3))
        return torch.cat([(60 * x).softmax(-1), x.sin() - x.sin(), 1e-6 * (x**2 + extra), x * x.roll(1)])

    net, off, on = Plain(model), torch.zeros(12, dtype=torch.bool), torch.ones(12, dtype=torch.bool)
    plan = jacops.sparse_plan(net, (noise(12), off), wrt="inputs")
    for seed in range(3):
        plan.evaluate(net, (noise(12, seed=seed), off))
    x = noise(12, seed=9)
    with pytest.warns(JacopsWarning, match="no longer holds"):
        found = plan.evaluate(net, (x, on)).matrix.toarray()
    np.testing.assert_allclose(found[24:36], rows_of(net, (x, on), "inputs")[24:36], rtol=1e-9, atol=1e-18)


class Wrong(torch.autograd.Function):
    """A backward pass that is random, or not linear."""

    kind = ""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if Wrong.kind == "random":
            return grad * (1 + 1e-3 * torch.randn_like(grad))
        return grad.abs() if Wrong.kind == "absolute" else grad + 1e-2 * grad**3


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("kind", ["random", "absolute", "cubic"])
def test_a_backward_pass_that_is_no_linear_map_is_refused(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wrong, "kind", kind)
    model, x = Plain(lambda self, x: Wrong.apply(x)[1:] * x[:-1]), noise(40, dtype=dtype)
    with pytest.raises(NotDifferentiableError, match="disagree"):
        silently(lambda: jacops.sparse_plan(model, x, wrt="inputs").evaluate(model, x))


# ---- declared patterns ---------------------------------------------------------------------------------------------


def test_declared_patterns_that_lack_an_entry_of_a_small_row_are_refused() -> None:
    sizes = torch.ones(30, dtype=F64)
    sizes[11] = 1e-11
    model = Plain(lambda self, x: sizes * (x**2 + x.roll(1) * x.sum()))
    x = noise(30).abs() + 1
    right = rows_of(model, x, "inputs") != 0
    jacops.sparse_plan(model, x, wrt="inputs", pattern=right)
    holed = right.copy()
    holed[11, 4] = False
    with pytest.raises(InputError, match="row 11, column 4"):
        jacops.sparse_plan(model, x, wrt="inputs", pattern=holed)
    with pytest.raises(InputError, match="row 11, column 4"):
        jacops.sparse.jacobian(jacops.jacobian(model, x, wrt="inputs"), pattern=holed)
    matrix = torch.from_numpy(rows_of(model, x, "inputs"))
    with pytest.raises(InputError, match="row 11, column 4"):
        jacops.sparse.jacobian(jacops.linalg.Matrix(matrix), pattern=sp.csr_array(holed))


def test_declared_patterns_may_leave_rounding_out() -> None:
    """The second half is zero but for rounding, which the caller knows and detection does not find."""
    model = Plain(lambda self, x: torch.cat([x**2, 3 * x - x * (1 + 1e-3) - x * (2 - 1e-3)]))
    x = noise(20).abs() + 1
    pattern = sp.csr_array(np.vstack([np.eye(20), np.zeros((20, 20))]))
    plan = jacops.sparse_plan(model, x, wrt="inputs", pattern=pattern)
    np.testing.assert_allclose(plan.evaluate(model, x, certify=0).matrix.toarray()[:20], np.diag(2 * x.numpy()))


# ---- parts of lower precision --------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a = nn.Parameter(torch.linspace(0.1, 1, 8, dtype=F64))
        self.b = nn.Parameter(torch.linspace(0.2, 1, 8, dtype=F32))
        self.net = nn.Linear(8, 3)
        with torch.no_grad():
            self.net.weight.copy_(noise(3, 8)), self.net.bias.copy_(noise(3))
        if way == "frozen net":
            self.net.requires_grad_(False)

    def forward(self) -> Any:
        rows = self.a[1:] * self.a[:-1]
        if self.way == "outputs":
            return rows, self.b[1:] ** 2 * self.b[:-1]
        if self.way in ("net", "frozen net"):
            return torch.cat([rows, self.net((self.a**2).float()).double()])
        return torch.cat([rows, (self.b[1:] ** 2 * self.b[:-1]).double()])


@pytest.mark.parametrize("way", ["parameters", "outputs", "net", "frozen net"])
def test_a_float64_model_with_a_float32_part(way: str, tmp_path: Path) -> None:
    model = Mixed(way)
    moving = [p.requires_grad for p in model.parameters() for _ in range(p.numel())]
    right = rows_of_trained(model)[:, moving]
    plan = jacops.sparse_plan(model, None)
    plan.save(tmp_path / "plan")
    for one in (plan, SparsePlan.load(tmp_path / "plan"), jacops.sparse_plan(model, None, lift=False)):
        found = one.evaluate(model, None).matrix  # warnings are errors
        np.testing.assert_allclose(found.toarray(), right, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        jacops.sparse.jacobian(jacops.jacobian(model, None)).matrix.to_dense(), right, 1e-6, 1e-7
    )
    whole = jacops.modjac(model, sparse=True, parameters="trainable").to_dense()
    np.testing.assert_allclose(whole, right, 1e-6, 1e-7)
    options: dict[str, Any] = {"progress": False, "max_steps": 3, "on_failure": "return"}
    fits = [jacops.levenberg_marquardt(Mixed(way), jacobian=j, **options) for j in ("sparse", "dense")]
    assert fits[0].cost == pytest.approx(fits[1].cost, rel=1e-2)


def rows_of_trained(model: nn.Module) -> np.ndarray:
    """Rows by all parameters, frozen ones zero."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_()
    right = rows_of(model, None)
    for p in frozen:
        p.requires_grad_(False)
    return right


# ---- files ---------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(noise(9, 3, seed=seed)), nn.Parameter(noise(12, seed=seed + 1))
        self.i, self.j = torch.arange(20) % 9, torch.arange(20) % 7 % 4

    def forward(self) -> Tensor:
        return torch.cat([(self.a[self.i] * self.a[self.j]).flatten(), self.b[1:] - self.b[:-1] ** 2, self.b**2])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("plans") / "plan"
    jacops.sparse_plan(Chain(), None).save(path)
    with np.load(path) as file:
        return path, path.read_bytes(), {name: file[name] for name in file.files}


def outcome(path: Path, model: nn.Module) -> str:
    """Load and evaluate; what comes must be right or an error of the library."""
    try:
        found = silently(lambda: SparsePlan.load(path).evaluate(model, None))
    except JacopsError as error:
        return type(error).__name__
    np.testing.assert_allclose(found.matrix.toarray(), rows_of(model, None), atol=1e-12)
    return "right"


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def about_with(arrays: dict[str, np.ndarray], **changed: Any) -> dict[str, np.ndarray]:
    return arrays | {"about": np.array(json.dumps(json.loads(str(arrays["about"])) | changed))}


def test_damaged_bytes_give_one_error(kept: tuple, tmp_path: Path) -> None:
    _, data, _ = kept
    draw, model, seen = random.Random(0), Chain(), set()
    for kind in [0, 1, 2, 3] * 40:
        changed, at = bytearray(data), draw.randrange(len(data))
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            changed[at : at + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        else:
            changed[at : at + 8] = data[:8]
        (tmp_path / "plan").write_bytes(changed)
        seen.add(outcome(tmp_path / "plan", model))
    assert seen <= {"DataError", "right"}
    assert "DataError" in seen


VALUES = [None, True, 0, -1, 2**40, 10**30, 1.5, "x", [], [1], [[]], {}, {"is": {}}, {"is": [None]}, {"again": 3},
          [2, 2], [-1, 4], ["a"], "\ud800", ["\udcff"], {"a": "b"}, {"a": -1}]  # fmt: skip
FIELDS = ["version", "shape", "wrt", "names", "outputs", "tangent", "local", "unknown"]


@pytest.mark.parametrize("field", FIELDS)
def test_changed_fields_give_one_error(field: str, kept: tuple, tmp_path: Path) -> None:
    path, _, arrays = kept
    path = tmp_path / "plan"
    own, seen = json.loads(str(arrays["about"]))[field], []
    for value in VALUES:
        path.write_bytes(packed(about_with(arrays, **{field: value})))
        try:
            SparsePlan.load(path)
        except DataError:
            seen.append(value)
    allowed = {"wrt": 1, "names": 3, "tangent": 1, "local": 1, "unknown": 1}.get(field, 0)  # such as None, [], True
    assert len(seen) >= len(VALUES) - allowed - (own in VALUES)


NUMBERS = [-1, 0, 1, -2, 7, 2**31 - 1, 2**62, -(2**63), 10**12]


@pytest.mark.parametrize("name", ["ends", "inner", "rows", "columns", "copies", "final", "structure"])
def test_changed_arrays_give_one_error(name: str, kept: tuple, tmp_path: Path) -> None:
    _, _, arrays = kept
    array, path, model = arrays[name], tmp_path / "plan", Chain()
    others: list[Any] = [array[:-1], np.r_[array, array], array.astype(float), array.astype(">i8"), array.astype(bool)]
    others += [array.astype("U5"), array.astype("S4"), array.astype(complex), array[None], np.array(3), array * 0 - 1]
    others += [array.astype(np.int64) + number for number in (10**12, -1, 2**62)]
    for number in NUMBERS:
        for place in (0, array.size // 2, -1):
            other = array.astype(np.int64).copy()
            other.reshape(-1)[place] = number
            others.append(other)
    for other in others:
        path.write_bytes(packed(arrays | {name: other}))
        assert outcome(path, model) in {"DataError", "right"}


@pytest.mark.parametrize(
    "text", ["[" * 50_000, '{"a":' * 50_000, "", "1" * 6000, '{"version": 1}', '{"version": []}', "null", "\x00"]
)
def test_descriptions_that_are_none_give_one_error(text: str, kept: tuple, tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(packed(kept[2] | {"about": np.array(text)}))
    with pytest.raises(DataError):
        SparsePlan.load(tmp_path / "plan")


def header(kind: str, shape: str) -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def peak_of(path: Path) -> int:
    """Return the bytes taken until a file is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            SparsePlan.load(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_entries(path: Path, entries: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)


def entries_of(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    found = {}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.lib.format.write_array(file, array)
        found[name] = file.getvalue()
    return found


@pytest.mark.parametrize("kind", ["<i8", "<U100000000", "|O", "<f8", "<i8,<i8", "(2,)<i8"])
@pytest.mark.parametrize("shape", ["(134217728,)", "(4611686018427387904,)", "(-1,)", f"({10**30},)", "(1, 2, 3"])
def test_headers_that_describe_more_than_there_is(kind: str, shape: str, kept: tuple, tmp_path: Path) -> None:
    entries = entries_of(kept[2])
    write_entries(tmp_path / "plan", entries | {"inner": header(kind, shape) + bytes(64)})
    assert peak_of(tmp_path / "plan") < 2**22


def test_files_that_unpack_to_far_more_than_their_size(kept: tuple, tmp_path: Path) -> None:
    path, entries = tmp_path / "plan", entries_of(kept[2])
    zeros = bytes(2**25)
    write_entries(path, entries | {"inner": header("<i8", f"({2**22},)") + zeros})
    assert path.stat().st_size < 2**17
    assert peak_of(path) < 2**24
    write_entries(path, entries | {"more": zeros})
    assert peak_of(path) < 2**24
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_entries(path, entries, kind)
        assert peak_of(path) < 2**22
    many = {f"x{k}": b"" for k in range(3000)}
    write_entries(path, entries | many)
    assert peak_of(path) < 2**24


def test_more_colours_than_any_colouring_takes(tmp_path: Path) -> None:
    model, path = Plain(lambda self, x: x**2), tmp_path / "plan"
    jacops.sparse_plan(model, noise(3000), wrt="inputs").save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    assert arrays["rows"].max() == 0
    path.write_bytes(packed(arrays | {"rows": np.arange(3000)}))
    with pytest.raises(DataError, match="colours"):
        SparsePlan.load(path)


def test_a_plan_that_is_stored_and_read_back_is_the_same(kept: tuple, tmp_path: Path) -> None:
    path, data, arrays = kept
    model = Chain(3)
    assert outcome(path, model) == "right"
    (tmp_path / "plan").write_bytes(packed(arrays))
    assert outcome(tmp_path / "plan", model) == "right"
    SparsePlan.load(path).save(tmp_path / "again")
    assert outcome(tmp_path / "again", model) == "right"
    assert [p.name for p in path.parent.iterdir()] == ["plan"]
    with pytest.raises(DataError):
        SparsePlan.load(tmp_path)


GRAPHS = {
    read_toro: "VERTEX2 {} 0 0 0\nVERTEX2 1 {} 0 0\nEDGE2 0 1 {} 0 0 1 0 1 1 0 0\n",
    read_g2o: "VERTEX_SE3:QUAT 0 0 0 0 0 {0} 0 1\nVERTEX_SE3:QUAT {1} 1 0 0 0 0 0 {2}\n",
    read_bal: "1 2 {}\n0 0 {} 2.0\n0 1 3.0 4.0\n" + "{}\n" + "0.5\n" * 14,
}
WORDS = ["9" * 400, "9" * 5000, "1e308", "-1e308", "nan", "1e400", "1e-320", "\x00", "x"]


@pytest.mark.parametrize("read", GRAPHS, ids=lambda r: r.__name__)
def test_numbers_beyond_all_bounds_in_graph_files(read: Any, tmp_path: Path) -> None:
    path, seen = tmp_path / "graph", 0
    for place in range(3):
        for word in WORDS:
            words = ["0", "1", "1"]
            words[place] = word
            path.write_text(GRAPHS[read].format(*words), encoding="utf-8")
            try:
                read(path)
            except DataError:
                seen += 1
    assert seen >= 20
    angles = "EDGE3 0 1 1e308 1e308 1 1e308 0 0 " + "1 0 0 0 0 0 1 0 0 0 0 1 0 0 0 1 0 0 1 0 1"
    path.write_text(angles, encoding="utf-8")
    with pytest.raises(DataError, match="overflow"):
        read_toro(path)


# ---- samples that mix ----------------------------------------------------------------------------------------------

RISING = torch.arange(20.0).reshape(5, 4)
X, FIVE = noise(5, 4, dtype=F32), torch.arange(5)
LOOSE = torch.zeros(())


def gate(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


MIXED: dict[str, tuple[nn.Module, Any]] = {
    "gate": (Plain(lambda s, x: x.sin() + s.g * x.sum(0), g=gate(0.0)), X),
    "frozen gate": (Plain(lambda s, x: x.sin() + s.g * x.sum(0), g=gate(0.0).requires_grad_(False)), X),
    "buffer": (Plain(lambda s, x: x.sin() + s.g * x.sum(0), g=torch.zeros(())), X),
    "captured": (Plain(lambda s, x: x.sin() + LOOSE * x.sum(0)), X),
    "attribute": (Plain(lambda s, x: x.sin() + s.g[0] * x.sum(0), g=[torch.zeros(4)]), X),
    "number": (Plain(lambda s, x: x.sin() + s.g * x.sum(0), g=0.0), X),
    "number in a matrix": (Plain(lambda s, x: x.sin() + x.sum(0) @ (torch.eye(4) * s.g), g=0), X),
    "one minus": (Plain(lambda s, x: x.sin() + (1 - s.g) * x.sum(0), g=gate(1.0)), X),
    "relu of a gate": (Plain(lambda s, x: x.sin() + torch.relu(s.g) * x.sum(0), g=gate(-1.0)), X),
    "lerp": (Plain(lambda s, x: torch.lerp(x, x.mean(0).expand_as(x), s.g), g=gate(0.0)), X),
    "power": (Plain(lambda s, x: x.sin() + x.exp().sum(0) ** s.g, g=gate(0.0)), X),
    "matmul": (Plain(lambda s, x: x.sin() + x.sum(0) @ (s.g * torch.eye(4)), g=gate(0.0)), X),
    "mixing weights": (Plain(lambda s, x: s.m @ x, m=nn.Parameter(torch.eye(5))), X),
    "mixing buffer": (Plain(lambda s, x: torch.einsum("ij,jk->ik", s.m, x), m=torch.eye(5)), X),
    "masked weights": (Plain(lambda s, x: (s.w * s.m) @ x, w=nn.Parameter(noise(5, 5).float()), m=torch.eye(5)), X),
    "copied mask": (Plain(lambda s, x: torch.zeros(5, 5).copy_(s.m) @ x, m=torch.eye(5)), X),
    "where": (Plain(lambda s, x: x.sin() + torch.where(x.sum(0) > 1e3, x.sum(0), torch.zeros(4))), X),
    "where of a gate": (Plain(lambda s, x: x.sin() + torch.where(s.g > 0, x.sum(0), torch.zeros(4)), g=gate(0.0)), X),
    "masked_fill": (Plain(lambda s, x: x.sin() + x.sum(0).masked_fill(x.sum(0) < 1e3, 0.0)), X),
    "relu": (Plain(lambda s, x: x.sin() + torch.relu(x.sum(0) - 1e3)), X),
    "clamp": (Plain(lambda s, x: x.sin() + x.sum(0).clamp(1e3, 1e4)), X),
    "maximum": (Plain(lambda s, x: torch.maximum(x, x.sum(0) - 1e3)), X),
    "sort": (Plain(lambda s, x: x.sort(0).values), RISING),
    "permuted by data": (Plain(lambda s, x: x[x[:, 0].argsort()]), RISING),
    "gather": (Plain(lambda s, x: x.gather(0, x.argsort(0))), RISING),
    "index_select": (Plain(lambda s, x: x.index_select(0, x[:, 0].argsort())), RISING),
    "cummax": (Plain(lambda s, x: x.cummax(0).values), RISING),
    "permuted by a buffer": (Plain(lambda s, x: x[s.i], i=FIVE), X),
    "edges": (Plain(lambda s, x, e: x.index_add(0, e, x)), (X, FIVE)),
    "scatter": (Plain(lambda s, x, e: torch.zeros(5, 4).scatter(0, e[:, None].expand(5, 4), x)), (X, FIVE)),
    "scatter_add": (Plain(lambda s, x, e: torch.zeros(5, 4).scatter_add(0, e[:, None].expand(5, 4), x)), (X, FIVE)),
    "index_copy": (Plain(lambda s, x, e: torch.zeros(5, 4).index_copy(0, e, x)), (X, FIVE)),
    "index_put": (Plain(lambda s, x, e: torch.zeros(5, 4).index_put((e,), x)), (X, FIVE)),
    "take": (Plain(lambda s, x, e: x.take(e)), (X, torch.arange(20).reshape(5, 4))),
    "repeated": (Plain(lambda s, x, e: x.repeat_interleave(e, 0)), (X, torch.ones(5, dtype=torch.long))),
    "boolean index": (Plain(lambda s, x: x[x[:, 0] > -1e9]), X),
    "read": (Plain(lambda s, x: x.sin() + x.sum(0) if x.detach().sum() > 1e3 else x.sin()), X),
    "read gate": (Plain(lambda s, x: x.sin() + x.sum(0) if s.g.item() > 0 else x.sin(), g=gate(0.0)), X),
    "attention": (
        Plain(lambda s, x: (x @ x.T).masked_fill(s.m, float("-inf")).softmax(-1) @ x, m=~torch.eye(5).bool()),
        X,
    ),
}


def zeroed(self: nn.Module, x: Tensor) -> Tensor:
    y = x * 1
    y[y < 0] = 0
    return y


IMAGES, WORDS_IN = noise(3, 2, 8, 8, dtype=F32), noise(3, 6, 8, dtype=F32)
CNN = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
CAUSAL = torch.ones(6, 6).triu(1).bool()
APART: dict[str, tuple[nn.Module, Any]] = {
    "convolutions": (CNN, IMAGES),
    "largest": (nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Flatten()), IMAGES),
    "transformer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), WORDS_IN),
    "causal mask": (Plain(lambda s, x: (x @ x.mT).masked_fill(s.m, -1e9).softmax(-1) @ x, m=CAUSAL), WORDS_IN),
    "top": (Plain(lambda s, x: x.topk(2, -1).values), X),
    "sort within": (Plain(lambda s, x: x.sort(-1).values), X),
    "median": (Plain(lambda s, x: x.median(-1).values), X),
    "gather within": (Plain(lambda s, x: x.gather(1, x.argmax(1, keepdim=True))), X),
    "own class": (Plain(lambda s, x: x[torch.arange(5), x.argmax(1)]), X),
    "cross-entropy": (Plain(lambda s, x, y: F.cross_entropy(x, y, reduction="none")), (X, FIVE % 4)),
    "zeroed in place": (Plain(zeroed), X),
    "where within": (Plain(lambda s, x: torch.where(x > 0, x, x.flip(1))), X),
    "scatter within": (Plain(lambda s, x: torch.zeros(5, 4).scatter_add(1, x.argsort(1), x)), X),
    "literal eye": (Plain(lambda s, x: torch.eye(5) @ x), X),
    "literal mask": (Plain(lambda s, x: (1 - torch.ones(5, 5).tril(-1) - torch.ones(5, 5).triu(1)) @ x), X),
    "literal index": (Plain(lambda s, x: x[torch.arange(5)] * 2), X),
    "dropout": (nn.Dropout(), X),
}


@pytest.mark.parametrize("name", MIXED)
def test_no_zero_hides_that_samples_mix(name: str) -> None:
    model, x = MIXED[name]
    found = samples_independent(model, x)
    assert not found
    assert found.mixed or found.unknown


@pytest.mark.parametrize("name", APART)
def test_samples_that_do_not_mix_are_apart(name: str) -> None:
    model, x = APART[name]
    assert samples_independent(model, x)
