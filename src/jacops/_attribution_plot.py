"""Figures of contributions: bars, a waterfall, points of all samples, or heat maps over an image or a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from ._attribution_tables import FlatContributions, OutputPlace, TabledContributions
from ._figures import NEGATIVE, NEUTRAL, POSITIVE, bars, canvas, heat_map, legend, places, swarm, waterfall
from ._requirements import check_choice, check_positive, check_whole
from ._words import ContributionFigure
from .errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# How features are drawn by their axes; those of three are (channels, height, width), as in torch.
BY_AXES: dict[int, ContributionFigure] = {1: "bars", 2: "sequence", 3: "image"}
_MAPS = {"image": (2, 3), "sequence": (1, 2)}  # how many axes features have
_ALL_OUTPUTS = 32  # rows of a heat map over a sequence that can be read


class DrawnContributions(TabledContributions):
    """Contributions that draw themselves."""

    @overload
    def plot(
        self,
        sample: int | None = 0,
        output: OutputPlace = None,
        *,
        kind: ContributionFigure = "auto",
        k: int = 10,
        names: Sequence[str] | None = None,
        shape: Sequence[int] | None = None,
        input: str | int | None = None,
        positions: int = 0,
        ax: None = None,
    ) -> Figure: ...
    @overload
    def plot(
        self,
        sample: int | None = 0,
        output: OutputPlace = None,
        *,
        kind: ContributionFigure = "auto",
        k: int = 10,
        names: Sequence[str] | None = None,
        shape: Sequence[int] | None = None,
        input: str | int | None = None,
        positions: int = 0,
        ax: Axes,
    ) -> Axes: ...
    def plot(
        self,
        sample: int | None = 0,
        output: OutputPlace = None,
        *,
        kind: ContributionFigure = "auto",
        k: int = 10,
        names: Sequence[str] | None = None,
        shape: Sequence[int] | None = None,
        input: str | int | None = None,
        positions: int = 0,
        ax: Axes | None = None,
    ) -> Figure | Axes:
        """Draw what features add to an output, in the units of the output.

        Args:
            sample: Which sample; None for all of them, as bars of mean absolute contributions or as `"summary"`.
            output: Which output, a number for each of its axes; by default the largest one of this sample, for
                `"sequence"` all of up to 32.
            kind: `"bars"`: the features of largest contribution, the sum of the others, and the bias part;
                `"waterfall"`: the same, one added to the other, from the bias part to the output; `"summary"`: the
                contributions of all samples, a point each; `"image"`: a heat map over height and width, channels
                summed; `"sequence"`: a heat map of outputs over positions, what a position adds with all of its
                entries. By default as the features are shaped: `(features,)` bars, `(positions, entries)` a sequence,
                `(channels, height, width)` an image; bars where there are several inputs.
            k: How many features have a bar of their own.
            names: Of the features, in order; of the positions (tokens) for `"sequence"`. By default those that the
                contributions came with.
            shape: The shape of a sample whose features came flat, such as `(28, 28)` with `kind="image"`.
            input: Of which input a heat map is, by its name or number, where there are several.
            positions: Which axis of the features counts positions: 1 for `(channels, positions)`, as of one-hot DNA.
            ax: Matplotlib axes to draw into; a new figure otherwise, which `pyplot.show` does not show.

        Returns:
            The figure; the axes where they were given.

        Raises:
            MissingExtraError: Matplotlib is not installed.
            InputError: An argument is out of range or does not fit the features, or there are several outputs.

        Example:
            >>> import jacops, torch
            >>> found = jacops.contributions(torch.nn.Linear(3, 2).double(), torch.ones(4, 3).double())
            >>> [ax.get_xlabel() for ax in found.plot(sample=1, output=0).axes]
            ['contribution to output 0, in its units']
        """
        flat = self._flat("plot")
        check_choice("kind", kind, ContributionFigure)
        if sample is not None:
            flat.check_sample(sample)
        elif not len(flat.values):
            raise InputError.of("plot", "called with no samples", "at least one is needed")
        place = flat.place(output)
        grid = _grid(flat, shape, input)
        kind = _kind(kind, sample, grid)
        if kind in _MAPS:
            rows = _Drawn(flat, 0 if sample is None else sample, place, names)
            return _image(rows, grid, ax) if kind == "image" else _sequence(rows, grid, positions, ax)
        chosen = place if place is not None else _largest(flat, sample)
        if input is not None:
            raise InputError.of("input", repr(input), f"{kind!r} is of all inputs")
        _check_names(names, flat.names.count)
        own = _Features(flat, sample, chosen, names, check_positive("k", k))
        return own.swarm(ax) if kind == "summary" else own.bars(ax, falls=kind == "waterfall")


class _Grid(NamedTuple):
    """The features of one input on their axes.

    Attributes:
        many: How many inputs there are, of which one was picked.
        start: Where they begin among all features.
        shape: Their axes.
        axes: Names along each.
        word: How the input is called.
    """

    many: int
    start: int
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...] | None, ...]
    word: str

    def values(self, flat: FlatContributions, sample: int) -> np.ndarray:
        """Return the contributions to one sample, `(outputs, *shape)`."""
        part = flat.values[sample, :, self.start : self.start + int(np.prod(self.shape))]
        return part.cpu().double().numpy().reshape(-1, *self.shape)


def _grid(flat: FlatContributions, shape: Sequence[int] | None, which: str | int | None) -> _Grid:
    names, many = flat.names, len(flat.names.inputs)
    number = 0 if which is None else names.inputs.index(which) if which in names.inputs else which
    if isinstance(number, str | bool) or not 0 <= number < many:
        todo = f"There are {many}: {', '.join(names.inputs)}." if many > 1 else "There is one."
        raise InputError.of("input", repr(which), "the name or the number of an input is needed", todo)
    sizes = [int(np.prod(one)) for one in names.shapes]
    found, axes = names.shapes[number], names.axes[number]
    if shape is not None:
        if int(np.prod(shape)) != sizes[number]:
            raise InputError.of("shape", tuple(shape), f"a sample has {sizes[number]} features")
        found, axes = tuple(shape), (None,) * len(shape)
    picked = 1 if which is not None else many
    return _Grid(picked, sum(sizes[:number]), found, axes, names.inputs[number])


def _kind(kind: ContributionFigure, sample: int | None, grid: _Grid) -> ContributionFigure:
    axes = len(grid.shape)
    if kind == "auto":
        return "bars" if sample is None or grid.many > 1 else BY_AXES.get(axes, "bars")
    if kind in _MAPS and grid.many > 1:
        raise InputError.of("input", "missing", f"{kind!r} is of one input", "Pass its name.")
    if kind in _MAPS and axes not in _MAPS[kind]:
        todo = "Pass `shape=`, the shape of one sample."
        came = f"{kind!r} for features of shape {grid.shape}"
        raise InputError.of("kind", came, f"it needs {' or '.join(map(str, _MAPS[kind]))} axes", todo)
    if sample is None and kind not in ("bars", "summary"):
        raise InputError.of("sample", "None", f"{kind!r} is of one sample", "Take 'bars' or 'summary'.")
    return kind


def _largest(flat: FlatContributions, sample: int | None) -> int:
    return int((flat.output.double().mean(0) if sample is None else flat.output[sample]).argmax())


def _check_names(names: Any, many: int) -> None:
    if names is not None and len(names) != many:
        raise InputError.of("names", f"{len(names)} of them", f"{many} are needed, one each")


# ---- heat maps -------------------------------------------------------------------------------------------------------


class _Drawn(NamedTuple):
    """What a heat map is of: a sample and an output, None for all; and names that were given for it."""

    flat: FlatContributions
    sample: int
    place: int | None
    names: Sequence[str] | None

    def title(self, word: str) -> str:
        """Return the title."""
        return f"sample {self.sample}" + (f", {word}" if word else "")


def _label(flat: FlatContributions, place: int) -> str:
    return f"contribution to {flat.word(place)}, in its units"


def _image(of: _Drawn, grid: _Grid, ax: Axes | None) -> Any:
    place = _largest(of.flat, of.sample) if of.place is None else of.place
    values = grid.values(of.flat, of.sample)[place]
    channels = values.ndim == 3
    drawn, (panel,) = canvas(ax, (5.4, 4.0))
    label = _label(of.flat, place) + (", channels summed" if channels and len(values) > 1 else "")
    heat_map(panel, values.sum(0) if channels else values, label, square=True)
    for axis, names, size in zip("yx", grid.axes[-2:], grid.shape[-2:], strict=True):
        places(panel, axis, names, size)
    panel.set(xlabel="column", ylabel="row")
    panel.set_title(of.title(grid.word), fontsize=10, parse_math=False)
    return drawn


def _sequence(of: _Drawn, grid: _Grid, positions: int, ax: Axes | None) -> Any:
    flat, axes = of.flat, len(grid.shape)
    check_whole("positions", positions, 0)
    if positions >= axes:
        raise InputError.of("positions", positions, f"features have {axes} axes, counted from 0")
    values = grid.values(flat, of.sample)
    rows = values if axes == 1 else values.sum(2 - positions)
    outputs = [_largest(flat, of.sample) if of.place is None else of.place]
    if of.place is None and len(rows) <= _ALL_OUTPUTS:
        outputs = list(range(len(rows)))
    many = rows.shape[1]
    _check_names(of.names, many)
    names = grid.axes[positions] if of.names is None else [str(name) for name in of.names]
    label = _label(flat, outputs[0]) if len(outputs) == 1 else "contribution, in units of the output"
    drawn, (panel,) = canvas(ax, (min(14.0, 2.6 + 0.22 * many), min(7.0, 2.2 + 0.22 * len(outputs))))
    heat_map(panel, rows[outputs], label, square=False)
    places(panel, "x", names, many)
    words = [flat.word(place).removeprefix("output ") for place in outputs]
    panel.set_yticks(range(len(outputs)), words, fontsize=8)
    panel.set(xlabel="position", ylabel="output")
    panel.set_title(of.title(grid.word), fontsize=10, parse_math=False)
    return drawn


# ---- features one by one ---------------------------------------------------------------------------------------------


class _Features(NamedTuple):
    """What bars and points are of: a sample, None for all, an output, and the features of largest contribution."""

    flat: FlatContributions
    sample: int | None
    place: int
    names: Sequence[str] | None
    k: int

    def _values(self) -> np.ndarray:
        chosen = self.flat.values[:, self.place] if self.sample is None else self.flat.values[self.sample, self.place]
        return chosen.cpu().double().numpy()

    def _words(self, chosen: np.ndarray) -> list[str]:
        return [self.flat.names.label(int(i)) if self.names is None else str(self.names[i]) for i in chosen]

    def bars(self, ax: Axes | None, *, falls: bool) -> Any:
        """Draw the features of largest contribution as bars of their own, the others as one."""
        own, every = self._values(), self.sample is None
        bias = self.flat.bias[:, self.place] if every else self.flat.bias[self.sample, self.place]
        constant = float(bias.double().abs().mean() if every else bias)
        own = np.abs(own).mean(0) if every else own
        order = np.argsort(-np.abs(own), kind="stable")
        first, rest = order[: self.k], order[self.k :]
        others = len(rest) and not every  # means do not add up, and the many would hide the few
        words = self._words(first) + ([f"{len(rest):,} other{'s' * (len(rest) > 1)}"] if others else [])
        sizes = [*own[first].tolist(), *([float(own[rest].sum())] if others else [])]
        drawn, (panel,) = canvas(ax, (5.5, 1.5 + 0.26 * (len(words) + 1 + falls)))
        if falls:
            waterfall(panel, ["bias", *words], [constant, *sizes])
        else:
            bars(panel, [*words, "bias"], [*sizes, constant], neutral=1)
        word = self.flat.word(self.place)
        panel.set(xlabel=f"{'mean |contribution|' if every else 'contribution'} to {word}, in its units")
        panel.set_ylabel("feature")
        title = self._samples(len(first)) if every else f"sample {self.sample}: {word} = {self._total():.4g}"
        panel.set_title(title, fontsize=10, pad=22)
        signs = {"features": POSITIVE} if every else {"raises the output": POSITIVE, "lowers it": NEGATIVE}
        legend(panel, {**signs, "bias, output" if falls else "bias": NEUTRAL})
        return drawn

    def _samples(self, shown: int) -> str:
        n, many = len(self.flat.values), self.flat.names.count
        return f"{n:,} sample{'s' * (n != 1)}, {shown:,} of {many:,} features"

    def _total(self) -> float:
        return float(self.flat.output[self.sample, self.place])

    def swarm(self, ax: Axes | None) -> Any:
        """Draw the contributions of all samples, for the features that are largest in the mean."""
        own = self._values() if self.sample is None else self._replace(sample=None)._values()
        first = np.argsort(-np.abs(own).mean(0), kind="stable")[: self.k]
        drawn, (panel,) = canvas(ax, (6.0, 1.5 + 0.32 * len(first)))
        swarm(panel, self._words(first), own[:, first].T)
        panel.set(xlabel=_label(self.flat, self.place), ylabel="feature")
        panel.set_title(self._samples(len(first)), fontsize=10, pad=22)
        legend(panel, {"raises the output": POSITIVE, "lowers it": NEGATIVE})
        return drawn
