"""Draw the picture at the top of the README: one panel for each of the three questions, in half a minute.

python examples/overview.py docs/_static/overview.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from questions import look
from sklearn.datasets import load_digits
from synthetic_graphs import walk_graph
from torch import Tensor, nn

import jacops


def classifier(x: Tensor, y: Tensor) -> nn.Module:
    """Return a small network fitted to labelled digits, with some weight decay."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).double()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(250):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net


def draw_features(axes: Axes, net: nn.Module, x: Tensor, y: Tensor) -> None:
    """One digit, and what each pixel adds to the evidence for a 3 against an 8."""
    three = x[y == 3][:20]
    evidence = jacops.contributions(net, three, outputs=lambda logits: logits[:, 3:4] - logits[:, 8:9])
    parts = evidence.values.reshape(len(three), 64)
    chosen = int(parts.sum(1).argmax())
    pixels, added = three[chosen].reshape(8, 8), parts[chosen].reshape(8, 8)
    bound = float(added.abs().max())
    image = axes.imshow(added, cmap="RdBu_r", vmin=-bound, vmax=bound)
    rows, columns = np.mgrid[:8, :8]
    axes.scatter(columns, rows, s=70 * pixels, color="k", linewidth=0)
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.spines[:].set_visible(False)
    axes.set_title("Which features?", fontweight="bold", loc="left")
    axes.set_xlabel("evidence for 3 (red), 8 (blue)")
    axes.figure.colorbar(image, ax=axes, shrink=0.75, pad=0.03)


def draw_samples(axes: Axes, net: nn.Module, x: Tensor, given: Tensor, flipped: Tensor) -> None:
    """How many wrong labels are found, by how many are checked."""
    scores = jacops.self_influences(net, [(x, given)], loss=nn.functional.cross_entropy)
    order = scores.argsort(descending=True)
    found = flipped[order].cumsum(0).numpy()
    looked = np.arange(1, len(x) + 1)
    axes.plot(looked, found, color=look.ORANGE, label="by influence")
    axes.plot(looked, looked * int(flipped.sum()) / len(x), color=look.GREY, linewidth=1, label="at random")
    axes.set(xlim=(0, 300), ylim=(0, int(flipped.sum()) + 2), xlabel="labels checked (of 1,000)")
    axes.set_title("Which training points?", fontweight="bold", loc="left")
    axes.set_ylabel("wrong labels found (of 60)")
    axes.legend(loc="center right")
    axes.grid(True)


def draw_step(before: Axes, after: Axes) -> None:
    """A robot's path from its odometry, and after a few least-squares steps."""
    graph = walk_graph(700, 900, side=8, noise=0.015)
    fit = jacops.levenberg_marquardt(
        graph.residual(), manifolds={"poses": graph.chart}, weight=graph.weights, fixed={"poses": graph.anchors}
    )
    for axes, poses in ((before, graph.poses), (after, fit.x["poses"])):
        ends = torch.stack([poses[graph.source, :2], poses[graph.target, :2]], 1)
        axes.add_collection(LineCollection(ends.numpy(), colors=look.BLUE, linewidths=0.7))
        axes.autoscale()
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    before.set_title("Which step?", fontweight="bold", loc="left")
    before.set_xlabel("700 poses, measured")
    after.set_xlabel(f"after {len(fit.log)} steps")


def main(file: Path) -> None:
    """Draw the panels and write the file."""
    look.use_style()
    digits = load_digits()
    x, y = torch.from_numpy(digits.data[:1000] / 16), torch.from_numpy(digits.target[:1000]).long()
    generator = torch.Generator().manual_seed(1)
    flipped = torch.zeros(len(x), dtype=torch.bool)
    flipped[torch.randperm(len(x), generator=generator)[:60]] = True
    given = torch.where(flipped, (y + torch.randint(1, 10, y.shape, generator=generator)) % 10, y)
    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    features, samples, before, after = figure.subplots(1, 4, width_ratios=(1.15, 1.35, 1, 1))
    draw_features(features, classifier(x, y), x, y)
    draw_samples(samples, classifier(x, given), x, given, flipped)
    draw_step(before, after)
    figure.savefig(file, dpi=200)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
