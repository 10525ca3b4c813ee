"""Names of features, and the groups that they belong to, beside results whose last axes are features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ._display import Described, Description, listed
from ._saving import Savable
from ._trees import is_differentiable, paths_in
from .errors import InputError, InputTypeError

FeatureLabels: TypeAlias = Iterable[Any] | Mapping[Any, Any] | None
FeatureGroups: TypeAlias = Iterable[Any] | Mapping[Any, Any] | None

OTHER = "other"  # the group of what is in none


@dataclass(frozen=True, eq=False, repr=False)
class FeatureNames(Savable, Described):
    """Names of features, and the groups that they belong to.

    Features are counted input after input, each flattened; their number is their place.

    Attributes:
        inputs: A name per input that has features; empty for one that is not in a container.
        shapes: The shape of a sample of each.
        axes: For each input the names along each of its axes, None where they are positions.
        groups: Names of the groups, none where there are none.
        members: For each input the group of each feature, by its number, of the input's shape.
    """

    inputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[tuple[str, ...] | None, ...], ...]
    groups: tuple[str, ...] = ()
    members: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, tree: Any, names: FeatureLabels = None, groups: FeatureGroups = None, leading: int = 1) -> FeatureNames:
        """Return the names of features along the last axes of the tensors of a tree.

        Args:
            tree: A tensor, or a tree of them, such as a model's inputs. What has no derivatives has no features.
            names: For features on one axis a name for each: a sequence, or a table whose columns they are. For
                several axes a sequence with an entry per axis: its names, or None. With several inputs a mapping from
                inputs to these, or a sequence of them in order. A string is a sequence of letters.
            groups: A mapping from groups to features, each given by its name, a pattern (`fnmatch`), its index, the
                name of a place along an axis or that of a whole input; what is in no group is in `"other"`. Or a label
                for every feature, of the features' shape.
            leading: Number of axes before those of features.

        Raises:
            InputError: Names or groups do not fit the features; the message contains the nearest names.
            InputTypeError: They are of the wrong kind.

        Example:
            >>> found = FeatureNames.of(torch.ones(5, 2, 3), names=("AB", None), groups={"first": "A"})
            >>> found.labels()
            ['A, 0', 'A, 1', 'A, 2', 'B, 0', 'B, 1', 'B, 2']
            >>> found.groups, found.members[0].tolist()
            (('first', 'other'), [[0, 0, 0], [1, 1, 1]])
        """
        leaves = paths_in(tree)[0]
        kept = leaves if len(leaves) == 1 else [(path, leaf) for path, leaf in leaves if _has_features(leaf)]
        inputs, shapes = tuple(_input_name(p) for p, _ in kept), tuple(tuple(leaf.shape[leading:]) for _, leaf in kept)
        if isinstance(names, FeatureNames):
            _check_same_shapes(names, shapes)
            found = names
        else:
            found = cls(inputs, shapes, _axes(names, inputs, shapes))
        return found if groups is None else found.grouped(groups)

    def grouped(self, groups: FeatureGroups) -> FeatureNames:
        """Return these names with other groups, given as in `of`.

        Raises:
            InputError: Groups do not fit the features.
            InputTypeError: They are of the wrong kind.
        """
        found = _by_lists(groups, self) if isinstance(groups, Mapping) else _by_labels(groups, self)
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = torch.from_numpy(found[1]).split(sizes)
        members = tuple(part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True))
        return replace(self, groups=found[0], members=members)

    @property
    def count(self) -> int:
        """How many features there are."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def label(self, place: int) -> str:
        """Return the name of a feature, by its place."""
        for name, shape, axes in zip(self.inputs, self.shapes, self.axes, strict=True):
            size = int(np.prod(shape))
            if place < size:
                indices = np.unravel_index(place, shape) if shape else ()
                inner = ", ".join(str(i) if n is None else n[i] for i, n in zip(indices, axes, strict=True))
                return (f"{name}[{inner}]" if inner else name) if name else inner
            place -= size
        raise IndexError(place)

    def labels(self) -> list[str]:
        """Return the names of all features."""
        return [self.label(place) for place in range(self.count)]

    def _describe(self) -> Description:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        inputs = [("inputs", listed(self.inputs))] if any(self.inputs) else []
        names = [
            (f"names along axis {axis}{f' of {name}' if name else ''}", listed(entries))
            for name, axes in zip(self.inputs, self.axes, strict=True)
            for axis, entries in enumerate(axes)
            if entries is not None
        ]
        groups = [("groups", listed(self.groups))] if self.groups else []
        return Description(f"FeatureNames({shapes} features)", [*inputs, *names, *groups])


def feature_names(rows: Any, names: Any, groups: Any, projection: Any = None) -> FeatureNames | None:
    """Return the names that `names=` and `groups=` of a call stand for; None where there are none.

    Args:
        rows: Tensors whose axes behind the first one are features.
        names: As given.
        groups: As given.
        projection: Brings names where none are given.

    Raises:
        InputError: They do not fit the features.
        InputTypeError: They are of the wrong kind.
    """
    names = getattr(projection, "names", None) if names is None else names
    return None if names is None and groups is None else FeatureNames.of(rows, names, groups)


def _has_features(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return is_differentiable(leaf)
    return getattr(getattr(leaf, "dtype", None), "kind", "") == "f"


def _input_name(path: Any) -> str:
    if len(path) == 1 and isinstance(path[0], pytree.MappingKey):
        return str(path[0].key)
    return f"x{pytree.keystr(path)}" if path else ""


def _check_same_shapes(names: FeatureNames, shapes: tuple[tuple[int, ...], ...]) -> None:
    if names.shapes != shapes:
        raise InputError.of("names", f"of features of shapes {names.shapes}", f"these are of shapes {shapes}")


# ---- names -----------------------------------------------------------------------------------------------------------


def _axes(names: Any, inputs: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> Any:
    """Return the names along the axes of every input."""
    if names is not None and not isinstance(names, Iterable):
        raise InputTypeError.of("names", f"a {type(names).__name__}", "a sequence, or a mapping from inputs, is needed")
    if isinstance(names, Mapping):
        unknown = next((key for key in names if key not in inputs), None)
        if inputs == ("",):
            raise InputTypeError.of(
                "names", "a mapping", "with one input a sequence is needed, a name for each feature"
            )
        if unknown is not None:
            raise InputError.of("names", f"given for {unknown!r}", f"no input has that name{near(unknown, inputs)}")
        each = [names.get(name) for name in inputs]
    elif len(inputs) == 1 or names is None:
        each = [names] * len(inputs)
    else:
        each = list(names)
        if len(each) != len(inputs):
            came = f"a sequence of {len(each)}"
            raise InputError.of("names", came, f"there are {len(inputs)} inputs: {', '.join(inputs)}")
    words = [f" of {name}" if name else "" for name in inputs]
    return tuple(_along(one, shape, word) for one, shape, word in zip(each, shapes, words, strict=True))


def _along(names: Any, shape: tuple[int, ...], where: str) -> tuple[tuple[str, ...] | None, ...]:
    """Return the names along each axis of one input."""
    if names is None:
        return (None,) * len(shape)
    if len(shape) == 1:
        return (_along_one(names, shape[0], f"feature{where}"),)
    entries = list(names)
    if len(entries) != len(shape) or not all(e is None or isinstance(e, Iterable) for e in entries):
        came, todo = f"a sequence of {len(entries)}", "For names along one of the axes only, pass None for the others."
        needed = f"features{where} have shape {shape}: an entry per axis is needed, its names or None"
        raise InputError.of("names", came, needed, todo)
    words = [f"place along axis {axis}{where}" for axis in range(len(shape))]
    pairs = zip(entries, shape, words, strict=True)
    return tuple(None if entry is None else _along_one(entry, size, word) for entry, size, word in pairs)


def _along_one(names: Any, size: int, what: str) -> tuple[str, ...]:
    found = tuple(str(name) for name in getattr(names, "columns", names))
    if len(found) != size:
        raise InputError.of("names", f"{len(found)} names", f"{size} are needed, one for each {what}")
    return found


# ---- groups ----------------------------------------------------------------------------------------------------------


def _by_labels(groups: Any, names: FeatureNames) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the groups, and the number of its group for every feature, from one label each."""
    if isinstance(groups, str) or not isinstance(groups, Iterable):
        needed = "a mapping from groups to features, or a label for every feature, is needed"
        raise InputTypeError.of("groups", f"a {type(groups).__name__}", needed)
    if len(names.shapes) != 1:
        raise InputError.of("groups", "a sequence", "with several inputs a mapping from groups to features is needed")
    try:
        labels = np.array(getattr(groups, "tolist", lambda: list(groups))(), dtype=object)
    except ValueError:  # lists of several lengths
        labels = np.empty(0)
    if labels.shape != names.shapes[0]:
        came = f"labels of shape {labels.shape}" if labels.size else "lists of several lengths"
        raise InputError.of("groups", came, f"features have shape {names.shapes[0]}, and each needs one")
    flat = labels.reshape(-1).tolist()
    words = [OTHER if label is None or label != label else str(label) for label in flat]
    numbers = all(isinstance(label, int | float) and label == label for label in flat)
    known = [str(label) for label in sorted(set(flat))] if numbers else list(dict.fromkeys(words))
    number = {word: k for k, word in enumerate(known)}
    return tuple(known), np.array([number[word] for word in words], np.int64)


def _by_lists(groups: Mapping[Any, Any], names: FeatureNames) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the groups, and the number of its group for every feature, from the features of each group."""
    found, given = np.full(names.count, -1, np.int64), tuple(map(str, groups))
    for number, (group, members) in enumerate(groups.items()):
        entries = [members] if isinstance(members, str | int | tuple | np.integer) else members
        if not isinstance(entries, Iterable):
            raise InputTypeError.of(f"groups[{group!r}]", f"a {type(members).__name__}", "features are needed")
        for entry in entries:
            places = _places(f"groups[{group!r}]", entry, names)
            taken = places[(found[places] >= 0) & (found[places] != number)]
            if taken.size:
                came = f"given {names.label(int(taken[0]))!r}, which is in {given[found[taken[0]]]!r} too"
                needed = "a feature in two groups would be counted twice"
                raise InputError.of(f"groups[{group!r}]", came, needed)
            found[places] = number
    if not (found < 0).any():
        return given, found
    rest = given if OTHER in given else (*given, OTHER)
    found[found < 0] = rest.index(OTHER)
    return rest, found


def _places(argument: str, entry: Any, names: FeatureNames) -> np.ndarray:
    """Return the places of the features that an entry of a group selects."""
    if isinstance(entry, str):
        return _named(argument, entry, names)
    index = entry if isinstance(entry, tuple) else (entry,)
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in index):
        raise InputTypeError.of(argument, f"given a {type(entry).__name__}", "names or indices of features are needed")
    if len(names.shapes) != 1:
        needed = f"with several inputs names are needed, such as {names.label(0)!r}"
        raise InputError.of(argument, f"given {entry!r}", needed)
    shape = names.shapes[0] if isinstance(entry, tuple) else (names.count,)
    if len(index) != len(shape) or not all(0 <= i < size for i, size in zip(index, shape, strict=True)):
        raise InputError.of(argument, f"given {entry!r}", f"features have shape {shape}, counted from 0")
    return np.atleast_1d(np.ravel_multi_index(index, shape))


def _named(argument: str, entry: str, names: FeatureNames) -> np.ndarray:
    """Return the places of features of a name: their own, of a place along an axis, or of an input; or of a pattern."""
    for fits in (str.__eq__, fnmatchcase):
        found = np.concatenate(list(_masks(entry, fits, names)))
        if not found.any():  # names made of several axes; many, so that they come last
            found = np.array([fits(label, entry) for label in names.labels()], bool)
        if found.any():
            return np.flatnonzero(found)
    known = [*filter(None, names.inputs), *(n for axes in names.axes for along in axes if along for n in along)]
    known = known or names.labels()
    raise InputError.of(argument, f"given {entry!r}", f"no feature has that name{near(entry, known)}")


def _masks(entry: str, fits: Any, names: FeatureNames) -> Iterable[np.ndarray]:
    """Yield for each input which of its features go by a name, those of names that are made of several axes apart."""
    for name, shape, axes in zip(names.inputs, names.shapes, names.axes, strict=True):
        mask = np.full(shape, bool(name) and fits(name, entry))
        for axis, along in enumerate(axes):
            if along is not None:
                fitting = np.array([fits(one, entry) for one in along], bool)
                mask |= fitting.reshape([-1 if k == axis else 1 for k in range(len(shape))])
        yield mask.reshape(-1)


def near(name: Any, known: Sequence[str]) -> str:
    """Return the part of an error message that lists the names nearest to an unknown one."""
    found = get_close_matches(str(name), known, 3, 0.4) or list(known)[:3]
    return f"; the nearest are {', '.join(found)}" if found else ""
