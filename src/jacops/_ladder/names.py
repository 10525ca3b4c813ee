"""The names under which proofs and refusals are kept where more than one place uses them."""

from __future__ import annotations

from enum import StrEnum


class Question(StrEnum):
    """Questions whose refused routes other questions look up."""

    PULL = "pull"
    PUSH = "push"
    SAMPLES = "samples"
    SAMPLES_PLAINLY = "samples without factors"
    LOSSES = "losses"
    HESSIAN = "product"


class RouteName(StrEnum):
    """Routes that are looked up by others, or that fail outside of `answer`."""

    BATCHED = "batched"
    BY_LAYERS = "by layers"
    BY_USES = "by uses"
    DOUBLE_BACKWARD = "double backward"
    TOGETHER = "together"


class Fact(StrEnum):
    """What is proved of a graph besides the claims of routes."""

    COMPILED = "compiled"
    DENSE_BY_PLAN = "dense by plan"
    GRADIENTS_BY_USES = "gradients by uses"
    LAYERS_APART = "samples apart at outputs of layers"
    LOSSES_TOGETHER = "losses together"
    ORDERS_OF_ROWS = "orders of rows"
    REDUCTION = "reduction"
    ROWS_BY_USES = "rows by uses"
    ROWS_OF_LOSS = "rows of the loss's slope"
    SAMPLES_APART = "samples apart"
    SOFTMAX_OF_LABELS = "softmax weighted by labels"
    SPARSE_PLAN = "sparse plan"
    SYMMETRIC = "symmetric"
