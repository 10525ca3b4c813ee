"""Which parts of a model's input have a row per sample; what has none is held by the input's structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Number
from typing import Any

from torch import Tensor

from ..._ladder.failures import succeeds
from ..._runtime.contexts import must_surface
from ..._trees import Tree, flatten, paths_in
from ...errors import InputError, InputTypeError, JacopsError

Shared = None | str | int | Sequence[str | int]


def is_setting(value: Any) -> bool:
    """Return whether an input is None, a bool, a number or a string: something to pass on, not to differentiate."""
    return value is None or isinstance(value, Number | str)


def rows_apart(x: Any, name: str, shared: Shared = None, of: Any = None) -> tuple[list[Any], Tree]:
    """Return what has a row per sample in a model's input, and the structure that holds all else.

    Args:
        x: A tensor, tuple or mapping.
        name: How messages call it.
        shared: Names or positions of what has no axis of samples.
        of: The input that `shared` is about, where `x` is that and more behind it.

    Raises:
        InputError: `shared` names something that is not there.
        InputTypeError: It is neither a name nor a position, nor several of them.
    """
    leaves, tree = flatten(x, name)
    settings = [] if tree.single else [i for i, leaf in enumerate(leaves) if is_setting(leaf)]
    if shared is not None:
        settings += shared_places([path for path, _ in paths_in(x if of is None else of)[0]], shared)
    return tree.holding(leaves, sorted(set(settings)))


def shared_places(paths: Sequence[Sequence[Any]], shared: Shared) -> list[int]:
    """Return the places of shared leaves: a name counts in any position, a position among the arguments.

    Args:
        paths: Of the input's leaves, as torch's or JAX's trees have them.
        shared: Names or positions.

    Raises:
        InputError: One of them is not there.
        InputTypeError: It is neither a name nor a position, nor several of them.
    """
    if shared is None:
        return []
    keys = [[getattr(step, "key", getattr(step, "idx", getattr(step, "name", None))) for step in p] for p in paths]
    names = [str(key) for path in keys for key in path if isinstance(key, str)]
    found: list[int] = []
    for entry in [shared] if isinstance(shared, str | int) else list(shared):
        if isinstance(entry, bool) or not isinstance(entry, str | int):
            came = f"an entry of type {type(entry).__name__}"
            raise InputTypeError.of("shared", came, "names of keyword inputs or positions of inputs are needed")
        by_name = isinstance(entry, str)
        fitting = [i for i, path in enumerate(keys) if (entry in path if by_name else path[:1] == [entry])]
        if not fitting:
            near = get_close_matches(str(entry), names, 3, 0.4) or sorted({str(path[0]) for path in keys if path})
            known = (
                f"the nearest are {', '.join(near[:5])}" if near else "the input is one tensor, whose rows are samples"
            )
            raise InputError.of("shared", repr(entry), f"there is no such input; {known}")
        found += fitting
    return found


@contextmanager
def axis_explained(values: Sequence[Tensor], run: Callable[[Sequence[Tensor]], Any]) -> Iterator[None]:
    """Describe what is missing where a model fails on samples and takes all of them as one.

    Args:
        values: The samples, one row each.
        run: Runs the model over such values.

    Raises:
        InputError: It takes the values with one more axis before their first; its own error is the cause.
    """
    try:
        yield
    except JacopsError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        by_rows = succeeds(lambda: run([value[:1] for value in values]))  # then a loss failed, not the model
        if must_surface(error) or by_rows or not succeeds(lambda: run([value.unsqueeze(0) for value in values])):
            raise
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        first = str(error).strip().splitlines()[:1]
        came = f"of shape {shapes}, which the model takes as one sample (its rows alone fail: {' '.join(first)})"
        todo = "Call `.unsqueeze(0)` on it."
        raise InputError.of("x", came, "the axis of samples is missing; it must be the first one", todo) from error
