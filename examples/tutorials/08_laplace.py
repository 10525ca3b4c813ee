r"""
Laplace approximation: error bands for a regression
===================================================

A net was fitted to sixty noisy measurements with a gap between them. *How far can its
predictions be trusted, inside the gap and outside of the data?* The Laplace
approximation (MacKay, 1992) takes the weights for normally distributed around the fit,
with the covariance :math:`\Sigma = (G + \alpha I)^{-1}`: :math:`G` is the Gauss-Newton
matrix of the negative log-likelihood and :math:`\alpha` the precision of the prior. A
prediction :math:`f(x)` with the Jacobian :math:`J(x)` by the weights then has the
variance :math:`J \Sigma J^\top`.

Here that is three calls: ``ggn``, ``inverse`` and ``sample_jacobians``.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import jacops
from jacops.linalg import diagonal

# %%
# Data and net
# ------------

torch.manual_seed(0)
noise = 0.15  # standard deviation of the measurements
precision = 0.3  # of the prior: one over the variance of the weights


def truth(x):
    return torch.sin(2 * x) + 0.3 * x


x = torch.cat([torch.linspace(-3, -1, 30), torch.linspace(0.5, 2.5, 30)])
x = x.double().unsqueeze(1)
y = truth(x) + noise * torch.randn(60, 1, dtype=torch.float64)
net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1)).double()

# %%
# The fit
# -------
# The approximation holds at a minimum of the negative log-posterior. With normal
# noise and a normal prior that is a least-squares problem: the weights themselves are
# a second output, with the target zero. ``levenberg_marquardt`` reports whether the
# result is a minimum, which optimisers for networks do not.


class Posterior(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x), nn.utils.parameters_to_vector(self.net.parameters())


size = sum(parameter.numel() for parameter in net.parameters())
fit = jacops.levenberg_marquardt(
    Posterior(net),
    x,
    target=(y, torch.zeros(size, dtype=torch.float64)),
    weight=[1 / noise**2, precision],
    max_steps=500,
)
print(f"success {fit.success}: {fit.certificate}")

# %%
# Curvature, inverse, Jacobians
# -----------------------------
# ``ggn`` and ``inverse`` are operators, so that the same lines work where no matrix of
# the weights fits into memory.


def negative_log_likelihood(output, target):
    return (output - target).square().sum() / (2 * noise**2)


G = jacops.ggn(net, negative_log_likelihood, x, y)
covariance = jacops.inverse(G, damping=precision)
covariance

# %%

points = torch.linspace(-5, 4.5, 200, dtype=torch.float64).unsqueeze(1)
mean = net(points).detach()[:, 0]
J = jacops.sample_jacobians(net, points).dense()  # a row for each prediction
variance = (J @ covariance * J).sum(1)

# %%
# The picture
# -----------
# Dark: two standard deviations of the net. Light: those of a new measurement, which has
# noise of its own. The band is as narrow as sixty measurements make it where they are,
# opens in the gap, and most where nothing was measured.

deviation, total = variance.sqrt(), (variance + noise**2).sqrt()
figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
for band, alpha in ((total, 0.15), (deviation, 0.35)):
    shade = {"color": "C0", "alpha": alpha, "linewidth": 0}
    axes.fill_between(points[:, 0], mean - 2 * band, mean + 2 * band, **shade)
axes.plot(points, mean, color="C0", label="net, ± 2 standard deviations")
axes.plot(points, truth(points), "--", color="0.4", linewidth=1, label="truth")
axes.plot(x, y, ".", color="C3", markersize=4, label="measurements")
axes.set(xlabel="x", ylabel="y", ylim=(-4, 5))
axes.legend(frameon=False, loc="upper center")
plt.show()

# %%
# Is it right?
# ------------
# Two independent checks. The fit has a covariance, computed from its last Jacobian.
# And a net that is linear in its weights is a Gaussian process whose kernel is
# :math:`k(x, x') = J(x) J(x')^\top / \alpha`: its variance is known from the outputs
# alone, with a matrix of sixty rows.

from_fit = ((J @ torch.as_tensor(fit.covariance(absolute=True))) * J).sum(1)

at_data = jacops.sample_jacobians(net, x).dense()
inner = at_data @ at_data.T / precision
inner += noise**2 * torch.eye(60, dtype=torch.float64)
across = J @ at_data.T / precision
explained = (across * torch.linalg.solve(inner, across.T).T).sum(1)
from_process = (J * J).sum(1) / precision - explained

for name, other in {"fit": from_fit, "Gaussian process": from_process}.items():
    error = (other / variance - 1).abs().max()
    print(f"{name}: variances differ by {error:.0e} at most (relative)")

# %%
# What cheaper covariances lose
# -----------------------------
# Large nets cannot have all of :math:`\Sigma`. The diagonal of :math:`G` leaves out how
# weights make up for each other, and a covariance of the last layer alone takes the
# others for known. Both are one argument or call away.

only_last = J[:, -25:]
G_last = jacops.ggn(net, negative_log_likelihood, x, y, parameters="2.*")
last = jacops.inverse(G_last, damping=precision)
variances = {
    "all weights": variance,
    "last layer": (only_last @ last * only_last).sum(1),
    "diagonal": (J.square() / (diagonal(G) + precision)).sum(1),
}
figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
for name, found in variances.items():
    axes.semilogy(points, found.sqrt(), label=name)
for left, right in ((-3, -1), (0.5, 2.5)):
    axes.axvspan(left, right, color="0.92", zorder=0)
axes.set(xlabel="x (grey: where measurements are)", ylabel="standard deviation")
axes.legend(frameon=False, loc="upper center")
plt.show()

# %%
# What next
# ---------
# * For classification, pass ``torch.nn.functional.cross_entropy`` as the loss. For
#   larger nets, build :math:`G` by ``jacops.Problem(..., reduction="sum")`` over a
#   loader, and invert with ``jacops.solvers.CG()``, or approximately with ``EKFAC()``.
# * :doc:`/recipes/laplace` makes jacops the curvature backend of laplace-torch.
# * The evidence, which chooses noise and prior, needs ``jacops.linalg.logdet`` of
#   :math:`G + \alpha I`. More of its kind: :doc:`/estimators`.
