"""The torch backend.

Each package imports from those before it: `model` (private copies and what models do), `sweeps` (recorded graphs and
passes over them), `layers` (where parameters enter a graph), `samples` and `routes` (ways to whole results).
The rest of the library imports `protocol` alone.
"""
