"""Formulas as MathML, which browsers draw themselves: no script, no font to load, nothing from a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from docutils.nodes import Element, SkipNode
from latex2mathml.converter import convert

if TYPE_CHECKING:
    from collections.abc import Callable

    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator


def _visitor(display: Literal["inline", "block"]) -> Callable[[HTML5Translator, Element], None]:
    def visit(writer: HTML5Translator, node: Element) -> None:
        formula = convert(node.astext(), display=display)
        writer.body.append(f'<div class="math">{formula}</div>' if display == "block" else formula)
        raise SkipNode

    return visit


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer `mathml`, for `html_math_renderer`."""
    app.add_html_math_renderer("mathml", (_visitor("inline"), None), (_visitor("block"), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
