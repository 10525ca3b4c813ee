"""What features add to outputs: the result of `contributions`, and how well it was verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ._attribution_page import PagedContributions, slopes_in_words
from ._display import Described, Description, Table, listed
from ._features import FeatureNames
from ._interop import ArrayLike
from ._saving import Savable
from ._trees import flatten
from .errors import InputError, InputTypeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHOWN = 5  # features in a repr: those of largest contribution


@dataclass(repr=False)
class JacobianVerification(Savable, Described):
    """The error of `Z = J X`.

    Attributes:
        z_range: Smallest and largest entry of `Z`.
        reconstruction_range: Smallest and largest entry of `J X`.
        max_error: Largest absolute difference, in the units of `Z`.
        mean_error: Mean absolute difference, in the units of `Z`.
        relative_error: `max_error` over the largest absolute entry of `Z`, right at any scale; if that is 0, 0 for no
            error and inf for any.
    """

    z_range: tuple[float, float]
    reconstruction_range: tuple[float, float]
    max_error: float
    mean_error: float
    relative_error: float

    def _describe(self) -> Description:
        ranges = {"range of Z": self.z_range, "range of J X": self.reconstruction_range}
        facts = [(word, f"{low:.4g} to {high:.4g}") for word, (low, high) in ranges.items()]
        errors = f"at most {self.max_error:.1e}, mean {self.mean_error:.1e}"
        title = f"JacobianVerification: relative error {self.relative_error:.1e}"
        return Description(title, [("error", errors), *facts])


def verification_of(z: NDArray[np.float64], rebuilt: NDArray[np.float64]) -> JacobianVerification:
    """Return how well `z` was rebuilt; nothing is missing where there is nothing."""
    if not z.size:
        return JacobianVerification((0.0, 0.0), (0.0, 0.0), 0.0, 0.0, 0.0)
    error = np.abs(z - rebuilt)
    worst, scale = float(error.max()), float(np.abs(z).max())
    relative = worst / scale if scale > 0 else (0.0 if worst == 0 else float("inf"))
    return JacobianVerification(_range(z), _range(rebuilt), worst, float(error.mean()), relative)


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def verified(output: Tensor, bias: Tensor, added: Tensor) -> JacobianVerification:
    """Return how well the sum of all contributions is the output without the bias part."""
    z, rebuilt = output.double() - bias.double(), added.double()
    return verification_of(z.detach().cpu().numpy(), rebuilt.detach().cpu().numpy())


@dataclass(frozen=True, eq=False, repr=False)
class Contributions(ArrayLike, Savable, PagedContributions):
    """Contributions of features to outputs, the bias part, and the check of their sum.

    With one input tensor and one output tensor all parts are tensors. For several inputs `values` and `jacobian` are in
    the structure of the input, with None where there is no derivative; for several outputs `values`, `bias`, `output`
    and `jacobian` are in the structure of the output, and `found["mu"]` or `found[1]` is the result for one of them.

    Attributes:
        values: Feature f adds `J[n, o, f] * x[n, f]` to output o, in the units of the output, `(n, *out, *features)`;
            from a hidden layer (`at=`) its axes take the place of `features`.
        bias: What the model's constants add, computed without the output, `(n, *out)`.
        output: The model's output, `(n, *out)`.
        jacobian: By the same features as `values`, of the shape of `values`; None for groups of features.
        verification: `output - bias` against the sum of `values`; small means that nothing is missing. Of several
            outputs the worst.
        slope_error: How far `f(x + d) - f(x - d)` is from `2 J d` for small `d`, relative to the size of the terms of
            `J d`, at worst over samples and outputs. Kinks in between are taken into account, and detached tensors are
            held fixed. It is about 1e-8 in double and 1e-5 in single precision where the Jacobian is right. For a model
            that an earlier call verified it is the value measured then. None where the Jacobian is an average along a
            path.
        notes: Remarks: what was frozen, operations that are not piecewise linear, what was centred.
        method: `"exact"` for the Jacobian at the samples themselves; `"frozen"` where parts of the model were held
            constant (`freeze=`); `"integrated"` for parts averaged along a path, of which `bias` is the output where it
            begins.
        names: Names of the features and their groups, where some were given.
        steps: Jacobians taken along a path, at most; None where there is no path.
    """

    values: Any
    bias: Any
    output: Any
    jacobian: Any
    verification: JacobianVerification
    slope_error: float | None
    notes: tuple[str, ...]
    method: str = "exact"
    names: FeatureNames | None = None
    steps: int | None = None
    _array: ClassVar[str] = "values"
    __iter__: ClassVar[None] = None  # what there is to go through, outputs or samples, would not be plain

    def __getitem__(self, key: str | int) -> Contributions:
        """Return the result for one of several outputs.

        `slope_error` and `notes` stay those of all outputs.

        Args:
            key: Its name or position, as in the model's output.

        Raises:
            InputError: There is one output only, or none of that name.
        """
        known = _keys(self.output)
        if key not in known and isinstance(key, int) and -len(known) <= key < len(known):
            key = known[key]
        if key not in known:
            near = get_close_matches(str(key), map(str, known), 1, 0.4)
            there = f"the outputs are {listed([repr(one) for one in known])}" if known else "there is one output only"
            todo = f"Did you mean {near[0]!r}?" if near else "" if known else "Take the result as it is."
            raise InputError.of("key", repr(key), there, todo)
        values, bias, output, jacobian = (_at(of, key) for of in (self.values, self.bias, self.output, self.jacobian))
        parts = {"values": values, "bias": bias, "output": output, "jacobian": jacobian}
        if isinstance(output, Tensor):
            parts["verification"] = verified(output, bias, _added(values, output))
        return replace(self, **parts)

    def _converted(self, call: str) -> Any:
        if not isinstance(self.values, Tensor):
            came, todo = "given contributions of several outputs or inputs", "Take the tensors out of `.values`."
            raise InputTypeError.of(call, came, "one array is needed", todo)
        return self.values

    def _each(self, name: str = "output") -> list[tuple[str, Contributions]]:
        """Return the results for all outputs, with their names; their verification is that of all."""
        if isinstance(self.output, Tensor):
            return [(name, self)]
        found: list[tuple[str, Contributions]] = []
        for key in _keys(self.output):
            parts = {of: _at(getattr(self, of), key) for of in ("values", "bias", "output", "jacobian")}
            if parts["output"] is not None:
                found += replace(self, **parts)._each(f"{name}[{key!r}]")
        return found

    def _inputs(self) -> list[tuple[str, Tensor]]:
        """Return the values by all inputs of one output, with their names."""
        leaves, tree = flatten(self.values, "x")
        return [(name, leaf) for name, leaf in zip(tree.names, leaves, strict=True) if leaf is not None]

    def _describe(self) -> Description:
        each = self._each()
        return self._described_one() if isinstance(self.output, Tensor) else self._described_all(each)

    def _facts(self) -> list[tuple[str, str]]:
        slopes = [] if self.slope_error is None else [("slopes", slopes_in_words(self.slope_error))]
        method = [] if self.method == "exact" else [("method", self.method)]
        return [*method, *slopes, *(("note", note) for note in self.notes)]

    def _described_one(self) -> Description:
        verified = f"features + bias up to {self.verification.relative_error:.1e} of its range"
        facts = [("output", verified), ("bias", f"{self._share():.0%} of it"), *self._facts()]
        many = self.output.shape[1:]
        outputs = "1 output" if many.numel() == 1 else f"{_sizes(many)} outputs"
        features = ", ".join(f"{name} {_sizes(shape)}".strip() for name, shape in self._shapes()) + " features"
        tables = [self.top(_SHOWN).table()] if self.output.numel() else []
        return Description(f"Contributions({len(self.output):,} samples, {outputs}, {features})", facts, tables)

    def _described_all(self, each: list[tuple[str, Contributions]]) -> Description:
        rows = []
        for name, one in each:
            largest = one.top(1).table().rows[0][:2] if one.output.numel() else ("", "")
            cells = (_sizes(one.output.shape[1:]), f"{one._share():.0%}", *largest)
            rows.append((name.removeprefix("output"), *cells))
        header = ("output", "numbers", "bias", "largest feature", "mean |contribution|")
        verified = f"features + bias up to {self.verification.relative_error:.1e} of their ranges"
        title = f"Contributions({len(each[0][1].output) if each else 0:,} samples, {len(each)} outputs)"
        return Description(title, [("outputs", verified), *self._facts()], [Table(header, rows)])

    def _share(self) -> float:
        """Return how much of an output's parts the bias is."""
        bias = float(self.bias.abs().sum())
        return bias / (bias + float(_added(self.values, self.output).abs().sum()) + 1e-300)

    def _shapes(self) -> list[tuple[str, torch.Size]]:
        return [(name.removeprefix("x"), values.shape[self.output.ndim :]) for name, values in self._inputs()]


def worst(verifications: Sequence[JacobianVerification]) -> JacobianVerification:
    """Return the verification of largest relative error, NaN being the largest."""
    return max(verifications, key=lambda v: (np.isnan(v.relative_error), v.relative_error))


def flattened(found: Contributions, call: str) -> Contributions:
    """Return contributions with outputs on one axis, `(n, outputs, *features)`.

    Args:
        found: Of one output, by one input.
        call: For which they are needed.

    Raises:
        InputError: There are several outputs or inputs.
    """
    if not isinstance(found.output, Tensor):
        names = [name.removeprefix("output") for name, _ in found._each()]
        todo = f"Pick one: found{names[0]}." if names else ""
        raise InputError.of("contributions", f"of {len(names)} outputs", f"{call} takes those of one", todo)
    if not isinstance(found.values, Tensor):
        names = listed([name.removeprefix("x") for name, _ in found._inputs()])
        todo = "Take the tensor of one out of `.values`."
        raise InputError.of("contributions", f"by several inputs ({names})", f"{call} takes those by one", todo)
    count, *outputs = found.output.shape
    features = found.values.shape[found.output.ndim :]
    wide = (count, int(np.prod(outputs)))
    parts = {name: getattr(found, name).reshape(*wide, *features) for name in ("values", "jacobian")}
    return replace(found, **parts, bias=found.bias.reshape(wide), output=found.output.reshape(wide))


def _added(values: Any, output: Tensor) -> Tensor:
    """Return the sum of what the features of all inputs add to one output, in double precision."""
    leaves = [leaf for leaf in flatten(values, "x")[0] if leaf is not None]
    flat = (leaf.reshape(*output.shape, leaf.shape[output.ndim :].numel()) for leaf in leaves)
    return torch.stack([of.double().sum(-1) for of in flat]).sum(0)


def _keys(output: Any) -> list[Any]:
    """Return names or positions of several outputs; none for a tensor."""
    if isinstance(output, Mapping):
        return [key for key, value in output.items() if value is not None]
    if isinstance(output, tuple | list):
        return list(getattr(output, "_fields", range(len(output))))
    return [field.name for field in fields(output)] if is_dataclass(output) else []


def _at(tree: Any, key: Any) -> Any:
    named = isinstance(key, str) and not isinstance(tree, Mapping)
    return getattr(tree, key) if named else tree[key]


def _sizes(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "1"
