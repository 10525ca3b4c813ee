"""Derivatives by parameters, through the places where these enter: nothing of the parameters' length is swept.

`rules` say of an operation what multiplies its parameter and how its output is seen as rows of channels; `uses` finds
such operations in a recorded graph, and `orders` whose sample each row is. By rows: `factors` sweeps to the uses,
`parts` are rows held as factors, `collected` those of many samples, which `by_sample` takes together or alone;
`kronecker` and `gauss_newton` sum their squares. By blocks: `sites` views an output as samples, positions and channels,
`second` holds second derivatives there, `curvature` and `gauss_newton` fill whole matrices through `blocks` and find
diagonals.
"""
