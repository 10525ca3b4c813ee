"""Rules by which functions of torch hold a part of theirs constant: of the same value, and linear in what is left.

A norm divides by a constant scale, softmax gives constant weights, an activation multiplies by the constant gain
`(phi(z) - phi(0)) / z`, a product of two factors that depend on the input keeps one of them constant. Each rule is
stated once, for torch's own functions. Sources: Golden (2025, "Equivalent Linear Mappings of Large Language Models")
for norms, gates and attention; Arras et al. (2017, "Explaining Recurrent Neural Network Predictions in Sentiment
Analysis") for products with a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._runtime.restoring import restoring
from ..._runtime.side_effects import held_constant
from ..._trees import map_nested
from .function_call import FunctionCall, dependent, out_of_place

NORMS, ATTENTION, GAINS = "normalisation scales", "attention patterns", "activation gains"
GATES, FACTORS = "gates", "first factors of products"
KINDS = (NORMS, ATTENTION, GATES, GAINS, FACTORS)
Frozen = tuple[Any, str | None]  # a result, and what was held constant in it; None where nothing was


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WEIGHTS = _names("softmax special_softmax _softmax _safe_softmax exp")
_SCALES = _names(
    "rsqrt sqrt reciprocal var std norm linalg_norm linalg_vector_norm nuclear_norm frobenius_norm linalg_matrix_norm"
)
# By how much a result is a gate: it is between two bounds, or the result of another activation.
BOUNDED = _names("sigmoid special_expit expit hardsigmoid erf special_erf")
SMOOTH = _names(
    "gelu silu tanh elu selu celu softplus mish hardswish log_sigmoid logsigmoid sin cos atan arctan asinh arcsinh"
)
PIECEWISE = _names("relu relu6 leaky_relu prelu rrelu hardtanh threshold softshrink hardshrink")  # linear as they are
# Of these results a gate stays a gate: they move, scale and shift entries by constants.
KEEPING = _names(
    "add radd rsub sub neg mul multiply div divide true_divide view reshape transpose permute unsqueeze squeeze expand "
    "expand_as contiguous chunk split unbind getitem get to type float double half bfloat16 type_as clone flatten "
    "unflatten clamp dropout movedim swapaxes mT narrow select index_select"
)


def _softmax(call: FunctionCall) -> Frozen:
    with held_constant():
        return call.on(call.first.detach()), ATTENTION


def _scale(call: FunctionCall) -> Frozen:
    with held_constant():
        return call.on(call.first.detach()), NORMS


def _spread_and_mean(call: FunctionCall) -> Frozen:
    x = call.first
    with held_constant():
        spread, mean = call.on(x.detach())
    axes = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    axes = tuple(range(x.ndim)) if axes is None or isinstance(axes, bool) else axes  # a flag is `unbiased`
    return (spread, x.mean(axes, keepdim=True).reshape(mean.shape)), NORMS


def _piecewise(call: FunctionCall) -> Frozen:
    return call.run(), GAINS


@restoring
def _activation(call: FunctionCall) -> Frozen:
    """Return `gain * z + phi(0)`; near zero, where the quotient is rounding, the gain is the slope half way."""
    z = call.first
    with held_constant():
        held = z.detach().to(_wide(z))
        rest = call.on(torch.zeros_like(held[(slice(0, 1),) * held.ndim]))  # `phi(0)`, of shape (1, ...)
        with torch.enable_grad():
            half = (held / 2).requires_grad_()
            slope = torch.autograd.grad(call.on(half).sum(), half)[0]
        # The slope half way is off by z^2 / 24, the quotient by eps / z: equal at the third root of eps.
        small = held.abs() < torch.finfo(held.dtype).eps ** (1 / 3)
        gain = torch.where(small, slope, (call.on(held) - rest) / torch.where(small, 1, held))
        gain, rest = gain.to(z.dtype), rest.to(z.dtype)
    return _like(call, gain * z + rest), GAINS


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the next wider dtype, in which a quotient of small differences is good in the tensor's own."""
    if tensor.dtype.itemsize < 4:
        return torch.float32
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def _layer_norm(call: FunctionCall) -> Frozen:
    x, shape, weight, bias, eps = _arguments(call, "input normalized_shape weight bias eps", (None, None, 1e-5))
    axes = tuple(range(-len(shape), 0))
    return _like(call, _affine(_scaled(x, axes, eps), weight, bias, ())), NORMS


def _rms_norm(call: FunctionCall) -> Frozen:
    x, shape, weight, eps = _arguments(call, "input normalized_shape weight eps", (None, None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    axes = tuple(range(-len(shape), 0))
    return _like(call, _affine(_scaled(x, axes, eps, centred=False), weight, None, ())), NORMS


def _group_norm(call: FunctionCall) -> Frozen:
    x, groups, weight, bias, eps = _arguments(call, "input num_groups weight bias eps", (None, None, 1e-5))
    grouped = x.reshape(x.shape[0], groups, -1)
    scaled = _scaled(grouped, (2,), eps).reshape(x.shape)
    return _like(call, _affine(scaled, weight, bias, (1,) * (x.ndim - 2))), NORMS


def _instance_norm(call: FunctionCall) -> Frozen:
    names = "input weight bias running_mean running_var use_input_stats momentum eps"
    x, weight, bias, _, _, by_input, _, eps = _arguments(call, names, ())
    if not by_input:
        return call.run(), NORMS  # its statistics are constants as it is
    axes = tuple(range(2, x.ndim))
    return _like(call, _affine(_scaled(x, axes, eps), weight, bias, (1,) * len(axes))), NORMS


def _batch_norm(call: FunctionCall) -> Frozen:
    names = "input weight bias running_mean running_var training momentum eps"
    x, weight, bias, mean, _, training, _, eps = _arguments(call, names, ())
    if not training:
        return call.run(), NORMS
    if mean is not None:  # a layer that is kept in train mode, and writes
        return call.run(), None
    return _like(call, _affine(_scaled(x, (0, *range(2, x.ndim)), eps), weight, bias, (1,) * (x.ndim - 2))), NORMS


def _arguments(call: FunctionCall, names: str, defaults: Sequence[Any]) -> list[Any]:
    """Return the arguments of these names, given by place or by keyword."""
    listed = names.split()
    given = dict(zip(listed[len(listed) - len(defaults) :], defaults, strict=True))
    given |= dict(zip(listed, call.args, strict=False)) | {k: v for k, v in call.kwargs.items() if k in listed}
    return [given[name] for name in listed]


def _scaled(x: Tensor, axes: tuple[int, ...], eps: float, centred: bool = True) -> Tensor:
    """Return a tensor, less its mean, over its root mean square, which is held constant."""
    x = x.float() if x.dtype.itemsize < 4 else x
    x = x - x.mean(axes, keepdim=True) if centred else x
    with held_constant():
        scale = (x.to(_wide(x)).square().mean(axes, keepdim=True) + eps).rsqrt().to(x.dtype)
    return x * scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, tail: tuple[int, ...]) -> Tensor:
    x = x if weight is None else x * weight.reshape(*weight.shape, *tail)
    return x if bias is None else x + bias.reshape(*bias.shape, *tail)


def _like(call: FunctionCall, result: Tensor) -> Tensor:
    """Return a result in the dtype that the function gives it, which autocast may change for short ones."""
    if call.first.dtype.itemsize >= 4:
        return result
    with held_constant():
        kind = call.run().dtype
    return result.to(kind)


def _attention(call: FunctionCall) -> Frozen:
    names = "query key value attn_mask dropout_p is_causal scale enable_gqa"
    query, key, value, mask, dropped, causal, scale, grouped = _arguments(call, names, (None, 0.0, False, None, False))
    if grouped:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    with held_constant():
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.float() if scores.dtype.itemsize < 4 else scores
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        unseen = torch.isneginf(scores).all(-1, keepdim=True)  # a query without a key gets zeros
        pattern = scores.masked_fill(unseen, 0).softmax(-1).masked_fill(unseen, 0).to(value.dtype)
        pattern = torch.nn.functional.dropout(pattern, dropped) if dropped else pattern
    return pattern @ value, ATTENTION


def _gated(call: FunctionCall) -> Frozen:
    signal, gate = call.first.chunk(2, _arguments(call, "input dim", (-1,))[1])
    with held_constant():
        gate = gate.sigmoid()
    return signal * gate, GATES


def _product(call: FunctionCall) -> Frozen:
    """Hold all factors but one constant: those that are gates, or else all before the last one."""
    addends = 1 if call.name.startswith("add") or call.name == "baddbmm" else 0
    factors = dependent((call.args[addends:], {k: v for k, v in call.kwargs.items() if k != "input" or not addends}))
    if len(factors) < 2:
        return call.run(), None
    levels = [call.gate(t) for t in factors]
    kept = max(i for i, level in enumerate(levels) if level == min(levels))
    return _holding(call, factors[:kept] + factors[kept + 1 :]), GATES if max(levels) > levels[kept] else FACTORS


def _holding(call: FunctionCall, constants: Sequence[Tensor]) -> Any:
    """Return what a product gives with some factors held constant; of equal ones the first."""
    left = [id(t) for t in constants]
    written = call.first if call.in_place else None  # what is held must not change with it

    def held(value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) in left:
            left.remove(id(value))
            return value.detach().clone() if value is written else value.detach()
        return value

    args = map_nested(call.args, held)
    kwargs = {name: map_nested(value, held) for name, value in call.kwargs.items()}
    return out_of_place(call.func)(*args, **kwargs)


def _quotient(call: FunctionCall) -> Frozen:
    turned = call.name in ("rdiv", "rtruediv")  # `a / x`, of which x is the first argument
    other = call.args[1] if len(call.args) > 1 else call.kwargs.get("other")
    above, below = (other, call.first) if turned else (call.first, other)
    if not isinstance(below, Tensor) or not below.requires_grad or call.kwargs.get("rounding_mode") is not None:
        return call.run(), None
    return torch.div(torch.as_tensor(above), below.detach()), NORMS


def _power(call: FunctionCall) -> Frozen:
    """Return `x^p` as `x^(p-1)` times x for p above 1, and as a constant, the scale of a norm, below."""
    x, power = _arguments(call, "input exponent", (2,))
    if isinstance(power, Tensor) or not dependent(x) or power in (0, 1):
        return call.run(), None
    with held_constant():
        held = x ** (power - 1 if power > 1 else power)
    return (held * x, FACTORS) if power > 1 else (held, NORMS)


RULES: dict[str, Callable[[FunctionCall], Frozen]] = {
    **dict.fromkeys(_WEIGHTS, _softmax),
    **dict.fromkeys(_SCALES, _scale),
    **dict.fromkeys(("var_mean", "std_mean"), _spread_and_mean),
    **dict.fromkeys(PIECEWISE, _piecewise),
    **dict.fromkeys(SMOOTH | BOUNDED, _activation),
    **dict.fromkeys(_names("mul multiply matmul bmm mm mv dot vdot inner outer einsum linear bilinear"), _product),
    **dict.fromkeys(_names("baddbmm addmm addbmm addmv addr addcmul"), _product),
    **dict.fromkeys(_names("div divide true_divide rdiv rtruediv"), _quotient),
    **dict.fromkeys(_names("pow square"), _power),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
    "glu": _gated,
}
