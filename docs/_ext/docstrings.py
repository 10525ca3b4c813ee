"""Docstrings as they stand in the source, in Markdown, for the reference: code in one backtick, formulas in dollars."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_MARKED = re.compile(r"(?<![`:\w])`(?P<code>[^`]+)`(?!`)|(?<!\\)\$(?P<formula>[^$]+)\$")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")


def _role(match: re.Match[str]) -> str:
    """Return a piece of Markdown as reStructuredText; a space that the role's end needs is escaped."""
    if match["formula"]:
        return rf"\ :math:`{' '.join(match['formula'].split())}`\ "
    return rf"\ ``{' '.join(match['code'].split())}``\ "


def _converted(paragraph: str) -> str:
    return paragraph if paragraph.lstrip().startswith(">>>") else _MARKED.sub(_role, paragraph)


def _convert(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring's lines in place, before its sections are read."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment; napoleon takes `words:` at the very beginning for a type
    lines[:] = "\n\n".join(_converted(part) for part in _PARAGRAPH.split("\n".join(lines))).split("\n")


class LinkNames(SphinxPostTransform):
    """Makes a link of code that is the name of something public, on every page: `ggn`, `jacops.ggn`, `solvers.CG`."""

    default_priority = 20

    def run(self, **_: Any) -> None:
        """Replace what can be found in the reference."""
        objects = self.env.domains.python_domain.objects
        for code in list(self.document.findall(nodes.literal)):
            if isinstance(code.parent, nodes.reference | nodes.title) or "xref" in code["classes"]:
                continue
            name = f"jacops.{code.astext().removesuffix('()').removeprefix('jacops.')}"
            found, here = objects.get(name), self.env.docname
            if found and found.docname != here:
                link = make_refnode(self.app.builder, here, found.docname, found.node_id, code.deepcopy(), name)
                code.replace_self(link)


def setup(app: Sphinx) -> dict[str, bool]:
    """Convert docstrings before napoleon sees them, and link names when all pages are known."""
    app.connect("autodoc-process-docstring", _convert, priority=400)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
