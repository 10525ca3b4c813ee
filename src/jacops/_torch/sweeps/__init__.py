"""Recorded graphs: linearisations, forward and backward sweeps over them, and what is proved about them."""
