"""Three questions about small networks on real data, answered by derivatives: run it with `make demo`."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the matrices are small: a second thread would mostly wait

import argparse
import platform
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import torch
from questions import Answer, features, fit, labels, look

from jacops._extras.report import Report

WIDTH = 80


def say(answer: Answer, number: int) -> None:
    """Print one answer and its certificate."""
    print(f"\n{number}. {answer.question}")
    print(textwrap.fill(answer.finding, WIDTH, initial_indent="   ", subsequent_indent="   "))
    for name, value in answer.certificate.items():
        wrapped = textwrap.wrap(value, WIDTH - 36) or [""]
        print(f"   · {name:<28.28} {wrapped[0]}")
        for line in wrapped[1:]:
            print(" " * 34 + line)
    print(f"   · {'took':<28} {sum(answer.seconds.values()):.1f} s")


def close(report: Report, answers: list[Answer], seconds: float) -> None:
    """End the report with how long everything took and what it ran on."""
    report.section("Timings and versions")
    report.table(
        ["question", "step", "seconds"],
        [
            [number, step, f"{took:.2f}"]
            for number, answer in enumerate(answers, start=1)
            for step, took in answer.seconds.items()
        ]
        + [["", "all, with figures", f"{seconds:.2f}"]],
    )
    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores used"
    packages = ["jacops", "torch", "numpy", "scipy", "scikit-learn", "matplotlib"]
    report.table(
        ["part", "version"],
        [["Python", platform.python_version()], *([name, version(name)] for name in packages)] + [["machine", machine]],
    )


def main() -> None:
    """Answer the three questions, print them, write the report."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "report" / "jacops-demo.html")
    options.add_argument("--quick", action="store_true", help="smaller data and networks: a few seconds, for tests")
    chosen = options.parse_args()
    start = time.perf_counter()
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign shows another
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    look.use_style()

    report = Report(
        "Three questions, answered by derivatives",
        "Which features does an output depend on? Which training points moved a prediction? Which step shrinks a "
        "residual? Each is a product with a Jacobian or a Hessian, taken exactly, with its certificate.",
    )
    print("jacops: three questions, answered by derivatives")
    print("=" * WIDTH)
    answers = []
    for number, question in enumerate((features, labels, fit), start=1):
        answers.append(question.ask(report, quick=chosen.quick))
        say(answers[-1], number)
    seconds = time.perf_counter() - start
    close(report, answers, seconds)
    path = report.write(chosen.output).resolve()
    here = Path.cwd().resolve()
    print("\n" + "=" * WIDTH)
    print(f"{seconds:.0f} s in all. The report, with figures:")
    print(path.relative_to(here) if path.is_relative_to(here) else path)


if __name__ == "__main__":
    main()
