"""Question 1: which features does each coordinate of an embedding depend on?

A small piecewise-linear network places 569 breast tumours on a plane, from 8 principal components of 30
measurements. Its output is taken apart, exactly, into one part per measurement and one from the biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import jacops
from jacops._extras.report import Report
from questions import Answer, look

QUESTION = "Which features does each embedding coordinate depend on?"
COMPONENTS = 8
CODE = """
back = jacops.attribution.projection(pca)
found = jacops.contributions(net, reduced, projection=back, features=rows)
found.values         # (569, 2, 30): what each measurement adds to each coordinate
found.bias           # (569, 2): what the biases add
found.verification   # values + bias against the output
"""


@dataclass
class Tumours:
    """The tumours: standardised measurements, their whitened components, and what they were found to be."""

    rows: Tensor  # (569, 30), each column of mean 0 and deviation 1
    reduced: Tensor  # (569, 8)
    malignant: np.ndarray  # (569,)
    names: list[str]
    pca: PCA


def load() -> Tumours:
    """Return the data; the file is part of scikit-learn."""
    data = load_breast_cancer()
    rows = StandardScaler().fit_transform(data.data)
    pca = PCA(COMPONENTS, whiten=True, random_state=0).fit(rows)
    reduced = torch.from_numpy(pca.transform(rows))
    return Tumours(torch.from_numpy(rows), reduced, data.target == 0, [str(name) for name in data.feature_names], pca)


def stress(embedded: Tensor, rows: Tensor) -> float:
    """How far distances on the plane are from those between the rows: 0 is perfect, 1 is all in one point."""
    far, drawn = torch.pdist(rows), torch.pdist(embedded)
    return float(((drawn - far).square().sum() / far.square().sum()).sqrt())


def train(tumours: Tumours, steps: int) -> nn.Module:
    """Fit an encoder whose distances on the plane are those between tumours in all 30 measurements."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(COMPONENTS, 32), nn.PReLU(32), nn.Linear(32, 32), nn.PReLU(32), nn.Linear(32, 2)
    ).double()
    far = torch.cdist(tumours.rows, tumours.rows)
    first, second = torch.triu_indices(len(far), len(far), offset=1)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        some = torch.randint(len(first), (20_000,))
        i, j = first[some], second[some]
        embedded = net(tumours.reduced)
        drawn = (embedded[i] - embedded[j]).square().sum(1).add(1e-12).sqrt()
        loss = (drawn - far[i, j]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():  # distances do not fix the axes: turn the widest direction onto the first one
        last, embedded = net[-1], net(tumours.reduced)
        centre = embedded.mean(0)
        turn = torch.linalg.svd(embedded - centre, full_matrices=False).Vh
        turn *= (turn @ (embedded[tumours.malignant] - centre).mean(0)).sign()[:, None]  # malignant points right, up
        last.weight.copy_(turn @ last.weight)
        last.bias.copy_(turn @ (last.bias - centre))
    return net.eval()


def draw_plane(tumours: Tumours, embedded: np.ndarray, chosen: int) -> look.Figure:
    """The embedding itself, and how well it keeps distances."""
    figure, (left, right) = look.axes_in_a_row(4.3, 1.15, 1)
    for what, colour, of in (("benign", look.BLUE, ~tumours.malignant), ("malignant", look.ORANGE, tumours.malignant)):
        left.scatter(*embedded[of].T, s=13, color=colour, alpha=0.7, linewidth=0, label=f"{what} ({of.sum()})")
    left.scatter(*embedded[chosen], s=120, facecolor="none", edgecolor="black", linewidth=1.5)
    left.annotate(
        f"tumour {chosen}", embedded[chosen], (0.03, 0.05), textcoords="axes fraction",
        arrowprops={"arrowstyle": "-", "linewidth": 0.8, "shrinkB": 6},
    )  # fmt: skip
    left.set(title="on the plane", xlabel="coordinate 1 (standard deviations)", ylabel="coordinate 2")
    left.set_aspect("equal", adjustable="datalim")
    left.legend(loc="upper left", handletextpad=0.1)

    pairs = np.random.default_rng(0).integers(0, len(embedded), (2, 2500))
    far = np.linalg.norm(tumours.rows.numpy()[pairs[0]] - tumours.rows.numpy()[pairs[1]], axis=1)
    drawn = np.linalg.norm(embedded[pairs[0]] - embedded[pairs[1]], axis=1)
    right.scatter(far, drawn, s=6, color=look.GREY, alpha=0.5, linewidth=0)
    right.plot([0, far.max()], [0, far.max()], color="black", linewidth=1)
    right.set(title="distances kept", xlabel="distance in 30 measurements (standard deviations)")
    right.set(ylabel="distance on the plane", xlim=(0, None), ylim=(0, None))
    for axes in (left, right):
        axes.grid(True)
    return figure


def draw_sizes(names: list[str], sizes: np.ndarray, bias: np.ndarray, top: int = 12) -> look.Figure:
    """Mean size of each feature's part, for both coordinates."""
    figure, both = look.axes_in_a_row(4.2, 1, 1)
    for o, axes in enumerate(both):
        order = np.argsort(-sizes[o])[:top][::-1]
        axes.barh(["biases"], bias[o], color=look.GREY, height=0.7)
        axes.barh([names[f] for f in order], sizes[o, order], color=look.BLUE, height=0.7)
        axes.set(title=f"coordinate {o + 1}", xlabel="mean |contribution| (standard deviations)")
        axes.tick_params(axis="y", length=0)
        axes.grid(True, axis="x")
    return figure


def draw_one(names: list[str], parts: np.ndarray, bias: float, output: float, title: str, top: int = 9) -> look.Figure:
    """One tumour's coordinate as a sum: the largest parts, the rest, the biases, the output."""
    order = np.argsort(-np.abs(parts))
    labels = [*(names[f] for f in order[:top]), f"the other {len(names) - top} features", "biases"]
    steps = np.array([*parts[order[:top]], parts[order[top:]].sum(), bias])
    starts = np.cumsum(steps) - steps
    figure, (axes,) = look.axes_in_a_row(3.8, 1)
    colours = [look.GREY if name == "biases" else look.ORANGE if step > 0 else look.BLUE
               for name, step in zip(labels, steps, strict=True)]  # fmt: skip
    axes.barh(labels, steps, left=starts, color=colours, height=0.7)
    axes.barh(["output of the network"], output, color="black", height=0.7)
    for y, (start, step) in enumerate(zip(starts, steps, strict=True)):
        axes.annotate(look.signed(step), (max(start, start + step), y), (4, 0), textcoords="offset points", va="center")
    axes.annotate(look.signed(output), (max(output, 0), len(labels)), (4, 0), textcoords="offset points", va="center")
    axes.axvline(0, color="black", linewidth=0.7)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set(title=title, xlabel="coordinate 1 (standard deviations)")
    return figure


def odd_one(embedded: np.ndarray, malignant: np.ndarray) -> int:
    """The malignant tumour that lies deepest among the benign ones."""
    apart = np.linalg.norm(embedded[:, None] - embedded[None], axis=2)
    nearest = np.argsort(apart, axis=1)[:, 1:26]
    benign_around = (~malignant)[nearest].mean(1) - 1e-3 * np.sort(apart, axis=1)[:, 25]
    return int(np.argmax(np.where(malignant, benign_around, -np.inf)))


def ask(report: Report, *, quick: bool = False) -> Answer:
    """Train, take the embedding apart, and write the section."""
    answer = Answer(QUESTION)
    with answer.timed("train the encoder"):
        tumours = load()
        net = train(tumours, steps=60 if quick else 500)
    with answer.timed("contributions, 569 tumours"):
        projection = jacops.attribution.projection(tumours.pca)
        found = jacops.contributions(net, tumours.reduced, projection=projection, features=tumours.rows)

    parts, bias, embedded = (np.asarray(part) for part in (found.values, found.bias, found.output))
    sizes, bias_sizes = np.abs(parts).mean(0), np.abs(bias).mean(0)
    shares = sizes / (sizes.sum(1) + bias_sizes)[:, None]
    bias_shares = bias_sizes / (sizes.sum(1) + bias_sizes)
    slopes = np.asarray(found.jacobian).mean(0)
    names, best = tumours.names, np.argsort(-sizes, axis=1)
    centred = tumours.rows - torch.as_tensor(projection.mean)
    without = jacops.verify_jacobian(embedded, np.asarray(found.jacobian), centred.numpy())
    seen = found.verification
    plane = stress(found.output, tumours.rows)
    straight = stress(torch.from_numpy(PCA(2).fit_transform(tumours.rows.numpy())), tumours.rows)
    chosen = odd_one(embedded, tumours.malignant)

    answer.finding = "By mean size of the contributions, " + "; ".join(
        f"coordinate {o + 1} rests most on "
        + ", ".join(f"{names[f]} ({shares[o, f]:.1%})" for f in best[o, :3])
        + f", with {bias_shares[o]:.1%} left to the biases"
        for o in range(2)
    )
    answer.finding += "."
    answer.certificate = {
        "features + biases = output": f"largest error {seen.max_error:.1e}, "
        f"{seen.relative_error:.1e} of the largest output",
        "bias part": "computed on its own, without the output: so the check above can fail",
        "the same sum without biases": f"misses by {without.relative_error:.1%} of the largest output",
        "coverage": f"{len(parts)} of {len(tumours.rows)} tumours, {parts.shape[2]} features, both coordinates",
    }
    if found.notes:
        answer.certificate["notes"] = "; ".join(found.notes)

    report.section(QUESTION, answer.finding)
    report.text(
        f'Each of {len(parts)} breast tumours comes with {len(names)} measurements of its cell nuclei ("worst": '
        f"the mean of the three largest), standardised to deviation 1; {COMPONENTS} whitened principal components "
        "of them enter a small network with biases and PReLU units, trained to place tumours so that distances on "
        "the plane equal distances between the measurements. It never sees the diagnosis. Its distances are off by "
        f"{plane:.0%} (root mean square); the best flat projection, two principal components, is off by {straight:.0%}."
    )
    report.code(CODE)
    report.figure(
        draw_plane(tumours, embedded, chosen),
        "Left: the embedding, one dot per tumour. The ringed one is malignant and lies deepest among the benign; it is "
        "taken apart below. Right: 2,500 pairs of tumours; on the line, the plane keeps their distance.",
    )
    report.text(
        "Around any one tumour such a network is a straight map: output = slopes × features + a constant from its "
        "biases. The slopes are the Jacobian, carried back through the whitened components to the 30 measurements. "
        "A feature's contribution is its slope times its distance from the mean, so contributions and bias part "
        "add up to the output exactly. They account for what this network computes; they do not say what causes "
        "a tumour, and measurements that vary together share the credit."
    )
    report.figure(
        draw_sizes(names, sizes, bias_sizes),
        "Mean size of each contribution over all tumours: the twelve largest features for each coordinate, and "
        "the bias part below them.",
    )
    lengths = np.asarray(jacops.reduce_contributions(parts, "l2")).mean(0)
    report.table(
        ["feature", "coordinate 1", "slope 1", "coordinate 2", "slope 2", "both (length)"],
        [
            [names[f], f"{shares[0, f]:.1%}", look.signed(slopes[0, f], 3),
             f"{shares[1, f]:.1%}", look.signed(slopes[1, f], 3), f"{lengths[f]:.3f}"]
            for f in np.argsort(-lengths)[:10]
        ],
        "The ten features that move the embedding most. Coordinate: share of all mean |contributions|. Slope: mean "
        "change of the coordinate per standard deviation of the feature. Length: mean over tumours of the "
        "contribution's length on the plane, the same however the plane is turned.",
    )  # fmt: skip
    report.figure(
        draw_one(names, parts[chosen, 0], bias[chosen, 0], embedded[chosen, 0],
                 f"tumour {chosen} (malignant): how coordinate 1 comes about"),
        "Read from top to bottom: every bar begins where the one above ends. Orange pushes towards the malignant "
        "side, blue towards the benign side; the last bar is what the network puts out.",
    )  # fmt: skip
    report.certificate(answer.certificate)
    return answer
