"""Where paths begin: baselines of the inputs, and the straight lines from them to the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._finite import require_finite
from .._torch.protocol import Samples
from .._trees import flatten
from ..errors import InputError, InputTypeError


@dataclass(frozen=True)
class Paths:
    """Straight lines from baselines to samples, numbered sample after sample.

    Attributes:
        samples: Where they end.
        starts: Where they begin, for each input with a row per sample: one row for all paths, one for each sample, one
            for each baseline of a set, or one for each path; None for an input that stays as it is.
        baselines: How many paths lead to a sample; 1 unless baselines are given as a set.
    """

    samples: Samples
    starts: tuple[Tensor | None, ...]
    baselines: int = 1

    @property
    def count(self) -> int:
        """How many paths there are."""
        return self.samples.count * self.baselines

    def rows(self, path: Tensor) -> Tensor:
        """Return which samples paths lead to."""
        return path.div(self.baselines, rounding_mode="floor")

    def begin(self, path: Tensor) -> Samples:
        """Return the baselines of paths as samples, with whatever stays as it is."""
        values = self._ends(path)
        for place, start in enumerate(self.starts):
            if start is not None:
                values[place] = self._start(start, path).expand_as(values[place])
        return self.samples.over(values)

    def points(self, path: Tensor, t: Tensor) -> Samples:
        """Return points of paths as samples; `t` is 0 at the baseline and 1 at the sample, exactly so at both ends."""
        values = self._ends(path)
        for place in self.samples.inputs:
            end, start = values[place], self.starts[place]
            if start is not None:
                wide = torch.promote_types(end.dtype, torch.float32)
                weight = t.to(end.device, wide).view(-1, *[1] * (end.ndim - 1))
                values[place] = torch.lerp(self._start(start, path).to(wide), end.to(wide), weight).to(end.dtype)
        return self.samples.over(values)

    def steps(self, path: Tensor) -> list[Tensor]:
        """Return sample minus baseline of paths, for each input that is differentiated by."""
        ends = self._ends(path)
        pairs = ((ends[place], self.starts[place]) for place in self.samples.inputs)
        return [torch.zeros_like(end) if start is None else end - self._start(start, path) for end, start in pairs]

    def _ends(self, path: Tensor) -> list[Tensor]:
        return [v[self.rows(path).to(v.device)] for v in self.samples.values]

    def _start(self, start: Tensor, path: Tensor) -> Tensor:
        if len(start) == 1:
            return start
        return start[(path if len(start) == self.count else path % self.baselines).to(start.device)]


def starts_of(
    samples: Samples, x: Any, given: tuple[Any, Any], inside: bool
) -> tuple[tuple[Tensor | None, ...], int, str]:
    """Return a start for every input with a row per sample, how many a sample has, and what they are in words.

    Args:
        samples: The model's samples.
        x: As given, for the structure.
        given: `baseline` and `baselines` of the call.
        inside: Paths are of a hidden layer, so that inputs without derivatives may have a start, too.

    Raises:
        InputError: They do not fit the inputs, or both are given.
        InputTypeError: They hold what is neither tensor nor number.
        NonFiniteError: They hold NaN or Inf.
    """
    baseline, baselines = given
    names = samples.input_tree.names
    if baselines is not None:
        if baseline is not None:
            raise InputError.of("baselines", "given beside `baseline`", "one of them is needed, not both")
        entries = _entries("baselines", baselines, x, names)
    elif baseline is None or _is_number(baseline):
        fill = 0.0 if baseline is None else float(baseline)
        entries = [fill if i in samples.inputs else None for i in range(len(names))]
    else:
        entries = _entries("baseline", baseline, x, names)
    argument = "baseline" if baselines is None else "baselines"
    found: list[Tensor | None] = []
    for place, (name, entry) in enumerate(zip(names, entries, strict=True)):
        called, value = _called(argument, name), samples.values[place]
        start = _start(called, entry, value, inside or place in samples.inputs)
        if start is not None:
            start = _rows(called, start, value) if baselines is None else _members(called, start, value)
        found.append(start)
    if baselines is None:
        words = "zeros" if baseline is None else str(baseline) if _is_number(baseline) else "the baseline"
        return tuple(found), 1, words
    lengths = {len(start) for start in found if start is not None}
    if len(lengths) != 1 or 0 in lengths:
        came = f"of lengths {sorted(lengths)}" if lengths else "without a tensor"
        raise InputError.of("baselines", came, "at least one baseline is needed, and equally many for all inputs")
    many = lengths.pop()
    return tuple(found), many, f"{many:,} baselines, over which the result is the mean"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _called(argument: str, name: str) -> str:
    """Return how an input's baseline is called, after the input: `x['a']` gives `baseline['a']`."""
    return argument + name.removeprefix("x")


def _entries(argument: str, given: Any, x: Any, names: Sequence[str]) -> list[Any]:
    """Return what is given for each input, by its place in the structure of `x`."""
    leaves, tree = flatten(given, argument)
    known = dict(zip(tree.names, leaves, strict=True))
    wanted = {_called(argument, name): name for name in flatten(x, "x")[1].names}
    for path, leaf in known.items():
        if path not in wanted:
            near = get_close_matches(path, wanted, 1, 0.4) or list(wanted)[:1]
            needed = f"the structure of `x` is needed, which has {', '.join(wanted.values())}"
            raise InputError.of(path, "given", needed, f"Did you mean `{near[0]}`?")
        if wanted[path] not in names and leaf is not None:
            raise InputError.of(path, "given", "that input has no rows of its own", "Pass None there.")
    missing = next((path for path in wanted if path not in known), None)
    if missing is not None:
        raise InputError.of(missing, "missing", "the structure of `x` is needed", "Pass None for what stays as it is.")
    return [known[_called(argument, name)] for name in names]


def _start(name: str, entry: Any, value: Tensor, movable: bool) -> Tensor | None:
    """Return where an input begins, a tensor with its dtype."""
    if _is_number(entry):
        entry = value.new_full((1, *value.shape[1:]), float(entry))
    if entry is None:
        return None
    if not isinstance(entry, Tensor):
        todo = f"Convert it with torch.as_tensor({name})." if hasattr(entry, "__array__") else ""
        raise InputTypeError.of(name, f"a {type(entry).__name__}", "a tensor or a number is needed", todo)
    if not movable:
        todo = "Pass None for what stays as it is; from an embedding on, paths are taken with `at=`."
        raise InputError.of(name, "given", f"that input is of {value.dtype}, along which there is no path", todo)
    if entry.dtype != value.dtype or entry.device != value.device:
        came, needed = (f"of {t.dtype} on {t.device}" for t in (entry, value))
        raise InputError.of(name, came, f"the input is {needed}", "Cast one of them; nothing is cast silently.")
    require_finite(entry, f"integrated_jacobian: in `{name}`")
    return entry.detach()


def _rows(name: str, start: Tensor, value: Tensor) -> Tensor:
    """Return a baseline with one row, or with one for each sample."""
    one, each = tuple(value.shape[1:]), tuple(value.shape)
    if tuple(start.shape) not in (one, (1, *one), each):
        needed = f"{one} for all samples or {each} for each is needed"
        raise InputError.of(name, f"of shape {tuple(start.shape)}", needed)
    return start if start.ndim == value.ndim else start.unsqueeze(0)


def _members(name: str, starts: Tensor, value: Tensor) -> Tensor:
    """Return a set of baselines, a row for each."""
    if starts.ndim != value.ndim or starts.shape[1:] != value.shape[1:]:
        needed = f"({', '.join(map(str, ('m', *value.shape[1:])))}) is needed, a row for each of m baselines"
        raise InputError.of(name, f"of shape {tuple(starts.shape)}", needed)
    return starts
