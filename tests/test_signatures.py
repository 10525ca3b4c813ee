"""Signatures: those of the four published pages, word for word, and one set of arguments in all other calls."""

import inspect
from typing import Any

import pytest

import jacops

NEEDED = inspect.Parameter.empty
FLAG = ("create_graph", False)
# The positional part of every published signature: names, order and defaults. What we add is keyword-only.
PAGES: dict[str, list[tuple[str, Any] | str]] = {
    "compute_jacobian": ["model", "x", ("batch_size", 1024)],
    "project_jacobian": ["jacobian", "proj_tensor"],
    "reduce_contributions": ["contributions", ("method", "l2")],
    "verify_jacobian": ["Z", "J", "X"],
    "TwiceDifferentiable.grad": ["self", "x", "y", FLAG],
    "TwiceDifferentiable.hessian": ["self", "x", "y"],
    "TwiceDifferentiable.mvp": ["grad_xy", "v", "backprop_on"],
    "TorchTwiceDifferentiable.grad": ["self", "x", "y", FLAG],
    "TorchTwiceDifferentiable.hessian": ["self", "x", "y"],
    "TorchTwiceDifferentiable.mvp": ["grad_xy", "v", "backprop_on"],
    "TensorUtilities.cat": ["a"],
    "TensorUtilities.cat_gen": ["a", "resulting_shape", "model"],
    "TensorUtilities.einsum": ["equation"],
    "TensorUtilities.from_twice_differentiable": ["twice_diff"],
    "TensorUtilities.get_element": ["x", "idx"],
    "TensorUtilities.reshape": ["x", "shape"],
    "TensorUtilities.shape": ["x"],
    "TensorUtilities.slice": ["x", "start", "stop", ("axis", 0)],
    "TensorUtilities.stack": ["a"],
    "TensorUtilities.unsqueeze": ["x", "dim"],
    "InverseHvpResult": ["x", "info"],
    "jvp": ["func", "params", "v", FLAG],
    "vjp": ["func", "params", "v", FLAG],
    "model_jvp": ["model", "x", "v", FLAG],
    "model_vjp": ["model", "x", "v", FLAG],
    "batch_jvp": ["func", "params", "vs", FLAG],
    "batch_vjp": ["func", "params", "vs", FLAG],
    "full_jacobian": ["func", "params", FLAG],
    "modjac": ["model", ("input", None), FLAG, ("strict", False), ("vectorize", False), ("strategy", "reverse-mode"),
               ("flatten", False)],
}  # fmt: skip
FUNCTIONS = {n: v for n in jacops.__all__ if inspect.isfunction(v := getattr(jacops, n)) or n in ("Problem",)}
# What one idea is called everywhere, so that no second name for it creeps in (published pages apart).
OTHER_NAMES = {
    "func": "model", "differentiable_model": "model", "net": "model", "inversion_method": "solver",
    "trainable_only": "parameters", "params": "parameters", "tol": "tolerance", "maxiter": "max_steps",
    "max_iterations": "max_steps", "num_samples": "samples",
}  # fmt: skip


def test_the_package_itself_gives_the_everyday_calls_alone() -> None:
    assert len(dir(jacops)) <= 60
    assert dir(jacops) == sorted(jacops.__all__)
    documented = jacops.__doc__ or ""
    spaces = [name for name in jacops.__all__ if inspect.ismodule(getattr(jacops, name))]
    assert all(f"jacops.{name}" in documented for name in spaces)
    assert all(hasattr(getattr(jacops, space), name) for space in spaces for name in getattr(jacops, space).__all__)


@pytest.mark.parametrize("name", PAGES)
def test_a_published_signature_is_served_as_published(name: str) -> None:
    thing: Any = jacops
    for part in name.split("."):
        thing = getattr(thing, part)
    parameters = list(inspect.signature(thing).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    right = [(entry, NEEDED) if isinstance(entry, str) else entry for entry in PAGES[name]]
    assert [(p.name, p.default) for p in positional] == right
    rest = [p for p in parameters if p not in positional]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in rest)
    assert all(p.default is not NEEDED for p in rest if p.kind is p.KEYWORD_ONLY)


def test_mvp_has_its_published_keyword() -> None:
    for kind in (jacops.TwiceDifferentiable, jacops.TorchTwiceDifferentiable):
        assert inspect.signature(kind.mvp).parameters["progress"].default is False


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in PAGES])
def test_one_idea_has_one_name(name: str) -> None:
    fits = {"gauss_newton", "levenberg_marquardt"}  # `params` are their start values, as contracts say
    for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
        better = OTHER_NAMES.get(parameter.name)
        assert better is None or (name in fits and parameter.name == "params"), f"{parameter.name}: call it {better}"


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "plan"])  # which takes those of the call that it plans
def test_no_public_call_takes_unnamed_options(name: str) -> None:
    for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            assert "Unpack[" in str(parameter.annotation), f"**{parameter.name}: {parameter.annotation}"
