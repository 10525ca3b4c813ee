"""Every argument of a public call does with a JAX model what it does with a module, or is refused by its name."""

import inspect
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

jax = pytest.importorskip("jax")

import jacops  # noqa: E402
from jacops._progress import track  # noqa: E402
from jacops.errors import InputError, InputTypeError, JacopsWarning, NotDifferentiableError  # noqa: E402
from jax_cases import as_jax, double_precision, mse  # noqa: E402
from small import draw  # noqa: E402

X, Y = draw(5, 2), draw(5, 1)
PUBLIC: Any = jacops


def dense_of(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, **more: call(model, mse, X, Y, **more).dense()


CALLS: dict[str, Callable[..., Any]] = {
    "hessian": dense_of(jacops.hessian),
    "ggn": dense_of(jacops.ggn),
    "fisher": dense_of(jacops.fisher),
    "sample_gradients": dense_of(jacops.sample_gradients),
    "empirical_fisher": dense_of(jacops.linalg.empirical_fisher),
    "hvp": lambda model, **more: jacops.hvp(model, mse, X, Y, draw(2), **more),
    "ggnvp": lambda model, **more: jacops.ggnvp(model, mse, X, Y, draw(2), **more),
    "jacobian": lambda model, **more: jacops.jacobian(model, X, **more).dense(),
    "sample_jacobians": lambda model, **more: jacops.sample_jacobians(model, X, **more).dense(),
    "compute_jacobian": lambda model, **more: jacops.compute_jacobian(model, X, **more),
    "model_jvp": lambda model, **more: jacops.model_jvp(model, X, draw(2, 1), **more),
    "model_vjp": lambda model, **more: jacops.model_vjp(model, X, draw(5, 1), **more),
}
DATA = {"model", "loss", "x", "y", "inputs", "v"}
SAME = {"parameters", "outputs", "checks", "fallback", "check_finite"}  # of calls with `**options`
CURVATURE = SAME | {"wrt"}
DONE = {  # what has a meaning for a pure function
    "hessian": CURVATURE,
    "ggn": CURVATURE,
    "hvp": CURVATURE,
    "ggnvp": CURVATURE,
    "fisher": CURVATURE | {"kind", "samples", "seed", "first"},
    "sample_gradients": SAME | {"unpack", "shared"},  # of loaders
    "empirical_fisher": SAME | {"unpack", "shared"},
    "jacobian": {"wrt", "parameters", "outputs", "checks", "fallback", "allow_zero", "check_finite"},
    "sample_jacobians": SAME | {"unpack", "shared", "target"},
    "compute_jacobian": SAME - {"parameters"} | {"batch_size", "mode", "progress", "unpack", "shared", "target"},
    "model_jvp": {"fallback"},
    "model_vjp": set[str](),
}
REFUSED: dict[str, dict[str, Any]] = {
    **{name: {"create_graph": True, "at": "0"} for name in ("hessian", "ggn", "hvp", "ggnvp")},
    "fisher": {"at": "0"},
    "sample_gradients": {"randomness": "same", "seed": 3, "create_graph": True},
    "empirical_fisher": {"randomness": "same", "seed": 3, "create_graph": True},
    "sample_jacobians": {"seed": 3, "create_graph": True},
    "jacobian": {"at": (None, "0"), "create_graph": True},
    "compute_jacobian": {
        "at": "0",
        "freeze": "Linear",
        "budget": "1GiB",
        "out": torch.zeros(5, 1, 2),
        "compile": True,
        "create_graph": True,
        "store": "a folder",
    },
    "model_jvp": {"create_graph": True},
    "model_vjp": {"create_graph": True},
}


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with double_precision():
        yield


def linear() -> Any:
    return PUBLIC.JaxFunction(lambda w, x: x @ w, as_jax(draw(2, 1)))


def lying() -> Any:
    """A model whose only operation has a batching rule that gives other numbers."""

    @jax.custom_batching.custom_vmap
    def double(x: Any) -> Any:
        return 2 * x

    @double.def_vmap
    def rule(size: int, batched: Any, x: Any) -> Any:
        return 3 * x, True

    # The operation itself has no derivative.
    return PUBLIC.JaxFunction(lambda w, x: (x @ w) * double(jax.lax.stop_gradient(x))[:, :1], as_jax(draw(2, 1)))


def branching(name: str) -> Any:
    """A model that reads a value it is not differentiated by, so that it is not compiled."""

    def apply(w: Any, x: Any) -> Any:
        read = w if name == "compute_jacobian" else x
        return x @ w if float(read[0, 0]) < 100.0 else -x @ w

    return PUBLIC.JaxFunction(apply, as_jax(draw(2, 1)))


def arguments(name: str) -> set[str]:
    call = getattr(PUBLIC if hasattr(PUBLIC, name) else PUBLIC.linalg, name)
    found = inspect.signature(call).parameters
    keys = set(found) - {"options"}
    if "options" in found:
        (options,) = typing.get_args(typing.get_type_hints(inspect.unwrap(call))["options"])
        keys |= set(options.__optional_keys__ | options.__required_keys__)
    return keys - DATA


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_has_a_place_here(name: str):
    assert arguments(name) == DONE[name] | set(REFUSED.get(name, ()))


def test_every_other_call_that_takes_a_model_refuses_it():
    for name in ("modjac", "contributions", "laplacian", "input_hessian", "sparse_plan", "check"):
        with pytest.raises(InputTypeError, match="`model` is a JaxFunction"):
            getattr(PUBLIC, name)(linear(), X)


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in REFUSED for option in REFUSED[name]])
def test_what_has_no_meaning_is_refused_by_name(name: str, option: str):
    with pytest.raises(InputError, match=f"`{option}`"):
        CALLS[name](linear(), **{option: REFUSED[name][option]})


@pytest.mark.parametrize("name", [name for name in CALLS if "fallback" in DONE[name]])
def test_fallback_and_checks_are_known_words(name: str):
    for option in {"fallback", "checks"} & DONE[name]:
        with pytest.raises(InputError, match=f"`{option}`"):
            CALLS[name](linear(), **{option: "perhaps"})


@pytest.mark.parametrize("name", [name for name in CALLS if "fallback" in DONE[name]])
def test_fallback_says_what_happens_where_a_model_cannot_be_compiled(name: str):
    model = branching(name)
    with pytest.warns(JacopsWarning, match="cannot be compiled"):
        expected = CALLS[name](model)
    with pytest.raises(NotDifferentiableError, match="fallback='error'"):
        CALLS[name](model, fallback="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(CALLS[name](branching(name), fallback="silent"), expected)


@pytest.mark.parametrize("name", ["sample_gradients", "sample_jacobians", "compute_jacobian"])
def test_checks_say_whether_batched_sweeps_are_compared(name: str):
    call, model = CALLS[name], lying()
    wrong = call(model, checks="never")
    with pytest.raises(NotDifferentiableError, match="off by.*fallback='error'"):
        call(model, fallback="error")
    found = call(lying(), checks="always", fallback="silent")
    assert (wrong - found).abs().max() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(call(lying(), fallback="silent"), found)


def test_batch_size_is_the_most_samples_to_a_sweep():
    expected = CALLS["compute_jacobian"](linear())
    for size in (1, 2, 3, 100):
        torch.testing.assert_close(CALLS["compute_jacobian"](linear(), batch_size=size), expected)
    one = CALLS["compute_jacobian"](lying(), batch_size=1, fallback="error")  # nothing is batched
    torch.testing.assert_close(one, 2 * X[:, :1, None] * expected)


def test_progress_is_shown(monkeypatch: pytest.MonkeyPatch):
    shown: list[Any] = []

    def noted(items: Any, what: str, *, enabled: bool | None = None) -> Any:
        shown.append(enabled)
        return track(items, what, enabled=False)

    monkeypatch.setattr("jacops._jax.sweeps.track", noted)
    for progress in (True, False, None):
        CALLS["compute_jacobian"](linear(), progress=progress)
    assert shown == [True, False, None]
