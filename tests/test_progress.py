"""Progress bars: one for each call, only after a while and in a terminal or notebook, of whatever kind the call is."""

import io
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops import _progress
from jacops.linalg import eye
from small import draw, refused, small_net

X, Y = draw(12, 3), torch.tensor([0, 1] * 6)
DATA = [(X[i : i + 3], Y[i : i + 3]) for i in range(0, 12, 3)]


class Recorded:
    """What tqdm would have drawn: one entry per bar."""

    def __init__(self) -> None:
        self.bars: list[Any] = []

    def made(self, **options: Any) -> Any:
        log = self

        class Drawn:
            def __init__(self) -> None:
                self.options, self.n, self.start_t, self.open = options, 0.0, 0.0, True
                self.places = []
                log.bars.append(self)

            def _time(self) -> float:
                return 0.0

            def update(self, by: float) -> None:
                self.n += by
                self.places.append(self.n)

            def close(self) -> None:
                self.open = False

        return Drawn()

    @property
    def names(self) -> list[str]:
        return [bar.options["desc"] for bar in self.bars]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Every tenth of a second seems to last an hour, and somebody looks."""
    clock = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(_progress, "is_watched", lambda: True)
    log = Recorded()
    monkeypatch.setattr(_progress, "_tqdm", lambda: log.made)
    yield log
    assert not any(bar.open for bar in log.bars)
    assert _progress._here.bar is None


def problem(**options: Any) -> jacops.Problem:
    return jacops.Problem(small_net(), F.cross_entropy, DATA, **options)


def wrapped() -> Any:
    return jacops.TorchTwiceDifferentiable(small_net(), F.cross_entropy)


def numbers(found: Any) -> Any:
    if isinstance(found, Tensor | list | tuple):
        return np.asarray(found[0])
    fields = ("x", "values", "density", "pattern", "value", "cost")
    field = next(getattr(found, name) for name in fields if hasattr(found, name))
    return field.matrix.toarray() if hasattr(field, "matrix") else np.asarray(field)


class Chain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[1:] - x[:-1] ** 2


class Mixing(nn.Module):
    """No layer rule holds: rows by plain sweeps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(70))

    def forward(self, x: Tensor) -> Tensor:
        return torch.outer(self.weight.sin().cumsum(0), x.sum(0)).flatten()


def chain_plan() -> Any:
    return jacops.sparse_plan(Chain(), draw(30), wrt="inputs")


LONG: dict[str, Callable[..., Any]] = {
    "compute_jacobian": lambda **o: jacops.compute_jacobian(small_net(), X, 4, **o),
    "modjac": lambda **o: jacops.modjac(Mixing(), X, **o),
    "full_jacobian": lambda **o: wide_jacobian(**o),
    "dense": lambda **o: problem().hessian().dense(**o),
    "solve": lambda **o: jacops.solve(problem().ggn(), draw(26), "cg", damping=0.1, **o),
    "inverse": lambda **o: jacops.inverse(problem().ggn(), "cg", damping=0.1, **o) @ draw(26),
    "sparse_plan": lambda **o: jacops.sparse_plan(Chain(), draw(30), wrt="inputs", **o),
    "trace": lambda **o: jacops.linalg.trace(problem().ggn(), 4, **o),
    "diagonal": lambda **o: jacops.linalg.diagonal(problem().hessian(), **o),
    "norm": lambda **o: jacops.linalg.norm(problem().ggn(), 4, **o),
    "spectral_norm": lambda **o: jacops.linalg.spectral_norm(problem().ggn(), **o),
    "eigenpairs": lambda **o: jacops.linalg.eigenpairs(problem().ggn(), 2, **o),
    "spectral_density": lambda **o: jacops.linalg.spectral_density(problem().ggn(), probes=2, **o),
    "compute_influences": lambda **o: jacops.compute_influences(wrapped(), DATA, curvature="ggn", damping=0.1, **o),
    "top_influences": lambda **o: jacops.influence.top_influences(
        wrapped(), DATA, 1, curvature="ggn", damping=0.1, **o
    ),
    "projected_index": lambda **o: jacops.influence.projected_index(wrapped(), DATA, **o).shares,
    "self_influences": lambda **o: jacops.self_influences(wrapped(), DATA, curvature="ggn", damping=0.1, **o),
    "input_hessian": lambda **o: jacops.input_hessian(small_net(), X, batch_size=4, **o),
    "levenberg_marquardt": lambda **o: jacops.levenberg_marquardt(
        lambda x: x**3 - torch.tensor([1.0, 8.0]), params=torch.full((2,), 3.0), **o
    ),
}


def wide_jacobian(**options: Any) -> Any:
    p = draw(80).requires_grad_()
    return jacops.full_jacobian(lambda: p.sin().cumsum(0) * p.cos().flip(0), [p], **options)


@pytest.mark.parametrize("name", LONG)
def test_a_long_call_has_bars_of_its_own_name(name: str, drawn: Recorded):
    LONG[name]()
    assert drawn.names, "no bar"
    assert set(drawn.names) == {name}


@pytest.mark.parametrize("name", LONG)
def test_a_keyword_turns_bars_off(name: str, drawn: Recorded):
    LONG[name](progress=False)
    assert not drawn.bars


@pytest.mark.parametrize("name", LONG)
def test_bars_change_no_number(name: str, drawn: Recorded, monkeypatch: pytest.MonkeyPatch):
    with_bars = LONG[name]()
    monkeypatch.setattr(_progress, "is_watched", lambda: False)
    many = len(drawn.bars)
    without = LONG[name]()
    assert len(drawn.bars) == many
    np.testing.assert_allclose(numbers(with_bars), numbers(without), rtol=1e-9, atol=1e-12)


def test_a_matrix_of_many_passes_over_the_data_has_one_bar(drawn: Recorded):
    passes = 0

    class Counted(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            nonlocal passes
            passes += 1
            return super().__iter__()

    A = jacops.Problem(small_net(), F.cross_entropy, Counted(DATA)).hessian()
    (2 * A @ A).dense(budget="16MiB")
    assert passes > 1
    (bar,) = drawn.bars
    assert bar.places == sorted(bar.places), "it went back"


def test_iterations_are_counted_in_one_bar(drawn: Recorded):
    solution = jacops.solve(problem().ggn(), draw(26), "cg", damping=0.1)
    (bar,) = drawn.bars
    assert bar.options["total"] is None
    assert "products" in bar.options["unit"]
    assert bar.n == solution.info["products"] > 3
    assert bar.places == sorted(bar.places)


def test_every_solve_of_an_inverse_has_the_bar_that_was_asked_for(drawn: Recorded, monkeypatch: pytest.MonkeyPatch):
    b = draw(26).requires_grad_()
    for progress, watched in ((False, True), (True, False)):
        monkeypatch.setattr(_progress, "is_watched", lambda watched=watched: watched)
        drawn.bars.clear()
        options: dict[str, Any] = {"damping": 0.1, "progress": progress, "create_graph": True}
        A = jacops.inverse(problem().ggn(), "cg", **options)
        _ = A @ b.detach(), A.T @ b.detach()
        for x in (A @ b, jacops.solve(problem().ggn(), b, "cg", **options).x):
            x.sum().backward()
        assert len(drawn.bars) == 6 * progress


def test_the_bar_ends_with_an_error(drawn: Recorded):
    with pytest.raises(jacops.errors.SolveError):
        jacops.solve(problem().ggn() - 3.0 * eye, draw(26), "cg")
    broken = small_net()
    nn.init.constant_(next(broken.parameters()), float("nan"))
    refused(jacops.errors.NonFiniteError, lambda: jacops.compute_jacobian(broken, X, 4))
    assert _progress._here.bar is None


def test_a_wish_of_the_problem_holds_inside_calls(drawn: Recorded):
    problem(progress=False).hessian().dense()
    assert not drawn.bars


def test_an_interrupted_pass_leaves_no_bar_behind(drawn: Recorded):
    def stopped() -> Any:
        for number, _ in enumerate(_progress.track(range(5), "loop")):
            if number == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    abandoned = iter(_progress.track(range(5), "first"))
    next(abandoned)
    next(abandoned)
    del abandoned
    assert _progress._here.bar is None


# ---- when, where ---------------------------------------------------------------------------------------------------


def loop(seconds: list[float], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Recorded:
    log, now = Recorded(), [0.0]
    monkeypatch.setattr(_progress, "_tqdm", lambda: log.made)
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    for step in _progress.track(seconds, "loop", **options):
        now[0] += step
    return log


def test_a_bar_comes_after_two_seconds_where_someone_looks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_progress, "is_watched", lambda: True)
    assert not loop([0.15] * 12, monkeypatch).bars
    (bar,) = loop([0.5] * 12, monkeypatch).bars
    assert bar.places[0] == 4
    assert bar.options["delay"] == 2.0
    monkeypatch.setattr(_progress, "is_watched", lambda: False)
    assert not loop([0.5] * 12, monkeypatch).bars
    (bar,) = loop([0.5] * 12, monkeypatch, enabled=True).bars
    assert bar.places[0] == 1
    assert not loop([0.5] * 12, monkeypatch, enabled=False).bars


def test_no_one_looks_at_a_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not _progress.is_watched()
    monkeypatch.setattr(sys, "stderr", None)
    assert not _progress.is_watched()


def test_a_notebook_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    assert _progress.is_watched()
    shell.config = {}
    assert not _progress.is_watched()


def test_a_forced_bar_is_drawn_by_tqdm(capsys: pytest.CaptureFixture[str]):
    jacops.compute_jacobian(small_net(), X, 4, progress=True)
    assert "compute_jacobian:" in capsys.readouterr().err
    jacops.solve(problem().ggn(), draw(26), "cg", damping=0.1, progress=True)
    told = capsys.readouterr().err
    assert "solve:" in told
    assert "products" in told
    jacops.compute_jacobian(small_net(), X, 4)
    assert capsys.readouterr().err == ""


NOTEBOOK = """
import sys, types, warnings
warnings.simplefilter("error")
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
ipython = types.ModuleType("IPython")
ipython.get_ipython = lambda: shell
display = types.ModuleType("IPython.display")
display.HTML = display.display = object
sys.modules.update({"IPython": ipython, "IPython.display": display, "ipywidgets": None})
import torch, jacops
jacops.compute_jacobian(torch.nn.Linear(3, 2), torch.ones(9, 3), 3, progress=True)
"""


def test_a_notebook_without_ipywidgets_has_a_bar_of_text_and_no_warning():
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compute_jacobian:" in done.stderr
    assert "arning" not in done.stderr


def test_importing_the_package_loads_no_bars():
    code = "import sys, jacops; print('tqdm.auto' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _progress._tqdm() is _progress._tqdm()
