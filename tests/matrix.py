"""Run a smoke set of tests against other releases of torch and Python: `make test-matrix`.

Each release gets an environment of its own, which is deleted before the next one is made; what is tested is the wheel,
not the checkout. An environment that cannot be made is skipped, and the reason printed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
GIGABYTES = 15  # torch brings up to 9 GB of libraries; as much again is in pip's temporary files while it unpacks
CELLS = ("3.11:lowest", "3.11:2.13.0", "3.11:newest", "3.12:2.13.0", "3.13:2.13.0")
SMOKE = (
    "test_operators",
    "test_plain_recordings",
    "test_remembered_samples",
    "test_remembered_rows",
    "test_kept_products",
    "test_second_nodes",
    "test_known_uses",
    "test_inputs",
    "test_faults_products",
    "test_kronecker",
    "test_least_squares_fit",
    "test_charts",
    "test_sparsity_detect",
    "test_sparse_cholesky",
    "test_solvers",
    "test_influence_results",
    "test_features",
    "test_hostile",
    "test_saving",
)
TOOLS = (
    "pytest>=8",
    "pytest-xdist",
    "hypothesis",
    "pandas>=2.2",
    "scikit-learn",
    "matplotlib",
    "jinja2",
    "expecttest",
    "transformers",
    "zarr>=3.1,<4",
)


class Cell(NamedTuple):
    """An interpreter and a release of torch."""

    python: str
    torch: str

    @classmethod
    def of(cls, text: str) -> Cell:
        """Read `3.12:2.13.0`; `newest` is the last release, `lowest` means all lower bounds of pyproject.toml."""
        python, _, torch = text.partition(":")
        return cls(python, torch)

    @property
    def requirements(self) -> list[str]:
        """What is installed before jacops."""
        if self.torch == "lowest":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            return [bound.replace(">=", "==") for bound in project["dependencies"]]
        return ["torch" if self.torch == "newest" else f"torch=={self.torch}"]


def interpreter(version: str) -> str | None:
    """Return the path of an interpreter, if it starts and is of that version."""
    name = shutil.which(f"python{version}")
    known = [name] if name else []
    known += [str(path) for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    for path in known:
        asked = subprocess.run([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True)
        if asked.returncode == 0 and asked.stdout.decode().strip() == version:
            return path
    return None


def tests() -> list[str]:
    """Return the files of the smoke set; one that was renamed must not be left out silently."""
    files = [ROOT / "tests" / f"{name}.py" for name in SMOKE]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(f"the smoke set names files that are not there: {missing}")
    return [str(file) for file in files]


def run(cell: Cell, wheel: Path, options: list[str]) -> str:
    """Return what became of an environment: passed, failed, or why it was skipped."""
    python = interpreter(cell.python)
    if python is None:
        return f"skipped: there is no Python {cell.python}"
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < GIGABYTES:
        return f"skipped: {free:.0f} GB are free, {GIGABYTES} are needed"
    with tempfile.TemporaryDirectory(prefix="jacops-matrix-") as folder:
        return _tested(cell, python, Path(folder), wheel, options)


def _tested(cell: Cell, python: str, folder: Path, wheel: Path, options: list[str]) -> str:
    own = str(folder / "bin" / "python")
    install = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    for what in (cell.requirements, [str(wheel), *TOOLS]):
        made = subprocess.run([*install, *what], capture_output=True, text=True)
        if made.returncode:
            return f"skipped: pip cannot install {what[0]}: {made.stderr.strip().splitlines()[-1]}"
    found = "import jacops, torch; print(torch.__version__, jacops.__file__)"
    print(subprocess.run([own, "-c", found], capture_output=True, text=True, cwd=folder).stdout.strip(), flush=True)
    command = [own, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", *options, *tests()]
    return "passed" if subprocess.run(command, cwd=ROOT).returncode == 0 else "failed"


def main(arguments: list[str] | None = None) -> int:
    """Make the wheel, go through the cells, print a table; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=CELLS, metavar="PYTHON:TORCH", help=f"default: {' '.join(CELLS)}")
    known, options = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="jacops-wheel-") as folder:
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)]
        subprocess.run(build, check=True)
        wheel = next(Path(folder).glob("jacops-*.whl"))
        outcomes = {text: run(Cell.of(text), wheel, options) for text in known.cells}
    for text, outcome in outcomes.items():
        print(f"{text:14s} {outcome}")
    return int("failed" in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
