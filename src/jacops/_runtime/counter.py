"""Random numbers by place: of a sample in its data, of a target in its sample, of a draw.

A number depends on its place and the seed alone (a counter-based generator: Salmon, Moraes, Dror and Shaw, 2011), so
that neither the batches nor padding change it, and every pass over the data draws the same. The mixing function is
that of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_STEP = -0x61C8864680B583EB  # 2^64 over the golden ratio, as a signed number
_REMEMBERED = 2**12  # numbers of one batch and seed: 32 KiB, and 1 MiB for all that are remembered
_AT_ONCE = 2**16  # numbers mixed together: 512 KiB, which a processor's cache holds
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of SplitMix64 (Steele, Lea and Flood, 2014), as signed numbers


@dataclass(frozen=True)
class Draws:
    """A stream of random numbers over the targets of a data set.

    Attributes:
        seed: Which stream.
        first: Place of the batch's first sample in the data.
    """

    seed: int
    first: int = 0

    def uniform(self, real: Tensor, many: int) -> Tensor:
        """Return numbers in (0, 1) for each target, `(many, n, m)` in float64.

        Args:
            real: Which of a sample's `(n, m)` targets count; the others get numbers that are not to be used.
            many: Draws for each target.
        """
        if real.shape[1] == 1 and many * len(real) <= _REMEMBERED:  # the only target is the first, whether it counts
            return _single(self, len(real), many, real.device).clone()
        return self._computed(real, many)

    def _computed(self, real: Tensor, many: int) -> Tensor:
        n, device = real.shape[0], real.device
        samples = torch.arange(self.first, self.first + n, device=device).unsqueeze(1)
        mixed = _mixed(_mixed(torch.tensor(_signed(self.seed), device=device)) ^ _mixed(samples))
        mixed = _mixed(mixed ^ _mixed(real.long().cumsum(1) - 1))
        draws = _mixed(torch.arange(many, device=device)).view(many, 1, 1)
        found = torch.empty(many, *real.shape, dtype=torch.float64, device=device)
        step = max(1, _AT_ONCE // max(1, real.numel()))
        for some, into in zip(draws.split(step), found.split(step), strict=True):
            into.copy_(_shifted(_mixed(mixed ^ some), 11))
        return found.add_(0.5).mul_(2.0**-53)

    def normal(self, real: Tensor, many: int) -> Tensor:
        """Return standard normal numbers, otherwise as `uniform`."""
        return torch.special.ndtri(self.uniform(real, many))

    def signs(self, real: Tensor, many: int) -> Tensor:
        """Return 1 or -1, otherwise as `uniform`."""
        return torch.where(self.uniform(real, many) < 0.5, -1.0, 1.0)

    def classes(self, p: Tensor, real: Tensor, many: int) -> Tensor:
        """Return classes drawn from probabilities `(n, m, classes)`, `(many, n, m)`."""
        places = self.uniform(real, many).permute(1, 2, 0).contiguous()
        found = torch.empty_like(places, dtype=torch.long)
        rows = max(1, _AT_ONCE // max(1, p[:1].numel()))
        for some, own, into in zip(p.split(rows), places.split(rows), found.split(rows), strict=True):
            steps = some.double().cumsum(-1)
            into.copy_(torch.searchsorted(steps, own.to(steps) * steps[..., -1:], right=True))
        return found.clamp_(max=p.shape[-1] - 1).permute(2, 0, 1)


@lru_cache(32)
def _single(draws: Draws, n: int, many: int, device: torch.device) -> Tensor:
    return draws._computed(torch.ones(n, 1, dtype=torch.bool, device=device), many)


def _signed(number: int) -> int:
    """Return the last 64 bits of a whole number as a signed one."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Return bits shifted to the right, zeros following from the left."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    """Return bits of which each depends on all those given; whole numbers wrap around."""
    bits = bits + _STEP
    bits.bitwise_xor_(_shifted(bits, 30)).mul_(_FACTORS[0])
    bits.bitwise_xor_(_shifted(bits, 27)).mul_(_FACTORS[1])
    return bits.bitwise_xor_(_shifted(bits, 31))
