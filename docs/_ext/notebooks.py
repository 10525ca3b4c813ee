"""Notebooks of the tutorials without Sphinx's roles, which mean nothing outside the site."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import sphinx_gallery.notebook

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_PAGE = re.compile(r":doc:`(?:(?P<words>[^`<]+?)\s*<)?/?(?P<page>[^`<>]+)>?`")
_CODE = re.compile(r":(?:class|func|meth|mod|data|attr):`(?P<code>[^`]+)`")


def _without_roles(text: str, address: str) -> str:
    """Return reStructuredText whose links to pages are absolute, or words where the site has no address."""

    def page(match: re.Match[str]) -> str:
        words = match["words"] or match["page"]
        return f"`{words} <{address}{match['page']}.html>`_" if address else f"*{words}*"

    return _CODE.sub(r"``\g<code>``", _PAGE.sub(page, text))


def setup(app: Sphinx) -> dict[str, bool]:
    """Convert text before sphinx-gallery makes Markdown of it."""
    convert = sphinx_gallery.notebook.rst2md

    def converted(text: str, *args: Any, **options: Any) -> str:
        return convert(_without_roles(text, app.config.html_baseurl), *args, **options)

    sphinx_gallery.notebook.rst2md = converted
    return {"parallel_read_safe": True}
