"""Checksums of a batch: short, quick, and compared within one process alone."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._digests import byte_view


def checksum(arrays: list[Any]) -> int:
    """Return a checksum of arrays, of those on a device without copying them."""
    digest = 0
    for array in arrays:
        if is_apart(array):
            digest = zlib.crc32(digest_there(array).to_bytes(8, "little", signed=True), digest)
            continue
        view = byte_view(array).numpy() if isinstance(array, Tensor) else np.ascontiguousarray(array)
        digest = zlib.crc32(view.tobytes(), digest)
    return digest


def is_apart(array: Any) -> bool:
    """Return whether an array is in a device's memory, which is slow to read and which nothing but torch writes to."""
    return isinstance(array, Tensor) and array.device.type != "cpu"


def digest_there(tensor: Tensor) -> int:
    """Return a digest of 64 bits that is computed where the tensor is: of its bytes, eight at a time, by place."""
    flat = byte_view(tensor)
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start, part in zip(range(0, len(words), _WORDS), words.split(_WORDS), strict=False):
        # A factor for each place that looks random (the mixer of splitmix64); products are modulo 2 ** 64.
        place = torch.arange(start + 1, start + 1 + len(part), device=tensor.device) * -0x61C8864680B583EB
        place = (place ^ (place >> 30)) * -0x40A7B892E31B1A47
        total += (part * (place ^ (place >> 27) | 1)).sum()
    return int(total)


_WORDS = 2**22  # words that are multiplied at a time: three temporaries of 32 MiB
