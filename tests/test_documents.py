"""Every snippet in the documents runs; the snippets of a recipe run one after the other."""

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))


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


def test_there_are_snippets_and_links_lead_somewhere() -> None:
    assert len(SNIPPETS) >= 4
    for path in [*PAGES, *RECIPES]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
