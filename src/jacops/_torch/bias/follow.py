"""Following a forward operation by operation: bias parts, or moved values, carried along with its tensors.

The forward itself is not changed: every operation runs as it is, and is then applied to the companions of its
arguments. What autograd does not record (`detach`, `no_grad`, values read out of tensors) is a constant here as it is
for a derivative.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from ..._finite import is_finite
from ..._runtime.agreement import coarsest
from ..._runtime.contexts import is_memory_error
from ..._runtime.restoring import restoring
from ..._runtime.side_effects import Light, WritesState, is_held, storage_of, tensors_in
from .companions import Companions, wide, working
from .local_linear import find_curved, push_entrywise, push_through, ray
from .operation import OperationCall, Shape, is_followed, kind_of

_MOVE = {torch.float64: 2.0**-20, torch.float32: 2.0**-13}  # d relative to x: far above rounding, below most kinks
_SEEDS = 3  # directions that are requested: a further leaf moves along one of its own
_COARSE_MOVE = 2.0**-6  # for half precision: two spacings of bfloat16 (2**-7), below which a move rounds away


class Functions(TorchFunctionMode):
    """Records which function of torch the forward is in: one of them may run many operations."""

    def __init__(self) -> None:
        super().__init__()
        self.active: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.active = self.active, func
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.active = before

    @property
    def name(self) -> str:
        """The name that users know the function by; some have another one inside torch."""
        public = (name for name, f in vars(torch.nn.functional).items() if f is self.active and name[0] != "_")
        return next(public, getattr(self.active, "__name__", "").strip("_"))


class Follow(Light):
    """A mode in which companions are carried along with everything that depends on some leaves.

    Args:
        leaves: Where following starts; the list may grow while the forward runs, when a cut reaches its layer.
        guarded: Tensors that the forward may not write into.
        bias: Follow bias parts.
        lengths: Follow the values at `x + length * d` for each of these.
        seed: For the direction of `d`.

    Attributes:
        moves: `d` by leaf.
        coarse: The coarsest dtype of what was followed.
    """

    def __init__(
        self, leaves: list[Tensor], guarded: Iterable[Tensor], bias: bool, lengths: Sequence[float], seed: int
    ) -> None:
        super().__init__()
        self.leaves, self.moves, self.functions = leaves, [], Functions()
        self.coarse: torch.dtype | None = None
        self._bias, self._lengths, self._seed = bias, lengths, seed
        self._guarded = {storage_of(tensor) for tensor in guarded}
        self._companions = Companions([working] * bias + [wide] * len(lengths))
        self._marks: list[str] = []
        self._keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    @restoring
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, kind_of(func)
        if kind.ignored:
            return func(*args, **kwargs)
        if kind.written and self._guarded:
            self._refuse_writes(func, args, kwargs)
        recorded = torch.is_grad_enabled()
        with torch._C.DisableTorchFunction():
            given = [t for t in tensors_in([*args, *kwargs.values()]) if is_followed(t)]
            tracked = [t for t in given if self._is_tracked(t)]
            moving = [t for t in tracked if recorded and _needs_grad(t)]
        if not tracked or (not moving and is_held()):
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            # Where nothing is recorded (inside a custom Function) all that is tracked is followed.
            call = OperationCall(func, args, kwargs, moving or tracked)
            shifts = [] if moving else self._shifted(call)
            for tensor in call.written:
                self._companions.prepare(tensor)
        output = func(*args, **kwargs)
        with self._apart():
            self._carry(call, output, shifts, bool(moving))
        return output

    def _refuse_writes(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        given = dict(zip(kind_of(func).names, args, strict=False)) | kwargs
        written = [t for name in kind_of(func).written for t in tensors_in(given.get(name))]
        if any(t.layout is torch.strided and storage_of(t) in self._guarded for t in written):
            raise WritesState(str(func))

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Run as outside the forward: below no operation, without the caller's function modes."""
        with torch._C._ForceDispatchKeyGuard(*self._keys), torch._C.DisableTorchFunction(), torch.no_grad():
            yield

    def read(self, output: Tensor) -> tuple[list[Tensor], list[str]]:
        """Return the companions of an output, and names of what is not piecewise linear on the way to it."""
        with self._apart():
            if is_followed(output) and self._is_tracked(output) and _needs_grad(output):
                marks = self._companions.marks(output)
                names = [name for i, name in enumerate(self._marks) if marks >> i & 1]
                return [part.clone() for part in self._companions.read(output)], names
            return self._companions.constant(output), []

    # ---- what is followed ------------------------------------------------------------------------------------

    def _is_tracked(self, tensor: Tensor) -> bool:
        if self._companions.entry(tensor) is not None:
            return True
        if not tensor.requires_grad:
            return False
        for leaf in self.leaves:
            if tensor is leaf:
                self.start([leaf])
                return True
        maker = None if tensor.is_leaf else self._unseen(tensor)
        if maker is None:
            return False
        self._companions.write(tensor, self._companions.constant(tensor), self._marked(f"{maker} (not examined)"), True)
        return True

    def start(self, leaves: Iterable[Tensor]) -> None:
        """Follow from these leaves on, before the forward uses them; others start where it does."""
        with self._apart():
            for leaf in leaves:
                value = leaf.detach().to(wide(leaf))
                starts = [torch.zeros_like(leaf, dtype=working(leaf), requires_grad=False)] if self._bias else []
                if self._lengths:
                    direction = ray(value, self._seed + _SEEDS * len(self.moves))
                    self.moves.append(move := _MOVE.get(leaf.dtype, _COARSE_MOVE) * direction)
                    starts += [value + length * move for length in self._lengths]
                self._companions.write(leaf, starts, 0, True)

    @restoring
    def _unseen(self, tensor: Tensor) -> str | None:
        """Return what made a tensor out of sight of the dispatcher, such as a Function in NumPy; None for constants."""
        with self._apart(), torch.enable_grad():
            ends = {get_gradient_edge(leaf).node for leaf in self.leaves}
        stack, seen, maker = [tensor.grad_fn], set(), "code out of sight"
        while stack:
            node = stack.pop()
            if node in ends:
                return maker
            if node is not None and node not in seen:
                seen.add(node)
                if isinstance(node, BackwardCFunction):
                    maker = node.name().removesuffix("Backward")
                stack.extend(parent for parent, _ in node.next_functions)
        return None

    def _marked(self, name: str) -> int:
        if name not in self._marks:
            self._marks.append(name)
        return 1 << self._marks.index(name)

    # ---- one operation ---------------------------------------------------------------------------------------

    def _shifted(self, call: OperationCall) -> list[Tensor]:
        """Return tensors that are written into behind autograd's back: for a derivative the change is a constant."""
        held = [t for t in call.written if (e := self._companions.entry(t)) is not None and e.attached]
        return held if held and not _in_custom_function() else []

    def _carry(self, call: OperationCall, output: Any, shifts: Sequence[Tensor], attached: bool) -> None:
        results = call.results(output)
        if not results:
            return
        self.coarse = coarsest([self.coarse, *(result.dtype for result in results)])
        marks = 0
        for tensor in call.moving:
            marks |= self._companions.marks(tensor)
        try:
            values, curved = self._carried(call, results, output)
            if [v.shape for v in values[0]] != [r.shape for r in results]:
                raise ValueError("results of other shapes")
            marks |= self._marked(self._named(call)) if curved else 0
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            if is_memory_error(error):
                raise
            values = list(zip(*(self._companions.constant(r) for r in results), strict=True))
            marks |= self._marked(f"{self._named(call)} (not examined)")
        for i, tensor in enumerate(results):
            if any(tensor is s for s in shifts):
                for part in self._companions.read(tensor):
                    part.add_(call.change(tensor))
                continue
            self._companions.write(tensor, [row[i] for row in values], marks, attached)

    def _carried(
        self, call: OperationCall, results: Sequence[Tensor], output: Any
    ) -> tuple[list[Sequence[Tensor]], bool]:
        """Return the results' companions, in rows, and whether the operation is curved."""
        rows = list(zip(*(self._companions.read(t) for t in call.moving), strict=True))
        if not self._bias:
            return [call.at(points) for points in rows], False
        shape, moved = call.shape(), rows[1:]
        if shape is Shape.GATE:
            bias, curved = [call.gated(rows[0][0], results[0])], False
        elif shape is Shape.SELECTION:
            bias, curved = [call.selected(rows[0][0], output)], False
        else:
            bias, curved = self._bias_parts(call, shape, rows[0])
        return [bias, *(call.at(points) for points in moved)], curved

    def _bias_parts(self, call: OperationCall, shape: Shape, bias: Sequence[Tensor]) -> tuple[Sequence[Tensor], bool]:
        if shape is Shape.AFFINE:
            return call.at(bias, working), False
        precision = wide if shape is Shape.UNKNOWN else working  # curves differ from rounding only in full precision
        points, at = call.points(precision), partial(call.at, precision=precision)
        along = [_finite(b.to(p.dtype)) for b, p in zip(bias, points, strict=True)]
        if shape is Shape.HOMOGENEOUS:
            return _finished(*push_entrywise(at, points[0], along[0])), False
        values, (own, parts) = push_through(at, points, [[_finite(p) for p in points], along])
        constants = [value - image for value, image in zip(values, own, strict=True)]
        curved = find_curved(at, points, values) if shape is Shape.UNKNOWN else None
        if curved is not None:
            constants = [torch.where(c, 0, r) for c, r in zip(curved, constants, strict=True)]
        parts = [part + constant for part, constant in zip(parts, constants, strict=True)]
        return _finished(values, parts), curved is not None

    def _named(self, call: OperationCall) -> str:
        function, operation = self.functions.name, call.kind.name
        short = operation.strip("_")
        return short if function in ("", short, operation) else f"{function} ({short})"


def _needs_grad(tensor: Tensor) -> bool:
    """Return whether autograd follows a tensor; a view of a tensor that was written into does if it has a `grad_fn`."""
    return tensor.grad_fn is not None or tensor.requires_grad


def _finite(tensor: Tensor) -> Tensor:
    return tensor if is_finite(tensor) else torch.where(torch.isfinite(tensor), tensor, 0)


def _finished(values: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Return bias parts; a result that is not finite (a score masked by -inf) is its own, as no feature reaches it."""
    pairs = zip(values, parts, strict=True)
    return [p if is_finite(v) else torch.where(torch.isfinite(v), p, v) for v, p in pairs]


def _in_custom_function() -> bool:
    """Return whether this runs in the forward of a custom Function; from torch 2.14 on `apply` has no frame."""
    forwards, frame = set(_forwards(torch.autograd.Function)), sys._getframe(1)
    while frame is not None:
        if frame.f_code in forwards:
            return True
        frame = frame.f_back
    return False


def _forwards(kind: type) -> Iterator[CodeType]:
    for derived in kind.__subclasses__():
        code = getattr(getattr(derived, "forward", None), "__code__", None)
        if code is not None:
            yield code
        yield from _forwards(derived)
