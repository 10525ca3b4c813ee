"""Many problems of one shape: the Jacobian of each one's outputs by its own parameters, in sweeps that all share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._ladder.failures import RouteNotFiniteError, RouteWrongError
from ..._ladder.names import Question, RouteName
from ..._ladder.plan import Cost
from ..._ladder.route import answer
from ...errors import InputError
from ..sweeps.linearization import Linearization
from ..sweeps.mixing import NOT_FINITE, coupled
from ..sweeps.proofs import Proofs
from .sweeps import counts, sweep

Blocks = list[list[Tensor]]


@dataclass
class ProblemsAsk:
    """Blocks `J[output][leaf]`, `(n, *out, *in)`, of outputs `(n, *out)` by leaves `(n, *in)` whose rows are problems.

    Attributes:
        lin: Where the function was linearised.
    """

    lin: Linearization
    question: str = field(default="problems", init=False)
    argument: str = field(default="jacobian=", init=False)
    fallback: str = field(default="silent", init=False)
    asked: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.call, self.routes = self.lin.call, self.lin.routes
        self.shape = self.many = len(self.lin.leaves[0])

    @property
    def verdicts(self) -> Proofs:
        """What is known of the graph."""
        return self.lin.proofs

    def filled(self, direction: str) -> Blocks:
        """Return the blocks by sweeps in a direction."""
        blocks = [
            [torch.empty(*o.shape, *leaf.shape[1:], dtype=o.dtype, device=o.device) for leaf in self.lin.leaves]
            for o in self.lin.outputs
        ]
        if all(o.requires_grad for o in self.lin.outputs):
            sweep(self.lin, blocks, slice(0, self.many), direction)
            return blocks
        live = [i for i, o in enumerate(self.lin.outputs) if o.requires_grad]
        found = ProblemsAsk(self.lin.to([self.lin.outputs[i] for i in live], [str(i) for i in live]))
        own = found.filled(direction) if live else []
        return [own[live.index(i)] if i in live else [b.zero_() for b in row] for i, row in enumerate(blocks)]

    def coupled(self, blocks: Blocks) -> str | None:
        """Return why problems mix, or that values are not finite; None or empty if there is no reason."""
        return coupled(self.lin, blocks, slice(0, self.many))


class ProblemsIndependent:
    """The blocks are what plain sweeps over all problems give, with zeros between problems."""

    name, always = "problems independent", False

    def evidence(self, route: Any, ask: ProblemsAsk, found: Blocks) -> bool:
        """Return True where it is proved, False where only rounding was compared.

        Raises:
            RouteWrongError: It is refuted.
            RouteNotFiniteError: Values are not finite.
        """
        reason = ask.coupled(found)
        if reason == NOT_FINITE:
            raise RouteNotFiniteError(reason)
        if reason:
            raise RouteWrongError(reason)
        return reason is None


class ProblemsForward:
    """A push per parameter of a problem."""

    name, claims, leaving = "forward", (ProblemsIndependent(),), "silent"

    def refuses(self, ask: ProblemsAsk) -> str | None:
        """Pushes must not go row by row."""
        known = ask.verdicts.refusal(Question.PUSH, RouteName.DOUBLE_BACKWARD)
        return None if known is None else known.reason or "no second derivative rule"

    def cost(self, ask: ProblemsAsk) -> Cost:
        """A push per parameter, and one sweep to check."""
        return Cost(counts(ask.lin)[1] + 1)

    def describe(self, ask: ProblemsAsk) -> str:
        """Name the number of pushes."""
        return f"forward, {counts(ask.lin)[1]} pushes for all problems"

    def value(self, ask: ProblemsAsk) -> Blocks:
        """Return the blocks."""
        return ask.filled("forward")


class ProblemsReverse:
    """A pull per residual of a problem: plain `autograd.grad`, where problems are independent."""

    name, claims, leaving = "reverse", (), "never"

    def refuses(self, ask: ProblemsAsk) -> str | None:
        """It always applies."""
        return None

    def cost(self, ask: ProblemsAsk) -> Cost:
        """A pull per residual."""
        return Cost(counts(ask.lin)[0])

    def describe(self, ask: ProblemsAsk) -> str:
        """Name the number of pulls."""
        return f"reverse, {counts(ask.lin)[0]} pulls for all problems"

    def value(self, ask: ProblemsAsk) -> Blocks:
        """Return the blocks.

        Raises:
            InputError: The residual of one problem depends on the parameters of another.
        """
        blocks = ask.filled("reverse")
        proof = (self.name, ProblemsIndependent.name, ask.shape)
        if ask.verdicts.needs(*proof):
            reason = ask.coupled(blocks)
            if reason and reason != NOT_FINITE:
                came, needed = "one that mixes problems", f"each problem's residual must be its own ({reason})"
                raise InputError.of("model", came, needed, "Write it for one problem, without `vectorized=True`.")
            if reason is None:
                ask.verdicts.remember(*proof)
        return blocks


BY_PROBLEMS = (ProblemsForward(), ProblemsReverse())


def problem_jacobians(lin: Linearization) -> Blocks:
    """Return `J[output][leaf]`, `(n, *out, *in)`, of problems that are the rows of outputs and leaves.

    Raises:
        InputError: The residual of one problem depends on the parameters of another.
    """
    return answer(ProblemsAsk(lin), BY_PROBLEMS)
