"""Files of pose graphs (TORO, g2o) and bundle adjustment (BAL), read whole or refused with file and line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ..charts import SE2, SE3, SO3, GroupChart
from ..errors import DataError, InputError
from .graph_problems import Bundle, PoseGraph, chained

File = str | PathLike[str]


@dataclass(frozen=True)
class _Row:
    """One line: its number, first word, and the rest."""

    file: Path
    line: int
    tag: str
    words: list[str]

    def error(self, came: str, needed: str) -> DataError:
        return DataError(f"{self.file}, line {self.line}: {self.tag} is {came}, but {needed}. Nothing was read.")

    def numbers(self, count: int, integers: int, what: str) -> list[float]:
        """Return the numbers, the first `integers` of them whole.

        Raises:
            DataError: There are too few or too many, or one is no number.
        """
        if len(self.words) != count:
            raise self.error(f"followed by {len(self.words)} numbers", f"{count} are needed: {what}")
        found = []
        for i, word in enumerate(self.words):
            try:
                value = int(word) if i < integers else float(word)
            except ValueError:
                kind = "a whole number" if i < integers else "a number"
                raise self.error(f"followed by {word!r} in place {i + 1}", f"{kind} is needed there: {what}") from None
            if isinstance(value, float) and not math.isfinite(value):
                raise self.error(f"followed by {word!r} in place {i + 1}", "finite numbers are needed")
            found.append(value)
        return found


def _rows(path: File) -> Iterator[_Row]:
    for number, text in _lines(path):
        tag, *words = text.split()
        yield _Row(Path(path), number, tag, words)


def _lines(path: File) -> Iterator[tuple[int, str]]:
    """Yield the lines that say something, with their numbers.

    Raises:
        DataError: The file is not text.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: this is not text. Is it compressed? Nothing was read.") from None
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.split("#", 1)[0].strip()
        if stripped:
            yield number, stripped


@dataclass
class _Draft:
    """What was read so far."""

    file: Path
    chart: GroupChart | None = None
    since: int = 0
    vertices: dict[int, Tensor] = field(default_factory=dict)
    edges: list[tuple[_Row, int, int]] = field(default_factory=list)
    measured: list[list[float]] = field(default_factory=list)
    upper: list[list[float]] = field(default_factory=list)
    equivalent: list[tuple[_Row, int, int]] = field(default_factory=list)

    def use(self, chart: GroupChart, row: _Row) -> None:
        if self.chart is not None and self.chart is not chart:
            raise row.error(f"of {chart}", f"the file is of {self.chart} since line {self.since}")
        if self.chart is None:
            self.chart, self.since = chart, row.line

    def take(self, row: _Row, kind: _LineKind) -> None:
        if kind.chart is not None:
            self.use(kind.chart, row)
        numbers = row.numbers(kind.ends + kind.pose + len(kind.order), kind.ends, kind.what)
        ends, rest = [int(n) for n in numbers[: kind.ends]], numbers[kind.ends :]
        if kind.chart is None:
            self.equivalent.append((row, ends[0], ends[1]))
            return
        pose = kind.stored(row, rest[: kind.pose])
        if len(ends) == 1:
            if ends[0] in self.vertices:
                raise row.error(f"naming vertex {ends[0]} again", "each may stand there once")
            self.vertices[ends[0]] = torch.tensor(pose, dtype=torch.float64)
            return
        if ends[0] == ends[1]:
            raise row.error(f"from {ends[0]} to itself", "two poses are needed")
        self.edges.append((row, ends[0], ends[1]))
        self.measured.append(pose)
        self.upper.append([rest[kind.pose + i] for i in kind.order])


def read_toro(path: File) -> PoseGraph:
    r"""Return the pose graph of a TORO file (`.graph`): VERTEX2, EDGE2, VERTEX3, EDGE3, EQUIV.

    Rotations in three dimensions are roll, pitch, yaw, $R = R_z R_y R_x$. Information matrices are upper triangles,
    those of EDGE2 in TORO's own order (xx, xy, yy, tt, xt, yt). Where the file has no vertices, the poses are chained
    from the edges, starting at the identity.

    Args:
        path: The file.

    Returns:
        The graph, in double precision; equivalences are kept apart (`PoseGraph.merged` applies them).

    Raises:
        DataError: A line is malformed; the message says which. Nothing is half-read.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.graph"
        >>> _ = file.write_text("EDGE2 0 1  1 0 0  1 0 1 1 0 0")
        >>> read_toro(file).poses
        tensor([[0., 0., 0.],
                [1., 0., 0.]], dtype=torch.float64)
    """
    return _read(path, _TORO, "a TORO file has VERTEX2, EDGE2, VERTEX3, EDGE3 and EQUIV lines")


def read_g2o(path: File) -> PoseGraph:
    """Return the pose graph of a g2o file: VERTEX_SE2, EDGE_SE2, VERTEX_SE3:QUAT, EDGE_SE3:QUAT.

    Information matrices are upper triangles, row by row. `FIX` lines are accepted and say nothing about the residual.

    Args:
        path: The file.

    Returns:
        The graph, in double precision.

    Raises:
        DataError: A line is malformed; the message says which. Nothing is half-read.
    """
    known = "VERTEX_SE2, EDGE_SE2, VERTEX_SE3:QUAT, EDGE_SE3:QUAT and FIX"
    return _read(path, _G2O, f"this reader knows {known} lines")


def _as_written(row: _Row, pose: list[float]) -> list[float]:
    return pose


def _from_angles(row: _Row, pose: list[float]) -> list[float]:
    """Return translation and quaternion from x y z roll pitch yaw."""
    turns = torch.diag(torch.tensor(pose[3:], dtype=torch.float64))
    x, y, z = SO3.exp(turns)
    return [*pose[:3], *SO3.compose(z, SO3.compose(y, x)).tolist()]


def _unit(row: _Row, pose: list[float]) -> list[float]:
    length = math.hypot(*pose[3:])
    # Files may hold three digits only; a quaternion that is off by more is taken for a mistake.
    if abs(length - 1) > 1e-2:
        raise row.error(f"with a quaternion of length {length:.3g}", "length one is needed")
    return [*pose[:3], *(q / length for q in pose[3:])]


@dataclass(frozen=True)
class _LineKind:
    """One kind of line.

    Attributes:
        chart: Of its pose; None for a pair of vertices that are one.
        ends: How many vertices it names.
        pose: How many numbers the pose has there.
        what: All its numbers, in words.
        stored: Turns them into the numbers that the chart stores.
        order: Of the information matrix's upper triangle, row by row.
    """

    chart: GroupChart | None
    ends: int
    pose: int
    what: str
    stored: Callable[[_Row, list[float]], list[float]] = _as_written
    order: tuple[int, ...] = ()


_TRIANGLE = "numbers of the information matrix"
_TORO: dict[str, _LineKind | None] = {
    **dict.fromkeys(("VERTEX2", "VERTEX"), _LineKind(SE2, 1, 3, "id x y angle")),
    "VERTEX3": _LineKind(SE3, 1, 6, "id x y z roll pitch yaw", _from_angles),
    **dict.fromkeys(
        ("EDGE2", "EDGE"),
        _LineKind(SE2, 2, 3, "from to x y angle xx xy yy tt xt yt", order=(0, 1, 4, 2, 5, 3)),
    ),
    "EDGE3": _LineKind(SE3, 2, 6, f"from to x y z roll pitch yaw and 21 {_TRIANGLE}", _from_angles, tuple(range(21))),
    "EQUIV": _LineKind(None, 2, 0, "id id"),
}
_G2O: dict[str, _LineKind | None] = {
    "VERTEX_SE2": _LineKind(SE2, 1, 3, "id x y angle"),
    "VERTEX_SE3:QUAT": _LineKind(SE3, 1, 7, "id x y z qx qy qz qw", _unit),
    "EDGE_SE2": _LineKind(SE2, 2, 3, f"from to x y angle and 6 {_TRIANGLE}", order=tuple(range(6))),
    "EDGE_SE3:QUAT": _LineKind(SE3, 2, 7, f"from to x y z qx qy qz qw and 21 {_TRIANGLE}", _unit, tuple(range(21))),
    "FIX": None,
}


def _read(path: File, kinds: Mapping[str, _LineKind | None], known: str) -> PoseGraph:
    draft = _Draft(Path(path))
    for row in _rows(path):
        if row.tag not in kinds:
            raise row.error("not known", known)
        kind = kinds[row.tag]
        if kind is not None:
            draft.take(row, kind)
    return _finished(draft)


def _finished(draft: _Draft) -> PoseGraph:
    chart = draft.chart
    if chart is None or not draft.edges:
        raise DataError(f"{draft.file}: there is no edge in it, but a pose graph needs some. Nothing was read.")
    chain = not draft.vertices
    ids = sorted({n for _, a, b in draft.edges for n in (a, b)}) if chain else list(draft.vertices)
    position = {name: i for i, name in enumerate(ids)}
    for row, a, b in (*draft.edges, *draft.equivalent):
        for name in (a, b):
            if name not in position:
                raise row.error(f"naming vertex {name}", "there is no such vertex in the file")
    pairs = torch.tensor([(position[a], position[b]) for _, a, b in draft.edges]).T.contiguous()
    measured = torch.tensor(draft.measured, dtype=torch.float64)
    information = _information(draft, chart)
    if chain:
        try:
            poses = chained(chart, len(ids), pairs[0], pairs[1], measured, chart.identity(1, dtype=torch.float64))
        except InputError as error:
            raise DataError(f"{draft.file}: {error} Nothing was read.") from None
    else:
        poses = torch.stack(list(draft.vertices.values()))
    if not (torch.isfinite(poses).all() and torch.isfinite(measured).all()):
        raise DataError(f"{draft.file}: its numbers are so large that poses overflow. Nothing was read.")
    same = torch.tensor([(position[a], position[b]) for _, a, b in draft.equivalent], dtype=torch.long).reshape(-1, 2)
    return PoseGraph(chart, poses, pairs[0], pairs[1], measured, information, tuple(ids), same, chain)


def _information(draft: _Draft, chart: GroupChart) -> Tensor:
    width = chart.tangent
    rows, columns = torch.triu_indices(width, width)
    full = torch.zeros(len(draft.upper), width, width, dtype=torch.float64)
    full[:, rows, columns] = full[:, columns, rows] = torch.tensor(draft.upper, dtype=torch.float64)
    lowest, highest = torch.linalg.eigvalsh(full)[:, [0, -1]].T
    # Numbers that were written with nine digits may make a semidefinite matrix negative by that.
    bad = (lowest < -1e-9 * highest.abs()).nonzero()
    if len(bad):
        row = draft.edges[int(bad[0])][0]
        came = f"with an information matrix of eigenvalue {float(lowest[bad[0]]):.3g}"
        raise row.error(came, "it must not be negative in any direction")
    return full


def read_bal(path: File) -> Bundle:
    """Return the cameras, points and observations of a file of "Bundle adjustment in the large" (BAL).

    Args:
        path: The file, not compressed.

    Returns:
        The problem, in double precision.

    Raises:
        DataError: A line is malformed; the message says which. Nothing is half-read.
    """
    file, lines = Path(path), list(_lines(path))
    if not lines:
        raise DataError(f"{file}, line 1: the file is empty, but its first line must hold three counts.")
    first = _Row(file, lines[0][0], "the first line", lines[0][1].split())
    cameras, points, count = (int(n) for n in first.numbers(3, 3, "cameras points observations"))
    if min(cameras, points, count) < 1:
        raise first.error("with a count below one", "cameras, points and observations are needed")
    body = lines[1 : count + 1]
    if len(body) < count:
        last = lines[-1][0]
        raise DataError(f"{file}, line {last}: the file ends after {len(body)} of {count} observations.")
    seen = []
    for number, text in body:
        row = _Row(file, number, "an observation", text.split())
        camera, point, x, y = row.numbers(4, 2, "camera point x y")
        if not (0 <= camera < cameras and 0 <= point < points):
            raise row.error(f"of camera {camera}, point {point}", f"there are {cameras} cameras, {points} points")
        seen.append((camera, point, x, y))
    numbers = _numbers(file, lines[count + 1 :], 9 * cameras + 3 * points, lines[-1][0])
    table = torch.tensor(seen, dtype=torch.float64)
    return Bundle(
        numbers[: 9 * cameras].reshape(cameras, 9),
        numbers[9 * cameras :].reshape(points, 3),
        table[:, 0].long(),
        table[:, 1].long(),
        table[:, 2:].clone(),
    )


def _numbers(file: Path, lines: list[tuple[int, str]], needed: int, last: int) -> Tensor:
    """Return the numbers that follow the observations.

    Raises:
        DataError: One is no number, or there are too few or too many.
    """
    found: list[float] = []
    for number, text in lines:
        words = text.split()
        row = _Row(file, number, "a camera or point", words)
        found += row.numbers(len(words), 0, "nine numbers per camera, then three per point")
        if len(found) > needed:
            raise row.error(f"holding the number {needed + 1}", f"the counts ask for {needed} in all")
    if len(found) < needed:
        raise DataError(f"{file}, line {last}: the file ends after {len(found)} of {needed} numbers. Nothing was read.")
    return torch.tensor(found, dtype=torch.float64)
