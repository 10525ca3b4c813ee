"""The torch backend: private copies of models, recorded graphs, and the ladder of routes over them.

What runs: `surroundings` fixes the state a model runs in, `replica` copies a model so that nothing of the caller's
can change, `inputs` checks and copies what goes in, `watch` sees what a forward does, `cut` ends it at a layer,
`record` and `losses` run it. What sweeps: `graph` reads a recorded graph, `tape` pulls and pushes over it, `dual` is a
push, `ladder` and `trust` say when a fast route is left or believed, `agreement` when two agree, `rows` and `matrix`
hold what comes out. By samples: `samples` runs a batch (`sample_runs`, `sample_sweeps`), `mixing` tells samples apart,
`bottleneck` splits at a narrow layer, `homogeneous` finds the part due to biases. By parameters: `uses` finds where
they enter, `layer_factors` sweeps to there, `parts` are rows as factors, `collected` those of many samples, which
`sample_factors` takes together or alone; `row_cotangents` are a loss's, row by row.
"""
