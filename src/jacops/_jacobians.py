"""Whole Jacobians as tensors: "what is the derivative matrix?" by inputs, by tensors of yours, or by parameters."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from ._data import Unpack as Batching
from ._dense_by_plan import DenseByPlan
from ._framework import framework_jacobian, refuse_options
from ._jacobian_checks import (
    FINITE_TODO,
    check_block,
    check_blocks,
    check_dependence,
    refuse_with_graph,
    refuse_with_sparse,
)
from ._jacobian_layout import arranged, given_out, lie_layout, shaped
from ._keywords import keywords
from ._ladder.protocol import SweepOptions, everything, is_framework_model
from ._loaders import by_batches
from ._options import ComputeJacobianOptions, Model, ModjacKeywords, ModjacOptions
from ._picks import Picks, picked
from ._planning import plan_full_jacobian, plan_modjac, plan_samples, planned_by
from ._products import Params, given, warn_if_unconnected
from ._progress import shows_progress
from ._requirements import check_choice, check_positive
from ._runtime.contexts import arithmetic, eager, keeping
from ._runtime.memory import Budget, given_tensors
from ._stored_rows import in_store
from ._torch.protocol import (
    At,
    Blocks,
    Freeze,
    ModelRun,
    Places,
    Recording,
    Samples,
    Shared,
    WholeAsk,
    by_leaf,
    ensure_whole_fits,
    flat,
    is_plain,
    record_closure,
    separate,
    whole_jacobian,
)
from ._trees import Selector, hint_at_labels, select
from ._words import Checks, Fallback, Mode, Sweeps
from .errors import InputError
from .sparse._remembered import sparse_jacobian


@overload
def compute_jacobian(
    model: Model | Callable[..., Any], x: Tensor, batch_size: int = 1024, **options: Unpack[ComputeJacobianOptions]
) -> Tensor: ...
@overload
def compute_jacobian(
    model: Model | Callable[..., Any],
    x: Any,
    batch_size: int = 1024,
    *,
    store: str | PathLike[str],
    **options: Unpack[ComputeJacobianOptions],
) -> Any: ...
@overload
def compute_jacobian(
    model: Model | Callable[..., Any], x: Any, batch_size: int = 1024, **options: Unpack[ComputeJacobianOptions]
) -> Any: ...
@keywords()
@in_store
@by_batches("target")
@planned_by(plan_samples)
@eager
@shows_progress()
def compute_jacobian(
    model: Model | Callable[..., Any],
    x: Any,
    batch_size: int = 1024,
    *,
    outputs: Selector = None,
    target: Tensor | None = None,
    shared: Shared = None,
    unpack: Batching | None = None,
    at: At = None,
    freeze: Freeze = None,
    mode: Mode = "auto",
    budget: Budget = None,
    out: Any = None,
    store: str | PathLike[str] | None = None,
    checks: Checks = "first",
    fallback: Fallback = "warn",
    check_finite: bool = True,
    compile: bool = False,
    progress: bool | None = None,
    create_graph: bool = False,
) -> Any:
    r"""Return the Jacobian of a model's output by its input for every sample, `(n, *out, *in)`.

    It is the derivative of the model in eval mode on a batch of one: $J_{n} = \partial f(x_n) / \partial x_n$. If
    samples are proved to be independent, all samples of a batch share min(outputs, inputs) sweeps; otherwise, or if the
    forward pass is random, every sample is differentiated alone and a `JacopsWarning` states why. A model that reads
    values out of tensors takes one more forward pass per sample, whose output must equal that of the batch. Random
    layers draw what they would draw for that sample in the caller's random state.

    Args:
        model: A module (its copy is put in eval mode, not the caller's), a plain function, or a `JaxFunction`.
        x: Samples along the first axis, `(n, *in)`; or a tuple (positional) or mapping (keyword) of such tensors, in
            which None, bools, numbers and strings are passed on as they are; or a loader of batches `(x, y)`, of which
            the inputs are taken, in order.
        batch_size: Maximum number of samples per sweep; fewer if the budget requires it.
        outputs: Part of the output: indices along a tensor's last axis, an entry of a tuple or dict, or a callable on
            the output. One logit of 50,000 costs one sweep.
        target: One output per sample: an integer tensor `(n,)` of places along the last axis of the output (labels,
            predicted classes), after `outputs=`. It costs one sweep per batch, and that axis is not in the result.
        shared: Names or positions of inputs without an axis of samples (a mask, a table): every batch and every sample
            alone gets them whole, and nothing is differentiated by them.
        unpack: For a loader, batch -> `(x, y)` or `(x, y, weights)`, where a batch is no pair `(x, y)`.
        at: A submodule's path: differentiate by its output instead of by `x`. A pair `(source, target)` goes from
            one hidden layer (None: the input) to another (None: the output).
        freeze: Modules whose nonlinear functions are held constant in a part, as in `contributions`: class names or
            paths (`fnmatch` patterns such as `"LayerNorm"`, `"blocks.*.attn"`), or a function of name and module. The
            result is then the Jacobian of the model with these parts constant.
        mode: `"reverse"` sweeps by output entries, `"forward"` by input entries, `"split"` at the narrowest layer that
            everything passes through and multiplies the parts; `"auto"` takes the fewest.
        budget: Bytes that result and working memory may take, or a text such as `"2GiB"`; by default half of what is
            free. `jacops.plan` predicts it.
        out: Where to write: a tensor or array (a `numpy.memmap` too) of the result's shape and dtype, outside the
            budget; for several outputs or inputs a tuple or list of them.
        store: A folder for results larger than memory (zarr v3), written in tiles of rows. Processes that make the same
            call share the tiles; run again, it continues a killed run, and reads existing tiles without evaluating the
            model. An error is raised if model, data or settings differ.
        checks: `"first"` proves once per model, mode and shape that samples are independent; `"always"` does so in
            every call, `"strict"` for every pair of samples (2 log2(n) more sweeps), `"never"` not at all.
        fallback: `"warn"`, `"silent"` or `"error"` where samples must be taken one at a time.
        check_finite: Raise if an output or a derivative is NaN or Inf.
        compile: Compile the sweeps by outputs (`torch.compile`, up to a minute, and memory outside the budget). The
            first call compares all of it with plain sweeps and keeps it where it was faster; later ones two samples.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.
        create_graph: Keep the result differentiable by trainable parameters (a `Function`'s tensors that require grad)
            and inputs that require grad. All sweeps' graphs stay in memory, outside the budget.

    Returns:
        A tensor `(n, *out, *in)` with the dtype and device of the output, requiring grad only with `create_graph`;
        `(0, *out, *in)` for no samples. Tuple or dict outputs give the same structure of Jacobians; tuple or dict
        inputs that structure inside, with None at entries that are not differentiated by. With `store` a
        `jacops.store.StoredArray`, read where it is indexed; for several outputs or inputs a tuple of them.

    Raises:
        InputTypeError: `model` or `x` is of the wrong kind.
        InputError: `batch_size` is not a positive integer, or `x` does not fit the model.
        MemoryBudgetError: The result and one sample's sweep do not fit the budget; nothing was allocated.
        ModelStateError: Parameters are lazy or without values, or `at` does not fit the forward.
        NotDifferentiableError: Inputs or outputs are of integer or complex dtype; or `create_graph` and a backward
            cannot be differentiated.
        NonFiniteError: An output or a derivative is NaN or Inf.

    Example:
        >>> compute_jacobian(torch.nn.PReLU(), torch.tensor([[-1.0, -2.0], [3.0, -4.0]]))[1]
        tensor([[1.0000, 0.0000],
                [0.0000, 0.2500]])
    """
    options = dict[str, Any](outputs=outputs, target=target, shared=shared, checks=checks, fallback=fallback)
    if is_framework_model(model):
        refuse_options(at=at, freeze=freeze, budget=budget, out=out, compile=compile, create_graph=create_graph)
        sweeps = SweepOptions("compute_jacobian", mode=mode, progress=progress, batch_size=batch_size, **options)
        return framework_jacobian(model, x, sweeps, check_finite)
    if create_graph:
        refuse_with_graph(compile=compile, out=out is not None, mode=mode == "split", freeze=freeze is not None)
    options |= {"at": at, "freeze": freeze, "compile": compile, "create_graph": create_graph, "batch_size": batch_size}
    with keeping(create_graph):
        found = Samples(model, x, call="compute_jacobian", **options).jacobians(progress, budget, out, mode)
    if check_finite:
        found.check_finite(FINITE_TODO)
    return found.arranged()


@keywords()
@planned_by(plan_full_jacobian)
@eager
@shows_progress()
def full_jacobian(
    func: Callable[[], Any],
    params: Params,
    create_graph: bool = False,
    *,
    outputs: Selector = None,
    chunk_size: int | None = None,
    budget: Budget = None,
    out: Any = None,
    progress: bool | None = None,
) -> list[Tensor]:
    """Return the Jacobian of `func()` by each parameter, a list of `(output_dim, *param.shape)`.

    One sweep per output row at most, or per column where those are fewer. (The original flattened both axes; its
    documentation states the parameter's shape.) Complex parameters: `df = J dz` for holomorphic outputs, `df = Re(J
    dz)` for real.

    Args:
        func: Called once, without arguments; the rows of a tree of outputs follow one another.
        params: One tensor or any iterable of tensors that `func` uses.
        create_graph: Keep the result differentiable, to any order.
        outputs: Part of the output, as in `compute_jacobian`.
        chunk_size: Maximum number of rows (or columns) per batched pass; fewer if the budget requires it.
        budget: Bytes that result and working memory may take, as in `compute_jacobian`.
        out: Where to write, as in `compute_jacobian`: one tensor or array per parameter.
        progress: Force the progress bar on or off.

    Returns:
        One tensor per parameter; `output_dim` is the number of entries of `func()`.

    Raises:
        InputError: A parameter is repeated or frozen, or `out` does not fit.
        MemoryBudgetError: The result does not fit the budget; it was not allocated.
        NotDifferentiableError: The output has no derivative.
        NonFiniteError: An output or a derivative is NaN or Inf.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> full_jacobian(lambda: torch.stack([x[0] ** 2, 3 * x[1] ** 2]), [x])
        [tensor([[ 2.,  0.],
                [ 0., 12.]])]
    """
    if chunk_size is not None:
        check_positive("chunk_size", chunk_size)
    picked = (lambda: select(func(), outputs)) if callable(func) and outputs is not None else func
    recorded = record_closure(picked, params, "full_jacobian", empty=True)
    if not recorded.lin.leaves:
        return []
    warn_if_unconnected(recorded)
    with arithmetic(create_graph):
        ask = WholeAsk(recorded.lin, budget, None, create_graph, False, out is not None, chunk_size)
        places = _places(ask, out, by_leaf)
        blocks = whole_jacobian(ask).blocks
        check_blocks("full_jacobian", recorded, blocks)
        if places:
            return places.wholes
        columns = zip(*blocks, strict=True)
        return [given(parts[0] if len(parts) == 1 else torch.cat(parts), create_graph) for parts in columns]


@overload
def modjac(
    model: nn.Module,
    input: Any = None,
    *,
    flatten: Literal[True],
    sparse: bool = False,
    **options: Unpack[ModjacOptions],
) -> Tensor: ...
@overload
def modjac(
    model: nn.Module, input: Any = None, *, sparse: Literal[True], **options: Unpack[ModjacOptions]
) -> Tensor: ...
@overload
def modjac(
    model: nn.Module,
    input: Any = None,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    strategy: Sweeps = "reverse-mode",
    flatten: bool = False,
    *,
    sparse: bool = False,
    **options: Unpack[ModjacKeywords],
) -> Any: ...
@keywords()
@planned_by(plan_modjac)
@eager
@shows_progress()
def modjac(
    model: nn.Module,
    input: Any = None,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    strategy: Sweeps = "reverse-mode",
    flatten: bool = False,
    *,
    parameters: Picks = None,
    tangent: bool = False,
    sparse: bool = False,
    outputs: Selector = None,
    budget: Budget = None,
    out: Any = None,
    check_finite: bool = True,
    progress: bool | None = None,
) -> Any:
    r"""Return the Jacobian of a model's output by its parameters.

    The function is differentiated in its current mode: batch statistics in train mode, one dropout mask; nothing of the
    model changes. Frozen parameters are included. (The original returned a 1-tuple for one parameter and one output,
    where its documentation states a tensor; here it is a tensor.)

    Args:
        model: A module with tensors, LieTensors (PyPose) or a tree of them as output.
        input: A tuple is unpacked into positional arguments, a mapping into keyword arguments; anything else is the
            one argument; None is no argument.
        create_graph: Keep the result differentiable by the model's trainable parameters.
        strict: Raise if an output does not depend on a parameter at all.
        vectorize: Accepted for compatibility; rows are batched wherever that agrees with single rows.
        strategy: `"reverse-mode"` sweeps over output entries, `"forward-mode"` over parameter entries.
        flatten: Return one matrix, all outputs by all parameters, columns in `named_parameters()` order.
        parameters: Which parameters, as in `jacobian`; None takes all, frozen ones too.
        tangent: For LieTensor parameters and outputs: tangent width, without the zero columns of storage width.
        sparse: Return one `torch.sparse_csr` matrix as `flatten` arranges it, by coloured sweeps of a checked pattern.
        outputs: Part of the output, as in `compute_jacobian`.
        budget: Bytes that result and working memory may take, as in `compute_jacobian`.
        out: Where to write, as in `compute_jacobian`: of the structure that the result has, one matrix with `flatten`.
        check_finite: Raise if an output or a derivative is NaN or Inf.
        progress: Force the progress bar on or off.

    Returns:
        For one parameter and one output tensor `(*out, *param)`; for several parameters a tuple of such; for a tuple
        or dict of outputs the same structure of tuples, `J[output][parameter]`. With `flatten` one matrix. The dtype
        is the parameter's, in forward mode the output's. Complex parameters are as in `full_jacobian`, on every route.

    Raises:
        ModelStateError: The model has no parameters (or none that are trainable).
        InputError: `strategy` is unknown, or the input does not fit the model, or `out` the result.
        MemoryBudgetError: The result does not fit the budget; it was not allocated.
        NotDifferentiableError: `strict` and an output is independent of a parameter, or there is no derivative.
        NonFiniteError: An output or a derivative is NaN or Inf; the message names output and parameter.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> modjac(model, torch.tensor([[1.0, 2.0]])).shape
        torch.Size([1, 1, 1, 2])
    """
    forward = check_choice("strategy", strategy, Sweeps) == "forward-mode"
    hint_at_labels("modjac", outputs, input)
    picks = picked(model, parameters, default=everything)
    if sparse:
        refuse_with_sparse(create_graph=create_graph, strict=strict, forward=forward, out=out is not None)
        found = sparse_jacobian(model, input, picks, outputs, tangent)
        if check_finite:
            check_block("modjac", found.matrix.values(), "the output", "the parameters")
        return found.matrix
    plain = check_finite and not (create_graph or strict or forward or tangent) and budget is None and out is None
    again = DenseByPlan(model, input, picks, outputs) if plain else None
    if again and (known := again.matrix()):
        return known[0] if flatten else again.arranged(*known)
    run = ModelRun(model, input, call="modjac", parameters=picks, outputs=outputs, connected=create_graph)
    recorded = run.recorded()
    lie = lie_layout(recorded, tangent, create_graph)
    (check_dependence if strict else warn_if_unconnected)(recorded)
    with arithmetic(create_graph):
        ask = WholeAsk(recorded.lin, budget, forward, create_graph, not lie, out is not None)
        layout = flat if flatten else separate if out is not None else None
        places = _places(ask, out, None if lie else layout)
        found = whole_jacobian(ask)
        if check_finite:
            check_blocks("modjac", recorded, found.blocks, FINITE_TODO, sure=found.finite)
        if again and found.by_rows:
            again.note(recorded, found.blocks)
        if places:
            return _placed(recorded, places, found.blocks, flatten)
        blocks = lie(found.blocks) if lie else shaped(recorded, found.blocks)
        return arranged(recorded, given_out(recorded.lin, blocks, ask), flatten)


def _placed(recorded: Recording, places: Places, blocks: Blocks, flatten: bool) -> Any:
    """Return the result in its places, copied there if it was made elsewhere."""
    if blocks is not places.blocks:
        for row, targets in zip(blocks, places.blocks, strict=True):
            for block, target in zip(row, targets, strict=True):
                target.copy_(block)
    if flatten:
        return places.wholes[0]
    many = len(recorded.lin.leaves)
    rows = [places.wholes[i : i + many] for i in range(0, len(places.wholes), many)]
    return arranged(recorded, rows, False)


def _places(ask: WholeAsk, out: Any, layout: Callable[..., Places] | None) -> Places | None:
    """Return where a result is written; None where it is made elsewhere.

    Raises:
        InputError: The caller's places cannot be written to in the result's own dtype, or without losing its graph.
        MemoryBudgetError: The result does not fit.
    """
    direct = layout is not None and is_plain(ask.lin) and not ask.create_graph
    if out is not None and not direct:
        needed = "the result must be real, of one dtype, without a graph and without LieTensors"
        raise InputError.of("out", "given", needed, "Leave it out.")
    ensure_whole_fits(ask)
    if layout is None or not direct:
        return None
    places = layout(ask.lin, given_tensors(out))
    ask.into = places.blocks
    return places
