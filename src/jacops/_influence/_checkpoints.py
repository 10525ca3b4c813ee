"""Scores from several models: states of one training (TracIn), or trained apart (ensembles)."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pickle import UnpicklingError
from typing import Any, Unpack, final

import torch
from torch import Tensor, nn

from .._data import Batches
from .._keywords import keywords
from .._ladder.protocol import is_framework_model
from .._objective import Objective
from .._problem import Problem, ProblemOptions
from .._progress import shows_progress, track
from .._runtime.contexts import eager
from .._torch.protocol import bare
from ..errors import DataError, InputError, InputTypeError
from ._influences import compute_influences
from ._result import SIGN, Influences
from ._run import in_tiles
from ._settings import InfluenceOptions, Modelled, data_of, gradients_of, unchecked
from ._stored import shares_of

_TILE_BYTES = 2**26  # 64 MiB of test gradients at a time, as for solves
_NEEDED = "a state dict, the path of one, or a model is needed"


@keywords(ProblemOptions)
@eager
@shows_progress()
def tracin(
    model: Modelled,
    training_data: Any,
    checkpoints: Sequence[Any],
    *,
    learning_rates: float | Sequence[float] = 1.0,
    test_data: Any = None,
    input_data: Any = None,
    loss: Any = None,
    **options: Unpack[ProblemOptions],
) -> Influences:
    r"""Return sums over checkpoints of learning rate times products of gradients, $\sum_c \eta_c\, g_t^c \cdot g_i^c$.

    To first order that is by how much training steps on sample i lowered the loss of t (Pruthi, Liu, Kale and
    Sundararajan, 2020, "TracInCP"). No curvature is involved. One checkpoint with the rate 1 gives plain products.

    Args:
        model: Model and loss as in `compute_influences`; or a module, with `loss`. It is not changed: states are loaded
            into a copy.
        training_data: A loader of batches in a fixed order.
        checkpoints: States of the model during its training: state dicts; paths of files of safetensors or of
            `torch.save`, read with `weights_only=True`; or models.
        learning_rates: The steps' size at each checkpoint, or one for all.
        test_data: A loader of batches; the training data where it is left out.
        input_data: The samples whose score is computed; by default the training data.
        loss: `loss(output, y)`, or `"model"`, where `model` carries none.
        options: Of the objective, as in `Problem`.

    Returns:
        `(n_test, n_train)`, positive where steps on the sample lowered the test loss.

    Raises:
        InputError: A state does not fit the model, or rates are not one for each checkpoint.
        InputTypeError: A checkpoint is no state, path or model.
        DataError: A file does not contain a state.
        JacopsError: The data or the loss is not supported; the message states why.

    Example:
        >>> model, data = torch.nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.zeros(2, 1))]
        >>> states = [{"weight": torch.tensor([[1.0, 2.0]])}, {"weight": torch.tensor([[0.5, 1.0]])}]
        >>> tracin(model, data, states, learning_rates=0.1, loss=torch.nn.functional.mse_loss).values
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """
    train = Batches.of(training_data, "training_data", options.get("unpack"))
    test, asked = data_of(test_data, "test_data", train), data_of(input_data, "input_data", train)
    objective = Problem(model, loss, train, **options).objective
    kept: Any = {name: value for name, value in options.items() if name in ("progress", "distributed", "timeout")}
    rates = _rates(learning_rates, _checked(checkpoints))
    total: Tensor | None = None
    problem: Problem | None = None
    for rate, other in zip(rates, _objectives(objective, checkpoints), strict=True):
        problem = Problem(other, None, train, **kept)
        _ = problem.denominator  # computes by what the loss divides
        found = rate * _products(problem, test, asked)
        total = found if total is None else total.add_(found)
    if total is None or problem is None:
        raise InputError.of("checkpoints", "empty", "at least one is needed")
    units = "test loss per step on the training sample's own loss, summed over checkpoints"
    info = _info(problem, f"tracin over {len(rates)} checkpoints", len(total))
    return Influences(total, "up", SIGN, units, 0.0, info, shares_of(problem, asked))


@keywords(InfluenceOptions)
@eager
@shows_progress()
def ensemble_influences(
    model: Modelled,
    training_data: Any,
    checkpoints: Sequence[Any],
    *,
    test_data: Any = None,
    input_data: Any = None,
    **options: Unpack[InfluenceOptions],
) -> Influences:
    """Return the mean of the influences of several trained models, which varies less than that of one.

    Sources: K and Søgaard (2021) on how much influences differ between trainings; Park et al. (2023) on ensembles.

    Args:
        model: A module with `loss`, or model and loss in one; it is not changed.
        training_data: A loader of batches `(x, y)` in a fixed order.
        checkpoints: The models, or their states, as in `tracin`.
        test_data: A loader of batches; the training data where it is left out.
        input_data: The samples whose score is computed; by default the training data.
        options: `solver=`, `damping=`, `curvature=`, `on_failure=` and those of `Problem`; see `compute_influences`.

    Returns:
        As `compute_influences`; `info["spread"]` is the standard deviation over models, `(n_test, n_train)`, and
        `info["members"]` the status and damping of each.

    Raises:
        InputError: A state does not fit the model, or numbers are out of range.
        InputTypeError: A checkpoint is no state, path or model.
        DataError: A file or a loader holds something else than is needed.
        SolveError: A solve failed; the error carries its `Solution`.

    Example:
        >>> import jacops
        >>> model, data = torch.nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.zeros(2, 1))]
        >>> states = [{"weight": torch.tensor([[1.0, 2.0]])}, {"weight": torch.tensor([[0.5, 1.0]])}]
        >>> options = {"loss": torch.nn.functional.mse_loss, "curvature": "ggn", "damping": 1.0}
        >>> ensemble_influences(model, data, states, **options).values
        tensor([[1.2500, 0.0000],
                [0.0000, 5.0000]])
    """
    train = Batches.of(training_data, "training_data", options.get("unpack"))
    test, asked = data_of(test_data, "test_data", train), data_of(input_data, "input_data", train)
    chosen: dict[str, Any] = {n: v for n, v in options.items() if n in ("solver", "damping", "curvature", "on_failure")}
    rest: Any = {name: value for name, value in options.items() if name not in chosen and name != "loss"}
    objective = Problem(model, options.get("loss"), train, **rest).objective
    _checked(checkpoints)
    chosen |= {name: rest[name] for name in ("l2", "progress", "distributed", "timeout") if name in rest}
    found = [
        compute_influences(_Carrying(other), train, test_data=test, input_data=asked, **chosen)  # pyright: ignore
        for other in track(_objectives(objective, checkpoints), "ensemble_influences", total=len(checkpoints))
    ]
    values = torch.stack([one.values for one in found])
    spread = values.std(0, unbiased=False)
    info = {**found[-1].info, "spread": spread, "members": [(str(one.info["status"]), one.damping) for one in found]}
    info["method"] = f"{found[-1].info['method']}, mean of {len(found)} models"
    last = found[-1]
    return Influences(values.mean(0), "up", SIGN, last.units, last.damping, info, last.shares)


@final
class _Carrying:
    """What carries an objective, as influence calls take it."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective


def _products(problem: Problem, test: Batches, asked: Batches) -> Tensor:
    """Return products of the gradients of all test samples with those of all samples."""
    step = max(1, _TILE_BYTES // max(1, problem.space.dim * problem.space.dtype.itemsize))
    batches = test.tracked("gradients", problem.progress)
    rows = (gradients_of(problem, parts) for parts in in_tiles(batches, step))
    return torch.cat([problem.sample_gradients(asked).apply(some) for some in rows])


def _info(problem: Problem, method: str, many: int) -> dict[str, Any]:
    facts = {"rows": problem.rows, "covered": problem.space.dim, "parameters": problem.objective.parameters_total}
    none = {"curvature": "identity", "damping": 0.0, "damping_rule": "given"}
    return {"method": method, **none, **unchecked(many), **facts}


# ---- models from states --------------------------------------------------------------------------------------------


def _checked(checkpoints: Any) -> int:
    """Return how many checkpoints there are.

    Raises:
        InputTypeError: They are no sequence.
        InputError: There is none.
    """
    if isinstance(checkpoints, str | os.PathLike | Mapping | nn.Module) or not isinstance(checkpoints, Sequence):
        todo = "Put one into a list."
        raise InputTypeError.of("checkpoints", f"a {type(checkpoints).__name__}", "several are needed, in a list", todo)
    if not checkpoints:
        raise InputError.of("checkpoints", "empty", "at least one is needed")
    return len(checkpoints)


def _rates(learning_rates: Any, many: int) -> list[float]:
    given = list(learning_rates) if isinstance(learning_rates, Sequence) else [learning_rates] * many
    if len(given) != many:
        raise InputError.of("learning_rates", f"{len(given)} numbers", f"{many} are needed, one for each checkpoint")
    for rate in given:
        if isinstance(rate, bool) or not isinstance(rate, float | int) or not math.isfinite(rate):
            raise InputError.of("learning_rates", repr(rate), "finite numbers are needed")
    return [float(rate) for rate in given]


def _objectives(objective: Objective, checkpoints: Sequence[Any]) -> Iterator[Objective]:
    """Yield the objective of every checkpoint; each is good until the next."""
    copied: nn.Module | None = None
    for number, checkpoint in enumerate(checkpoints):
        own = getattr(checkpoint, "objective", None)
        model = own.model if isinstance(own, Objective) else checkpoint
        if isinstance(model, nn.Module) or is_framework_model(model):
            yield objective.changed(model)
            continue
        name = f"checkpoints[{number}]"
        if objective.foreign:
            needed = "states are of torch modules"
            raise InputTypeError.of(name, f"a {type(checkpoint).__name__} for a JAX model", needed, "Pass models.")
        state = _state(checkpoint, name)
        if copied is None:
            copied = _copied(bare(objective.model))
        _load(copied, state, name)
        yield objective.changed(copied)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        came, needed = f"a {type(model).__name__} that cannot be copied ({error})", "states are loaded into a copy"
        raise InputError.of("model", came, needed, "Pass models as `checkpoints`.") from error


def _state(checkpoint: Any, name: str) -> dict[str, Tensor]:
    """Return a state dict, read from a file where a path is given."""
    found = _read(checkpoint, name) if isinstance(checkpoint, str | os.PathLike) else checkpoint
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):  # beside an optimiser's state
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputTypeError.of(name, f"a {type(found).__name__}", _NEEDED)
    return dict(found)


def _read(path: str | os.PathLike[str], name: str) -> Any:
    """Return what a file holds; nothing in it is executed.

    Raises:
        DataError: It holds something else than a state.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if os.fspath(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        came = f"the file {os.fspath(path)!r}, which holds no state"
        raise DataError.of(name, came, "tensors alone are read", f"({error})") from error


def _load(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load a state that must hold every tensor of a model, tied ones once.

    Raises:
        InputError: It does not.
    """
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError.of(name, "of other shapes", f"the state must fit the model ({error})") from error
    tensors = model.state_dict()
    loaded = {tensors[key].data_ptr() for key in state if key in tensors and tensors[key].numel()}
    lacking = [key for key in missing if isinstance(tensors.get(key), Tensor) and tensors[key].data_ptr() not in loaded]
    if lacking or unexpected:
        parts = [f"without {', '.join(lacking[:3])}"] * bool(lacking)
        parts += [f"with {', '.join(unexpected[:3])}, which the model lacks"] * bool(unexpected)
        raise InputError.of(name, " and ".join(parts), "the state of the same model is needed")
