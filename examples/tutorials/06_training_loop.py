"""
Learn a law of physics: Jacobians in a training loop
====================================================

A pendulum keeps its energy. A network that is fitted to noisy measurements of its
motion does not have this property, and simulations with it gain or lose energy. A
Hamiltonian network (`Greydanus et al., 2019 <https://arxiv.org/abs/1906.01563>`_)
learns the energy itself: the motion that it predicts is made of the derivatives of its
output. So a Jacobian is a part of the loss, and training differentiates it once more.
``create_graph=True`` makes that possible.
"""

import torch
from matplotlib import pyplot as plt

import jacops

# %%
# Measurements
# ------------
#
# The state is an angle :math:`q` and a momentum :math:`p`. The energy is :math:`H = p^2
# / 2 - \cos q`, and the equations of motion are :math:`\dot q = \partial H / \partial p
# = p` and :math:`\dot p = -\partial H / \partial q = -\sin q`. The velocities were
# measured at 200 states, with noise.

torch.manual_seed(0)
x = (torch.rand(200, 2, dtype=torch.float64) - 0.5) * torch.tensor([5.0, 4.0])
q, p = x.T
velocity = torch.stack([p, -q.sin()], 1) + 0.2 * torch.randn_like(x)

# %%
# Two networks
# ------------
#
# Both have the same hidden layers. One returns the velocity directly. The other one
# returns an energy, and ``compute_jacobian`` its derivatives at all states at once,
# with the shape ``(n, 1, 2)``.


def network(outputs):
    nn = torch.nn
    layers = [nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(48, outputs)).double()


torch.manual_seed(1)
direct, energy = network(2), network(1)


def motion(energy, x, create_graph=False):
    """Return the velocity that an energy causes, (n, 2)."""
    slope = jacops.compute_jacobian(energy, x, create_graph=create_graph)[:, 0]
    return torch.stack([slope[:, 1], -slope[:, 0]], 1)


def train(net, predicted):
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(400):
        loss = (predicted() - velocity).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"loss at the end: {loss.item():.3f} (noise alone: 0.040)")


train(direct, lambda: direct(x))
train(energy, lambda: motion(energy, x, create_graph=True))

# %%
# A long simulation
# -----------------
#
# Both networks are simulated over 60 units of time, about nine swings, by the method of
# Runge and Kutta. Three pendulums start at once.

start = torch.tensor([[0.8, 0.0], [1.4, 0.0], [2.0, 0.0]], dtype=torch.float64)


def simulate(field, steps=600, h=0.1):
    states = [start]
    with torch.no_grad():
        for _ in range(steps):
            y = states[-1]
            a = field(y)
            b = field(y + h / 2 * a)
            c = field(y + h / 2 * b)
            d = field(y + h * c)
            states.append(y + h / 6 * (a + 2 * b + 2 * c + d))
    return torch.stack(states)  # (times, pendulums, 2)


fields = {
    "direct network": direct,
    "Hamiltonian network": lambda y: motion(energy, y),
    "truth": lambda y: torch.stack([y[:, 1], -y[:, 0].sin()], 1),
}
paths = {name: simulate(field) for name, field in fields.items()}

figure, axes = plt.subplots(1, 2, figsize=(6, 3.5), sharey=True, layout="constrained")
for panel, name in zip(axes, fields, strict=False):
    panel.plot(*paths["truth"].permute(2, 0, 1), color="0.7", linewidth=3)
    panel.plot(*paths[name].permute(2, 0, 1), color="tab:blue", linewidth=0.8)
    panel.set(title=name, xlabel="angle q", xlim=(-2.6, 2.6), ylim=(-2.2, 2.2))
axes[0].set_ylabel("momentum p")
plt.show()

# %%
# Thick grey lines are the true orbits. The direct network spirals from one orbit to
# another, though it fits the velocities as well as noise allows. The Hamiltonian
# network stays on an orbit, since motion along its equations cannot change its own
# energy. The true energy of the outer pendulum:

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for (name, path), colour in zip(paths.items(), ("C1", "C0", "0.5"), strict=True):
    level = path[:, 2, 1] ** 2 / 2 - path[:, 2, 0].cos()
    axes.plot(torch.arange(601) * 0.1, level, label=name, color=colour)
axes.set(xlabel="time", ylabel="energy")
axes.legend(frameon=False, loc="lower left")
plt.show()

# %%
# Is it right?
# ------------
#
# The loss contains a derivative, and its gradient a second one. Move all parameters
# by a small step in a random direction, and compare the change of the loss with the
# gradient:


def loss():
    return (motion(energy, x, create_graph=True) - velocity).square().mean()


weights = list(energy.parameters())[:-1]  # all but the constant of the energy
direction = [torch.randn_like(w) for w in weights]
slopes = torch.autograd.grad(loss(), weights)
by_gradient = sum((d * s).sum() for d, s in zip(direction, slopes, strict=True)).item()


def moved(step):
    with torch.no_grad():
        for w, d in zip(weights, direction, strict=True):
            w += step * d
    return loss().item()


difference = (moved(1e-5) - moved(-2e-5)) / 2e-5
moved(1e-5)  # back
print(f"gradient: {by_gradient:.8f}, finite difference: {difference:.8f}")

# %%
# And the learned energy, of which only differences matter, is that of a pendulum:

with torch.no_grad():
    learned, true = energy(x)[:, 0], p**2 / 2 - q.cos()
error = learned - true
print(f"standard deviation of the error: {error.std().item():.3f}")
print(f"standard deviation of the energy: {true.std().item():.3f}")

# %%
# Next
# ----
#
# * :doc:`/differentiable`: contractive autoencoders, gradient penalties, gradients
#   through a solve; what takes ``create_graph=True``.
# * ``jacops.laplacian(u, points, create_graph=True)`` is the loss of a physics-informed
#   network for the Poisson equation; ``input_hessian`` and ``directional_derivative``
#   give other derivatives by the input.
