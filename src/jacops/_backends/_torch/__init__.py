"""The torch backend: private copies of models, recorded graphs, and the ladder of routes over them.

`surroundings` fixes the state a model runs in; `replica` copies a model so that nothing of the caller's can change;
`watch` sees what a forward does; `graph` reads a recorded graph; `tape` sweeps over it; `record` ties them together.
"""
