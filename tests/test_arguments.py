"""Arguments that a public call does not have: refused in the call's own name, by every function, method and class."""

import functools
import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from types import FunctionType
from typing import Any, get_args

import pytest
import torch

import jacops
from jacops import JacopsError, _words
from jacops._keywords import keywords
from jacops._options import JacobianOptions
from jacops._requirements import check_choice
from jacops.errors import InputError, InputTypeError
from jacops.fit import _kernels, _named_solvers, _strategies
from jacops.solvers import _names

MODULES = [value for name in jacops.__all__ if inspect.ismodule(value := getattr(jacops, name))]
SPACES = [jacops, *MODULES, jacops.testing]  # which `dir(jacops)` has no room for
JAX = ("JaxFunction", "JaxTensorUtilities", "JaxTwiceDifferentiable")


def public() -> Iterator[tuple[str, Any]]:
    """Yield every public function and class, by its name."""
    for space in SPACES:
        for name in getattr(space, "__all__", None) or [n for n in dir(space) if not n.startswith("_")]:
            value = getattr(space, name)
            is_call = inspect.isroutine(value) or isinstance(value, type)  # `eye` is an object that refuses calls
            if is_call and getattr(value, "__module__", "").startswith("jacops"):
                yield f"{space.__name__}.{name}", value
    yield from ((f"jacops.{name}", getattr(jacops, name)) for name in JAX)


def described(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the constructor and the public methods of a class that are ours, as they are called."""
    for name in dir(kind):
        owner = next((base for base in kind.__mro__ if name in vars(base)), type)
        if not owner.__module__.startswith("jacops"):
            continue
        function = inspect.unwrap(getattr(vars(owner)[name], "__func__", vars(owner)[name]))
        if not isinstance(function, FunctionType):
            continue
        if name in ("__init__", "__new__") and not inspect.isabstract(kind):
            yield "", kind
        elif not name.startswith("_") or name == "__call__":
            yield f".{name}", getattr(kind, name)


def calls() -> dict[str, Callable[..., Any]]:
    found = {}
    for name, value in public():
        if not isinstance(value, type):
            found[name] = value
        elif not issubclass(value, Enum) and not getattr(value, "_is_protocol", False):
            found |= {f"{name}{method}": call for method, call in described(value)}
    return found


def takes_anything(call: Callable[..., Any]) -> bool:
    """Return whether a call hands any keyword on, as `plan` and `Function.forward` do."""
    kinds = inspect.signature(call).parameters.values()
    options = [p for p in kinds if p.kind is p.VAR_KEYWORD]
    return bool(options) and "Unpack[" not in str(options[0].annotation)


ALL = calls()
CALLS = {name: call for name, call in ALL.items() if not takes_anything(call)}
# `plan` takes what the call takes that it plans, a function what it was made from takes; the others are published.
HAND_ON = {"plan", "forward", "__call__", "cat", "stack"}


def test_the_walk_finds_functions_methods_and_constructors() -> None:
    functions = ("jacops.hessian", "jacops.linalg.trace", "jacops.testing.check_operator")
    methods = (
        "sparse.SparsePlan.evaluate",
        "linalg.Operator.dense",
        "results.Influences.top",
        "results.Contributions.plot",
    )
    for name in (
        *functions,
        *(f"jacops.{m}" for m in methods),
        "jacops.solvers.CG",
        "jacops.Problem",
        "jacops.JaxFunction",
    ):
        assert name in CALLS, name


def test_no_call_takes_keywords_that_nobody_named() -> None:
    assert {name.rpartition(".")[2] for name in ALL.keys() - CALLS.keys()} <= HAND_ON


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_keyword_names_the_call(name: str) -> None:
    with pytest.raises(InputTypeError, match=r"has no keyword `no_such_keyword`") as caught:
        CALLS[name](no_such_keyword=1)
    called = str(caught.value).partition("(")[0]
    assert called.rpartition(".")[2] == name.rpartition(".")[2]


@pytest.mark.parametrize("name", CALLS)
def test_a_misspelt_keyword_gets_the_nearest_one(name: str) -> None:
    parameters = inspect.signature(CALLS[name]).parameters.values()
    known = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    for keyword in known - {"self", "cls", "_cls"}:
        with pytest.raises(InputTypeError, match=rf"Did you mean `{keyword}`\?"):
            CALLS[name](**{f"{keyword}{keyword[-1]}": 1})


@pytest.mark.parametrize("name", CALLS)
def test_too_many_arguments_name_the_call(name: str) -> None:
    parameters = inspect.signature(CALLS[name]).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        pytest.skip("it takes any number of them")
    with pytest.raises(InputTypeError, match=r"takes \d+ positional arguments?, but \d+ w\w+ given"):
        CALLS[name](*[None] * (len(parameters) + 2))


def test_a_message_counts_arguments_as_the_user_does_and_names_keywords() -> None:
    model, x = torch.nn.Linear(2, 1), torch.ones(3, 2)
    J = jacops.jacobian(model, x)
    with pytest.raises(InputTypeError, match=r"^Operator\.gram\(\) takes 0 positional arguments, but 1 was given\.$"):
        J.gram(1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(InputTypeError, match=r"^compute_jacobian\(\) takes 3 .* but 4 were given\. Pass .*`outputs`"):
        jacops.compute_jacobian(model, x, 2, None)  # pyright: ignore[reportCallIssue]
    with pytest.raises(InputTypeError, match=r"^compute_jacobian\(\) needs `x`, which is missing\.$"):
        jacops.compute_jacobian(model)  # pyright: ignore[reportCallIssue]
    with pytest.raises(InputTypeError, match=r"^compute_jacobian\(\) has `model` twice"):
        jacops.compute_jacobian(model, x, model=model)  # pyright: ignore[reportCallIssue]
    with pytest.raises(InputTypeError, match=r"^CG\(\) has no keyword `tol`\. Did you mean `tolerance`\?$"):
        jacops.solvers.CG(tol=1e-3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("call", "keyword", "meant"),
    [("compute_influences", "method", "solver"), ("compute_influences", "inversion_method", "solver"),
     ("solve", "method", "solver"), ("compute_influences", "hessian_regularization", "damping"),
     ("levenberg_marquardt", "x0", "params"), ("levenberg_marquardt", "loss", "kernel"), ("eigenpairs", "k", "count")],
)  # fmt: skip
def test_a_keyword_of_other_libraries_gets_the_one_that_is_meant(call: str, keyword: str, meant: str) -> None:
    function = getattr(jacops, call, None) or getattr(jacops.linalg, call)
    with pytest.raises(InputTypeError, match=rf"no keyword `{keyword}`\. Did you mean `{meant}`\?"):
        function(**{keyword: 1})


def test_a_keyword_of_another_meaning_gets_the_list() -> None:
    with pytest.raises(InputTypeError, match=r"no keyword `vectorize`\. It has `at`"):
        jacops.compute_jacobian(vectorize=True)  # pyright: ignore[reportCallIssue]


def test_a_misspelt_word_gets_the_nearest_one() -> None:
    b, identity = torch.ones(2), jacops.linalg.Matrix(torch.eye(2), symmetric=True)
    with pytest.raises(InputError, match=r"`solver` is 'CG', .* Did you mean 'cg'\?"):
        jacops.solve(identity, b, "CG")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"`which` is 'large', .* Did you mean 'largest'\?"):
        jacops.linalg.eigenpairs(identity, 1, "large")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"`which` is 'xyz', but one of 'largest', .* is needed\.$"):
        jacops.linalg.eigenpairs(identity, 1, "xyz")  # pyright: ignore[reportArgumentType]


def test_a_tensor_in_place_of_a_word_is_named_by_its_shape() -> None:
    with pytest.raises(InputError, match=r"^`wrt` is a tensor \(2, 3\), but one of 'parameters'"):
        jacops.jacobian(torch.nn.Linear(3, 1), {}, torch.ones(2, 3))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("home", ["linalg", "solvers", "fit", "results", "errors"])
def test_a_name_of_a_namespace_is_found_from_the_package(home: str) -> None:
    for name in getattr(jacops, home).__all__:
        if not hasattr(jacops, name):
            with pytest.raises(AttributeError, match=rf"no attribute '{name}'; it is jacops\.\w+\.{name}$"):
                getattr(jacops, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'$"):
        _ = jacops.no_such_name  # pyright: ignore[reportAttributeAccessIssue]


def test_an_error_inside_a_call_is_not_taken_for_a_wrong_argument() -> None:
    @keywords()
    def call(a: int, b: int = 0) -> int:
        return len(a)  # pyright: ignore[reportArgumentType]

    with pytest.raises(TypeError, match="has no len") as caught:
        call(1, b=2)
    assert not isinstance(caught.value, JacopsError)
    with pytest.raises(InputTypeError, match=r"no keyword `c`") as wrong:
        call(1, c=2)  # pyright: ignore[reportCallIssue]
    assert wrong.value.__suppress_context__, "what Python says of it is shown beside the message"


def test_arguments_are_refused_before_any_code_runs() -> None:
    ran: list[object] = []

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            ran.append(function)
            return function(*args, **kwargs)

        return call

    def plain(a: int) -> None:
        ran.append(a)

    def anything(a: int, **options: Any) -> None:
        ran.append(options)

    for call in (keywords()(plain), keywords()(around(plain)), keywords(JacobianOptions)(anything)):
        for args, given in (((), {}), ((1, 2), {}), ((1,), {"no": 1}), ((1,), {"a": 1})):
            with pytest.raises(InputTypeError):
                call(*args, **given)
    assert not ran


WORDS = {name: value for name, value in vars(_words).items() if get_args(value)}


@pytest.mark.parametrize("name", WORDS)
def test_a_word_is_checked_against_its_type(name: str) -> None:
    for word in get_args(WORDS[name]):
        assert check_choice("argument", word, WORDS[name]) == word
    for wrong in ("", "no such word", None, 1, torch.ones(2), [get_args(WORDS[name])[0]]):
        with pytest.raises(InputError, match=f"one of '{get_args(WORDS[name])[0]}'"):
            check_choice("argument", wrong, WORDS[name])


def test_every_name_of_a_type_stands_for_something() -> None:
    assert set(_names.NAMES) == set(get_args(_words.SolverName))
    assert set(_named_solvers._NAMES) == set(get_args(_words.StepSolverName))
    assert set(_strategies._NAMES) == set(get_args(_words.StrategyName))
    assert {"linear", *_kernels._NAMES} == set(get_args(_words.KernelName))
