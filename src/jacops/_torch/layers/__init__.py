"""Derivatives by parameters, through the places where these enter: nothing of the parameters' length is swept.

`uses` finds the places in a recorded graph and what multiplies there. By rows: `factors` sweeps to the uses, `parts`
are rows held as factors, `collected` those of many samples, which `by_sample` takes together or alone, and
`row_cotangents` are a loss's, row by row. By blocks: `sites` sees a use as samples, positions and channels,
`second` holds second derivatives there, `curvature` and `gauss_newton` fill whole matrices through `blocks` and find
diagonals, by `passes` that take many cotangents at once. `kronecker` groups uses for EK-FAC.
"""
