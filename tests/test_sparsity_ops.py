"""Detection against brute force over torch's own database of operations: nothing may be missed."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from jacops.errors import JacopsError
from jacops.sparse import Pattern, detect_pattern

pytest.importorskip("expecttest", reason="torch's database of operations needs it")
SAMPLES, LARGEST_INPUT, LARGEST_OUTPUT = 4, 150, 300
LEAST_OPERATIONS, LEAST_SAMPLES, LEAST_EXACT = 400, 1200, 0.75


class OfOne(nn.Module):
    """A function of one tensor, the same random draws every time."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        leaves = [t for t in tree_leaves(self.function(x)) if isinstance(t, Tensor)]
        held = [t.reshape(-1) for t in leaves if t.is_floating_point() and t.layout is torch.strided]
        return torch.cat(held)


def brute(model: nn.Module, x: Tensor) -> np.ndarray | None:
    """Return where the Jacobian is not zero, row by row; None where there is nothing to compare."""
    x = x.clone().requires_grad_()
    y = model(x.clone())
    if not y.requires_grad or not 0 < y.numel() <= LARGEST_OUTPUT:
        return None
    rows = [torch.autograd.grad(v, x, retain_graph=True, materialize_grads=True)[0].reshape(-1) for v in y]
    J = torch.stack(rows)
    return None if not torch.isfinite(J).all() else (J != 0).numpy()


def cases() -> Iterator[tuple[str, nn.Module, Tensor, np.ndarray]]:
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        if not op.supports_autograd or torch.float64 not in op.supported_dtypes("cpu"):
            continue
        try:
            samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
        except Exception:  # noqa: BLE001 - the database needs parts that are not built in here
            continue
        used = 0
        for sample in samples:
            x = sample.input
            if used == SAMPLES or not isinstance(x, Tensor) or not x.requires_grad or x.layout is not torch.strided:
                continue
            if not 0 < x.numel() <= LARGEST_INPUT:
                continue
            finish = sample.output_process_fn_grad or (lambda y: y)
            model = OfOne(lambda z, op=op, s=sample, finish=finish: finish(op(z, *s.args, **s.kwargs)))
            try:
                truth = brute(model, x.detach())
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                continue
            if truth is not None:
                used += 1
                yield f"{op.name} {op.variant_test_name}".strip(), model, x.detach(), truth


def detected(model: nn.Module, x: Tensor, local: bool) -> Pattern:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detect_pattern(model, x, wrt="inputs", local=local)


@pytest.mark.filterwarnings("ignore")
def test_no_entry_is_missed_over_the_database_of_operations(record_property: Any) -> None:
    found: Counter[str] = Counter()
    missed, refused, unknown = {}, {}, Counter()
    names = set()
    for name, model, x, truth in cases():
        names.add(name)
        found["samples"] += 1
        for local in (True, False):
            try:
                pattern = detected(model, x, local)
            except JacopsError as error:
                if truth.any():
                    refused[name] = repr(error)[:200]
                continue
            seen = pattern.matrix.toarray()
            if (truth & ~seen).any():
                missed[name, local] = int((truth & ~seen).sum())
            unknown.update(pattern.unknown.keys())
            found["exact here" if local else "exact, reusable"] += bool((seen == truth).all())
    share = found["exact here"] / max(found["samples"], 1)
    for key, value in {"operations": len(names), **found}.items():
        record_property(key, value)
    print(f"\n{len(names)} operations, {dict(found)}, {share:.1%} exact; without a rule: {dict(unknown)}")
    assert not missed, f"entries missed: {missed}"
    assert not refused, f"refused: {refused}"
    assert len(names) >= LEAST_OPERATIONS
    assert found["samples"] >= LEAST_SAMPLES
    assert share >= LEAST_EXACT
