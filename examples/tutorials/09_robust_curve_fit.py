r"""
Curve fitting with outliers
===========================

A spectrum shows one peak on a sloping background, and a detector that cosmic rays hit
now and then. *Where is the peak, how high is it, and how certain are these numbers?*
Least squares follows the hits. A robust loss counts large residuals less. This tutorial
fits with three losses, checks them against SciPy, and compares four ways to compute
confidence intervals.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import least_squares

import jacops
from jacops.fit import Cauchy, Huber

# %%
# The data
# --------
# 120 channels with normal noise of 0.4 counts. Ten of them were hit, always upwards.

channel = torch.linspace(0, 10, 120, dtype=torch.float64)
names = ["height", "centre", "width", "offset", "slope"]
truth = torch.tensor([10.0, 4.0, 0.8, 2.0, 0.3], dtype=torch.float64)


def spectrum(p, channel):
    height, centre, width, offset, slope = p
    peak = height * torch.exp(-0.5 * ((channel - centre) / width) ** 2)
    return peak + offset + slope * channel


def measure(seed):
    generator = torch.Generator().manual_seed(seed)
    noise = 0.4 * torch.randn(120, generator=generator, dtype=torch.float64)
    hit = torch.randperm(120, generator=generator)[:10]
    noise[hit] += 3 + 12 * torch.rand(10, generator=generator, dtype=torch.float64)
    return spectrum(truth, channel) + noise


counts = measure(seed=4)

# %%
# One call
# --------
# ``kernel=`` names the loss, and ``f_scale=`` the residual from which on it counts
# less: here twice the noise. Derivatives are exact, so there is no step size to choose.
# Cauchy's loss may have several minima; the fit with Huber's, which is convex in the
# residuals, is a good start for it.

scale = 0.8


def fit(kernel, start, channel=channel, counts=counts):
    return jacops.levenberg_marquardt(
        spectrum, (channel,), counts, params=start, kernel=kernel, f_scale=scale
    )


guess = torch.tensor([5.0, 5.0, 1.0, 0.0, 0.0], dtype=torch.float64)
squares, huber = fit("linear", guess), fit("huber", guess)
cauchy = fit("cauchy", huber.x)
fits = {"linear": squares, "huber": huber, "cauchy": cauchy}
cauchy

# %%
# The first lines state which criterion stopped the fit, and why the result is a
# minimum. The parameters:


def table(rows):
    print(" " * 14, *(f"{name:>7}" for name in names))
    for label, values in rows.items():
        print(f"{label:14}", *(f"{float(value):7.3f}" for value in values))


table({"truth": truth, **{kernel: fit.x for kernel, fit in fits.items()}})

# %%

figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
axes.plot(channel, counts, ".", color="0.5", label="measured")
axes.plot(channel, spectrum(squares.x, channel), color="C3", label="least squares")
axes.plot(channel, spectrum(cauchy.x, channel), color="C0", label="Cauchy")
axes.plot(channel, spectrum(truth, channel), "k--", linewidth=1, label="truth")
axes.set(xlabel="channel", ylabel="counts", ylim=(0, 25))
axes.legend(frameon=False, ncols=2, loc="upper right")
plt.show()

# %%
# What the losses do
# ------------------
# A kernel is a function :math:`\rho` of the squared residual. Its slope :math:`\rho'`
# is the weight that a residual has in the fit, 1 for least squares. Huber's falls as
# one over the residual, Cauchy's as one over its square.

residual = np.linspace(0, 5, 200)
figure, axes = plt.subplots(figsize=(5.6, 3.0), layout="constrained")
axes.axhline(1, color="C3", label="least squares")
for colour, kernel in (("C1", Huber(scale)), ("C0", Cauchy(scale))):
    _, weight, _ = kernel(residual**2)
    axes.plot(residual, weight, color=colour, label=type(kernel).__name__)
axes.set(xlabel="residual (counts)", ylabel="weight in the fit", ylim=(0, 1.1))
axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))
plt.show()

# %%
# Comparison with SciPy
# ---------------------
# The objective is that of ``scipy.optimize.least_squares`` with ``loss=``. From the
# same start both must end at the same point.


def residuals(p):
    return (spectrum(torch.as_tensor(p), channel) - counts).numpy()


for kernel, found in fits.items():
    start = huber.x if kernel == "cauchy" else guess
    options = {"loss": kernel, "f_scale": scale, "x_scale": "jac", "xtol": 1e-12}
    theirs = least_squares(residuals, start.numpy(), **options)
    error = np.abs(theirs.x - found.x.numpy()).max()
    print(f"{kernel}: parameters differ by {error:.0e}")

# %%
# Confidence intervals
# --------------------
# ``fit.covariance()`` is :math:`\sigma^2 (J^\top J)^{-1}`, with :math:`\sigma^2`
# estimated from the objective, as SciPy's ``curve_fit`` has it. That is right for least
# squares and normal noise. A robust objective is no estimate of a variance. Right for
# it is the sandwich :math:`A^{-1} B A^{-1}` (Huber, 1967): :math:`A` is the curvature
# of the objective, which is :math:`J^\top J` with the corrected Jacobian ``fit.jac``,
# and :math:`B` the sum of the squared gradients of the samples, :math:`\rho' r J`.

_, weight, _ = Cauchy(scale)(cauchy.fun.numpy() ** 2)
p = cauchy.x.clone().requires_grad_()
(J,) = jacops.full_jacobian(lambda: spectrum(p, channel), [p])
gradients = (weight * cauchy.fun.numpy())[:, None] * J.detach().numpy()
A, B = cauchy.jac.T @ cauchy.jac, gradients.T @ gradients
sandwich = np.linalg.inv(A) @ B @ np.linalg.inv(A)

# %%
# Two checks need nothing but refits. The bootstrap draws channels with replacement. And
# since the data are synthetic, they can be drawn again.

generator = torch.Generator().manual_seed(0)
drawn = [torch.randint(120, (120,), generator=generator) for _ in range(60)]
bootstrap = [fit("cauchy", cauchy.x, channel[d], counts[d]).x for d in drawn]
anew = [fit("cauchy", truth, channel, measure(seed)).x for seed in range(100, 160)]

deviations = {
    "fit.covariance": np.sqrt(np.diag(cauchy.covariance())),
    "sandwich": np.sqrt(np.diag(sandwich)),
    "bootstrap": torch.stack(bootstrap).std(0),
    "measured anew": torch.stack(anew).std(0),
}
table(deviations)

# %%
# The sandwich agrees with both kinds of refits; ``fit.covariance`` is too wide here,
# which is the safe side. An interval of 95 % is 1.96 standard deviations to both sides:

for name, value, deviation in zip(names, cauchy.x, deviations["sandwich"], strict=True):
    print(f"{name:6} {value:7.3f} ± {1.96 * deviation:.3f}")

# %%
# What next
# ---------
# * ``bounds=(lower, upper)`` keeps parameters in a box, ``fixed=`` holds some,
#   ``weight=`` takes known variances.
# * ``print(fit)`` shows every step, ``fit.plot()`` draws them.
# * Parameters that are directions or poses: :doc:`/charts`. Thousands of them:
#   :doc:`10_pose_graph`.
