"""Kinds of operators by their spaces: from a space to itself, backwards, and put together from others."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from .._space import Space
from ._base import Operator


class OnSpace(Operator):
    """An operator from a space to itself.

    Attributes:
        space: Where it acts.
    """

    space: Any

    @property
    def domain(self) -> Space:
        """Where it acts."""
        return self.space

    @property
    def codomain(self) -> Space:
        """Where it acts."""
        return self.space


class Backwards(Operator):
    """An operator from the codomain of another one to its domain.

    Attributes:
        of: The other one.
    """

    of: Any

    @property
    def domain(self) -> Space:
        """The codomain of the operator."""
        return self.of.codomain

    @property
    def codomain(self) -> Space:
        """The domain of the operator."""
        return self.of.domain


class Composite(Operator):
    """An operator that is put together from others."""

    _own = "part by part"

    @property
    @abstractmethod
    def _parts(self) -> tuple[Operator, ...]:
        """The others, in the order in which they are written."""

    @property
    def domain(self) -> Space:
        """What all parts take."""
        return self._parts[0].domain

    @property
    def codomain(self) -> Space:
        """What all parts give."""
        return self._parts[0].codomain

    @property
    def symmetric(self) -> bool:
        """All parts are."""
        return all(part.symmetric for part in self._parts)

    @property
    def positive(self) -> bool:
        """All parts are."""
        return all(part.positive for part in self._parts)
