r"""
Pose graph: straighten a robot's path
=====================================

A robot drives through the streets of a town and measures each of its moves: so far
ahead, so far to the side, such a turn. Errors add up, and after some hundred moves the
map is bent. Now and then it comes back to a place and measures where it had been before
(a *loop closure*). *Which path fits all measurements best?* That is a sparse
least-squares problem over poses, elements of the group SE(2). This tutorial solves one
with 600 poses from eight lines of model.
"""

import math

import matplotlib.pyplot as plt
import torch
from matplotlib.collections import LineCollection
from torch import nn

import jacops
from jacops.charts import SE2

# %%
# A town and a drive through it
# -----------------------------
# True poses are needed only to make measurements and to judge the result: x, y and
# heading, a step of one metre each, a crossing every five metres. A pose is measured
# relative to an earlier one that is at most 1.5 m away.

generator = torch.Generator().manual_seed(4)
headings = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)


def drive(count, block=5, limit=12.5):
    place, way, poses = torch.zeros(2, dtype=torch.float64), 0, []
    for step in range(count):
        if step % block == 0:
            turns = torch.tensor([0, 1, 3])[torch.randperm(3, generator=generator)]
            ways = [(way + int(turn)) % 4 for turn in turns]
            far = [(place + block * headings[way]).abs().max() for way in ways]
            way = ways[[bool(at <= limit) for at in far].index(True)]
        heading = torch.tensor([way * math.pi / 2], dtype=torch.float64)
        poses.append(torch.cat([place, heading]))
        place = place + headings[way]
    return torch.stack(poses)


truth = drive(600)
places = truth[:, :2]
near = (torch.cdist(places, places) < 1.5).triu(10).nonzero()
closures = near[torch.randperm(len(near), generator=generator)[:150]]
moves = torch.stack([torch.arange(599), torch.arange(1, 600)], 1)
source, target = torch.cat([moves, closures]).T

# %%
# Measurements have errors of 5 cm and 0.02 rad (about one degree). ``SE2`` is a chart:
# it has functions for poses, in batches. Chaining the moves gives the first
# guess.

deviation = torch.tensor([0.05, 0.05, 0.02], dtype=torch.float64)
errors = torch.randn(len(source), 3, generator=generator, dtype=torch.float64)
exact = SE2.between(truth[source], truth[target])
measured = SE2.compose(exact, SE2.exp(deviation * errors))
guess = [truth[0]]
for move in measured[:599]:
    guess.append(SE2.compose(guess[-1], move))
guess = torch.stack(guess)

# %%
# The model, and one call
# -----------------------
# The output is a row for each measurement: how the pose of the target, seen from the
# source, differs from what was measured, in tangent coordinates. The
# sparsity is detected.


class PoseGraph(nn.Module):
    def __init__(self, poses):
        super().__init__()
        self.poses = nn.Parameter(poses.clone())

    def forward(self):
        between = SE2.between(self.poses[source], self.poses[target])
        return SE2.log(SE2.compose(SE2.inverse(measured), between))


fit = jacops.levenberg_marquardt(
    PoseGraph(guess),
    manifolds={"poses": SE2},
    fixed={"poses": 0},  # no measurement says where the town is
    weight=torch.diag(deviation**-2),  # the information matrix
)
solved = fit.x["poses"]
fit

# %%
# The first line states why the fit ended: no step reduces the objective further. From
# the third step on, predicted and actual reductions agree, so the quadratic model of
# the last steps was right.

# %%
# Before and after
# ----------------

ties = torch.stack([source, target], 1)[599:]
figure, panels = plt.subplots(1, 2, figsize=(5.6, 3.5), layout="constrained")
panels[0].set_ylabel("y (m)")
objectives = (fit.log[0].objective, fit.cost)
for axes, poses, value in zip(panels, (guess, solved), objectives, strict=True):
    axes.plot(*places.T, color="0.75", linewidth=3, label="true path")
    ends = poses[ties][..., :2].numpy()
    axes.add_collection(LineCollection(list(ends), colors="C1", linewidths=0.5))
    axes.plot(*poses[:, :2].T, color="C0", linewidth=1, label="estimate")
    axes.plot([], [], color="C1", label="loop closures")
    axes.set(xlabel="x (m)", aspect="equal", title=f"objective {value:,.0f}")
handles, labels = axes.get_legend_handles_labels()
figure.legend(handles, labels, frameon=False, ncols=3, loc="outside lower center")
plt.show()

# %%
# Which entries the Jacobian has
# ------------------------------
# The Jacobian has 1,800 columns, of which each row touches six. Three backward sweeps
# give all of it, because poses are read by index: the sweep is over the poses of one
# measurement, not over all. Moves make the diagonal, closures the rest.

figure, axes = plt.subplots(figsize=(5.6, 5.6), layout="constrained")
fit.plan.pattern.plot(ax=axes)
plt.show()

# %%
# Is it right?
# ------------
# With weights that are inverse variances, twice the objective over the degrees of
# freedom is 1 if model and noise are right.

freedom = len(fit.fun) - 3 * 599
print(f"2 x objective / {freedom} degrees of freedom = {2 * fit.cost / freedom:.3f}")
for name, poses in {"first guess": guess, "solved": solved}.items():
    error = (poses - truth)[:, :2].square().sum(1).mean().sqrt()
    print(f"{name}: {error:.2f} m from the true path (root mean square)")

# %%
# The covariance of the poses is in tangent coordinates: a step
# moves a pose to :math:`\exp(d)\,X`, which turns it around the origin, so that the
# position moves by :math:`(d_x - d_\varphi\, y,\; d_y + d_\varphi\, x)`. The true
# errors must be inside two standard deviations for about 95 % of the poses (in one
# drive more or fewer: errors of neighbours are correlated).

blocks = torch.as_tensor(fit.covariance(absolute=True)).reshape(599, 3, 599, 3)
blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # of each pose with itself
row = torch.stack([torch.ones(599), torch.zeros(599), -solved[1:, 1]], 1)
spread = torch.einsum("pi,pij,pj->p", row, blocks, row).sqrt()
error = (solved - truth)[1:, 0]

figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
number = torch.arange(1, 600)
label = "± 2 standard deviations"
axes.fill_between(number, -2 * spread, 2 * spread, alpha=0.25, linewidth=0, label=label)
axes.plot(number, error, color="C3", linewidth=1, label="error")
axes.set(xlabel="pose", ylabel="error of x (m)", ylim=(-1.2, 1.2))
axes.legend(frameon=False, loc="upper left", ncols=2)
plt.show()
print(f"{(error.abs() < 2 * spread).double().mean():.0%} of the poses are inside")

# %%
# What next
# ---------
# * A wrong closure distorts the map: ``kernel="cauchy"`` counts it less
#   (:doc:`09_robust_curve_fit`).
# * Other measurements of the same pairs: pass ``jacobian=fit.plan``, and nothing is
#   detected again.
# * Poses in space are ``SE3``; charts of your own, and conventions beside those of
#   PyPose: :doc:`/charts`.
