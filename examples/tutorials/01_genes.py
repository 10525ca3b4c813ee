"""
Which genes place a cell?
=========================

A neural network maps cells to a plane, as parametric UMAP does. Which genes decide
where a cell lies? For a network of linear layers and ReLU the answer is exact: each
coordinate is a sum of one part for each gene and one part for the biases. The parts go
through the PCA in front of the network, so they belong to genes and not to components.

The counts here are synthetic, so the right answer is known: each cell type has eight
marker genes.
"""

import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.decomposition import PCA
from sklearn.neighbors import kneighbors_graph

import jacops

# %%
# Synthetic counts
# ----------------
#
# There are 600 cells of four types and 300 genes. A gene's mean expression is drawn at
# random; a type expresses its markers six times as much. Counts are negative binomial,
# and cells differ in how deeply they were sequenced. Before the PCA they are scaled to
# equal depth and logarithms are taken, as usual.

rng = np.random.default_rng(0)
types = ["B cell", "T cell", "NK cell", "monocyte"]
kind = rng.integers(len(types), size=600)
genes = [f"{name.split()[0]}-marker{i}" for name in types for i in range(8)]
genes += [f"gene{i}" for i in range(300 - len(genes))]

mean = np.tile(rng.gamma(1.0, 1.0, size=300) + 0.1, (600, 1))
for number in range(len(types)):
    mean[np.ix_(kind == number, range(8 * number, 8 * number + 8))] *= 6
mean *= rng.lognormal(0, 0.3, size=(600, 1))
counts = rng.poisson(mean * rng.gamma(4, 1 / 4, size=mean.shape))
depth = counts.sum(1, keepdims=True)
expression = np.log1p(counts / depth * np.median(depth))

pca = PCA(20, random_state=0).fit(expression)
x = torch.from_numpy(pca.transform(expression))

# %%
# The encoder
# -----------
#
# It is trained with the loss of UMAP: neighbours attract each other, random pairs
# repel each other. Cell types are not part of the training data. Double precision
# costs little at this size, and lets the checks below be strict.

torch.manual_seed(0)
graph = kneighbors_graph(x.numpy(), 15).nonzero()
start, end = (torch.from_numpy(side).long() for side in graph)
nn = torch.nn
encoder = nn.Sequential(
    nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
).double()


def squared_distance(z, i, j):
    return (z[i] - z[j]).square().sum(1)


optimiser = torch.optim.Adam(encoder.parameters(), lr=3e-3)
for _ in range(400):
    z, edge = encoder(x), torch.randint(len(start), (2000,))
    near = squared_distance(z, start[edge], end[edge])
    far = squared_distance(z, *torch.randint(600, (2, 10_000)))
    loss = torch.log1p(near).mean() + 5 * torch.log1p(1 / (far + 0.01)).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

# %%
# One call
# --------
#
# ``projection=`` is the fitted PCA, ``features=`` are the rows that it was fitted to.
# The contribution of a gene is the derivative of a coordinate by the gene, times the
# gene's expression minus its mean.

found = jacops.contributions(
    encoder, x, projection=pca, features=expression, names=genes
)
found

# %%
# Markers of a type
# -----------------
#
# The coordinates themselves mean nothing; directions between types do. For each type,
# take the contributions along the direction from the other cells to its own, and their
# mean over its cells. Below each type stand the three genes with the largest mean.

z = found.output
along = torch.zeros(len(types), len(genes), dtype=torch.float64)
for number in range(len(types)):
    own = torch.from_numpy(kind == number)
    direction = z[own].mean(0) - z[~own].mean(0)
    direction /= direction.norm()
    along[number] = (found.values[own] * direction[:, None]).sum(1).mean(0)

figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
box = {"facecolor": "white", "alpha": 0.85, "linewidth": 0}
for number, name in enumerate(types):
    own = kind == number
    axes.scatter(*z[own].T, s=14, color=f"C{number}", alpha=0.6, linewidth=0)
    strongest = [genes[i] for i in along[number].topk(3).indices]
    words = "\n".join([name.upper(), *strongest])
    axes.text(*z[own].mean(0), words, ha="center", va="center", fontsize=9, bbox=box)
axes.set(xlabel="coordinate 0", ylabel="coordinate 1")
axes.set_title("600 cells, and the genes that place them")
plt.show()

# %%
# Neither types nor markers were used in training. How many of the eight genes with the
# largest mean of each type are its markers?

for number, name in enumerate(types):
    strongest = along[number].topk(8).indices
    print(f"{name:9} {int((strongest // 8 == number).sum())} of 8")

# %%
# The same as a picture: the contributions of all markers and of eight other genes.

most = float(along.abs().max())
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
picture = along[:, :40].numpy()
image = axes.imshow(picture, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
axes.set_yticks(range(4), types)
groups = [*(f"{name}\nmarkers" for name in types), "other\ngenes"]
axes.set_xticks([8 * i + 3.5 for i in range(5)], groups, fontsize=9)
axes.vlines([7.5, 15.5, 23.5, 31.5], -0.5, 3.5, color="black", linewidth=0.8)
axes.set_title("mean contribution towards a cell's own type")
figure.colorbar(image, ax=axes, label="units of the embedding")
plt.show()

# %%
# One cell
# --------
#
# A waterfall adds the parts up, from the biases to the coordinate of a cell. Figures
# are matplotlib's and can be changed further.

cell = int(np.argmax(kind == 0))
found.plot(sample=cell, output=0, kind="waterfall", k=10)

# %%
# Is it right?
# ------------
#
# The line *output* of the result above compares two independently computed numbers:
# the output of the network, and the sum of all parts, whose bias part was propagated
# through the network operation by operation. Here the comparison is made by hand, and
# then one derivative by finite differences through PCA and network.

error = found.values.sum(2) + found.bias - encoder(x).detach()
print(f"genes + biases - output: at most {error.abs().max():.1e}")

moved = expression[:1].copy()
moved[0, 0] += 1e-6
with torch.no_grad():
    slope = (encoder(torch.from_numpy(pca.transform(moved))) - encoder(x[:1]))[0] / 1e-6
print(f"derivative by {genes[0]}: {found.jacobian[0, :, 0].tolist()}")
print(f"by finite differences: {slope.tolist()}")

# %%
# Next
# ----
#
# * :doc:`/attribution`: scalers and pipelines in front of a model, groups of genes, an
#   HTML report (``to_html``).
# * :doc:`/integrated`: networks that are not piecewise linear (GELU, softmax, tanh).
# * :doc:`/recipes/single_cell`: the same with 700 real blood cells from scanpy.
