"""`python -m benchmarks [NAME …]`: run benchmarks by file name (`bench_NAME.py`), all of them by default."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from .harness import run


def main() -> None:
    """Run the benchmarks that are asked for."""
    torch.manual_seed(0)
    here = Path(__file__).parent
    known = sorted(path.stem.removeprefix("bench_") for path in here.glob("bench_*.py"))
    asked = sys.argv[1:] or known
    for name in asked:
        if name not in known:
            raise SystemExit(f"no benchmark {name!r}; there are: {', '.join(known)}")
        module = importlib.import_module(f"benchmarks.bench_{name}")
        run(module.workloads(), name)


main()
