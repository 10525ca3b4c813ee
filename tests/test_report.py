"""The HTML report: whatever is put in is shown and never run; one file, no request, the same bytes twice."""

import base64
import re
import sys
import warnings
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import matplotlib as mpl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from jacops._extras.report import Report, _visible
from jacops.errors import InputError, InputTypeError, JacopsError, MissingExtraError

HOSTILE = [
    "<script>alert(1)</script>",
    "</script></style></title><img src=x onerror=alert(1)>",
    "\"double\" 'single' onmouseover=alert(1) `",
    "&lt;b&gt; &#60;i&#62; &amp;",
    "{{ 7 * 7 }} {% raw %} {# gone #}",
    "]]> --> <!-- <![CDATA[",
    "javascript:alert(1)",
    "nul\x00 bell\x07 escape\x1b[2J",
    "safe\u202etxt.exe\u2066 \u200fright",
    "half a surrogate \ud800",
    "naïve Größe 東京 \U0001f600",
]
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "main", "section", "ul", "li",
    "a", "div", "table", "thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption", "dl", "dt", "dd",
    "pre",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "href", "id", "scope", "src", "alt",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.comments = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        self.comments.append(data)

    def values(self, tag, attribute):
        return [value for where, name, value in self.attributes if (where, name) == (tag, attribute)]


def drawing(title: str = "a title") -> Figure:
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.plot([0, 1, 2], [0, 1, 4], "o-", color="black")
    axes.imshow([[0.0, 1.0], [1.0, 0.0]])
    axes.set(title=title, xlabel="time (s)")
    return figure


def report_of(name: str) -> Report:
    """A report with `name` in every place that takes text."""
    report = Report(name, name)
    report.text(name)
    report.section(name, answer=name)
    report.text(name)
    report.code(name)
    report.table([name, "x"], [[name, 1.5], [name, None]], name)
    report.certificate({name: name})
    report.figure(drawing(), name, name)
    return report


def svg_in(html: str) -> str:
    (source,) = Page(html).values("img", "src")
    kind, _, data = source.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode("utf-8")


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_are_shown_and_never_run(name):
    page = Page(report_of(name).html())
    assert set(page.tags) <= TAGS
    assert {attribute for _, attribute, _ in page.attributes} <= ATTRIBUTES
    assert not page.comments
    shown = _visible(name)
    assert sum(text.strip() == shown for text in page.texts) == 17
    assert page.values("img", "alt") == [shown]


@given(st.text(st.characters(), min_size=1).filter(str.strip))
def test_any_text_comes_back_as_it_was(text):
    report = Report(text)
    report.table([text], [[text]])
    page = Page(report.html())
    assert set(page.tags) <= TAGS
    assert page.texts.count(_visible(text)) == 4  # title, heading, head, cell


def test_what_cannot_be_seen_is_spelt_out():
    html = report_of("a\x00b\u202ec\ud800\x1b").html()
    assert "a\\u0000b\\u202ec\\ud800\\u001b" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    html.encode("utf-8")


def test_the_page_asks_for_nothing():
    html = report_of("name").html()
    page = Page(html)
    assert page.values("meta", "content")[0] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert all(source.startswith("data:") for source in page.values("img", "src"))
    assert all(target.startswith("#") for target in page.values("a", "href"))
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?:", html)


def test_links_lead_to_their_sections():
    report = Report("title")
    for name, answer in (("first", "yes"), ("plain", ""), ("second", "no")):
        report.section(name, answer)
    page = Page(report.html())
    assert page.values("a", "href") == ["#1", "#2"]
    assert page.values("section", "id") == ["1", "2"]


def test_figures_are_drawings_that_follow_the_page():
    svg = svg_in(report_of("name").html())
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "prefers-color-scheme:dark" in svg
    assert not re.search("#000000|#ffffff", svg)
    links = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_the_same_report_has_the_same_bytes():
    assert report_of("name").html() == report_of("name").html()


def test_drawing_leaves_the_figure_and_the_settings():
    figure, before = drawing(), dict(mpl.rcParams)
    face = figure.get_facecolor()
    report = Report("title")
    report.figure(figure, "caption")
    assert (figure.get_facecolor(), dict(mpl.rcParams)) == (face, before)


@pytest.mark.parametrize("title", ["</svg><script>alert(1)</script>", "--><script>", "bell\x07", "\ufffe", "a < b & c"])
def test_text_within_a_figure_is_harmless(title):
    report = Report("title")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        report.figure(drawing(title), "caption")
    root = ET.fromstring(svg_in(report.html()))
    assert not [node for node in root.iter() if str(node.tag).endswith("script")]


def test_numbers_are_short_and_stand_right():
    report = Report("title")
    report.table(["name", "value", "share"], [["a", 1 / 3, "12%"], ["b", 1_234_567, None], ["2c", -1e-9, "+3"]])
    page = Page(report.html())
    assert [text for text in page.texts if text in {"0.3333", "1234567", "-1e-09", "–"}] == [
        "0.3333", "1234567", "–", "-1e-09",
    ]  # fmt: skip
    assert page.values("td", "class") == ["number"] * 6


def test_an_empty_table_and_an_empty_report_are_fine():
    report = Report("title")
    report.table(["a", "b"], [])
    assert {"title", "a", "b"} <= set(Page(report.html()).texts)
    assert "In short" not in Page(Report("title").html()).texts


def test_a_row_of_the_wrong_length_is_named():
    report = Report("title")
    with pytest.raises(InputError, match=r"rows\[1\].*3 cells.*names 2"):
        report.table(["a", "b"], [[1, 2], [1, 2, 3]])


def test_what_is_no_figure_is_named():
    with pytest.raises(InputTypeError, match=r"figure.*a str.*matplotlib Figure"):
        Report("title").figure("plot.png", "caption")


@pytest.mark.parametrize(("package", "extra"), [("jinja2", "demo"), ("matplotlib", "plot")])
def test_a_missing_package_is_named_with_its_pip_line(monkeypatch, package, extra):
    figure = drawing()
    monkeypatch.setitem(sys.modules, package, None)
    report = Report("title")
    with pytest.raises(MissingExtraError, match=rf"{package}.*pip install 'jacops\[{extra}\]'") as caught:
        report.html() if package == "jinja2" else report.figure(figure, "caption")
    assert isinstance(caught.value, JacopsError)
    assert isinstance(caught.value, ImportError)


def test_writing_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "<report>.html"
    for title in ("first", "second"):
        assert Report(title).write(str(path)) == path
        assert f"<title>{title}</title>" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_older_report_survives_a_failed_one(tmp_path, monkeypatch):
    path = Report("older").write(tmp_path / "report.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError):
        Report("newer").write(path)
    assert "<title>older</title>" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]
