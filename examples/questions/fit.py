"""Question 3: which step shrinks a residual?

A decay measured with noise is fitted by Gauss-Newton: the Jacobian of the residual with respect to the model's
parameters, a least-squares solve, a step; halved while it does not help.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

import jacops
from jacops._extras.report import Report
from questions import Answer, look

QUESTION = "Which step shrinks a residual?"
CODE = """
J = jacops.modjac(model, t, flatten=True)   # (measurements, parameters)
step = torch.linalg.lstsq(J, -residual[:, None]).solution
"""
NAMES = {"fast": "fast part (mV)", "fast_rate": "fast rate (1/s)", "slow": "slow part (mV)",
         "slow_rate": "slow rate (1/s)", "offset": "offset (mV)"}  # fmt: skip
TRUTH = (6.0, 2.5, 3.0, 0.35, 0.8)
START = (3.0, 1.0, 3.0, 0.1, 0.0)
NOISE = 0.08  # mV


class Decay(nn.Module):
    """A signal that fades in two ways: y(t) = fast e^(-fast_rate t) + slow e^(-slow_rate t) + offset."""

    def __init__(self, values: tuple[float, ...]) -> None:
        super().__init__()
        for name, value in zip(NAMES, values, strict=True):
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))

    def forward(self, t: Tensor) -> Tensor:
        """Return the signal at times `t`, (n,)."""
        return self.fast * torch.exp(-self.fast_rate * t) + self.slow * torch.exp(-self.slow_rate * t) + self.offset


@dataclass
class Step:
    """The state before a step, and the share of the full step that was taken from there."""

    residual: float
    gradient: float
    taken: float | None
    length: float | None


def residual_of(model: nn.Module, t: Tensor, y: Tensor) -> Tensor:
    """What the model leaves unexplained, (n,)."""
    with torch.no_grad():
        return model(t) - y


def put(model: nn.Module, values: Tensor) -> None:
    """Set the model's parameters from one flat vector."""
    nn.utils.vector_to_parameters(values, model.parameters())


def gauss_newton(model: nn.Module, t: Tensor, y: Tensor, tolerance: float = 1e-10, max_steps: int = 50) -> list[Step]:
    """Fit in place; stop when the gradient is `tolerance` of its first length, or when no step helps."""
    history: list[Step] = []
    for _ in range(max_steps):
        here, r = nn.utils.parameters_to_vector(model.parameters()).detach(), residual_of(model, t, y)
        jacobian = jacops.modjac(model, t, flatten=True)
        gradient = float((jacobian.T @ r).norm())
        history.append(Step(float(r.norm()), gradient, None, None))
        if gradient <= tolerance * history[0].gradient:
            break
        step = torch.linalg.lstsq(jacobian, -r[:, None]).solution[:, 0]
        share = 1.0
        put(model, here + step)
        while not residual_of(model, t, y).norm() < r.norm() and share > 1e-4:
            share /= 2
            put(model, here + share * step)
        history[-1].taken, history[-1].length = share, share * float(step.norm())
        if share <= 1e-4:
            put(model, here)
            break
    return history


def draw_fit(t: Tensor, y: Tensor, start: nn.Module, fitted: nn.Module) -> look.Figure:
    """Data, first guess and fit above; what is left below."""
    figure = look.Figure(figsize=(8.6, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
    fine = torch.linspace(0, float(t.max()), 400, dtype=torch.float64)
    zero = torch.zeros_like(fine)
    above.scatter(t, y, s=12, color=look.GREY, alpha=0.8, linewidth=0, label="measured")
    above.plot(fine, residual_of(start, fine, zero), "--", color=look.BLUE, label="first guess")
    above.plot(fine, residual_of(fitted, fine, zero), color=look.ORANGE, label="Gauss-Newton")
    above.set(ylabel="signal (mV)")
    above.legend(loc="upper right")
    below.axhspan(-2 * NOISE, 2 * NOISE, color=look.GREY, alpha=0.2, linewidth=0)
    below.axhline(0, color="black", linewidth=0.7)
    below.scatter(t, residual_of(fitted, t, y), s=12, color=look.ORANGE, alpha=0.9, linewidth=0)
    below.set(xlabel="time (s)", ylabel="fit \N{MINUS SIGN} data (mV)")
    for axes in (above, below):
        axes.grid(True)
    return figure


def draw_descent(history: list[Step], optimum: float) -> look.Figure:
    """How fast the fit gets there."""
    figure, (left, right) = look.axes_in_a_row(3.2, 1, 1)
    steps = range(len(history))
    excess = [max(step.residual**2 - optimum**2, 0) / optimum**2 for step in history]
    seen = [(k, value) for k, value in zip(steps, excess, strict=True) if value > 1e-15]
    left.semilogy(*zip(*seen, strict=True), "o-", color=look.ORANGE, markersize=4)
    left.set(title="sum of squares above the optimum", xlabel="iteration", ylabel="relative to the optimum")
    right.semilogy(steps, [step.gradient for step in history], "o-", color=look.BLUE, markersize=4)
    right.set(title="gradient", xlabel="iteration", ylabel="length of Jᵀr (mixed units)")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True)
    return figure


def ask(report: Report, *, quick: bool = False) -> Answer:
    """Measure, fit, compare with scipy, and write the section."""
    del quick  # it is quick
    answer = Answer(QUESTION)
    noise = torch.randn(120, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 8, 120, dtype=torch.float64)
    y = Decay(TRUTH)(t).detach() + NOISE * noise
    start, model = Decay(START), Decay(START)
    with answer.timed("Gauss-Newton"):
        history = gauss_newton(model, t, y)

    def numpy_residual(values: np.ndarray) -> np.ndarray:
        other = Decay(tuple(values))
        return residual_of(other, t, y).numpy()

    with answer.timed("scipy.optimize.least_squares"):
        known = least_squares(numpy_residual, START, xtol=1e-15, ftol=1e-15, gtol=1e-12, x_scale="jac")
    jacobian, r = jacops.modjac(model, t, flatten=True), residual_of(model, t, y)
    fitted = nn.utils.parameters_to_vector(model.parameters()).detach()
    freedom = len(t) - len(fitted)
    noise_seen = float((r @ r / freedom).sqrt())
    errors = noise_seen * torch.linalg.inv(jacobian.T @ jacobian).diagonal().sqrt()
    optimum = float(np.sqrt(2 * known.cost))
    apart = float((fitted - torch.from_numpy(known.x)).abs().div(errors).max())
    halved = sum(step.taken is not None and step.taken < 1 for step in history)

    answer.finding = (
        f"{len(history) - 1} Gauss-Newton steps, {halved} of them shortened, take the residual from "
        f"{history[0].residual:.2f} to {history[-1].residual:.4f} mV: the optimum that scipy finds."
    )
    answer.certificate = {
        "sum of squares against scipy": f"relative difference {(history[-1].residual / optimum) ** 2 - 1:+.1e}",
        "parameters against scipy": f"at most {apart:.1e} standard errors apart",
        "gradient Jᵀr": f"{history[-1].gradient:.1e} at the end, {history[0].gradient:.1e} at the start",
        "noise": f"{noise_seen:.3f} mV found with {freedom} degrees of freedom, {NOISE:.3f} mV put in",
    }

    report.section(QUESTION, answer.finding)
    report.text(
        f"A voltage fades in a fast and a slow way and is measured {len(t)} times with noise of {NOISE} mV (made up "
        "here, so that the truth is known). Near the current parameters the residual r is almost straight: r + J s, "
        "with J its Jacobian with respect to the parameters, one row per measurement. The step s that makes this "
        "smallest solves a linear least-squares problem; it is halved while it does not shrink the real residual."
    )
    report.code(CODE)
    report.figure(
        draw_fit(t, y, start, model),
        "Above: the data, the first guess and the fit. Below: what the fit leaves; the band is two standard "
        "deviations of the noise wide to each side.",
    )
    report.table(
        ["iteration", "residual |r| (mV)", "gradient |Jᵀr|", "share of the step", "step length"],
        [
            [k, f"{step.residual:.6f}", f"{step.gradient:.2e}", *("–" if value is None else form % value
             for form, value in (("%g", step.taken), ("%.2e", step.length)))]
            for k, step in enumerate(history)
        ],
        "Every iteration: state before the step, and the step taken.",
    )  # fmt: skip
    report.figure(
        draw_descent(history, optimum),
        "Left: the sum of squares, as excess over the optimum found by scipy. Right: the gradient. Both fall by "
        "orders of magnitude a step once the model is nearly straight along it.",
    )
    report.table(
        ["parameter", "truth", "fitted", "standard error", "scipy"],
        [
            [label, f"{truth:.3f}", f"{value:.4f}", f"{error:.4f}", f"{other:.4f}"]
            for label, truth, value, error, other in zip(
                NAMES.values(), TRUTH, fitted.tolist(), errors.tolist(), known.x, strict=True
            )
        ],
        "The fitted parameters. Standard errors come from the same Jacobian, as noise × √diag (JᵀJ)⁻¹.",
    )
    report.certificate(answer.certificate)
    return answer
