"""Whether a loss's Hessian by the output is positive at a point, by its eigenvalues sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..._finite import is_finite
from ..._runtime.contexts import (
    arithmetic,
    is_memory_error,
    out_of_inference,
    private_noise,
    recording,
    sweeping,
)
from ..._runtime.restoring import restoring
from ..._trees import Tree, flatten
from .losses import call_loss

Rows = Callable[[Tensor], Tensor]
_MOST_ENTRIES = 2**22  # of all samples' blocks: 32 MiB in float64
_WHOLE = 512  # outputs of a loss that mixes samples: its matrix takes so many products of a loss, milliseconds each
_SLACK = 16  # times eps: rounding of a few products and of the eigenvalues of small blocks


@restoring
def computed_convex(
    loss: Callable[[Any, Any], Tensor], y: Any, product: Rows, outputs: Sequence[Tensor], tree: Tree
) -> bool:
    """Return whether a loss's Hessian by the output has no negative eigenvalue in any sample, at this output.

    Args:
        loss: `loss(output, y)`, one number.
        y: The target.
        product: Products of the Hessian with rows `(k, entries)`.
        outputs: The tensors of the output.
        tree: How they make the output.
    """

    def replay() -> Rows:
        leaves, target = flatten(y, "y")
        own = [out_of_inference(v) if isinstance(v, Tensor) else v for v in leaves]
        wide = target.build([v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in own])
        return _double_products(lambda parts: call_loss(loss, tree.build(parts), wide), outputs)

    with arithmetic(False):
        return positive_everywhere(product, outputs, replay)


def positive_everywhere(product: Rows, outputs: Sequence[Tensor], replay: Callable[[], Rows] | None = None) -> bool:
    """Return whether a loss's Hessian by the output has no negative eigenvalue in any sample's block.

    The blocks of all samples are formed where they are small; a large one is accepted as diagonal or as that of a
    softmax, where products show that. What is neither, or too large, is answered by False: this is a proof or none.

    Args:
        product: Products of the Hessian with rows `(k, entries)`, entries of all outputs one after the other.
        outputs: The model's outputs, which may share a first axis of samples.
        replay: Makes the same products in float64, where outputs may be narrower and a loss may compute in float32
            whatever its outputs are. Without it rounding hides the sign of what is small there, and a row is judged by
            its own scale.
    """
    total, widest = sum(o.numel() for o in outputs), reduce(torch.promote_types, [o.dtype for o in outputs])
    like = torch.empty(0, dtype=widest, device=outputs[0].device)
    if total == 0:
        return True
    exact = like.dtype == torch.float64
    wide = None if replay is None else _replayed(product, replay, like, total)
    if wide is not None:
        product, exact, like = wide, True, like.double()
    image = product(private_noise(like.new_empty(1, total)))[0]
    if not is_finite(image):
        return False
    places = torch.arange(total, device=like.device).split([o.numel() for o in outputs])
    used = [(o, where) for o, where in zip(outputs, places, strict=True) if bool(image[where].any())]
    if not used:
        return True  # linear
    blocks = _Blocks(product, _by_sample(*zip(*used, strict=True)), total, like)
    if len(blocks.order) > 1 and blocks.mixes():
        few = blocks.order.numel() <= _WHOLE
        return few and _Blocks(product, blocks.order.reshape(1, -1), total, like).are_positive(exact)
    return blocks.are_positive(exact) or (len(used) == 1 and blocks.are_softmax(used[0][0], exact))


class _Blocks:
    """Products with the blocks of all samples at once.

    Args:
        product: Products of the Hessian with rows `(k, entries)`.
        order: Where the entries of each sample stand in a row, `(n, entries)`.
        total: Entries of a row.
        like: A tensor of the dtype and on the device of the rows.
    """

    def __init__(self, product: Rows, order: Tensor, total: int, like: Tensor) -> None:
        self._product, self.order, self._total, self.like = product, order, total, like
        self.probe = self._noise(1)
        self.image = self.times(self.probe.unsqueeze(0))[0]

    def _noise(self, seed: int) -> Tensor:
        return private_noise(self.like.new_empty(self.order.shape), seed)

    def times(self, vectors: Tensor) -> Tensor:
        """Map `(k, n, entries)` to `(k, n, entries)`."""
        rows = self.like.new_zeros(vectors.shape[0], self._total)
        rows[:, self.order.flatten()] = vectors.flatten(1)
        return self._product(rows)[:, self.order]

    def mixes(self) -> bool:
        """Return whether a sample's output changes the slope at another's."""
        half = torch.arange(len(self.order), device=self.like.device) % 2 == 0
        kept = self.probe * half.to(self.probe.dtype).unsqueeze(1)
        return bool(self.times(kept.unsqueeze(0))[0][~half].any())

    def are_positive(self, exact: bool) -> bool:
        """Return whether all are diagonal or small, without a negative eigenvalue."""
        n, entries = self.order.shape
        signs = torch.where(self._noise(2) >= 0, 1.0, -1.0).to(self.like)
        diagonal = self.times(signs.unsqueeze(0))[0] * signs
        scale = diagonal.abs().amax(1, keepdim=True).double()
        floor = _allowed(scale, entries, exact)
        off = (diagonal * self.probe - self.image).abs()
        if bool((off <= floor).all()):
            return bool((diagonal >= -floor).all())
        if n * entries**2 > _MOST_ENTRIES:
            return False
        units = self.like.new_zeros(entries, n, entries)
        units[range(entries), :, range(entries)] = 1
        matrix = self.times(units).permute(1, 2, 0).double()
        if not is_finite(matrix):
            return False
        values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
        largest = values.abs().amax(1, keepdim=True)
        return bool((values >= -_allowed(largest, entries, exact)).all())

    def are_softmax(self, output: Tensor, exact: bool) -> bool:
        """Return whether each position's block is a softmax's, `c (diag(p) - p p')` with c not negative."""
        output, n = output.detach().to(self.like.dtype), len(self.order)
        if output.ndim < 2 or output.shape[0] != n:
            return False
        for axis in {1, output.ndim - 1}:
            p, v, seen = (
                part.reshape(output.shape).movedim(axis, -1) for part in (output.softmax(axis), self.probe, self.image)
            )
            plain = p * (v - (p * v).sum(-1, keepdim=True))
            strength = (v * plain).sum(-1, keepdim=True)
            factor = torch.where(strength > 0, (v * seen).sum(-1, keepdim=True) / strength, 0.0)
            scale = seen.abs().amax(-1, keepdim=True).double()
            floor = _allowed(scale.reshape(n, -1), output.shape[axis], exact).reshape(scale.shape)
            if bool(((factor * plain - seen).abs() <= floor).all()) and bool((factor >= 0).all()):
                return True
        return False


def _allowed(scale: Tensor, entries: int, exact: bool) -> Tensor:
    """Return what rounding may make negative: of the largest block in float64, else of the block's own scale."""
    eps = torch.finfo(torch.float64 if exact else torch.float32).eps
    reach = scale.amax().expand_as(scale) if exact else scale
    return _SLACK * math.sqrt(entries) * eps * reach


def _by_sample(outputs: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Return places of outputs in a row, `(n, entries)`; one block where they share no first axis."""
    lengths = {o.shape[0] if o.ndim else -1 for o in outputs}
    n = lengths.pop() if len(lengths) == 1 else 1
    return torch.cat([where.reshape(max(n, 1), -1) for where in places], 1)


def _replayed(product: Rows, replay: Callable[[], Rows], like: Tensor, many: int) -> Rows | None:
    """Return products in float64, if they are of the Hessian that was recorded."""
    probe = private_noise(like.new_empty(1, many), 3)
    try:
        wide = replay()
        expected, found = product(probe).double(), wide(probe.double())
    except Exception as error:
        if is_memory_error(error):
            raise
        return None  # a loss with tensors of its own, in the model's dtype
    # float32 keeps 7 digits of what is of the size of the largest entry; another loss is off by far more
    allowed = max(1e-3, _SLACK * torch.finfo(like.dtype).eps) * float(expected.abs().max())
    return wide if bool(((expected - found).abs() <= allowed).all()) else None


class _Wide(TorchDispatchMode):
    """Casts to a narrower floating-point dtype go to float64 instead, as those of losses that compute in float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype")
        if func is torch.ops.aten._to_copy.default and dtype is not None and dtype.is_floating_point:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@restoring
def _double_products(function: Callable[[Sequence[Tensor]], Tensor], outputs: Sequence[Tensor]) -> Rows:
    """Return products in float64 with the Hessian of a function of the outputs."""
    with recording():
        leaves = [o.detach().double().requires_grad_() for o in outputs]
        with _Wide():
            value = function([leaf.clone() for leaf in leaves])
        slopes = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
    live = [i for i, slope in enumerate(slopes) if slope.requires_grad]
    sizes = [leaf.numel() for leaf in leaves]

    @restoring
    def product(rows: Tensor) -> Tensor:
        found = torch.zeros_like(rows)
        for row, into in zip(rows if live else [], found, strict=False):
            parts = row.split(sizes)
            with sweeping(row):
                grads = torch.autograd.grad(
                    [slopes[i] for i in live],
                    leaves,
                    [parts[i].reshape(leaves[i].shape) for i in live],
                    retain_graph=True,
                    materialize_grads=True,
                )
            into.copy_(torch.cat([grad.flatten() for grad in grads]))
        return found

    return product
