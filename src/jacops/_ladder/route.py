"""Routes: several ways to one result. Each is declared once; `answer` tries them, and is all that catches a failure.

A question has one tuple of routes, such as `PULLS` or `WHOLE`. Its planner, the descriptions in reprs, and the warnings
are made from that tuple: to add a route, write an object with the members of `Route` and put it into the tuple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ..errors import NotDifferentiableError, warn
from .failures import RouteFailedError, RouteUndecidedError, RouteWrongError, attempt
from .plan import Cost


class Verdicts(Protocol):
    """What earlier calls proved and refused; each entry ends when what it depends on changes."""

    @property
    def checks(self) -> str:
        """How often claims are proved; not at all for `"never"`."""
        ...

    def needs(self, *proof: Any) -> bool:
        """Return whether `proof` still has to be made."""
        ...

    def remember(self, *proof: Any) -> None:
        """Note that `proof` was made."""
        ...

    def refuse(self, question: str, route: str, refusal: Any = "") -> bool:
        """Note that a route failed; return whether that is new."""
        ...

    def refusal(self, question: str, route: str) -> Any:
        """Return why a route is not taken, None where it may be tried: an object with a `reason`.

        It is `loud` where the route failed, and not where it was only measured slower.
        """
        ...


class Ask(Protocol):
    """One question and the public call that it belongs to; routes of a question use its further fields.

    Attributes:
        question: Under what refusals and descriptions are kept, such as `"pull"`.
        asked: The route that the user requested by name; leaving it is always worth a warning.
        verdicts: What is known about routes.
        call: The public call on whose behalf this is done.
        fallback: `"warn"`, `"silent"` or `"error"` when a route is left.
        shape: What a proof is valid for besides the recorded graph: the number of rows, the names of parameters.
        routes: Descriptions of the routes taken, by question; reprs print them.
    """

    question: Any
    asked: Any
    verdicts: Any
    call: Any
    fallback: Any
    shape: Any
    routes: Any


class Claim(Protocol):
    """A statement that a route depends on, with its evidence.

    Attributes:
        name: What proofs are kept under.
        always: The evidence is so cheap that it is looked at in every call.
    """

    name: Any
    always: Any

    def evidence(self, route: Any, ask: Any, found: Any) -> bool:
        """Return whether a route's result proves the claim for later calls; False if it is undecided.

        Raises:
            RouteWrongError: The claim is refuted.
            RouteNotFiniteError: Values are not finite, which proves nothing.
        """
        ...


class Route(Protocol):
    """One way to a result.

    Attributes:
        name: What plans, reprs and refusals call it.
        claims: What is proved before its result is returned, once per graph and shape.
        leaving: What leaving it means. `"silent"`: the next route is as exact, and slower by a constant. `"noted"`:
            `fallback="error"` forbids it. `"warned"`: it is worth a warning, as wrong numbers are for `"noted"` too.
            `"never"`: it is the plain route, which defines what is right, and whose errors are the caller's.
    """

    name: Any
    claims: Any
    leaving: Any

    def refuses(self, ask: Any) -> str | None:
        """Return why it does not apply, None if it does; plans and reprs print it (`""`: not worth a word).

        Raises:
            RouteFailedError: What has to be prepared for it failed, which is kept as a failure of the route is.
        """
        ...

    def cost(self, ask: Any) -> Cost:
        """Return its sweeps and bytes."""
        ...

    def describe(self, ask: Any) -> str:
        """Return how the result is computed, in words."""
        ...

    def value(self, ask: Any) -> Any:
        """Return the result.

        Raises:
            RouteFailedError: It cannot be computed in this way.
        """
        ...


@dataclass
class Asked:
    """What is asked, with the fields of `Ask`; `left` is the failure of the last route that was left."""

    question: str
    call: str
    verdicts: Verdicts
    fallback: str = "silent"
    shape: Any = ()
    asked: str | None = None
    routes: dict[str, str] = field(default_factory=dict)
    left: RouteFailedError | None = None


@dataclass(frozen=True)
class Way:
    """A route that is a function of the question, for questions whose routes stand in order.

    Attributes:
        name: As for every route, like `claims` and `leaving`.
        value: Returns the result.
        refusal: Returns why it does not apply; by default it does.
        words: Describes it; by default by its name.
    """

    name: str
    value: Callable[[Any], Any]
    refusal: Callable[[Any], str | None] = lambda ask: None
    words: Callable[[Any], str] | None = None
    claims: tuple[Claim, ...] = ()
    leaving: str = "silent"

    def refuses(self, ask: Any) -> str | None:
        """Return why it does not apply."""
        return self.refusal(ask)

    def cost(self, ask: Any) -> Cost:
        """Not compared."""
        return Cost(math.inf)

    def describe(self, ask: Any) -> str:
        """Return what it does."""
        return self.name if self.words is None else self.words(ask)


def refused(ask: Any, route: Route) -> str | None:
    """Return why a route is not taken: what an earlier call found, or the route's own reason; None if it may be."""
    known = ask.verdicts.refusal(ask.question, route.name)
    return _own_reason(ask, route) if known is None else str(known.reason)


def _own_reason(ask: Any, route: Route) -> str | None:
    try:
        return route.refuses(ask)
    except RouteFailedError as error:
        _keep(ask, route, error)
        return str(error)


def candidates(ask: Any, routes: Sequence[Any]) -> list[tuple[Route, str | None]]:
    """Return routes with the reason why each is not taken: the one requested, then by sweeps, then in their order."""
    applying, others = list[Route](), list[tuple[Route, str]]()
    for route in routes:
        reason = refused(ask, route)
        if reason is None:
            applying.append(route)
        else:
            others.append((route, reason))
    asked = ask.asked
    if asked is not None:
        others.sort(key=lambda pair: pair[0].name != asked)
    return [*[(route, None) for route in _by_sweeps(ask, applying)], *others]


def _by_sweeps(ask: Any, routes: Sequence[Route]) -> Sequence[Route]:
    """Return routes that apply: the one requested, then by sweeps, then in their order."""
    if len(routes) < 2:
        return routes
    asked = ask.asked
    places = [(route.name != asked, route.cost(ask).sweeps, number) for number, route in enumerate(routes)]
    return [routes[number] for *_, number in sorted(places)]


def answer(ask: Ask, routes: Sequence[Any]) -> Any:
    """Return the result by the first candidate whose claims hold; see `answered`."""
    return answered(ask, routes)[0]


def answered(ask: Ask, routes: Sequence[Any]) -> tuple[Any, Route]:
    """Return the result by the first candidate whose claims hold, and that route.

    A route that fails is left: its reason is kept until its evidence changes, described in `ask.routes`, and warned
    of as `ask.fallback` asks. Errors for want of memory pass through, as do those of the plain route.

    Raises:
        RouteFailedError: No route is left.
        NotDifferentiableError: `fallback="error"` forbids the next route.
    """
    left: tuple[Route, RouteFailedError, bool] | None = None
    order = candidates(ask, routes)
    if ask.fallback == "error":
        _check_known(ask, routes)
    because = next((reason for _, reason in order if reason), "")
    for route, reason in order:
        if reason is not None or (left is not None and refused(ask, route) is not None):
            continue
        if left is not None:
            _report(ask, *left, route.describe(ask))
        try:
            found = route.value(ask) if route.leaving == "never" else attempt(partial(route.value, ask))
            proved = prove(ask, route, found)
        except RouteFailedError as error:
            because, left = str(error), (route, error, _keep(ask, route, error))
            if isinstance(ask, Asked):
                ask.left = error
            continue
        if because or route.leaving != "never" or ask.question not in ask.routes:
            evidence = f", proved: {', '.join(proved)}" if proved else ""
            ask.routes[ask.question] = route.describe(ask) + (f" (because {because})" if because else "") + evidence
        return found, route
    raise RouteFailedError(because or "no route applies") if left is None else left[1]


def prove(ask: Ask, route: Route, found: Any) -> list[str]:
    """Compare a route's result with the evidence of its claims, where that is not known yet.

    Returns:
        The claims that are proved, now or by an earlier call.

    Raises:
        RouteFailedError: A claim is refuted, or values are not finite.
    """
    proved = []
    for claim in route.claims:
        proof = (route.name, claim.name, ask.shape)
        if claim.always:
            holds = claim.evidence(route, ask, found)
        elif not ask.verdicts.needs(*proof):
            holds = ask.verdicts.checks != "never"
        elif holds := claim.evidence(route, ask, found):
            ask.verdicts.remember(*proof)
        if holds:
            proved.append(claim.name)
    return proved


def _check_known(ask: Ask, routes: Sequence[Any]) -> None:
    """Refuse to pass over what an earlier call found to fail, as that call was refused.

    Raises:
        NotDifferentiableError: The first route that applies failed earlier, and `fallback="error"` forbids the next.
    """
    for route in _by_sweeps(ask, [route for route in routes if _own_reason(ask, route) is None]):
        known = ask.verdicts.refusal(ask.question, route.name)
        if known is None:
            return
        if known.loud:
            _check_allowed(ask, route, known.reason)


def _check_allowed(ask: Ask, route: Route, reason: Any) -> None:
    if ask.fallback == "error" and (route.leaving != "silent" or route.name == ask.asked):
        raise NotDifferentiableError(f"{ask.call}: {reason}, and fallback='error' forbids the plain route.")


def _keep(ask: Any, route: Route, error: RouteFailedError) -> bool:
    """Keep why a route failed; return whether that is new; what proves nothing about the route is not kept."""
    return not isinstance(error, RouteUndecidedError) and ask.verdicts.refuse(ask.question, route.name, str(error))


def _report(ask: Ask, route: Route, error: RouteFailedError, news: bool, instead: str) -> None:
    """Report that a route was left, as `fallback` requires."""
    asked = route.name == ask.asked
    _check_allowed(ask, route, error)
    wrong = route.leaving == "noted" and isinstance(error, RouteWrongError)
    if news and ask.fallback == "warn" and (asked or route.leaving == "warned" or wrong):
        warn(f"{ask.call}: {error}. Route used: {instead}.")
