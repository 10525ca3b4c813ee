"""Residuals: a model's outputs minus targets, weighted and made robust, as one long vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._extras._lie_groups import group_of
from .._requirements import check_choice, check_kind
from .._runtime.restoring import NumericWarningsIgnored, restoring
from .._trees import Tree, flatten
from .._words import Corrector
from ..errors import InputError, InputTypeError, ModelStateError, NonFiniteError, NotDifferentiableError
from ._kernels import Kernel, correction, kernel_of, left_curvature
from ._layout import array, in_double


@dataclass(frozen=True)
class Term:
    """One output.

    Attributes:
        name: How messages call it.
        shape: Its shape; entries of a vector, or last axes otherwise, are the blocks that a kernel is applied to.
        target: What is taken off it, flat.
        root: Root of the weights: per entry `(rows,)`, or per block `(blocks, d, d)`.
        kernel: The robust kernel.
    """

    name: str
    shape: torch.Size
    target: np.ndarray | None
    root: np.ndarray | None
    kernel: Kernel | None

    @property
    def rows(self) -> int:
        """How many numbers it has."""
        return self.shape.numel()

    @property
    def width(self) -> int:
        """How many numbers a kernel's block has."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def together(self) -> int:
        """How many rows of the Jacobian are multiplied by one matrix of weights, or of a kernel."""
        return self.width if self.root is None or self.root.ndim == 1 else self.root.shape[-1]

    def of_problems(self, which: np.ndarray, many: int) -> Term:
        """Return the term of some of the problems that its blocks belong to, as many to each."""

        def picked(values: np.ndarray | None) -> np.ndarray | None:
            if values is None:
                return None
            return values.reshape(many, len(values) // many, *values.shape[1:])[which].reshape(-1, *values.shape[1:])

        shape = torch.Size((self.shape[0] // many * len(which), *self.shape[1:]))
        return replace(self, shape=shape, target=picked(self.target), root=picked(self.root))

    def values(self, output: Tensor) -> np.ndarray:
        """Return the square of each weighted residual, or what the kernel makes of each block's squared length."""
        squares = np.square(self.weighted(output))
        return squares if self.kernel is None else self.kernel(squares.reshape(-1, self.width).sum(1))[0]

    def magnitude(self, output: Tensor) -> np.ndarray:
        """Return the magnitude of what the weighted residual is the difference of, flat, and weighed as it is."""
        size = np.abs(array(output)) + (0.0 if self.target is None else np.abs(self.target))
        size = weighed(None if self.root is None else np.abs(self.root), size[:, None])[:, 0]
        if self.kernel is None:
            return size
        squares = np.square(self.weighted(output).reshape(-1, self.width)).sum(1)
        return size * np.repeat(np.sqrt(self.kernel(squares)[1]), self.width)

    def raw(self, output: Tensor) -> np.ndarray:
        """Return output minus target, flat."""
        return array(output) - (0.0 if self.target is None else self.target)

    def weighted(self, output: Tensor) -> np.ndarray:
        """Return the weighted residual, flat."""
        return weighed(self.root, self.raw(output)[:, None])[:, 0]


def paired(terms: Sequence[Term], outputs: Sequence[Tensor]) -> list[tuple[Term, Tensor]]:
    """Return each term with its output.

    Raises:
        ModelStateError: There are other numbers than at the start, whose sums of squares cannot be compared.
    """
    if [term.rows for term in terms] != [output.numel() for output in outputs]:
        first, now = (" and ".join(str(tuple(own.shape)) for own in each) for each in (terms, outputs))
        needed = "residuals keep their shapes in a fit: multiply rows that do not count by zero"
        raise ModelStateError.of("model", f"returning {now} after {first}", needed)
    return list(zip(terms, outputs, strict=True))


@dataclass(frozen=True)
class Residuals:
    """All terms.

    Attributes:
        terms: One per output.
        second_order: Correct kernels with their second derivative.
    """

    terms: tuple[Term, ...]
    second_order: bool

    @property
    def rows(self) -> int:
        """How many numbers there are."""
        return sum(t.rows for t in self.terms)

    @cached_property
    def importance(self) -> np.ndarray:
        """What weights multiply each number with: how large its row of the Jacobian is to the fit beside others."""
        parts = []
        for term in self.terms:
            root = np.ones(term.rows) if term.root is None else term.root
            parts.append(np.abs(root) if root.ndim == 1 else np.linalg.norm(root, axis=1).reshape(-1))
        return np.concatenate(parts)

    @restoring
    def objective(self, outputs: Sequence[Tensor]) -> float:
        """Return half the sum of the squares, or of the kernels of squared lengths."""
        total = 0.0
        with NumericWarningsIgnored("over", "invalid"):
            for term, output in paired(self.terms, outputs):
                if term.kernel is None:
                    r = term.weighted(output)
                    total += float(r @ r) / 2
                else:
                    total += float(term.values(output).sum()) / 2
        return total

    def magnitude(self, outputs: Sequence[Tensor]) -> np.ndarray:
        """Return the magnitude of the terms of each weighted residual, for its rounding errors."""
        return np.concatenate([t.magnitude(o) for t, o in paired(self.terms, outputs)])

    def raw(self, outputs: Sequence[Tensor]) -> np.ndarray:
        """Return outputs minus targets, neither weighted nor corrected."""
        return np.concatenate([t.raw(o) for t, o in paired(self.terms, outputs)])

    def corrected(self, outputs: Sequence[Tensor]) -> tuple[float, np.ndarray, list[np.ndarray | None]]:
        """Return the objective, the residual weighted and corrected, and what rows of the Jacobian are multiplied by.

        That is for each output None, a number per row, or a matrix per block `(blocks, d, d)`.
        """
        total, residuals, lefts = 0.0, [], []
        for term, output in paired(self.terms, outputs):
            r, left = term.weighted(output), term.root
            if term.kernel is None:
                total += float(r @ r) / 2
            else:
                blocks = r.reshape(-1, term.width)
                values, fixed, factor, along = correction(term.kernel, blocks, self.second_order)
                total, r = total + float(values.sum()) / 2, fixed.reshape(-1)
                left = corrected_left(term, blocks, factor, along)
            residuals.append(r)
            lefts.append(left)
        return total, np.concatenate(residuals), lefts

    def samples(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which block each number belongs to, and the `left_curvature` of each block."""
        blocks, curvature, parts = [], [], np.split(raw, np.cumsum([t.rows for t in self.terms])[:-1])
        for term, own in zip(self.terms, parts, strict=True):
            r = weighed(term.root, own[:, None]).reshape(-1, term.width)
            blocks.append(np.repeat(np.arange(len(r)) + sum(map(len, curvature)), term.width))
            kernel = term.kernel
            curvature.append(np.ones(len(r)) if kernel is None else left_curvature(kernel, r, self.second_order))
        return np.concatenate(blocks), np.concatenate(curvature)

    def times(self, lefts: Sequence[np.ndarray | None], J: np.ndarray) -> np.ndarray:
        """Return a dense Jacobian multiplied from the left as in `corrected`; it is overwritten."""
        start = 0
        for term, left in zip(self.terms, lefts, strict=True):
            where = slice(start, start + term.rows)
            J[where] = weighed(left, J[where])
            start += term.rows
        return J


def corrected_left(term: Term, r: np.ndarray, factor: np.ndarray, along: np.ndarray | None) -> np.ndarray:
    """Return what rows of the Jacobian are multiplied by under a kernel: numbers per row, or matrices per block."""
    root = np.ones(term.rows) if term.root is None else term.root
    if term.width == 1:
        rows = factor * (1.0 if along is None else 1 - along[:, 0] * r[:, 0])
        return rows * root if root.ndim == 1 else rows.reshape(len(root), -1, 1) * root
    if root.ndim == 1 and along is None:
        return root * np.repeat(factor, term.width)
    if root.ndim == 1:
        root = root.reshape(-1, term.width, 1) * np.eye(term.width)
    if along is not None:
        root = root - along[:, :, None] * np.matmul(r[:, None], root)
    return factor[:, None, None] * root


def weighed(left: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Return numbers per row, or matrices per block `(blocks, d, d)`, times rows."""
    if left is None:
        return rows
    if left.ndim == 1:
        return left[:, None] * rows
    return np.matmul(left, rows.reshape(len(left), left.shape[-1], rows.shape[1])).reshape(rows.shape)


# ---- what the caller gives ---------------------------------------------------------------------------------------


def residuals_of(outputs: Sequence[Tensor], tree: Tree, given: dict[str, Any], call: str) -> Residuals:
    """Return the terms of a model's outputs for what the caller asked.

    Args:
        outputs: The outputs, once.
        tree: Their structure.
        given: `target`, `weight`, `sqrt_weight`, `kernel`, `f_scale` and `corrector` as the caller gave them.
        call: The public call.

    Raises:
        InputTypeError: An argument is of the wrong kind.
        InputError: A shape does not match, or a weight is not positive.
        NotDifferentiableError: An output is complex.
        NonFiniteError: An output at the start is NaN or Inf.
    """
    check_choice("corrector", given["corrector"], Corrector)
    each = {key: spread(given[key], tree, key) for key in ("target", "weight", "sqrt_weight")}
    kernel = given["kernel"]
    kernels = spread(kernel, tree, "kernel") if isinstance(kernel, list | tuple | dict) else [kernel] * len(outputs)
    terms = []
    for i, (name, output) in enumerate(zip(tree.names, outputs, strict=True)):
        _check_output(output, name, call)
        label = "" if tree.single else name.removeprefix("output")
        target = _target(each["target"][i], output, f"target{label}")
        if each["weight"][i] is not None and each["sqrt_weight"][i] is not None:
            raise InputError.of(f"weight{label}", "given beside `sqrt_weight`", "one of them is needed, not both")
        root = weight_root(each["weight"][i], output.shape, f"weight{label}", squared=True)
        if root is None:
            root = weight_root(each["sqrt_weight"][i], output.shape, f"sqrt_weight{label}", squared=False)
        terms.append(Term(name, output.shape, target, root, kernel_of(kernels[i], given["f_scale"])))
    found = Residuals(tuple(terms), given["corrector"] == "triggs")
    if not found.rows:
        raise InputError.of("the residual", "empty", "at least one number is needed")
    return found


def _check_output(output: Tensor, name: str, call: str) -> None:
    if output.is_complex():
        came = f"of dtype {output.dtype}"
        raise NotDifferentiableError.of(name, came, "least squares need real numbers", "Use torch.view_as_real on it.")
    if group_of(output):
        needed = "a residual must be a vector"
        raise InputError.of(name, f"an element of {group_of(output)}", needed, "Return its `.Log()`.")
    bad = (~torch.isfinite(output.detach().as_subclass(Tensor))).nonzero()
    if len(bad):
        raise NonFiniteError(
            f"{call}: at the start, {name} has {len(bad)} entries that are NaN or Inf, the first at index "
            f"{tuple(bad[0].tolist())}. Choose another start, or correct the model."
        )


def spread(given: Any, tree: Tree, argument: str) -> list[Any]:
    """Return one entry per output."""
    if given is None:
        return [None] * len(tree.names)
    if tree.single:
        return [given]
    if isinstance(given, Tensor) or not isinstance(given, list | tuple | dict):
        came = f"a {type(given).__name__}"
        raise InputTypeError.of(argument, came, f"one entry per output is needed: {', '.join(tree.names)}")
    import torch.utils._pytree as pytree

    leaves = pytree.tree_leaves(given, is_leaf=lambda v: v is None or not isinstance(v, list | tuple | dict))
    here, there = ([n.removeprefix("output") for n in each.names] for each in (flatten(given, "output")[1], tree))
    if len(leaves) != len(there) or (len(here) == len(leaves) and here != there):
        came = f"of {len(leaves)} entries"
        raise InputError.of(argument, came, f"one entry per output is needed: {', '.join(tree.names)}")
    return leaves


def _target(target: Any, output: Tensor, argument: str) -> np.ndarray | None:
    if target is None:
        return None
    check_kind(argument, target, Tensor, "a tensor is needed")
    if target.shape != output.shape:
        needed = f"the output has shape {tuple(output.shape)}"
        raise InputError.of(argument, f"of shape {tuple(target.shape)}", needed, "Nothing is broadcast.")
    if target.dtype != output.dtype:
        todo = f"Call `.to({output.dtype})` on it."
        raise InputError.of(argument, f"of dtype {target.dtype}", f"the output is of {output.dtype}", todo)
    if not torch.isfinite(target.detach().as_subclass(Tensor)).all():
        raise NonFiniteError.of(argument, "holding NaN or Inf", "finite numbers are needed")
    return array(target)


def weight_root(weight: Any, shape: torch.Size, argument: str, squared: bool) -> np.ndarray | None:
    """Return the root of weights, per entry or per block.

    Raises:
        InputTypeError: It is neither a number nor a tensor.
        InputError: Its shape fits none of the known ones, or it is not positive.
    """
    if weight is None:
        return None
    check_kind(argument, weight, (Tensor, float, int), "a number or a tensor is needed")
    value = in_double(weight)
    if not torch.isfinite(value).all():
        raise NonFiniteError.of(argument, "holding NaN or Inf", "finite numbers are needed")
    last = shape[-1] if shape else 1
    if value.shape == shape == (last, last) and last > 1:
        came = f"of shape {(last, last)}, which could be one weight per entry or one matrix for all blocks"
        todo = f"Pass (1, {last}, {last}) for one matrix, or `torch.diag_embed({argument})` for one number per entry."
        raise InputError.of(argument, came, "it must be one of them", todo)
    if value.ndim == 0 or value.shape == shape or (len(shape) > 1 and value.shape == shape[:-1]):
        if squared and bool((value < 0).any()):
            raise InputError.of(argument, "negative somewhere", "weights must not be negative")
        full = value if value.ndim in (0, len(shape)) else value.unsqueeze(-1)
        rows = full.expand(shape).reshape(-1).numpy().copy()
        return np.sqrt(rows) if squared else rows
    lead = (1,) * len(shape[:-1])
    if value.ndim >= 2 and value.shape[-2:] == (last, last) and value.shape[:-2] in (shape[:-1], torch.Size(lead), ()):
        blocks = value.expand(*shape[:-1], last, last).reshape(-1, last, last)
        return _matrix_root(blocks, argument) if squared else blocks.numpy().copy()
    wanted = [f"() for all, {tuple(shape)} per entry"]
    wanted += [f"{tuple(shape[:-1])} per block"] if len(shape) > 1 else []
    wanted += [f"{(last, last)} or {(*shape[:-1], last, last)} as matrices"]
    raise InputError.of(argument, f"of shape {tuple(value.shape)}", f"one of these is needed: {', '.join(wanted)}")


def _matrix_root(blocks: Tensor, argument: str) -> np.ndarray:
    """Return S with S^T S = W for positive semidefinite W."""
    # Matrices that were computed in float32, or written with seven digits, pass.
    if not torch.allclose(blocks, blocks.mT, rtol=1e-6, atol=1e-6 * float(blocks.abs().max()) if blocks.numel() else 0):
        raise InputError.of(argument, "not symmetric", "information matrices must be symmetric")
    factor, info = torch.linalg.cholesky_ex(blocks)
    if not bool(info.any()):
        return factor.mT.contiguous().numpy()
    values, vectors = torch.linalg.eigh(blocks)
    # Eigenvalues of a semidefinite matrix may be negative by rounding: room for numbers of ten digits.
    lowest = values[:, :1] + 1e-10 * values[:, -1:].abs()
    if bool((lowest < 0).any()):
        worst = int(lowest.reshape(-1).argmin())
        came = f"with the eigenvalue {float(values[worst, 0]):.3g} in block {worst}"
        raise InputError.of(argument, came, "information matrices must not be negative anywhere")
    return (values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT).contiguous().numpy()


def problem_root(weight: Any, shape: torch.Size, argument: str, squared: bool) -> np.ndarray | None:
    """Return the root of weights of outputs `(n, *out)`, given for all problems alike or for each.

    Raises:
        InputTypeError: It is neither a number nor a tensor.
        InputError: Its shape fits none of the known ones, or two of them, or it is not positive.
    """
    if weight is None or not isinstance(weight, Tensor) or not weight.ndim:
        return weight_root(weight, torch.Size((shape.numel(),)), argument, squared)
    full = spread_weight(weight, shape, argument)
    if full.shape == shape:
        return weight_root(full.reshape(-1), torch.Size((shape.numel(),)), argument, squared)
    return weight_root(full, shape if len(shape) > 1 else torch.Size((*shape, 1)), argument, squared)


def spread_weight(weight: Tensor, shape: torch.Size, argument: str) -> Tensor:
    """Return weights for each entry `(n, *out)`, or matrices `(n, *out[:-1], d, d)`.

    Raises:
        InputError: The shape fits none of the known ones, or two of them.
    """
    out = tuple(shape[1:])
    last, lead = out[-1:] or (1,), out[:-1]
    entries = {out} | ({lead} if len(out) > 1 else set())
    matrices = {(*last, *last), (*lead, *last, *last), (*[1] * len(lead), *last, *last)}
    given = tuple(weight.shape)
    if weight.numel() == 1:
        return weight.reshape(()).expand(shape)
    each = given[:1] == tuple(shape[:1]) and given[1:] in entries | matrices
    same = given in entries | matrices
    inner = given[1:] if each else given
    if not (each or same):
        known = ", ".join(str(known) for known in sorted(entries | matrices, key=lambda one: (len(one), one)))
        needed = f"a number is needed, or one of {known}, or one of these behind a first axis of {shape[0]} problems"
        raise InputError.of(argument, f"of shape {given}", needed)
    if (each and same and shape[0] > 1) or (inner in entries and inner in matrices):
        todo = (
            f"Give one for every problem: expand it to {tuple(shape)}, or to {(*shape[:-1], *last, *last)} as matrices."
        )
        raise InputError.of(argument, f"of shape {given}, which could be meant in two ways", "one is needed", todo)
    full = weight if each else weight.expand(shape[0], *given)
    if inner in entries:
        return full.reshape(*full.shape, *[1] * (len(shape) - full.ndim)).expand(shape)
    return full.reshape(shape[0], *[1] * (len(lead) + 2 - len(inner)), *inner).expand(shape[0], *lead, *last, *last)
