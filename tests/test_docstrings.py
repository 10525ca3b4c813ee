"""What the reference is made from: every public function says what it takes, returns and raises, with an example."""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import jacops

NAMESPACES = (
    "attribution",
    "charts",
    "errors",
    "fit",
    "influence",
    "linalg",
    "results",
    "solvers",
    "sparse",
    "store",
    "testing",
)


def public() -> dict[str, Any]:
    """Return every public object once, by the first name that it has."""
    found = {f"jacops.{name}": getattr(jacops, name) for name in jacops.__all__}
    for space in NAMESPACES:
        module = importlib.import_module(f"jacops.{space}")
        found |= {f"jacops.{space}.{name}": getattr(module, name) for name in module.__all__}
    once = {id(thing): name for name, thing in reversed(found.items()) if not inspect.ismodule(thing)}
    return {name: found[name] for name in once.values()}


PUBLIC = public()
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}


def documented(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function) or ""


def section(text: str, title: str) -> str:
    """Return the indented lines below a title such as `Args:`."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    return found[1] if found else ""


def returns_nothing(function: Callable[..., Any]) -> bool:
    return inspect.signature(function).return_annotation in (None, "None")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described(name: str) -> None:
    arguments = section(documented(FUNCTIONS[name]), "Args")
    for argument in inspect.signature(FUNCTIONS[name]).parameters:
        assert re.search(rf"^\s+\**{argument}: \S", arguments, re.MULTILINE), f"{name} does not describe {argument}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_returns_and_raises(name: str) -> None:
    text = documented(FUNCTIONS[name])
    assert returns_nothing(FUNCTIONS[name]) or section(text, "Returns"), f"{name} has no section `Returns`"
    assert section(text, "Raises") or not raises(FUNCTIONS[name]), f"{name} has no section `Raises`"


def raises(function: Callable[..., Any]) -> bool:
    """Return whether a function refuses anything; `surroundings` takes whatever it is given."""
    return function is not jacops.store.surroundings


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_an_example_which_the_doctests_execute(name: str) -> None:
    assert ">>> " in documented(FUNCTIONS[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_descriptions_stand_by_themselves(name: str) -> None:
    """An argument is described where it is, in a few words, also where another page has more of it."""
    whole = [documented(PUBLIC[name])]
    if name in CLASSES:
        whole += [documented(method) for _, method in inspect.getmembers(CLASSES[name], inspect.isfunction)]
    for text in whole:
        bare = re.findall(r"^ +\w+: (?:As (?:in|for) |See )`[\w.]+`\.?$", text, re.MULTILINE)
        assert not bare, f"{name}: {bare}"


@pytest.mark.parametrize("name", CLASSES)
def test_every_method_and_property_is_described(name: str) -> None:
    for member, thing in vars(CLASSES[name]).items():
        if not member.startswith("_") and (inspect.isfunction(thing) or isinstance(thing, property)):
            text = inspect.getdoc(getattr(CLASSES[name], member))
            assert text, f"{name}.{member}"
