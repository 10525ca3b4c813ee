"""A one-file HTML report: text, tables, figures and the certificates that go with an answer.

The file loads nothing from anywhere: figures are inside it, there is no script, and its content security
policy forbids every request. Whatever names come in (features, files, people) are shown, never run.
"""

from __future__ import annotations

import base64
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from jacops._saving import replacing
from jacops.errors import InputError, InputTypeError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | None

# Marks that reorder the text around them: a name could pretend to be another one.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_NUMBER = re.compile(r"[-+−±<≤]?\s?\d(?!.*,\s)")  # several in a row, as in "0, 1, 3", are the name of a place
_XML_FORBIDS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
# Matplotlib's neutral colours follow the reader's light or dark page; data colours stay as they are.
_THEME = {"#000000": "var(--ink)", "#ffffff": "var(--paper)", "#b0b0b0": "var(--line)", "#cccccc": "var(--line)"}
_THEME_CSS = (
    "<style>:root{--ink:#1c2330;--paper:#fff;--line:#c3c9d4;fill:var(--ink)}"
    "@media(prefers-color-scheme:dark){:root{--ink:#dfe4ec;--paper:#171b22;--line:#4a5261}}</style>"
)


@dataclass(frozen=True)
class _Block:
    kind: str  # "text", "code", "table", "figure" or "certificate": which part of the template draws it
    content: Mapping[str, object]


@dataclass
class _Section:
    title: str
    answer: str
    blocks: list[_Block] = field(default_factory=list)


class Report:
    """A report that grows from top to bottom and is written as one HTML file.

    Needs `pip install 'jacops[demo]'` to write (jinja2) and to draw (matplotlib); both load when called.

    Args:
        title: What the report is about.
        lead: A sentence or two under the title.

    Example:
        >>> report = Report("Three questions")
        >>> report.section("Which features?", answer="Mostly the radius.")
        >>> report.table(["feature", "share"], [["radius", 0.61], ["texture", 0.39]])
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self.lead = lead
        self._sections = [_Section("", "")]  # what comes before the first heading

    def section(self, title: str, answer: str = "") -> None:
        """Begin a section; its `answer` also appears in the overview at the top of the report."""
        self._sections.append(_Section(title, answer))

    def text(self, text: str) -> None:
        """Add plain text; a blank line begins a new paragraph."""
        self._add("text", paragraphs=[part for part in re.split(r"\n\s*\n", text.strip()) if part])

    def code(self, source: str) -> None:
        """Add a few lines of code, shown as they are."""
        self._add("code", source=source.strip("\n"))

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Cell]], caption: str = "") -> None:
        """Add a table; numbers stand right-aligned, floats with four digits, None as a dash.

        Args:
            head: The column names, units included.
            rows: One sequence of cells per row, as long as `head`.
            caption: What the table shows.

        Raises:
            InputError: A row is longer or shorter than `head`.
        """
        cells = [list(row) for row in rows]
        for place, row in enumerate(cells):
            if len(row) != len(head):
                raise InputError.of(f"rows[{place}]", f"{len(row)} cells long", f"`head` names {len(head)}")
        shown = [[_shown(cell) for cell in row] for row in cells]
        numeric = [all(_NUMBER.match(cell) or cell == "–" for cell in column) for column in zip(*shown, strict=True)]
        self._add("table", head=list(head), rows=shown, numeric=numeric or [False] * len(head), caption=caption)

    def figure(self, figure: Figure, caption: str, alt: str = "") -> None:
        """Add a matplotlib figure as it is now, drawn as vectors; axes and text follow a light or dark page.

        Args:
            figure: The figure; it is not kept, later changes do not show.
            caption: What the figure shows and how to read it.
            alt: What a reader hears who cannot see it; by default the caption.

        Raises:
            MissingExtraError: matplotlib is not installed.
            InputTypeError: `figure` is not a matplotlib figure.
        """
        self._add("figure", source=_inline(figure), caption=caption, alt=alt or caption)

    def certificate(self, lines: Mapping[str, Cell]) -> None:
        """Add the certificate of an answer: errors, residuals, signs and settings, one line each."""
        self._add("certificate", lines={name: _shown(value) for name, value in lines.items()})

    def html(self) -> str:
        """Return the whole report as one HTML document.

        Raises:
            MissingExtraError: jinja2 is not installed.
        """
        try:
            import jinja2
        except ImportError:
            raise MissingExtraError("demo", "jinja2") from None
        world = jinja2.Environment(
            autoescape=True, finalize=_visible, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        template = files(__package__ or "jacops._extras").joinpath("report.html.j2").read_text(encoding="utf-8")
        return world.from_string(template).render(title=self.title, lead=self.lead, sections=self._sections)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the report, making folders as needed; an older file stays whole until the new one is complete.

        Args:
            path: Where to write.

        Returns:
            The path written.

        Raises:
            MissingExtraError: jinja2 is not installed.
        """
        target = Path(path)
        page = self.html()
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            partial.write_text(page, encoding="utf-8")
        return target

    def _add(self, kind: str, **content: object) -> None:
        self._sections[-1].blocks.append(_Block(kind, content))


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _visible(value: object) -> str:
    r"""Spell out what a reader cannot see: control characters, reordering marks, half surrogates.

    Example:
        >>> print(_visible("a" + chr(0) + "b" + chr(0x202E)))
        a\u0000b\u202e
    """

    def hidden(mark: str) -> bool:
        return mark in _REORDERING or (unicodedata.category(mark) in {"Cc", "Cs"} and mark not in "\n\t")

    return "".join(f"\\u{ord(mark):04x}" if hidden(mark) else mark for mark in str(value))


def _inline(figure: Figure) -> str:
    """Draw a figure as a data URI: an image of its own, where no script of the page or of the figure runs."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plot", "matplotlib") from None
    if not isinstance(figure, Figure):
        raise InputTypeError.of("figure", f"a {type(figure).__name__}", "a matplotlib Figure is needed")
    drawing = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "jacops"}):  # the same figure, the same bytes
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = _XML_FORBIDS.sub("", drawing.getvalue())
    svg = re.sub("|".join(_THEME), lambda colour: _THEME[colour.group()], svg)
    svg = re.sub(r"<defs>", _THEME_CSS + "<defs>", svg, count=1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")
