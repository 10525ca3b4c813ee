"""The page of contributions: one file with everything on it, and whatever names come in are shown as text."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jacops
from jacops.errors import InputError, MissingExtraError
from jacops.results import FeatureNames
from small import by_hand, draw, refused
from test_report import ATTRIBUTES, HOSTILE, TAGS, Page

NET = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)).double()
X = draw(6, 4)


def texts(page: str) -> str:
    return "\n".join(Page(page).texts)


def test_the_page_holds_what_was_verified_and_the_largest_features(tmp_path: Path) -> None:
    found = jacops.contributions(
        NET, X, names=["age", "height", "weight", "dose"], groups={"body": ["height", "weight"]}
    )
    path = tmp_path / "new" / "page.html"
    page = found.to_html(path, title="Patients", samples=[2, 5, 99])
    assert path.read_text(encoding="utf-8") == page
    shown = texts(page)
    for words in ("Patients", "6 samples, 2 outputs, 4 features", f"{found.verification.max_error:.1e}", "Output 0",
                  "Output 1", "body", "Sample 2.", "Sample 5."):  # fmt: skip
        assert words in shown
    assert "Sample 99" not in shown
    assert page.count("<figure>") == 2 * (1 + 2)
    assert page.count('<img src="data:image/svg+xml;base64,') == page.count("<img")
    for output in (0, 1):
        top = found.top(output=output)
        at = shown.index(f"largest contributions are those of {top.features[0]} ({top.shares[0]:.1%})")
        assert at > 0
        for size in top.sizes.tolist():
            assert f"{size:.4g}" in shown
    assert set(Page(page).tags) <= TAGS
    assert {name for _, name, _ in Page(page).attributes} <= ATTRIBUTES


def test_notes_and_one_output_of_many() -> None:
    many = by_hand(draw(4, 7, 3), notes=("not piecewise linear: sigmoid",), slope_error=None)
    largest = int(many.output.mean(0).argmax())
    shown = texts(many.to_html())
    assert f"Output {largest}" in shown
    assert shown.count("The largest contributions") == 2  # above the sections, and in the one there is
    assert "not piecewise linear: sigmoid" in shown
    assert "slopes" not in shown
    assert "Output 3" in texts(many.to_html(output=3))
    assert "The output" in texts(by_hand(draw(4, 3), out=0).to_html())


@pytest.mark.parametrize(("axes", "words"), [((4,), "Every bar"), ((5, 3), "an output"), ((1, 4, 4), "adds nothing")])
def test_pictures_fit_the_features(axes: tuple[int, ...], words: str) -> None:
    shown = texts(by_hand(draw(2, 2, *axes)).to_html())
    assert shown.count(words) == 4
    flat = by_hand(draw(2, 2, int(np.prod(axes))))
    assert texts(flat.to_html(shape=axes)).count(words) == 4


def test_several_inputs_have_one_page() -> None:
    values = {"image": draw(2, 2, 1, 2, 2), "table": draw(2, 2, 3, seed=1)}
    shown = texts(by_hand(values).to_html())
    assert "image[0, 1, 1]" in shown
    assert "table[2]" in shown


@pytest.mark.filterwarnings("ignore:Glyph .* missing")  # what the font of the figures does not have
def test_hostile_names_are_text() -> None:
    names = FeatureNames.of(torch.ones(3, len(HOSTILE)), HOSTILE)
    page = by_hand(draw(3, 1, len(HOSTILE)), names=names).to_html(title=HOSTILE[0], k=20)
    parsed = Page(page)
    assert set(parsed.tags) <= TAGS
    assert {name for _, name, _ in parsed.attributes} <= ATTRIBUTES
    assert not parsed.comments
    assert "alert(1)</script>" in texts(page)
    page.encode("utf-8")


def test_places_are_names_and_verification_has_a_heading() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), NET)
    page = jacops.contributions(net, draw(3, 1, 2, 2)).to_html(output=0)
    assert "Verification" in texts(page)
    assert "<td>0, 1, 1</td>" in page  # to the left, as names are
    refused(InputError, lambda: jacops.contributions(net, draw(0, 1, 2, 2)).to_html(), "to_html", "no samples")


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = by_hand(draw(2, 2, 3))
    refused(InputError, lambda: found.to_html(k=0), "`k`")
    refused(InputError, lambda: found.to_html(output=5), "`output`")
    refused(InputError, lambda: by_hand(draw(0, 2, 3)).to_html(), "no samples")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    refused(MissingExtraError, lambda: found.to_html(), "pip install 'jacops[demo]'")
