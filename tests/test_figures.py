"""Figures have labels, legends and the right numbers, return what can be shown once, and leave nothing open."""

from collections.abc import Callable
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

import jacops
from jacops import linalg
from jacops.errors import InputError, InputTypeError, MissingExtraError
from jacops.linalg import Matrix
from jacops.results import FeatureNames
from small import by_hand, draw

F64 = torch.float64
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double()
X, Y = torch.randn(9, 12).double(), torch.randint(3, (9,))
FOUND = jacops.contributions(NET, X)
VALUES = FOUND.values.numpy()
LONG = [f"the {i}th of the features, whose name is $ longer than any axis has room for" for i in range(12)]
DNA = by_hand(draw(3, 2, 4, 60), names=FeatureNames.of(torch.ones(3, 4, 60), ("ACGT", None)))
_TWO = {"image": draw(5, 3, 2, 2, 3), "table": draw(5, 3, 4, seed=1)}
TWO = by_hand(_TWO, names=FeatureNames.of({k: v[:, 0] for k, v in _TWO.items()}, {"table": "wxyz"}))
SPECTRUM = torch.tensor([5.0, 3.0, 1e-2, -2.0, 0.5, 0.25]).double()


def influences() -> Any:
    wrapped = jacops.TorchTwiceDifferentiable(NET, F.cross_entropy)
    return jacops.compute_influences(wrapped, [(X, Y)], curvature="ggn", damping=0.1)


def pairs(values: torch.Tensor = SPECTRUM, count: int = 4, which: str = "magnitude") -> Any:
    return linalg.eigenpairs(Matrix(torch.diag(values), symmetric=True), count, which)


def pattern(m: int = 29) -> Any:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[1:] - x[:-1] ** 2

    return jacops.sparse_plan(Chain(), torch.ones(m + 1), wrt="inputs").pattern


def fit(start: tuple[float, float] = (-8.0, 3.0)) -> Any:
    t = torch.linspace(0, 2, 30).double()
    target = 3 * torch.exp(-1.5 * t) + 0.1 * torch.sin(9 * t)
    params = torch.tensor(start).double()
    return jacops.levenberg_marquardt(lambda p: p[0] * torch.exp(-p[1] * t), params=params, target=target)


def density() -> Any:
    return linalg.spectral_density(Matrix(torch.diag(SPECTRUM), symmetric=True), 4, 6)


PLOTS: dict[str, Callable[..., Any]] = {
    "bars": lambda **k: FOUND.plot(**k),
    "waterfall": lambda **k: FOUND.plot(kind="waterfall", **k),
    "image": lambda **k: FOUND.plot(shape=(3, 2, 2), **k),
    "flat image": lambda **k: FOUND.plot(kind="image", shape=(3, 4), **k),
    "sequence": lambda **k: FOUND.plot(shape=(4, 3), **k),
    "all samples": lambda **k: FOUND.plot(None, **k),
    "summary": lambda **k: FOUND.plot(kind="summary", **k),
    "grouped": lambda **k: FOUND.grouped(["a"] * 6 + ["b"] * 6).plot(kind="waterfall", **k),
    "long names": lambda **k: FOUND.plot(names=LONG, **k),
    "letters": lambda **k: DNA.plot(2, positions=1, names="ACGT" * 15, **k),
    "several inputs": lambda **k: TWO.plot(3, **k),
    "one of several": lambda **k: TWO.plot(3, 1, kind="image", input="image", **k),
    "influences": lambda **k: influences().plot(**k),
    "eigenpairs": lambda **k: pairs().plot(**k),
    "pattern": lambda **k: pattern().plot(**k),
    "convergence": lambda **k: fit().plot("convergence", **k),
    "residuals": lambda **k: fit().plot("residuals", **k),
    "density": lambda **k: density().plot(**k),
}


OLD = ("influences", "convergence")  # whose legends stand inside


@pytest.mark.parametrize("name", PLOTS)
def test_a_new_figure_is_returned_once_and_labelled(name: str) -> None:
    figure = PLOTS[name]()
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == []
    figure.canvas.draw()
    panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    beside = [ax for ax in (*figure.axes, *panels[0].child_axes) if ax.get_label() == "<colorbar>"]
    assert len(beside) == (name in ("image", "flat image", "sequence", "letters", "one of several"))
    assert all(ax.get_xlabel() for ax in panels)
    assert panels[0].get_ylabel()
    if name not in ("image", "flat image", "sequence", "pattern", "residuals", "letters", "one of several"):
        assert panels[0].get_legend() is not None
    assert all("contribution" in bar.get_ylabel() for bar in beside)


@pytest.mark.parametrize("name", PLOTS)
def test_nothing_is_cut_off_and_nothing_covers_the_legend(name: str) -> None:
    figure = PLOTS[name]()
    canvas = FigureCanvasAgg(figure)  # that of a figure without pyplot does not lay out
    canvas.draw()
    width, height = canvas.get_width_height()
    for ax in figure.axes:
        title = ax.title.get_window_extent()
        legend = ax.get_legend()
        assert legend is None or name in OLD or not title.overlaps(legend.get_window_extent())
        ticks = [
            label
            for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim())))
            for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            if low <= place <= high
        ]
        for text in filter(Text.get_text, [ax.title, ax.xaxis.label, ax.yaxis.label, *ticks]):
            box = text.get_window_extent()
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside, (text.get_text(), box.extents, (width, height))


@pytest.mark.parametrize("name", PLOTS)
def test_given_axes_are_drawn_into_and_returned(name: str) -> None:
    figure, (ax, other) = plt.subplots(1, 2)
    assert PLOTS[name](ax=ax) is ax
    assert ax.get_xlabel()
    assert not other.has_data()
    assert plt.get_fignums() == [figure.number]
    plt.close("all")


@pytest.mark.parametrize("name", PLOTS)
def test_what_is_no_axes_is_refused(name: str) -> None:
    with pytest.raises(InputTypeError, match=r"`ax`.*matplotlib axes are needed"):
        PLOTS[name](ax="here")


def test_the_settings_of_matplotlib_stay_as_they_are() -> None:
    before, interactive = dict(mpl.rcParams), plt.isinteractive()
    for plot in PLOTS.values():
        plot()
    assert dict(mpl.rcParams) == before
    assert plt.isinteractive() == interactive


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtraError, match="plot"):
        FOUND.plot()


# ---- contributions ---------------------------------------------------------------------------------------------------


def widths(ax: Axes) -> list[float]:
    return [patch.get_width() for patch in ax.patches]  # pyright: ignore[reportAttributeAccessIssue]


def pixels(ax: Axes) -> Any:
    (image,) = ax.images
    return np.asarray(image.get_array())


def names(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_yticklabels()]


@pytest.mark.parametrize("output", [None, 0, 2])
def test_bars_are_the_largest_contributions_and_add_up_to_the_output(output: int | None) -> None:
    (ax,) = FOUND.plot(3, output, k=5).axes
    chosen = int(FOUND.output[3].argmax()) if output is None else output
    own = VALUES[3, chosen]
    order = np.argsort(-abs(own))
    assert names(ax) == [*map(str, order[:5]), "7 others", "bias"]
    np.testing.assert_allclose(widths(ax)[:5], own[order[:5]])
    np.testing.assert_allclose(sum(widths(ax)), float(FOUND.output[3, chosen]), rtol=1e-9)
    assert f"output {chosen}" in ax.get_xlabel()
    assert "sample 3" in ax.get_title()


def test_a_waterfall_goes_from_the_bias_to_the_output() -> None:
    (ax,) = FOUND.plot(1, 2, kind="waterfall", k=12, names=[f"f{i}" for i in range(12)]).axes
    assert names(ax)[0] == "bias"
    assert names(ax)[-1] == "output"
    assert sorted(names(ax)[1:-1]) == sorted(f"f{i}" for i in range(12))
    bars: Any = ax.patches
    for before, after in zip(bars[:-2], bars[1:-1], strict=True):
        assert after.get_x() == pytest.approx(before.get_x() + before.get_width())
    total = float(FOUND.output[1, 2])
    assert bars[-2].get_x() + bars[-2].get_width() == pytest.approx(total)
    assert (bars[-1].get_x(), bars[-1].get_width()) == (0, pytest.approx(total))


def test_an_image_sums_channels_and_is_white_at_zero() -> None:
    ax = FOUND.plot(2, 1, shape=(3, 2, 2)).axes[0]
    (image,) = ax.images
    np.testing.assert_allclose(pixels(ax), VALUES[2, 1].reshape(3, 2, 2).sum(0))
    low, high = image.get_clim()
    assert low == -high
    assert "channels summed" in ax.child_axes[0].get_ylabel()
    assert "channels" not in FOUND.plot(2, 1, shape=(1, 4, 3)).axes[0].child_axes[0].get_ylabel()
    flat = FOUND.plot(2, 1, kind="image", shape=(3, 4)).axes[0]
    np.testing.assert_allclose(pixels(flat), VALUES[2, 1].reshape(3, 4))


def test_a_sequence_shows_every_output_at_every_position() -> None:
    tokens = ["the", "cat", "sat", "down"]
    ax = FOUND.plot(4, shape=(4, 3), names=tokens).axes[0]
    np.testing.assert_allclose(pixels(ax), VALUES[4].reshape(3, 4, 3).sum(2))
    assert [text.get_text() for text in ax.get_xticklabels()] == tokens
    assert names(ax) == ["0", "1", "2"]
    one = FOUND.plot(4, 1, shape=(4, 3)).axes[0]
    np.testing.assert_allclose(pixels(one), VALUES[4, 1].reshape(1, 4, 3).sum(2))


def test_the_shape_of_the_features_chooses_the_figure() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(18, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.conv(x.reshape(-1, 1, 3, 3)).relu().flatten(1))

    hidden = jacops.contributions(Image().double(), torch.randn(4, 9).double(), at="conv")
    drawn = pixels(hidden.plot(1, 2).axes[0])
    np.testing.assert_allclose(drawn, hidden.values[1, 2].sum(0).numpy())
    bars = hidden.plot(1, 2, kind="bars", k=1).axes[0]
    largest = np.unravel_index(int(hidden.values[1, 2].abs().argmax()), (2, 3, 3))
    assert names(bars)[0] == ", ".join(map(str, largest))


def test_bars_of_all_samples_are_mean_sizes() -> None:
    (ax,) = FOUND.plot(None, 1, k=4).axes
    sizes = abs(VALUES[:, 1]).mean(0)
    order = np.argsort(-sizes)[:4]
    assert names(ax) == [*map(str, order), "bias"]
    np.testing.assert_allclose(widths(ax), [*sizes[order], abs(FOUND.bias[:, 1].numpy()).mean()])
    assert ax.get_title() == "9 samples, 4 of 12 features"
    assert ax.get_xlabel() == "mean |contribution| to output 1, in its units"
    largest = int(FOUND.output.mean(0).argmax())
    assert f"output {largest}" in FOUND.plot(None).axes[0].get_xlabel()


def test_a_summary_has_a_point_for_every_sample() -> None:
    (ax,) = FOUND.plot(output=2, kind="summary", k=3).axes
    order = np.argsort(-abs(VALUES[:, 2]).mean(0))[:3]
    assert names(ax) == list(map(str, order))
    for row, (feature, points) in enumerate(zip(order, ax.collections, strict=True)):
        x, y = np.asarray(points.get_offsets()).T
        np.testing.assert_allclose(np.sort(x), np.sort(VALUES[:, 2, feature]))
        assert (abs(y - row) < 0.5).all()
        colours = np.asarray(points.get_facecolor())
        assert len(np.unique(colours, axis=0)) == len(np.unique(x >= 0))
    same = by_hand(torch.ones(200, 1, 2).double())
    side = np.asarray(same.plot(kind="summary").axes[0].collections[0].get_offsets())[:, 1]
    assert len(np.unique(side)) == 200  # equal points stand side by side
    assert (abs(side) <= 0.45).all()
    near = by_hand(torch.cat([torch.linspace(0, 1e-3, 199), torch.ones(1)]).double().view(200, 1, 1))
    x, y = np.asarray(near.plot(kind="summary").axes[0].collections[0].get_offsets())[:199].T
    assert abs(np.corrcoef(x, abs(y))[0, 1]) < 0.5  # within a bin, heights do not follow values


def test_names_come_from_the_result_unless_others_are_given() -> None:
    named = jacops.contributions(NET, X, names=list("abcdefghijkl"))
    order = np.argsort(-abs(VALUES[0, 1]))
    assert names(named.plot(0, 1, k=12).axes[0])[:-1] == ["abcdefghijkl"[i] for i in order]
    assert names(named.plot(0, 1, k=1, names=["z"] * 12).axes[0])[0] == "z"
    long = names(FOUND.plot(0, 1, k=1, names=LONG).axes[0])[0]
    assert len(long) == 32
    assert long.startswith(f"the {order[0]}th of")
    assert long.endswith("has room for")
    odd = ["a\nb\x00", "$x$ \u202ec"] * 6
    assert set(names(FOUND.plot(names=odd, k=12).axes[0])) == {"a b\ufffd", "$x$ \ufffdc", "bias"}


def test_letters_of_a_sequence_stand_below_it() -> None:
    ax = DNA.plot(2, positions=1, names="ACGT" * 15).axes[0]
    np.testing.assert_allclose(pixels(ax), DNA.values[2].sum(1).numpy())
    assert "".join(text.get_text() for text in ax.get_xticklabels()) == "ACGT" * 15
    across = DNA.plot(2, 1).axes[0]  # by default the first axis counts positions, whose names the result has
    np.testing.assert_allclose(pixels(across), DNA.values[2, 1].sum(1)[None].numpy())
    assert [text.get_text() for text in across.get_xticklabels()] == list("ACGT")
    many = by_hand(draw(1, 1, 500)).plot(kind="sequence", names=[f"w{k}" for k in range(500)]).axes[0]
    assert [text.get_text() for text in many.get_xticklabels()] == [f"w{k}" for k in range(0, 500, 13)]


def test_rows_and_columns_of_a_heat_map_go_by_their_names() -> None:
    found = by_hand(
        draw(2, 2, 3, 2), names=FeatureNames.of(torch.ones(2, 3, 2), (["p53", "myc", "ras"], ["rest", "heat"]))
    )
    ax = found.plot(1, 0, kind="image").axes[0]
    assert names(ax) == ["p53", "myc", "ras"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["rest", "heat"]


def test_several_inputs_share_their_bars_and_have_heat_maps_of_their_own() -> None:
    flat = torch.cat([_TWO["image"].flatten(2), _TWO["table"]], -1)[3, 1].numpy()
    order = np.argsort(-abs(flat))
    (ax,) = TWO.plot(3, 1, k=16).axes
    assert names(ax) == [TWO.names.label(int(i)) for i in order] + ["bias"]
    assert {"image[0, 1, 2]", "table[w]"} < set(names(ax))
    np.testing.assert_allclose(widths(ax)[:-1], flat[order])
    for which in ("image", 0):
        panel = TWO.plot(3, 1, kind="image", input=which).axes[0]
        np.testing.assert_allclose(pixels(panel), _TWO["image"][3, 1].sum(0).numpy())
        assert panel.get_title() == "sample 3, image"
    panel = TWO.plot(3, kind="sequence", input="table").axes[0]
    np.testing.assert_allclose(pixels(panel), _TWO["table"][3].numpy())
    assert [text.get_text() for text in panel.get_xticklabels()] == list("wxyz")


def test_outputs_with_several_axes_or_none_are_called_by_their_index() -> None:
    grid = by_hand(draw(4, 2, 3, 5), out=2)
    ax = grid.plot(1, (1, 2), k=1).axes[0]
    assert ax.get_xlabel() == "contribution to output 1, 2, in its units"
    np.testing.assert_allclose(widths(ax)[0], grid.values[1, 1, 2].abs().max() * grid.values[1, 1, 2][
        grid.values[1, 1, 2].abs().argmax()].sign())  # fmt: skip
    assert names(grid.plot(1, kind="sequence").axes[0]) == [f"{i}, {j}" for i in range(2) for j in range(3)]
    lone = by_hand(draw(4, 5), out=0)
    ax = lone.plot(2, k=5).axes[0]
    assert ax.get_xlabel() == "contribution to the output, in its units"
    np.testing.assert_allclose(sum(widths(ax)), float(lone.output[2]))


def test_bars_do_not_end_where_the_axes_do() -> None:
    for ax in (FOUND.plot(k, kind="waterfall").axes[0] for k in range(9)):
        ends: Any = [edge for bar in ax.patches for edge in (bar.get_x(), bar.get_x() + bar.get_width())]  # pyright: ignore
        low, high = ax.get_xlim()
        assert low < min(ends)
        assert max(ends) < high


@pytest.mark.parametrize(
    ("found", "options", "words"),
    [(TWO, {"kind": "image"}, "`input` is missing"), (TWO, {"input": "picture"}, "`input`.*There are 2: image, table"),
     (TWO, {"input": 2}, "`input` is 2"), (TWO, {"input": "image"}, "`input`.*'bars' is of all inputs"),
     (FOUND, {"input": 1}, "There is one"), (FOUND, {"sample": None, "kind": "waterfall"}, "`sample` is None"),
     (DNA, {"kind": "sequence", "positions": 2}, "`positions` is 2"), (DNA, {"output": (0, 0)}, "`output`"),
     (by_hand(torch.ones(0, 2, 3)), {"sample": None}, "no samples"),
     (FOUND, {"names": LONG[:3], "kind": "summary"}, "`names`.*12 are needed")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(found: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        found.plot(**{"kind": "bars", **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [({"sample": 9}, "`sample`.*there are 9"), ({"sample": -1}, "`sample`"), ({"output": 3}, "`output`.*there are 3"),
     ({"kind": "pie"}, "`kind`.*'bars'"), ({"kind": "image"}, "2 or 3 axes"), ({"k": 0}, "`k`"),
     ({"kind": "image", "shape": (5, 5)}, "`shape`.*12 features"), ({"names": ["a"]}, "`names`.*12 are needed"),
     ({"shape": (4, 3), "names": ["a"]}, "`names`.*4 are needed")],
)  # fmt: skip
def test_what_does_not_fit_contributions_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        FOUND.plot(**options)


# ---- the others ------------------------------------------------------------------------------------------------------


def test_influences_show_the_strongest_on_both_sides() -> None:
    found = influences()
    figure = found.plot([0, 3], k=2)
    for ax, test in zip(figure.axes, (0, 3), strict=True):
        order = found.values[test].argsort()
        picked = torch.cat([order[:2], order[-2:]])
        assert names(ax) == [f"#{i}" for i in picked.tolist()]
        np.testing.assert_allclose(widths(ax), found.values[test][picked].numpy())
        assert ax.get_title() == f"test sample {test}"
    with pytest.raises(InputError, match="`test`"):
        found.plot([99])
    with pytest.raises(InputError, match="`ax`.*2 panels"):
        found.plot([0, 1], ax=figure.axes[0])


def test_eigenvalues_stand_in_their_order_with_residuals() -> None:
    found = pairs()
    (ax,) = found.plot().axes
    drawn = {x: y for line in ax.lines for x, y in zip(*line.get_data(), strict=True) if line.get_marker() == "o"}
    assert drawn == {k: pytest.approx(float(v)) for k, v in enumerate(found.values)}
    words = [text.get_text() for text in ax.get_legend().get_texts()]  # pyright: ignore[reportOptionalMemberAccess]
    assert words == ["positive, ± residual", "negative, ± residual"]
    assert ax.get_yscale() == "linear"
    assert pairs(SPECTRUM.abs(), 6, "largest").plot().axes[0].get_yscale() == "log"


@pytest.mark.parametrize("rows", [1, 29, 2000])
def test_a_pattern_is_drawn_where_it_has_entries(rows: int) -> None:
    found = pattern(rows)
    (ax,) = found.plot().axes
    (image,) = ax.images
    cells = pixels(ax)
    if rows <= 256:
        np.testing.assert_array_equal(cells, found.matrix.toarray())
    else:
        assert cells.shape == (256, 256)
        assert cells.diagonal().all()
        assert not cells[0, 3:].any()
    assert tuple(image.get_extent()) == (-0.5, rows + 0.5, rows - 0.5, -0.5)
    assert f"{found.nnz:,} entries" in ax.get_title()


def test_convergence_shows_objectives_and_rejected_steps() -> None:
    found = fit()
    ax, other = found.plot().axes
    objective, rejected = ax.lines
    np.testing.assert_allclose(objective.get_ydata(), [*(r.objective for r in found.log), found.cost])
    np.testing.assert_array_equal(rejected.get_xdata(), [r.step for r in found.log if not r.accepted])
    np.testing.assert_allclose(rejected.get_ydata(), [r.tried for r in found.log if not r.accepted])
    assert ax.get_yscale() == "log"
    dots = next(line for line in other.lines if line.get_marker() == ".")
    np.testing.assert_allclose(dots.get_ydata(), found.fun.numpy())
    with pytest.raises(InputError, match="`kind`"):
        found.plot("other")
    with pytest.raises(InputError, match="`ax`"):
        found.plot(ax=ax)


def test_an_objective_of_zero_and_an_empty_log_can_be_drawn() -> None:
    exact = jacops.levenberg_marquardt(lambda x: x - 1, params=torch.ones(2).double())
    assert exact.log == []
    ax, other = exact.plot().axes
    assert np.size(ax.lines[0].get_xdata()) == 0  # zero has no place on a logarithmic axis
    assert len(other.lines) == 2


def test_a_density_has_a_band_and_its_ends() -> None:
    found = density()
    (ax,) = found.plot(color="k", label="mine").axes
    line, *ends = ax.lines
    assert ax.get_yscale() == "log"
    assert line.get_color() == "k"
    np.testing.assert_allclose(line.get_xdata(), found.grid.numpy())
    shown = found.density.numpy() > ax.get_ylim()[0]
    np.testing.assert_allclose(line.get_ydata()[shown], found.density.numpy()[shown])
    assert [end.get_xdata()[0] for end in ends] == [found.smallest, found.largest]
    words = [text.get_text() for text in ax.get_legend().get_texts()]  # pyright: ignore[reportOptionalMemberAccess]
    assert words == ["mine", "± 2 standard errors", "extreme Ritz values"]


def test_every_cell_of_a_pattern_is_wider_than_a_pixel() -> None:
    figure = pattern(2000).plot()
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert min(ax.bbox.width, ax.bbox.height) > max(pixels(ax).shape)


@pytest.mark.parametrize("shape", [(8, 8), (40, 10), (10, 40), (2000, 1000)])
def test_ticks_along_a_pattern_are_apart(shape: tuple[int, int]) -> None:
    from jacops._figures import spy

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    ax = figure.subplots()
    spy(ax, np.zeros(1, int), np.zeros(1, int), shape)
    figure.draw_without_rendering()
    shown = [text.get_window_extent() for text in ax.get_xticklabels() if text.get_text()]
    places = [box for box in shown if ax.bbox.x0 <= (box.x0 + box.x1) / 2 <= ax.bbox.x1]
    assert places
    assert all(a.x1 < b.x0 for a, b in zip(places, places[1:], strict=False))


def test_a_second_density_explains_band_and_ends_no_more() -> None:
    figure = density().plot(label="one")
    (ax,) = figure.axes
    density().plot(label="two", ax=ax)
    words = [text.get_text() for text in ax.get_legend().get_texts()]  # pyright: ignore[reportOptionalMemberAccess]
    assert words == ["one", "± 2 standard errors", "extreme Ritz values", "two"]
