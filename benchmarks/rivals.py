"""Influence by one rival, executed in the rival's own environment: `python -m benchmarks.rivals FOLDER`.

The folder holds `request.json` (network, rival, methods with their settings), `data.npz` (training and test data) and
`member-K.safetensors` (trained states, the first of which is the network's). `answer-K.npz` is written for each method:
the scores, `(tested, rows)`, positive where a training sample lowers the test loss, and the processor's seconds without
imports; or why it failed.
Only torch, numpy and safetensors are needed beside the rival.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from .networks import SCORED

BATCH = 100
MEMORY = 8  # GiB of address space: what takes more would end the whole process, and others' too


class Request:
    """A network as it was trained, its data, and what is asked.

    Args:
        folder: With the files that this module describes.
        network: Its name.
        method: The rival's class.
        settings: Its arguments.
    """

    def __init__(self, folder: Path, network: str, method: str, settings: dict[str, Any]) -> None:
        self.folder, self.method, self.settings = folder, method, settings
        paths = sorted(folder.glob("member-*.safetensors"))
        self.members = [load_file(path) for path in paths]
        self.model = SCORED[network]()
        self.model.load_state_dict(self.members[0])
        self.model.eval()
        data = np.load(folder / "data.npz")
        self.train, self.test = (
            TensorDataset(*(torch.from_numpy(data[name]) for name in names)) for names in (("x", "y"), ("u", "v"))
        )

    def loaders(self, whole: bool = False) -> list[Any]:
        """Return loaders of training and test data, in batches or, both, in one."""
        return [DataLoader(part, len(part) if whole else BATCH) for part in (self.train, self.test)]


def kronfluence(asked: Request) -> Callable[[], Tensor]:
    """Return EK-FAC by kronfluence; modules that it does not know, such as normalisations, are left out by it."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class Classes(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            scores, labels = model(batch[0]), batch[1]
            if sample:
                labels = torch.multinomial(scores.detach().softmax(1), 1).flatten()
            return cross_entropy(scores, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def call() -> Tensor:
        task, output = Classes(), tempfile.mkdtemp(dir=asked.folder)
        analyzer = Analyzer(
            "run", prepare_model(asked.model, task), task, cpu=True, output_dir=output, disable_tqdm=True
        )
        analyzer.fit_all_factors("ekfac", asked.train, per_device_batch_size=BATCH)
        sizes = {"per_device_query_batch_size": BATCH, "per_device_train_batch_size": BATCH}
        settings = ScoreArguments(**asked.settings)
        analyzer.compute_pairwise_scores("s", "ekfac", asked.test, asked.train, **sizes, score_args=settings)
        return analyzer.load_pairwise_scores("s")["all_modules"]

    return call


def pydvl(asked: Request) -> Callable[[], Tensor]:
    """Return one of pyDVL's influence models, which is named by its class."""
    import pydvl.influence.torch as peer

    settings = dict(asked.settings)
    if "second_order_mode" in settings:
        settings["second_order_mode"] = peer.SecondOrderMode[settings["second_order_mode"]]
    losses = () if asked.method == "EkfacInfluence" else (cross_entropy,)  # which brings its own

    def call() -> Tensor:
        found = getattr(peer, asked.method)(asked.model, *losses, **settings).fit(asked.loaders()[0])
        return found.influences(*asked.test.tensors, *asked.train.tensors).detach()

    return call


def dattri(asked: Request) -> Callable[[], Tensor]:
    """Return one of dattri's attributors, which is named by its class; `members` says of how many networks."""
    import dattri.algorithm as peer
    from dattri.task import AttributionTask

    settings = dict(asked.settings)
    states = asked.members[: settings.pop("members", 1)]
    of_samples = asked.method == "TRAKAttributor"

    def loss(params: Any, data: Any) -> Tensor:
        x, y = (part.unsqueeze(0) for part in data) if of_samples else data
        return cross_entropy(functional_call(asked.model, params, x), y.long())

    def margin(params: Any, data: Any) -> Tensor:
        log = -loss(params, data)
        return log - torch.log(1 - log.exp())

    def probability(params: Any, data: Any) -> Tensor:
        return (-loss(params, data)).exp()

    def call() -> Tensor:
        task = AttributionTask(margin if of_samples else loss, asked.model, states)
        of = {"correct_probability_func": probability} if of_samples else {}
        attributor = getattr(peer, asked.method)(task, **of, **settings)
        train, test = asked.loaders(whole=True)  # where several batches would be solved with one by one
        attributor.cache(train)
        found = attributor.attribute(test_dataloader=test, **({} if of_samples else {"train_dataloader": train}))
        return found.T

    return call


RIVALS = {"kronfluence": kronfluence, "pyDVL": pydvl, "dattri": dattri}


def main() -> None:
    """Answer the request of a folder, one method after another."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY * 2**30, MEMORY * 2**30))
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    for number, asked in enumerate(request["asked"]):
        torch.manual_seed(0)
        try:
            call = RIVALS[request["rival"]](Request(folder, request["network"], **asked))
            start = time.process_time()
            scores = call().detach().float().numpy()
            found: dict[str, Any] = {"scores": scores, "seconds": time.process_time() - start}
        except Exception as error:  # a method that cannot is a finding
            short = "allocate memory" in str(error) or isinstance(error, MemoryError)
            found = {"failed": f"more than {MEMORY} GiB" if short else f"{type(error).__name__}: {error}"}
        np.savez(folder / f"answer-{number}.npz", **found)


if __name__ == "__main__":
    main()
