"""Names load when they are asked for; what a class checks does not depend on who asked for what."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import jacops
from jacops import _familiar_names

SRC = Path(jacops.__file__).parent
SPACES = ["__init__", "attribution", "influence", "linalg", "results"]  # whose names are loaded when asked for


def fresh(code: str) -> str:
    """Return what a process prints that has imported nothing before."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def seen_by_checkers(space: str) -> dict[str, str]:
    """Where a type checker finds each name."""
    tree = ast.parse((SRC / f"{space}.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test).endswith("E_CHECKING")]
    found = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in found for alias in node.names}


@pytest.mark.parametrize("space", SPACES)
def test_what_is_loaded_is_what_type_checkers_see(space: str) -> None:
    module = jacops if space == "__init__" else importlib.import_module(f"jacops.{space}")
    homes = vars(module)["_HOMES"]
    assert {name: home for home, names in homes.items() for name in names.split()} == seen_by_checkers(space)
    assert set(module.__all__) <= set(dir(module))
    assert all(hasattr(module, name) for name in dir(module))


def test_import_loads_no_method() -> None:
    found = fresh("import sys, jacops; print(*(name for name in sys.modules if name.startswith('jacops.')))")
    assert {name.split(".")[1] for name in found.split()} <= {
        "_extras", "_hooks", "_keywords", "_lazy", "attribution", "errors", "influence", "linalg", "results"
    }  # fmt: skip


@pytest.mark.parametrize(
    "code",
    [
        "from torch import nn, ones\nH = jacops.jacobian(nn.Linear(2, 1), ones(1, 2))\nH.dense(wrong=1)",
        "from jacops._operators import Matrix\nimport torch\njacops.hessian\nMatrix(torch.eye(2)).dense(wrong=1)",
        "from jacops.solvers import CG\nCG(wrong=1)",
        "jacops.linalg.Identity(wrong=1)",
        "jacops.Function(wrong=1)",
        "jacops.TorchTwiceDifferentiable(wrong=1)",
    ],
)
def test_a_wrong_keyword_is_refused_in_a_process_that_loaded_nothing_else(code: str) -> None:
    indented = code.replace("\n", "\n    ")
    print_error = "except jacops.errors.InputTypeError as error:\n    print(error)"
    assert "has no keyword `wrong`" in fresh(f"import jacops\ntry:\n    {indented}\n{print_error}")


def test_first_calls_do_not_import_sympy() -> None:
    calls = [
        "jacops.fit.least_squares_batch(lambda x: x.sin() - 0.5, params=torch.zeros(4, 2))",
        "jacops.fit.least_squares_batch(lambda x: x.sin() - 0.5, params=torch.zeros(9_000, 2))",
        "jacops.fit.least_squares_batch(lambda x: (x * x).sum().view(1) - 1, params=torch.rand(4, 20))",
        "jacops.jacobian(torch.nn.Linear(5, 3), torch.rand(6, 5)).dense()",
        "jacops.ggn(torch.nn.Linear(5, 3), torch.nn.MSELoss(), torch.rand(6, 5), torch.rand(6, 3)).dense()",
    ]
    before = "before = set(sys.modules)"
    lines = ["import sys, torch, jacops, jacops.fit", before, *calls, "print(*set(sys.modules) - before)"]
    assert "sympy" not in fresh("\n".join(lines)).split()


def test_submodules_import_as_they_are_named() -> None:
    assert fresh("import jacops.fit as f; from jacops import *; print(f.Huber.__name__, fit is f)") == "Huber True"


@pytest.mark.parametrize("name", _familiar_names.OURS)
def test_names_of_other_libraries_point_to_what_there_is(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'; use ") as error:
        getattr(jacops, name)
    home, _, rest = str(error.value).partition("; use ")[2].partition("(")[0].split(",")[0].split()[0].partition(".")
    found = getattr(jacops, home)
    assert callable(getattr(found, rest) if rest else found)


def test_fits_point_to_what_there_is() -> None:
    with pytest.raises(AttributeError, match="'least_squares'; use levenberg_marquardt"):
        _ = jacops.fit.least_squares  # pyright: ignore[reportAttributeAccessIssue]


def test_threads_may_ask_at_once() -> None:
    start = "ts = [threading.Thread(target=lambda: jacops.hessian) for _ in range(8)]"
    asked = f"import threading, jacops\n{start}\n[t.start() for t in ts]; [t.join() for t in ts]"
    assert fresh(f"{asked}; print(callable(jacops.hessian))") == "True"


def test_a_name_that_is_elsewhere_is_pointed_to() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'trace'; it is jacops\.linalg\.trace"):
        _ = jacops.trace  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError, match=r"module 'jacops\.linalg' has no attribute 'traec'"):
        _ = jacops.linalg.traec  # pyright: ignore[reportAttributeAccessIssue]
    left = "import sys, jacops; hasattr(jacops, '__wrapped__'); print('jacops.fit' in sys.modules)"
    assert fresh(left) == "False"
