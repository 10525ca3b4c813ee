"""What type checkers see of the library in a user's file: types of results, and mistakes that they find."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SRC = Path(__file__).parents[1] / "src"
SETUP = """
import torch
import jacops

net = torch.nn.Linear(3, 2)
x = torch.randn(4, 3)
y = torch.randint(2, (4,))
loss = torch.nn.functional.cross_entropy
def line(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor: return a * x + b
def outputs() -> torch.Tensor: return net(x)
J = jacops.jacobian(net, x)
H = jacops.hessian(net, loss, x, y)
fit = jacops.levenberg_marquardt(net, x, y)
plan = jacops.sparse_plan(net, x)
both = jacops.TorchTwiceDifferentiable(net, loss)
influences = jacops.compute_influences(both, [(x, y)], curvature="ggn", damping=1e-3)
"""
TYPES = {
    "jacops.compute_jacobian(net, x)": "Tensor",
    "jacops.compute_jacobian(net, {'input': x})": "Any",
    "jacops.input_hessian(net, x, outputs=0)": "Tensor",
    "jacops.laplacian(net, x)": "Tensor",
    "jacops.directional_derivative(net, x, x, 2)": "Tensor",
    "J": "LinearizedMap",
    "J @ torch.ones(8)": "Tensor",
    "J @ H": "Operator",
    "J @ [torch.ones(2, 3), torch.ones(2)]": "list[Tensor]",
    "J @ {'weight': torch.ones(2, 3), 'bias': torch.ones(2)}": "dict[str, Tensor]",
    "J.T": "Operator",
    "J.dense()": "Tensor",
    "H @ torch.ones(8)": "Tensor",
    "jacops.hvp(net, loss, x, y, torch.ones(8))": "Tensor",
    "jacops.ggnvp(net, loss, x, y, {'weight': x})": "dict[str, Tensor]",
    "jacops.jvp(outputs, net.parameters(), [torch.ones(2, 3)])": "Tensor",
    "jacops.model_jvp(net, x, [torch.ones(2, 3)])": "Tensor",
    "jacops.vjp(outputs, net.parameters(), torch.ones(4, 2))": "Tensor | list[Tensor]",
    "jacops.vjp(outputs, net.weight, torch.ones(4, 2))": "Tensor",
    "jacops.full_jacobian(outputs, net.parameters())": "list[Tensor]",
    "jacops.modjac(net, x, flatten=True)": "Tensor",
    "jacops.modjac(net, x, sparse=True)": "Tensor",
    "jacops.linalg.trace(H).value": "float",
    "jacops.linalg.diagonal(H)": "Tensor",
    "jacops.linalg.diagonal(H, None, 0, method='xdiag')": "Tensor",
    "jacops.linalg.diagonal(H, 10)": "DiagonalEstimate",
    "influences": "Influences",
    "influences.top(3)": "tuple[Tensor, Tensor]",
    "jacops.influence.top_influences(both, [(x, y)], 3)": "RankedInfluences",
    "jacops.influence.projected_index(both, [(x, y)]).influences()": "Influences",
    "jacops.self_influences(both, [(x, y)])": "Tensor",
    "jacops.inverse(H, 'cg', damping=1.0) @ torch.ones(8)": "Tensor",
    "jacops.solve(H, torch.ones(8), damping=1.0).x": "Tensor",
    "fit.x": "dict[str, Tensor]",
    "jacops.gauss_newton(line, params=torch.ones(2)).x": "Tensor",
    "jacops.gauss_newton(line, params=[torch.ones(1), torch.ones(1)]).x": "list[Tensor]",
    "plan.evaluate(net, x)": "SparseJacobian",
    "jacops.Problem(net, loss, [(x, y)]).curvature('ggn')": "SumOver",
}
MISTAKES = [
    "jacops.compute_influences([(x, y)], both)",
    "jacops.influence.top_influences(both, [(x, y)], 3, which='most')",
    "jacops.influence.projected_index(both, [(x, y)], curvature='hessian')",
    "jacops.compute_influences(both, [(x, y)], curvature='gnn')",
    "jacops.compute_influences(both, [(x, y)], solver='ekfacc')",
    "jacops.compute_influences(both, [(x, y)], influence_type='upp')",
    "jacops.compute_influences(both, [(x, y)], dampening=1.0)",
    "jacops.compute_influences(both, [(x, y)], reduction='men')",
    "jacops.compute_jacobian(net, x, fallback='wrn')",
    "jacops.compute_jacobian(net, x, mode='backward')",
    "jacops.compute_jacobian(net, x, chunksize=3)",
    "jacops.compute_jacobian(x, net)",
    "jacops.hessian(net, loss, x, y, parms=1)",
    "jacops.hessian(net, loss, x, y, checks='frist')",
    "jacops.hessian(x, loss, net, y)",
    "jacops.fisher(net, loss, x, y, kind='empiric')",
    "jacops.jacobian(net, x, 'weights')",
    "jacops.modjac(net, x, strategy='forward')",
    "jacops.modjac(x, net, flatten=True)",
    "jacops.jvp(net.parameters(), outputs, [x])",
    "jacops.reduce_contributions(x, 'l3')",
    "jacops.solve(x, y)",
    "jacops.solve(H, x, 'cgg')",
    "jacops.inverse(H, on_failure='rise')",
    "jacops.linalg.trace(H, method='hutch')",
    "jacops.linalg.diagonal(H, 10, method='xtrace')",
    "jacops.linalg.eigenpairs(H, which='biggest')",
    "jacops.levenberg_marquardt(net, x, y, strategy='nielson')",
    "jacops.gauss_newton(net, x, y, max_step=3)",
    "jacops.solvers.CG(tol=1e-3)",
    "jacops.solvers.EKFAC(fisher='exat')",
    "plan.evaluate(net, x, layout='crs')",
    "influences.top(n=3)",
]


def user_file(folder: Path) -> tuple[Path, dict[int, str]]:
    """Write what a user writes; return the file, and the statements by line, from 1."""
    lines = [*SETUP.splitlines(), *(f"reveal_type({code})" for code in TYPES), *MISTAKES]
    path = folder / "user.py"
    path.write_text("\n".join(lines) + "\n")
    return path, dict(enumerate(lines, 1))


def compare(lines: dict[int, str], types: dict[int, str], wrong: set[int]) -> None:
    """Compare what a checker said with what it should: every type, every mistake, and no other error."""
    found = {lines[n].removeprefix("reveal_type(")[:-1]: kind for n, kind in types.items()}
    assert found == TYPES
    assert [code for n, code in lines.items() if n in wrong] == MISTAKES


def test_pyright_knows_the_types_and_finds_the_mistakes(tmp_path: Path) -> None:
    _, lines = user_file(tmp_path)
    settings = {"extraPaths": [str(SRC)], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    if not ran.stdout.startswith("{"):
        pytest.skip(f"pyright cannot be set up here: {ran.stderr[-200:]}")
    found: list[dict[str, Any]] = json.loads(ran.stdout)["generalDiagnostics"]
    told = {d["range"]["start"]["line"] + 1: d["message"] for d in found if d["severity"] == "information"}
    types = {n: text.rpartition(' is "')[2][:-1] for n, text in told.items()}
    compare(lines, types, {d["range"]["start"]["line"] + 1 for d in found if d["severity"] == "error"})


@pytest.mark.slow  # it reads all of torch first, which takes half a minute
def test_mypy_knows_the_types_and_finds_the_mistakes(tmp_path: Path) -> None:
    path, lines = user_file(tmp_path)
    settings = f"[mypy]\nmypy_path = {SRC}\nfollow_imports = silent\ncache_dir = {tmp_path}/cache\n"
    (tmp_path / "mypy.ini").write_text(settings)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", path.name]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    told = re.findall(r'^user\.py:(\d+): note: Revealed type is "(.*)"$', ran.stdout, re.M)
    short = {int(n): re.sub(r"[\w.]+\.(\w+)", r"\1", text) for n, text in told}
    types = {n: re.sub(r"tuple\[.*fallback=(\w+)\]", r"\1", text) for n, text in short.items()}  # named tuples
    compare(lines, types, {int(n) for n in re.findall(r"^user\.py:(\d+): error", ran.stdout, re.M)})
