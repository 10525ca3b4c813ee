"""The Jacobian lens: what a layer's output adds to later results to first order, on average over a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._data import Batches
from ._data import Unpack as Batching
from ._display import Described, Description
from ._finite import InBatch, check_outputs, require_finite
from ._interop import ArrayLike
from ._keywords import keywords
from ._progress import shows_progress, track
from ._requirements import check_whole
from ._runtime.contexts import eager
from ._runtime.memory import Budget
from ._saving import Savable
from ._torch.protocol import SHIFT, At, Freeze, FrozenModules, PooledModel, Samples, bare, counted_positions
from ._trees import Selector
from ._words import Checks, Fallback
from .errors import DataError, InputError, InputTypeError


@dataclass(frozen=True, eq=False, repr=False)
class JacobianLens(ArrayLike, Savable, Described):
    """A mean Jacobian between two layers of a model of sequences, which maps hidden vectors of the one to the other.

    Attributes:
        matrix: `(out, width)`.
        at: The layer that it is by, and the layer that it is of (None: the model's output).
        sequences: How many sequences it is the mean over.
        positions: How many positions they have together, padding and skipped ones left out.
        sampling_error: How far the mean over these sequences is from the mean over all texts of their kind, relative to
            its size, by the spread between sequences (Frobenius norms); None for one sequence.
        route: How the Jacobians of the last batch were computed.
        notes: Remarks: what was frozen.
    """

    matrix: Tensor
    at: tuple[str, str | None]
    sequences: int
    positions: int
    sampling_error: float | None
    route: str
    notes: tuple[str, ...]
    _array: ClassVar[str] = "matrix"

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return hidden vectors of the first layer as vectors of the second one, `(..., width) -> (..., out)`.

        Raises:
            InputError: Their last axis, dtype or device is another one than the matrix's.
        """
        if not isinstance(hidden, Tensor):
            raise InputTypeError.of("hidden", f"a {type(hidden).__name__}", "a tensor (..., width) is needed")
        width = self.matrix.shape[1]
        if hidden.ndim == 0 or hidden.shape[-1] != width:
            raise InputError.of("hidden", f"of shape {tuple(hidden.shape)}", f"its last axis must have {width} entries")
        if (hidden.dtype, hidden.device) != (self.matrix.dtype, self.matrix.device):
            needed = f"the lens is of {self.matrix.dtype} on {self.matrix.device}"
            raise InputError.of("hidden", f"of {hidden.dtype} on {hidden.device}", needed, "Cast one of them.")
        return hidden @ self.matrix.T

    def _describe(self) -> Description:
        out, width = self.matrix.shape
        facts = [
            ("mean over", f"{self.sequences:,} sequences, {self.positions:,} positions"),
            *([("sampling error", f"{self.sampling_error:.1%}")] if self.sampling_error is not None else []),
            ("route", self.route),
            *(("note", note) for note in self.notes),
        ]
        return Description(f"JacobianLens({self.at[0]} -> {self.at[1] or 'output'}, {out} x {width})", facts)


@keywords()
@eager
@shows_progress()
def jacobian_lens(
    model: nn.Module,
    corpus: Tensor | Mapping[str, Any] | Iterable[Any],
    *,
    at: At,
    outputs: Selector = None,
    freeze: Freeze = None,
    skip: int = 0,
    batch_size: int = 1024,
    unpack: Batching | None = None,
    budget: Budget = None,
    checks: Checks = "first",
    fallback: Fallback = "warn",
    check_finite: bool = True,
    progress: bool | None = None,
) -> JacobianLens:
    r"""Return the Jacobian of a model's last hidden vectors by those of a layer, on average over a corpus.

    With hidden vectors $h_{s,t}$ of the layer and $y_{s,t}$ of the result, at positions $t \in T_s$ of sequence $s$,

    $$J = \frac{1}{S} \sum_s \frac{1}{|T_s|} \sum_{t \in T_s} \sum_{t' \in T_s}
          \frac{\partial y_{s,t'}}{\partial h_{s,t}} .$$

    In a causal model only $t' \ge t$ adds anything. It is the estimator of Gurnee, Sofroniew, Lindsey et al. (2026,
    "Verbalizable Representations Form a Global Workspace in Language Models"): a sum over targets, then a mean over
    sources, then a mean over texts, each of which counts alike. The model's own head maps the result to logits:
    `model.lm_head(model.transformer.ln_f(lens(hidden)))`. All positions and all sequences of a batch share
    min(out, width) sweeps.

    Args:
        model: A module, evaluated in eval mode, of which every layer named by `at` is used once.
        corpus: Token ids `(sequences, positions)`, or a mapping of keyword arguments such as a tokenizer gives, or a
            loader or list of such batches, also of different lengths. Where a batch has an `attention_mask`
            `(sequences, positions)`, positions at which it is 0 are left out as sources and as targets.
        at: The path of the layer, or a pair of that and the path of the layer whose output is the result (None: the
            model's output).
        outputs: Part of the result, such as `"logits"`; it must be `(sequences, positions, out)`.
        freeze: Modules that are frozen, as in `contributions`.
        skip: Number of positions left out at the beginning of every sequence, where attention is atypical; 16 in the
            paper.
        batch_size: Maximum number of sequences per sweep; fewer if the budget requires it.
        unpack: For a loader, as in `compute_jacobian`.
        budget: Bytes that may be held at once, as in `compute_jacobian`; that is about `sequences * out * width`
            numbers and the working memory of a sweep.
        checks: Whether sequences mix is proved as in `compute_jacobian`.
        fallback: `"warn"`, `"silent"` or `"error"` when the fast route does not apply.
        check_finite: Raise if a result or a derivative is NaN or Inf.
        progress: Force the progress bar on or off.

    Returns:
        A `JacobianLens` with the mean Jacobian `matrix` `(out, width)` and its sampling error.

    Raises:
        InputTypeError: `model` or `corpus` is of the wrong kind.
        InputError: `at` has no layer to differentiate by, or a mask or a result is of the wrong shape.
        ModelStateError: A layer is used more than once, or not at all.
        DataError: No position is left.
        NonFiniteError: A result or a derivative is NaN or Inf.

    Example:
        >>> layers = torch.nn.Embedding(9, 3), torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)
        >>> lens = jacobian_lens(torch.nn.Sequential(*layers), torch.tensor([[1, 2, 3], [4, 5, 6]]), at=("1", "3"))
        >>> lens.matrix.shape, lens(torch.ones(5, 3)).shape
        (torch.Size([2, 3]), torch.Size([5, 2]))
    """
    check_whole("skip", skip, 0)
    source, target = _layers(at)
    model = bare(model)
    frozen = FrozenModules.of(freeze, model)
    pooled = PooledModel(model, source, target, outputs, skip)
    options: dict[str, Any] = {"at": SHIFT, "checks": checks, "fallback": fallback}
    options["freeze"] = None if frozen is None else frozen.below("model")
    total = _Mean()
    for number, x in enumerate(track(_batches(corpus, unpack), "jacobian_lens", enabled=progress)):
        with InBatch(number):
            mask = _mask(x)
            samples = Samples(pooled, (mask, x), call="jacobian_lens", batch_size=batch_size, **options)
            found = samples.jacobians(budget=budget)
            if check_finite:
                check_outputs("jacobian_lens", found.output, ["sums of results"])
                require_finite(found.blocks[0][0], "jacobian_lens: in the Jacobian")
            total.add(found.blocks[0][0], pooled.met.positions if mask is None else mask, skip, found.route)
    return total.lens((source, target), () if frozen is None else (frozen.describe(),))


def _layers(at: Any) -> tuple[str, str | None]:
    source, target = at if isinstance(at, tuple) and len(at) == 2 else (at, None)
    if not isinstance(source, str) or not isinstance(target, str | None):
        todo = "Name the layer that the lens is to read."
        raise InputError.of("at", repr(at), "the path of a layer, or a pair of paths, is needed", todo)
    return source, target


def _batches(corpus: Any, unpack: Batching | None) -> Iterable[Any]:
    """Return the inputs of all batches.

    Raises:
        InputTypeError: The corpus is of another kind.
        InputError: There is an `unpack` of batches, and there are none.
    """
    if isinstance(corpus, Tensor | Mapping):
        if unpack is not None:
            raise InputError.of("unpack", "given", f"`corpus` is a {type(corpus).__name__}, which is one batch")
        return [corpus]
    return Batches(corpus, "corpus", unpack).inputs()


def _mask(x: Any) -> Tensor | None:
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        came = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise InputError.of("attention_mask", came, "a tensor (sequences, positions) is needed")
    return mask if not mask.is_floating_point() else mask != 0  # nothing is differentiated by it


class _Mean:
    """A mean over sequences, and how they spread around it."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.sequences = self.positions = 0
        self.squares, self.route, self.dtype = 0.0, "", torch.float32

    def add(self, blocks: Tensor, mask: Tensor | int, skip: int, route: str) -> None:
        """Take the Jacobians of a batch's sequences, `(n, out, width)`, and which positions are no padding."""
        wide = torch.float32 if blocks.device.type == "mps" else torch.float64
        real = torch.ones(len(blocks), mask) if isinstance(mask, int) else mask
        counted = counted_positions(real, skip).sum(1)
        part = blocks.sum(0, dtype=wide)
        self.sum = part if self.sum is None else self.sum + part
        self.squares += float(torch.linalg.vector_norm(blocks, dtype=wide)) ** 2
        self.sequences += int((counted > 0).sum())
        self.positions += int(counted.sum())
        self.route, self.dtype = route, blocks.dtype

    def lens(self, at: tuple[str, str | None], notes: tuple[str, ...]) -> JacobianLens:
        """Return the lens.

        Raises:
            DataError: No position was left.
        """
        n = self.sequences
        if self.sum is None or n == 0:
            raise DataError.of("corpus", "without positions", "padding and skipped positions left out, none is there")
        mean = self.sum / n
        size = float(torch.linalg.vector_norm(mean))
        spread = max(0.0, self.squares - n * size**2) / (n * (n - 1)) if n > 1 else 0.0
        error = spread**0.5 / size if n > 1 and size > 0 else None
        return JacobianLens(mean.to(self.dtype), at, n, self.positions, error, self.route, notes)


@dataclass(frozen=True)
class LogitDifference:
    """Picks differences of logits out of a model's output; made by `logit_difference`.

    Attributes:
        first: Tokens whose logits count.
        second: Tokens whose logits are subtracted.
        position: In the sequence.
        single: It is one pair, and there is no axis of pairs.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    position: int
    single: bool

    def __call__(self, output: Any) -> Tensor:
        """Return the differences, `(n, pairs)`, or `(n,)` for one pair.

        Raises:
            InputError: There are no logits, or not so many tokens or positions.
        """
        logits = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            came = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            needed = "a tensor of logits (sequences, positions, tokens), or an output that has one, is needed"
            raise InputError.of("the model's output", came, needed)
        positions, tokens = logits.shape[1:]
        if not -positions <= self.position < positions:
            raise InputError.of("position", repr(self.position), f"the output has {positions} positions")
        if max(*self.first, *self.second) >= tokens:
            raise InputError.of("tokens", f"up to {max(*self.first, *self.second)}", f"there are {tokens}")
        last = logits[:, self.position]
        found = last[:, list(self.first)] - last[:, list(self.second)]
        return found[:, 0] if self.single else found


@keywords()
def logit_difference(
    first: int | Sequence[int], second: int | Sequence[int], position: int = -1
) -> Callable[[Any], Tensor]:
    """Return a function for `outputs=` that selects the difference of two tokens' logits at one position.

    What a part of a model adds to the difference of two logits shows its preference for one token over the other; what
    it adds equally to all logits cancels (Wang et al., 2023, "Interpretability in the Wild"). For a pair of tokens of
    every sample's own, subtract what two calls with `target=first` and `target=second` give.

    Args:
        first: A token, or several.
        second: The token whose logit is subtracted, or one for each of the first.
        position: In the sequence; the last by default.

    Returns:
        A function of the model's output, a tensor of logits `(n, positions, tokens)` or what has such a `logits`. It
        returns `(n, pairs)`, and `(n,)` for two numbers.

    Raises:
        InputTypeError: Tokens or position are no whole numbers.
        InputError: Tokens are negative, or not as many first ones as second ones.

    Example:
        >>> logit_difference([2, 0], [1, 1])(torch.tensor([[[0.0, 0.0, 0.0], [5.0, 1.0, 3.0]]]))
        tensor([[2., 4.]])
    """
    if isinstance(position, bool) or not isinstance(position, int):
        raise InputTypeError.of("position", f"a {type(position).__name__}", "a whole number is needed")
    plus, minus = _tokens("first", first), _tokens("second", second)
    if len(plus) != len(minus):
        raise InputError.of("second", f"{len(minus)} tokens", f"there are {len(plus)} first ones")
    return LogitDifference(plus, minus, position, isinstance(first, int) and isinstance(second, int))


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor) and not value.is_floating_point():
        value = value.tolist()
    tokens = [value] if isinstance(value, int) else value
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        raise InputTypeError.of(name, f"a {type(value).__name__}", "token ids, whole numbers, are needed")
    if not tokens:
        raise InputError.of(name, "empty", "at least one token is needed")
    for token in tokens:
        check_whole(name, token, 0)
    return tuple(tokens)
