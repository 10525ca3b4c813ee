"""Pose graphs and bundle adjustment as residual models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor, nn

from ..charts import SO3, GroupChart
from ..errors import InputError


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

    chart: GroupChart
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


def chained(chart: GroupChart, count: int, source: Tensor, target: Tensor, measured: Tensor, first: Tensor) -> Tensor:
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
        raise InputError.of("edges", f"leading nowhere near pose {lost}", "every pose must be reached from the first")
    return torch.stack([poses[i] for i in range(count)])
