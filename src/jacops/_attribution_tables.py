"""Contributions as numbers under names: the largest features, sums over groups, pandas tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ._display import Described, Description, Table, shortened
from ._features import FeatureGroups, FeatureNames
from ._interop import ArrayLike, as_array
from ._requirements import check_positive, check_whole
from ._saving import Savable
from ._tables import Names, feature_axes, names_of, pandas, tidy_table
from ._trees import paths_in
from .errors import InputError

if TYPE_CHECKING:
    import pandas as pd

OutputPlace: TypeAlias = int | Sequence[int] | None


@dataclass(frozen=True, eq=False, repr=False)
class TopFeatures(ArrayLike, Savable, Described):
    """The features of largest contribution, in order.

    Attributes:
        features: Their names.
        places: Their indices among all features, flattened input after input, `(k,)`.
        sizes: Mean absolute contributions, in the units of the output, `(k,)`.
        contributions: Mean contributions with their signs, `(k,)`.
        shares: Sizes over the sum of those of all features, `(k,)`.
        of: What the means are over, in words.
        count: How many contributions they are over.
    """

    features: tuple[str, ...]
    places: Tensor
    sizes: Tensor
    contributions: Tensor
    shares: Tensor
    of: str
    count: int
    _array: ClassVar[str] = "sizes"

    def to_pandas(self) -> pd.DataFrame:
        """Return a table with a row per feature, and its size, contribution and share.

        Raises:
            MissingExtraError: Pandas is not installed (extra `pandas`).
        """
        columns = {"size": self.sizes, "contribution": self.contributions, "share": self.shares}
        index = pandas().Index(self.features, name="feature")
        return pandas().DataFrame({name: as_array(column) for name, column in columns.items()}, index=index)

    def table(self) -> Table:
        """Return the features as they are shown."""
        names = [shortened(name, 60) for name in self.features]
        columns = (self.sizes.tolist(), self.contributions.tolist(), self.shares.tolist())
        cells = [(f"{size:.4g}", f"{mean:+.4g}", f"{share:.1%}") for size, mean, share in zip(*columns, strict=True)]
        header = ("feature", "mean |contribution|", "mean contribution", "share")
        skipped = 1 if self.count == 1 else 0  # of one contribution there is no mean
        header = ("feature", "contribution", "share") if skipped else header
        return Table(header, [(name, *row[skipped:]) for name, row in zip(names, cells, strict=True)])

    def _describe(self) -> Description:
        return Description(f"TopFeatures({len(self.features)}): {self.of}", (), [self.table()])


@dataclass(frozen=True)
class FlatContributions:
    """Contributions to one output tensor with all features on one axis.

    Attributes:
        values: `(n, outputs, features)`, outputs and features flattened, input after input.
        bias: `(n, outputs)`.
        output: `(n, outputs)`.
        shape: The axes of an output, which are flattened here.
        names: Of the features.
    """

    values: Tensor
    bias: Tensor
    output: Tensor
    shape: tuple[int, ...]
    names: FeatureNames

    def place(self, output: OutputPlace) -> int | None:
        """Return the number of an output that is given by its index, a number for each axis; None for none.

        Raises:
            InputError: There is no such output.
        """
        if output is None:
            return 0 if self.values.shape[1] == 1 else None
        index = tuple(output) if isinstance(output, Sequence) else (output,)
        for k, i in enumerate(index):
            check_whole("output", i, 0)
            if len(index) != len(self.shape) or i >= self.shape[k]:
                many = self.shape[0] if len(self.shape) == 1 else self.shape
                raise InputError.of("output", output, f"there are {many}, counted from 0")
        return int(np.ravel_multi_index(index, self.shape)) if self.shape else 0

    def check_sample(self, sample: int) -> None:
        """Refuse a sample that there is not.

        Raises:
            InputError: There is no such sample.
        """
        check_whole("sample", sample, 0)
        if sample >= len(self.values):
            raise InputError.of("sample", sample, f"there are {len(self.values)}, counted from 0")

    def index(self, place: int) -> tuple[int, ...]:
        """Return the index of an output, a number for each axis."""
        return tuple(int(i) for i in np.unravel_index(place, self.shape)) if self.shape else ()

    def word(self, place: int) -> str:
        """Return how an output is called."""
        if not self.shape:
            return "the output"
        return f"output {', '.join(map(str, self.index(place)))}"


class TabledContributions(Described):
    """Contributions that list the largest features, are summed over groups and convert to tables."""

    values: Any
    bias: Any
    output: Any
    names: FeatureNames | None

    def top(self, k: int = 10, sample: int | None = None, output: OutputPlace = None) -> TopFeatures:
        """Return the features of largest mean absolute contribution.

        Args:
            k: How many; all where there are fewer.
            sample: One sample; by default the mean is over all of them.
            output: One output, a number for each of its axes; by default the mean is over all of them.

        Raises:
            InputError: An argument is out of range, there are no samples, or several outputs.

        Example:
            >>> import jacops, torch
            >>> net = torch.nn.Linear(3, 1, bias=False).double()
            >>> _ = torch.nn.init.ones_(net.weight)
            >>> found = jacops.contributions(net, torch.tensor([[1.0, -4.0, 3.0]]).double(), names=["a", "b", "c"])
            >>> found.top(2)
            TopFeatures(2): 1 sample, 1 output
              feature  contribution  share
              b                  -4  50.0%
              c                  +3  37.5%
        """
        flat = self._flat("top")
        check_positive("k", k)
        if sample is not None:
            flat.check_sample(sample)
        place = flat.place(output)
        part = flat.values if sample is None else flat.values[sample : sample + 1]
        part = part if place is None else part[:, place : place + 1]
        n, out = part.shape[:2]
        if not n * out:
            raise InputError.of("top", "called with no samples", "at least one is needed")
        sizes = torch.linalg.vector_norm(part, 1, dim=(0, 1), dtype=torch.float64) / (n * out)
        places = sizes.argsort(descending=True, stable=True)[:k]
        means = part[:, :, places].sum((0, 1), dtype=torch.float64) / (n * out)
        samples = f"{n:,} sample{'s' * (n != 1)}" if sample is None else f"sample {sample}"
        outputs = f"{out} outputs" if place is None else "1 output" if output is None else flat.word(place)
        features = tuple(flat.names.label(i) for i in places.tolist())
        shares = sizes[places] / sizes.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return TopFeatures(features, places, sizes[places], means, shares, f"{samples}, {outputs}", n * out)

    def grouped(self, groups: FeatureGroups = None) -> Self:
        """Return the contributions of groups of features: the sums of those of their features.

        Bias and output stay as they are, and so does what was verified: output = sum over groups + bias.

        Args:
            groups: Features that are added up: a mapping of names to features, or one label per feature; by default
                those that were given to it.

        Returns:
            Contributions with the groups as features, `(n, *out, groups)`. Their `jacobian` is None: the derivative by
            a group would need a direction in it.

        Raises:
            InputError: There are no groups, they do not fit the features, or there are several outputs.

        Example:
            >>> import jacops, torch
            >>> found = jacops.contributions(torch.nn.Linear(4, 2), torch.randn(5, 4), groups=["a", "a", "b", "b"])
            >>> found.grouped().values.shape, found.grouped().top(1).features[0] in ("a", "b")
            (torch.Size([5, 2, 2]), True)
        """
        flat = self._flat("grouped")
        names = flat.names if groups is None else flat.names.grouped(groups)
        if not names.groups:
            todo = "Pass `groups=` here or to the call that the contributions come from."
            raise InputError.of("groups", "missing", "a group for every feature is needed", todo)
        members = torch.cat([part.reshape(-1) for part in names.members]).to(flat.values.device)
        n, out, _ = flat.values.shape
        wide = torch.zeros(n, out, len(names.groups), dtype=torch.float64, device=flat.values.device)
        wide.index_add_(2, members, flat.values.double())
        values = wide.reshape(n, *flat.shape, len(names.groups)).to(flat.values.dtype)
        made = FeatureNames(("",), ((len(names.groups),),), ((names.groups,),))
        return replace(self, values=values, jacobian=None, names=made)  # pyright: ignore[reportArgumentType]

    def to_pandas(
        self, *, samples: Names = None, outputs: Names = None, features: Names = None, bias: bool = False
    ) -> pd.DataFrame:
        """Return the contributions as a table of one row per sample, output and feature.

        Args:
            samples: Names of the samples; by default positions.
            outputs: Names of the outputs.
            features: Names of the features; by default those given to `contributions`, else positions.
            bias: Add a row of feature `"bias"` per sample and output, so that rows sum to the output.

        Returns:
            A table with columns `sample`, `output` (`output_0`, … where outputs have several axes), `feature`
            (`feature_0`, …; with several inputs `input` and `feature`), `group` where there are groups, and `value`.

        Raises:
            MissingExtraError: Pandas is not installed (extra `pandas`).
            InputError: Names are too few or too many, or `bias` is asked of features with several axes.
        """
        flat = self._flat("to_pandas")
        n, out, count = flat.values.shape
        axes = [("sample", names_of("samples", samples, n)), *_output_axes(flat.shape, outputs)]
        named, groups = _feature_axes(flat.names, features), flat.names.groups
        many = len(flat.names.inputs) > 1
        inputs = np.repeat(flat.names.inputs, [int(np.prod(shape)) for shape in flat.names.shapes])
        members = np.concatenate([part.reshape(-1).numpy() for part in flat.names.members]) if groups else inputs
        within = np.array(groups, object)[members] if groups else members
        values = as_array(flat.values)
        if bias:
            if len(named) != 1:
                raise InputError.of("bias", "True", f"features have axes {flat.names.shapes[0]}: it is in none of them")
            named = [("feature", [*named[0][1], "bias"])]
            values = np.concatenate([values, as_array(flat.bias)[..., None]], -1)
            inputs, within, count = np.append(inputs, ""), np.append(within, "bias"), count + 1
        sizes = [len(names) for _, names in (*axes, *named)]
        table = tidy_table(values.reshape(sizes), [*axes, *named], "value")
        if many:
            table.insert(len(axes), "input", np.tile(inputs, n * out))
        if groups:
            table.insert(table.shape[1] - 1, "group", np.tile(within, n * out))
        return table

    def _flat(self, call: str) -> FlatContributions:
        """Return everything with features and outputs on one axis each.

        Raises:
            InputError: There are several outputs.
        """
        if not isinstance(self.output, Tensor):
            first = paths_in(self.output)[0][0][0][0]
            key = getattr(first, "key", getattr(first, "idx", getattr(first, "name", 0)))
            raise InputError.of(
                call, "called with several outputs", f"one is needed: pick it, as in found[{key!r}].{call}()"
            )
        n, *shape = self.output.shape
        out = int(np.prod(shape))
        leaves = [leaf.detach() for _, leaf in paths_in(self.values)[0] if isinstance(leaf, Tensor)]
        parts = [leaf.reshape(n, out, int(np.prod(leaf.shape[1 + len(shape) :]))) for leaf in leaves]
        values = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        names = self.names or FeatureNames.of(self.values, leading=1 + len(shape))
        bias, output = (part.detach().reshape(n, out) for part in (self.bias, self.output))
        return FlatContributions(values, bias, output, tuple(shape), names)


def _output_axes(shape: tuple[int, ...], outputs: Names) -> list[tuple[str, Any]]:
    if len(shape) == 1:
        return [("output", names_of("outputs", outputs, shape[0]))]
    if outputs is not None:
        raise InputError.of("outputs", "given", f"outputs have axes {shape} and are named by positions")
    return [(f"output_{axis}", np.arange(size)) for axis, size in enumerate(shape)]


def _feature_axes(names: FeatureNames, features: Names) -> list[tuple[str, Any]]:
    if len(names.inputs) > 1:
        return [("feature", names_of("features", names.labels() if features is None else features, names.count))]
    if features is not None:
        return feature_axes(names.shapes[0], features)
    plain = feature_axes(names.shapes[0])
    return [(word, known if given is None else list(given))
            for (word, known), given in zip(plain, names.axes[0], strict=True)]  # fmt: skip
