"""What the rest of the library uses of the torch backend; nothing else of it is imported from outside.

Models are recorded (`ModelRun`, `record_closure`) as a `Linearization`, which pulls and pushes. Whole results have
routes: `Samples` (by inputs, sample by sample), `WholeJacobian`, and matrices, diagonals and rows by layers.
"""

from __future__ import annotations

from .bias.completeness import Errors, Terms, check_identity, check_slopes
from .bias.homogeneous import BiasParts
from .layers.blocks import mirror
from .layers.part import RowFactors, Rows, matrix_shape, slices
from .layers.parts import Outer
from .layers.projected import projected
from .layers.ranked import Vectors, times_vectors
from .model.cut import At
from .model.freeze import Freeze, FrozenModules
from .model.inputs import (
    ForwardExplained,
    check_fallback,
    check_params,
    input_leaves,
    private_inputs,
    split_input,
)
from .model.likelihoods import (
    KNOWN,
    Likelihood,
    computed_likelihood,
    known_kind,
    known_likelihood,
    label_like,
    likelihood_of,
    row_scale,
)
from .model.loss_curvature import computed_convex, positive_everywhere
from .model.loss_facts import LabelSettings, are_classes, counted_labels, is_convex, label_settings, torch_loss
from .model.losses import call_loss, one_row
from .model.output_curvature import Directions, Elementwise, FullBlocks, Given, ProbedHessian, Softmax
from .model.own_loss import ModelLoss, resolved_loss
from .model.replica import replicate
from .model.row_losses import RowLosses, Weighted
from .model.rows import AxisExplained, Shared, rows_apart, shared_places
from .model.sharded import OWN_FUNCTIONS, Shard, ShardedModel, parts_of, shards_of
from .model.structure import ModelStructure, bare, check_state, is_sharded, parameter_names, structure_of
from .model.targets import SampleTarget
from .routes.by_layers import ByLayers, PreparedFill
from .routes.by_products import measured
from .routes.by_sample import SampleFactors
from .routes.curvature import hessian_diagonal, hessian_layers
from .routes.gauss_newton import gauss_newton_diagonal, gauss_newton_layers
from .routes.kronecker import Gradients, Group, OuterGradients, RecordedBatch
from .routes.labelled import KnownSoftmax, RecordedLabels, softmax_of_labels
from .routes.matrix_places import Places, by_leaf, flat, is_plain, separate
from .routes.row_cotangents import RowSlopes, row_cotangents
from .routes.rows_with_graph import ConnectedFactors
from .routes.sample_batches import Definition
from .routes.whole_ask import Blocks, WholeAsk
from .routes.whole_matrix import BY_LAYERS, WHOLE, ensure_whole_fits, jacobian_blocks, whole_jacobian
from .samples.batch import SampleChanges, Samples
from .samples.followed import FollowedModel
from .samples.nested import RECORDED, ConnectedModel, JacobianFunction, nested
from .samples.plan import planned
from .samples.pooled import SHIFT, PooledModel, counted_positions
from .samples.problems import problem_jacobians
from .samples.results import SampleJacobians
from .samples.routes import BY_SAMPLES
from .sweeps.gradients import asymmetric, difference_step, disagreement, dropped, gradient_linearization
from .sweeps.graph import parents_first
from .sweeps.linearization import Linearization
from .sweeps.mixing import by_digits
from .sweeps.nonfinite import Lost, pull_noting_losses
from .sweeps.proofs import Proofs, identity_key, store_for
from .sweeps.record import ModelRun, Recording, record_at_outputs, record_closure, record_further
from .sweeps.weights import check_kept, weights_of
