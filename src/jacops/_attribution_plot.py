"""Figures of contributions: bars, a waterfall, or heat maps over an image or a sequence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ._display import Described
from ._figures import NEGATIVE, NEUTRAL, POSITIVE, bars, canvas, heat_map, legend, positions, waterfall
from ._requirements import check_choice, check_positive, check_whole
from ._words import ContributionFigure
from .errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BY_AXES: dict[int, ContributionFigure] = {
    1: "bars",
    2: "sequence",
    3: "image",
}  # torch: (channels, height, width)
_AXES = {"bars": (1, 2, 3, 4), "waterfall": (1, 2, 3, 4), "image": (2, 3), "sequence": (1, 2)}
_ALL_OUTPUTS = 32  # rows of a heat map over a sequence that can be read


class DrawnContributions(Described):
    """Contributions that draw themselves."""

    values: Any
    bias: Any
    output: Any

    @abstractmethod
    def _flat(self, call: str) -> DrawnContributions:
        """Return the same with outputs on one axis."""

    @overload
    def plot(
        self,
        sample: int = 0,
        output: int | None = None,
        *,
        kind: ContributionFigure = "auto",
        k: int = 10,
        names: Sequence[str] | None = None,
        shape: Sequence[int] | None = None,
        ax: None = None,
    ) -> Figure: ...
    @overload
    def plot(
        self,
        sample: int = 0,
        output: int | None = None,
        *,
        kind: ContributionFigure = "auto",
        k: int = 10,
        names: Sequence[str] | None = None,
        shape: Sequence[int] | None = None,
        ax: Axes,
    ) -> Axes: ...
    def plot(
        self,
        sample: int = 0,
        output: int | None = None,
        *,
        kind: ContributionFigure = "auto",
        k: int = 10,
        names: Sequence[str] | None = None,
        shape: Sequence[int] | None = None,
        ax: Axes | None = None,
    ) -> Figure | Axes:
        """Draw what the features of one sample add to an output, in the units of the output.

        Args:
            sample: Which sample.
            output: Which output; by default the largest one of this sample, for `"sequence"` all of up to 32.
            kind: `"bars"`: the features of largest contribution, the sum of the others, and the bias part;
                `"waterfall"`: the same, one added to the other, from the bias part to the output; `"image"`: a heat
                map over height and width, channels summed; `"sequence"`: a heat map of outputs over positions, what a
                position adds with all of its entries. By default as the features are shaped: `(features,)` bars,
                `(positions, entries)` a sequence, `(channels, height, width)` an image.
            k: How many features have a bar of their own.
            names: Of the features, in order; of the positions (tokens) for `"sequence"`.
            shape: The shape of a sample whose features came flat, such as `(28, 28)` with `kind="image"`.
            ax: Matplotlib axes to draw into; a new figure otherwise, which `pyplot.show` does not know.

        Returns:
            The figure; the axes where they were given.

        Raises:
            MissingExtraError: Matplotlib is not installed.
            InputError: An argument is out of range, or does not fit the features.

        Example:
            >>> import jacops, torch
            >>> found = jacops.contributions(torch.nn.Linear(3, 2).double(), torch.ones(4, 3).double())
            >>> [ax.get_xlabel() for ax in found.plot(sample=1, output=0).axes]
            ['contribution to output 0']
        """
        flat = self._flat("plot")
        values, kind = flat._chosen(sample, output, kind, shape)
        if kind in ("bars", "waterfall"):
            return flat._as_bars(values, sample, output, kind == "waterfall", check_positive("k", k), names, ax)
        outputs = [flat._largest(sample)] if output is None else [output]
        if kind == "sequence" and output is None and values.shape[0] <= _ALL_OUTPUTS:
            outputs = list(range(values.shape[0]))
        shown, word = values[outputs], f"contribution to output {outputs[0]}" if len(outputs) == 1 else "contribution"
        if kind == "image":
            image = shown[0].sum(0) if shown.ndim == 4 else shown[0]
            drawn, (panel,) = canvas(ax, (4.8, 4.0))
            heat_map(panel, image, word + (", channels summed" if shown.ndim == 4 else ""), square=True)
            panel.set(xlabel="column", ylabel="row")
        else:
            rows = shown.sum(2) if shown.ndim == 3 else shown
            _check_names(names, rows.shape[1])
            drawn, (panel,) = canvas(ax, (min(12.0, 2.5 + 0.3 * rows.shape[1]), min(6.0, 1.6 + 0.3 * len(rows))))
            heat_map(panel, rows, word, square=False)
            positions(panel, names, rows.shape[1])
            panel.set_yticks(range(len(rows)), [str(number) for number in outputs], fontsize=8)
            panel.set_ylabel("output")
        panel.set_title(f"sample {sample}", fontsize=10)
        return drawn

    def _chosen(
        self, sample: int, output: int | None, kind: ContributionFigure, shape: Any
    ) -> tuple[Any, ContributionFigure]:
        """Return the values of a sample, `(outputs, *features)`, and what to draw."""
        n, out, *features = self.values.shape
        for name, value, size in (("sample", sample, n), ("output", 0 if output is None else output, out)):
            check_whole(name, value, 0)
            if value >= size:
                raise InputError.of(name, value, f"there are {size}, counted from 0")
        values = self.values[sample].detach().cpu().double().numpy()
        if shape is not None:
            if int(np.prod(shape)) != int(np.prod(features)):
                raise InputError.of("shape", tuple(shape), f"a sample has {int(np.prod(features))} features")
            values = values.reshape(out, *shape)
        check_choice("kind", kind, ContributionFigure)
        axes = values.ndim - 1
        found: ContributionFigure = _BY_AXES.get(axes, "bars") if kind == "auto" else kind
        if axes not in _AXES[found]:
            todo = "Pass `shape=`, the shape of one sample."
            came = f"{found!r} for features of shape {tuple(values.shape[1:])}"
            raise InputError.of("kind", came, f"it needs {' or '.join(map(str, _AXES[found]))} axes", todo)
        return values, found

    def _largest(self, sample: int) -> int:
        return int(self.output[sample].argmax())

    def _as_bars(
        self, values: Any, sample: int, output: int | None, falls: bool, k: int, names: Any, ax: Axes | None
    ) -> Any:
        """Draw the features of largest contribution as bars of their own, the others as one."""
        output = self._largest(sample) if output is None else output
        own, shape = values[output].reshape(-1), values.shape[1:]
        _check_names(names, own.size)
        order = np.argsort(-np.abs(own), kind="stable")
        first, rest = order[:k], order[k:]
        words = [_name(names, shape, int(i)) for i in first] + ([f"{len(rest)} others"] if len(rest) else [])
        sizes = [*own[first].tolist(), *([float(own[rest].sum())] if len(rest) else [])]
        bias, total = float(self.bias[sample, output]), float(self.output[sample, output])
        drawn, (panel,) = canvas(ax, (5.5, 1.4 + 0.26 * (len(words) + 1 + falls)))
        if falls:
            waterfall(panel, ["bias", *words], [bias, *sizes])
        else:
            bars(panel, [*words, "bias"], [*sizes, bias], neutral=1)
        panel.set(xlabel=f"contribution to output {output}", ylabel="feature")
        panel.set_title(f"sample {sample}: output {output} = {total:.4g}", fontsize=10, pad=22)
        legend(
            panel, {"raises the output": POSITIVE, "lowers it": NEGATIVE, "bias, output" if falls else "bias": NEUTRAL}
        )
        return drawn


def _check_names(names: Any, many: int) -> None:
    if names is not None and len(names) != many:
        raise InputError.of("names", f"{len(names)} of them", f"{many} are needed, one each")


def _name(names: Sequence[str] | None, shape: tuple[int, ...], number: int) -> str:
    if names is not None:
        return str(names[number])
    return ", ".join(str(int(i)) for i in np.unravel_index(number, shape))
