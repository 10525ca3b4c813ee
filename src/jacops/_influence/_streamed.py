"""Influences of which not the whole matrix is held, from passes over data, from results and from stored runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from .._data import Batches
from .._finite import on_finite_rows
from .._keywords import keywords
from .._operators import LayerFactors
from .._operators._ranked_rows import RankedRows
from .._progress import shows_progress, track
from .._runtime.contexts import eager
from .._torch.protocol import times_vectors
from .._words import Which
from ..errors import InputError, InputTypeError
from ..solvers import Solution
from ._rankings import GroupedInfluences, LayerInfluences, RankedInfluences
from ._result import Influences
from ._run import InfluenceRun
from ._selection import Block, Grouping, Strongest, cut, step_for
from ._settings import InfluenceOptions, Modelled, blocks_of, data_of, solved_by
from ._stored import shares_of


@keywords(InfluenceOptions)
@eager
@shows_progress()
def top_influences(
    model: Modelled,
    training_data: Any,
    k: int,
    *,
    which: Which = "largest",
    test_data: Any = None,
    input_data: Any = None,
    **options: Unpack[InfluenceOptions],
) -> RankedInfluences:
    """Return the `k` training samples of largest influence on every test sample.

    They are those of `compute_influences`, of which only `k` a row and a block of 32 MiB or one batch are ever held.

    Args:
        model: A module, a `JaxFunction`, or model and loss in one (`TorchTwiceDifferentiable`).
        training_data: A loader of batches `(x, y)` or mappings in a fixed order.
        k: How many.
        which: `"largest"` helped most, `"smallest"` hurt most, `"magnitude"` either.
        test_data: A loader of batches; the training data where it is left out.
        input_data: The samples to choose from; the training data where it is left out.
        options: `solver=`, `damping=`, `curvature=`, `on_failure=`, `loss=` and those of `Problem`; see
            `compute_influences`.

    Returns:
        `values` and `indices`, each `(n_test, k)`, strongest first.

    Raises:
        InputError: There are fewer than `k` samples, or an argument is out of range.
        JacopsError: The data or the loss is not supported, or a solve failed; the message states why.

    Example:
        >>> import jacops
        >>> wrapped = jacops.TorchTwiceDifferentiable(torch.nn.Linear(1, 1, bias=False), torch.nn.functional.mse_loss)
        >>> data = [(torch.tensor([[1.0], [2.0], [3.0]]), torch.full((3, 1), 9.0))]
        >>> values, indices = top_influences(wrapped, data, 2, damping=1.0)
        >>> indices.shape
        torch.Size([3, 2])
    """
    asked = _asked(model, training_data, test_data, input_data, options)
    selection = Strongest((asked.test.rows, asked.data.rows), k, which)
    known: list[Solution] = []
    values, indices = selection.take(blocks_of(asked.run, asked.test, asked.data, known))
    return RankedInfluences(values, indices, which, asked.data.rows, asked.run.described(known))


@keywords(InfluenceOptions)
@eager
@shows_progress()
def group_influences(
    model: Modelled,
    training_data: Any,
    groups: Any,
    *,
    test_data: Any = None,
    input_data: Any = None,
    **options: Unpack[InfluenceOptions],
) -> GroupedInfluences:
    """Return influences summed over groups of training samples, such as classes, authors or sources.

    To first order, leaving out a group does what leaving out its samples one by one adds up to (Koh, Ang, Teo and
    Liang, 2019); `leave_group_out()` gives that. Only the sums and one batch's influences are held.

    Args:
        model: A module, a `JaxFunction`, or model and loss in one (`TorchTwiceDifferentiable`).
        training_data: A loader of batches `(x, y)` or mappings in a fixed order.
        groups: The group of each training sample, in order: whole numbers or strings.
        test_data: A loader of batches; the training data where it is left out.
        input_data: The samples whose influence is computed; by default the training data; `groups` are then of
            these.
        options: `solver=`, `damping=`, `curvature=`, `on_failure=`, `loss=` and those of `Problem`; see
            `compute_influences`.

    Returns:
        `values` `(n_test, groups)` with the groups' names and sizes.

    Raises:
        InputError: There are more or fewer labels than samples, or an argument is out of range.
        JacopsError: The data or the loss is not supported, or a solve failed; the message states why.

    Example:
        >>> import jacops
        >>> wrapped = jacops.TorchTwiceDifferentiable(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> data = [(torch.tensor([[1.0], [2.0], [3.0]]), torch.full((3, 1), 9.0))]
        >>> found = group_influences(wrapped, data, ["a", "b", "a"], damping=1.0)
        >>> found.names, found.values.shape
        (['a', 'b'], torch.Size([3, 2]))
    """
    asked = _asked(model, training_data, test_data, input_data, options)
    grouping = Grouping(groups, asked.data.rows)
    shares, known = shares_of(asked.run.problem, asked.data), list[Solution]()
    blocks = blocks_of(asked.run, asked.test, asked.data, known)
    values, weighted = grouping.sums(asked.test.rows, blocks, shares)
    return GroupedInfluences(values, grouping.names, grouping.counts, weighted, asked.run.described(known))


@keywords(InfluenceOptions)
@eager
@shows_progress()
def layer_influences(
    model: Modelled,
    training_data: Any,
    *,
    test_data: Any = None,
    input_data: Any = None,
    **options: Unpack[InfluenceOptions],
) -> LayerInfluences:
    """Return influences split by the parameters that they go through, `(n_test, n_train, n_parameters)`.

    The part of a parameter is the product of its entries of the solution with those of the training gradient: the
    curvature couples all of them, and the parts add up to what `compute_influences` returns.

    Args:
        model: A module, a `JaxFunction`, or model and loss in one (`TorchTwiceDifferentiable`).
        training_data: A loader of batches `(x, y)` or mappings in a fixed order.
        test_data: A loader of batches; the training data where it is left out.
        input_data: The samples whose influence is computed; by default the training data.
        options: `solver=`, `damping=`, `curvature=`, `on_failure=`, `loss=` and those of `Problem`; see
            `compute_influences`.

    Returns:
        Values with the names of the parameters; `.by_module()` adds up those of a module.

    Raises:
        JacopsError: The data or the loss is not supported, or a solve failed; the message states why.

    Example:
        >>> import jacops
        >>> wrapped = jacops.TorchTwiceDifferentiable(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> data = [(torch.tensor([[1.0], [2.0], [3.0]]), torch.full((3, 1), 9.0))]
        >>> found = layer_influences(wrapped, data, damping=1.0)
        >>> found.names, found.values.shape
        (['weight', 'bias'], torch.Size([3, 3, 2]))
    """
    asked = _asked(model, training_data, test_data, input_data, options)
    names, known = list(asked.run.problem.space.names), list[Solution]()
    values: Tensor | None = None
    for rows, columns, block in blocks_of(asked.run, asked.test, asked.data, known, _by_parameter):
        if values is None:
            values = block.new_empty(asked.test.rows, asked.data.rows, len(names))
        values[rows, columns] = block
    return LayerInfluences(values if values is not None else torch.empty(0), names, asked.run.described(known))


def _by_parameter(factors: LayerFactors, solutions: Tensor, held: RankedRows) -> Tensor:
    """Return `(m, n, parameters)`."""

    def apply(rows: Tensor) -> Tensor:
        parts = zip(factors.parts, held.parts(rows), strict=True)
        return torch.stack([times_vectors(part, own).flatten(1) for part, own in parts], 2)

    return on_finite_rows(apply, solutions)


class _Asked(NamedTuple):
    run: InfluenceRun
    test: Batches
    data: Batches


def _asked(model: Any, training_data: Any, test_data: Any, input_data: Any, options: InfluenceOptions) -> _Asked:
    train = Batches.of(training_data, "training_data", options.get("unpack"))
    test, data = data_of(test_data, "test_data", train), data_of(input_data, "input_data", train)
    return _Asked(solved_by(model, train, options), test, data)


# ---- from what was computed before -----------------------------------------------------------------------------------


@keywords()
@shows_progress()
def ranked(scores: Any, k: int, *, which: Which = "largest", progress: bool | None = None) -> RankedInfluences:
    """Return the `k` training samples of largest influence on every test sample, from existing scores.

    Args:
        scores: An `Influences`, a matrix `(n_test, n_train)`, or the folder of a run that `compute_influences` stored,
            which is read tile by tile.
        k: How many.
        which: `"largest"` helped most, `"smallest"` hurt most, `"magnitude"` either.
        progress: Force the progress bar on or off.

    Returns:
        `values` and `indices`, each `(n_test, k)`, strongest first.

    Raises:
        InputTypeError: `scores` is none of these.
        InputError: There are fewer than `k` columns, or not two axes.
        StoreError: The stored run is not finished, or damaged.

    Example:
        >>> ranked(torch.tensor([[1.0, -5.0, 3.0]]), 2, which="magnitude").indices
        tensor([[1, 2]])
    """
    source = _Source.of(scores, progress)
    values, indices = Strongest(source.shape, k, which).take(source.blocks)
    return RankedInfluences(values, indices, which, source.shape[1], source.info)


@keywords()
@shows_progress()
def grouped(scores: Any, groups: Any, *, progress: bool | None = None) -> GroupedInfluences:
    """Return sums of existing scores over groups of training samples.

    Args:
        scores: `Influences`, or an iterable of blocks, with weights of training samples: no plain matrix.
        groups: The group of each training sample, in order: whole numbers or strings.
        progress: Force the progress bar on or off.

    Returns:
        `values` `(n_test, groups)` with the groups' names and sizes.

    Raises:
        InputTypeError: `scores` is of another kind.
        InputError: There are more or fewer labels than columns, or not two axes.
        StoreError: The stored run is not finished, or damaged.

    Example:
        >>> import jacops
        >>> wrapped = jacops.TorchTwiceDifferentiable(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> data = [(torch.tensor([[1.0], [2.0], [3.0]]), torch.full((3, 1), 9.0))]
        >>> found = jacops.compute_influences(wrapped, data, damping=1.0)
        >>> torch.equal(grouped(found, ["a", "a", "a"]).values, found.values.sum(1, keepdim=True))
        True
    """
    source = _Source.of(scores, progress)
    if source.shares is None:
        raise InputTypeError.of("scores", f"a {type(scores).__name__}", "an Influences or a stored run is needed")
    grouping = Grouping(groups, source.shape[1])
    values, weighted = grouping.sums(source.shape[0], source.blocks, source.shares)
    return GroupedInfluences(values, grouping.names, grouping.counts, weighted, source.info)


class _Source(NamedTuple):
    """Scores that are there, block by block."""

    shape: tuple[int, int]
    blocks: Iterable[Block]
    shares: Tensor | None
    info: dict[str, Any]

    @classmethod
    def of(cls, scores: Any, progress: bool | None) -> _Source:
        if isinstance(scores, str | os.PathLike):
            return _of_store(scores, progress)
        if not isinstance(scores, Tensor | Influences):
            needed = "an Influences, a matrix, or the folder of a stored run is needed"
            raise InputTypeError.of("scores", f"a {type(scores).__name__}", needed)
        values = scores if isinstance(scores, Tensor) else scores.values
        if values.ndim != 2:
            todo = "Take those of `per_sample()`." if getattr(scores, "influence_type", "") == "token" else ""
            raise InputError.of("scores", f"of shape {tuple(values.shape)}", "a row per test sample is needed", todo)
        shares, info = (None, {}) if isinstance(scores, Tensor) else (scores.shares, scores.info)
        shape = (values.shape[0], values.shape[1])
        return cls(shape, cut(values, step_for(len(values), values.element_size())), shares, info)


def _of_store(path: str | os.PathLike[str], progress: bool | None) -> _Source:
    from ..store import Store

    kept = Store.open(path)
    if "influences" not in kept.arrays:
        raise InputError.of("scores", f"{str(path)!r}", "a run that `compute_influences` stored is needed")
    shares, grid = torch.from_numpy(kept.read("shares")), kept.arrays["influences"]  # reads finished runs alone

    def blocks() -> Iterable[Block]:
        for index in track(list(grid.indices()), "ranked", enabled=progress):
            where: Any = grid.selection(index)
            yield *where, torch.from_numpy(kept.tile("influences", index))

    return _Source((grid.shape[0], grid.shape[1]), blocks(), shares, {})
