r"""The interface between a framework and the rest of the library.

A model is recorded at a point: `push` is $J v$ and `pull` is $J^\top u$ there, for many rows at once; `map_rows` is the
Jacobian of every sample alone. Operators, objectives, Fisher matrices, influences, leverage and Kronecker-factored
curvature are built from these, whatever the framework. Numbers cross as torch tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from .._requirements import check_choice, check_positive
from .._words import Checks, Fallback

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeIs

    from .._space import Space
    from .._trees import Tree

Picked = Callable[[str, Any], bool]
Shift = Callable[[Any, int], Any]  # parameter and its number -> what is added to it
Group = TypeVar("Group")
Gradients = TypeVar("Gradients", covariant=True)


@dataclass(frozen=True)
class SweepOptions:
    """How a model is differentiated for one public call.

    Attributes:
        call: The public call.
        parameters: The parameters that are differentiated, by name and array; None for the inputs.
        outputs: Part of the output.
        target: One output per sample, where samples are differentiated alone.
        shared: Which inputs have no axis of samples, there too.
        at: A submodule to differentiate at.
        mode: Direction of the sweeps of a Jacobian by samples: `"auto"`, `"forward"` or `"reverse"`.
        checks: `"first"`, `"always"`, `"strict"` or `"never"` compare batched sweeps with single ones.
        fallback: `"warn"`, `"silent"` or `"error"` where batched or compiled sweeps are left.
        batch_size: Most rows to a sweep; None where only their size counts.
        progress: Show a progress bar; None on a terminal only.

    Raises:
        InputError: `checks` or `fallback` is no word that is known, or `batch_size` is not positive.
    """

    call: str
    parameters: Picked | None = None
    outputs: Any = None
    at: Any = None
    target: Any = None
    shared: Any = None
    mode: str = "auto"
    checks: str = "first"
    fallback: str = "warn"
    batch_size: int | None = None
    progress: bool | None = False

    def __post_init__(self) -> None:
        check_choice("checks", self.checks, Checks)
        check_choice("fallback", self.fallback, Fallback)
        if self.batch_size is not None:
            check_positive("batch_size", self.batch_size)


class Linearized(Protocol):
    """The Jacobian of a function at the point where it was recorded."""

    @property
    def call(self) -> str:
        """The public call."""
        ...

    @property
    def weights(self) -> Any:
        """A value that changes when the parameters are written into; None where they cannot be."""
        ...

    @property
    def routes(self) -> Mapping[str, str]:
        """How products were computed, by what they are."""
        ...

    @property
    def outputs(self) -> Sequence[Tensor]:
        """What the function gave."""
        ...

    @property
    def domain(self) -> Space:
        """What the function was differentiated by."""
        ...

    @property
    def codomain(self) -> Space:
        """The function's output."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes that are kept for products."""
        ...

    def is_connected(self) -> bool:
        """Return whether a path leads from the output to anything it is differentiated by."""
        ...

    def push_rows(self, rows: Sequence[Tensor], /, create_graph: bool = False) -> list[Tensor]:
        """Return $J v$ for rows of `v`: `(k, *shape)` for each array of the domain gives that of the codomain."""
        ...

    def pull_rows(
        self, rows: Sequence[Tensor], /, create_graph: bool = False, out: list[Tensor] | None = None
    ) -> list[Tensor]:
        r"""Return $J^\top u$ for rows of `u`, written into `out` where that is given."""
        ...


class Recorded(Protocol):
    """A function that was run once: its Jacobian there, its output, and the structure of that."""

    @property
    def lin(self) -> Any:
        """Its pushes and pulls, as in `Linearized`."""
        ...

    @property
    def tree(self) -> Tree:
        """The structure of the output."""
        ...

    @property
    def output(self) -> Any:
        """The output, in torch tensors."""
        ...


class SampleRows(NamedTuple):
    """Rows of the Jacobian of every sample alone.

    Attributes:
        domain: What the function was differentiated by.
        rows: `(samples, rows of each, domain.dim)`.
        output: Shape of one sample's output; `()` for a loss.
        route: How they were computed.
    """

    domain: Space
    rows: Tensor
    output: tuple[int, ...]
    route: str


class LayerGradients(Protocol[Group, Gradients]):
    """Gradients of single samples as what they are products of, for Kronecker-factored curvature."""

    def groups(self) -> tuple[Group, ...]:
        """Return the parameters in groups, each of which is one block of the curvature."""
        ...

    def entries(self, groups: Sequence[Group]) -> int:
        """Return how many numbers one cotangent at the output costs."""
        ...

    def misfit(self, groups: Sequence[Group]) -> int | None:
        """Return a parameter that enters in another way than its group has."""
        ...

    def gradients(self, groups: Sequence[Group], seeds: Tensor) -> Iterable[Gradients]:
        """Return, once, what each group's gradients are made of, under cotangents `(k, n, entries)` at the output."""
        ...


class FrameworkModel(Protocol):
    """A model of another framework than torch, with its parameters; it goes wherever a module goes."""

    def named(self) -> Iterable[tuple[str, Any]]:
        """Return the parameters that can be differentiated, by their names."""
        ...

    @property
    def total(self) -> int:
        """Entries of all parameters."""
        ...

    def space(self, parameters: Picked | None) -> Space:
        """Return the parameters that are differentiated."""
        ...

    def point(self, parameters: Picked | None) -> Tensor:
        """Return those as they are, `(P,)`."""
        ...

    def value(self, loss: Any, x: Any, y: Any, options: SweepOptions, shift: Shift | None = None) -> float:
        """Return the loss of a batch; with `shift`, which may make it NaN, at parameters that are a little off."""
        ...

    def gradient(self, loss: Any, x: Any, y: Any, options: SweepOptions) -> Tensor:
        """Return the gradient `(P,)` of a batch's loss."""
        ...

    def weighted(self, loss: Any, weights: Tensor) -> Any:
        """Return a loss that is the sum of the rows' own losses times weights."""
        ...

    def mixed(self, loss: Any, x: Any, y: Any, rows: Tensor, options: SweepOptions) -> Tensor:
        """Return `(k, n, *x)`, the derivative of `rows @ g_i` by sample i's input."""
        ...

    def fingerprint(self, loss: Any, more: str) -> str:
        """Return a digest of all parameters, of the functions' names, and of a text."""
        ...

    def record(self, inputs: Any, options: SweepOptions) -> Recorded:
        """Record the output by the parameters picked, or by the inputs."""
        ...

    def record_loss(self, loss: Any, x: Any, y: Any, options: SweepOptions) -> Recorded:
        """Record the gradient of the loss of one batch by the parameters: its Jacobian is the Hessian."""
        ...

    def record_at_output(self, found: Any, loss: Any, y: Any, call: str) -> Recorded:
        """Record the gradient of a loss by the model's output, at the output that was recorded."""
        ...

    def slope(self, found: Any) -> Tensor:
        """Return the gradient that `record_loss` or `record_at_output` recorded, flat."""
        ...

    def likelihood(self, found: Any, loss: Any, y: Any) -> Any:
        """Return the likelihood of which a loss is the negative logarithm, None where there is none."""
        ...

    def map_rows(self, x: Any, options: SweepOptions, y: Any = None, loss: Any = None) -> SampleRows:
        """Return the gradient of every sample's loss, or the Jacobian of its output, by parameters or by its input."""
        ...

    def layers(self, x: Any, parameters: Picked | None, call: str) -> LayerGradients[Any, Any]:
        """Return the gradients of single samples by layers."""
        ...


def everything(name: str, array: Any) -> bool:
    """Pick all parameters."""
    return True


def is_framework_model(model: Any) -> TypeIs[FrameworkModel]:
    """Return whether a model answers what `FrameworkModel` has; by its type, at the cost of one look-up."""
    return hasattr(type(model), "record_at_output")
