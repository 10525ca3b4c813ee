"""Lines of graph files: which kinds there are, and what their numbers mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from ..charts import SE2, SE3, SO3, GroupChart
from ..errors import DataError

File = str | PathLike[str]
Role = Literal["pose", "landmark", "edge", "same", "fixed", "offset", "point", "bearing", "polar", "prior", "position"]


@dataclass(frozen=True)
class Row:
    """One line: its number, first word, and the rest."""

    file: Path
    line: int
    tag: str
    words: list[str]

    def error(self, came: str, needed: str) -> DataError:
        """Return the error for this line."""
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


def rows(path: File) -> Iterator[Row]:
    """Yield the lines that say something, in words."""
    for number, text in lines(path):
        tag, *words = text.split()
        yield Row(Path(path), number, tag, words)


def lines(path: File) -> Iterator[tuple[int, str]]:
    """Yield the lines that say something, with their numbers; a byte order mark at the start is none of them.

    Raises:
        DataError: The file is not text.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: this is not text. Is it compressed? Nothing was read.") from None
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.split("#", 1)[0].strip()
        if stripped:
            yield number, stripped


def _as_written(row: Row, pose: list[float]) -> list[float]:
    return pose


def _from_angles(row: Row, pose: list[float]) -> list[float]:
    """Return translation and quaternion from x y z roll pitch yaw."""
    turns = torch.diag(torch.tensor(pose[3:], dtype=torch.float64))
    x, y, z = SO3.exp(turns)
    return [*pose[:3], *SO3.compose(z, SO3.compose(y, x)).tolist()]


def _unit(row: Row, pose: list[float]) -> list[float]:
    length = math.hypot(*pose[3:])
    # Files may hold three digits only; a quaternion that is off by more is taken for a mistake.
    if abs(length - 1) > 1e-2:
        raise row.error(f"with a quaternion of length {length:.3g}", "length one is needed")
    return [*pose[:3], *(q / length for q in pose[3:])]


@dataclass(frozen=True)
class LineKind:
    """One kind of line.

    Attributes:
        role: What it is about.
        chart: Of the poses in its file; None where it fits any.
        names: How many whole numbers it begins with.
        values: How many numbers are measured.
        what: All its numbers, in words.
        stored: Turns the measured ones into those that are kept.
        order: Of the information matrix's upper triangle, row by row.
        may_be_bare: Whether the information may be left out, which is then the identity.
        has_deviations: Whether standard deviations stand in place of it.
        offsets: How many of the last whole numbers name offsets of sensors.
    """

    role: Role
    chart: GroupChart | None
    names: int
    values: int
    what: str
    stored: Callable[[Row, list[float]], list[float]] = _as_written
    order: tuple[int, ...] = ()
    may_be_bare: bool = False
    has_deviations: bool = False
    offsets: int = 0

    @property
    def width(self) -> int:
        """Rows of the information matrix."""
        return int((2 * len(self.order)) ** 0.5)

    def read(self, row: Row) -> tuple[list[int], list[float], list[float]]:
        """Return the names, the measured numbers as they are kept, and the upper triangle of the information.

        Raises:
            DataError: The line is malformed.
        """
        least, more = self.names + self.values, 2 if self.has_deviations else len(self.order)
        bare = self.may_be_bare and len(row.words) == least
        numbers = row.numbers(least if bare else least + more, self.names, self.what)
        rest = numbers[least:]
        if bare:
            upper = [float(i == j) for i in range(self.width) for j in range(i, self.width)]
        elif self.has_deviations:
            if min(rest) <= 0:
                raise row.error(f"with a standard deviation of {min(rest):g}", "positive ones are needed")
            upper = [rest[0] ** -2, 0.0, rest[1] ** -2]
        else:
            upper = [rest[i] for i in self.order]
        return [int(n) for n in numbers[: self.names]], self.stored(row, numbers[self.names : least]), upper


TORO_ORDER = (0, 1, 4, 2, 5, 3)  # xx xy yy tt xt yt, where row by row it is xx xy xt yy yt tt
_T = "numbers of the information matrix"
_EDGE2 = LineKind("edge", SE2, 2, 3, "from to x y angle xx xy yy tt xt yt", order=TORO_ORDER, may_be_bare=True)
_EDGE3 = LineKind(
    "edge", SE3, 2, 6, f"from to x y z roll pitch yaw and 21 {_T}", _from_angles, tuple(range(21)), may_be_bare=True
)
_SIX, _ALL = tuple(range(6)), tuple(range(21))
TORO: dict[str, LineKind] = {
    **dict.fromkeys(("VERTEX2", "VERTEX"), LineKind("pose", SE2, 1, 3, "id x y angle")),
    "VERTEX3": LineKind("pose", SE3, 1, 6, "id x y z roll pitch yaw", _from_angles),
    **dict.fromkeys(("EDGE2", "EDGE"), _EDGE2),
    "EDGE3": _EDGE3,
    "EQUIV": LineKind("same", None, 2, 0, "id id"),
    "BR": LineKind(
        "polar", SE2, 2, 2, "pose landmark bearing range and 2 deviations", order=(0, 1, 2), has_deviations=True
    ),
}
G2O: dict[str, LineKind] = {
    "VERTEX_SE2": LineKind("pose", SE2, 1, 3, "id x y angle"),
    "VERTEX_SE3:QUAT": LineKind("pose", SE3, 1, 7, "id x y z qx qy qz qw", _unit),
    "VERTEX_XY": LineKind("landmark", SE2, 1, 2, "id x y"),
    "VERTEX_TRACKXYZ": LineKind("landmark", SE3, 1, 3, "id x y z"),
    "EDGE_SE2": LineKind("edge", SE2, 2, 3, f"from to x y angle and 6 {_T}", order=_SIX),
    "EDGE_SE3:QUAT": LineKind("edge", SE3, 2, 7, f"from to x y z qx qy qz qw and 21 {_T}", _unit, _ALL),
    "EDGE_SE2_XY": LineKind("point", SE2, 2, 2, f"pose landmark x y and 3 {_T}", order=(0, 1, 2)),
    "EDGE_BEARING_SE2_XY": LineKind("bearing", SE2, 2, 1, "pose landmark bearing and its information", order=(0,)),
    "EDGE_SE2_OFFSET": LineKind(
        "edge", SE2, 4, 3, f"from to offset offset x y angle and 6 {_T}", order=_SIX, offsets=2
    ),
    "EDGE_SE3_OFFSET": LineKind(
        "edge", SE3, 4, 7, f"from to offset offset x y z qx qy qz qw and 21 {_T}", _unit, _ALL, offsets=2
    ),
    "EDGE_SE2_POINTXY_OFFSET": LineKind(
        "point", SE2, 3, 2, f"pose landmark offset x y and 3 {_T}", order=(0, 1, 2), offsets=1
    ),
    "EDGE_SE3_TRACKXYZ": LineKind("point", SE3, 3, 3, f"pose landmark offset x y z and 6 {_T}", order=_SIX, offsets=1),
    "EDGE_PRIOR_SE2": LineKind("prior", SE2, 1, 3, f"id x y angle and 6 {_T}", order=_SIX),
    "EDGE_PRIOR_SE2_XY": LineKind("position", SE2, 1, 2, f"id x y and 3 {_T}", order=(0, 1, 2)),
    "EDGE_SE3_PRIOR": LineKind("prior", SE3, 2, 7, f"id offset x y z qx qy qz qw and 21 {_T}", _unit, _ALL, offsets=1),
    "PARAMS_SE2OFFSET": LineKind("offset", SE2, 1, 3, "id x y angle"),
    "PARAMS_SE3OFFSET": LineKind("offset", SE3, 1, 7, "id x y z qx qy qz qw", _unit),
    "FIX": LineKind("fixed", None, 1, 0, "id"),
}
READERS = {"read_toro": TORO, "read_g2o": G2O}
