"""One checkout's side of `benchmarks.compare`: one JSON command a line on stdin, one JSON reply a line on stdout.

It is run as a file (`python -P worker.py`) with PYTHONPATH at the sources of one checkout and at the benchmarks of the
new one, so that both run the same code of the rows. It uses nothing of jacops by itself.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

OURS = "jacops"


class Worker:
    """The rows of one group of benchmarks: each public method is a command."""

    def __init__(self) -> None:
        self._workloads: Iterator[Any] = iter(())
        self._workload: Any = None
        self._answer: Any = None
        self._processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def open(self, group: str, cases: list[str]) -> str:
        """Import jacops and a group of benchmarks, and return the file that jacops was imported from.

        Args:
            group: `bench_GROUP` is the module.
            cases: The cases to stop at; all of them if empty.
        """
        torch.manual_seed(0)
        jacops = importlib.import_module("jacops")
        module = importlib.import_module(f"benchmarks.bench_{group}")
        workloads = module.workloads() if getattr(module, "TIMED", True) else iter(())
        self._workloads = (w for w in workloads if not cases or w.name in cases)
        return str(jacops.__file__)

    def advance(self) -> list[str] | None:
        """Build the next workload, and return its name and those of the calls that are ours; None after the last."""
        self._workload = self._answer = None  # freed before the next one is built
        self._workload = next(self._workloads, None)
        if self._workload is None:
            return None
        return [self._workload.name, *(name for name in self._workload.rivals if name.startswith(OURS))]

    def first(self, contender: str, path: str) -> float:
        """Make a first call, keep its answer, write it to a file, and return the processor time in seconds."""
        start = time.process_time()
        answer = self._workload.rivals[contender]()
        seconds = time.process_time() - start
        self._answer = as_tensors(answer)
        torch.save(self._answer, path)
        return seconds

    def agrees(self, path: str) -> bool:
        """Return whether the last first call's answer is the one in a file, within the row's own tolerance.

        Rows without one, and answers that are matrices (compared by products with two vectors), are held to 1e-3.
        """
        from benchmarks.harness import same

        other, own, self._answer = torch.load(path), self._answer, None
        if isinstance(other, torch.Tensor) and self._workload.close is not None:
            return bool(self._workload.close(other, own))
        nothing = isinstance(other, list) and not other and not own
        return nothing or same()(other, own)

    def time(self, contender: str, calls: int, turn: int = 0) -> float:
        """Return the processor time of so many calls, in seconds per call.

        In a turn both checkouts run on the same processor, the next one in the next turn: left to the system each stays
        on one of its own, and the neighbours there would count.
        """
        call = self._workload.rivals[contender]
        if self._processors:
            os.sched_setaffinity(0, {self._processors[turn % len(self._processors)]})
        gc.collect()
        start = time.process_time()
        for _ in range(calls):
            call()
        return (time.process_time() - start) / calls


def as_tensors(answer: Any) -> Any:
    """Return an answer as tensors, which can be read without the classes of the checkout that gave it.

    An operator or a sparse matrix is represented by its products with two fixed vectors, since it may be too large to
    be formed; what has no values to compare, by an empty list.
    """
    if isinstance(answer, torch.Tensor):
        return answer.detach().as_subclass(torch.Tensor)
    if isinstance(answer, np.ndarray):
        return torch.as_tensor(answer)
    if isinstance(answer, list | tuple):
        return [as_tensors(part) for part in answer]
    matrix = getattr(answer, "matrix", answer)  # a sparse Jacobian holds one
    if hasattr(matrix, "T") and hasattr(matrix, "dtype"):
        return [_product(matrix), _product(matrix.T)]
    return []


def _product(matrix: Any) -> torch.Tensor:
    wave = torch.arange(matrix.shape[1], dtype=torch.float64).sin()  # no entry twice, and none zero but the first
    if isinstance(matrix.dtype, torch.dtype):
        return (matrix @ wave.to(matrix.dtype)).detach()
    return torch.as_tensor(matrix @ wave.numpy())


def is_absent(error: Exception) -> bool:
    """Return whether an error says that jacops lacks what a row uses: a name or a keyword, not something inside it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    outside = Path(last.filename).parent.name == "benchmarks" or last.name == "__getattr__"
    keyword = type(error).__name__ == "InputTypeError"  # the library's own word for a keyword that it does not have
    return keyword or (outside and isinstance(error, AttributeError | ImportError | TypeError))


def serve(worker: Worker, commands: Iterator[str], reply: Callable[[str], Any]) -> None:
    """Answer commands `[name, argument, …]` with `{"value": …}`, or with what is known of the error."""
    for line in commands:
        name, *arguments = json.loads(line)
        try:
            found = {"value": getattr(worker, name)(*arguments)}
        except Exception as error:  # a row that fails in one checkout is a finding
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            found = {"error": text, "missing": missing, "absent": is_absent(error)}
        reply(json.dumps(found) + "\n")


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what benchmarks print is no reply
    serve(Worker(), iter(sys.stdin.readline, ""), channel.write)
