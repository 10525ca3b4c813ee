"""Attributes and functions of arrays that an operator does not have: each is refused, and its replacement named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import InputTypeError

_USE: dict[str, str] = {
    "Form it with `A.dense()`.": (
        "array clone detach flatten item mean reshape sum tensor to_dense toarray todense view"
    ),
    "Form it with `A.dense().numpy()`, or give SciPy `A.to_scipy()`.": "numpy tolist",
    "Take `A.shape`.": "dim ndim numel size",
    "Take `A.T`.": "H adjoint conj mH mT t transpose",
    "Write `A @ v`.": "bmm dot matmul mm mul multiply mv",
    "Take `jacops.linalg.trace(A)`.": "trace",
    "Take `jacops.linalg.diagonal(A)`.": "diag diagonal",
    "Take `jacops.linalg.eigenpairs(A)` for some, `torch.linalg.eigvalsh(A.dense())` for all of them.": (
        "eig eigenvalues eigh eigvals eigvalsh"
    ),
    "Take `jacops.linalg.singular_values(A)`.": "cond matrix_rank svd svdvals",
    "Take `jacops.linalg.norm(A)`.": "matrix_norm norm vector_norm",
    "Take `jacops.linalg.logdet(A)`.": "det logdet slogdet",
    "Take `jacops.inverse(A, damping=...)`, an operator too.": "inv inverse pinv pinverse",
    "Take `jacops.solve(A, b, damping=...)`.": "cg cholesky lstsq solve solve_ex",
    "It is where its model and data are, in their dtype: convert these, and make it again.": (
        "bfloat16 cpu cuda double float half to"
    ),
}
_TODO = {word: todo for todo, words in _USE.items() for word in words.split()}


class NoSuchWordError(InputTypeError, AttributeError):
    """An attribute that an operator does not have; `hasattr` returns False."""


def _name(operator: Any) -> str:
    """Return what a user calls it, such as `"Hessian"`; copies that are not filled in yet have no name."""
    return operator.name if vars(operator) else type(operator).__name__


def _refused(what: str, operator: Any, todo: str, kind: type[InputTypeError] = InputTypeError) -> InputTypeError:
    return kind.of(what, f"used on a {_name(operator)}", "an operator has products, no entries", todo)


class NotAnArray:
    """The part of an `Operator` that refuses what only arrays have.

    Type checkers do not see it, so that they find such words too.
    """

    def __bool__(self) -> bool:
        """Return True, whatever the shape."""
        return True

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Refuse a name; what a property of that name raised is raised again."""
            if hasattr(type(self), name):
                return object.__getattribute__(self, name)
            if name in _TODO:
                raise _refused(f".{name}", self, _TODO[name], NoSuchWordError)
            raise AttributeError(f"{_name(self)!r} object has no attribute {name!r}", name=name, obj=self)

        def __getitem__(self, index: Any) -> NoReturn:
            """Refuse an index."""
            todo = "Index `A.dense()`; a row is `u @ A`, a column `A @ v`, with a unit vector."
            raise _refused("A[...]", self, todo)

        def __iter__(self) -> NoReturn:
            """Refuse to be iterated over."""
            raise _refused("iteration", self, "Iterate over the rows of `A.dense()`.")

        def __len__(self) -> NoReturn:
            """Refuse: the length of a matrix is that of its rows, which is easily mistaken."""
            raise _refused("len", self, "Take `A.shape[0]`, or `A.dense()` for a tensor.")

        def __pow__(self, power: Any) -> NoReturn:
            """Refuse a power."""
            todo = "Write `A @ A`, or `jacops.inverse(A, damping=...)` for a negative one."
            raise _refused("**", self, todo)

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            """Refuse functions of tensors; operands of `v @ A` return to the operator's own methods."""
            name = getattr(function, "__name__", str(function))
            if name.startswith("__"):
                return NotImplemented
            operator = next((a for a in args if isinstance(a, NotAnArray)), None)
            todo = _TODO.get(name.removeprefix("linalg_"), "Form it with `A.dense()`.")
            raise _refused(f"torch.{name.replace('linalg_', 'linalg.')}", operator, todo)
