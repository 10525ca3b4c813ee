"""Namespaces whose names load the module that makes them when they are first requested.

`import jacops` takes as long as `import torch`, and other modules are imported when they are used. Classes among the
names check the arguments of their methods (`_keywords.check_methods`) as soon as the module that defines one of them is
loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from threading import Lock
from typing import Any

from ._keywords import check_methods

_PACKAGE = __package__ or "jacops"
_awaited: dict[str, set[str]] = {}  # by module: names of it that are public, until it is loaded
_public: set[type] = set()  # classes that were loaded
_lock = Lock()


def lazy(namespace: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a module's `__getattr__`, which loads a name from where it is made and keeps it, and its `__dir__`.

    Args:
        namespace: The module that gives the names.
        homes: By module, relative to the package, the names that it makes, with blanks between them; names below ""
            are modules themselves.
    """
    made_by = {name: home for home, names in homes.items() for name in names.split()}
    for name, home in made_by.items():
        if home:
            _awaited.setdefault(f"{_PACKAGE}.{home}", set()).add(name)

    def load(name: str) -> Any:
        home = made_by.get(name)
        if home is None:
            raise AttributeError(f"module {namespace!r} has no attribute {name!r}")
        if not home:
            value = import_module(f"{_PACKAGE}.{name}")
        else:
            value = getattr(import_module(f"{_PACKAGE}.{home}"), name)
            settle()
        setattr(sys.modules[namespace], name, value)
        return value

    return load, lambda: sorted(made_by)


def eager(namespace: str) -> None:
    """Let the classes of a namespace that loads its names itself check their arguments; called at its end."""
    module = sys.modules[namespace]
    _public.update(value for name in module.__all__ if isinstance(value := getattr(module, name), type))
    settle()


def settle() -> None:
    """Let public classes that were loaded since the last call, and what derives from them, check their arguments."""
    with _lock:
        for home, names in list(_awaited.items()):
            values = vars(sys.modules[home]) if home in sys.modules else {}
            if names <= values.keys():  # loaded to its end
                del _awaited[home]
                _public.update(value for name in names if isinstance(value := values[name], type))
        check_methods(*_public)
