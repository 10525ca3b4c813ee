r"""Where poses of a graph start, from linear problems alone: rotations first, then translations.

Rotations as free matrices make $R_j = R_i R_{ij}$ linear; its solution is turned into the nearest rotations, with which
what is measured of translations is linear too (Martinec and Pajdla, 2007; Carlone, Tron, Daniilidis and Dellaert,
Initialization techniques for 3D SLAM, 2015).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..charts import GroupChart
from ..errors import InputError
from ..sparse._matrix import csc, sp

if TYPE_CHECKING:
    from .graph_problems import Observations, PoseGraph

_FLOOR = 1e-6  # of the largest weight: what ties poses whose information has no part in a direction


@dataclass
class _LinearTies:
    """Linear equations between vectors of one width, weighted: rows of blocks, and their right-hand sides.

    Attributes:
        count: How many vectors there are.
        width: Their width.
    """

    count: int
    width: int
    parts: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    rows: int = 0

    def add(self, right: Tensor, *terms: tuple[Tensor, Tensor]) -> None:
        """Take equations: sums of blocks (m, rows, width) times vectors, at positions (m,), are (m, rows, sides)."""
        self.parts += [(self.rows, at, blocks) for at, blocks in terms]
        self.right.append(right.flatten(0, 1))
        self.rows += len(self.right[-1])

    def solved(self, held: Tensor, known: Tensor) -> Tensor:
        """Return the vectors, (count, width, sides), that come nearest; those that are held, and unseen, as known."""
        from scipy.sparse.linalg import splu

        matrix = csc(self._matrix())
        moves = np.ones((self.count, self.width), bool)
        moves[held.numpy()] = False
        moves &= (np.diff(matrix.indptr) > 0).reshape(moves.shape)
        free, found = moves.reshape(-1), known.flatten(0, 1).numpy().copy()
        if not free.any():
            return known
        own = matrix[:, free]
        left = torch.cat(self.right).numpy() - matrix[:, ~free] @ found[~free]
        options = {"SymmetricMode": True}  # a normal matrix needs no pivoting
        factor = splu(csc(own.T @ own), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        found[free] = factor.solve(np.ascontiguousarray(own.T @ left))
        found[free] += factor.solve(
            np.ascontiguousarray(own.T @ (left - own @ found[free]))
        )  # digits that squares lost
        return torch.from_numpy(found).reshape(known.shape)

    def _matrix(self) -> object:
        entries, rows, columns = [], [], []
        for start, at, blocks in self.parts:
            many, high, width = blocks.shape
            entries.append(blocks.reshape(-1))
            rows.append((start + torch.arange(many * high)).repeat_interleave(width))
            own = at[:, None, None] * width + torch.arange(width)
            columns.append(own.expand(blocks.shape).reshape(-1))
        placed = torch.cat(rows).numpy(), torch.cat(columns).numpy()
        return sp.coo_array((torch.cat(entries).numpy(), placed), shape=(self.rows, self.count * self.width))


def linear_start(graph: PoseGraph) -> PoseGraph:
    """Return a graph with its poses and landmarks where linear problems place them, as `PoseGraph.initialised`.

    Raises:
        InputError: Edges are no rotations and translations, or what is measured determines no start.
    """
    if not bool(torch.isfinite(graph.information).all()):
        raise InputError.of("information", "holding NaN or Inf", "finite numbers are needed")
    try:
        turned = _rotations(graph)
        places = _translations(graph, turned)
    except RuntimeError as error:
        raise InputError.of("the graph", f"one without a unique linear start ({error})", "it must be tied") from None
    count = len(graph.poses)
    poses = _pose(turned, places[:count, :, 0])
    held = graph.anchors
    poses[held] = graph.poses[held]
    return replace(graph, poses=poses, landmarks=_landmarks(graph, poses, places[count:, :, 0]))


def _parts(chart: GroupChart, poses: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotations (n, space, space) and translations (n, space, 1)."""
    whole = chart.matrix(poses)
    return whole[:, :-1, :-1], whole[:, :-1, -1:]


def _rotations(graph: PoseGraph) -> Tensor:
    chart, space = graph.chart, graph.chart.space
    now, eye = _parts(chart, graph.poses)[0], torch.eye(space, dtype=torch.float64)
    equations = _LinearTies(len(now), space)

    def tie(source: Tensor, target: Tensor, turn: Tensor, weight: Tensor) -> None:
        none = torch.zeros(len(turn), space, space, dtype=torch.float64)
        equations.add(none, (target, weight * eye.expand_as(turn)), (source, -weight * turn.mT))

    weight = _turning(graph.information, space)
    tie(graph.source, graph.target, _parts(chart, graph.measured)[0], weight)
    a, b = graph.equivalent.T
    tie(a, b, eye.expand(len(a), space, space), weight.amax().expand(len(a), 1, 1) if len(weight) else _ones(len(a)))
    priors = tuple(o for o in graph.observations if o.kind == "prior")
    for o in priors:
        weight, turn = _turning(o.information, space), _parts(chart, o.measured)[0]
        turn = turn if o.offset is None else turn @ _parts(chart, o.offset)[0].mT
        equations.add(weight * turn.mT, (o.pose, weight * eye.expand_as(turn)))
    # Landmarks do not determine rotations: parts that only they connect are fixed one by one.
    held = replace(graph, observations=priors, landmarks=graph.landmarks[:0]).anchors
    return _nearest(equations.solved(held, now.mT).mT)


def _translations(graph: PoseGraph, turned: Tensor) -> Tensor:
    """Return where poses and landmarks are, (poses + landmarks, space, 1), for rotations of the poses."""
    chart, count, space = graph.chart, len(turned), graph.chart.space
    now = torch.cat([_parts(chart, graph.poses)[1], graph.landmarks.reshape(-1, space, 1)])
    equations, eye = _LinearTies(len(now), space), torch.eye(space, dtype=torch.float64)
    turn, move = _parts(chart, graph.measured)
    seen = _root(graph.information[:, :space, :space]) @ turn.mT
    there = seen @ turned[graph.source].mT
    equations.add(seen @ move, (graph.target, there), (graph.source, -there))
    a, b = graph.equivalent.T
    tie = there.abs().amax() * eye.expand(len(a), space, space) if len(there) else eye.expand(len(a), space, space)
    equations.add(torch.zeros(len(a), space, 1, dtype=torch.float64), (b, tie), (a, -tie))
    for o in graph.observations:
        _observe(equations, graph, o, turned)
    held = [replace(graph, observations=tuple(o for o in graph.observations if o.kind != "bearing")).anchors]
    return equations.solved(torch.cat([*held, count + graph.fixed_landmarks]), now)


def _observe(equations: _LinearTies, graph: PoseGraph, o: Observations, turned: Tensor) -> None:
    """Add what observations measure of translations; bearings alone do not."""
    chart, count, space = graph.chart, len(graph.poses), graph.chart.space
    eye, own = torch.eye(space, dtype=torch.float64).expand(len(o.pose), space, space), turned[o.pose]
    turn, beside = (eye, torch.zeros_like(eye[:, :, :1])) if o.offset is None else _parts(chart, o.offset)
    if o.kind == "position":
        root = _root(o.information)
        equations.add(root @ o.measured[:, :, None], (o.pose, root))
    elif o.kind == "prior":
        aim, place = _parts(chart, o.measured)
        root = _root(o.information[:, :space, :space]) @ aim.mT
        equations.add(root @ (place - own @ beside), (o.pose, root))
    elif o.point is not None and o.kind in ("point", "polar"):
        point, root = o.measured[:, :, None], _root(o.information)
        if o.kind == "polar":
            bearing, reach = o.measured[:, :1], o.measured[:, 1:]
            away = torch.cat([bearing.cos(), bearing.sin()], 1)
            across = torch.stack([-away[:, 1], away[:, 0]], 1) / reach
            point, root = (reach * away)[:, :, None], root @ torch.stack([across, away], 1)
        there = root @ turn.mT @ own.mT
        equations.add(root @ (point + turn.mT @ beside), (count + o.point, there), (o.pose, -there))


def _landmarks(graph: PoseGraph, poses: Tensor, places: Tensor) -> Tensor:
    """Return landmarks as placed; those that bearings alone see move with the first pose that sees them."""
    found = places.clone()
    placed = {int(p) for o in graph.observations if o.point is not None and o.kind != "bearing" for p in o.point}
    placed |= set(graph.fixed_landmarks.tolist())
    for o in graph.observations:
        if o.kind != "bearing" or o.point is None:
            continue
        for pose, point in zip(o.pose.tolist(), o.point.tolist(), strict=True):
            if point not in placed:
                inside = graph.chart.act(graph.chart.inverse(graph.poses[pose]), graph.landmarks[point])
                found[point] = graph.chart.act(poses[pose], inside)
                placed.add(point)
    return found


def _ones(count: int) -> Tensor:
    return torch.ones(count, 1, 1, dtype=torch.float64)


def _turning(information: Tensor, space: int) -> Tensor:
    """Return what a matrix equation of rotations is multiplied by, (m, 1, 1)."""
    weight = information[:, space:, space:].diagonal(dim1=1, dim2=2).mean(1).clamp(min=0).sqrt()
    return weight.clamp(min=_least(weight)).reshape(-1, 1, 1)


def _root(information: Tensor) -> Tensor:
    """Return roots S with SᵀS about the information, regular."""
    values, vectors = torch.linalg.eigh(information)
    values = values.clamp(min=0).sqrt()
    return values.clamp(min=_least(values)).unsqueeze(-1) * vectors.mT


def _least(weights: Tensor) -> float:
    return _FLOOR * float(weights.max()) if weights.numel() and float(weights.max()) > 0 else 1.0


def _nearest(matrices: Tensor) -> Tensor:
    """Return the rotations nearest to matrices."""
    U, _, V = torch.linalg.svd(matrices)
    sign = torch.ones(matrices.shape[:2], dtype=torch.float64)
    sign[:, -1] = torch.linalg.det(U @ V)
    return U * sign.unsqueeze(1) @ V


def _pose(turned: Tensor, places: Tensor) -> Tensor:
    """Return rotations and translations as elements: an angle in the plane, a unit quaternion in space."""
    if turned.shape[-1] == 2:
        return torch.cat([places, torch.atan2(turned[:, 1, :1], turned[:, 0, :1])], 1)
    xx, yy, zz = turned.diagonal(dim1=1, dim2=2).unbind(1)
    above, below = turned[:, [1, 2, 0], [2, 0, 1]], turned[:, [2, 0, 1], [1, 2, 0]]
    # The quaternion of a rotation is the largest eigenvector of this matrix (Bar-Itzhack, 2000).
    K = torch.zeros(len(turned), 4, 4, dtype=torch.float64)
    K[:, [1, 2, 0], [2, 0, 1]] = K[:, [2, 0, 1], [1, 2, 0]] = above + below
    K[:, range(3), 3] = K[:, 3, range(3)] = below - above
    K[:, range(4), range(4)] = torch.stack([xx - yy - zz, yy - xx - zz, zz - xx - yy, xx + yy + zz], 1)
    return torch.cat([places, torch.linalg.eigh(K)[1][:, :, -1]], 1)
