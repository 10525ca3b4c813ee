"""The reference: a page for each namespace and each public object, made from `__all__` and the docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sphinx.pycode import ModuleAnalyzer

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# The first namespace that has an object is the one that its page names.
_NAMESPACES = ("", "attribution", "influence", "linalg", "solvers", "sparse", "fit", "charts", "store", "results")
_LAST = ("errors", "testing")
_OUTSIDE = "tuple, Exception, Warning, Protocol, Module"  # what a member inherits from there is not ours to describe


def _namespace(name: str) -> ModuleType:
    return importlib.import_module(f"jacops.{name}".rstrip("."))


def _is_value(thing: Any) -> bool:
    return not (inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing))


def _below(short: str, thing: Any) -> str:
    """Return the text below the assignment of a value, such as a chart, which Python does not keep; else nothing."""
    for name, module in sorted(sys.modules.items()) if _is_value(thing) else ():
        if name.startswith("jacops.") and vars(module).get(short) is thing:
            lines = ModuleAnalyzer.for_module(name).find_attr_docs().get(("", short))
            if lines:
                return "\n".join(lines).strip()
    return ""


def _summary(short: str, thing: Any) -> str:
    """Return the first sentence of a docstring, as a cell of a table."""
    first = (_below(short, thing) or inspect.getdoc(thing) or "").split("\n\n")[0]
    return re.sub(r"\s+", " ", first).replace("|", r"\|")


def _value_page(name: str, thing: Any, text: str) -> str:
    """Return the page of a value: its text, and the public class that describes its methods."""
    space, _, _ = name.removeprefix("jacops.").rpartition(".")
    kind = next(c for c in type(thing).__mro__ if not c.__name__.startswith("_"))
    public = getattr(_namespace(space), kind.__name__, None) is kind
    link = f"[`{kind.__name__}`](jacops.{space}.{kind.__name__}.md)"
    methods = f"\n\nAn instance of {link}, whose page describes its methods." if public else ""
    return f"# {name}\n\n```{{py:data}} {name}\n```\n\n{text}{methods}\n"


def _directive(name: str, thing: Any) -> str:
    """Return the autodoc directive of an object."""
    if inspect.isclass(thing):
        members = f"   :members:\n   :special-members: __matmul__\n   :inherited-members: {_OUTSIDE}"
        return f".. autoclass:: {name}\n{members}"
    if inspect.isroutine(thing):
        return f".. autofunction:: {name}"
    return f".. autodata:: {name}\n   :no-value:"


def _object_page(name: str, thing: Any) -> str:
    text = _below(name.rpartition(".")[2], thing)
    if text:
        return _value_page(name, thing, text)
    return f"# {name}\n\n```{{eval-rst}}\n{_directive(name, thing)}\n```\n"


def _namespace_page(module: ModuleType, names: dict[str, str]) -> str:
    """Return the page of a namespace: what it is for, a table, and the pages below it."""
    rows = [f"| [`{short}`]({full}.md) | {_summary(short, getattr(module, short))} |" for short, full in names.items()]
    below = "\n".join(f"{s} <{full}>" for s, full in names.items() if full.rpartition(".")[0] == module.__name__)
    about = (inspect.getdoc(module) or "").split("\n\n")[0]
    hidden = f"```{{toctree}}\n:hidden:\n\n{below}\n```\n" if below else ""
    return "\n".join([f"# {module.__name__}", "", about, "", "| Name | |", "|---|---|", *rows, "", hidden])


def pages() -> dict[str, str]:
    """Return every page of the reference by its file name."""
    homes: dict[int, str] = {}
    found: dict[str, str] = {}
    for space in (*_NAMESPACES, *_LAST):
        module = _namespace(space)
        names = {}
        for short in sorted(module.__all__, key=str.lower):
            thing = getattr(module, short)
            if inspect.ismodule(thing):
                continue
            names[short] = homes.setdefault(id(thing), f"{module.__name__}.{short}")
            found.setdefault(f"{names[short]}.md", _object_page(names[short], thing))
        found[f"{module.__name__}.md"] = _namespace_page(module, names)
    listed = "\n".join(f"jacops.{space}".rstrip(".") for space in (*_NAMESPACES, *_LAST))
    about = {space: _summary(space, _namespace(space)) for space in (*_NAMESPACES, *_LAST)}
    rows = [f"| [`jacops.{space}`](jacops.{space}.md) | {about[space]} |" for space in (*_NAMESPACES[1:], *_LAST)]
    table = "\n".join(["| Namespace | |", "|---|---|", f"| [`jacops`](jacops.md) | {about['']} |", *rows])
    found["index.md"] = f"# Reference\n\n{table}\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    return found


def _write(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "reference"
    folder.mkdir(exist_ok=True)
    wanted = pages()
    for old in folder.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for them."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
