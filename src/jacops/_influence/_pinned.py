"""What all tiles of a stored run depend on beside their place: the damping, the solver that was chosen, fitted factors.

One process computes them before there is a first tile, and others read them, so that a tile depends neither on the
process that computes it nor on what that process computed before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from .._saving import from_bytes, to_bytes
from ..errors import DataError, InputError, StoreDamagedError
from ..solvers import CG, EKFAC, MINRES, Auto, Direct, Solver
from ._damping import Damping, settled
from ._run import InfluenceRun

if TYPE_CHECKING:
    from ..store import StoredRun
    from ..store._states import TileStates

_CHOICES: dict[str, type[Solver]] = {kind.__name__: kind for kind in (CG, Direct, MINRES)}  # what `Auto` takes


@final
class SolveStates:
    """Where conjugate gradients keep their states: in the store, with the solutions of the tile that is solved for."""

    def __init__(self) -> None:
        self._tile: TileStates | None = None

    def solving(self, kept: StoredRun, number: int) -> None:
        """Set the tile that is solved for from now on."""
        self._tile = kept.states("factors", (number, 0))

    def load(self, name: str) -> bytes | None:
        """Return what was kept of the tile under a name."""
        return None if self._tile is None else self._tile.load(name)

    def keep(self, name: str, raw: bytes) -> None:
        """Keep bytes of the tile under a name."""
        if self._tile is not None:
            self._tile.keep(name, raw)


def facts_of(
    run: InfluenceRun, first: Callable[[], Tensor], states: SolveStates
) -> tuple[InfluenceRun, dict[str, Any]]:
    """Return a run with its damping and its solver settled, ready to solve, and what others need for the same.

    Args:
        run: The run.
        first: Gives the right-hand sides of the first tile.
        states: Where states of its solves are kept.
    """
    damping, solver = settled(run.asked, run.curvature, run.solver)
    facts: dict[str, Any] = {"damping": damping.value, "rule": damping.rule}
    if isinstance(solver, Auto):
        solver = solver.decided(run.curvature, damping.value, first)
        facts["solver"] = _named(solver)
    if (ekfac := _ekfac(solver)) is not None:
        raw = facts["factors"] = to_bytes(ekfac.approximate(run.curvature))
        # Read again, as other processes do: products with another memory layout round differently.
        factors = from_bytes(raw, "fitted factors", device=run.problem.space.device)
        solver = _with_ekfac(solver, replace(ekfac, factors=factors))
    found = replace(run, solver=_keeping(solver, states), known=damping)
    _ = found.prepared  # what cannot be solved leaves no store behind
    return found, facts


def damping_in(kept: StoredRun) -> Damping:
    """Return the damping of a stored run.

    Raises:
        StoreDamagedError: It is none.
    """
    value, rule = kept.fact("damping"), kept.fact("rule")
    if not isinstance(value, float | int) or not isinstance(rule, str):
        raise _damaged(kept, f"the damping is {value!r:.80}")
    return Damping(float(value), rule)


def pinned_by(run: InfluenceRun, kept: StoredRun, states: SolveStates) -> InfluenceRun:
    """Return a run with the damping and the solver of a stored one, which keeps states of its solves.

    Raises:
        StoreDamagedError: The store holds what no run writes.
    """
    solver = run.solver
    if isinstance(solver, Auto):
        solver = replace(solver, taken=_chosen(kept))
    if (ekfac := _ekfac(solver)) is not None:
        try:
            factors = from_bytes(kept.fact("factors"), f"{kept.path}: fitted factors", device=run.problem.space.device)
        except DataError as error:
            raise _damaged(kept, str(error)) from None
        solver = _with_ekfac(solver, replace(ekfac, factors=factors))
    return replace(run, solver=_keeping(solver, states), known=damping_in(kept))


def _keeping(solver: Solver, states: SolveStates) -> Solver:
    """Return a solver that keeps its states, where it is one that can."""
    if isinstance(solver, Auto) and solver.taken is not None:
        return replace(solver, taken=(_keeping(solver.taken[0], states), solver.taken[1]))
    return replace(solver, kept=states) if isinstance(solver, CG) else solver


def _ekfac(solver: Solver) -> EKFAC | None:
    """Return the EK-FAC that a solver fits, itself or as its preconditioner."""
    found = solver.preconditioner if isinstance(solver, CG) else solver
    return found if isinstance(found, EKFAC) else None


def _with_ekfac(solver: Solver, ekfac: EKFAC) -> Solver:
    return replace(solver, preconditioner=ekfac) if isinstance(solver, CG) else ekfac


def _named(solver: Auto) -> dict[str, Any]:
    """Return what was chosen in plain words and numbers."""
    chosen, why = solver.taken or (Direct(), "")
    options: dict[str, Any] = {f.name: getattr(chosen, f.name) for f in fields(chosen) if f.repr}  # pyright: ignore[reportArgumentType]
    return {"method": type(chosen).__name__, "options": options, "why": why}


def _chosen(kept: StoredRun) -> tuple[Solver, str]:
    found = kept.fact("solver")
    try:
        return _CHOICES[found["method"]](**found["options"]), str(found["why"])
    except (KeyError, TypeError, InputError):
        raise _damaged(kept, f"the solver is {found!r:.80}") from None


def _damaged(kept: StoredRun, reason: str) -> StoreDamagedError:
    return StoreDamagedError(kept.path, reason, "facts", (0, 0))
