r"""
Bundle adjustment: cameras and points
=====================================

Twelve cameras look at a sculpture from all sides, and 300 marks on it were found in
their images. *Where were the cameras, and where are the marks?* Bundle adjustment moves
both until the marks, projected into the images, are where they were seen. Its linear
equations are large and have a famous structure: points meet cameras only, so they can
be eliminated first, which leaves the *Schur complement*, a small system over the
cameras. Which parameters are points is not specified; the structure is detected.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse
import torch
from matplotlib.collections import LineCollection
from torch import nn

import jacops
from jacops.charts import SE3, SO3

# %%
# Cameras, marks and images
# -------------------------
# A pose takes points of the world to the axes of a camera, whose image plane is at the
# focal length of 600 pixels. A mark is seen by the cameras on its side, with an error
# of one pixel.

generator = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def project(poses, points):
    seen = SE3.act(poses, points)
    return 600 * seen[..., :2] / seen[..., 2:]


u, v = 2 * math.pi * torch.rand(2, 300, generator=generator, dtype=torch.float64)
wide = 2 + 0.7 * v.cos()
true_points = torch.stack([wide * u.cos(), 0.9 * v.sin(), wide * u.sin()], 1)
turns = torch.zeros(12, 3, dtype=torch.float64)
turns[:, 1] = 2 * math.pi * torch.arange(12) / 12
away = torch.tensor([[0.0, 0.0, 7.0]], dtype=torch.float64).expand(12, 3)
true_cameras = torch.cat([away, SO3.exp(turns)], 1)

depth = [SE3.act(pose.expand(300, 7), true_points)[:, 2] for pose in true_cameras]
camera, point = (torch.stack(depth) < 7.2).nonzero().T
images = project(true_cameras[camera], true_points[point]) + drawn(len(camera), 2)

# %%
# The first guess is wrong by 0.2 m and two degrees for cameras, and by 0.3 m for
# points. Two cameras are known: images alone determine neither position nor scale.

wrong = torch.tensor([0.2] * 3 + [0.03] * 3, dtype=torch.float64)
first_cameras = SE3.retract(true_cameras, wrong * drawn(12, 6))
first_cameras[:2] = true_cameras[:2]
first_points = true_points + 0.3 * drawn(300, 3)

# %%
# The model, and one call
# -----------------------


class Bundle(nn.Module):
    def __init__(self):
        super().__init__()
        self.cameras = nn.Parameter(first_cameras.clone())
        self.points = nn.Parameter(first_points.clone())

    def forward(self):
        return project(self.cameras[camera], self.points[point])


model = Bundle()
before = (model() - images).detach()
fit = jacops.levenberg_marquardt(
    model, target=images, manifolds={"cameras": SE3}, fixed={"cameras": [0, 1]}
)
after = fit.fun.reshape(-1, 2)
fit

# %%
# From above: every point is tied to where it is in truth. Triangles are cameras, and
# crosses where these are in truth.

figure, panels = plt.subplots(1, 2, figsize=(5.6, 3.2), layout="constrained")
first = {"cameras": first_cameras, "points": first_points}
for axes, found, title in zip(panels, (first, fit.x), ("guess", "solved"), strict=True):
    ties = torch.stack([found["points"], true_points], 1)[..., [0, 2]]
    axes.add_collection(LineCollection(list(ties.numpy()), colors="C3", linewidths=0.7))
    axes.plot(*found["points"][:, [0, 2]].T, ".", color="C0", markersize=3)
    for poses, look in ((true_cameras, "kx"), (found["cameras"], "C1^")):
        at = SE3.inverse(poses)[:, [0, 2]]
        axes.plot(*at.T, look, markersize=7, markerfacecolor="none")
    error = (found["points"] - true_points).norm(dim=1).mean()
    axes.set(title=f"{title}: off by {error:.3f} m", xlabel="x (m)", aspect="equal")
panels[0].set_ylabel("z (m)")
plt.show()

# %%
# Reprojection errors
# -------------------
# The camera opposite of the first one: where marks were seen, and the way from there to
# where the estimate puts them.

figure, panels = plt.subplots(2, 1, figsize=(5.6, 6.0), layout="constrained")
own = camera == 6
arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.004}
titles = ("guess", "solved")
for axes, errors, title in zip(panels, (before, after), titles, strict=True):
    axes.plot(*images[own].T, ".", color="C0", markersize=5)
    axes.quiver(*images[own].T, *errors[own].T, color="C3", **arrows)
    root = errors.square().mean().sqrt()
    axes.set(title=f"{title}: root mean square {root:.2f} pixels", ylabel="v (pixels)")
    axes.set(aspect="equal", xlim=(-330, 330), ylim=(-190, 190))
panels[1].set_xlabel("u (pixels)")
plt.show()

# %%
# The errors that are left are those of the images, one pixel, less the share that 960
# free parameters take up:

print(f"{math.sqrt(1 - 960 / after.numel()):.2f} pixels are expected")

# %%
# The structure that was found
# ----------------------------
# Two backward sweeps gave the Jacobian, instead of 984. Below is the matrix of the
# normal equations: a block for each camera and each point, and one where a camera
# sees a point. ``"sparse_cholesky"`` orders the columns so that those without entries
# in common, here the points, are eliminated first and many at once. What is left is
# the Schur complement.

normal = scipy.sparse.csr_array(fit.jac.T @ fit.jac)
figure, axes = plt.subplots(figsize=(5.2, 5.2), layout="constrained")
axes.spy(normal[:240, :240], markersize=1, color="C0")
axes.axvline(59.5, color="C3", linewidth=1)
axes.axhline(59.5, color="C3", linewidth=1)
axes.set_title("ten cameras (6 columns each), and the first 60 points", fontsize=10)
axes.set(xlabel="column", ylabel="row")
plt.show()
print(f"{fit.plan.sweeps} sweeps; steps by {fit.log[0].solver}")

# %%
# Is it right?
# ------------
# The covariance of the cameras is the inverse of the Schur complement
# :math:`A - B D^{-1} B^\top`. Make that one by hand, from the blocks of the picture,
# and compare.

A, B, D = normal[:60, :60], normal[:60, 60:].toarray(), normal[60:, 60:].toarray()
schur = A.toarray() - B @ np.linalg.solve(D, B.T)
covariance = fit.covariance(range(60), absolute=True)  # errors of one pixel
error = np.abs(np.linalg.inv(schur) - covariance).max() / covariance.max()
print(f"relative difference {error:.0e}")

# %%
# What next
# ---------
# * Focal lengths and distortions are more columns of ``cameras``: make the chart
#   ``Product(SE3, R(3))``.
# * Wrong matches: ``kernel="huber"`` (:doc:`09_robust_curve_fit`). Ten thousand points
#   and more: install the extra ``fast``.
# * The same call straightens the path of a robot: :doc:`10_pose_graph`. Charts:
#   :doc:`/charts`.
