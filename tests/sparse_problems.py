"""Standard problems with sparse derivatives, each a model, its input, and what it is differentiated by.

Brusselator and Bratu are after the SUNDIALS and MINPACK-2 collections (Averick, Carter, Moré and Xue, 1992), chained
Rosenbrock after Toint (1978); bundle adjustment uses the camera of Snavely's Bundler, as the BAL data set does.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from small import Calls, draw

F64 = torch.float64


class Problem(NamedTuple):
    name: str
    model: nn.Module
    inputs: Any
    wrt: str


def whole(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def laplace(u: Tensor) -> Tensor:
    """Return the five-point Laplacian of (..., n, n) with zeros around."""
    p = nn.functional.pad(u, (1, 1, 1, 1))
    return p[..., 2:, 1:-1] + p[..., :-2, 1:-1] + p[..., 1:-1, 2:] + p[..., 1:-1, :-2] - 4 * u


def brusselator(n: int) -> Problem:
    """Reaction and diffusion of two species on an n by n torus, (2, n, n)."""

    def rate(s: Tensor) -> Tensor:
        u, v = s
        spread = s.roll(1, -1) + s.roll(-1, -1) + s.roll(1, -2) + s.roll(-1, -2) - 4 * s
        react = torch.stack([1 + u * u * v - 4.4 * u, 3.4 * u - u * u * v])
        return react + 0.1 * n * n * spread

    return Problem("brusselator", Calls(rate), draw(2, n, n), "inputs")


def bratu(n: int) -> Problem:
    """Solid fuel ignition on an n by n square."""
    return Problem("bratu", Calls(lambda u: laplace(u) + (6.8 / n**2) * u.exp()), draw(n, n), "inputs")


def banded(n: int, width: int = 2) -> Problem:
    """Broyden's banded function, with `width` neighbours each side."""

    def residual(x: Tensor) -> Tensor:
        near = nn.functional.pad(x, (width, width)).unfold(0, 2 * width + 1, 1)
        return x * (2 + 5 * x * x) + 1 - (near * (1 + near)).sum(1)

    return Problem("banded", Calls(residual), draw(n), "inputs")


def arrowhead(n: int) -> Problem:
    """Every equation reads its own unknown and the first; the first reads all."""

    def residual(x: Tensor) -> Tensor:
        return torch.cat([(x**2).sum().reshape(1), x[1:] ** 2 + x[1:] * x[0]])

    return Problem("arrowhead", Calls(residual), draw(n), "inputs")


def rosenbrock_residual(n: int) -> Problem:
    """Chained Rosenbrock as residuals."""
    return Problem(
        "chained rosenbrock", Calls(lambda x: torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])), draw(n), "inputs"
    )


class Chain(nn.Module):
    """Chained Rosenbrock over a parameter: the output is the loss."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.x = nn.Parameter(draw(n))

    def forward(self) -> Tensor:
        x = self.x
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


class BundleAdjustment(nn.Module):
    """Cameras (9 numbers: rotation, translation, focal length, two of distortion) look at points."""

    def __init__(self, cameras: int, points: int, observations: int, shared: bool = False) -> None:
        super().__init__()
        start = 0.1 * draw(cameras, 9, seed=1)
        start[:, 5] -= 5
        start[:, 6] += 500
        self.cameras, self.points = nn.Parameter(start), nn.Parameter(draw(points, 3, seed=2))
        self.shift = nn.Parameter(draw(2, seed=3)) if shared else None
        camera, point = torch.arange(observations) % cameras, torch.arange(observations) % points
        self.register_buffer("camera", camera[torch.argsort(draw(observations, seed=4))])
        self.register_buffer("point", point)

    def forward(self, seen: Tensor) -> Tensor:
        c, p = self.cameras[self.camera], self.points[self.point]
        angle = c[:, :3].norm(dim=-1, keepdim=True)
        axis = c[:, :3] / angle
        along = axis * (axis * p).sum(-1, keepdim=True) * (1 - angle.cos())
        q = p * angle.cos() + torch.linalg.cross(axis, p) * angle.sin() + along + c[:, 3:6]
        z = -q[:, :2] / q[:, 2:]
        far = (z * z).sum(-1, keepdim=True)
        out = c[:, 6:7] * (1 + c[:, 7:8] * far + c[:, 8:9] * far * far) * z - seen
        return out if self.shift is None else out + self.shift


def bundle(cameras: int, points: int, observations: int, shared: bool = False) -> Problem:
    model = BundleAdjustment(cameras, points, observations, shared)
    return Problem("bundle" + " shared" * shared, model, draw(observations, 2, seed=5), "parameters")


def pose_graph(poses: int, edges: int) -> Problem:
    """Relative-pose residuals of PyPose's SE3 along a chain with random loop closures."""
    import pypose as pp

    class PoseGraph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.poses = pp.Parameter(pp.se3(0.5 * draw(poses, 6)).Exp())

        def forward(self, edges: Tensor, measured: Any) -> Tensor:
            return (measured.Inv() @ self.poses[edges[:, 0]].Inv() @ self.poses[edges[:, 1]]).Log().tensor()

    chain = torch.arange(poses - 1)
    loops = whole(poses, edges - poses + 1, 2, seed=6)
    loops[:, 1] = torch.where(loops[:, 0] == loops[:, 1], (loops[:, 1] + 1) % poses, loops[:, 1])
    graph = torch.cat([torch.stack([chain, chain + 1], 1), loops])
    return Problem("pose graph", PoseGraph(), (graph, pp.se3(0.5 * draw(edges, 6, seed=7)).Exp()), "parameters")


def small() -> list[Problem]:
    """Return all that need no optional package, small enough for dense Jacobians."""
    return [
        brusselator(6),
        bratu(7),
        banded(30),
        arrowhead(25),
        rosenbrock_residual(20),
        bundle(4, 12, 40),
        bundle(4, 12, 40, shared=True),
    ]
