"""Every wrong argument of the table is refused with its type and its words, and nothing of the model moves."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import jacops
from jacops import errors
from refusals import TABLE, asked, cells
from small import draw, refused, small_net

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support is in beta:UserWarning", "ignore:Complex modules are a new feature:UserWarning"
)
CELLS = list(cells())


def state_of(model: Any) -> dict[str, Any]:
    """Modes, values and gradients; of parameters without storage that they have none."""
    if not isinstance(model, nn.Module):
        return {}
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {
        name: "none" if nn.parameter.is_lazy(t) or t.is_meta else (t.detach().to_dense().clone(), t.grad)
        for name, t in held.items()
    }
    return {"modes": [module.training for module in model.modules()], **values}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return all(map(same, a, b)) if isinstance(a, tuple) else a == b


@pytest.mark.parametrize(("label", "call"), CELLS, ids=[f"{label}-{call}" for label, call in CELLS])
def test_a_wrong_argument_is_refused_with_its_type_and_words_and_nothing_moves(label: str, call: str):
    if "jax" in call:
        pytest.importorskip("jax")
        from jax_cases import double_precision as precision
    else:
        precision = nullcontext
    with precision():
        function, arguments = asked(label, call)
        before = state_of(arguments.get("model"))
        refused(TABLE[label].error, lambda: function(**arguments), *TABLE[label].words)
    after = state_of(arguments.get("model"))
    assert list(after) == list(before)
    assert all(same(after[name], before[name]) for name in before)


@pytest.mark.parametrize("call", ["jvp", "batch_jvp"])
def test_an_unknown_fallback_of_a_closure_is_refused_before_it_runs(call: str):
    runs: list[int] = []
    function, arguments = asked("fallback is 'sometimes'", call)
    with pytest.raises(errors.InputError, match="`fallback`"):
        function(**{**arguments, "func": lambda: runs.append(1)})
    assert not runs


def test_an_input_that_does_not_fit_the_forward_s_signature_is_the_model_s_own_error():
    with pytest.raises(TypeError):
        jacops.compute_jacobian(small_net(), (draw(5, 3), draw(5, 3)))


BUILTINS = {
    "InputTypeError": TypeError,
    "InputError": ValueError,
    "ModelStateError": ValueError,
    "NotDifferentiableError": RuntimeError,
    "NonFiniteError": ArithmeticError,
    "DataError": ValueError,
    "SolveError": RuntimeError,
    "MemoryBudgetError": MemoryError,
    "PeerFailedError": RuntimeError,
    "MissingExtraError": ImportError,
    "StoreError": RuntimeError,
    "StoreMismatchError": RuntimeError,
    "StoreDamagedError": RuntimeError,
    "StoreIncompleteError": RuntimeError,
    "StoreFileError": OSError,
}


@pytest.mark.parametrize("name", BUILTINS)
def test_errors_are_caught_as_the_library_s_and_as_the_builtin(name: str):
    kind = getattr(errors, name)
    assert issubclass(kind, errors.JacopsError)
    assert issubclass(kind, BUILTINS[name])


def test_every_error_type_has_its_builtin():
    kinds = {n for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, errors.JacopsError)}
    assert kinds - {"JacopsError"} == set(BUILTINS)
