"""Files of pose graphs (TORO, g2o) and bundle adjustment (BAL), read whole or refused with file and line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from .._requirements import check_choice
from ..errors import DataError
from ._graph_draft import GraphDraft
from ._graph_lines import G2O, READERS, TORO, File, LineKind, Row, lines, rows
from .graph_problems import Bundle, PoseGraph

Unknown = Literal["error", "skip"]
InformationOrder = Literal["auto", "toro", "g2o"]


def read_toro(path: File, *, unknown: Unknown = "error", order: InformationOrder = "auto") -> PoseGraph:
    r"""Return the pose graph of a TORO file (`.graph`): VERTEX2, EDGE2, VERTEX3, EDGE3, EQUIV, BR.

    Rotations in three dimensions are roll, pitch, yaw, $R = R_z R_y R_x$. Information matrices are upper triangles; an
    edge without one has the identity. Where the file has no vertices, the poses are chained from the edges, starting
    at the identity. `BR` measures bearing and range of a landmark, with standard deviations.

    Args:
        path: The file.
        unknown: What to do with a line of another kind: `"error"`, or `"skip"`, which counts them in `skipped`.
        order: Of the information of EDGE2: `"toro"` (xx xy yy tt xt yt), `"g2o"` (xx xy xt yy yt tt), or `"auto"`:
            TORO's, unless that makes some matrix negative in a direction and g2o's makes none.

    Returns:
        The graph, in double precision; equivalences are kept apart (`PoseGraph.merged` applies them).

    Raises:
        DataError: A line is malformed; the message states which. Nothing is half-read.
        InputError: `unknown` or `order` is another word.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.graph"
        >>> _ = file.write_text("EDGE2 0 1  1 0 0  1 0 1 1 0 0")
        >>> read_toro(file).poses
        tensor([[0., 0., 0.],
                [1., 0., 0.]], dtype=torch.float64)
    """
    check_choice("order", order, InformationOrder)
    return _read(path, TORO, unknown, order)


def read_g2o(path: File, *, unknown: Unknown = "error") -> PoseGraph:
    """Return the graph of a g2o file: poses, landmarks, what was measured of them, priors, and what is fixed.

    VERTEX_SE2, EDGE_SE2, VERTEX_XY, EDGE_SE2_XY, EDGE_BEARING_SE2_XY, EDGE_PRIOR_SE2, EDGE_PRIOR_SE2_XY in the plane;
    VERTEX_SE3:QUAT, EDGE_SE3:QUAT, VERTEX_TRACKXYZ, EDGE_SE3_TRACKXYZ, EDGE_SE3_PRIOR in space; FIX. Sensors beside
    their poses: PARAMS_SE2OFFSET, EDGE_SE2_OFFSET, EDGE_SE2_POINTXY_OFFSET, PARAMS_SE3OFFSET, EDGE_SE3_OFFSET; edges
    between two sensors are kept as edges between their poses, with the same residual in weighted length.
    Information matrices are upper triangles, row by row; those that rounding to seven digits made negative in some
    direction are lifted to be positive definite.

    Args:
        path: The file.
        unknown: What to do with a line of another kind: `"error"`, or `"skip"`, which counts them in `skipped`.

    Returns:
        The graph, in double precision.

    Raises:
        DataError: A line is malformed; the message states which. Nothing is half-read.
        InputError: `unknown` is another word.
    """
    return _read(path, G2O, unknown)


def _read(path: File, kinds: Mapping[str, LineKind], unknown: Unknown, order: InformationOrder = "auto") -> PoseGraph:
    skip = check_choice("unknown", unknown, Unknown) == get_args(Unknown)[1]
    draft = GraphDraft(Path(path))
    for row in rows(path):
        kind = kinds.get(row.tag)
        if kind is not None:
            draft.take(row, kind)
        elif skip:
            draft.skipped[row.tag] += 1
        else:
            raise row.error("not known", _todo(row, kinds))
    return draft.finished(order)


def _todo(row: Row, kinds: Mapping[str, LineKind]) -> str:
    known = f"this reader accepts {', '.join(kinds)}"
    for name, others in READERS.items():
        if others is not kinds and row.tag in others:
            return f"{known}: read the file with `{name}`"
    if row.tag.lstrip("-").isdigit():
        return f"{known}: a file of bundle adjustment is read with `read_bal`"
    return f'{known}; pass `unknown="skip"` to leave such lines out'


def read_bal(path: File) -> Bundle:
    """Return the cameras, points and observations of a file of "Bundle adjustment in the large" (BAL).

    Args:
        path: The file, not compressed.

    Returns:
        The problem, in double precision.

    Raises:
        DataError: A line is malformed; the message states which. Nothing is half-read.
    """
    file, found = Path(path), list(lines(path))
    if not found:
        raise DataError(f"{file}, line 1: the file is empty, but its first line must hold three counts.")
    words = found[0][1].split()
    reader = next((name for name, kinds in READERS.items() if words[0] in kinds), None)
    if reader is not None:
        raise DataError(f"{file}, line {found[0][0]}: {words[0]} is of a pose graph; read the file with `{reader}`.")
    first = Row(file, found[0][0], "the first line", words)
    cameras, points, count = (int(n) for n in first.numbers(3, 3, "cameras points observations"))
    if min(cameras, points, count) < 1:
        raise first.error("with a count below one", "cameras, points and observations are needed")
    body = found[1 : count + 1]
    if len(body) < count:
        last = found[-1][0]
        raise DataError(f"{file}, line {last}: the file ends after {len(body)} of {count} observations.")
    seen = []
    for number, text in body:
        row = Row(file, number, "an observation", text.split())
        camera, point, x, y = row.numbers(4, 2, "camera point x y")
        if not (0 <= camera < cameras and 0 <= point < points):
            raise row.error(f"of camera {camera}, point {point}", f"there are {cameras} cameras, {points} points")
        seen.append((camera, point, x, y))
    numbers = _numbers(file, found[count + 1 :], 9 * cameras + 3 * points, found[-1][0])
    table = torch.tensor(seen, dtype=torch.float64)
    return Bundle(
        numbers[: 9 * cameras].reshape(cameras, 9),
        numbers[9 * cameras :].reshape(points, 3),
        table[:, 0].long(),
        table[:, 1].long(),
        table[:, 2:].clone(),
    )


def _numbers(file: Path, rest: list[tuple[int, str]], needed: int, last: int) -> Tensor:
    """Return the numbers that follow the observations.

    Raises:
        DataError: One is no number, or there are too few or too many.
    """
    found: list[float] = []
    for number, text in rest:
        words = text.split()
        row = Row(file, number, "a camera or point", words)
        found += row.numbers(len(words), 0, "nine numbers per camera, then three per point")
        if len(found) > needed:
            raise row.error(f"holding the number {needed + 1}", f"the counts give {needed} in all")
    if len(found) < needed:
        raise DataError(f"{file}, line {last}: the file ends after {len(found)} of {needed} numbers. Nothing was read.")
    return torch.tensor(found, dtype=torch.float64)
