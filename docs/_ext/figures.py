"""Figures that are the value of a block, for sphinx-gallery, which by itself keeps those of pyplot only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from sphinx_gallery.scrapers import matplotlib_scraper

if TYPE_CHECKING:
    from sphinx_gallery.py_source_parser import Block

_VALUE = "___"  # where sphinx-gallery holds the value of a block's last line


def scrape(block: Block, block_vars: dict[str, Any], gallery_conf: dict[str, Any], **options: Any) -> str:
    """Return the figures of a block in reST; what a notebook shows as the value of its cell is one of them."""
    names = block_vars["example_globals"]
    if isinstance(names.get(_VALUE), Figure):
        plt.figure(names[_VALUE])  # pyplot's from now on
        names[_VALUE] = None  # a picture once, no words
    return matplotlib_scraper(block, block_vars, gallery_conf, **options)
