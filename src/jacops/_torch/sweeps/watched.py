"""Recording what is watched where nothing is known of it, and plainly where that is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ..._runtime.side_effects import SideEffects, SideEffectWatch, WritesState
from ...errors import ModelStateError
from .graph import next_node, shows_all
from .linearization import Linearization
from .proofs import Proofs, ProofStore

Result = TypeVar("Result")

# The beginning of torch's message where the caller's choice of attention kernels has none that fits. Where attention is
# written out, which a plain recording does not do, the choice has no effect.
_NO_KERNEL = "No available kernel"


def watched(store: ProofStore, record: Callable[[SideEffects, SideEffectWatch | None], tuple[Result, Linearization]],
            guarded: Iterable[Tensor], anew: bool = False) -> Result:  # fmt: skip
    """Record a forward, watched where it is not known what it does besides arithmetic.

    Args:
        store: What is known of the function.
        record: Records it, on copies of its weights if it writes into them, and under a watch if there is one.
        guarded: What a forward must not write into.
        anew: A new graph is expected, so that it is observed in the first run.

    Raises:
        ModelStateError: It writes into tensors that are not its own.
    """
    assumed, before = None if anew else store.assumed, None
    if assumed is not None:
        done, before = _assumed(store, record, assumed)
        if done is not None:
            return done
    for cloned in (False, True):
        watch, start = SideEffectWatch([] if cloned else guarded), next_node()
        try:
            done, lin = record(SideEffects(writes=cloned), watch)
        except WritesState:
            continue
        info = lin.graph_info
        same = before is None or (before.shown and before.wiring == info.wiring)
        effects = watch.effects(cloned, same and shows_all(info, start))
        lin.look_up(store, effects)
        if before is None or before.proofs is None or before.wiring == info.wiring or effects.reads:
            return done
        # Torch has other formulas for some operations (the determinant) while a dispatch mode watches.
        before.proofs.effects = effects
        del done, lin, info
        done, lin = record(effects, None)
        lin.look_up(store)
        return done
    came = "writing into tensors that are not its own"
    raise ModelStateError.of("model", came, "its forward must not modify such tensors")


@dataclass(frozen=True)
class _Unknown:
    """What is left of a recording whose graph is not known, or is not known to be right without a watch.

    Attributes:
        wiring: Of its graph; None where it failed.
        proofs: About that graph.
        shown: The graph shows all that was recorded.
    """

    wiring: tuple[Any, ...] | None = None
    proofs: Proofs | None = None
    shown: bool = False


def _assumed(
    store: ProofStore, record: Callable[[SideEffects, None], tuple[Result, Linearization]], effects: SideEffects
) -> tuple[Result | None, _Unknown | None]:
    """Record a forward that is taken to do what the last one did; no result where its graph is another one.

    A plain recording replaces no kernel. It is right where it has the graph of one that would have replaced some: fused
    kernels that are replaced have nodes of their own, and what a checkpoint loses shows in the count of nodes.
    """
    start = next_node()
    try:
        done, lin = record(effects, None)
    except RuntimeError as error:
        if not (effects.plain and str(error).startswith(_NO_KERNEL)):
            raise  # it is the model's own
        return None, _Unknown()
    shown = not effects.plain or shows_all(lin.graph_info, start)
    known = lin.look_up(store)
    if known is not None and shown and known.plain >= effects.plain:
        return done, None
    return None, _Unknown(lin.graph_info.wiring, lin.proofs, shown)
