"""Remembered recordings replace no kernel where none was met: what changes between calls is seen, and recorded anew."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import wrap_torch_function
from torch.utils.checkpoint import checkpoint

import jacops
from jacops._runtime.kernels import RightKernels
from jacops._torch.protocol import ModelRun
from jacops.errors import InputError, JacopsError

pytestmark = pytest.mark.filterwarnings("ignore::jacops.JacopsWarning", "ignore::UserWarning")


class Switched(nn.Module):
    """A model that does something else when a word is changed, which no key holds."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.first, self.last, self.aside = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.size = nn.Parameter(torch.rand(4, 1) + 0.5)
        self.recurrent = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("constant", torch.ones(4))

    def _mixed(self, h: Tensor) -> Tensor:
        q = h.view(-1, 1, 2, 2)  # of four axes, as fused attention takes them
        return F.scaled_dot_product_attention(q, q, q).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        match self.way:
            case "plain":
                h = h + self.constant
            case "weight norm":
                h = F.linear(h, torch._weight_norm(self.aside.weight, self.size, 0))  # pyright: ignore[reportPrivateImportUsage]
            case "recurrent":
                h = self.recurrent(h.unsqueeze(0))[0][0]
            case "attention":
                h = self._mixed(h)
            case "attention module":
                q = h.unsqueeze(1).expand(-1, 2, -1)
                h = self.attention(q, q, q, need_weights=False)[0].mean(1)
            case "attention unseen":  # modes are given the function as a whole
                h = wrap_torch_function(lambda h: (h,))(self._mixed)(h)
            case "attention in a checkpoint":
                h = checkpoint(self._mixed, h, use_reentrant=False)
            case "norm":
                h = F.layer_norm(h, (4,))
            case "checkpoint":
                h = checkpoint(self.aside, h, use_reentrant=True)
            case "lossy checkpoint":  # it leaves no node: in the graph it is a constant
                h = h + checkpoint(self.aside, self.constant, use_reentrant=True)
            case "held":
                with torch.no_grad():
                    held = self.aside(self.constant)
                h = h + held
            case "unused":
                self.aside(h)
                h = h + self.constant
            case "noise":
                h = h + torch.rand(4)
            case _:
                raise ValueError(self.way)
        return self.last(h)


WAYS = ["plain", "weight norm", "recurrent", "attention", "attention module", "attention unseen", "norm", "held",
        "attention in a checkpoint", "checkpoint", "lossy checkpoint", "unused"]  # fmt: skip


def own_loss(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).pow(3).mean()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)


def hvp(model: nn.Module) -> Any:
    x, y = data()
    return jacops.hvp(model, own_loss, x, y, torch.ones(sum(p.numel() for p in model.parameters())))


def input_jacobian(model: nn.Module) -> Any:
    return jacops.compute_jacobian(model, data()[0])


def pulled(model: nn.Module) -> Any:
    return jacops.Problem(model, own_loss, [data()]).gradient()


def twice(model: nn.Module) -> Any:
    """A result that is differentiated further: norms are written out."""
    x, y = data()
    x.requires_grad_()
    J = jacops.compute_jacobian(model, x, create_graph=True)
    (found,) = torch.autograd.grad(J.pow(2).sum(), x)
    return found


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "hvp": hvp,
    "jacobian": input_jacobian,
    "gradient": pulled,
    "twice": twice,
}


def outcome(call: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    try:
        return call(model)
    except (JacopsError, RuntimeError) as error:
        return type(error), str(error)


def same(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5) if both else type(a) is type(b) and bool(a == b)


def fresh(call: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    """What a model that nothing is remembered of gives."""
    return outcome(call, copy.deepcopy(model))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_changes_its_way_gives_what_a_fresh_one_does(name: str, way: str) -> None:
    torch.manual_seed(0)
    model, call = Switched(), CALLS[name]
    for now in ("plain", "plain", way, way, "plain", way, "held", way, "plain", "plain"):
        model.way = now
        found, right = outcome(call, model), fresh(call, model)
        assert same(found, right), (now, found, right)


@pytest.mark.parametrize("way", WAYS)
def test_calls_of_two_kinds_share_no_graph_that_is_wrong_for_one(way: str) -> None:
    torch.manual_seed(0)
    model = Switched(way)
    for call in (pulled, pulled, hvp, hvp, twice, input_jacobian, twice, pulled, hvp):
        found, right = outcome(call, model), fresh(call, model)
        assert same(found, right), (call, found, right)


def test_a_recording_for_pulls_lends_its_graph_to_no_other() -> None:
    """It keeps fused attention, which has no second derivative and which no mode sees here."""
    model = Switched("attention unseen")

    def kinds(pulled: bool) -> set[str]:
        run = ModelRun(model, data()[0], call="call", parameters=lambda name, parameter: True, pulled=pulled)
        return {node.name() for node in run.recorded().lin.graph_info.nodes}

    for pulled in (True, True, False, False, True, False):
        assert any("Attention" in kind for kind in kinds(pulled)) is pulled


class Seen:
    """Counts the operations that go through the mode of recordings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.many, through = 0, RightKernels.__torch_function__

        def counted(mode: RightKernels, *args: Any) -> Any:
            self.many += 1
            return through(mode, *args)

        monkeypatch.setattr(RightKernels, "__torch_function__", counted)

    def during(self, call: Callable[[nn.Module], Any], model: nn.Module) -> int:
        before = self.many
        outcome(call, model)
        return self.many - before


@pytest.mark.parametrize("name", ["hvp", "jacobian"])
def test_only_what_needs_it_goes_through_the_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, call = Seen(monkeypatch), CALLS[name]
    for way in ("plain", "held", "norm", "weight norm", "attention", "attention module", "recurrent", "unused"):
        model = Switched(way)
        assert seen.during(call, model) > 0
        for _ in range(2):
            assert (seen.during(call, model) == 0) is (way in ("plain", "held", "norm")), way


def by_hand(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).abs().mean()  # the very operations of `l1_loss`


@pytest.mark.parametrize("one", [F.mse_loss, F.l1_loss, F.huber_loss, nn.MSELoss(), nn.SmoothL1Loss()])
@pytest.mark.parametrize("before", [by_hand, F.l1_loss, F.mse_loss])
def test_a_target_that_begins_to_broadcast_is_refused(one: Any, before: Any) -> None:
    way = before
    x, y = data()
    model, v = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.ones(20)

    def own(output: Tensor, y: Tensor) -> Tensor:
        return way(output, y)

    for _ in range(3):
        jacops.hvp(model, own, x, y, v)
        jacops.hvp(model, one, x, y, v)
    way = one
    for loss in (own, one):
        with pytest.raises(InputError, match="elementwise"):
            jacops.hvp(model, loss, x, y[0], v)


@pytest.mark.parametrize("before", ["plain", "held"])
def test_random_states_are_put_back_when_a_model_begins_to_draw(before: str) -> None:
    model = Switched(before)
    for _ in range(3):
        hvp(model)
    model.way = "noise"
    found = torch.get_rng_state()
    hvp(model)
    assert torch.equal(torch.get_rng_state(), found)


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    ],
)
@pytest.mark.parametrize("way", ["plain", "attention", "attention module", "recurrent"])
def test_the_modes_of_the_caller_do_not_reach_a_remembered_recording(way: str, around: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = Switched()
    for now in ("plain", "plain", way, way):
        model.way = now
        for call in (hvp, input_jacobian):
            with around():
                found, right = outcome(call, model), fresh(call, model)
            assert same(found, right), now


def test_a_module_that_is_swapped_and_a_hook_that_attends_are_seen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    for _ in range(2):
        hvp(model)
    model[1] = Switched("weight norm")
    assert same(hvp(model), fresh(hvp, model))
    model[1] = nn.Tanh()
    ways = iter(range(10))

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if next(ways) < 2:
            return None
        q = output.view(-1, 1, 2, 2)
        return F.scaled_dot_product_attention(q, q, q).flatten(1)

    model[1].register_forward_hook(hook)
    hvp(model)
    hvp(model)
    attending = copy.deepcopy(model)
    assert same(hvp(model), hvp(attending))


def test_a_model_that_fails_once_is_recorded_anew() -> None:
    class Failing(nn.Linear):
        fails = False

        def forward(self, input: Tensor) -> Tensor:
            if self.fails:
                raise ValueError("not now")
            return super().forward(input)

    model = Failing(4, 4)
    right = hvp(model)
    hvp(model)
    Failing.fails = True
    with pytest.raises(ValueError, match="not now"):
        hvp(model)
    Failing.fails = False
    assert torch.equal(hvp(model), right)
    assert torch.is_grad_enabled()
    assert not torch._C._len_torch_function_stack()


def test_threads_share_what_is_remembered() -> None:
    torch.manual_seed(0)
    model = Switched("attention module")
    right, wrong = fresh(hvp, model), []

    def work() -> None:
        wrong.extend(found for _ in range(5) if not same(found := outcome(hvp, model), right))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
