r"""The part of an output that no input feature carries: exact for any piecewise-linear net.

Such a net is jointly homogeneous of degree one in its input and all its additive constants (biases, running means,
clamp limits, padding values). Multiply every additive constant by a scalar t: then `f(x) = J x + b` with `b = df/dt`
at t = 1. This is one more derivative and knows nothing of `f(x)`, so comparing the two can fail, and means something
when it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .replica import bare, check_state, replicate
from .restoring import restoring
from .surroundings import random_state_kept, recording
from .tape import Tape

SMOOTH = frozenset(
    [
        "gelu",
        "silu",
        "mish",
        "tanh",
        "sigmoid",
        "softplus",
        "elu",
        "celu",
        "selu",
        "softmax",
        "log_softmax",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "sin",
        "cos",
        "layer_norm",
        "group_norm",
        "instance_norm",
        "rms_norm",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "logsigmoid",
        "softsign",
        "pow",
        "square",
        "norm",
        "hardswish",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "normalize",
        "cosine_similarity",
        "erf",
        "tanhshrink",
    ]
)


class Homogeneous(TorchFunctionMode):
    """Multiply additive constants by `t` while a forward runs.

    Whatever depends on the input requires grad here and constants do not: that is how they are told apart.

    Attributes:
        smooth: Operations met that are not piecewise linear, for which `f = J x + b` does not hold.
    """

    def __init__(self, t: Tensor) -> None:
        super().__init__()
        self.t = t
        self.smooth: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        name = name.strip("_").removesuffix("_")
        rule = _RULES.get(name)
        if rule is not None and any(_depends(a) for a in _flat(args)):
            return rule(self, func, list(args), kwargs)
        if (name in SMOOTH or name in _PRODUCTS) and self._is_nonlinear(name, args):
            self.smooth[name] = None
        return func(*args, **kwargs)

    def _is_nonlinear(self, name: str, args: Any) -> bool:
        dependent = [a for a in _flat(args) if _depends(a)]
        if name in ("div", "truediv") or name not in _PRODUCTS:
            return bool(dependent) and (name not in _PRODUCTS or (len(args) > 1 and _depends(args[1])))
        return len(dependent) > 1

    def scaled(self, constant: Any) -> Any:
        """Return an additive constant times t."""
        if constant is None or _depends(constant):
            return constant
        return constant * self.t


_PRODUCTS = frozenset({"mul", "div", "truediv", "matmul", "bmm", "mm", "einsum", "rdiv", "rtruediv"})


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _flat(values: Any) -> list[Any]:
    return [v for a in values for v in (_flat(a) if isinstance(a, list | tuple) else [a])]


def _bias_at(position: int, name: str = "bias") -> Callable[..., Any]:
    """Rule for layers that add a bias given at a position or by name."""

    def rule(mode: Homogeneous, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if len(args) > position:
            args[position] = mode.scaled(args[position])
        elif kwargs.get(name) is not None:
            kwargs[name] = mode.scaled(kwargs[name])
        return func(*args, **kwargs)

    return rule


def _additive(mode: Homogeneous, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    args[:2] = [mode.scaled(a) for a in args[:2]]
    if "other" in kwargs:
        kwargs["other"] = mode.scaled(kwargs["other"])
    return func(*args, **kwargs)


def _listed(mode: Homogeneous, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    parts = list(args[0])
    return func([mode.scaled(p) for p in parts], *args[1:], **kwargs)


def _chosen(mode: Homogeneous, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """`where(mask, a, b)`, called on the module or on a tensor."""
    if func is Tensor.where:
        return Tensor.where(mode.scaled(args[0]), args[1], mode.scaled(args[2]), **kwargs)
    return func(args[0], *[mode.scaled(a) for a in args[1:]], **kwargs)


def _filled(mode: Homogeneous, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    value = args[2] if len(args) > 2 else kwargs["value"]
    value = torch.as_tensor(value, dtype=args[0].dtype, device=args[0].device)
    return torch.where(args[1], mode.scaled(value), args[0])


@restoring
def _batch_norm(mode: Homogeneous, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("training") or given.get("running_mean") is None:
        mode.smooth["batch_norm (batch statistics)"] = None
        return func(*args, **kwargs)
    x, mean = given["input"], given["running_mean"]
    scale = (given["running_var"] + given.get("eps", 1e-5)).rsqrt()
    scale = scale if given.get("weight") is None else scale * given["weight"]
    shift = -mean * scale + (0.0 if given.get("bias") is None else given["bias"])
    shape = (1, -1) + (1,) * (x.ndim - 2)
    with torch._C.DisableTorchFunction():
        return x * scale.reshape(shape) + (shift * mode.t).reshape(shape)


def _clamped(low: str, high: str, defaults: tuple[float | None, float | None]) -> Callable[..., Any]:
    """Rule for functions that cut at two limits."""

    def rule(mode: Homogeneous, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        limits = [
            args[i] if len(args) > i else kwargs.get(key, default)
            for i, key, default in ((1, low, defaults[0]), (2, high, defaults[1]))
        ]
        x = args[0]
        for limit, cut in zip(limits, (torch.maximum, torch.minimum), strict=True):
            if limit is not None:
                x = cut(x, mode.scaled(torch.as_tensor(limit, dtype=x.dtype, device=x.device)))
        return x

    return rule


def _relu6(mode: Homogeneous, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    return torch.minimum(F.relu(x), mode.scaled(torch.tensor(6.0, dtype=x.dtype, device=x.device)))


def _padded(mode: Homogeneous, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    if given.get("mode", "constant") != "constant" or not given.get("value"):
        return func(*args, **kwargs)
    x, pad = given["input"], given["pad"]
    frame = F.pad(torch.zeros_like(x), pad, value=1.0) * float(given["value"])
    return F.pad(x, pad) + mode.scaled(frame)


def _affine_first(mode: Homogeneous, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """`addmm(c, a, b)` and its kind: the first argument is added."""
    return func(mode.scaled(args[0]), *args[1:], **kwargs)


_RULES: dict[str, Callable[..., Any]] = {
    "linear": _bias_at(2),
    **{f"conv{d}d": _bias_at(2) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _bias_at(2) for d in (1, 2, 3)},
    "batch_norm": _batch_norm,
    **dict.fromkeys(("add", "sub", "radd", "rsub", "iadd", "isub", "maximum", "minimum", "fmax", "fmin"), _additive),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addbmm"), _affine_first),
    **dict.fromkeys(("cat", "stack", "concat", "concatenate", "hstack", "vstack"), _listed),
    "where": _chosen,
    "masked_fill": _filled,
    "clamp": _clamped("min", "max", (None, None)),
    "clip": _clamped("min", "max", (None, None)),
    "clamp_min": _clamped("min", "max", (None, None)),
    "hardtanh": _clamped("min_val", "max_val", (-1.0, 1.0)),
    "relu6": _relu6,
    "pad": _padded,
}


@restoring
def bias_part(model: Any, x: Tensor, batch_size: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return the output `(n, *out)`, its bias part of the same shape, and the operations that are not piecewise linear.

    The bias part of all samples of a batch is one push along the scalar `t`: no sample's constants touch another's
    output unless samples mix, and then `compute_jacobian` says so.
    """
    outputs, parts, smooth = [], [], {}
    for start in range(0, max(x.shape[0], 1), batch_size):
        check_state(bare(model))
        module = replicate(model, training=False)
        with recording(), random_state_kept():
            t = torch.ones((), dtype=x.dtype, device=x.device, requires_grad=True)
            leaf = x[start : start + batch_size].detach().requires_grad_()
            mode = Homogeneous(t)
            with mode:
                output = module((leaf * 1,), {})
        tape = Tape([t], [output], leaf_names=["t"], output_names=["output"], call="contributions", private=True)
        parts.append(tape.push_rows([torch.ones_like(t).unsqueeze(0)])[0][0].detach())
        outputs.append(output.detach())
        smooth |= mode.smooth
    return torch.cat(outputs), torch.cat(parts), tuple(smooth)
