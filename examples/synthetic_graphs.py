"""Pose graphs and bundle adjustment of any size, made up: what the example and the tests solve."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from jacops._extras.graph_problems import Bundle, PoseGraph, chained, projected
from jacops.charts import SE2, SE3, SO3, Chart


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


def walk_graph(
    poses: int, closures: int, straight: int = 5, side: int = 30, noise: float = 0.02, seed: int = 0
) -> PoseGraph:
    """Return a random walk through the streets of a square town in SE(2), tied where it comes by an earlier pose.

    Args:
        poses: How many steps of length one.
        closures: How many ties beside the odometry.
        straight: Steps between two crossings.
        side: Blocks on each side of the town.
        noise: Standard deviation of what is measured, in translation and in radians.
        seed: For a generator of its own.

    Returns:
        A graph whose poses are chained from its odometry.
    """
    generator = torch.Generator().manual_seed(seed)
    ways = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]])
    at, way = torch.tensor([side // 2 * straight] * 2), 0
    places, headings = [], []
    for step in range(poses):
        if step % straight == 0:
            turns = torch.tensor([0, 0, 1, 3])[torch.randperm(4, generator=generator)]
            inside = [
                w for w in ((way + int(t)) % 4 for t in turns) if _is_inside(at + straight * ways[w], side * straight)
            ]
            way = inside[0] if inside else (way + 2) % 4
        places.append(at)
        headings.append(way)
        at = at + ways[way]
    where = torch.stack(places)
    true = torch.cat([where.double(), pi / 2 * torch.tensor(headings, dtype=torch.float64).unsqueeze(1)], -1)
    step = torch.stack([torch.arange(poses - 1), torch.arange(1, poses)])
    return _measured(SE2, true, torch.cat([step, _ties(where, closures, generator)], 1), noise, seed)


def _is_inside(place: Tensor, limit: int) -> bool:
    return bool(((place >= 0) & (place <= limit)).all())


def _ties(where: Tensor, closures: int, generator: torch.Generator) -> Tensor:
    """Return pairs (2, closures) of poses at one place or next to it, the earlier first and not one after the other."""
    near = torch.cdist(where.float(), where.float()) <= 1.5
    first, second = near.triu(10).nonzero(as_tuple=True)
    chosen = torch.randperm(len(first), generator=generator)[:closures].sort().values
    return torch.stack([first[chosen], second[chosen]])


def garage_graph(
    poses: int = 1661, per_floor: int = 330, ties: int = 3, noise: float = 0.01, seed: int = 0
) -> PoseGraph:
    """Return a drive up the ramps of a garage in SE(3), each pose tied to the `ties` nearest ones a floor below."""
    along = torch.arange(poses, dtype=torch.float64)
    azimuth = 2 * pi * along / per_floor
    place = torch.stack([30 * azimuth.cos(), 20 * azimuth.sin(), 3 * along / per_floor], -1)
    turn = torch.zeros(poses, 3, dtype=torch.float64)
    turn[:, 2] = azimuth
    true = torch.cat([place, SO3.exp(turn)], -1)
    edges = [torch.stack([torch.arange(poses - 1), torch.arange(1, poses)])]
    for tie in range(ties):
        apart = per_floor + tie - ties // 2
        edges.append(torch.stack([torch.arange(poses - apart), torch.arange(apart, poses)]))
    return _measured(SE3, true, torch.cat(edges, 1), noise, seed)
