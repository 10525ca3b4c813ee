"""Gradients sample by sample, and what is made of them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._backends._torch.replica import bare
from ._backends._torch.surroundings import eager, seeded
from .derivatives import Loss, record_loss, trainable
from .errors import InputError, ModelStateError, explain
from .operators import Matrix, Operator
from .space import Space
from .trees import flatten

Randomness = Literal["error", "same"]


@eager
def sample_gradients(
    model: nn.Module,
    loss: Loss,
    x: Any,
    y: Any,
    *,
    randomness: Randomness = "error",
    seed: int | None = None,
    **options: Any,
) -> Matrix:
    """Return the gradients of the loss of every sample alone, as rows of an operator `(n, P)`.

    Each is the gradient of `loss(model(x[i:i+1]), y[i:i+1])`: a mean over one sample is that sample's loss.

    Args:
        model: A module in which no module mixes or randomises samples in its mode.
        loss: `loss(output, y)`, one number.
        x: A tensor, tuple or mapping of tensors with one leading axis.
        y: A tensor with the same leading axis.
        randomness: `"error"` refuses dropout in train mode; `"same"` draws the same masks for every sample.
        seed: Of those masks; needed with `randomness="same"`.
        options: As in `hessian`.

    Returns:
        A matrix operator from the space of parameters to one row per sample.

    Raises:
        ModelStateError: Batch statistics or dropout are in train mode; the message names the module.
        InputError: The leading axes differ.
    """
    seed = checked_seed(randomness, seed)
    refuse_mixing_modules(model, random=seed is None)
    values, tree = flatten((x, y), "(x, y)")
    lengths = {v.shape[0] if isinstance(v, Tensor) and v.ndim else -1 for v in values}
    if len(lengths) != 1 or -1 in lengths:
        raise InputError(explain("x, y", f"of lengths {sorted(lengths)}", "all need one row per sample"))
    rows, space = [], None
    for i in range(lengths.pop()):
        one_x, one_y = tree.build([v[i : i + 1] for v in values])
        with seeded(seed):
            tape = record_loss(model, loss, one_x, one_y, "sample_gradients", **options).tape
        space = tape.domain
        rows.append(space.join(tape.pull_rows([torch.ones_like(tape.outputs[0]).unsqueeze(0)]))[0])
    if space is None:
        picks = options.get("parameters", trainable)
        named = {n: p for n, p in bare(model).named_parameters() if picks(n, p)}
        space = Space.of(named.values(), named)
        return Matrix(torch.zeros(0, space.dim, dtype=space.dtype, device=space.device), domain=space)
    return Matrix(torch.stack(rows), domain=space)


def checked_seed(randomness: Randomness, seed: int | None) -> int | None:
    """Return the seed that random layers draw from, None where they are refused.

    Raises:
        InputError: `randomness` is unknown, or `"same"` without a seed.
    """
    if randomness not in ("error", "same"):
        raise InputError(explain("randomness", repr(randomness), "'error' or 'same' is needed"))
    if randomness == "same" and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise InputError(explain("seed", repr(seed), "`randomness='same'` needs a whole number"))
    return seed if randomness == "same" else None


def refuse_mixing_modules(model: nn.Module, random: bool = True) -> None:
    """Refuse modules that make a per-sample quantity ill-posed in train mode.

    Args:
        model: As in `sample_gradients`.
        random: Refuse random modules too, not only batch statistics.

    Raises:
        ModelStateError: The message names the module and the switch to flip.
    """
    for name, module in bare(model).named_modules():
        if not module.training:
            continue
        label = f"module '{name}' ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelStateError(
                f"{label} is in train mode, where samples of a batch influence each other. Call model.eval()."
            )
        chance = (
            getattr(module, "p", 0.0)
            if isinstance(module, nn.modules.dropout._DropoutNd)
            else getattr(module, "dropout", 0.0)
        )
        if random and (isinstance(module, nn.RReLU) or (isinstance(chance, float) and chance > 0)):
            raise ModelStateError(
                f"{label} is in train mode and random (p={chance}). Call model.eval(), or pass "
                "`randomness='same', seed=`."
            )


def empirical_fisher(model: nn.Module, loss: Loss, x: Any, y: Any, **options: Any) -> Operator:
    r"""Return the empirical Fisher matrix $\frac1N \sum_n g_n g_n^\top$ of per-sample gradients $g_n$.

    Source: Kunstner, Balles, Hennig (2019). It is not the Fisher matrix: labels are the data's, not the model's.

    Args:
        model: As in `sample_gradients`.
        loss: As in `sample_gradients`; a mean over one sample, the negative log-likelihood of it.
        x: As in `sample_gradients`.
        y: As in `sample_gradients`.
        options: As in `hessian`.

    Returns:
        A positive operator on the space of parameters.

    Raises:
        ModelStateError: As in `sample_gradients`.
        InputError: There are no samples.
    """
    G = sample_gradients(model, loss, x, y, **options)
    if G.shape[0] == 0:
        raise InputError(explain("x", "empty", "a mean over samples needs at least one"))
    return (1.0 / G.shape[0]) * (G.T @ G)
