"""Proofs of earlier calls about a function, so that a check is run once and not in every call.

A proof belongs to one function, in one setting (shapes, dtypes, modes), for one recorded graph. It ends when the graph
or what it depends on (`evidence`) changes. So a model is recorded first, and only then is it asked what is known of it.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._requirements import check_choice
from ..._runtime.restoring import process_lock
from ..._runtime.side_effects import SideEffects
from ..._space import Space
from ..._trees import Tree
from ..._words import Checks
from .bounded import Bounded, Repeated
from .evidence import NeutralEntries, Places, constants, hold, neutral, pattern
from .graph import GraphInfo

_SETTINGS = 64  # of one function: some shapes of batches times some public calls; the oldest goes
_GRAPHS = 8  # of one setting: a flag or a branch gives a few
_CLAIMS = 64  # of one graph: each for a number of rows
_PATIENCE = 16  # recordings until a refused route is tried again; twice as many each time it fails again
_SPOT_EVERY = 16  # recordings that rely on a proof: a check takes about half of the shortest call, so 3 % at most


@dataclass(frozen=True)
class Refusal:
    """Why a route is not taken.

    Attributes:
        reason: In words.
        loud: It is worth a warning.
        lasting: It holds for other values of the samples too.
    """

    reason: str
    loud: bool = True
    lasting: bool = True


@dataclass
class _Refused:
    refusal: Refusal
    until: int
    patience: int


class Proofs:
    """Verdicts about one recorded graph.

    Args:
        checks: `"first"` checks a route once per shape, `"always"` each time, `"strict"` each time and every pair of
            samples, `"never"` not at all.
        function: What was recorded, for the tensors that proofs depend on; None where nothing is remembered.

    Attributes:
        effects: What the forward was seen to do besides arithmetic; None where it was not watched.
        widths: Numbers per sample that each submodule gives, where they were noted.
        known: Further results of routes, by their own keys.
        measured: What the shapes of the graph alone determine; recordings that are kept share it.
    """

    def __init__(self, checks: str = "first", function: Callable[[], Any] = lambda: None) -> None:
        self.checks = checks
        self.effects: SideEffects | None = None
        self.widths: dict[str, int | None] = {}
        self.known: Bounded[Any] = Bounded(_CLAIMS)
        self.measured: Bounded[Any] = Bounded(_CLAIMS)
        self._function = function
        self._proved: Bounded[bool] = Bounded(_CLAIMS)
        self._refused: dict[tuple[str, str], _Refused] = {}
        self._rests_on: list[NeutralEntries] | None = None
        self._age = 0
        self._relied: Counter[str] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without proofs: they belong to one function, and their keys to this process."""
        return Proofs, (self.checks,)

    def renew(self) -> None:
        """Begin a recording: forget all if what proofs depend on has changed."""
        self._age += 1
        if self._rests_on is not None and not hold(self._rests_on):
            self._proved.clear()
            self._refused.clear()
            self.known.clear()
        self._rests_on = self._rests_on if self._proved else None

    def needs(self, *route: Hashable) -> bool:
        """Return whether `route` still has to be checked."""
        return self.checks in ("always", "strict") or (self.checks == "first" and route not in self._proved)

    def remember(self, *route: Hashable) -> None:
        """Note that `route` was right."""
        if self.checks != "first" or route in self._proved:
            return
        self._rests_on = neutral(self._function())
        self._proved.take(route, lambda: True)

    def beside(self, proofs: Proofs) -> Proofs:
        """Return proofs of another graph in the form of these."""
        return proofs

    # ---- refusals ----------------------------------------------------------------------------------------------

    def refuse(self, question: str, route: str, refusal: Refusal | str = "") -> bool:
        """Note that `route` failed, and return whether that is new; it is tried again some recordings later."""
        known = self._refused.get((question, route))
        patience = _PATIENCE if known is None else 2 * known.patience
        refusal = Refusal(refusal) if isinstance(refusal, str) else refusal
        self._refused[question, route] = _Refused(refusal, self._age + patience, patience)
        return known is None

    def refusal(self, question: str, route: str) -> Refusal | None:
        """Return why `route` is not to be taken; None where it may be tried."""
        known = self._refused.get((question, route))
        if known is None or self._age >= known.until or self.checks in ("always", "strict"):
            return None
        return known.refusal

    def refused(self, question: str, route: str) -> bool:
        """Return whether `route` failed before."""
        known = self._refused.get((question, route))
        return known is not None and self._age < known.until

    # ---- checks of single samples ------------------------------------------------------------------------------

    def spot_due(self, what: str = "samples") -> bool:
        """Return whether a sample is to be checked alone: once in some recordings, so that routes are reproducible.

        Args:
            what: Is checked; each is counted by itself.
        """
        self._relied[what] += 1
        return self.checks == "first" and self._relied[what] % _SPOT_EVERY == 0

    def pick(self, many: int) -> int:
        """Return a sample to check, another one each time."""
        return random.Random(self._age).randrange(many)


class KeptProofs(Proofs):
    """What is known of a recording that outlives its call, while the model may change.

    What was proved when it was recorded holds for it, and what is proved on it later; what other recordings prove
    meanwhile does not: they may be of other weights. Anything else is that of the graph's proofs.

    Args:
        proofs: Of the graph.
        unchanged: Returns whether the model still is as it was recorded, so that what is proved holds for later calls.
    """

    def __init__(self, proofs: Proofs, unchanged: Callable[[], bool]) -> None:
        self._shared, self._unchanged = proofs, unchanged
        self._holds = set(proofs._proved)
        self.known = Bounded(_CLAIMS)
        self.known.update(proofs.known)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)

    def beside(self, proofs: Proofs) -> Proofs:
        """Return proofs of another graph, as those of a recording that is kept."""
        return self if proofs is self._shared else KeptProofs(proofs, self._unchanged)

    def needs(self, *route: Hashable) -> bool:
        """Return whether `route` still has to be checked."""
        return self.checks in ("always", "strict") or (self.checks == "first" and route not in self._holds)

    def spot_due(self, what: str = "samples") -> bool:
        """Return whether a sample is to be checked alone, counting all recordings of the graph."""
        return self._shared.spot_due(what)

    def remember(self, *route: Hashable) -> None:
        """Note that `route` was right."""
        if route in self._holds:
            return
        self._holds.add(route)
        if self._unchanged():
            self._shared.known.update(self.known)
            self._shared.remember(*route)


class _Graph:
    """Proofs for graphs of one wiring and sizes, by the constants in them."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.proofs: Bounded[Proofs] = Bounded(_GRAPHS)


class ProofStore:
    """What is known of a function in one setting.

    Args:
        checks: As for `Proofs`.
        function: Returns the function, None once it is gone.
        many: Samples along the first axis of its inputs, where that is known.

    Attributes:
        function: As given.
        latest: The proofs of the last graph.
        known: What holds for all graphs of this setting.
        domain: The space of the parameters in the last recording, whose names and shapes are part of the setting.
    """

    def __init__(self, checks: str, function: Callable[[], Any] = lambda: None, many: int | None = None) -> None:
        self.checks, self.many, self.function = checks, many, function
        self.latest: Proofs | None = None
        self.known: Bounded[Any] = Bounded(_CLAIMS)
        self.domain: Space | None = None
        self._graphs: Repeated[_Graph] = Repeated(_GRAPHS)

    @property
    def assumed(self) -> SideEffects | None:
        """What the forward is taken to do until its graph is known; None where it has to be watched."""
        effects = self.latest.effects if self.latest is not None and self.checks not in ("always", "strict") else None
        return None if effects is None or effects.reads else effects

    def proofs(self, graph_info: GraphInfo, effects: SideEffects | None = None) -> Proofs:
        """Return what is known of a recorded graph, nothing at first, and begin a recording of it.

        Args:
            graph_info: The graph.
            effects: What was seen while it was recorded; None where it was not watched.
        """
        reads = not (effects or self.assumed or SideEffects()).packs
        graph = self._graphs.take(graph_info.key, lambda: self._graph(graph_info) if reads else _Graph(()))
        found = self._of(graph, graph_info)
        found.renew()
        if effects is not None:
            found.effects = effects
        self.latest = found
        return found

    def refined(self, graph_info: GraphInfo, other: GraphInfo) -> Proofs:
        """Return what is known of a graph after another one, of fewer samples, showed which tensors are constants."""
        graph = self._graphs.get(graph_info.key)
        if graph is None or self.latest is None or graph_info.wiring != other.wiring or self.latest.effects is None:
            return self.latest or Proofs(self.checks)
        if not self.latest.effects.packs:
            same = constants(graph_info.nodes, self.function(), others=other.nodes)
            more = tuple(key for key in same if key not in graph.places)
            graph.places += more
            if more:
                found = self._of(graph, graph_info)
                found.effects, found.widths = self.latest.effects, self.latest.widths
                self.latest = found
        return self.latest

    def _graph(self, graph_info: GraphInfo) -> _Graph:
        return _Graph(constants(graph_info.nodes, self.function(), self.many))

    def _of(self, graph: _Graph, graph_info: GraphInfo) -> Proofs:
        key = pattern(tuple(graph_info.nodes), graph.places) if graph.places else b""
        return graph.proofs.take(key, lambda: Proofs(self.checks, self.function))


class SameObject:
    """A key that equals another one while both stand for the same living object, and keeps it not alive."""

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        try:
            self._reference: Any = weakref.ref(value)
        except TypeError:
            self._reference = lambda: None

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        own = self._reference()
        return own is not None and isinstance(other, SameObject) and own is other._reference()


_WORDS = (bool, int, float, complex, str, bytes, type(...))
_READ = (Tensor, np.ndarray, tuple, list, dict, slice)


def identity_key(value: Any) -> Hashable:
    """Return a key for a selector or a loss: numbers, words and arrays by value, anything else by identity."""
    if value is None:
        return None
    if type(value) in _WORDS:
        return (type(value), repr(value))
    if not isinstance(value, _READ):
        return SameObject(value)
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.detach().cpu().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, value.tobytes())
    if isinstance(value, tuple | list):
        return (type(value), *map(identity_key, value))
    if isinstance(value, dict):
        return (dict, *((identity_key(k), identity_key(v)) for k, v in value.items()))
    return (slice, identity_key(value.start), identity_key(value.stop), identity_key(value.step))


def held_key(tree: Tree) -> Hashable:
    """Return a key for what an input's structure holds: settings by value, tensors by what proofs may depend on."""
    return tuple((place, _held_key(leaf)) for place, leaf in tree.held)


def _held_key(leaf: Any) -> Hashable:
    """Return a tensor's shape and which entries can hide a path (0, 1, -1: `gate * x`), anything else by value."""
    if not isinstance(leaf, Tensor):
        return identity_key(leaf)
    kind = (leaf.shape, leaf.dtype, leaf.device)
    if leaf.numel() > _LOOKED_AT or leaf.layout is not torch.strided:
        return kind
    value = leaf.detach()
    if value.is_floating_point() or value.is_complex():
        value = torch.stack([value == 0, value == 1, value == -1])
    return (*kind, identity_key(value))


# Entries of a shared tensor that are looked at for a key: as many as of constants in a graph.
_LOOKED_AT = 2**16

_known: dict[int, tuple[weakref.ref[Any], Repeated[ProofStore]]] = {}


def store_for(function: Any, setting: Hashable, checks: str, many: int | None = None) -> ProofStore:
    """Return what is known of `function` in `setting`, empty at first; dropped with the function.

    Raises:
        InputError: `checks` is not one of the known words.
    """
    check_choice("checks", checks, Checks)
    if checks in ("always", "strict"):
        return ProofStore(checks, lambda: function, many)
    key = id(function)
    with process_lock:
        reference, settings = _known.get(key, (None, None))
        if reference is None or settings is None or reference() is not function:  # by identity: never by ==
            try:
                # No Python code runs when a function is deleted, since an interrupt in such a callback would be lost.
                # The entry is its own callback, after which the identity may be used again.
                reference = weakref.ref(function, partial(_known.pop, key))
            except TypeError:
                return ProofStore(checks, lambda: function, many)
            settings = Repeated(_SETTINGS)
            _known[key] = (reference, settings)
        return settings.take((setting, checks), lambda: ProofStore(checks, reference, many))
