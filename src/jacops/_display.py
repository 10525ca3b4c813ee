"""How operators, plans and results are shown: each describes itself once; text and HTML are rendered from that."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from html import escape
from typing import Any

_NAMES = 6  # names in a list that are all shown; of more, the first five
_PDG = 355  # three digits of an error below this are rounded to two, others to one


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header.

    Attributes:
        header: One word per column; without any word the text has no header line.
        rows: The cells; a row of one cell spans all columns.
        caption: The text above it.
        labelled: In text, cells from this column on follow the word of their column, which then has no header line.
        folded: Whether HTML shows the caption alone until it is clicked.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    labelled: int | None = None
    folded: bool = False


@dataclass(frozen=True)
class Description:
    """What is to be shown of an object.

    Attributes:
        title: What it is, in one line.
        facts: Names and values.
        tables: Its tables.
        picture: Lines of characters of equal width.
    """

    title: str
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    picture: str = ""

    def text(self) -> str:
        """Return it as lines of text."""
        lines = [self.title, *(f"  {word}: {fact}" for word, fact in self.facts)]
        for table in self.tables:
            lines += [*([f"  {table.caption}"] if table.caption else []), *_lines(table)]
        return "\n".join([*lines, *self.picture.splitlines()])

    def html(self) -> str:
        """Return it as an HTML fragment, in which every text is escaped."""
        facts = [_row((f"<th {_LEFT}>{escape(word)}</th>", _cell(fact))) for word, fact in self.facts]
        parts = [f"<p><strong>{escape(self.title)}</strong></p>"]
        parts += [f"<table>{''.join(facts)}</table>"] if facts else []
        parts += [_html(table) for table in self.tables]
        parts += [f'<pre style="line-height: 1">{escape(self.picture)}</pre>'] if self.picture else []
        return f"<div>{''.join(parts)}</div>"


class Described:
    """What has a description, from which its repr and its HTML in notebooks are made."""

    @abstractmethod
    def _describe(self) -> Description:
        """Return what is to be shown."""

    def __repr__(self) -> str:
        return self._describe().text()

    def _repr_html_(self) -> str:
        return self._describe().html()


# ---- rendering -------------------------------------------------------------------------------------------------------

_LEFT = 'style="text-align: left"'


def _lines(table: Table) -> list[str]:
    """Return a table as text, columns aligned: numbers at their end, words at their beginning."""
    labelled = len(table.header) if table.labelled is None else table.labelled
    headed = table.labelled is None and any(table.header)
    whole = [[str(cell) for cell in row] for row in table.rows]
    full = [row for row in whole if len(row) == len(table.header)]
    shown = [list(table.header), *full] if headed else full
    widths = [max((len(row[k]) for row in shown), default=0) for k in range(len(table.header))]
    ends = [all(map(_is_number, (row[k] for row in full if row[k]))) for k in range(len(table.header))]

    def line(row: Sequence[str], labels: bool) -> str:
        if len(row) != len(table.header):
            return f"  {row[0]}"
        cells = [cell.rjust(w) if end else cell.ljust(w) for cell, w, end in zip(row, widths, ends, strict=True)]
        if labels:
            cells[labelled:] = [
                f"{w} {c}".strip() for w, c in zip(table.header[labelled:], cells[labelled:], strict=True)
            ]
        return f"  {'  '.join(cells)}".rstrip()

    return [*([line(table.header, False)] if headed else []), *(line(row, True) for row in whole)]


def _is_number(cell: str) -> bool:
    try:
        float(cell.split()[0].replace(",", "").rstrip("%"))
    except (ValueError, IndexError):
        return False
    return True


def _html(table: Table) -> str:
    header = _row(f"<th {_LEFT}>{escape(word)}</th>" for word in table.header) if any(table.header) else ""
    span = f' colspan="{len(table.header)}"'
    rows = [_row(_cell(cell, span if len(row) != len(table.header) else "") for cell in row) for row in table.rows]
    body = f"<thead>{header}</thead><tbody>{''.join(rows)}</tbody></table>"
    if table.folded:
        return f"<details><summary>{escape(table.caption)}</summary><table>{body}</details>"
    caption = f"<caption {_LEFT}>{escape(table.caption)}</caption>" if table.caption else ""
    return f"<table>{caption}{body}"


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _cell(text: str, span: str = "") -> str:
    return f"<td{span} {_LEFT}>{escape(str(text).strip())}</td>"


# ---- words -----------------------------------------------------------------------------------------------------------


def with_error(value: float, error: float) -> str:
    """Return a number with its standard error, to the digits that the error leaves.

    The error has two digits where it starts with 1, 2 or up to 3.54, else one (Particle Data Group, 2024, 5.3).

    Example:
        >>> with_error(12.3456, 0.42), with_error(12.3456, 0.123), with_error(1.5e8, 2e5), with_error(5.0, 0.0)
        ('12.3 ± 0.4', '12.35 ± 0.12', '(1.5000 ± 0.0020)e+08', '5 (exact)')
    """
    if error == 0:
        return f"{value:.10g} (exact)"
    if not (math.isfinite(value) and math.isfinite(error)):
        return f"{value:.4g} ± {error:.2g}"
    lead, power = f"{abs(error):.2e}".split("e")
    last = int(power) - (float(lead) * 100 < _PDG)  # the decimal place of the last digit that is shown
    size = max(abs(value), abs(error))
    scale = math.floor(math.log10(size)) if not 1e-3 <= size < 1e7 or last > 0 else 0
    places = max(0, scale - last)
    shown = f"{value / 10.0**scale:.{places}f} ± {abs(error) / 10.0**scale:.{places}f}"
    return f"({shown})e{scale:+03d}" if scale else shown


def listed(names: Sequence[str]) -> str:
    """Return names in a row, the first five of many."""
    return ", ".join(names if len(names) <= _NAMES else [*names[:5], f"… {len(names) - 5} more"]) or "none"


def shortened(text: str, most: int) -> str:
    """Return a name on one line, its middle left out where it is longer than `most` characters.

    What cannot be printed, such as a control character, is replaced by U+FFFD.

    Example:
        >>> shortened("ENSG00000141510 tumour protein p53", 20)
        'ENSG000001…otein p53'
    """
    line = "".join(mark if mark.isprintable() else "\ufffd" for mark in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most // 2]}…{line[len(line) - (most - most // 2) + 1 :]}"


def changed(recipe: Any) -> str:
    """Return a dataclass as a call with those of its fields alone that differ from their defaults."""
    given = [
        f"{field.name}={getattr(recipe, field.name)!r}"
        for field in fields(recipe)
        if field.init and field.repr and (field.default is MISSING or getattr(recipe, field.name) != field.default)
    ]
    return f"{type(recipe).__name__}({', '.join(given)})"
