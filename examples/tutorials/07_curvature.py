r"""
Curvature: sharp and flat minima
================================

Two runs of gradient descent reach about the same loss. *Did they end in the same kind
of minimum?* The eigenvalues of the Hessian :math:`H` of the training loss answer this:
in a sharp minimum the loss rises fast along some direction, in a flat one slowly along
all of them. This tutorial trains two nets that differ in their learning rate only, and
takes the largest eigenvalues, the trace and the whole spectrum of each Hessian without
ever forming it.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import jacops
from jacops.linalg import eigenpairs, spectral_density, trace

# %%
# Data and two nets
# -----------------
# Images of digits, 8 by 8 pixels, a net of 1,510 parameters, and the squared error to
# one-hot labels. Gradient descent on all samples has no noise, so the learning rate is
# all that is different. Every 200 steps the largest eigenvalue is kept, for the last
# figure.

digits = load_digits()
x = torch.as_tensor(digits.data[:500]) / 16
y = nn.functional.one_hot(torch.as_tensor(digits.target[:500]), 10).double()


def loss(output, target):
    return 0.5 * (output - target).square().sum(1).mean()


def hessian(net):
    return jacops.Problem(net, loss, [(x, y)]).hessian()


def train(rate, steps=2000, every=200):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)).double()
    descent = torch.optim.SGD(net.parameters(), lr=rate)
    sharpness = []
    for step in range(steps + 1):
        if step % every == 0:
            top = eigenpairs(hessian(net), tolerance=1e-3)
            sharpness.append((step, float(top.values[0])))
        descent.zero_grad()
        loss(net(x), y).backward()
        descent.step()
    return net, sharpness


rates = {"small steps": 0.1, "large steps": 0.3}
runs = {name: train(rate) for name, rate in rates.items()}
nets = {name: net for name, (net, _) in runs.items()}

# %%
# One call
# --------
# ``jacops.Problem`` is the objective: model, loss and data (a loader, for more data
# than fits into memory). Its Hessian is an operator that is multiplied and never
# formed. The repr lists its known properties.

operators = {name: hessian(net) for name, net in nets.items()}
operators["small steps"]

# %%
# The largest eigenvalues come with residuals: an eigenvalue of :math:`H` lies within
# each residual of the value beside it. This certificate is recomputed from :math:`H`
# itself.

top = {name: eigenpairs(H, 12) for name, H in operators.items()}
top["small steps"]

# %%
# Is it right?
# ------------
# Walk along the leading eigenvector and measure the loss. Near the minimum it must
# follow the parabola that the eigenvalue predicts,
# :math:`L(0) + g\,t + \tfrac12 \lambda t^2` (dashed; :math:`g` is the slope that is
# left).


def losses_along(net, direction, distances):
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    found = []
    with torch.no_grad():
        for t in distances:
            nn.utils.vector_to_parameters(start + t * direction, net.parameters())
            found.append(float(loss(net(x), y)))
        nn.utils.vector_to_parameters(start, net.parameters())
    return torch.tensor(found)


t = torch.linspace(-0.3, 0.3, 41, dtype=torch.float64)
figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
for colour, (name, net) in zip(("C3", "C0"), nets.items(), strict=True):
    value, gradient = jacops.Problem(net, loss, [(x, y)]).value_and_gradient()
    direction, sharpest = top[name].vectors[0], top[name].values[0]
    parabola = value + t * (gradient @ direction) + sharpest * t**2 / 2
    label = f"{name}: λ = {sharpest:.1f}"
    axes.plot(t, losses_along(net, direction, t), color=colour, label=label)
    axes.plot(t, parabola, "--", color=colour, linewidth=1)
axes.set(xlabel="distance along the leading eigenvector", ylabel="training loss")
axes.legend(frameon=False, loc="upper center")
plt.show()

# %%
# A net this small also has a Hessian that can be formed, and all its eigenvalues with
# it.

for name, H in operators.items():
    exact = torch.linalg.eigvalsh(H.dense()).flip(0)
    error = float((exact[:12] - top[name].values).abs().max() / exact[0])
    print(f"{name}: the twelve largest agree to {error:.0e} of the first;")
    print(f"  the sum of all is {exact.sum():.3f}, the trace {trace(H).value:.3f}")

# %%
# For a larger net the trace is estimated from random vectors, with a standard error.
# Forty products are enough here.

print(trace(operators["small steps"], probes=40))

# %%
# The whole spectrum
# ------------------
# Its density comes from random probes by Lanczos quadrature, with a band of two
# standard errors. Most of the 1,510 eigenvalues are nearly zero: the loss does not
# change along these directions. A few stand out.

figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
for colour, (name, H) in zip(("C3", "C0"), operators.items(), strict=True):
    density = spectral_density(H, probes=6, steps=60, width=0.15)
    density.plot(ax=axes, color=colour, label=name)
    print(f"{name}: share within 0.01 of zero {density.share(-0.01, 0.01)}")
plt.show()

# %%
# Why the learning rate decides
# -----------------------------
# Along a direction of curvature :math:`\lambda`, gradient descent with the rate
# :math:`\eta` multiplies the error by :math:`1 - \eta\lambda`: it is stable only where
# :math:`\lambda < 2/\eta`. Training sharpens the minimum until this limit is met, and
# then stays beside it (Cohen et al., 2021). Large steps cannot stay in a sharp valley.

figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
for colour, (name, (_, sharpness)) in zip(("C3", "C0"), runs.items(), strict=True):
    limit, label = 2 / rates[name], f"2 / {rates[name]}"
    axes.plot(*zip(*sharpness, strict=True), "o-", color=colour, label=name)
    axes.axhline(limit, color=colour, linestyle="--", linewidth=1)
    axes.text(2000, limit - 1.3, label, color=colour, ha="right")
axes.set(xlabel="step of gradient descent", ylabel="largest eigenvalue", ylim=(0, 22))
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.92))
plt.show()

# %%
# What next
# ---------
# * ``Problem(...).ggn()`` is the Gauss-Newton part of the Hessian: positive, and cheap
#   to hold as factors of layers.
# * Sharpness depends on how the net is written: scaling one layer up and the next one
#   down changes it, and not the function (Dinh et al., 2017). Compare nets of one
#   architecture, trained in the same way.
# * :doc:`/estimators` lists other properties of operators: norms, diagonals, effective
#   dimensions.
# * The same operators answer which training samples matter: :doc:`/influence`.
