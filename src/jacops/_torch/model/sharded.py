"""A model whose parameters are spread over the ranks of a device mesh, run with its parameters gathered in the graph.

Each rank differentiates by its own shards. Gathering shards and spreading cotangents over ranks are transposes of each
other, so each is the backward of the other one, and a graph through them has derivatives of every order. FSDP's own
hooks gather once and reduce into `.grad`, which no second derivative passes through; the copy that runs has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..._runtime.contexts import arithmetic, out_of_inference, recording
from ..._runtime.restoring import restoring
from ..._space import Space
from ..._trees import is_dtensor
from ...errors import InputError, ModelStateError
from .replica import skeleton
from .structure import ModelStructure, check_state, is_wrapped, unwrapped


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's part of a parameter.

    Attributes:
        parameter: The caller's parameter, a DTensor or a tensor that every rank holds.
        mesh: The ranks.
        placements: How it is spread over them.
        differentiated: A derivative by it is requested.
    """

    parameter: Tensor
    mesh: Any
    placements: tuple[Any, ...]
    differentiated: bool = True

    @cached_property
    def local(self) -> Tensor:
        """A leaf that represents this rank's part; its memory is the caller's."""
        parameter = out_of_inference(self.parameter).detach()
        local = parameter.to_local().detach() if self.is_dtensor else parameter  # pyright: ignore
        return local.requires_grad_(self.differentiated)

    @property
    def is_dtensor(self) -> bool:
        """Whether the caller's parameter is one."""
        return is_dtensor(self.parameter)

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all of it."""
        return all(placement.is_replicate() for placement in self.placements)

    def dtensor(self, local: Tensor, placements: Any = None) -> Any:
        """Return the DTensor of which a tensor is this rank's part."""
        from torch.distributed.tensor import DTensor

        shape, stride = self.parameter.shape, self.parameter.stride()
        where = self.placements if placements is None else placements
        return DTensor.from_local(local.detach(), self.mesh, where, run_check=False, shape=shape, stride=stride)

    def gathered(self, local: Tensor) -> Tensor:
        """Return the whole tensor of which this is the rank's part."""
        return local.clone() if self.is_whole else self.dtensor(local).full_tensor()

    def spread(self, whole: Tensor, summed: bool) -> Tensor:
        """Return this rank's part of a whole tensor: of the sum over ranks, or of what they all hold."""
        from torch.distributed.tensor import Partial, Replicate

        came = [Partial() if summed else Replicate()]
        return self.dtensor(whole.contiguous(), came).redistribute(placements=self.placements).to_local()

    def part_of(self, value: Tensor, name: str) -> Tensor:
        """Return this rank's part of a tensor like the parameter: a DTensor placed as it is, or whole.

        Raises:
            InputError: It is a DTensor that is placed otherwise.
        """
        if not is_dtensor(value):
            return self.spread(value.detach(), summed=False) if self.is_dtensor else value.detach()
        if not self.is_dtensor:
            raise InputError.of(name, "a DTensor", "its parameter is not one", "Pass its `full_tensor()`.")
        mesh, placements = value.device_mesh, value.placements  # pyright: ignore[reportAttributeAccessIssue]
        if mesh != self.mesh or tuple(placements) != self.placements:
            needed = f"its parameter is placed {self.placements}; nothing is moved silently"
            todo = "Call `.redistribute(p.device_mesh, p.placements)` on it."
            raise InputError.of(name, f"placed {tuple(placements)} on {mesh}", needed, todo)
        return value.detach().to_local()  # pyright: ignore[reportAttributeAccessIssue]

    def like_parameter(self, local: Tensor) -> Tensor:
        """Return a result as the parameter is: a DTensor of this placement, or a plain tensor."""
        return self.dtensor(local) if self.is_dtensor else local


class _Gather(torch.autograd.Function):
    """Whole tensors from the parts of all ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, shard: Shard, summed: bool) -> Tensor:
        ctx.shard, ctx.summed = shard, summed
        return shard.gathered(local)

    @staticmethod
    def backward(ctx: Any, whole: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Spread.apply(whole, ctx.shard, ctx.summed), None, None


class _Spread(torch.autograd.Function):
    """The rank's part of whole tensors; the transpose of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, shard: Shard, summed: bool) -> Tensor:
        ctx.shard, ctx.summed = shard, summed
        return shard.spread(whole, summed)

    @staticmethod
    def backward(ctx: Any, local: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Gather.apply(local, ctx.shard, ctx.summed), None, None


OWN_FUNCTIONS = frozenset({"_GatherBackward", "_SpreadBackward"})


@dataclass(frozen=True, eq=False)
class _Unit:
    """A module that gathers parameters for the time of its forward: one that FSDP manages, or the whole model.

    Attributes:
        module: The copy of it.
        forward: Its forward.
        places: Where each of its parameters is: the copy of the module that has it, and its name there.
        before: Called before parameters are gathered for the first time.
    """

    module: nn.Module
    forward: Callable[..., Any]
    places: Sequence[tuple[nn.Module, str, Shard]]
    summed: bool
    before: Callable[[], object]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it; what it saved for the backward is computed again there, parameters gathered again."""
        self.before()
        again = partial(lambda: (nullcontext(), recording(advance=True)))  # the backward may run in another thread
        return checkpoint(self._run, args, kwargs, use_reentrant=False, context_fn=again)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        whole: dict[int, Tensor] = {}
        found = [(owner, name, owner._parameters[name]) for owner, name, _ in self.places]
        try:
            for owner, name, shard in self.places:
                if id(shard) not in whole:
                    whole[id(shard)] = _Gather.apply(shard.local, shard, self.summed)  # pyright: ignore
                owner._parameters[name] = whole[id(shard)]  # pyright: ignore[reportArgumentType]
            return self.forward(*args, **kwargs)
        finally:
            for owner, name, value in found:
                owner._parameters[name] = value


class ShardedModel:
    """A model with parameters sharded over one mesh axis, on this rank.

    Args:
        model: The caller's module.
        wrt: Which parameters are differentiated, by name and value.

    Attributes:
        module: It without wrappers.
        shards: This rank's part of each parameter, by name.

    Raises:
        ModelStateError: It is spread in a way that is not supported, or it is not in its sharded state.
    """

    def __init__(self, model: Any, wrt: Callable[[str, Tensor], bool]) -> None:
        self.module = unwrapped(model)
        _check_wrappers(self.module)
        structure = ModelStructure(self.module)
        check_state(structure)
        for name, buffer in structure.buffers.items():
            if is_dtensor(buffer):
                raise ModelStateError.of(name, "a buffer that is a DTensor", "buffers must be plain tensors")
        named = structure.differentiable
        self.mesh = _mesh_of(named)
        self.shards = {name: self._shard(name, p, wrt(name, p)) for name, p in named.items()}

    @property
    def chosen(self) -> dict[str, Shard]:
        """The parts of the parameters that are differentiated, by name."""
        return {name: shard for name, shard in self.shards.items() if shard.differentiated}

    def _shard(self, name: str, parameter: Tensor, differentiated: bool) -> Shard:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import Shard as Split

        if not is_dtensor(parameter):
            return Shard(parameter, self.mesh, (Replicate(),), differentiated)
        placements = tuple(parameter.placements)  # pyright: ignore[reportAttributeAccessIssue]
        if not all(type(placement) in (Split, Replicate) for placement in placements):
            raise ModelStateError.of(name, f"placed {placements}", "it must be sharded along an axis or replicated")
        return Shard(parameter, self.mesh, placements, differentiated)

    @restoring
    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], summed: bool, before: Callable[[], object]) -> Any:
        """Return what a copy of the model returns, recorded over this rank's shards.

        Args:
            args: Its arguments.
            kwargs: Its keyword arguments.
            summed: Cotangents differ among ranks and are summed; else all ranks have the same.
            before: Called before each gathering.
        """
        stand_ins = {id(shard.parameter): shard.local for shard in self.shards.values()}
        twin, twins = skeleton(self.module, stand_ins)
        places: dict[int, list[tuple[nn.Module, str, Shard]]] = {}
        by_identity = {id(shard.parameter): shard for shard in self.shards.values()}
        for path, module in self.module.named_modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in by_identity:
                    place = twins[id(module)], name, by_identity[id(parameter)]
                    places.setdefault(id(self._unit(path)), []).append(place)
        for module in self.module.modules():
            if id(module) in places:
                copied = twins[id(module)]
                unit = _Unit(copied, copied.forward, places[id(module)], summed, before)
                copied.__dict__["forward"] = unit
        return twin(*args, **kwargs)

    def _unit(self, path: str) -> nn.Module:
        """Return the module that gathers the parameters of the module at `path`."""
        steps = path.split(".") if path else []
        for many in range(len(steps), 0, -1):
            module = self.module.get_submodule(".".join(steps[:many]))
            if is_wrapped(module):
                return module
        return self.module


@restoring
def parts_of(shards: Mapping[str, Shard], v: Any, argument: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return this rank's part of every tensor of `v`, and those of which every rank must hold the same, by name.

    Raises:
        InputTypeError: `v` is of the wrong kind.
        InputError: It does not match the parameters, mixes DTensors with whole tensors, or is placed otherwise.
    """
    space = Space.of([shard.parameter for shard in shards.values()], shards)
    tensors = space.check(v, argument, spread=True)
    labels = [f"{argument} for {name}" if len(shards) > 1 else argument for name in shards]
    forms = {is_dtensor(t) for t, shard in zip(tensors, shards.values(), strict=True) if shard.is_dtensor}
    if len(forms) > 1:
        todo = "Pass DTensors placed as the parameters, or the same whole tensors on every rank."
        raise InputError.of(argument, "DTensors and whole tensors", "the parts must be of one form", todo)
    with arithmetic(False):
        triples = zip(shards.values(), tensors, labels, strict=True)
        parts = [shard.part_of(out_of_inference(tensor), label) for shard, tensor, label in triples]
    whole = {name: t for name, t in zip(shards, tensors, strict=True) if not is_dtensor(t)}
    return parts, whole


def shards_of(tensors: Sequence[Tensor], names: Sequence[str]) -> dict[str, Shard]:
    """Return tensors of a closure as shards, by name.

    Raises:
        ModelStateError: They are spread in a way that is not supported.
    """
    from torch.distributed.tensor import Replicate

    named = dict(zip(names, tensors, strict=True))
    mesh = _mesh_of(named)
    return {
        name: Shard(t, mesh, tuple(t.placements) if is_dtensor(t) else (Replicate(),))  # pyright: ignore
        for name, t in named.items()
    }


def _mesh_of(named: Mapping[str, Tensor]) -> Any:
    """Return the mesh that parameters are spread over.

    Raises:
        ModelStateError: There are several, or it has more than one axis.
    """
    meshes = {name: t.device_mesh for name, t in named.items() if is_dtensor(t)}  # pyright: ignore
    if not meshes:
        todo = "Call `model.reshard()` (after a forward FSDP leaves the outermost module gathered)."
        raise ModelStateError.of("model", "in FSDP's gathered state", "its sharded state is needed", todo)
    first, mesh = next(iter(meshes.items()))
    for name, other in meshes.items():
        if other != mesh:
            raise ModelStateError.of(name, f"on {other}", f"'{first}' is on {mesh}; one mesh is needed")
    if mesh.ndim != 1:
        todo = "Shard over one axis: a slice of the mesh, such as `mesh['shard']`."
        raise ModelStateError.of(first, f"on a mesh of {mesh.ndim} axes", "a mesh of one axis is needed", todo)
    return mesh


def _check_wrappers(model: nn.Module) -> None:
    """Refuse what FSDP does besides sharding, and modules that are not in their sharded state.

    Raises:
        ModelStateError: There is such.
    """
    for path, module in model.named_modules():
        name = f"model.{path}" if path else "model"
        if type(module).__name__ == "FullyShardedDataParallel":
            came = "a FullyShardedDataParallel (FSDP1)"
            todo = "Shard it with `torch.distributed.fsdp.fully_shard`, or pass the module before it was wrapped."
            raise ModelStateError.of(name, came, "its flat parameters have no derivatives of their own", todo)
        if not is_wrapped(module):
            continue
        state: Any = module._get_fsdp_state()  # pyright: ignore[reportCallIssue]
        groups = getattr(state, "_fsdp_param_groups", None)
        groups = [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
        for group in filter(None, groups):
            _check_group(name, group)


def _check_group(name: str, group: Any) -> None:
    for managed in group.fsdp_params:
        info, sharded = managed._module_info, managed.sharded_param
        if info.module._parameters.get(info.param_name) is not sharded:
            todo = "Call `reshard()` on the module (after a forward FSDP leaves the outermost one gathered)."
            raise ModelStateError.of(name, "in FSDP's gathered state", "its sharded state is needed", todo)
        policy = managed.mp_policy
        if policy.param_dtype not in (None, sharded.dtype) or policy.output_dtype is not None:
            came, todo = f"with {policy}", "Shard a copy of it without `mp_policy`."
            raise ModelStateError.of(name, came, "products are taken in the dtype of the parameters", todo)
