r"""Fisher matrices of one batch: exact, by drawn labels, or empirical.

With $p(y \mid f)$ the likelihood whose negative logarithm the loss is, $F = \sum_n w\, J_n^\top \mathrm{E}_y[u u^\top]
J_n$, $u = -\nabla_f \log p(y \mid f_n)$, in the loss's own scale: $w = 1/N$ for a mean, 1 for a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Unpack, final

import torch
from torch import Tensor, nn

from ._backends._torch.record import record_model
from ._backends._torch.surroundings import eager
from ._keywords import keywords
from .derivatives import CurvatureOptions, Loss, ggn, trainable
from .errors import InputError, InputTypeError, explain
from .operators import Operator, Recorded
from .per_sample import empirical_fisher
from .space import Space
from .trees import flatten

Kind = Literal["exact", "monte_carlo", "empirical"]
Likelihood = Literal["categorical", "gaussian", "bernoulli"]
_LIKELIHOODS: dict[str, Likelihood] = {
    "CrossEntropyLoss": "categorical",
    "cross_entropy": "categorical",
    "MSELoss": "gaussian",
    "mse_loss": "gaussian",
    "BCEWithLogitsLoss": "bernoulli",
    "binary_cross_entropy_with_logits": "bernoulli",
}
_WEIGHTS = ("weight", "pos_weight")


@keywords(CurvatureOptions)
@eager
def fisher(
    model: nn.Module,
    loss: Loss,
    x: Any,
    y: Any = None,
    *,
    kind: Kind = "exact",
    samples: int = 1,
    seed: int = 0,
    **options: Unpack[CurvatureOptions],
) -> Operator:
    r"""Return the Fisher matrix of one batch, as an operator on the space of parameters.

    - `"exact"`: the expectation over labels from the model's own predictive distribution. For softmax cross-entropy,
      mean squared error (a Gaussian of fixed variance) and binary cross-entropy on logits it equals the generalised
      Gauss-Newton matrix (Martens, 2020, §9) and is computed as that; labels are not needed.
    - `"monte_carlo"`: the same with `samples` labels drawn for every row of the batch from that distribution. It is
      unbiased for `"exact"`, and of rank `samples` times rows at most.
    - `"empirical"`: with the labels of the data in place of the model's; not an estimate of the other two
      (Kunstner, Balles and Hennig, 2019).

    All are in the scale of the loss: the mean over rows where it takes the mean, the sum where `loss.reduction` is
    `"sum"`. A batch in train mode is differentiated as it stands, but for `"empirical"`, which takes rows alone.

    Args:
        model: A module.
        loss: `nn.CrossEntropyLoss`, `nn.MSELoss`, `nn.BCEWithLogitsLoss` or their functional forms; any loss of one
            number for `"empirical"`.
        x: The model's input, as in `jacobian`.
        y: The target; needed for `"empirical"` only.
        kind: Which Fisher matrix.
        samples: Labels per row for `"monte_carlo"`.
        seed: Seeds the private generator that draws them.
        options: As in `hessian`.

    Returns:
        A positive operator.

    Raises:
        InputError: `kind` or `samples` is unknown or out of range, `y` is missing, or the loss is no likelihood that
            is known here (unknown, or weighted by class or element).
        InputTypeError: The output is not one tensor with a row per sample.
        NotDifferentiableError: As in `ggn`.
        ModelStateError: As in `ggn`, for `"empirical"` as in `sample_gradients`.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> fisher(model, torch.nn.functional.mse_loss, torch.eye(2)).dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    if kind not in ("exact", "monte_carlo", "empirical"):
        raise InputError(explain("kind", repr(kind), "'exact', 'monte_carlo' or 'empirical' is needed"))
    if kind == "empirical":
        if y is None:
            raise InputError(explain("y", "None", "an empirical Fisher matrix is made with the data's labels"))
        mean = empirical_fisher(model, loss, x, y, **options)
        return flatten(y, "y")[0][0].shape[0] * mean if getattr(loss, "reduction", "mean") == "sum" else mean
    likelihood = _likelihood(loss, kind)
    options.setdefault("parameters", trainable)
    if kind == "exact":
        return ggn(model, loss, x, _label_like(likelihood, model, x, options) if y is None else y, **options)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InputError(explain("samples", repr(samples), "a positive whole number is needed"))
    found = record_model(model, x, call="fisher", kept=True, **options)
    output = _one_tensor(found.tape.outputs)
    scores, scale = _drawn_scores(likelihood, loss, output.detach(), y, samples, seed)
    J, U = Recorded(found.tape, found.output), _Scores(found.tape.codomain, scores)
    return scale * ((J.T @ U.T) @ (U @ J))


def _likelihood(loss: Any, kind: str) -> Likelihood:
    """Return whose negative log-likelihood a loss is.

    Raises:
        InputError: It is none that is known.
    """
    name = type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", "")
    todo = f"Pass one of {', '.join(_LIKELIHOODS)}, or take `kind='empirical'` or `ggn`."
    if name not in _LIKELIHOODS:
        came = f"'{name or type(loss).__name__}'"
        raise InputError(explain("loss", came, f"a '{kind}' Fisher matrix needs a loss with a known likelihood", todo))
    for weight in _WEIGHTS:
        if getattr(loss, weight, None) is not None:
            needed = "a weighted loss is no log-likelihood, and its Gauss-Newton matrix depends on the labels"
            raise InputError(explain("loss", f"a {name} with `{weight}`", needed, "Take `ggn` with your labels."))
    return _LIKELIHOODS[name]


def _one_tensor(outputs: list[Tensor]) -> Tensor:
    if len(outputs) != 1 or outputs[0].ndim == 0:
        came = f"{len(outputs)} tensors" if len(outputs) != 1 else "one number"
        todo = "Pick one with `outputs=`."
        raise InputTypeError(explain("the model's output", came, "one tensor with a row per sample is needed", todo))
    if outputs[0].numel() == 0:
        raise InputError(explain("x", "empty", "an expectation needs at least one sample"))
    return outputs[0]


def _label_like(likelihood: Likelihood, model: nn.Module, x: Any, options: CurvatureOptions) -> Tensor:
    """Return some label, for a curvature that does not depend on it."""
    output = _one_tensor(record_model(model, x, call="fisher", **options).tape.outputs).detach()
    if likelihood != "categorical":
        return torch.zeros_like(output)
    return torch.zeros_like(output.select(_class_axis(output), 0), dtype=torch.long)


def _class_axis(output: Tensor) -> int:
    return 1 if output.ndim > 1 else 0


def _drawn_scores(
    likelihood: Likelihood, loss: Any, output: Tensor, y: Any, samples: int, seed: int
) -> tuple[Tensor, float]:
    r"""Return $-\nabla_f \log p(y \mid f)$ at drawn labels, `(samples, rows, entries)`, and the scale of their squares.

    A mean over positions or entries of a row is a mean over independent predictions, which all count as such.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = getattr(loss, "reduction", "mean") != "sum"
    rows = 1 if likelihood == "categorical" and output.ndim == 1 else output.shape[0]
    if likelihood == "gaussian":  # exp(-(f - y)²) has variance 1/2
        noise = torch.randn(samples, *output.shape, generator=generator, dtype=torch.float64)
        scores, terms = 2**0.5 * noise.to(output), output.numel()
    elif likelihood == "bernoulli":
        p = output.sigmoid()
        scores, terms = p - (_uniform(samples, output, generator) < p).to(output), output.numel()
    else:
        axis = _class_axis(output)
        p = output.movedim(axis, -1).softmax(-1)
        drawn = torch.multinomial(
            p.reshape(-1, p.shape[-1]).double().cpu(), samples, replacement=True, generator=generator
        ).to(output.device)
        labels = drawn.T.reshape(samples, *p.shape[:-1])
        hot = torch.nn.functional.one_hot(labels, p.shape[-1]).to(p)
        counted = _counted(loss, y, p[..., 0])
        scores, terms = ((p - hot) * counted.unsqueeze(-1)).movedim(-1, axis + 1), max(1, int(counted.sum()))
    return scores.reshape(samples, rows, -1), 1.0 / ((terms if mean else 1) * samples)


def _counted(loss: Any, y: Any, like: Tensor) -> Tensor:
    """Return 1 for every prediction that the loss counts, 0 where the label says to ignore it."""
    if not isinstance(y, Tensor) or y.shape != like.shape or y.is_floating_point():
        return torch.ones_like(like)
    return (y != getattr(loss, "ignore_index", -100)).to(like)


def _uniform(samples: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(samples, *like.shape, generator=generator, dtype=torch.float64).to(like)


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
