"""How the demo's figures look: quiet axes, two data colours, room for labels."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

BLUE, ORANGE, GREEN, RED, GREY = "#3b78c9", "#e0832b", "#2f9e6e", "#d1495b", "#8b95a5"

STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign, and a minus as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def use_style() -> None:
    """Let every figure drawn from here on look the same."""
    mpl.rcParams.update(STYLE)


def axes_in_a_row(height: float, *widths: float) -> tuple[Figure, list[Axes]]:
    """Return an empty figure as wide as the page, with one pair of axes per relative width."""
    figure = Figure(figsize=(8.6, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
    return figure, list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])


def show_digit(axes: Axes, pixels: ArrayLike, title: str, frame: str = GREY) -> None:
    """Draw one 8 x 8 digit in a coloured frame, dark on white whatever the page."""
    axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8.5, loc="center", pad=4)
    for spine in axes.spines.values():
        spine.set(visible=True, color=frame, linewidth=2)
