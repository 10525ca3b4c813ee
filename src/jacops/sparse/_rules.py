"""What each operation does to index sets: by torch's tags, by lists of names, or by a rule of its own."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ._contractions import CONTRACTIONS
from ._pool import Array
from ._sampled import SAMPLED
from ._scatters import SCATTERS
from ._taint import zeros_in
from ._trace import Decomposed, Rule, TracedCall, Tracer

# Operations that move entries without mixing them: the same operation on the ids gives their places.
_MOVES = set(
    """
    index gather index_select cat stack flip roll repeat constant_pad_nd slice_backward select_backward slice_scatter
    select_scatter diagonal_backward diagonal_scatter embedding im2col triu tril diag_embed diag reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d pixel_shuffle
    pixel_unshuffle channel_shuffle upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d masked_select take repeat_interleave _unsafe_view reshape
    _reshape_alias expand_copy view_copy unfold_copy rot90 scatter masked_scatter masked_scatter_backward index_copy
    index_fill _unsafe_index block_diag tril_indices trace_backward lift_fresh_copy _unsafe_masked_index
    split_copy unbind_copy unsafe_split unsafe_chunk unsafe_split_with_sizes select_copy slice_copy squeeze_copy
    unsqueeze_copy permute_copy transpose_copy t_copy alias_copy detach_copy diagonal_copy as_strided_copy
    """.split()  # noqa: SIM905
)
_SAME = {"clone", "_to_copy", "contiguous", "lift_fresh", "detach", "alias", "copy", "_conj_physical", "resolve_conj"}
_FRESH = set(
    """
    zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided rand_like
    randn_like bernoulli randint_like zero empty_strided resize resize_as
    """.split()  # noqa: SIM905
)
_POINTWISE = set(
    """
    softplus_backward elu_backward leaky_relu_backward hardtanh_backward hardswish_backward hardsigmoid_backward
    log_sigmoid_backward mish_backward glu_jvp rsub smooth_l1_loss_backward mse_loss_backward huber_loss_backward
    binary_cross_entropy_backward _prelu_kernel _prelu_kernel_backward softplus elu leaky_relu celu
    native_dropout_backward polygamma nan_to_num lerp threshold_backward gelu_backward silu_backward
    tanh_backward sigmoid_backward logit_backward addcmul addcdiv clamp hardshrink_backward softshrink_backward
    rrelu_with_noise_backward infinitely_differentiable_gelu_backward _conj conj real imag polar complex
    masked_fill_scalar _add_relu
    """.split()  # noqa: SIM905
)
# Linear in each operand, as operations that end in `_backward` are in the cotangent. A zero of a logarithm or of a
# difference from a constant is not that of a factor; the backward pass of logcumsumexp takes both of its cotangent.
_LINEAR = {"mul", "div", "neg"}
_ALONG = {"_softmax", "_log_softmax", "_log_softmax_backward_data", "cummax", "cummin", "sort",
          "_fft_c2c", "_fft_r2c", "_fft_c2r", "renorm"}  # fmt: skip
_REDUCE = set(
    """
    sum mean amax amin prod var std norm linalg_vector_norm logsumexp max min nansum median nanmedian var_mean std_mean
    count_nonzero any all aminmax mode kthvalue
    """.split()  # noqa: SIM905
)
_MATRICES = set(
    """
    linalg_inv_ex inverse linalg_cholesky_ex cholesky linalg_solve_ex _linalg_solve_ex triangular_solve
    linalg_solve_triangular linalg_det _linalg_det _linalg_eigh linalg_eig _linalg_svd linalg_qr linalg_lu_factor_ex
    linalg_lu_solve linalg_lu cholesky_inverse cholesky_solve linalg_ldl_factor_ex linalg_ldl_solve matrix_exp
    linalg_matrix_exp linalg_eigvals _linalg_slogdet trace
    """.split()  # noqa: SIM905
)
_LONG = 512  # entries of a cumulative sum that are followed one by one, in Python; of longer ones all depend on all


@cache
def rule_for(func: Any, base: str) -> Rule | Decomposed | None:
    """Return how an operation is followed; None where nothing is known about it."""
    if func.namespace != "aten":
        return _composite(func)
    if base in _OWN:
        return _OWN[base]
    if base in _FRESH:
        return _nothing
    if torch.Tag.pointwise in func.tags or base in _POINTWISE:
        return _pointwise
    for names, rule in _NAMED:
        if base in names:
            return rule
    return _composite(func)


def _composite(func: Any) -> Decomposed | None:
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return Decomposed(func.decompose, exact=True)
    from torch._decomp import decomposition_table

    written_out: Callable[..., Any] | None = decomposition_table.get(func)
    return None if written_out is None else Decomposed(written_out)


def _nothing(tracer: Tracer, call: TracedCall) -> Any:
    return 0


def _same(tracer: Tracer, call: TracedCall) -> Any:
    named = call.named
    return tracer.ids(named["src"] if call.base == "copy" and "src" in named else call.tensors[0])


def _where(tracer: Tracer, call: TracedCall) -> Any:
    """Follow `where`, and what is filled under a mask, which is one."""
    named, shape = call.named, call.outs[0].shape
    condition, *branches = call.args if call.base == "where" else (named[k] for k in ("mask", "value", "self"))
    if len(branches) != 2:
        raise NotImplementedError
    a, b = (tracer.ids(x) if isinstance(x, Tensor) else torch.zeros((), dtype=torch.int64) for x in branches)
    if tracer.may_turn(condition):
        return tracer.union([a.numpy(), b.numpy(), tracer.ids(condition).numpy()], shape)
    # In a linear backward pass the condition depends on nothing that is followed.
    return tracer.union([torch.where(condition.cpu(), a, b).numpy(), tracer.ids(condition).numpy()], shape)


def _pointwise(tracer: Tracer, call: TracedCall) -> Any:
    arrays = [found.numpy() for t in call.live if (found := tracer.read(t)) is not None]
    shape = call.outs[0].shape
    ids = tracer.union(arrays, shape)
    linear = call.base in _LINEAR or call.base.endswith("_backward")
    if not linear or len(call.live) != 1 or len(call.outs) != 1 or call.outs[0].is_complex():
        return ids
    operand = call.live[0]
    if tracer.is_constant(t for t in call.tensors if t is not operand):
        pruned = zeros_in(call.outs[0])
        if pruned.any():
            # Zero from nonzero means that the factor is zero here.
            pruned &= ~np.broadcast_to(zeros_in(operand) if call.zero is None else call.zero, shape)
            ids = np.where(pruned, 0, ids)
    return ids


def move(tracer: Tracer, call: TracedCall, known: Mapping[int, Tensor] | None = None) -> Any:
    """Run the operation on ids; kernels without integers get them as float64, which holds them exactly.

    Args:
        tracer: Where sets are kept.
        call: The operation.
        known: Ids to take for some operands, by their identity, in place of their own.
    """
    known = known or {}

    def given(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            if id(value) in known or tracer.tracks(value):
                return known.get(id(value), tracer.ids(value)).to(dtype).clone()
            is_number = value.is_floating_point() or value.is_complex()
            return torch.zeros(value.shape, dtype=dtype) if is_number else value.cpu()
        return dtype if isinstance(value, torch.dtype) else value

    named = {k: 0 if k == "value" and not isinstance(v, Tensor) else v for k, v in call.named.items() if k != "out"}
    arguments = [a for a in call.func._schema.arguments if a.name in named]
    for dtype in (torch.int64, torch.float64):
        args = [tree_map(partial(given, dtype=dtype), named[a.name]) for a in arguments if not a.kwarg_only]
        kwargs = {a.name: tree_map(partial(given, dtype=dtype), named[a.name]) for a in arguments if a.kwarg_only}
        try:
            moved = call.func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            continue
        return [part.to(torch.int64) for part in (moved if isinstance(moved, tuple | list) else [moved])]
    raise NotImplementedError


def _source(tracer: Tracer, call: TracedCall) -> Array:
    """Return the union of all operands in the shape of the largest."""
    shape = max((t.shape for t in call.tensors), key=lambda s: s.numel())
    return tracer.union([found.numpy() for t in call.tensors if (found := tracer.read(t)) is not None], shape)


def _over_dims(tracer: Tracer, call: TracedCall, source: Array) -> Array:
    """Return the unions along the axes that an operation goes over, which are kept."""
    dims = call.named.get("dim")
    dims = range(source.ndim) if dims is None or dims == [] else dims
    return tracer.along(source, [dims] if isinstance(dims, int) else dims)


def _reduce(tracer: Tracer, call: TracedCall) -> Any:
    ids = _along(tracer, call)
    return [ids.reshape(tuple(out.shape)) for out in call.outs]


def _along(tracer: Tracer, call: TracedCall) -> Any:
    return _over_dims(tracer, call, _source(tracer, call))


def _softmax_backward(tracer: Tracer, call: TracedCall) -> Any:
    """Leave out where the softmax itself is always zero: masked attention."""
    grad, output = call.args[:2]
    if tracer.tracks(output) or (nonzero := tracer.nonzero(output)) is None:
        return _along(tracer, call)
    return np.where(nonzero, _over_dims(tracer, call, np.where(nonzero, tracer.array(grad), 0)), 0)


def _fill(tracer: Tracer, call: TracedCall) -> Any:
    value = call.named["value"]
    return tracer.ids(value) if isinstance(value, Tensor) else 0


def _cumulative(tracer: Tracer, call: TracedCall) -> Any:
    """Let each entry depend on those before it; entries that add nothing to the set before them cost nothing."""
    source = _source(tracer, call)
    if not source.ndim:
        return source
    rows = np.moveaxis(source, call.named["dim"], 0)
    flat = rows.reshape(len(rows), -1)
    fresh = np.flatnonzero((flat != 0).any(1) & np.r_[True, (flat[1:] != flat[:-1]).any(1)][: len(flat)])
    if len(fresh) > _LONG:
        return _along(tracer, call)
    done = [np.zeros(flat.shape[1], np.int64)]
    for row in fresh:
        done.append(tracer.pool.union_pairs(done[-1], np.ascontiguousarray(flat[row])))
    known = np.stack(done)[np.searchsorted(fresh, np.arange(len(flat)), side="right")]
    return np.moveaxis(known.reshape(rows.shape), 0, call.named["dim"])


def _matrices(tracer: Tracer, call: TracedCall) -> Any:
    """Mix the last two axes of everything, each member of the batch for itself."""
    batch = tuple(max((t.shape[:-2] for t in call.tensors if t.ndim >= 2), key=len, default=()))
    parts = []
    for tensor in filter(tracer.tracks, call.tensors):
        array = tracer.array(tensor)
        if tensor.shape[: len(batch)] != batch:
            array = np.broadcast_to(array, batch + array.shape[max(array.ndim - 2, 0) :])
        parts.append(tracer.along(array, range(len(batch), array.ndim)).reshape(batch))
    mixed = tracer.union(parts, batch)
    shaped = [out.shape[: len(batch)] == batch for out in call.outs]
    whole = tracer.everything(call)
    return [
        mixed.reshape(batch + (1,) * (out.ndim - len(batch))) if fits else whole
        for out, fits in zip(call.outs, shaped, strict=True)
    ]


_OWN: dict[str, Rule] = {
    "where": _where,
    "masked_fill": _where,
    "fill": _fill,
    **dict.fromkeys(["cumsum", "cumprod", "logcumsumexp"], _cumulative),
    "_softmax_backward_data": _softmax_backward,
    **SCATTERS,
    **CONTRACTIONS,
    **SAMPLED,
}
_NAMED: list[tuple[Container[str], Rule]] = [
    (_SAME, _same),
    (_MOVES, move),
    (_ALONG, _along),
    (_REDUCE, _reduce),
    (_MATRICES, _matrices),
]
