"""`python -m benchmarks.growth`: how time and memory grow with samples, outputs, inputs, parameters, tokens and poses.

One question per series, over two decades of one size, with the rivals that still answer: a contender is left out above
the size at which a call took more than `--limit` seconds or failed. Written are `growth.jsonl`, `growth.md` (exponents)
and `growth.png`. An exponent is the slope of log time, or log memory, over the upper half of the sizes; 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import jacops
from jacops.solvers import EKFAC

from .harness import OURS, RESULTS
from .machine import watched
from .report import note

Calls = dict[str, Callable[[], Any]]
REPEATS = 5
LEAST_MIB = 4.0  # peaks below are pages of the allocator, and no slope is taken through them


@dataclass(frozen=True)
class Series:
    """One question at growing sizes.

    Attributes:
        name: Short id.
        what: The question, for titles.
        axis: What the size counts.
        sizes: In ascending order.
        calls: Makes the contenders of one size.
    """

    name: str
    what: str
    axis: str
    sizes: Sequence[int]
    calls: Callable[[int], Calls]


@dataclass
class Point:
    """What one contender took at one size: its quickest call, and a peak beyond what was resident."""

    series: str
    contender: str
    size: int
    seconds: float | None = None
    mib: float | None = None
    error: str | None = None


def mlp(*widths: int) -> nn.Sequential:
    """Return a tanh network of these widths."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inside, outside in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inside, outside), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def params_of(model: nn.Module) -> dict[str, Tensor]:
    """Return detached parameters by name, for torch.func."""
    return {name: p.detach() for name, p in model.named_parameters()}


def input_jacobians(model: nn.Module, x: Tensor) -> Calls:
    """Return who computes Jacobians by the input, sample by sample."""
    params = params_of(model)

    def one(row: Tensor) -> Tensor:
        return functional_call(model, params, (row.unsqueeze(0),)).squeeze(0)

    return {
        f"{OURS}: compute_jacobian": lambda: jacops.compute_jacobian(model, x),
        "torch.func: vmap(jacrev)": lambda: vmap(jacrev(one))(x),
        "torch.func: vmap(jacfwd)": lambda: vmap(jacfwd(one))(x),
    }


def parameter_jacobians(width: int) -> Calls:
    """Return who computes the Jacobian of 64 outputs by all parameters."""
    model, x = mlp(16, width, 4), torch.randn(64, 16)
    params = params_of(model)
    return {
        f"{OURS}: modjac": lambda: jacops.modjac(model, x),
        "torch.func: jacrev": lambda: jacrev(lambda p: functional_call(model, p, (x,)))(params),
    }


def hessian_products(width: int) -> Calls:
    """Return who multiplies the Hessian of a batch's loss by a vector, anew each time."""
    model, x, y = mlp(16, width, width, 4), torch.randn(128, 16), torch.randint(4, (128,))
    loss, leaves = nn.functional.cross_entropy, list(model.parameters())
    vectors = [torch.randn_like(p) for p in leaves]

    def by_hand() -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(loss(model(x), y), leaves, create_graph=True)
        return torch.autograd.grad(slopes, leaves, vectors)

    return {f"{OURS}: hvp": lambda: jacops.hvp(model, loss, x, y, vectors), "autograd: two sweeps": by_hand}


def dense_hessians(width: int) -> Calls:
    """Return who forms the Hessian of a batch's loss."""
    model, x, y = mlp(8, width, 3), torch.randn(128, 8), torch.randint(3, (128,))
    loss, params = nn.functional.cross_entropy, params_of(model)
    return {
        f"{OURS}: hessian(…).dense()": lambda: jacops.hessian(model, loss, x, y).dense(),
        "torch.func: hessian": lambda: hessian(lambda p: loss(functional_call(model, p, (x,)), y))(params),
    }


def influences(n: int) -> Calls:
    """Return who computes influences of n training samples on 16 test samples."""
    model, loss = mlp(20, 32, 4), nn.functional.cross_entropy
    x, y = torch.randn(n, 20), torch.randint(4, (n,))
    train = list(zip(x.split(256), y.split(256), strict=True))
    params = params_of(model)

    def dense() -> Tensor:
        rows = vmap(grad(lambda p, a, b: loss(functional_call(model, p, (a[None],)), b[None])), (None, 0, 0))
        g = torch.cat([t.flatten(1) for t in rows(params, x, y).values()], 1)
        return g[:16] @ torch.linalg.solve(g.T @ g / n + 0.1 * torch.eye(g.shape[1]), g.T)

    test = [(x[:16], y[:16])]
    solver = EKFAC(report_residual=False)
    return {
        f"{OURS}: EK-FAC": lambda: jacops.compute_influences(
            model, train, test_data=test, loss=loss, solver=solver, damping=0.1
        ),
        "torch.func: vmap(grad), dense": dense,
    }


class Texts(nn.Module):
    """One block of a transformer over tokens, with logits for each position."""

    def __init__(self, words: int = 64, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `(n, words, positions)`, as cross-entropy takes them."""
        return self.head(self.block(self.embed(tokens))).transpose(1, 2)


def token_gradients(length: int) -> Calls:
    """Return who computes products of the gradients of eight texts."""
    torch.manual_seed(0)
    model, loss = Texts(), nn.functional.cross_entropy
    x, y = torch.randint(64, (8, length)), torch.randint(64, (8, length))
    params = params_of(model)

    def stacked() -> Tensor:
        rows = vmap(grad(lambda p, a, b: loss(functional_call(model, p, (a[None],)), b[None])), (None, 0, 0))
        g = torch.cat([t.flatten(1) for t in rows(params, x, y).values()], 1)
        return g @ g.T

    return {
        f"{OURS}: sample_gradients(…).gram()": lambda: jacops.sample_gradients(model, loss, x, y).gram(),
        "torch.func: vmap(grad)": stacked,
    }


class Chain(nn.Module):
    """Differences of neighbours, tied to the first one: a tridiagonal problem of any size."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(0, 1, n).double())

    def forward(self) -> Tensor:
        """Return residuals, two for each unknown."""
        return torch.cat([self.x[1:] - self.x[:-1] ** 2, 1 - self.x])


def chains(n: int) -> Calls:
    """Return who computes the Jacobian of a chain of n unknowns, first detection included."""
    model = Chain(n)
    calls: Calls = {f"{OURS}: modjac(sparse=True)": lambda: jacops.modjac(Chain(n), None, sparse=True)}
    params = params_of(model)
    return calls | {"torch.func: jacrev": lambda: jacrev(lambda p: functional_call(model, p, ()))(params)}


SERIES = (
    Series(
        "n",
        "input Jacobians, 32-64-8",
        "samples",
        (64, 256, 1024, 4096, 16384),
        lambda n: input_jacobians(mlp(32, 64, 8), torch.randn(n, 32)),
    ),
    Series(
        "outputs",
        "input Jacobians, 64-128-outputs, 256 samples",
        "outputs",
        (4, 16, 64, 256, 1024),
        lambda k: input_jacobians(mlp(64, 128, k), torch.randn(256, 64)),
    ),
    Series(
        "inputs",
        "input Jacobians, inputs-128-16, 256 samples",
        "inputs",
        (8, 32, 128, 512, 2048),
        lambda k: input_jacobians(mlp(k, 128, 16), torch.randn(256, k)),
    ),
    Series(
        "modjac", "parameter Jacobian, 16-width-4, 64 samples", "width", (8, 32, 128, 512, 2048), parameter_jacobians
    ),
    Series(
        "hvp", "Hessian times a vector, 16-width-width-4, 128 samples", "width", (16, 64, 256, 1024), hessian_products
    ),
    Series("hessian", "dense Hessian, 8-width-3, 128 samples", "width", (4, 8, 16, 32, 64, 128), dense_hessians),
    Series("influence", "influences on 16 samples, 20-32-4", "training samples", (256, 1024, 4096, 16384), influences),
    Series("tokens", "gradients of 8 texts, one transformer block", "tokens", (8, 32, 128, 512), token_gradients),
    Series("chain", "sparse Jacobian of a chain, first call", "unknowns", (100, 1000, 10_000, 100_000), chains),
)


def run(series: Series, limit: float, most: int | None) -> Iterator[Point]:
    """Measure a series, and leave a contender out once it was slow or failed."""
    out: dict[str, str] = {}
    for size in [s for s in series.sizes if most is None or s <= most]:
        for name, call in series.calls(size).items():
            if name not in out:
                point = _measured(series.name, name, size, call)
                if point.error or (point.seconds or 0.0) > limit:
                    out[name] = point.error or "slow"
                yield point


def _measured(series: str, name: str, size: int, call: Callable[[], Any]) -> Point:
    try:
        call()  # proofs, plans and imports
        answer, seconds, peak = watched(call, time.process_time)
        del answer
        repeats = range(REPEATS if seconds < 1.0 else 0)
        times = [seconds, *(watched(call, time.process_time)[1] for _ in repeats)]
    except Exception as error:  # a contender that cannot is a finding
        return Point(series, name, size, error=f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
    return Point(series, name, size, min(times), peak)


def exponent(points: Sequence[Point], what: str) -> float | None:
    """Return the slope of log `what` over log size, in the upper half of the sizes; None where there are too few."""
    found = [(p.size, getattr(p, what)) for p in points]
    found = [(size, value) for size, value in found if value and (what != "mib" or value >= LEAST_MIB)]
    found = found[-max(2, (len(found) + 1) // 2) :]
    if len(found) < 2:
        return None
    sizes, values = np.log(np.array(found)).T
    return float(np.polyfit(sizes, values, 1)[0])


def table(points: Sequence[Point]) -> str:
    """Return exponents and the figures at the largest size, as Markdown."""
    lines = [
        "| question | contender | up to | seconds | MiB | time grows as | memory grows as |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for series in SERIES:
        for name in dict.fromkeys(p.contender for p in points if p.series == series.name):
            own = [p for p in points if p.series == series.name and p.contender == name]
            done = [p for p in own if p.seconds is not None]
            failed = next((f", then {p.error}" for p in own if p.error), "")
            if not done:
                lines.append(f"| {series.what} | {name} | {failed[7:]} | | | | |")
                continue
            last = done[-1]
            slopes = [exponent(done, what) for what in ("seconds", "mib")]
            grown = " | ".join("" if s is None else f"{series.axis}^{s:.2f}" for s in slopes)
            lines.append(
                f"| {series.what} | {name} | {last.size:,}{failed} | {last.seconds:.3g} | {last.mib or 0:.0f} "
                f"| {grown} |"
            )
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], path: Any) -> None:
    """Write one panel a question for time, and one below it for memory."""
    from matplotlib import pyplot as plt

    shown = [s for s in SERIES if any(p.series == s.name and p.seconds for p in points)]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, grid = plt.subplots(
        2 * rows, columns, figsize=(4.2 * columns, 4.6 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.set_visible(False)
    for place, series in enumerate(shown):
        for below, (what, unit) in enumerate((("seconds", "seconds"), ("mib", "MiB"))):
            axes = grid[2 * (place // columns) + below, place % columns]
            axes.set_visible(True)
            _panel(axes, [p for p in points if p.series == series.name], what)
            axes.set_ylabel(unit)
            axes.set_xlabel(series.axis if below else "")
            if not below:
                axes.set_title(series.what, fontsize=9)
                axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Any, points: Sequence[Point], what: str) -> None:
    for name in dict.fromkeys(p.contender for p in points):
        own = [(p.size, getattr(p, what)) for p in points if p.contender == name and getattr(p, what)]
        if own:
            ours = name.startswith(OURS)
            axes.plot(
                *zip(*own, strict=True),
                "o-",
                label=name,
                linewidth=2 if ours else 1,
                markersize=4,
                zorder=3 if ours else 2,
            )
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)


def main() -> None:
    """Measure, then write the figures, the table and the plot."""
    names = [s.name for s in SERIES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="SERIES", help=f"all of {', '.join(names)} by default")
    parser.add_argument("--limit", type=float, default=10.0, help="processor seconds of a call after which it stops")
    parser.add_argument("--most", type=int, help="largest size")
    parser.add_argument("--figure", help="also write the plot here")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    points: list[Point] = []
    for series in SERIES:
        if not asked.names or series.name in asked.names:
            note(f"{series.name}: {series.what}")
            for point in run(series, asked.limit, asked.most):
                points.append(point)
                took = point.error or f"{point.seconds:.4g} s, {point.mib or 0:.0f} MiB"
                note(f"  {point.size:>8,} {point.contender}: {took}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in points), encoding="utf-8")
    (RESULTS / "growth.md").write_text(table(points), encoding="utf-8")
    for path in filter(None, (RESULTS / "growth.png", asked.figure)):
        draw(points, path)
    print(table(points))


if __name__ == "__main__":
    main()
