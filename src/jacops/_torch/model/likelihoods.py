r"""Losses as negative log-likelihoods: of torch's own by their type, of any other by its slopes at drawn labels.

The gradient of such a loss at a prediction $f$ with label $y$ is $\kappa\,(\mu(f) - y)$ with the mean $\mu$ of the
label's distribution: a categorical one ($\mu$ the softmax), a Bernoulli one ($\mu$ the sigmoid), or a Gaussian one of
fixed variance ($\mu = f$). The second derivative is $\kappa$ times the labels' covariance, whatever the label is, and
therefore the Fisher matrix in the scale of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..._finite import is_finite
from ..._runtime.agreement import few_operations_tolerance
from ..._runtime.contexts import (
    arithmetic,
    is_memory_error,
    out_of_inference,
    private_noise,
    recording,
)
from ..._runtime.counter import Draws
from ..._runtime.restoring import restoring
from ..._trees import Tree
from .loss_facts import counted, counts_targets, reduction_of, terms_per_row, torch_loss
from .losses import call_loss
from .row_losses import RowLosses

Kind = Literal["categorical", "gaussian", "bernoulli"]
Slope = Callable[[Tensor, Any], Tensor]
_KINDS: dict[str, Kind] = {
    "cross_entropy": "categorical",
    "mse_loss": "gaussian",
    "binary_cross_entropy_with_logits": "bernoulli",
}
KNOWN = "CrossEntropyLoss, MSELoss, BCEWithLogitsLoss or their functions"
# Sizes of noise at which slopes are compared: a loss that is quadratic, or logistic, nearby only is off at the second.
_REACHES = (1.0, 1e3)


@dataclass(frozen=True, eq=False)
class Likelihood:
    """What a loss is the negative log-likelihood of.

    Attributes:
        kind: The distribution of a label.
        strength: The factor of a prediction's term in the loss: for torch's means, one over their number, times two
            for squared errors.
        real: Which of a sample's predictions count, `(n, m)`: positions of a categorical output, entries of others.
        axis: Of the classes of a categorical output.
    """

    kind: Kind
    strength: float
    real: Tensor
    axis: int = 1

    def scale(self, rows: int) -> tuple[Tensor, float]:
        """Return what `row_scale` does.

        Terms are the predictions where the loss is a mean over all of them; rows, where it is a mean over rows or of a
        size that no mean has; and a sum has the denominator 1.
        """
        each, ones = self.real.sum(1).double(), torch.ones(rows, dtype=torch.float64, device=self.real.device)
        # Half squares are as common as whole ones.
        usual = (1.0, 2.0) if self.kind == "gaussian" else (1.0,)
        total = float(each.sum())
        # Rounding in float32 is far below 1e-3; two counts of predictions that close are the same.
        means, by_rows, summed = (
            any(abs(self.strength * count - size) <= 1e-3 * size for size in usual) for count in (total, rows, 1)
        )
        if means:
            return each, total
        return (ones, 1.0) if summed and not by_rows else (ones, float(rows))

    def draw(self, output: Tensor, draws: Draws, many: int) -> Tensor:
        """Return `(many, n, entries)`, cotangents at drawn labels whose squares are the loss's Hessian on average."""
        n = self.real.shape[0]
        if self.kind == "gaussian":
            found = draws.normal(self.real, many).to(output)
        elif self.kind == "bernoulli":
            p = output.sigmoid().reshape(n, -1)
            found = p - (draws.uniform(self.real, many) < p).to(p)
        else:
            axis = self.axis
            p = output.movedim(axis, -1).softmax(-1)
            labels = draws.classes(p.reshape(*self.real.shape, -1), self.real, many).reshape(many, *p.shape[:-1])
            found = p - torch.nn.functional.one_hot(labels, p.shape[-1]).to(p)
            found = (found * self.real.reshape(p.shape[:-1]).unsqueeze(-1)).movedim(-1, axis + 1)
            return self.strength**0.5 * found.reshape(many, n, -1)
        return self.strength**0.5 * (found * self.real)


def class_axis(output: Tensor) -> int:
    """Return the axis of the classes, as torch's cross-entropy has it."""
    return 1 if output.ndim > 1 else 0


def positions(kind: Kind, output: Tensor, axis: int | None = None) -> torch.Size:
    """Return the shape of an output's predictions, whose classes stand where torch has them if not at another axis."""
    return (
        output.select(class_axis(output) if axis is None else axis, 0).shape if kind == "categorical" else output.shape
    )


def label_like(kind: Kind, output: Tensor, loss: Any = None) -> Tensor:
    """Return some labels, for what does not depend on them; none that a loss ignores."""
    shape = positions(kind, output)
    if kind != "categorical":
        return output.new_zeros(shape)
    classes, ignored = output.shape[class_axis(output)], getattr(loss, "ignore_index", -100)
    allowed = torch.tensor([c for c in range(classes) if c != ignored] or [0], device=output.device)
    return allowed[torch.arange(shape.numel(), device=output.device) % len(allowed)].reshape(shape)


def _all_real(kind: Kind, output: Tensor, axis: int | None = None) -> Tensor:
    shape = positions(kind, output, axis)
    rows = shape[0] if len(shape) else 1
    return torch.ones(rows, shape.numel() // max(1, rows), dtype=torch.bool, device=output.device)


def known_kind(loss: Any) -> Kind | None:
    """Return the distribution of labels under one of torch's own losses; None for any other loss."""
    return _KINDS.get(torch_loss(loss) or "")


def known_likelihood(losses: RowLosses, output: Tensor, y: Any) -> Likelihood | None:
    """Return the likelihood of one of torch's own losses, which has no weights; None for any other."""
    loss, kind = losses.loss, known_kind(losses.loss)
    if kind is None:
        return None
    real = _all_real(kind, output)
    if counts_targets(loss, y) and y.shape == positions(kind, output):
        real = counted(loss, y).reshape(real.shape).to(real.device)
    summed = reduction_of(loss) == "sum" or (reduction_of(loss) == "none" and losses.reduction == "sum")
    terms = 1 if summed else max(1, int(real.sum()))
    return Likelihood(kind, (2.0 if kind == "gaussian" else 1.0) / terms, real, class_axis(output))


@restoring
def likelihood_of(
    loss: Callable[[Any, Any], Tensor], outputs: Sequence[Tensor], tree: Tree, y: Any
) -> Likelihood | None:
    """Return the likelihood of any loss by its slopes at the one output that it depends on; None where it has none.

    Args:
        loss: `loss(output, y)`, one number.
        outputs: The tensors of the model's output.
        tree: How they make the output.
        y: The target, which determines the predictions that count; None where all do.
    """

    @restoring
    def slopes(parts: Sequence[Tensor], labels: Any) -> Sequence[Tensor | None]:
        with recording():
            leaves = [part.detach().requires_grad_() for part in parts]
            value = call_loss(loss, tree.build([leaf.clone() for leaf in leaves]), labels)
            found = torch.autograd.grad(value, leaves, allow_unused=True)
            # Slopes have no more digits than their loss, which may be computed in a coarser dtype.
            return [part if part is None else part.to(_coarser(part.dtype, value.dtype)) for part in found]

    with arithmetic(False):
        y, own = out_of_inference(y) if isinstance(y, Tensor) else y, [_single(o) for o in outputs]
        used = [0] if len(own) == 1 else [i for i, slope in enumerate(slopes(own, y)) if slope is not None]
        if len(used) != 1:
            return None
        (place,) = used

        def slope(at: Tensor, labels: Any) -> Tensor:
            found = slopes([*own[:place], at, *own[place + 1 :]], labels)[place]
            return torch.zeros_like(at) if found is None else found

        return computed_likelihood(slope, own[place], y)


def _single(output: Tensor) -> Tensor:
    """Return an output in single precision at least: in half precision, factors differ in their third digit only."""
    own = out_of_inference(output.detach())
    return own.float() if own.dtype in (torch.bfloat16, torch.float16) else own


def _coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)


def computed_likelihood(slope: Slope, output: Tensor, y: Any) -> Likelihood | None:
    """Return the likelihood of a loss by its slopes at other outputs and other labels; None where it has none.

    Classes may stand on the second axis or on the last; and where labels are `(n, T)`, a prediction may be of its own
    label or, as in causal language models, of the next one.

    Args:
        slope: The gradient of the loss by an output, for a target; in the dtype that it was computed in.
        output: The model's output.
        y: The target, which determines the predictions that count; None where all do.
    """
    for case in _cases(output, y):
        try:
            found = _compared(slope, case, output, label_like(case.kind, output) if y is None else y)
        except Exception as error:
            if is_memory_error(error):
                raise
            continue  # a loss that refuses such labels
        if found is not None:
            return found
    return None


class _Case(NamedTuple):
    """What a loss may be the likelihood of.

    Attributes:
        kind: The distribution of a label.
        axis: Of the classes.
        lag: How many positions before a label its prediction is.
    """

    kind: Kind
    axis: int
    lag: int = 0


def _cases(output: Tensor, y: Any) -> Iterator[_Case]:
    """Yield what fits the shapes of an output and of a target."""
    first, last = class_axis(output), output.ndim - 1
    whole = isinstance(y, Tensor) and not y.is_floating_point()
    if output.ndim and (y is None or whole):
        for axis in dict.fromkeys([first] if y is None else [first, last]):
            if y is None or y.shape == positions("categorical", output, axis):
                yield _Case("categorical", axis)
                if y is not None and y.ndim == 2:
                    yield _Case("categorical", axis, 1)
    if y is None or (isinstance(y, Tensor) and not whole and y.shape == output.shape):
        yield from (_Case("bernoulli", first), _Case("gaussian", first))


def row_scale(
    losses: RowLosses, y: Any, rows: int, computed: Callable[[], Likelihood | None], shares: Tensor | None = None
) -> tuple[Tensor, float]:
    """Return of how many terms each row's own loss is the mean, `(rows,)`, and the denominator of the whole loss.

    Times its number of terms a row's loss is a sum of terms, as in a sum over all rows; a loss of which the terms are
    not known is taken for one term a row.

    Args:
        losses: Of the rows.
        y: The target.
        rows: How many there are.
        computed: Computes the likelihood of a loss that is none of torch's own.
        shares: What each row adds to the denominator of a mean, where that is known.
    """
    ones = torch.ones(rows, dtype=torch.float64)
    if losses.reduction == "sum":
        return ones, 1.0
    if counts_targets(losses.loss, y):
        terms = losses.denominators(y, rows) if shares is None else shares
    elif (known := terms_per_row(losses.loss, y)) is not None:
        terms = known * ones
    elif torch_loss(losses.loss) or (found := computed()) is None:
        terms = losses.denominators(y, rows) if losses.counts_targets(y) else ones
    else:
        return found.scale(rows)
    total = float(terms.sum())
    return terms, total if total > 0 else 1.0


def _compared(slope: Slope, case: _Case, output: Tensor, y: Tensor) -> Likelihood | None:
    """Return a likelihood of this kind, if all slopes are one factor times the mean less the label."""
    kind, axis, lag = case
    real = _all_real(kind, output, axis)
    if kind == "categorical":  # a label that costs nothing where all classes are as likely is an ignored one
        real = slope(torch.zeros_like(output), y).abs().amax(axis).reshape(real.shape) > 0
    own = torch.nn.functional.pad(y[:, lag:], (0, lag)) if lag else y  # each prediction's
    for classes in _choices(case, own, real.reshape(y.shape), output):
        strength = _strength(slope, case, output, y, _Labels(own, real.reshape(y.shape), classes))
        if strength is not None:
            return Likelihood(kind, strength, real, axis)
    return None


class _Labels(NamedTuple):
    """What other labels are made of.

    Attributes:
        own: The label of each prediction.
        real: Which of them count.
        classes: That they are taken from.
    """

    own: Tensor
    real: Tensor
    classes: Tensor


def _choices(case: _Case, y: Tensor, real: Tensor, output: Tensor) -> list[Tensor]:
    """Return classes to take labels from: those that are present, of which none may be the one that a loss ignores.

    Where labels are all alike, as in a batch of one, weights of classes would not show: another class is taken too, and
    still another one if that is the one that is ignored.
    """
    if case.kind != "categorical":
        return [y]
    present, many = y[real].unique(), output.shape[case.axis]
    if len(present) != 1:
        return [present]
    others = dict.fromkeys((int(present) + more) % many for more in (1, 2))
    return [torch.cat([present, torch.full_like(present, other)]) for other in others]


def _strength(slope: Slope, case: _Case, output: Tensor, y: Tensor, given: _Labels) -> float | None:
    """Return the one factor between slopes and the mean less the label; None where they differ otherwise."""
    lag, pairs = case.lag, list[tuple[Tensor, Tensor]]()
    for i, reach in enumerate(_REACHES):
        at = output if i == 0 else output + private_noise(output, i)
        labels, expected = _labels(case, at, given, reach, i)
        labels = torch.cat([y[:, :lag], labels[:, : y.shape[1] - lag]], 1) if lag else labels
        pairs.append((slope(at, labels), expected))
    strength = float(sum((g * e).sum() for g, e in pairs)) / max(float(sum(e.square().sum() for _, e in pairs)), 1e-300)
    allowed = max(few_operations_tolerance(g.dtype) for g, _ in pairs)
    agree = all(
        is_finite(g) and bool(((g - strength * e).abs() <= allowed * strength * e.abs().max()).all()) for g, e in pairs
    )
    return strength if strength > 0 and agree else None


def _labels(case: _Case, at: Tensor, given: _Labels, reach: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return other labels, and the mean less them at an output."""
    y, real, classes = given
    if case.kind == "gaussian":
        noise = reach * private_noise(at, 10 + seed) * real
        return at + noise, -noise
    if case.kind == "bernoulli":
        labels = (private_noise(at, 10 + seed) > 0).to(at)
        return labels, at.sigmoid() - labels
    axis = case.axis
    if not classes.numel():
        return y, torch.zeros_like(at)
    labels = y.clone()  # with all classes in turn: one that weighs otherwise shows only beside others
    labels[real] = classes[(torch.arange(int(real.sum()), device=classes.device) + seed) % len(classes)]
    hot = torch.nn.functional.one_hot(torch.where(real, labels, 0).long(), at.shape[axis]).movedim(-1, axis).to(at)
    return labels, (at.softmax(axis) - hot) * real.unsqueeze(axis)
