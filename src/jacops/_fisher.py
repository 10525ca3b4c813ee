r"""Fisher matrices of one batch: exact, by drawn labels, or empirical.

With $p(y \mid f)$ the likelihood whose negative logarithm the loss is, $F = \sum_n w\, J_n^\top \mathrm{E}_y[u u^\top]
J_n$, $u = -\nabla_f \log p(y \mid f_n)$, in the scale of the loss: $w$ is one over what a mean divides by, 1 for a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack, final

import torch
from torch import Tensor, nn

from ._derivatives import ggn_at
from ._framework import likelihood_at, recorded
from ._keywords import keywords
from ._operators import LinearizedMap, Operator, Scaled
from ._operators._computed import Computed, detached, with_computed
from ._operators._finite_results import made_from
from ._operators._naming import named
from ._options import AnyModel, CurvatureCallOptions, OperatorOptions
from ._per_sample import sample_gradients
from ._recorded_loss import Loss, located
from ._requirements import check_choice, check_positive, check_whole
from ._runtime.contexts import eager
from ._runtime.counter import Draws
from ._space import Space
from ._torch.protocol import KNOWN, Likelihood, RowLosses, known_kind, known_likelihood, label_like, row_scale
from ._trees import output_leaves
from ._words import FisherKind
from .errors import InputError, InputTypeError

_WEIGHTS = ("weight", "pos_weight")


@keywords(CurvatureCallOptions)
@eager
@made_from("x", "y")
def fisher(
    model: AnyModel,
    loss: Loss,
    x: Any,
    y: Any = None,
    *,
    kind: FisherKind = "exact",
    samples: int = 1,
    seed: int = 0,
    first: int = 0,
    **options: Unpack[CurvatureCallOptions],
) -> Operator:
    r"""Return the Fisher matrix of one batch, as an operator on the space of parameters.

    - `"exact"`: the expectation over labels from the model's own predictive distribution. For softmax cross-entropy,
      mean squared error (a Gaussian of fixed variance) and binary cross-entropy on logits it equals the generalised
      Gauss-Newton matrix (Martens, 2020, §9) and is computed as that; labels are not needed.
    - `"monte_carlo"`: the same with `samples` labels drawn for every prediction from that distribution. It is
      unbiased for `"exact"`, and of rank `samples` times rows at most. Its `noise` estimates the relative standard
      error of a quadratic form.
    - `"empirical"`: $\frac1D \sum_n \tilde g_n \tilde g_n^\top$ with the labels of the data. $\tilde g_n$ is the
      gradient of the sum of a sample's terms, and $D$ is what the loss divides the sum of all terms by: their number,
      or the sum of their weights. With labels drawn from the model its expectation is `"exact"`; with the data's it
      is not an estimate of the other two (Kunstner, Balles and Hennig, 2019).

    All are in the scale of the loss, so that one damping fits all. In train mode the whole batch is differentiated at
    once, except for `"empirical"`, which differentiates each row by itself.

    torch's own losses are recognised by their exact type or identity. Any other is compared with their gradients at
    other outputs and labels: one that is a multiple of them is treated as that likelihood, and its terms are counted by
    the multiple. Any other loss counts one term per row in `"empirical"`, one for all if `loss.reduction` is `"sum"`.

    Args:
        model: A module, a `JaxFunction`, or with `wrt="inputs"` a function `f(x)`.
        loss: `nn.CrossEntropyLoss`, `nn.MSELoss`, `nn.BCEWithLogitsLoss`, their functional forms, or a loss that
            computes the same; any loss of one number for `"empirical"`.
        x: The model's input, as in `jacobian`.
        y: The target; needed for `"empirical"` only. Targets that the loss ignores are left out.
        kind: Which Fisher matrix.
        samples: Labels per prediction for `"monte_carlo"`.
        seed: Which stream of labels is drawn. A label depends on the seed, the sample's place in the data and its
            target's place among the sample's targets that count: padding and the size of batches change nothing.
        first: Place of the first sample in the data, for a batch of a larger data set.
        options: `parameters=`, `outputs=`, `checks=`, `fallback=`, `check_finite=`; see `hessian`.

    Returns:
        A positive operator.

    Raises:
        InputError: `kind`, `samples` or `first` is unknown or out of range, `y` is missing, or the loss is no
            likelihood that is known here (or weighted by class or element).
        InputTypeError: The output is not one tensor with a row per sample.
        NotDifferentiableError: The model has no derivative; the message names the cause.
        ModelStateError: No parameter requires grad, or for `"empirical"` a module mixes or randomises samples.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> fisher(model, torch.nn.functional.mse_loss, torch.eye(2)).dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    check_choice("kind", kind, FisherKind)
    check_positive("samples", samples)
    check_whole("first", first, 0)
    losses, asked = RowLosses(loss), located(model, options)

    def record() -> Any:
        return recorded(model, x, call="fisher", kept=True, aside=True, **asked)

    if kind == "empirical":
        if asked.get("parameters") is None or "at" in asked:
            needed = "gradients of samples are by the parameters"
            raise InputError.of("kind", "'empirical' with `wrt='inputs'` or `at=`", needed, "Take another kind.")
        rows: OperatorOptions = {k: v for k, v in asked.items() if k != "at"}  # pyright: ignore[reportAssignmentType]
        given: Any = model  # a function is refused there
        made = empirical_fisher(model, losses, y, lambda: sample_gradients(given, losses.scalar, x, y, **rows), record)
    else:
        made = fisher_at(model, losses, y, kind, samples, Draws(seed, first), record)
    return named(made, "fisher" if kind == "exact" else f"{kind}_fisher")


def fisher_at(
    model: Any, losses: RowLosses, y: Any, kind: str, samples: int, draws: Draws, record: Callable[[], Any]
) -> Operator:
    """Return the Fisher matrix of a batch, `"exact"` or by drawn labels, for a loss whose reduction is known.

    Args:
        model: The model.
        losses: Of the batch's rows.
        y: Its target, if there is one.
        kind: Which.
        samples: Labels per prediction.
        draws: Where those come from.
        record: Records the model's output by the parameters.
    """
    _refuse_weights(losses.loss, kind)
    found = record()
    handed = Computed(detached(found.output))  # no loss: labels may be made up
    if kind == "exact" and y is not None and known_kind(losses.loss) is not None:
        return with_computed(ggn_at(model, found, losses.scalar, y, "ggn"), handed)
    output = _one_tensor(output_leaves(found.output, aside=True)[0]).detach()
    likelihood = known_likelihood(losses, output, y) or likelihood_at(model, found, losses, y)
    if likelihood is None:
        raise _unknown(losses.loss, kind)
    if kind == "exact":
        labels = label_like(likelihood.kind, output, losses.loss) if y is None else y
        return with_computed(ggn_at(model, found, losses.scalar, labels, "ggn"), handed)
    scores = likelihood.draw(output, draws, samples)
    J = LinearizedMap(found.lin, found.output)
    rows = _Scores(found.lin.codomain, scores) @ J
    return with_computed(Scaled(rows.T @ rows, 1.0 / samples, partial(_moments, rows)), handed)


def drawn_scores(model: Any, losses: RowLosses, y: Any, found: Any, draws: Draws) -> Tensor:
    """Return the gradient of a batch's loss by the output, one tensor, for one drawn label of every target.

    Args:
        model: The model.
        losses: Of the batch's rows.
        y: Its target.
        found: The model's recorded output.
        draws: Where labels come from.

    Raises:
        InputError: The loss is no likelihood that is known, or weighted.
    """
    _refuse_weights(losses.loss, "monte_carlo")
    output = _one_tensor(output_leaves(found.output, aside=True)[0]).detach()
    likelihood = known_likelihood(losses, output, y) or likelihood_at(model, found, losses, y)
    if likelihood is None:
        raise _unknown(losses.loss, "monte_carlo")
    return likelihood.draw(output, draws, 1)[0].view_as(output)


def empirical_fisher(
    model: Any, losses: RowLosses, y: Any, gradients: Callable[[], Operator], record: Callable[[], Any]
) -> Operator:
    """Return the empirical Fisher matrix of a batch, from the gradients of its rows."""
    if y is None:
        raise InputError.of("y", "None", "an empirical Fisher matrix is made with the data's labels")
    G: Any = gradients()  # noqa: N806
    rows = G.shape[0]
    if rows == 0:
        raise InputError.of("x", "empty", "a mean over samples needs at least one")

    def computed() -> Likelihood | None:
        return likelihood_at(model, record(), losses, y)

    terms, total = row_scale(losses, y, rows, computed)
    if bool((terms == terms[0]).all()):
        return with_computed(float(terms[0]) ** 2 / total * (G.T @ G), G.computed or Computed())
    scaled = G.scaled(terms)
    return with_computed(1.0 / total * (scaled.T @ scaled), G.computed or Computed())


def _moments(rows: Operator, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of fourth powers and of squares of what each drawn label adds along directions."""
    squares = rows._apply(directions).double().square()
    return squares.square().sum(1), squares.sum(1)


def _refuse_weights(loss: Any, kind: str) -> None:
    """Refuse one of torch's own losses with weights.

    Raises:
        InputError: It has some.
    """
    for weight in _WEIGHTS:
        if known_kind(loss) is not None and getattr(loss, weight, None) is not None:
            needed = "a weighted loss is no log-likelihood, and its Gauss-Newton matrix depends on the labels"
            todo = "Take `ggn` with your labels."
            raise InputError.of("loss", f"a {type(loss).__name__} with `{weight}`", f"{needed} ({kind!r})", todo)


def _unknown(loss: Any, kind: str) -> InputError:
    name = type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", type(loss).__name__)
    needed = f"the Fisher matrix of kind {kind!r} needs a loss with a known likelihood"
    todo = f"Pass {KNOWN}, a loss with the gradients of one of them, or take `kind='empirical'` or `ggn`."
    return InputError.of("loss", f"{name!r}", needed, todo)


def _one_tensor(outputs: list[Tensor]) -> Tensor:
    if len(outputs) != 1 or outputs[0].ndim == 0:
        came = f"{len(outputs)} tensors" if len(outputs) != 1 else "one number"
        todo = "Pick one with `outputs=`."
        raise InputTypeError.of("the model's output", came, "one tensor with a row per sample is needed", todo)
    if outputs[0].numel() == 0:
        raise InputError.of("x", "empty", "an expectation needs at least one sample")
    return outputs[0]


@final
@dataclass(frozen=True, eq=False, repr=False)
class _Scores(Operator):
    """Inner products of every row of an output with drawn scores: outputs to `samples * rows` numbers.

    Attributes:
        space: The space of outputs.
        scores: One gradient by the output per sample and row, (samples, rows, entries).
    """

    space: Space
    scores: Tensor

    @property
    def domain(self) -> Space:
        """The outputs."""
        return self.space

    @property
    def codomain(self) -> Space:
        """One number per label drawn."""
        return Space.flat(self.scores.shape[:2].numel(), "labels", self.scores)

    def _apply(self, rows: Tensor) -> Tensor:
        entries = rows.reshape(rows.shape[0], *self.scores.shape[1:])
        return torch.einsum("kne,sne->ksn", entries, self.scores).reshape(rows.shape[0], -1)

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        entries = rows.reshape(rows.shape[0], *self.scores.shape[:2])
        return torch.einsum("ksn,sne->kne", entries, self.scores).reshape(rows.shape[0], -1)
