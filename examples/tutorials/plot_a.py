"""
Fit a curve
===========

Text.
"""

import torch

import jacops

print(jacops.jacobian(torch.nn.Linear(2, 3), torch.randn(4, 2)))
