"""The routes to Jacobians of samples."""

from .alone import OneByOne
from .bottleneck import Split
from .sweeps import Forward, Reverse

BY_SAMPLES = (Split(), Reverse(), Forward(), OneByOne())
