"""The torch backend: private copies of models, recorded graphs, and the ladder of routes over them.

What runs: `surroundings` fixes the state a model runs in, `replica` copies a model so that nothing of the caller's
can change, `inputs` checks and copies what goes in, `watch` sees what a forward does, `cut` ends it at a layer,
`record`, `losses` and `row_losses` run it. What sweeps: `graph` reads a recorded graph, `tape` pulls and pushes over
it, `dual` is a push, `ladder` and `trust` say when a fast route is left or believed, `agreement` when two agree,
`rows` and `matrix` (`matrix_plan`, `matrix_places`) hold what comes out. What it may take: `memory` knows the budget,
`chunks` halves when memory runs out. Rooms of their own: `samples` shares sweeps among samples, `layers` goes through
the places where parameters enter. `homogeneous` finds the part of an output that is due to biases: it follows a forward
(`follow`) operation by operation (`operation`), carries other tensors along with the forward's own (`companions`) and
linearises one operation at a time (`local_linear`); `completeness` compares what comes out with the Jacobian.
"""
