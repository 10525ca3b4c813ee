"""Pose graphs and bundle adjustment as residual models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor, nn

from ..charts import SO3, GroupChart
from ..errors import InputError
from ._graph_start import linear_start


@dataclass(frozen=True, eq=False)
class Observations:
    r"""Measurements of one kind beside those between poses.

    Attributes:
        kind: `"point"`: the position of a landmark relative to a pose; `"bearing"` and `"polar"`: in which direction,
            and how far away; `"prior"`: where a pose is, $\log(Z^{-1} X_i)$; `"position"`: its translation.
        pose: Positions in `poses`, (m,).
        point: Positions in `landmarks`, (m,); None without landmarks.
        offset: Where on the pose the sensor is, in space, (m, storage).
        measured: (m, numbers).
        information: Inverse covariances, (m, rows, rows).
    """

    kind: str
    pose: Tensor
    point: Tensor | None
    offset: Tensor | None
    measured: Tensor
    information: Tensor


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
        landmarks: Where each one is thought to be at first, (k, space).
        landmark_ids: Their names in the file.
        observations: What else was measured, kind by kind.
        fixed: Positions of poses that the file holds fixed.
        fixed_landmarks: Positions of landmarks that it does.
        skipped: How many lines of each other kind were left out.
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
    landmarks: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    landmark_ids: tuple[int, ...] = ()
    observations: tuple[Observations, ...] = ()
    fixed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    fixed_landmarks: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    skipped: dict[str, int] = field(default_factory=dict)

    def residual(self) -> PoseGraphResidual:
        r"""Return the model with one row $\log(Z^{-1} X_i^{-1} X_j)$ per edge, over its parameter `poses`.

        With observations there is one output for the edges, where there are some, and one for each kind of these, and
        a parameter `landmarks` where there are some; `weights` has as many entries.
        """
        return PoseGraphResidual(self)

    @property
    def weights(self) -> Tensor | list[Tensor]:
        """The information matrices as `weight` of a fit: one tensor, or one for each output."""
        edges = [self.information] if len(self.source) else []
        return [*edges, *(o.information for o in self.observations)] if self.observations else self.information

    @property
    def components(self) -> Tensor:
        """For each pose the number of the connected part that it is in, landmarks and equivalences being ties too."""
        count = len(self.poses)
        lead = list(range(count + len(self.landmarks)))
        ties = [torch.stack([self.source, self.target], 1), self.equivalent]
        ties += [torch.stack([o.pose, count + o.point], 1) for o in self.observations if o.point is not None]
        for a, b in torch.cat(ties).tolist():
            a, b = _root(lead, a), _root(lead, b)
            lead[max(a, b)] = min(a, b)
        return torch.tensor([_root(lead, i) for i in range(count)]).unique(return_inverse=True)[1]

    @property
    def isolated(self) -> Tensor:
        """Positions of poses that no line measures."""
        ends = [self.source, self.target, self.equivalent.reshape(-1), *(o.pose for o in self.observations)]
        seen = torch.zeros(len(self.poses), dtype=torch.bool)
        seen[torch.cat(ends)] = True
        return (~seen).nonzero()[:, 0]

    @property
    def anchors(self) -> Tensor:
        """Positions to hold fixed so that a fit is determined: the file's, and the first pose of each part without.

        A part with a prior needs none.
        """
        parts = self.components
        held = [self.fixed, *(o.pose for o in self.observations if o.kind == "prior")]
        settled = set(parts[torch.cat(held)].tolist())
        first = [int((parts == p).nonzero()[0]) for p in range(int(parts.max()) + 1) if p not in settled]
        return torch.cat([self.fixed, torch.tensor(first, dtype=torch.long)]).unique()

    def initialised(self) -> PoseGraph:
        r"""Return the graph with poses and landmarks where linear least squares place them, whatever they were before.

        Rotations first, as matrices without constraints, then translations (Carlone, Tron, Daniilidis and Dellaert,
        Initialization techniques for 3D SLAM, 2015). Poses that are not tied to a prior start from `anchors`, which
        stay. A fit of poses that were chained from strongly noisy odometry may end at a minimum that is not the least;
        one from here seldom does, and takes fewer steps. Landmarks of which bearings alone are known move with the
        first pose that sees them.

        Raises:
            InputError: What is measured determines no start.

        Example:
            >>> import tempfile, pathlib
            >>> file, eye = pathlib.Path(tempfile.mkdtemp()) / "square.g2o", "1 0 0 1 0 1"
            >>> _ = file.write_text("".join(f"EDGE_SE2 {k} {(k + 1) % 4} 1 0 1.6 {eye}\n" for k in range(4)))
            >>> from jacops._extras.graph_files import read_g2o
            >>> graph = read_g2o(file)
            >>> graph.poses[:2, 2], graph.initialised().poses[:2, 2].round(decimals=3)
            (tensor([0.0000, 1.6000], dtype=torch.float64), tensor([0.0000, 1.5710], dtype=torch.float64))
        """
        return linear_start(self)

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
            observations=tuple(replace(o, pose=position[o.pose]) for o in self.observations),
            fixed=position[self.fixed].unique(),
        )

    def __repr__(self) -> str:
        parts, alone = int(self.components.max()) + 1, len(self.isolated)
        facts = [f"{len(self.poses)} poses, {len(self.source)} edges"]
        facts += [f"{len(self.equivalent)} equivalent pairs"] * bool(len(self.equivalent))
        facts += [f"{len(self.landmarks)} landmarks"] * bool(len(self.landmarks))
        facts += [f"{len(o.pose)} of kind {o.kind!r}" for o in self.observations]
        facts += [f"{len(self.fixed)} poses fixed"] * bool(len(self.fixed))
        facts += [f"{parts} parts that nothing ties together"] * (parts > 1)
        facts += [f"{alone} isolated poses"] * bool(alone)
        facts += [f"lines skipped: {self.skipped}"] * bool(self.skipped)
        return f"PoseGraph({self.chart}: {', '.join(facts)})"


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

        self.kinds = tuple((o.kind, o.point is not None, o.offset is not None) for o in graph.observations)
        if len(graph.landmarks):
            self.landmarks = nn.Parameter(graph.landmarks.clone())
        for k, o in enumerate(graph.observations):
            for name in ("pose", "point", "offset", "measured"):
                if getattr(o, name) is not None:
                    self.register_buffer(f"{name}{k}", getattr(o, name))

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        """Return the residuals, (edges, tangent); a tuple where there are observations of other kinds."""
        chart = self.chart
        edges = chart.edge_error(self.expected, self.poses[self.source], self.poses[self.target])
        if not self.kinds:
            return edges
        others = (self._observed(k, *kind) for k, kind in enumerate(self.kinds))
        return (edges, *others) if len(self.source) else tuple(others)

    def _observed(self, k: int, kind: str, sees: bool, is_offset: bool) -> Tensor:
        chart, measured, poses = self.chart, getattr(self, f"measured{k}"), self.poses[getattr(self, f"pose{k}")]
        if kind == "position":
            return poses[:, : chart.space] - measured
        poses = chart.compose(poses, getattr(self, f"offset{k}")) if is_offset else poses
        if not sees:
            return chart.log(chart.between(measured, poses))
        seen = chart.act(chart.inverse(poses), self.landmarks[getattr(self, f"point{k}")])
        if kind == "point":
            return seen - measured
        # The angle between two directions, which does not jump where angles do.
        c, s = measured[:, 0].cos(), measured[:, 0].sin()
        turn = torch.atan2(c * seen[:, 1] - s * seen[:, 0], c * seen[:, 0] + s * seen[:, 1])
        if kind == "bearing":
            return turn.unsqueeze(1)
        return torch.stack([turn, seen.norm(dim=1) - measured[:, 1]], 1)


@dataclass(frozen=True, eq=False)
class Bundle:
    """The model of "bundle adjustment in the large": cameras, points, and observations of points by cameras.

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

    @property
    def behind(self) -> Tensor:
        """Positions of observations whose point is not in front of its camera: the model mirrors them, or is infinite.

        No small step leads a point through the camera's plane; start such points anew or leave the lines out.
        """
        cameras = self.cameras[self.camera]
        depth = SO3.act(SO3.exp(cameras[:, :3]), self.points[self.point])[:, 2] + cameras[:, 5]
        return (depth >= 0).nonzero()[:, 0]

    def residual(self) -> BundleResidual:
        """Return the model whose output is one row per observation, over its parameters `cameras` and `points`."""
        return BundleResidual(self)

    def __repr__(self) -> str:
        behind = f", {len(self.behind)} of points behind their camera" if len(self.behind) else ""
        return (
            f"Bundle({len(self.cameras)} cameras, {len(self.points)} points, {len(self.observed)} observations{behind})"
        )


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
