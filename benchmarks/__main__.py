"""`python -m benchmarks [NAME …] [--rounds N]`: run benchmarks by file name (`bench_NAME.py`), all of them by default.

`NAME:CASE,CASE` runs some cases of one only, for example `products:C1,D3`. On a machine that others use as well,
`--threads 1 --clock processor` counts the processor time of one thread, which neighbours disturb little.
"""

from __future__ import annotations

import argparse
import importlib

import torch

from .groups import NAMES_HELP, select
from .machine import CLOCKS
from .report import note, run, write


def main() -> None:
    """Run the benchmarks that are asked for, then write the table and the plot of the newest figures of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME[:CASE,…]", help=NAMES_HELP)
    parser.add_argument("--rounds", type=int, help="rounds of each contender, instead of a workload's own number")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what is measured")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    for name, cases in select(asked.names):
        try:
            module = importlib.import_module(f"benchmarks.bench_{name}")
        except ModuleNotFoundError as error:
            note(f"\n{name}: left out, {error.name} is not installed")
            continue
        run(module.workloads(), name, cases, asked.rounds, asked.clock)
    for path in write():
        note(f"written: {path}")


if __name__ == "__main__":
    main()
