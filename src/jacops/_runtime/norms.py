"""Norms by statistics of their input, written out in elementary operations (Ba et al., 2016; Ulyanov et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@cache
def norm_rules() -> dict[Any, Callable[..., Tensor | None]]:
    """Return what takes the place of torch's functions; a rule returns None where the fused kernel is right."""
    return {
        functional.layer_norm: layer_norm,
        torch.layer_norm: layer_norm,
        functional.instance_norm: instance_norm,
        functional.batch_norm: batch_norm,
    }


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor | None:
    """Return `torch.nn.functional.layer_norm`; float16 and bfloat16 are left to its kernel."""
    if input.dtype.itemsize < 4:
        return None
    axes = tuple(range(-len(normalized_shape), 0))
    return _affine(_standardized(input, axes, eps), weight, bias, ())


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Return `torch.nn.functional.batch_norm` by statistics of the batch, where none are kept."""
    if not training or running_mean is not None or input.dtype.itemsize < 4:
        return None
    axes = (0, *range(2, input.ndim))
    return _affine(_standardized(input, axes, eps), weight, bias, (1,) * (input.ndim - 2))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Return `torch.nn.functional.instance_norm` by statistics of the input, where none are kept."""
    if not use_input_stats or running_mean is not None or input.dtype.itemsize < 4 or input.ndim < 3:
        return None
    axes = tuple(range(2, input.ndim))
    return _affine(_standardized(input, axes, eps), weight, bias, (1,) * len(axes))


def _standardized(input: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = input - input.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, tail: tuple[int, ...]) -> Tensor:
    x = x if weight is None else x * weight.reshape(*weight.shape, *tail)
    return x if bias is None else x + bias.reshape(*bias.shape, *tail)
