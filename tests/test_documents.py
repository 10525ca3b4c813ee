"""Every snippet in the documents runs; those of a page in a folder run one after the other, in one namespace.

Where a block of text follows a snippet directly, it shows what the snippet prints. The words must be those that are
printed; numbers may differ, since they do between machines. `python -m tests.test_documents PAGE ...` writes the
outputs into pages.
"""

import ast
import contextlib
import importlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
FOLDERS = ("coming-from", "explanation", "how-to")
LESSONS = sorted(page for folder in FOLDERS for page in (ROOT / "docs" / folder).glob("*.md"))
SNIPPET = re.compile(r"```python\n(?P<code>.*?)```(?P<between>\n\n```text\n(?P<shown>.*?)```)?", re.DOTALL)


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


# Packages that the extras do not bring stand in a list beside the page; such pages load and train for longer.
RUNS = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.with_suffix(".txt").exists() else [])
    for page in RECIPES
]


SNIPPETS = {f"{page.name}-{number}": code for page in PAGES for number, code in enumerate(snippets(page))}


def packages(code: str) -> set[str]:
    """Return what a page imports at its top; what it tries to import it does without."""
    nodes = ast.parse(code).body
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return whole | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_snippet_runs(name: str) -> None:
    torch.manual_seed(0)
    exec(compile(SNIPPETS[name], name, "exec"), {})


@pytest.mark.parametrize("page", RUNS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of packages that are met here
def test_the_recipe_runs(page: Path) -> None:
    code = "\n".join(snippets(page))
    for package in sorted(packages(code)):
        pytest.importorskip(package, exc_type=ImportError)
    torch.manual_seed(0)
    exec(compile(code, page.name, "exec"), {"__name__": page.stem})


def missing(code: str) -> list[str]:
    """Return the packages that a snippet imports at its top and that cannot be imported here."""
    absent = []
    for package in sorted(packages(code)):
        try:
            importlib.import_module(package)
        except ImportError:
            absent.append(package)
    return absent


def printed(page: Path, absent: list[str]) -> Iterator[tuple[re.Match[str], str | None]]:
    """Run a page's snippets; yield each with what it prints, or None where a package is `absent`."""
    names: dict[str, object] = {"__name__": page.stem}
    torch.manual_seed(0)
    for found in SNIPPET.finditer(page.read_text(encoding="utf-8")):
        if page.parent == ROOT / "docs":
            names = {"__name__": page.stem}
            torch.manual_seed(0)
        lacking = missing(found["code"])
        absent += lacking
        if lacking:
            yield found, None
            continue
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(found["code"], page.name, "exec"), names)
        yield found, output.getvalue()


def words(text: str) -> str:
    """Return a text with `#` for every number, and with single spaces."""
    return " ".join(re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", " # ", text).split())


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: f"{page.parent.name}-{page.stem}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of packages that are met here
def test_the_page_runs_and_shows_what_is_printed(page: Path) -> None:
    absent: list[str] = []
    for found, output in printed(page, absent):
        if output is not None and found["shown"] is not None:
            assert words(output) == words(found["shown"]), f"shown otherwise; python -m tests.test_documents {page}"
    if absent:
        pytest.skip(f"the other snippets ran; not installed: {', '.join(sorted(set(absent)))}")


def test_words_are_compared_and_numbers_are_not() -> None:
    assert words("residual 1.2e-16,\n  3 rows") == words("residual 4e-9, 5 rows")
    assert words("3 rows converged") != words("3 rows attainable")


def test_there_are_snippets_and_links_lead_somewhere() -> None:
    assert len(SNIPPETS) >= 4
    assert len(LESSONS) >= 20
    for path in [*PAGES, *RECIPES, *LESSONS]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


def write_outputs(page: Path) -> None:
    """Write what a page's snippets print into the blocks that follow them."""
    text, place = page.read_text(encoding="utf-8"), 0
    parts = []
    for found, output in printed(page, []):
        if output is not None and found["shown"] is not None:
            parts += [text[place : found.start("shown")], output]
            place = found.end("shown")
    page.write_text("".join([*parts, text[place:]]), encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        write_outputs(Path(argument).resolve())
