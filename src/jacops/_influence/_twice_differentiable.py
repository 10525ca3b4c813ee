"""The interface of models that can be differentiated twice, and of tensor operations, for any framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from .._interop import ArrayLike
from .._saving import Savable
from ..errors import InputError

TensorType = TypeVar("TensorType", bound=Sequence)
"""Tensors: sequences of numbers."""
ModelType = TypeVar("ModelType", bound="TwiceDifferentiable")
"""Models that can be differentiated twice."""
DataLoaderType = TypeVar("DataLoaderType", bound=Iterable)
"""Iterables of batches."""


@dataclass(frozen=True)
class InverseHvpResult(ArrayLike, Savable, Generic[TensorType]):
    """The solution of `A x = b`, with information about the solver; unpacks as `x, info`.

    Attributes:
        x: The solution, one row per right-hand side.
        info: What happened: true residuals, iterations, convergence, damping.
    """

    x: TensorType
    info: dict[str, Any]
    _array: ClassVar[str] = "x"

    def __iter__(self) -> Iterator[Any]:
        """Unpack as `x, info`."""
        return iter((self.x, self.info))


class TwiceDifferentiable(ABC, Generic[TensorType]):
    """A model with its loss: gradients and second derivatives by the parameters."""

    @property
    @abstractmethod
    def num_params(self) -> int:
        """Number of parameters that are differentiated."""

    @property
    @abstractmethod
    def parameters(self) -> list[TensorType]:
        """All the parameters that are differentiated."""

    def __repr__(self) -> str:
        """Return the type and how many parameters there are."""
        return f"{type(self).__name__}({self.num_params:,} parameters)"

    def grad(self, x: TensorType, y: TensorType, create_graph: bool = False) -> TensorType:
        """Return the gradient `[P]` of the loss by the parameters.

        Raises:
            NotImplementedError: The subclass has none.
        """
        raise NotImplementedError(f"{type(self).__name__}.grad")

    def hessian(self, x: TensorType, y: TensorType) -> TensorType:
        """Return the Hessian `[P, P]` of the loss by the parameters.

        Raises:
            NotImplementedError: The subclass has none.
        """
        raise NotImplementedError(f"{type(self).__name__}.hessian")

    @staticmethod
    @abstractmethod
    def mvp(grad_xy: TensorType, v: TensorType, backprop_on: TensorType, *, progress: bool = False) -> TensorType:
        """Return second derivatives along directions: `[D, P]` and `M` entries of `backprop_on` give `[D, M]`.

        Args:
            grad_xy: The gradient `[P]`, made with `grad(x, y, create_graph=True)`.
            v: Directions `[D, P]`, or one direction `[P]`.
            backprop_on: What to differentiate the gradient by.
            progress: Show a progress bar.
        """


class TensorUtilities(ABC, Generic[TensorType, ModelType]):
    """Tensor operations by framework, found through the type of the model.

    A subclass names its model type in `twice_differentiable_type` and is registered for it; it is used for models of
    subclasses of that type too. The first registration for a type is kept.
    """

    twice_differentiable_type: ClassVar[type[TwiceDifferentiable]]
    registry: ClassVar[dict[type[TwiceDifferentiable], type[TensorUtilities]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register non-abstract subclasses.

        Raises:
            TypeError: `twice_differentiable_type` is missing or no subclass of `TwiceDifferentiable`.
        """
        super().__init_subclass__(**kwargs)
        if _is_abstract(cls):
            return
        kind = getattr(cls, "twice_differentiable_type", None)
        if not (isinstance(kind, type) and issubclass(kind, TwiceDifferentiable)):
            raise TypeError(
                f"`twice_differentiable_type` of {cls.__name__} is {kind!r}, but a subclass of "
                "TwiceDifferentiable is needed. "
                "Set it as a class attribute."
            )
        TensorUtilities.registry.setdefault(kind, cls)

    @staticmethod
    @abstractmethod
    def einsum(equation: str, *operands: Any) -> Any:
        """Sum products of entries, by Einstein's convention."""

    @staticmethod
    @abstractmethod
    def cat(a: Sequence[Any], **kwargs: Any) -> Any:
        """Join tensors along an existing axis."""

    @staticmethod
    @abstractmethod
    def stack(a: Sequence[Any], **kwargs: Any) -> Any:
        """Join tensors along a new axis."""

    @staticmethod
    @abstractmethod
    def unsqueeze(x: Any, dim: int) -> Any:
        """Insert an axis of length one."""

    @staticmethod
    @abstractmethod
    def get_element(x: Any, idx: int) -> Any:
        """Return an element along the first axis that is longer than one."""

    @staticmethod
    @abstractmethod
    def slice(x: Any, start: int, stop: int, axis: int = 0) -> Any:
        """Return the entries from `start` to `stop` along an axis."""

    @staticmethod
    @abstractmethod
    def shape(x: Any) -> tuple[int, ...]:
        """Return the shape."""

    @staticmethod
    @abstractmethod
    def reshape(x: Any, shape: tuple[int, ...]) -> Any:
        """Return the same entries in another shape."""

    @staticmethod
    @abstractmethod
    def cat_gen(a: Iterator[Any], resulting_shape: tuple[int, ...], model: Any) -> Any:
        """Join tensors from a generator along the first axis into one of `resulting_shape`, compatible with `model`."""

    @classmethod
    def from_twice_differentiable(cls, twice_diff: TwiceDifferentiable) -> type[TensorUtilities]:
        """Return the tensor utilities for a model, looked up along the method resolution order of its type.

        Raises:
            KeyError: None is registered; the message names the type and the registered ones.
        """
        for ancestor in type(twice_diff).__mro__:
            if ancestor in TensorUtilities.registry:
                return TensorUtilities.registry[ancestor]
        known = sorted(kind.__name__ for kind in TensorUtilities.registry)
        raise KeyError(f"no TensorUtilities for {type(twice_diff).__name__}; known: {', '.join(known)}")


def _is_abstract(cls: type) -> bool:
    """Return whether a class leaves methods open; `__abstractmethods__` is not set yet in `__init_subclass__`."""
    return any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls))


class ArrayUtilities(TensorUtilities[Any, Any], ABC):
    """What torch's tensors and JAX's arrays do alike."""

    @staticmethod
    def unsqueeze(x: Any, dim: int) -> Any:
        """Insert an axis of length one."""
        return x[(slice(None),) * range(x.ndim + 1)[dim] + (None,)]

    @staticmethod
    def get_element(x: Any, idx: int) -> Any:
        """Return an element along the first axis that is longer than one; axes before it are dropped.

        Raises:
            InputError: There is no such element.
        """
        while x.ndim > 1 and x.shape[0] == 1:
            x = x[0]
        length = x.shape[0] if x.ndim else 0
        if not -length <= idx < length:  # JAX would clamp the index
            raise InputError.of("idx", idx, f"the first axis that is longer than one has {length} elements")
        return x[idx]

    @staticmethod
    def slice(x: Any, start: int, stop: int, axis: int = 0) -> Any:
        """Return the entries from `start` to `stop` along an axis."""
        return x[(slice(None),) * (axis % x.ndim) + (slice(start, stop),)]

    @staticmethod
    def shape(x: Any) -> tuple[int, ...]:
        """Return the shape."""
        return tuple(x.shape)

    @staticmethod
    def reshape(x: Any, shape: tuple[int, ...]) -> Any:
        """Return the same entries in another shape."""
        return x.reshape(shape)


def joined_rows(result: Any, parts: Iterable[Any], convert: Callable[[Any], Any], what: str) -> Any:
    """Write arrays from a generator into `result`, one below the other, and return it; messages call each `what`.

    Raises:
        InputError: There are fewer or more rows than `result` has, or rows of another shape.
    """
    promised, filled = f"{tuple(result.shape)} was promised", 0
    for part in parts:
        if tuple(part.shape[1:]) != tuple(result.shape[1:]) or filled + part.shape[0] > result.shape[0]:
            raise InputError.of("a", f"giving {what} {tuple(part.shape)} at row {filled}", promised)
        result[filled : filled + part.shape[0]] = convert(part)
        filled += part.shape[0]
    if filled != result.shape[0]:
        raise InputError.of("a", f"giving {filled} rows", promised)
    return result
