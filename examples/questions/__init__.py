"""The three questions of the demo, one module each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Answer:
    """What one question came to.

    Attributes:
        question: The question, as a heading.
        finding: The answer in one or two sentences.
        certificate: Its certificate: errors, residuals, settings.
        seconds: How long each step took.
    """

    question: str
    finding: str = ""
    certificate: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Note under `seconds[step]` how long the block takes."""
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start
