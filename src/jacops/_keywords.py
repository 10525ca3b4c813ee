"""Arguments of public calls: a wrong one is an error that names the call, and the nearest keyword that it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from types import FunctionType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from .errors import InputTypeError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_RECEIVERS = ("self", "cls", "_cls")  # `_cls` in named tuples
_checked: set[type] = set()  # classes whose methods check their arguments
_MEANT: dict[str, tuple[str, ...]] = {  # what torch, SciPy, scikit-learn and libraries of the same purpose call it
    "device": (),  # as the model's; letters lead nowhere
    "fun": ("model",),
    "func": ("model",),
    "hessian_regularization": ("damping",),
    "inversion_method": ("solver",),
    "k": ("count", "rank"),
    "lambda_": ("damping",),
    "loss": ("kernel",),
    "maxiter": ("max_steps",),
    "method": ("solver",),
    "n_components": ("rank", "count"),
    "regularization": ("damping",),
    "tol": ("tolerance",),
    "vectorize": (),
    "x0": ("params",),
}
_SPECIAL = ("__init__", "__new__", "__call__")  # methods of these names are called as the object or its class is


class _Accepted(NamedTuple):
    """What a call accepts.

    Attributes:
        places: The arguments that can be given by place, in order.
        needed: How many of them have no default.
        most: How many arguments can be given by place.
        names: The keywords; None where any will do.
        instead: What to do instead, by names that other libraries have.
    """

    places: tuple[str, ...]
    needed: int
    most: float
    names: frozenset[str] | None
    instead: Mapping[str, str]

    @classmethod
    def of(cls, function: Callable[..., Any], options: type | None, instead: Mapping[str, str]) -> _Accepted:
        """Return what a function accepts, `**options` being those of a typed dict."""
        parameters = list(inspect.signature(function).parameters.values())
        kinds = {p.kind for p in parameters}
        places = [p for p in parameters if p.kind in _BY_PLACE]
        most = float("inf") if inspect.Parameter.VAR_POSITIONAL in kinds else len(places)
        needed = sum(p.default is p.empty for p in places)
        named = {p.name for p in parameters if p.kind in _BY_NAME and p.name not in _RECEIVERS}
        anything = options is None and inspect.Parameter.VAR_KEYWORD in kinds
        names = None if anything else frozenset(named | keys_of(options))
        return cls(tuple(p.name for p in places), needed, most, names, instead)

    def check(self, function: Any, call: str | None, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        """Refuse arguments that the call does not have, that come twice, or that are missing.

        Raises:
            InputTypeError: There is one.
        """
        call = call or _called(function, args)
        method = self.places[:1] and self.places[0] in _RECEIVERS
        for name in given:
            if self.names is not None and name not in self.names:
                raise unknown(call, name, self.names, self.instead.get(name, "")) from None
        if len(args) > self.most:
            more = sorted((self.names or frozenset()) - set(self.places))
            hint = f" Pass the others by keyword: {', '.join(f'`{name}`' for name in more)}." if more else ""
            took, came = int(self.most) - bool(method), len(args) - bool(method)
            plural, verb = "s" * (took != 1), "was" if came == 1 else "were"
            words = f"{call}() takes {took} positional argument{plural}, but {came} {verb} given.{hint}"
            raise InputTypeError(words) from None
        for place, name in enumerate(self.places):
            if place < len(args) and name in given:
                raise InputTypeError(f"{call}() has `{name}` twice, by position and by keyword.") from None
            if len(args) <= place < self.needed and name not in given:
                raise InputTypeError(f"{call}() needs `{name}`, which is missing.") from None


def keywords(
    options: type | None = None, *, call: str | None = None, instead: Mapping[str, str] | None = None
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Return a decorator that checks which arguments a public call is given before it runs.

    Args:
        options: The typed dict of the call's `**options`, where it has some.
        call: How messages name the call; by default as the function is named, methods after their class.
        instead: What to do instead, in a sentence, by names that other libraries have and this call does not.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        known: list[_Accepted] = []  # read at the first call, not at import; torch.compile refuses a cache

        def accepted() -> _Accepted:
            if not known:
                known.append(_Accepted.of(function, options, instead or {}))
            return known[0]

        @wraps(function)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            places, needed, most, names, _ = accepted()
            fits = needed <= len(args) <= most and (names is None or names.issuperset(kwargs))
            if not fits or (kwargs and not kwargs.keys().isdisjoint(places[: len(args)])):
                accepted().check(function, call, args, kwargs)
            return function(*args, **kwargs)

        @wraps(function)
        def tried(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except TypeError:
                accepted().check(function, call, args, kwargs)
                raise

        chosen = tried if _refuses(function) else checked
        chosen.__dict__["checked"] = True
        return chosen

    return decorate


def _refuses(function: Callable[..., Any]) -> bool:
    """Return whether Python refuses all wrong arguments before any code of a function runs.

    Most methods are like this. They are called inside the library too, where a look at the arguments takes as long as
    what some of them do.
    """
    plain = isinstance(function, FunctionType) and not hasattr(function, "__wrapped__")
    return plain and not function.__code__.co_flags & inspect.CO_VARKEYWORDS


def check_methods(*kinds: type) -> None:
    """Let constructors and public methods of classes, and of what derives from them, check their arguments.

    The classes are changed in place, once; what takes any arguments whatever is left as it is.
    """
    for kind in kinds:
        for base in kind.__mro__:
            if _is_ours(base) and base not in _checked:
                _checked.add(base)
                for name, value in list(vars(base).items()):
                    if name in _SPECIAL or not name.startswith("_"):
                        _check_method(base, name, value)
        check_methods(*filter(_is_ours, type.__subclasses__(kind)))


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __package__


def _check_method(owner: type, name: str, value: Any) -> None:
    function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    if not isinstance(function, FunctionType) or "checked" in vars(function):
        return
    flags = inspect.unwrap(function).__code__.co_flags
    if flags & inspect.CO_VARARGS and flags & inspect.CO_VARKEYWORDS:
        return
    checked = keywords()(function)
    setattr(owner, name, checked if function is value else type(value)(checked))


def _called(function: Any, args: tuple[Any, ...]) -> str:
    """Return how a user calls a function: by its name; a method after its class; a constructor by its class."""
    owner, _, name = function.__qualname__.rpartition(".")
    if name in _SPECIAL and args:
        return args[0].__name__ if isinstance(args[0], type) else type(args[0]).__name__
    return name if not owner or owner.endswith("<locals>") else f"{owner}.{name}"


def keys_of(options: type | None) -> frozenset[str]:
    """Return the keywords of a typed dict; none for None."""
    return frozenset[str]() if options is None else options.__optional_keys__ | options.__required_keys__  # pyright: ignore


def unknown(call: str, name: str, known: Iterable[str], instead: str = "") -> InputTypeError:
    """Return the error for a keyword that a call does not have."""
    if instead:
        return InputTypeError(f"{call}() has no keyword `{name}`. {instead}")
    names = sorted(known)
    within = [known for known in names if name in known.split("_")]  # `type`: `influence_type`
    meant = [known for known in _MEANT.get(name, ()) if known in names]
    letters = [] if name in _MEANT else get_close_matches(name, names, 1, 0.5)
    near = meant or (within if len(within) == 1 else letters)
    listed = f"It has {', '.join(f'`{one}`' for one in names)}." if names else "It takes none."
    return InputTypeError(f"{call}() has no keyword `{name}`. {f'Did you mean `{near[0]}`?' if near else listed}")
