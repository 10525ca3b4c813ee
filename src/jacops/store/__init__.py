"""Stored runs: tiles are written to a zarr v3 store, killed runs can be continued, and damaged tiles are detected.

A store is one folder with one or more arrays, each cut into tiles. A tile is a pure function of its index and of the
run's identity: the digests of model, data, loss and settings. It is finished once its chunk is on the disk, whole,
and after that its mark, which holds a digest of the chunk's bytes keyed by the identity and the tile's place.
Any number of processes may write one store: each tile is computed by one of them, under a lock of the kernel's.

Any zarr v3 reader opens such a folder. This one also checks the marks. Needs `pip install 'jacops[store]'`.
"""

from __future__ import annotations

import numpy as np

from .._digests import DataDigest, digest_data, digest_function, digest_module, digest_tensors, surroundings
from .._keywords import keywords
from .._lazy import eager
from ._format import Grid
from ._reading import Location, Store, StoredArray
from ._writing import StoredRun

__all__ = [
    "DataDigest",
    "Grid",
    "Store",
    "StoredArray",
    "StoredRun",
    "digest_data",
    "digest_function",
    "digest_module",
    "digest_tensors",
    "read_store",
    "surroundings",
]


@keywords()
def read_store(path: Location, name: str = "influences", *, partial: bool = False) -> np.ndarray:
    """Return a whole array of a stored run.

    Args:
        path: The store's folder.
        name: Which array.
        partial: Accept an unfinished run; what is missing is NaN (in arrays of integers the smallest value).

    Returns:
        The array, in memory.

    Raises:
        StoreError: There is no store, it is damaged, or it is unfinished and not `partial`.

    Example:
        >>> import tempfile
        >>> import jacops
        >>> folder = tempfile.mkdtemp() + "/run"
        >>> model, data = torch.nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.zeros(2, 1))]
        >>> found = jacops.compute_influences(model, data, loss=torch.nn.functional.mse_loss, damping=1.0, store=folder)
        >>> bool((read_store(folder) == found.values.numpy()).all())
        True
    """
    return Store.open(path).read(name, partial=partial)


eager(__name__)
