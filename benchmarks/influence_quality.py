"""How well influences predict networks that are trained again: every method of jacops beside those of other packages.

`python -m benchmarks.influence_quality [--peers FOLDER]` prints the table of `docs/influence.md` and writes it to
`benchmarks/results/influence_quality.md`. Two networks and their data, splits and seeds are fixed; what training them
gave is read from disk (`benchmarks.datamodelling`). kronfluence, dattri and pyDVL are each executed by the Python of
their own environment, `FOLDER/NAME/bin/python` (`make peers` sets them up, in `.peers`), and get states as safetensors
and data as npz (`benchmarks.rivals`). One whose environment is missing is left out of the table, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import jacops
from jacops.influence import ensemble_influences, projected_index, tracin
from jacops.solvers import EKFAC

from .datamodelling import Case, Trainings, digits, kept, network, score, shown
from .harness import RESULTS
from .networks import SCORED

HERE = Path(__file__).parent
LONGEST = 1800  # seconds that all methods of a rival may take
CASES = [
    Case("MLP", SCORED["MLP"], digits, cross_entropy, 500, 10, 3e-3),
    Case("transformer, two layers", SCORED["transformer, two layers"], digits, cross_entropy, 500, 12, 3e-3),
]


@dataclass(frozen=True)
class Question:
    """A trained network that methods are asked about.

    Attributes:
        case: The network, its data, and how it is trained.
        trained: What training gave.
    """

    case: Case
    trained: Trainings

    @cached_property
    def model(self) -> nn.Module:
        """The network."""
        return network(self.case, self.trained)

    @cached_property
    def damping(self) -> float:
        """That of the default call, which rivals are given too where they take one."""
        return self.case.influences(self.model).damping

    def over(self, call: Callable[..., Any], states: Sequence[Any], **options: Any) -> Tensor:
        """Return scores of a call that takes several states."""
        train, test = self.case.data
        return call(self.model, [train], states, loss=self.case.loss, test_data=[test], **options).values

    def index(self, curvature: Any) -> Tensor:
        """Return scores of projected gradients."""
        train, test = self.case.data
        return projected_index(self.model, [train], loss=self.case.loss, curvature=curvature).influences([test]).values


FACTORS = EKFAC(report_residual=False)


def damped(curvature: str, solver: Any, share: float) -> Callable[[Question], Tensor]:
    """Return a solve with a damping that is so many times the default's."""
    return lambda q: q.case.influences(q.model, curvature=curvature, solver=solver, damping=share * q.damping).values


OURS: dict[str, Callable[[Question], Tensor]] = {
    "gradient products": lambda q: q.over(tracin, q.trained.states[-1:]),
    "TracIn, 4 checkpoints": lambda q: q.over(tracin, q.trained.states),
    "default (GGN)": lambda q: q.case.influences(q.model).values,
    "EK-FAC": lambda q: q.case.influences(q.model, solver=FACTORS).values,
    "GGN, a tenth of the damping": damped("ggn", "direct", 0.1),
    "EK-FAC, a hundredth of the damping": damped("ggn", FACTORS, 0.01),
    "Hessian, direct": damped("hessian", "direct", 1),
    "Hessian, direct, 5 × the damping": damped("hessian", "direct", 5),
    "index, empirical Fisher, rank 16": lambda q: q.index("empirical_fisher"),
    "index, GGN, rank 16": lambda q: q.index("ggn"),
    "EK-FAC, mean of 5 networks": lambda q: q.over(ensemble_influences, q.trained.members, solver=FACTORS),
}


@dataclass(frozen=True)
class Rival:
    """A method of another package.

    Attributes:
        peer: The package, as in `benchmarks.rivals`; its environment is named so in lower case.
        label: In the table.
        method: Its class there.
        settings: Its arguments.
        damped: The argument that takes the damping of the default call, if any.
    """

    peer: str
    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    damped: str | None = None

    def given(self, damping: float) -> dict[str, Any]:
        """Return the arguments with the damping of the default call."""
        return {**self.settings, **({self.damped: damping} if self.damped else {})}


TRAK = {"projector_kwargs": {"proj_dim": 512}}  # its default
DAMPED = {**TRAK, "regularization": 0.1}  # the best of 0, 0.01, 0.1, 1, 10 and 100 for both together
RIVALS = [
    Rival("kronfluence", "EK-FAC", "ekfac", damped="damping_factor"),
    Rival("kronfluence", "EK-FAC, damping 0.1 of the mean eigenvalue", "ekfac", {"damping_factor": None}),
    Rival("kronfluence", "EK-FAC, its default damping 1e-8", "ekfac"),
    Rival("dattri", "TRAK, its defaults", "TRAKAttributor", TRAK),
    Rival("dattri", "TRAK, regularisation 0.1", "TRAKAttributor", DAMPED),
    Rival("dattri", "TRAK, regularisation 0.1, 5 networks", "TRAKAttributor", {**DAMPED, "members": 5}),
    Rival("dattri", "Hessian, CG, 10 steps (its default)", "IFAttributorCG", {}, "regularization"),
    Rival("dattri", "LiSSA, 500 steps", "IFAttributorLiSSA", {"recursion_depth": 500}, "damping"),
    Rival("pyDVL", "EK-FAC", "EkfacInfluence", {"update_diagonal": True}, "hessian_regularization"),
    Rival("pyDVL", "Hessian, Nyström, rank 100", "NystroemSketchInfluence", {"rank": 100}, "regularization"),
    Rival("pyDVL", "GGN, direct", "DirectInfluence", {"second_order_mode": "GAUSS_NEWTON"}, "regularization"),
    Rival("pyDVL", "Hessian, CG", "CgInfluence", {"solve_simultaneously": True}, "regularization"),
]


Answer = tuple[Tensor, float] | str  # scores with their processor seconds, or why there are none


def ask(rivals: Sequence[Rival], question: Question, python: Path) -> list[Answer]:
    """Return the answers of a package's methods, all in one process of its own environment."""
    asked = [{"method": rival.method, "settings": rival.given(question.damping)} for rival in rivals]
    (x, y), (u, v) = question.case.data
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {"network": question.case.name, "rival": rivals[0].peer, "asked": asked}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy(), u=u.numpy(), v=v.numpy())
        for number, state in enumerate(question.trained.members):
            save_file(state, folder / f"member-{number}.safetensors")
        why = executed([str(python), "-W", "ignore", "-m", "benchmarks.rivals", name])
        return [answer(folder / f"answer-{number}.npz", why) for number in range(len(rivals))]


def executed(command: list[str]) -> str:
    """Return what is to be said where a command leaves an answer out."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": LONGEST, "check": False}
    try:
        done = subprocess.run(command, cwd=HERE.parent, env=environment, **options)
    except subprocess.TimeoutExpired:
        return f"not within {LONGEST} s"
    if done.returncode < 0:  # what is written last says nothing then
        return f"ended by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"failed: {lines[-1][:70]}"


def answer(path: Path, why: str) -> Answer:
    """Return what a rival wrote; what is given where there is nothing."""
    if not path.exists():
        return why
    found = np.load(path)
    if "failed" in found:
        return f"failed: {found['failed'].item()[:70]}"
    return torch.from_numpy(found["scores"]), float(found["seconds"])


def ours(method: Callable[[Question], Tensor], question: Question) -> Answer:
    """Return our scores and their processor seconds, or that they are refused."""
    _ = question.damping  # not part of the time
    start = time.process_time()
    try:
        return method(question), time.process_time() - start
    except jacops.errors.JacopsError as error:
        return f"refused: {type(error).__name__}"


def interpreter(peer: str, peers: Path | None) -> Path | None:
    """Return the Python of a package's own environment; None where there is none."""
    python = None if peers is None else peers.absolute() / peer.lower() / "bin" / "python"
    return python if python is not None and python.exists() else None


def answers(questions: Sequence[Question], peers: Path | None) -> Iterator[tuple[str, str, list[Answer]]]:
    """Yield package, label and answers of every method; those of rivals whose environment is there."""
    for label, method in OURS.items():
        yield "jacops", label, [ours(method, question) for question in questions]
    for peer, rivals in groupby(RIVALS, lambda rival: rival.peer):
        python, methods = interpreter(peer, peers), list(rivals)
        if python is not None:
            found = [ask(methods, question, python) for question in questions]
            for rival, of_each in zip(methods, zip(*found, strict=True), strict=True):
                yield peer, rival.label, list(of_each)


def absent(peers: Path | None) -> list[str]:
    """Return a line for every rival that is left out."""
    why = "no `--peers`" if peers is None else "no environment"
    missing = [peer for peer in dict.fromkeys(rival.peer for rival in RIVALS) if interpreter(peer, peers) is None]
    return [f"{peer} is left out: {why} (`make peers`)." for peer in missing]


def cells(found: Answer, question: Question) -> list[str]:
    """Return a method's score and seconds for a network, or why there is none."""
    if isinstance(found, str):
        return [found, ""]
    values, seconds = found
    if not bool(values.isfinite().all()):
        return ["not finite", f"{seconds:.2f}"]
    return [shown(score(values, question.case.halves, question.trained.losses)), f"{seconds:.2f}"]


def table(cases: Sequence[Case], peers: Path | None = None, folder: Path = RESULTS) -> str:
    """Return the table, whose lines are printed as they come, and write it.

    Args:
        cases: The networks.
        peers: Where the environments of rivals are.
        folder: For what training gave, and for the table.
    """
    questions = [Question(case, kept(case, folder)) for case in cases]
    sizes = [sum(p.numel() for p in question.model.parameters()) for question in questions]
    heads = [f"{case.name}, {size:,} parameters | s" for case, size in zip(cases, sizes, strict=True)]
    lines = [f"| package | method | {' | '.join(heads)} |", "|---" * (2 + 2 * len(cases)) + "|"]
    print("\n".join(lines))
    for package, label, found in answers(questions, peers):
        parts = [part for one, question in zip(found, questions, strict=True) for part in cells(one, question)]
        lines.append(f"| {package} | {label} | {' | '.join(parts)} |")
        print(lines[-1], flush=True)
    lines += ["", *absent(peers)]
    print("\n".join(lines[-len(absent(peers)) - 1 :]))
    (folder / "influence_quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "\n".join(lines)


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.influence_quality", description=__doc__)
    parser.add_argument("--peers", type=Path, help="a folder with an environment for each rival, made by `make peers`")
    torch.set_num_threads(1)
    table(CASES, parser.parse_args().peers)


if __name__ == "__main__":
    main()
