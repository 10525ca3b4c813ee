"""What the machine does in the same minute: rates that bound every contender, and the memory that one call takes."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import jacops

Clock = Callable[[], float]


def processor_time() -> float:
    """Return the seconds of processor time that this process took, and those that it started and that ended."""
    spent = os.times()
    return time.process_time() + spent.children_user + spent.children_system


CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": processor_time}
SIDE = 1024
WRITTEN = 64 * 2**20


class Rates:
    """Rates of matrix products and of writing, sampled between the contenders' rounds.

    Args:
        dtype: Of the matrix products.
        clock: The source of the time.
    """

    def __init__(self, dtype: torch.dtype, clock: Clock) -> None:
        self._clock = clock
        generator = torch.Generator().manual_seed(0)
        self._a, self._b = torch.randn(2, SIDE, SIDE, generator=generator, dtype=dtype)
        self._c = torch.empty_like(self._a)
        self._warm = torch.zeros(WRITTEN, dtype=torch.uint8)
        self._seconds: dict[str, list[float]] = {"gemm": [], "warm": [], "fresh": []}
        torch.mm(self._a, self._b, out=self._c)

    def sample(self) -> None:
        """Take one sample of each rate."""
        self._seconds["gemm"].append(timed(lambda: torch.mm(self._a, self._b, out=self._c), self._clock))
        self._seconds["warm"].append(timed(lambda: self._warm.fill_(1), self._clock))
        self._seconds["fresh"].append(timed(lambda: torch.empty_like(self._warm).fill_(1), self._clock))

    def _median(self, name: str) -> float:
        return statistics.median(self._seconds[name])

    @property
    def flops(self) -> float:
        """Floating-point operations a second in a product of two 1,024 × 1,024 matrices."""
        return 2 * SIDE**3 / self._median("gemm")

    @property
    def warm(self) -> float:
        """Bytes a second written to memory that was touched before."""
        return WRITTEN / self._median("warm")

    @property
    def fresh(self) -> float:
        """Bytes a second written to memory that the system has yet to hand out."""
        return WRITTEN / self._median("fresh")

    def floor(self, flops: float, result_bytes: float) -> float | None:
        """Return the least seconds for arithmetic and for writing the result; None if neither is known."""
        return max(flops / self.flops, result_bytes / self.warm) or None


@dataclass(frozen=True)
class Elsewhere:
    """What a call gave in another process, and the seconds that it took there, imports left out.

    Attributes:
        answer: The answer.
        wall: Seconds that passed.
        processor: Seconds of processor time.
    """

    answer: Any
    wall: float
    processor: float

    def seconds(self, clock: Clock) -> float:
        """Return the seconds by a clock."""
        return self.wall if clock is CLOCKS["wall"] else self.processor


def in_a_fresh_process(module: str, call: str) -> Elsewhere:
    """Return what a first call gives in a process that has imported torch and jacops and done nothing.

    Args:
        module: Where names in `call` are looked up.
        call: An expression that gives a callable; what it gives is a number or an array.
    """
    code = f"from {__name__} import print_call; from {module} import *; print_call({call}, {torch.get_num_threads()})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, check=True)
    answer, wall, processor = json.loads(done.stdout)
    return Elsewhere(np.array(answer)[()], wall, processor)


def print_call(call: Callable[[], Any], threads: int) -> None:
    """Make a call and print what it gives and takes, for `in_a_fresh_process`."""
    torch.set_num_threads(threads)
    wall, processor = time.perf_counter(), time.process_time()
    answer = call()
    print(json.dumps([np.asarray(answer).tolist(), time.perf_counter() - wall, time.process_time() - processor]))


def timed(call: Callable[[], Any], clock: Clock) -> float:
    """Return the seconds of one call, its answer dropped within them."""
    start = clock()
    if isinstance(answer := call(), Elsewhere):
        return answer.seconds(clock)
    del answer
    return clock() - start


def watched(call: Callable[[], Any], clock: Clock) -> tuple[Any, float, float | None]:
    """Return a call's answer, its seconds, and how far it raised resident memory, in MiB (None where that is unknown).

    The answer is still alive when the memory is read, so it counts.
    """
    before = _marked()
    start = clock()
    answer = call()
    seconds = clock() - start
    if isinstance(answer, Elsewhere):
        return answer.answer, answer.seconds(clock), None
    peak = None if before is None else max(0.0, (_status("VmHWM") - before) / 1024)
    return answer, seconds, peak


def _marked() -> int | None:
    """Start the high-water mark of resident memory anew and return what is resident now, in KiB."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free already would hide what the call needs
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "jacops": jacops.__version__,
        "python": platform.python_version(),
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }
