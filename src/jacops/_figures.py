"""Figures of results, in matplotlib, which loads when one is drawn.

A figure made here is none of pyplot's: a notebook shows it once, as the value of its cell, and nothing is left open.
Axes that are given stay with the caller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ._display import shortened
from .errors import InputError, InputTypeError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Numbers: TypeAlias = NDArray[Any]

POSITIVE, NEGATIVE, NEUTRAL = "#4c72b0", "#c44e52", "0.55"  # blue and red are distinguished with any colour vision
_CELLS = 256  # rows and columns of a picture of a matrix: fewer than a figure has pixels for, so that each is seen
_POINTS = 5000  # above this points are drawn as an image, so that vector files stay small
_MOST_NAMES = 40  # names along an axis that can be read
_MOST_LETTERS = 120  # single letters, as of DNA, need no more room than their width
_LONGEST = 32  # characters of a name beside an axis: more would leave no room for the figure
_BINS = 60  # of values along an axis, in which points that would cover each other stand side by side
_DECADES = 100  # positive values that span more than this ratio go on a logarithmic axis


def canvas(ax: Axes | None, size: tuple[float, float], panels: int = 1) -> tuple[Any, list[Axes]]:
    """Return what a plot returns, and the axes to draw into: a new figure, or the axes given.

    Args:
        ax: Given axes.
        size: Of a new figure, in inches.
        panels: How many axes, side by side.

    Raises:
        MissingExtraError: Matplotlib is not installed.
        InputTypeError: `ax` is no axes.
        InputError: One axes is given for several panels.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plot", "matplotlib") from None
    if ax is None:
        plt.draw_if_interactive()  # loads the backend: that of notebooks then teaches IPython to show figures
        figure = Figure(figsize=size, layout="constrained")
        return figure, list(figure.subplots(1, panels, squeeze=False)[0])
    if not isinstance(ax, Axes):
        raise InputTypeError.of("ax", f"a {type(ax).__name__}", "matplotlib axes are needed")
    if panels > 1:
        raise InputError.of("ax", "one axes", f"{panels} panels are to be drawn", "Ask for one, or leave `ax` out.")
    return ax, [ax]


def legend(ax: Axes, colours: Mapping[str, str]) -> None:
    """Add a legend of colours above the axes."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=word) for word, colour in colours.items()]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(handles)}
    ax.legend(handles=handles, fontsize=8, frameon=False, borderaxespad=0.2, handlelength=1, **place)


def bars(ax: Axes, names: Sequence[str], values: Sequence[float], neutral: int = 0) -> None:
    """Draw horizontal bars from the top downwards, by sign; the last `neutral` ones in grey."""
    colours = [POSITIVE if value >= 0 else NEGATIVE for value in values]
    colours[len(colours) - neutral :] = [NEUTRAL] * neutral
    _rows(ax, names)
    ax.barh(range(len(values)), values, color=colours)


def waterfall(ax: Axes, names: Sequence[str], values: Sequence[float]) -> None:
    """Draw bars from the top downwards, each from where the last one ended, and their sum; the first one in grey."""
    ends = np.cumsum(values)
    starts = np.concatenate([[0.0], ends[:-1]])
    colours = [NEUTRAL, *(POSITIVE if value >= 0 else NEGATIVE for value in values[1:]), NEUTRAL]
    _rows(ax, [*names, "output"])
    ax.use_sticky_edges = False  # where a bar begins is no end of the axis
    ax.barh(range(len(values) + 1), [*values, ends[-1]], left=[*starts, 0.0], color=colours)
    for k, end in enumerate(ends):
        ax.plot([end, end], [k - 0.4, k + 1.4], color="0.3", linewidth=0.8)


def swarm(ax: Axes, names: Sequence[str], values: Numbers) -> None:
    """Draw every value as a point, a row per name from the top downwards; points of a row stand side by side.

    Args:
        ax: The axes.
        names: Of the rows.
        values: `(rows, points)`.
    """
    _rows(ax, names)
    for row, points in enumerate(values):
        low, high = float(points.min()), float(points.max())
        cell = np.floor((points - low) / ((high - low) or 1) * _BINS)
        # Sorted by value within a bin, points would form meaningless patterns.
        order = np.lexsort((np.random.default_rng(0).random(len(points)), cell))
        cell = cell[order]
        number = np.arange(len(points)) - np.searchsorted(cell, cell)  # within the bin
        side = (number + 1) // 2 * np.where(number % 2, 1, -1)  # 0, 1, -1, 2, -2, …
        room = max(1.0, float(np.abs(side).max(initial=0)) / 0.4) if len(points) else 1.0
        step = min(0.08, 1 / room)
        colours = np.where(points[order] >= 0, POSITIVE, NEGATIVE)
        look: dict[str, Any] = {"s": 7, "linewidth": 0, "alpha": 0.8, "rasterized": values.size > _POINTS}
        ax.scatter(points[order], row + side * step, c=colours, **look)


def _rows(ax: Axes, names: Sequence[str]) -> None:
    shown = [shortened(name, _LONGEST) for name in names]
    ax.set_yticks(range(len(names)), shown, fontsize=8, parse_math=False)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
    ax.spines[["top", "right"]].set_visible(False)


def heat_map(ax: Axes, values: Numbers, label: str, *, square: bool) -> None:
    """Draw signed values as colours, white at zero, with a colour bar."""
    most = float(np.abs(values).max(initial=0)) or 1.0
    aspect = "equal" if square else "auto"
    shown = ax.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect=aspect, interpolation="nearest")
    # Beside square cells the bar has to be part of the axes: it would be taller than the image.
    place: dict[str, Any] = {"cax": ax.inset_axes((1.04, 0, 0.05, 1), label="<colorbar>")} if square else {"ax": ax}
    bar = ax.figure.colorbar(shown, **place)
    bar.set_label(label.replace(", ", ",\n"), fontsize=8)  # one line is longer than a low figure
    bar.ax.tick_params(labelsize=8)
    bar.formatter.set_powerlimits((-3, 4))  # pyright: ignore[reportAttributeAccessIssue]


def places(ax: Axes, axis: str, names: Sequence[str] | None, many: int) -> None:
    """Name the places along an axis of a heat map, some of them where they are many; whole numbers without names."""
    if names is None:
        whole_numbers(ax, axis)
        return
    letters = max(map(len, names), default=0) <= 1
    step = math.ceil(many / (_MOST_LETTERS if letters and axis == "x" else _MOST_NAMES))
    shown = [shortened(name, _LONGEST) for name in names][::step]
    turned = 90 if axis == "x" and not letters else 0
    look: dict[str, Any] = {"rotation": turned, "fontsize": 8 if many <= _MOST_NAMES else 6, "parse_math": False}
    getattr(ax, f"set_{axis}ticks")(range(0, many, step), shown, **look)
    if letters and axis == "x":
        ax.tick_params(axis="x", length=0)


def whole_numbers(ax: Axes, axis: str, most: int | None = None) -> None:
    """Put ticks at whole numbers only, in at most `most` intervals."""
    from matplotlib.ticker import MaxNLocator

    getattr(ax, f"{axis}axis").set_major_locator(MaxNLocator(most or "auto", steps=[1, 2, 5, 10], integer=True))


def spy(ax: Axes, rows: Numbers, columns: Numbers, shape: tuple[int, int]) -> None:
    """Draw where a matrix has entries, several to a cell where it is large."""
    m, n = shape
    high, wide = max(1, min(m, _CELLS)), max(1, min(n, _CELLS))
    cells = np.zeros((high, wide), bool)
    cells[rows.astype(np.int64) * high // max(m, 1), columns.astype(np.int64) * wide // max(n, 1)] = True
    place = (-0.5, max(n, 1) - 0.5, max(m, 1) - 0.5, -0.5)
    aspect = "equal" if max(m, n) <= 4 * min(m, n) else "auto"  # a strip would be too thin to see
    ax.imshow(cells, cmap="Blues", vmin=0, vmax=1.2, extent=place, aspect=aspect, interpolation="nearest")
    ax.set(xlabel="column", ylabel="row")
    for axis, size, across in (("x", n, m), ("y", m, n)):  # fewer ticks along the short side
        whole_numbers(ax, axis, max(1, 8 * size // max(size, across, 1)) if aspect == "equal" else None)


def eigenvalues(ax: Axes, values: Numbers, errors: Numbers) -> None:
    """Draw values by their number with error bars; on a logarithmic axis where all are positive and far apart."""
    number = np.arange(len(values))
    for chosen, colour, word in ((values >= 0, POSITIVE, "positive"), (values < 0, NEGATIVE, "negative")):
        if chosen.any():
            look: dict[str, Any] = {"fmt": "o", "markersize": 4, "capsize": 2, "linewidth": 1, "color": colour}
            ax.errorbar(number[chosen], values[chosen], errors[chosen], label=f"{word}, ± residual", **look)
    if len(values) and (values > 0).all() and values.max() > _DECADES * values.min():
        ax.set_yscale("log")
    else:
        ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set(xlabel="index", ylabel="eigenvalue")
    whole_numbers(ax, "x")
    ax.legend(fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def convergence(ax: Axes, objectives: Sequence[float], rejected: Sequence[tuple[int, float]]) -> None:
    """Draw objectives step by step, and what steps that were not taken would have led to."""
    kept = [(step, value) for step, value in enumerate(objectives) if value > 0]  # zero has no place on the axis
    ax.plot(*(zip(*kept, strict=True) if kept else ([], [])), "o-", color=POSITIVE, markersize=4, label="objective")
    tried = [(step, value) for step, value in rejected if 0 < value < math.inf]
    if tried:
        ax.plot(*zip(*tried, strict=True), "x", color=NEGATIVE, label="rejected step")
    if kept or tried:
        ax.set_yscale("log")
    ax.set(xlabel="step", ylabel="objective")
    whole_numbers(ax, "x")
    ax.legend(fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def residuals(ax: Axes, values: Numbers) -> None:
    """Draw residuals in their order."""
    ax.axhline(0, color="0.3", linewidth=0.8)
    look: dict[str, Any] = {"markersize": 3, "rasterized": len(values) > _POINTS}
    ax.plot(np.arange(len(values)), values, ".", color=POSITIVE, **look)
    ax.set(xlabel="row", ylabel="residual: output − target")
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    whole_numbers(ax, "x")
    ax.spines[["top", "right"]].set_visible(False)


def density(
    ax: Axes, x: Numbers, y: Numbers, band: Numbers, ends: tuple[float, float], lowest: float, colour: Any, label: str
) -> None:
    """Draw a density on a logarithmic axis with a band, and its ends."""
    (line,) = ax.plot(x, y.clip(lowest / 10), linewidth=1.2, color=colour, label=label)
    colour, low, high = line.get_color(), (y - band).clip(lowest / 10), (y + band).clip(lowest / 10)
    explained = ax.get_legend() is not None  # by a density that was drawn before
    shade = "" if explained else "± 2 standard errors"
    ax.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0, label=shade)
    for k, value in enumerate(ends):
        word = "" if k or explained else "extreme Ritz values"
        ax.axvline(value, color=colour, linestyle=":", linewidth=0.8, label=word)
    ax.set(yscale="log", ylim=(lowest, 2 * float((y + band).max())))
    ax.set(xlabel="eigenvalue", ylabel="density: share of eigenvalues per unit")
    ax.legend(fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
