"""`freeze=`: modules whose nonlinear functions are held constant in a part of theirs, while their forward runs.

What is held constant is detached. So it is a constant for derivatives, and for bias parts, which follow what autograd
records: `output = contributions + bias` then holds as it does for a piecewise linear model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..._runtime.kernels import reentrant_checkpoint
from ..._runtime.restoring import restoring
from ...errors import InputError, InputTypeError, ModelStateError
from .frozen_functions import applied, check_values, note_gates, unfrozen
from .frozen_rules import KINDS
from .function_call import FunctionCall, dependent, name_of, opened
from .structure import bare

Freeze = None | str | Sequence[str] | Callable[[str, nn.Module], bool]

_NEEDED = "class names or paths of modules (fnmatch patterns), or a function of name and module, are needed"
_LISTED = 4  # names in a message
_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, eq=False)
class FrozenModules:
    """The modules of a model that are frozen.

    Attributes:
        kinds: Class names by path.
        held: What was held constant in the last forward, and how often.
    """

    kinds: dict[str, str]
    held: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, freeze: Freeze, model: Any) -> FrozenModules | None:
        """Return the modules that `freeze=` of a call selects; None where it was left out.

        Raises:
            InputTypeError: It is of the wrong kind, or the model has no modules.
            InputError: A pattern fits no module; the message has the nearest names.
            ModelStateError: A script module is among them, or in one of them.
        """
        if freeze is None:
            return None
        if not isinstance(model, nn.Module):
            raise InputTypeError.of(
                "freeze", repr(freeze), "a plain function has no modules", "Pass a torch.nn.Module."
            )
        named = _named(bare(model))
        if callable(freeze):
            found = [name for name, module in named.items() if freeze(name, module)]
            if not found:
                came = "a function that picks none"
                raise InputError.of("freeze", came, f"the model has {len(named)} modules, such as {_few(named)}")
        else:
            found = [name for pattern in _patterns(freeze) for name in _fitting(pattern, named)]
        kinds = {name: type(named[name]).__name__ for name in named if name in set(found)}
        for name in kinds:
            _refuse_scripted(name, named[name])
        return cls(kinds)

    @property
    def key(self) -> tuple[str, ...]:
        """What distinguishes proofs about models frozen in different ways."""
        return tuple(self.kinds)

    def below(self, path: str) -> FrozenModules:
        """Return the same modules in a model that has this one at a path."""
        return replace(self, kinds={f"{path}.{name}".removesuffix("."): kind for name, kind in self.kinds.items()})

    def describe(self) -> str:
        """Return what was held constant, in one line."""
        held = [(what, self.held[what]) for what in KINDS if self.held[what]]
        parts = [f"{many} {what if many > 1 else _singular(what)}" for what, many in held]
        modules = Counter(self.kinds.values())
        what = ", ".join(parts) or "nothing on the way to the output"
        return f"frozen: {what} ({', '.join(f'{many} {kind}' for kind, many in modules.items())})"

    @contextmanager
    def active(self, module: nn.Module, checked: bool = False) -> Iterator[Callable[[Any], None]]:
        """Freeze a forward of a replica while inside; what it yields is to be given the forward's output.

        Args:
            module: The replica.
            checked: Compare results of frozen functions with those of the original functions.

        Raises:
            ModelStateError: None of the modules was run, or one in an activation checkpoint; or a function gives other
                values with a part held constant.
            InputError: Nothing was held constant in one of them.
        """
        forward = _FrozenForward(self, checked)
        handles = forward.hook(module)
        try:
            yield forward.finish
        finally:
            for handle in handles:
                handle.remove()


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by path, as a replica has them: without the wrappers of compiled ones."""
    named: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        named[".".join(part for part in path.split(".") if part != "_orig_mod")] = getattr(module, "_orig_mod", module)
    return named


def _patterns(freeze: Any) -> list[str]:
    patterns = [freeze] if isinstance(freeze, str) else freeze
    if not isinstance(patterns, Sequence | set | frozenset) or not all(isinstance(p, str) for p in patterns):
        raise InputTypeError.of("freeze", f"a {type(freeze).__name__}", _NEEDED)
    if not patterns:
        raise InputError.of("freeze", "empty", _NEEDED)
    return list(patterns)


def _fitting(pattern: str, named: dict[str, nn.Module]) -> list[str]:
    """Return the paths of the modules that a pattern fits, by path or by class."""
    found = [name for name, m in named.items() if fnmatchcase(name, pattern) or fnmatchcase(type(m).__name__, pattern)]
    if not found:
        known = list(dict.fromkeys([*(type(m).__name__ for m in named.values()), *filter(None, named)]))
        near = get_close_matches(pattern, known, _LISTED, 0.4) or known[:_LISTED]
        raise InputError.of(
            "freeze", repr(pattern), f"no class name or path of a module fits; the nearest are {_few(near)}"
        )
    return found


def _few(names: Any) -> str:
    return ", ".join(repr(name) for name in list(filter(None, names))[:_LISTED])


def _singular(what: str) -> str:
    return what.replace("first factors of products", "first factor of a product").removesuffix("s")


def _refuse_scripted(path: str, module: nn.Module) -> None:
    for name, part in module.named_modules(prefix=path):
        if isinstance(part, torch.jit.ScriptModule):
            came = f"naming {path!r}, where {name!r} is a script module"
            needed = "TorchScript hides the functions that it runs"
            raise ModelStateError.of("freeze", came, needed, "Pass the module that it was scripted from.")


class _FrozenForward(TorchFunctionMode):
    """One forward in which some modules are frozen: a mode that hooks enter and leave.

    Args:
        modules: Which.
        checked: Compare results of frozen functions with those of the original functions.
    """

    def __init__(self, modules: FrozenModules, checked: bool) -> None:
        super().__init__()
        self.modules, self.checked = modules, checked
        self._held: list[tuple[str, Any]] = []  # what, and the node of the result, None for a constant
        self._gates = WeakIdKeyDictionary()
        self._inside: list[tuple[nn.Module, tuple[str, ...]]] = []
        self._ran: dict[str, dict[str, None]] = {}
        self._frozen: set[str] = set()

    def hook(self, model: nn.Module) -> list[Any]:
        """Hook the modules and all that are in them: some are never called themselves, as a list of blocks is not."""
        places: dict[nn.Module, tuple[str, ...]] = {}
        for path in self.modules.kinds:
            for part in model.get_submodule(path).modules():
                places[part] = (*places.get(part, ()), path)
        handles: list[Any] = []
        for part, paths in places.items():
            handles.append(part.register_forward_pre_hook(self._entering(paths), prepend=True))
            handles.append(part.register_forward_hook(self._left, always_call=True))
        return handles

    def _entering(self, paths: tuple[str, ...]) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, _: Any) -> None:
            self._inside.append((module, paths))
            for path in paths:
                self._ran.setdefault(path, {})
            if len(self._inside) == 1:
                self.__enter__()

        return enter

    def _left(self, module: nn.Module, *_: Any) -> None:
        if self._inside and self._inside[-1][0] is module:
            self._inside.pop()
            if not self._inside:
                self.__exit__(None, None, None)

    @restoring
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = opened(func)
        if plain is not None:
            with self:
                return plain(*args, **(kwargs or {}))
        call = FunctionCall(func, name_of(func), args, kwargs or {}, self._gates)
        otherwise = unfrozen(call) if self.checked else None  # now: the call may write into its arguments
        result, what = applied(call)
        if what is not None and otherwise is not None:
            check_values(call, result, otherwise)
        note_gates(call, result)
        _, paths = self._inside[-1]
        if what is not None:
            self._refuse_checkpoint()
            if dependent((args, kwargs)):
                self._held.append((what, next((t.grad_fn for t in dependent(result)), None)))
            self._frozen.update(paths)
        elif dependent(result):
            for path in paths:
                self._ran[path][call.name] = None
        return result

    def _refuse_checkpoint(self) -> None:
        """Refuse to hold a constant where the forward runs again in every sweep, out of the mode's sight."""
        found = _hooks(False)
        by_hooks = found is not None and "checkpoint" in getattr(found[0], "__module__", "")
        if by_hooks or (not torch.is_grad_enabled() and reentrant_checkpoint() is not None):
            came = f"naming {self._inside[-1][1][0]!r}, which runs in an activation checkpoint"
            needed = "its forward runs again in every sweep, where nothing is frozen"
            raise ModelStateError.of("freeze", came, needed, "Disable checkpoints; they only save memory in training.")

    def finish(self, output: Any) -> None:
        """Note what was held constant on the way to an output, and refuse modules in which nothing was.

        Raises:
            ModelStateError: None of them was run.
            InputError: Nothing was held constant in one of them.
        """
        if not torch.is_grad_enabled():  # nothing depends on anything
            return
        self._check()
        nodes = {None, *(t.grad_fn for t in dependent(output))}
        waiting = list(nodes - {None})
        while waiting:
            new = {node for node, _ in waiting.pop().next_functions} - nodes
            nodes |= new
            waiting += new
        # Products that only lead into a constant, such as queries times keys, need no rule.
        self.modules.held.clear()
        self.modules.held.update(what for what, node in self._held if node in nodes)

    def _check(self) -> None:
        """Refuse modules in which nothing was held constant; of nested ones the outer counts."""
        kinds = self.modules.kinds
        if not self._ran:
            came = f"naming {_few(kinds)}"
            raise ModelStateError.of("freeze", came, "the forward ran none of these modules")
        for path, functions in self._ran.items():
            inner = any(path != other and f"{path}.".startswith(f"{other}.".lstrip(".")) for other in self._ran)
            if path not in self._frozen and not inner:
                came = f"naming {path!r} (a {kinds[path]})"
                ran = f"ran {', '.join(list(functions)[:_LISTED])}" if functions else "computed nothing from the input"
                todo = "Leave it out, or name the module that calls the nonlinear functions."
                raise InputError.of("freeze", came, f"nothing in it can be held constant: it {ran}", todo)
