"""Contributions as one HTML file: what was verified, the largest features, and pictures of a few samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._attribution_plot import BY_AXES, DrawnContributions
from ._attribution_tables import FlatContributions, OutputPlace
from ._requirements import check_positive
from ._words import ContributionFigure
from .errors import InputError

if TYPE_CHECKING:
    from ._extras.report import Report

_MOST_OUTPUTS = 4  # of which the page has a section each where none is picked: more are hardly read
_READ = {
    "waterfall": "Every bar begins where the one above ends, from what the constants add to the output itself.",
    "image": "Blue raises the output, red lowers it, white adds nothing.",
    "sequence": "Blue raises an output, red lowers it, white adds nothing.",
    "bars": "Blue raises the output, red lowers it; grey is what the constants add.",
}


class PagedContributions(DrawnContributions):
    """Contributions that are shown on a page of their own."""

    verification: Any
    slope_error: float | None
    notes: tuple[str, ...]

    def to_html(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        title: str = "Contributions",
        output: OutputPlace = None,
        samples: Sequence[int] = (0, 1, 2),
        k: int = 10,
        kind: ContributionFigure = "auto",
        shape: Sequence[int] | None = None,
        positions: int = 0,
    ) -> str:
        """Return a page about the contributions: what was verified, the largest features, pictures of some samples.

        It is one file that loads nothing; figures are inside it, and all names are shown as text.

        Args:
            path: Where to write it, if anywhere; folders are made as needed.
            title: Its heading.
            output: One output; by default all of up to 4, the largest one in the mean of more.
            samples: Which samples have a picture; those that there are not are left out.
            k: How many features are listed.
            kind: The pictures, as in `plot`; a waterfall in place of bars by default.
            shape: The shape of a sample whose features came flat, such as `(28, 28)`.
            positions: Which axis of the features counts positions.

        Raises:
            MissingExtraError: Matplotlib or Jinja2 is not installed (extra `demo`).
            InputError: An argument does not fit, there are no samples, or there are several outputs.

        Example:
            >>> import jacops, torch
            >>> found = jacops.contributions(torch.nn.Linear(3, 2).double(), torch.ones(4, 3).double(), names="abc")
            >>> page = found.to_html()
            >>> page.startswith("<!doctype html>"), page.count("<figure>")
            (True, 8)
        """
        from ._extras.report import Report

        flat = self._flat("to_html")
        check_positive("k", k)
        place = flat.place(output)
        n, out, many = flat.values.shape
        if not n:
            raise InputError.of("to_html", "called with no samples", "at least one is needed")
        lead = f"{_counted(n, 'sample')}, {_counted(out, 'output')}, {_counted(many, 'feature')}"
        report = Report(title, f"What each feature adds to each output, in the units of the output: {lead}.")
        self._add_checks(report)
        picked = [place] if place is not None else list(range(out))
        if len(picked) > _MOST_OUTPUTS:
            picked = [int(flat.output.double().mean(0).argmax())]
        for one in picked:
            self._add_features(report, flat, one, k)
            how: dict[str, Any] = {"output": flat.index(one), "k": k, "shape": shape, "positions": positions}
            for sample in samples:
                if sample < n:
                    self._add_sample(report, flat, sample, {**how, "kind": kind})
        if path is not None:
            report.write(path)
        return report.html()

    def _add_checks(self, report: Report) -> None:
        report.section("Verification")
        seen = self.verification
        error = f"largest error {seen.max_error:.1e}, {seen.relative_error:.1e} of the largest output"
        lines = {"output = sum of the contributions + bias": error}
        if self.slope_error is not None:
            lines["slopes of the output"] = slopes_in_words(self.slope_error)
        report.certificate({**lines, **{f"note {k + 1}": note for k, note in enumerate(self.notes)}})

    def _add_features(self, report: Report, flat: FlatContributions, place: int, k: int) -> None:
        """Add the largest features over all samples: a sentence, a table, groups, and a figure."""
        index, word = flat.index(place), flat.word(place)
        tops = [(self.top(k, output=index), "feature")]
        if flat.names.groups:
            tops.insert(0, (self.grouped().top(len(flat.names.groups), output=index), "group"))
        first = tops[-1][0]
        most = "; ".join(f"{name} ({share:.1%})" for name, share in zip(first.features[:3], first.shares, strict=False))
        report.section(word[0].upper() + word[1:], f"The largest contributions are those of {most}.")
        for top, what in tops:
            numbers = (
                top.sizes.tolist(),
                top.contributions.tolist(),
                [f"{share:.1%}" for share in top.shares.tolist()],
            )
            head = [what, "mean |contribution|", "mean contribution", "share"]
            caption = f"Means over {top.of.split(',')[0]}, in the units of the output; share of all sizes."
            report.table(head, zip(top.features, *numbers, strict=True), caption)
        figure = self.plot(None, index, kind="summary", k=k)
        report.figure(figure, f"A point is what the feature adds to {word} for one sample.")

    def _add_sample(self, report: Report, flat: FlatContributions, sample: int, how: dict[str, Any]) -> None:
        kind = how["kind"]
        if kind == "auto":
            axes = len(flat.names.shapes[0] if how["shape"] is None else how["shape"])
            kind = "bars" if len(flat.names.shapes) > 1 else BY_AXES.get(axes, "bars")
            kind = "waterfall" if kind == "bars" else kind
        figure = self.plot(sample, **{**how, "kind": kind})
        report.figure(figure, f"Sample {sample}. {_READ.get(kind, '')}".strip())


def slopes_in_words(error: float) -> str:
    """Return how well the Jacobian is the slope of the output; an error of 0 is one that rounding can hide."""
    return f"agree with the Jacobian {f'up to {error:.1e}' if error else 'to rounding'}"


def _counted(many: int, what: str) -> str:
    return f"{many:,} {what}{'s' * (many != 1)}"
