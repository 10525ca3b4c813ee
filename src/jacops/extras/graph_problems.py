"""Pose graphs and bundle adjustment as residual models, and synthetic ones of any size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import pi

import torch
from torch import Tensor, nn

from ..charts import SE2, SE3, SO3, Chart
from ..errors import InputError, explain


@dataclass(frozen=True, eq=False)
class PoseGraph:
    r"""Poses and what was measured between pairs of them.

    Attributes:
        chart: The group of the poses, `SE2` or `SE3`.
        poses: Where each one is thought to be at first, (n, storage).
        source: Where each edge starts, (m,), positions in `poses`.
        target: Where it ends, (m,).
        measured: The target as seen from the source, (m, storage).
        information: Inverse covariance of $\log(Z^{-1} X_i^{-1} X_j)$, translation first, (m, tangent, tangent).
        ids: The name of each pose in its file.
        equivalent: Pairs of poses that are one and the same, (k, 2); see `merged`.
        chained: True if the poses were not in the file but chained from the edges.
    """

    chart: Chart
    poses: Tensor
    source: Tensor
    target: Tensor
    measured: Tensor
    information: Tensor
    ids: tuple[int, ...]
    equivalent: Tensor
    chained: bool = False

    def residual(self) -> PoseGraphResidual:
        r"""Return the model with one row $\log(Z^{-1} X_i^{-1} X_j)$ per edge, over its parameter `poses`."""
        return PoseGraphResidual(self)

    def merged(self) -> PoseGraph:
        """Return the graph with equivalent poses put together, the first of each staying; loops that arise go."""
        lead = list(range(len(self.poses)))
        for a, b in self.equivalent.tolist():
            a, b = _root(lead, a), _root(lead, b)
            lead[max(a, b)] = min(a, b)
        roots = [_root(lead, i) for i in range(len(lead))]
        kept = sorted(set(roots))
        position = torch.tensor([kept.index(r) for r in roots])
        source, target = position[self.source], position[self.target]
        real = source != target
        return replace(
            self,
            poses=self.poses[kept],
            source=source[real],
            target=target[real],
            measured=self.measured[real],
            information=self.information[real],
            ids=tuple(self.ids[k] for k in kept),
            equivalent=self.equivalent[:0],
        )

    def __repr__(self) -> str:
        extra = f", {len(self.equivalent)} equivalent pairs" if len(self.equivalent) else ""
        return f"PoseGraph({self.chart}: {len(self.poses)} poses, {len(self.source)} edges{extra})"


def _root(lead: list[int], i: int) -> int:
    while lead[i] != i:
        lead[i] = lead[lead[i]]
        i = lead[i]
    return i


class PoseGraphResidual(nn.Module):
    """One row per edge: how the target's pose differs from what was measured from the source, in tangent numbers."""

    source: Tensor
    target: Tensor
    expected: Tensor

    def __init__(self, graph: PoseGraph) -> None:
        super().__init__()
        self.chart = graph.chart
        self.poses = nn.Parameter(graph.poses.clone())
        self.register_buffer("source", graph.source)
        self.register_buffer("target", graph.target)
        self.register_buffer("expected", graph.chart.inverse(graph.measured))

    def forward(self) -> Tensor:
        """Return the residuals, (edges, tangent)."""
        chart = self.chart
        between = chart.between(self.poses[self.source], self.poses[self.target])
        return chart.log(chart.compose(self.expected, between))


@dataclass(frozen=True, eq=False)
class Bundle:
    """Bundle adjustment in the large's model: cameras, points, and where which camera saw which point.

    Attributes:
        cameras: Rotation vector, translation, focal length and two radial distortions, (cameras, 9).
        points: (points, 3).
        camera: Which camera made an observation, (observations,).
        point: Of which point.
        observed: Where in the image, (observations, 2).
    """

    cameras: Tensor
    points: Tensor
    camera: Tensor
    point: Tensor
    observed: Tensor

    def residual(self) -> BundleResidual:
        """Return the model whose output is one row per observation, over its parameters `cameras` and `points`."""
        return BundleResidual(self)

    def __repr__(self) -> str:
        return f"Bundle({len(self.cameras)} cameras, {len(self.points)} points, {len(self.observed)} observations)"


class BundleResidual(nn.Module):
    """One row per observation: where the point is seen, less where it was seen."""

    camera: Tensor
    point: Tensor
    observed: Tensor

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.cameras = nn.Parameter(bundle.cameras.clone())
        self.points = nn.Parameter(bundle.points.clone())
        self.register_buffer("camera", bundle.camera)
        self.register_buffer("point", bundle.point)
        self.register_buffer("observed", bundle.observed)

    def forward(self) -> Tensor:
        """Return the residuals, (observations, 2)."""
        return projected(self.cameras[self.camera], self.points[self.point]) - self.observed


def projected(cameras: Tensor, points: Tensor) -> Tensor:
    r"""Return where cameras (n, 9) see points (n, 3): $f\,(1 + k_1 |p|^2 + k_2 |p|^4)\, p$, $p = -(P_x, P_y) / P_z$."""
    moved = SO3.act(SO3.exp(cameras[..., :3]), points) + cameras[..., 3:6]
    p = -moved[..., :2] / moved[..., 2:]
    squared = (p * p).sum(-1, keepdim=True)
    focal, k1, k2 = cameras[..., 6:7], cameras[..., 7:8], cameras[..., 8:9]
    return focal * (1 + squared * (k1 + k2 * squared)) * p


# ---- synthetic ---------------------------------------------------------------------------------------------------


def sphere_graph(rings: int = 10, per_ring: int = 20, noise: float = 0.02, seed: int = 0) -> PoseGraph:
    """Return a walk around a sphere in SE(3), each pose tied to the next and to the one a ring below.

    Args:
        rings: How many turns the walk takes.
        per_ring: Poses in a turn.
        noise: Standard deviation of what is measured, in translation and in radians.
        seed: For a generator of its own.

    Returns:
        A graph whose poses are chained from its odometry.
    """
    _check_counts(rings=rings, per_ring=per_ring)
    count = rings * per_ring
    along = torch.arange(count, dtype=torch.float64)
    azimuth, height = 2 * pi * along / per_ring, pi * ((along + 0.5) / count - 0.5)
    place = 10 * torch.stack([height.cos() * azimuth.cos(), height.cos() * azimuth.sin(), height.sin()], -1)
    turn = torch.zeros(count, 3, dtype=torch.float64)
    turn[:, 2] = azimuth
    tilt = torch.zeros_like(turn)
    tilt[:, 1] = height
    poses = torch.cat([place, SO3.compose(SO3.exp(turn), SO3.exp(tilt))], -1)
    step = torch.stack([torch.arange(count - 1), torch.arange(1, count)])
    ring = torch.stack([torch.arange(count - per_ring), torch.arange(per_ring, count)])
    return _measured(SE3, poses, torch.cat([step, ring], 1), noise, seed)


def grid_graph(width: int = 10, height: int = 10, noise: float = 0.02, seed: int = 0) -> PoseGraph:
    """Return a walk over a grid in SE(2), row by row and back, each pose tied to the next and to the one below."""
    _check_counts(width=width, height=height)
    rows = [torch.arange(width) if y % 2 == 0 else torch.arange(width).flip(0) for y in range(height)]
    x = torch.cat(rows).double()
    y = torch.arange(height).repeat_interleave(width).double()
    heading = torch.tensor([0.0 if row % 2 == 0 else pi for row in range(height)]).double().repeat_interleave(width)
    poses = torch.stack([x, y, heading], -1)
    count = width * height
    step = torch.stack([torch.arange(count - 1), torch.arange(1, count)])
    place = {(int(a), int(b)): i for i, (a, b) in enumerate(zip(x, y, strict=True))}
    up = [(i, place[a, b + 1]) for (a, b), i in place.items() if (a, b + 1) in place and place[a, b + 1] != i + 1]
    ties = torch.tensor(up, dtype=torch.long).reshape(-1, 2).T
    return _measured(SE2, poses, torch.cat([step, ties], 1), noise, seed)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise InputError(explain(name, repr(value), "a whole number from two on is needed"))


def _measured(chart: Chart, poses: Tensor, edges: Tensor, noise: float, seed: int) -> PoseGraph:
    generator = torch.Generator().manual_seed(seed)
    source, target = edges
    true = chart.between(poses[source], poses[target])
    error = noise * torch.randn(len(source), chart.tangent, generator=generator, dtype=torch.float64)
    measured = chart.compose(true, chart.exp(error))
    information = torch.eye(chart.tangent, dtype=torch.float64).repeat(len(source), 1, 1) / max(noise, 1e-6) ** 2
    start = chained(chart, len(poses), source, target, measured, poses[:1])
    ids, none = tuple(range(len(poses))), torch.zeros(0, 2, dtype=torch.long)
    return PoseGraph(chart, start, source, target, measured, information, ids, none, chained=True)


def chained(chart: Chart, count: int, source: Tensor, target: Tensor, measured: Tensor, first: Tensor) -> Tensor:
    """Return poses found by following edges from the first pose, those between neighbours in order before others.

    Raises:
        InputError: A pose cannot be reached.
    """
    ties: list[list[tuple[int, int, int, bool]]] = [[] for _ in range(count)]
    for k, (a, b) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        far = int(abs(a - b) != 1)
        ties[a].append((far, k, b, False))
        ties[b].append((far, k, a, True))
    back = chart.inverse(measured)
    poses: dict[int, Tensor] = {0: first.reshape(-1)}
    frontier = [(*tie, 0) for tie in ties[0]]
    heapify(frontier)
    while frontier:
        _, k, b, backwards, a = heappop(frontier)
        if b not in poses:
            poses[b] = chart.compose(poses[a], back[k] if backwards else measured[k])
            for tie in ties[b]:
                heappush(frontier, (*tie, b))
    lost = next((i for i in range(count) if i not in poses), None)
    if lost is not None:
        raise InputError(
            explain("edges", f"leading nowhere near pose {lost}", "every pose must be reached from the first")
        )
    return torch.stack([poses[i] for i in range(count)])


def synthetic_bundle(cameras: int = 4, points: int = 20, noise: float = 0.5, seed: int = 0) -> Bundle:
    """Return cameras around a cloud of points, all seeing all, started away from the truth.

    Args:
        cameras: How many.
        points: How many.
        noise: Standard deviation of what is observed, in pixels.
        seed: For a generator of its own.

    Returns:
        A bundle whose cameras and points are guesses.
    """
    _check_counts(cameras=cameras, points=points)
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cloud = drawn(points, 3)
    angle = 2 * pi * torch.arange(cameras, dtype=torch.float64) / cameras
    turn = torch.stack([torch.zeros_like(angle), angle - pi, torch.zeros_like(angle)], -1) + 0.1 * drawn(cameras, 3)
    away = torch.tensor([0.0, 0.0, -10.0], dtype=torch.float64).expand(cameras, 3) + 0.3 * drawn(cameras, 3)
    lens = torch.tensor([500.0, -0.02, 0.001], dtype=torch.float64).expand(cameras, 3)
    true = torch.cat([turn, away, lens], -1)
    camera = torch.arange(cameras).repeat_interleave(points)
    point = torch.arange(points).repeat(cameras)
    observed = projected(true[camera], cloud[point]) + noise * drawn(cameras * points, 2)
    guess = true + torch.tensor([0.02] * 3 + [0.1] * 3 + [5.0, 1e-3, 1e-4], dtype=torch.float64) * drawn(cameras, 9)
    return Bundle(guess, cloud + 0.1 * drawn(points, 3), camera, point, observed)
