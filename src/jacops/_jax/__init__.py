"""JAX (extra `jax`): a pure function with its parameters and its loss, and compiled sweeps over them.

From the edge inwards: `crossing` (arrays in and out, no dtype lost), `parameters` (a pytree as named leaves), `jaxpr`
(what a trace shows before anything runs), `sweeps` (many rows at once, compared with one by one), `model` (the
derivatives themselves). Everything is pure, as JAX requires of compiled functions; no configuration of JAX is changed.
"""
