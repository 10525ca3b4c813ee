"""Cutting a forward at submodules: Jacobians from or to a hidden layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from ..._trees import is_differentiable
from ...errors import InputError, ModelStateError
from .freeze import FrozenModules

At = None | str | tuple[str | None, str | None]


class Cut:
    """A forward cut at submodules: `source`'s output becomes a leaf, `target`'s output the result.

    Args:
        module: A replica.
        at: Source and target.
        connected: The leaf stays connected to what is before it.
        frozen: Modules that are frozen meanwhile.
        checked: What frozen functions give is compared with what they give otherwise.

    Attributes:
        leaves: The tensors that replace the source's output.
        before: The source's output itself, with its graph.
        captured: The target's output.

    Raises:
        InputError: The path names no submodule, or the forward runs the target before the source.
        ModelStateError: The submodule was not reached, or more than once, or its output is no tensor.
    """

    def __init__(
        self,
        module: nn.Module,
        at: At,
        connected: bool = False,
        frozen: FrozenModules | None = None,
        checked: bool = False,
    ) -> None:
        self.connected, self.frozen, self.checked, self._finish = connected, frozen, checked, None
        self.source, self.target = (at, None) if isinstance(at, str) or at is None else at
        self.module, self.leaves, self.captured, self.before = module, [], [], []
        for path in (self.source, self.target):
            if path is not None:
                self.submodule(path)

    def submodule(self, path: str) -> nn.Module:
        """Return the submodule at a path.

        Raises:
            InputError: There is none; the message holds the nearest paths.
        """
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            known = [n for n, _ in self.module.named_modules() if n]
            near = get_close_matches(path, known, 3) or known[:5]
            raise InputError.of("at", repr(path), f"the model has no such submodule; near it: {near}") from None

    def active(self) -> AbstractContextManager[None]:
        """Cut the forward while inside; the module is a replica, so hooks on it affect no one else."""
        whole = self.source is None and self.target is None and self.frozen is None
        return nullcontext() if whole else self._cutting()

    @contextmanager
    def _cutting(self) -> Iterator[None]:
        handles = []
        if self.source is not None:
            handles.append(self.submodule(self.source).register_forward_hook(self._cut))
        if self.target is not None:
            handles.append(self.submodule(self.target).register_forward_hook(self._keep))
        try:
            frozen = nullcontext() if self.frozen is None else self.frozen.active(self.module, self.checked)
            with frozen as self._finish:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _cut(self, module: nn.Module, args: Any, output: Any) -> Any:
        tensor = first_tensor(output, self.source)
        if self.captured:
            came, swapped = (self.source, self.target), (self.target, self.source)
            needed = f"'{self.target}' returns before '{self.source}' does and cannot depend on it"
            raise InputError.of("at", repr(came), needed, f"Swap them: at={swapped!r}.")
        if self.leaves:
            came = repr(self.source)
            raise ModelStateError.of("at", came, "the forward must use that submodule once, not more often")
        kept = self.connected and tensor.requires_grad
        leaf = tensor.view_as(tensor) if kept else tensor.detach().requires_grad_()
        self.leaves.append(leaf)
        self.before.append(tensor)
        return leaf.clone() if isinstance(output, Tensor) else (leaf.clone(), *output[1:])

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.captured.append(first_tensor(output, self.target))

    def result(self, output: Any) -> Any:
        """Return the output, the target's if there is one."""
        for path, found in ((self.source, self.leaves), (self.target, self.captured)):
            if path is not None and len(found) != 1:
                needed = f"the forward must use that submodule once; it did {len(found)} times"
                raise ModelStateError.of("at", repr(path), needed)
        found = self.captured[0] if self.target is not None else output
        if self._finish is not None:
            self._finish(found)
        return found


def first_tensor(output: Any, path: str | None) -> Tensor:
    """Return a submodule's output, or the first of several.

    Raises:
        ModelStateError: It is no floating-point tensor.
    """
    tensor = output[0] if isinstance(output, tuple) and output else output
    if not is_differentiable(tensor):
        came = repr(path)
        raise ModelStateError.of("at", came, f"its output is a {type(output).__name__}, not a floating-point tensor")
    return tensor  # pyright: ignore[reportReturnType]
