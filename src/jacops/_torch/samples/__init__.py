"""Derivatives by the input, sample by sample, in sweeps that samples share where they provably do not mix.

`batch` takes a batch apart, `runs` runs it whole or cut, `plan` predicts its cost, `sweeps` fills in `results`;
`mixing` checks independence, `bottleneck` splits at a narrow layer, `nested` takes second and higher derivatives.
"""
