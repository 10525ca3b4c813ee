"""What was read of a graph file so far, and the graph that it makes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..charts import GroupChart
from ..errors import DataError, InputError
from ._graph_lines import TORO_ORDER, LineKind, Role, Row
from .graph_problems import Observations, PoseGraph, chained

_NOISE = 1e-6  # of the largest eigenvalue of a matrix with unit diagonal: what seven digits leave of six rows
_LEAST = 1e-12  # what such a matrix is lifted to: positive definite after rounding, and no information of its own
_SHOWN = 10  # lines that an error lists


class _Measured(NamedTuple):
    """A line that measures something: its names, numbers, and upper triangle."""

    row: Row
    kind: LineKind
    names: list[int]
    values: list[float]
    upper: list[float]

    @property
    def offsets(self) -> list[int]:
        """The offsets that it names."""
        return self.names[len(self.names) - self.kind.offsets :]


@dataclass
class GraphDraft:
    """What was read so far."""

    file: Path
    chart: GroupChart | None = None
    since: int = 0
    poses: dict[int, list[float]] = field(default_factory=dict)
    landmarks: dict[int, list[float]] = field(default_factory=dict)
    offsets: dict[int, list[float]] = field(default_factory=dict)
    measured: dict[Role, list[_Measured]] = field(default_factory=dict)
    same: list[tuple[Row, int, int]] = field(default_factory=list)
    fixed: list[tuple[Row, int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def take(self, row: Row, kind: LineKind) -> None:
        """Take a line.

        Raises:
            DataError: It is malformed, or contradicts an earlier one.
        """
        if kind.chart is not None:
            self._use(kind.chart, row)
        if kind.role == "fixed":
            self.fixed += [
                (row, int(n)) for n in row.numbers(max(len(row.words), 1), max(len(row.words), 1), kind.what)
            ]
            return
        names, values, upper = kind.read(row)
        if kind.role == "same":
            self.same.append((row, names[0], names[1]))
        elif kind.role in ("pose", "landmark", "offset"):
            self._name(row, kind.role, names[0], values)
        else:
            if kind.role == "edge" and names[0] == names[1]:
                raise row.error(f"from {names[0]} to itself", "two poses are needed")
            self.measured.setdefault(kind.role, []).append(_Measured(row, kind, names, values, upper))

    def _use(self, chart: GroupChart, row: Row) -> None:
        if self.chart is not None and self.chart is not chart:
            raise row.error(f"of {chart}", f"the file is of {self.chart} since line {self.since}")
        if self.chart is None:
            self.chart, self.since = chart, row.line

    def _name(self, row: Row, role: Role, name: int, values: list[float]) -> None:
        homes = [self.offsets] if role == "offset" else [self.poses, self.landmarks]
        if any(name in home for home in homes):
            what = "offset" if role == "offset" else "vertex"
            raise row.error(f"naming {what} {name} again", "each may be given once")
        homes[role == "landmark"][name] = values

    # ---- the graph ---------------------------------------------------------------------------------------------

    def finished(self, order: str = "auto") -> PoseGraph:
        """Return the graph.

        Args:
            order: Of the information of EDGE2 lines.

        Raises:
            DataError: It is no graph, or a line names what is not there.
        """
        chart, edges = self.chart, self.measured.get("edge", [])
        if chart is None or not self.measured:
            note = f" Lines skipped: {dict(self.skipped)}." if self.skipped else ""
            raise DataError(
                f"{self.file}: there is no edge in it, but a pose graph needs some.{note} Nothing was read."
            )
        chain = not self.poses
        ids = sorted({n for m in edges for n in m.names[:2]}) if chain else list(self.poses)
        place = {name: i for i, name in enumerate(ids)}
        source = _places(place, [(m.row, m.names[0]) for m in edges])
        target = _places(place, [(m.row, m.names[1]) for m in edges])
        measured, information = self._between_poses(
            edges, chart, _table([m.values for m in edges], chart.storage), self._edge_information(edges, chart, order)
        )
        poses = (
            self._chained(chart, len(ids), source, target, measured) if chain else _table(list(self.poses.values()), 0)
        )
        points, landmark_ids = self._landmarks(chart, poses, place)
        spots = {name: i for i, name in enumerate(landmark_ids)}
        others = [o for role in self.measured if role != "edge" for o in self._observations(role, chart, place, spots)]
        if not all(bool(torch.isfinite(t).all()) for t in (poses, measured, points)):
            raise DataError(f"{self.file}: its numbers are so large that poses overflow. Nothing was read.")
        ends = [_places(place, [(row, pair[k]) for row, *pair in self.same]) for k in (0, 1)]
        held = [(row, name) for row, name in self.fixed if name not in spots]
        return PoseGraph(
            chart, poses, source, target, measured, information, tuple(ids), torch.stack(ends, 1), chain,
            points, tuple(landmark_ids), tuple(others), _places(place, held).unique(),
            _places(spots, [(r, n) for r, n in self.fixed if n in spots]).unique(), dict(self.skipped),
        )  # fmt: skip

    def _chained(self, chart: GroupChart, count: int, source: Tensor, target: Tensor, measured: Tensor) -> Tensor:
        try:
            return chained(chart, count, source, target, measured, chart.identity(1, dtype=torch.float64))
        except InputError as error:
            raise DataError(f"{self.file}: {error} Nothing was read.") from None

    def _landmarks(self, chart: GroupChart, poses: Tensor, place: dict[int, int]) -> tuple[Tensor, list[int]]:
        """Return the landmarks: as written, or where the first line that measures bearing and range sees them."""
        found = dict(self.landmarks)
        for m in self.measured.get("polar", []):
            if m.names[1] not in found and m.names[1] not in place:
                bearing, reach = torch.tensor(m.values, dtype=torch.float64)
                seen = torch.stack([reach * bearing.cos(), reach * bearing.sin()])
                found[m.names[1]] = chart.act(poses[int(_places(place, [(m.row, m.names[0])]))], seen).tolist()
        return _table(list(found.values()), chart.space), list(found)

    def _observations(
        self, role: Role, chart: GroupChart, place: dict[int, int], spots: dict[int, int]
    ) -> list[Observations]:
        own = self.measured[role]
        sees = role in ("point", "bearing", "polar")
        pose = _places(place, [(m.row, m.names[0]) for m in own])
        point = _places(spots, [(m.row, m.names[1]) for m in own], "landmark") if sees else None
        offset = self._offset(own, chart, 0) if any(m.offsets for m in own) else None
        values = _table([m.values for m in own], 0)
        return [Observations(role, pose, point, offset, values, _definite(own, _full(own)))]

    def _offset(self, own: list[_Measured], chart: GroupChart, number: int) -> Tensor:
        """Return where the sensor of each line is on its pose; on the pose itself where the line names none."""
        place = {name: i for i, name in enumerate(self.offsets)}
        named = [(k, m) for k, m in enumerate(own) if m.offsets]
        found = chart.identity(len(own), dtype=torch.float64)
        which = _places(place, [(m.row, m.offsets[number]) for _, m in named], "offset")
        found[[k for k, _ in named]] = _table(list(self.offsets.values()), chart.storage)[which]
        return found

    def _between_poses(
        self, edges: list[_Measured], chart: GroupChart, measured: Tensor, information: Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""Return what edges between sensors measure of their poses, and its information.

        With sensors at $O_i$ and $O_j$, $\log(Z^{-1} (X_i O_i)^{-1} X_j O_j)$ is $\mathrm{Ad}(O_j^{-1})$ times
        $\log((O_i Z O_j^{-1})^{-1} X_i^{-1} X_j)$.
        """
        where = [k for k, m in enumerate(edges) if m.offsets]
        if not where:
            return measured, information
        some = [edges[k] for k in where]
        source, target = self._offset(some, chart, 0), self._offset(some, chart, 1)
        back = chart.inverse(target)
        measured[where] = chart.compose(chart.compose(source, measured[where]), back)
        # exp(A v) is g exp(v) g^-1 for any v; turns of one radian have one logarithm.
        axes = chart.exp(torch.eye(chart.tangent, dtype=torch.float64))
        columns = [chart.log(chart.compose(chart.compose(back, axis.expand_as(back)), target)) for axis in axes]
        adjoint = torch.stack(columns, -1)
        information[where] = adjoint.mT @ information[where] @ adjoint
        return measured, information

    def _edge_information(self, edges: list[_Measured], chart: GroupChart, order: str) -> Tensor:
        if not edges:
            return torch.zeros(0, chart.tangent, chart.tangent, dtype=torch.float64)
        full = _full(edges)
        if edges[0].kind.order == TORO_ORDER and order != "toro":
            turned = [m._replace(upper=_rowwise(m)) for m in edges]
            # Diagonal matrices row by row have zero variances when read as TORO's, and vice versa.
            if order == "g2o" or (len(_bad(full)) and not len(_bad(_full(turned)))):
                full = _full(turned)
        return _definite(edges, full)


def _rowwise(m: _Measured) -> list[float]:
    """Return the numbers of an information matrix as they stand in the line; written out, the identity is one."""
    if len(m.row.words) == m.kind.names + m.kind.values:
        return m.upper
    return [float(word) for word in m.row.words[m.kind.names + m.kind.values :]]


def _places(place: dict[int, int], named: list[tuple[Row, int]], what: str = "vertex") -> Tensor:
    for row, name in named:
        if name not in place:
            raise row.error(f"naming {what} {name}", f"there is no such {what} in the file")
    return torch.tensor([place[name] for _, name in named], dtype=torch.long)


def _table(values: list[list[float]], width: int) -> Tensor:
    found = torch.tensor(values, dtype=torch.float64)
    return found if len(values) else found.reshape(0, width)


def _full(own: list[_Measured]) -> Tensor:
    """Return the information matrices, symmetric."""
    width = own[0].kind.width
    above, right = torch.triu_indices(width, width)
    full = torch.zeros(len(own), width, width, dtype=torch.float64)
    full[:, above, right] = full[:, right, above] = torch.tensor([m.upper for m in own], dtype=torch.float64)
    return full


def _with_unit_diagonal(full: Tensor) -> tuple[Tensor, Tensor]:
    scale = full.diagonal(dim1=1, dim2=2).abs().sqrt()
    scale = torch.where(scale > 0, scale, full.abs().amax((1, 2)).sqrt().clamp(min=1e-300).unsqueeze(1))
    return full / scale.unsqueeze(1) / scale.unsqueeze(2), scale


def _bad(full: Tensor) -> Tensor:
    """Return the positions of matrices that are negative in some direction by more than rounding of seven digits."""
    unit, _ = _with_unit_diagonal(full)
    if not bool(torch.isfinite(unit).all()):
        return (~torch.isfinite(unit).all(-1).all(-1)).nonzero()[:, 0]
    values = torch.linalg.eigvalsh(unit)
    return (values[:, 0] < -_NOISE * values[:, -1].abs()).nonzero()[:, 0]


def _definite(own: list[_Measured], full: Tensor) -> Tensor:
    """Return information matrices, those that rounding made negative in some direction lifted.

    Raises:
        DataError: One is negative by more; all lines where that is so are listed.
    """
    bad = _bad(full).tolist()
    if bad:
        listed = ", ".join(str(own[i].row.line) for i in bad[:_SHOWN]) + (", ..." if len(bad) > _SHOWN else "")
        lowest = float(torch.linalg.eigvalsh(torch.nan_to_num(full[bad[0]], 0, 0, 0))[0])
        came = f"with an information matrix of eigenvalue {lowest:.3g}"
        more = f" (so are {len(bad)} of {len(own)} such lines: {listed})" if len(bad) > 1 else ""
        raise own[bad[0]].row.error(came, f"it must not be negative in any direction{more}")
    unit, scale = _with_unit_diagonal(full)
    values, vectors = torch.linalg.eigh(unit)
    low = values[:, 0] < 0
    if bool(low.any()):
        lifted = values[low].clamp(min=0).maximum(_LEAST * values[low, -1:])
        made = vectors[low] * lifted.unsqueeze(1) @ vectors[low].mT * scale[low].unsqueeze(1) * scale[low].unsqueeze(2)
        full = full.clone()
        full[low] = (made + made.mT) / 2
    return full
