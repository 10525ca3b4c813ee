r"""
Scale out: several processes
============================

*A pass over the data takes too long. What has to change so that several processes share
it?* Nothing in the calls. Under ``torchrun`` every process runs the same script, and
each of them computes a part of the batches. If a result is larger than memory, any
number of processes write it to one folder on disk, tile by tile, and a job that was
killed can be continued. This tutorial starts two processes on this
machine, in both ways, and compares with one.
"""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from sklearn.datasets import load_digits

import jacops
from jacops.store import read_store

# %%
# The script
# ----------
# ``torchrun`` needs it in a file; the data, 600 images of digits, lie beside it.
# ``sums`` is about the whole objective of a net before its training: value, largest
# curvature, and a damped Gauss-Newton step, by passes over all batches. ``fill``
# computes a large matrix tile by tile: the similarity of samples, :math:`g_i^\top g_j`,
# of the gradients of their losses. Neither depends on the number of processes; only
# ``main`` does.

SCRIPT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
import jacops
from jacops.store import Grid, StoredRun, digest_data, digest_module, surroundings

x, y = torch.load(Path(__file__).parent / "digits.pt")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)).double()
loss = nn.functional.cross_entropy


def sums():
    problem = jacops.Problem(net, loss, list(zip(x.split(150), y.split(150))))
    value, gradient = problem.value_and_gradient()
    G = problem.ggn()
    step = jacops.solve(G, -gradient, damping=0.1).x[0]
    return value, jacops.linalg.eigenpairs(G).values[0], step


def gradients(rows):
    return jacops.sample_gradients(net, loss, x[rows], y[rows]).dense()


def fill(path, most=None):
    identity = {"net": digest_module(net), "data": digest_data([(x, y)])}
    grids = {"similarity": Grid((600, 600), tile=(120, 120), dtype="float32")}
    mine = []
    with StoredRun.open(path, identity, grids, surroundings=surroundings()) as run:
        for index in run.missing("similarity"):
            rows, columns = run.arrays["similarity"].selection(index)
            left, right = gradients(rows), gradients(columns)
            run.write("similarity", index, (left @ right.T).float())
            mine.append(index)
            if len(mine) == most:
                return mine
        run.complete()
    return mine


def main(folder):
    dist.init_process_group("gloo")  # "nccl" where each process has a GPU
    rank = dist.get_rank()
    torch.save((sums(), fill(f"{folder}/run")), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
"""
folder = Path(tempfile.mkdtemp())
digits = load_digits()
order = digits.target[:600].argsort(kind="stable")  # by digit
x, y = torch.as_tensor(digits.data[order]) / 16, torch.as_tensor(digits.target[order])
torch.save((x, y), folder / "digits.pt")
_ = (folder / "scale_out.py").write_text(SCRIPT)

# %%
# One process first
# -----------------
# Imported, the script runs here. The store gets five tiles before its run ends early,
# as if the job had been killed.

sys.path.insert(0, str(folder))
scale_out = importlib.import_module("scale_out")

alone = scale_out.sums()
first = scale_out.fill(folder / "run", most=5)
print(f"value {alone[0]:.4f}, curvature {alone[1]:.4f}; {len(first)} of 25 tiles")

# %%
# Reading an unfinished array raises an error, unless ``partial=True``.

try:
    read_store(folder / "run", "similarity")
except jacops.errors.StoreIncompleteError as error:
    print(str(error).split(": ", 1)[1].replace(". ", ".\n"))

# %%
# Two processes
# -------------
# In a shell: ``torchrun --standalone --nproc-per-node 2 scale_out.py FOLDER``.

torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
command = [*torchrun, "--nproc-per-node", "2", folder / "scale_out.py", folder]
subprocess.run(command, check=True, capture_output=True)
ranks = [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]

# %%
# Is it right?
# ------------
# Both ranks have the same numbers to the last bit, and those of one process up to the
# order of summation.

(ours, _), (theirs, _) = ranks
names = ("value", "curvature", "step")
for name, *found in zip(names, ours, theirs, alone, strict=True):
    a, b, one = (torch.as_tensor(numbers) for numbers in found)
    error = (a - one).norm() / one.norm()
    print(f"{name}: equal {torch.equal(a, b)}, from one process {error:.0e}")

# %%
# Who filled the store
# --------------------
# The tiles of the stopped run were kept. Each of the others was computed by one of the
# two ranks; which one depends on timing, the numbers do not. Images of one
# digit have similar gradients, hence the blocks.

owners = np.zeros((5, 5))
for owner, tiles in enumerate((first, *(mine for _, mine in ranks)), 1):
    for tile in tiles:
        owners[tile] = owner
similarity = read_store(folder / "run", "similarity")

figure, (left, right) = plt.subplots(1, 2, figsize=(5.6, 3.4), layout="constrained")
left.imshow(similarity, cmap="RdBu", vmin=-3, vmax=3)
left.set(title="similarity of gradients", xlabel="sample", ylabel="sample")
colours = {"stopped run": "0.8", "rank 0": "#4c72b0", "rank 1": "#dd8452"}
right.imshow(owners, cmap=ListedColormap(list(colours.values())), vmin=1, vmax=3)
right.set(title="tiles by process", xlabel="tile", ylabel="tile")
for label, colour in colours.items():
    right.plot([], [], "s", color=colour, label=label)
figure.legend(frameon=False, ncols=3, loc="outside lower right")
plt.show()

whole = scale_out.gradients(slice(None))
error = np.abs(similarity - (whole @ whole.T).numpy()).max() / np.abs(similarity).max()
print(f"relative difference from the matrix made at once: {error:.0e}, in float32")

# %%
# On a cluster
# ------------
# .. code-block:: sh
#
#    #SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8
#    srun torchrun --nnodes 4 --nproc-per-node 8 \
#        --rdzv-backend c10d --rdzv-endpoint "$FIRST_NODE:29500" scale_out.py FOLDER
#
# * ``"nccl"`` instead of ``"gloo"``, with model and batches on the GPU of
#   ``LOCAL_RANK``.
# * There should be at least as many batches as ranks, of like sizes. A loader with a
#   ``DistributedSampler`` lets each rank read its own rows only.
# * The folder of a store has to be on a file system that all nodes see and that has
#   locks (``flock``). Its processes need no group: the tasks of an array job
#   (``#SBATCH --array=0-31``) share it as well, and if a task is killed, only its
#   current tile is computed again.
# * ``jacops.compute_influences(..., store=)`` and ``compute_jacobian(..., store=)``
#   fill a store in one call.
#
# More in :doc:`/distributed` and :doc:`/stored-runs`; a model that is sharded over GPUs
# (FSDP): :doc:`/sharded`.
