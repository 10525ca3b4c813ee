"""Influence of 1,500 training on 200 test digits (cases F): exact, iterative, Kronecker-factored, sketched.

Rivals run where they are installed: pyDVL 0.10, kronfluence, dattri. Exact methods must agree with the direct solve;
approximate ones are held to their correlation with it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import jacops
from jacops.solvers import CG, EKFAC

from .harness import BEST, Goal, Workload, same
from .models import LanguageModel

Factors = tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]  # eigenvectors and eigenvalues by module
DAMPING = 1e-2
LINEAR = ("*.inputs", "*.mixed", "*.up", "*.down", "head")  # layers of `LanguageModel` that kronfluence factors
DIRECT, FISHER = "jacops: Hessian, direct", "jacops: empirical Fisher, direct"


class Case:
    """A digits classifier of some width, trained, and its data.

    Args:
        hidden: Width of the hidden layers; one for the cases F, two for the large network.
    """

    def __init__(self, *hidden: int) -> None:
        x, y = load_digits(return_X_y=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = torch.as_tensor(x, dtype=torch.float32)[order] / 16, torch.as_tensor(y)[order].long()
        self.x, self.y, self.test_x, self.test_y = x[:1500], y[:1500], x[1500:1700], y[1500:1700]
        torch.manual_seed(0)
        widths = [64, *hidden, 10]
        layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.Tanh())]
        self.model = nn.Sequential(*layers[:-1])
        optimiser = torch.optim.Adam(self.model.parameters(), 5e-3, weight_decay=1e-3)
        for _ in range(200):
            optimiser.zero_grad()
            cross_entropy(self.model(self.x), self.y).backward()
            optimiser.step()
        self.loader = DataLoader(TensorDataset(self.x, self.y), batch_size=500)
        self.test = DataLoader(TensorDataset(self.test_x, self.test_y), batch_size=200)

    def ours(self, method: Any, curvature: str = "hessian") -> Callable[[], Tensor]:
        """Return a call that computes all influences."""
        wrapped = jacops.TorchTwiceDifferentiable(self.model, cross_entropy)
        options = {"solver": method, "curvature": curvature, "damping": DAMPING}
        return lambda: jacops.compute_influences(wrapped, self.loader, test_data=self.test, **options).values

    def pydvl(self, name: str, **options: Any) -> Callable[[], Tensor]:
        """Return the same by pyDVL."""

        def call() -> Tensor:
            import pydvl.influence.torch as peer

            losses = () if name == "EkfacInfluence" else (cross_entropy,)  # which brings its own
            found = getattr(peer, name)(self.model, *losses, **options).fit(self.loader)
            return found.influences(self.test_x, self.test_y, self.x, self.y).detach()

        return call

    def kronfluence(self) -> Callable[[], Tensor]:
        """Return the same by kronfluence's EK-FAC."""
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import ScoreArguments
        from kronfluence.task import Task

        class Digits(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                scores = model(batch[0])
                labels = batch[1]
                if sample:
                    labels = torch.multinomial(scores.detach().softmax(1), 1).flatten()
                return cross_entropy(scores, labels, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return cross_entropy(model(batch[0]), batch[1], reduction="sum")

        import copy

        model, train, query = copy.deepcopy(self.model), self.loader.dataset, self.test.dataset
        task = Digits()
        model = prepare_model(model, task)

        def call() -> Tensor:
            folder = tempfile.mkdtemp()
            try:
                analyzer = Analyzer("digits", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
                analyzer.fit_all_factors("ekfac", train, per_device_batch_size=500, overwrite_output_dir=True)
                analyzer.compute_pairwise_scores(
                    "scores",
                    "ekfac",
                    query,
                    train,
                    200,
                    per_device_train_batch_size=500,
                    score_args=ScoreArguments(damping_factor=DAMPING),
                    overwrite_output_dir=True,
                )
                return analyzer.load_pairwise_scores("scores")["all_modules"]
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        return call


class Fit:
    """The fit of EK-FAC to the linear layers of a language model, on random texts.

    Both libraries take the same batches, draw one label for each word, average plain products, find eigenvectors in
    single precision and correct the eigenvalues.

    Args:
        blocks: Of the model.
        texts: How many, of 128 words, eight to a batch.
    """

    def __init__(self, blocks: int, texts: int) -> None:
        self.model = LanguageModel(blocks, 128).eval()
        self.x, self.y = (torch.randint(LanguageModel.WORDS, (texts, 128)) for _ in range(2))

    def ours(self, fisher: Literal["monte_carlo", "empirical"] = "monte_carlo") -> Any:
        """Fit by jacops."""
        problem = self._problem(list(zip(self.x.split(8), self.y.split(8), strict=True)))
        return EKFAC(fisher=fisher, weighted=False).approximate(problem.ggn())

    def _problem(self, data: Any) -> jacops.Problem:
        return jacops.Problem(self.model, nn.CrossEntropyLoss(), data, parameters=[f"{name}.*" for name in LINEAR])

    def kronfluence(self, empirical: bool = False) -> Callable[[], Factors]:
        """Return the same by kronfluence."""
        import copy

        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task

        class Texts(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                scores, labels = model(batch[0]).mT.flatten(0, 1), batch[1].flatten()
                if sample:
                    labels = torch.multinomial(scores.detach().softmax(1), 1).flatten()
                return cross_entropy(scores, labels, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        task, data = Texts(), TensorDataset(self.x, self.y)
        model = prepare_model(copy.deepcopy(self.model), task)
        settings = FactorArguments(
            strategy="ekfac", use_empirical_fisher=empirical, eigendecomposition_dtype=torch.float32
        )

        def call() -> Factors:
            with tempfile.TemporaryDirectory() as folder:
                analyzer = Analyzer("texts", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
                analyzer.fit_all_factors("f", data, per_device_batch_size=8, factor_args=settings)
                return analyzer.load_eigendecomposition("f"), analyzer.load_lambda_matrices("f")

        return call

    def agreement(self) -> float:
        """Return the correlation of both libraries' preconditioned gradients of a text, from the data's own labels.

        Every layer is damped by a tenth of its mean eigenvalue, since the two differ in scale.
        """
        blocks, (bases, squares) = self.ours("empirical"), self.kronfluence(empirical=True)()
        problem = self._problem([(self.x[:1], self.y[:1])])
        gradient, found = problem.gradient().unsqueeze(0), list[Tensor]()
        names = {where.start: name for name, where in zip(problem.space.names, problem.space.slices, strict=True)}
        for block in blocks.blocks:
            name = names[block.where[0].start].removesuffix(".weight")
            left, right = (bases[f"{side}_eigenvectors"][name] for side in ("gradient", "activation"))
            theirs = replace(block, left=left[None], right=right[None], values=squares["lambda_matrix"][name][None])
            both = list[Tensor]()
            for own in (block, theirs):
                share, rows = own.values / own.values.mean(), torch.zeros_like(gradient)
                own.write(own.coordinates(gradient) / (share + 0.1), rows)
                both.append(rows[0])
            found.append(torch.stack(both))
        return float(torch.corrcoef(torch.stack(found).sum(0))[0, 1])


def alike(least: float) -> Callable[[Any, Any], bool]:
    """Return a comparison by correlation."""

    def close(a: Tensor, b: Tensor) -> bool:
        return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1]) >= least

    return close


def workloads() -> Iterator[Workload]:
    """Yield the cases F1 to F6, the network of a million parameters, and the fit for a language model."""
    logging.disable(logging.WARNING)
    c, peer = Case(64), find_spec("pydvl") is not None
    rivals = {DIRECT: c.ours("direct")}
    if peer:
        rivals["pyDVL: direct"] = c.pydvl("DirectInfluence", regularization=DAMPING)
    what = "exact Hessian, direct, 4,810 parameters"
    goals = [Goal("pyDVL: direct", faster=15, memory=0.06)]
    yield Workload("F1", what, rivals, same(1e-2), rounds=1, goals=goals)
    rivals = {
        "jacops: Hessian, CG to 1e-3": c.ours(CG(tolerance=1e-3)),
        "jacops: Hessian, CG to 1e-4": c.ours(CG(tolerance=1e-4)),
        "jacops: Hessian, auto": c.ours("auto"),
    }
    if peer:
        options = {"regularization": DAMPING, "rtol": 1e-3, "solve_simultaneously": True}
        rivals["pyDVL: block CG, rtol 1e-3"] = c.pydvl("CgInfluence", **options)
    yield Workload("F2", "exact Hessian, CG", rivals, same(2e-2), rounds=3, goals={"pyDVL: block CG, rtol 1e-3": 1.25})
    exact = c.ours("direct", "ggn")()
    rivals = {
        "jacops: EK-FAC": c.ours(EKFAC(report_residual=False), "ggn"),
        "jacops: EK-FAC, its residuals too": c.ours("ekfac", "ggn"),
    }
    if peer:
        rivals["pyDVL: EK-FAC"] = c.pydvl("EkfacInfluence", update_diagonal=True, hessian_regularization=DAMPING)
    if find_spec("kronfluence") is not None:
        rivals["kronfluence: EK-FAC"] = c.kronfluence()
    for name, call in rivals.items():
        print(f"  {name}: correlation with the exact GGN {correlation(call, exact)}")
    yield Workload("F3", "EK-FAC", rivals, None, rounds=3, goals=[Goal(BEST, faster=10)])
    rivals = {"jacops: GGN, direct": c.ours("direct", "ggn"), DIRECT: c.ours("direct")}
    yield Workload("F4", "GGN, direct, beside the Hessian", rivals, None, rounds=3)
    recipe = "torch.func: vmap(grad), products and a solve"
    rivals = {
        FISHER: c.ours("direct", "empirical_fisher"),
        recipe: fisher(c),
    }
    goals = [Goal(recipe, faster=1 / 2.5)]
    yield Workload("F5", "empirical Fisher, in the space of samples", rivals, same(1e-2), rounds=3, goals=goals)
    rivals = {
        "jacops: Nyström, rank 200": c.ours(jacops.solvers.Nystrom(rank=200, report_residual=False)),
        "jacops: Nyström, its residuals too": c.ours(jacops.solvers.Nystrom(rank=200)),
    }
    if peer:
        options = {"regularization": DAMPING, "rank": 200}
        rivals["pyDVL: Nyström, rank 200"] = c.pydvl("NystroemSketchInfluence", **options)
    yield Workload("F6", "Nyström sketch", rivals, alike(0.95), rounds=3, goals={"pyDVL: Nyström, rank 200": 1.5})
    big = Case(940, 940)
    rivals = {
        "jacops: EK-FAC": big.ours(EKFAC(report_residual=False), "ggn"),
        FISHER: big.ours("direct", "empirical_fisher"),
    }
    if peer:
        rivals["pyDVL: EK-FAC"] = big.pydvl("EkfacInfluence", update_diagonal=True, hessian_regularization=DAMPING)
    goals = [Goal(mib=1024), Goal(mib=1024, ours=FISHER)]
    yield Workload("F7", "955,050 parameters, 1,500 × 200", rivals, None, rounds=1, goals=goals)
    fit = Fit(9, 16)
    rivals = {"jacops: EK-FAC, fit": fit.ours}
    if find_spec("kronfluence") is not None:
        print(f"  preconditioned gradients, one block: correlation with kronfluence {Fit(1, 16).agreement():.5f}")
        rivals["kronfluence: EK-FAC, fit"] = fit.kronfluence()
    goals = [Goal("kronfluence: EK-FAC, fit", faster=1.5)]
    yield Workload("F8", "EK-FAC fitted to a transformer of 30.5 million parameters", rivals, None, 1, goals)


def correlation(call: Callable[[], Tensor], exact: Tensor) -> str:
    """Return the correlation of an answer with the exact one, in words."""
    try:
        return f"{float(torch.corrcoef(torch.stack([call().flatten(), exact.flatten()]))[0, 1]):.3f}"
    except Exception as error:  # a rival that cannot is a finding
        return f"none, {type(error).__name__}"


def fisher(c: Case) -> Callable[[], Tensor]:
    """Return Woodbury's solve written by hand over per-sample gradients of `torch.func`."""
    from torch.func import functional_call, grad, vmap

    params = {n: p.detach() for n, p in c.model.named_parameters()}

    def own(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(c.model, p, (x.unsqueeze(0),)), y.unsqueeze(0))

    def rows(x: Tensor, y: Tensor) -> Tensor:
        parts = vmap(grad(own), (None, 0, 0))(params, x, y)
        return torch.cat([part.flatten(1) for part in parts.values()], 1)

    def call() -> Tensor:
        train, test = rows(c.x, c.y), rows(c.test_x, c.test_y)
        n = len(train)
        cross, gram = test @ train.T, train @ train.T
        inner = torch.linalg.solve(gram / n + DAMPING * torch.eye(n), gram)
        return (cross - cross @ inner / n) / DAMPING

    return call
