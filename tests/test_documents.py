"""Every snippet in the documents runs."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SNIPPETS = {
    f"{path.name}-{number}": code
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_snippet_runs(name: str) -> None:
    torch.manual_seed(0)
    exec(compile(SNIPPETS[name], name, "exec"), {})


def test_there_are_snippets_and_links_lead_somewhere() -> None:
    assert len(SNIPPETS) >= 4
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
