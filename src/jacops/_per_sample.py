"""Gradients sample by sample, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from ._data import Unpack as Batching
from ._framework import framework_sample_gradients, framework_sample_jacobians, refuse_options
from ._keywords import keywords
from ._ladder.protocol import SweepOptions, is_framework_model
from ._loaders import joined
from ._operators import LayerFactors, Operator
from ._operators._computed import Computed, with_computed
from ._operators._finite_results import made_from
from ._options import (
    CurvatureOptions,
    Model,
    OperatorOptions,
    OutputRowOptions,
    RecordOptions,
    RowOptions,
    SampleGradientOptions,
)
from ._picks import trainable
from ._recorded_loss import Loss, check_usable, record_loss, resolved
from ._requirements import check_choice
from ._runtime.contexts import eager, keeping, seeded
from ._runtime.restoring import restoring
from ._sample_inputs import SampleInputs
from ._space import Space
from ._torch.protocol import (
    ConnectedFactors,
    Definition,
    ModelRun,
    ModelStructure,
    Recording,
    Rows,
    RowSlopes,
    SampleFactors,
    Shared,
    check_fallback,
    check_state,
    matrix_shape,
    one_row,
    row_cotangents,
    structure_of,
)
from ._trees import Selector, hint_at_labels
from ._words import Randomness
from .errors import InputError, ModelStateError

_PURE = "Pass the random key to `apply` as a part of `params` or `x`."


@keywords(OperatorOptions)
@joined()
@eager
@made_from("x", "y")
def sample_gradients(
    model: Model,
    loss: Loss,
    x: Any,
    y: Any = None,
    *,
    shared: Shared = None,
    unpack: Batching | None = None,
    randomness: Randomness = "error",
    seed: int | None = None,
    create_graph: bool = False,
    **options: Unpack[OperatorOptions],
) -> LayerFactors:
    """Return the gradients of the loss of every sample alone, as rows of an operator `(n, P)`.

    Each is the gradient of `loss(model(x[i:i+1]), y[i:i+1])`: a mean over one sample is that sample's loss, whatever
    class weights or ignored targets do to a batch's. The rows are not formed: the operator keeps their factors,
    computed for many samples in one sweep where samples are independent (which is checked), else one by one.

    Args:
        model: A module in which no module mixes or randomises samples in its mode, or a `JaxFunction`.
        loss: `loss(output, y)`, one number.
        x: A tensor, or a tuple or mapping of tensors with one leading axis, in which None, bools, numbers and strings
            are passed on as they are; or a loader of batches `(x, y)`, whose rows are joined in order.
        y: A tensor with the same leading axis; left out with a loader.
        shared: Inputs without an axis of samples, as in `compute_jacobian`.
        unpack: For a loader, as in `compute_jacobian`.
        randomness: `"error"` refuses dropout in train mode; `"same"` draws the same masks for every sample.
        seed: Of those masks; needed with `randomness="same"`.
        create_graph: Keep rows, and all that is made of them, differentiable, by the model's trainable parameters and
            by inputs that require grad. Their derivatives are checked as the rows themselves are; samples are
            taken one at a time also where a parameter enters without a rule.
        options: `parameters=`, `outputs=`, `checks=`, `fallback=`, `check_finite=`; see `hessian`.

    Returns:
        An operator from the space of parameters to one row per sample; `G @ v`, `G.T @ u`, `G.gram()`, `G.norms()`,
        `G.column_squares()` and `G.dense()`; `G.losses`, `(n,)`, and `G.output` are what was computed on the way. Its
        repr shows what is held and how it was computed.

    Raises:
        ModelStateError: Batch statistics or dropout are in train mode; the message names the module.
        InputError: The leading axes differ.
        NotDifferentiableError: Samples mix, and `fallback="error"`.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> G = sample_gradients(model, lambda output, y: (output * y).sum(), torch.eye(2), torch.ones(2, 1))
        >>> G.dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    recorded = resolved(model, options)
    if is_framework_model(model):
        refuse_options(_PURE, randomness=None if randomness == "error" else randomness, seed=seed)
        refuse_options(create_graph=create_graph)
    given = SampleInputs(x, y, shared)
    with keeping(create_graph):
        return gradients_at(model, loss, given, checked_seed(randomness, seed), recorded, create_graph=create_graph)


class KeptBatch(NamedTuple):
    """Recordings of a batch that are kept for several computations.

    Attributes:
        record: Gives the recorded output for all rows.
        sample: As in `Definition`.
    """

    record: Callable[[], Recording]
    sample: Callable[[Callable[[], Recording]], Recording]


def gradients_at(
    model: Any,
    loss: Loss,
    given: SampleInputs,
    seed: int | None,
    options: CurvatureOptions,
    kept: KeptBatch | None = None,
    create_graph: bool = False,
) -> LayerFactors:
    """Return what `sample_gradients` does, from what is kept of a batch's recordings."""
    if is_framework_model(model):
        sweeps = SweepOptions("sample_gradients", shared=given.shared, **options)
        return framework_sample_gradients(model, loss, given.x, given.y, sweeps)
    refuse_mixing_modules(structure := structure_of(model), random=seed is None)
    values, tree, inputs = given.apart
    how: Any = {"connected": create_graph, "pulled": True}  # of a connected recording more than pulls is taken

    @restoring
    def alone(values: Sequence[Tensor]) -> Recording:
        one_x, one_y = tree.build(values)
        with seeded(seed), one_row("sample_gradients"), given.explained(model, "sample_gradients", options):
            return record_loss(model, loss, one_x, one_y, "sample_gradients", **how, **options)

    def together(some: Sequence[Tensor]) -> Recording:
        if kept is not None and len(some[0]) == len(values[0]):
            return kept.record()
        inputs = tree.build(some)[0]
        run = ModelRun(model, inputs, call="sample_gradients", aside=True, **how, **options)
        return run.recorded()

    def cotangents(batch: Recording, values: Sequence[Tensor]) -> RowSlopes:
        def build(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Any, Any]:
            return batch.tree.build(outputs), tree.build([*values[:inputs], *targets])[1]

        return row_cotangents(batch.lin, loss, values[inputs:], build, create_graph)

    ways = _ways(structure, options, seed)
    what = Definition(values, inputs, alone, together, cotangents, "sample_gradients", *ways)
    what = what if kept is None else replace(what, sample=kept.sample)
    return _factors(structure, what, options, lambda output, n: Space.flat(n, "rows", output), create_graph)


@keywords(RowOptions)
@joined()
@eager
@made_from("x")
def sample_jacobians(
    model: Model,
    x: Any,
    *,
    outputs: Selector = None,
    target: Tensor | None = None,
    shared: Shared = None,
    unpack: Batching | None = None,
    seed: int | None = None,
    create_graph: bool = False,
    **options: Unpack[RowOptions],
) -> LayerFactors:
    """Return the parameter Jacobians of every sample's outputs, as rows of an operator `(n * k, P)`.

    Rows are entries of `model(x[i:i+1])`, sample by sample. They are not formed: 16 samples with 50 outputs of a net
    with 288,306 parameters take 4 MiB instead of 880.

    Args:
        model: A module in which no module mixes or randomises samples in its mode, or a `JaxFunction`.
        x: A tensor, tuple or mapping of tensors with one leading axis, or a loader of batches `(x, y)`.
        outputs: Part of the output, as in `jacobian`; what it picks must be one tensor.
        target: One output per sample, as in `compute_jacobian`; rows are then `(n, P)` for an output `(n, classes)`.
        shared: Inputs without an axis of samples, as in `compute_jacobian`.
        unpack: For a loader, as in `compute_jacobian`.
        seed: Of random layers in train mode, which draw the same masks for every sample; None refuses them.
        create_graph: Keep rows, and all that is made of them, differentiable.
        options: `parameters=`, `outputs=`, `checks=`, `fallback=`, `check_finite=`; see `hessian`.

    Returns:
        An operator from the space of parameters to `(n, *output)`. `gram()` is the empirical neural tangent kernel;
        `output` are the outputs themselves.

    Raises:
        ModelStateError: Batch statistics or dropout are in train mode; the message names the module.
        InputError: The leading axes differ, or the output is not one tensor.
        NotDifferentiableError: No path leads from the output to a parameter; or samples mix, and `fallback="error"`.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> sample_jacobians(model, torch.eye(2)).gram()
        tensor([[1., 0.],
                [0., 1.]])
    """
    recorded: OutputRowOptions = {**resolved(model, options)}
    if is_framework_model(model):
        refuse_options(_PURE, seed=seed)
        refuse_options(create_graph=create_graph)
    given = SampleInputs(x, None, shared, target)
    with keeping(create_graph):
        return jacobians_at(model, given, outputs, seed, recorded, create_graph=create_graph)


def jacobians_at(
    model: Any,
    given: SampleInputs,
    outputs: Selector,
    seed: int | None,
    options: OutputRowOptions,
    record: Callable[[], Recording] | None = None,
    create_graph: bool = False,
) -> LayerFactors:
    """Return what `sample_jacobians` does; `record` gives the output for all rows where it is kept."""
    if is_framework_model(model):
        picks: Any = {"outputs": outputs, "target": given.target, "shared": given.shared}
        picks |= {name: value for name, value in options.items() if name != "aside"}
        return framework_sample_jacobians(model, given.x, SweepOptions("sample_jacobians", **picks))
    refuse_mixing_modules(structure := structure_of(model), random=seed is None)
    (values, tree, inputs), picks = given.apart, given.picks
    hint_at_labels("sample_jacobians", outputs, values, "pass `target=labels`")
    values = values if picks is None else [*values, picks.places]
    purpose = None if picks is None else "target"

    @restoring
    def alone(some: Sequence[Tensor]) -> Recording:
        inputs = some if picks is None else some[:-1]
        finish = None if picks is None else partial(picks.pick, places=some[-1])
        how: Any = {"outputs": outputs, "finish": finish, "purpose": purpose, "connected": create_graph}
        with seeded(seed), given.explained(model, "sample_jacobians", options):
            made = ModelRun(model, tree.build(inputs)[0], call="sample_jacobians", **how, **options).recorded()
        return _one_output(made)

    def together(some: Sequence[Tensor]) -> Recording:
        return alone(some) if record is None or len(some[0]) < len(values[0]) else _one_output(record())

    ways = _ways(structure, options, seed)
    what = Definition(values, inputs, alone, together, None, "sample_jacobians", *ways)

    def rows(output: Tensor, n: int) -> Space:
        one = output.shape[1:] if output.ndim and output.shape[0] == 1 else output.shape
        return Space(("output",), (torch.Size((n, *one)),), (output.dtype,), output.device)

    return _factors(structure, what, options, rows, create_graph)


def _ways(
    structure: ModelStructure, options: RecordOptions, seed: int | None
) -> tuple[str, str, nn.Module, str | None]:
    forced = None if seed is None else "with the same random numbers for each"
    return check_fallback(options.get("fallback", "warn")), options.get("checks", "first"), structure.model, forced


def _one_output(found: Recording) -> Recording:
    if len(found.lin.outputs) != 1:
        names = ", ".join(found.lin.codomain.names)
        raise InputError.of("the model's output", f"in parts {names}", "one tensor is needed", "Pass `outputs=`.")
    check_usable(found.lin)
    return found


def _factors(
    structure: ModelStructure,
    what: Definition,
    options: RecordOptions,
    rows: Callable[[Tensor, int], Space],
    create_graph: bool,
) -> LayerFactors:
    """Return the rows of a definition as an operator."""
    n = what.values[0].shape[0]
    if n == 0:
        return _no_rows(structure, what, options)
    found = ConnectedFactors(what) if create_graph else SampleFactors(what)
    domain = found.lin.domain
    missing = [domain.names[leaf] for leaf in found.collected.missing]
    space = rows(found.output.detach().to(domain.dtype), n)
    made = LayerFactors(found.collected.parts(), domain, space, missing, found.route, create_graph)
    return with_computed(made, Computed(found.computed.output, found.computed.losses))


def _no_rows(structure: ModelStructure, what: Definition, options: RecordOptions) -> LayerFactors:
    picks = options.get("parameters") or trainable
    named = {n: p for n, p in structure.differentiable.items() if picks(n, p)}
    domain = Space.of(named.values(), named)
    parts = [Rows(p.detach().new_zeros(0, 1, *matrix_shape(p.shape))) for p in named.values()]
    none = torch.zeros(0, dtype=domain.dtype, device=domain.device)
    made = LayerFactors(parts, domain, Space.flat(0, "rows", none), route="no samples")
    return with_computed(made, Computed(losses=none if what.cotangents else None))


def checked_seed(randomness: Randomness, seed: int | None) -> int | None:
    """Return the seed that random layers draw from, None where they are refused.

    Raises:
        InputError: `randomness` is unknown, or `"same"` without a seed.
    """
    check_choice("randomness", randomness, Randomness)
    if randomness == "same" and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise InputError.of("seed", repr(seed), "`randomness='same'` needs a whole number")
    return seed if randomness == "same" else None


def refuse_mixing_modules(structure: ModelStructure, random: bool = True) -> None:
    """Refuse parameters without values, and modules that make a per-sample quantity ill-posed in train mode.

    Args:
        structure: Of a model in which no module mixes or randomises samples in its mode.
        random: Refuse random modules too, not only batch statistics.

    Raises:
        ModelStateError: The message names the module and the switch to flip.
    """
    check_state(structure)
    for name, module in structure.named_modules if any(structure.modes) else ():
        if not getattr(module, "training", False):  # a frozen script module has no mode
            continue
        label = f"module '{name}' ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelStateError(
                f"{label} is in train mode, where samples of a batch influence each other. Call model.eval()."
            )
        chance = (
            getattr(module, "p", 0.0)
            if isinstance(module, nn.modules.dropout._DropoutNd)
            else getattr(module, "dropout", 0.0)
        )
        if random and (isinstance(module, nn.RReLU) or (isinstance(chance, float) and chance > 0)):
            raise ModelStateError(
                f"{label} is in train mode and random (p={chance}). Call model.eval(), or pass "
                "`randomness='same', seed=`."
            )


@keywords(SampleGradientOptions)
@joined(ordered=False)
@made_from("x", "y")
def empirical_fisher(
    model: Model, loss: Loss, x: Any, y: Any = None, **options: Unpack[SampleGradientOptions]
) -> Operator:
    r"""Return the empirical Fisher matrix $\frac1N \sum_n g_n g_n^\top$ of per-sample gradients $g_n$.

    Source: Kunstner, Balles, Hennig (2019). It is not the Fisher matrix: labels are the data's, not the model's. A
    sample counts as one term, whatever its loss is a mean of; `fisher(kind="empirical")` counts its terms and is in the
    scale of the other Fisher matrices.

    Args:
        model: A module in which no module mixes or randomises samples in its mode, or a `JaxFunction`.
        loss: `loss(output, y)`, one number; a mean over one sample, the negative log-likelihood of it.
        x: A tensor, tuple or mapping of tensors with one leading axis, or a loader of batches `(x, y)`; a loader may
            shuffle, since the order of samples has no place in the result.
        y: A tensor with the same leading axis; left out with a loader.
        options: `parameters=`, `outputs=`, `checks=`, `fallback=`, `check_finite=`; see `hessian`.

    Returns:
        A positive operator on the space of parameters.

    Raises:
        ModelStateError: Batch statistics or dropout are in train mode; the message names the module.
        InputError: There are no samples.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> empirical_fisher(model, lambda output, y: (output * y).sum(), torch.eye(2), torch.ones(2, 1)).dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    G = sample_gradients(model, loss, x, y, **options)
    if G.shape[0] == 0:
        raise InputError.of("x", "empty", "a mean over samples needs at least one")
    return (1.0 / G.shape[0]) * (G.T @ G)
