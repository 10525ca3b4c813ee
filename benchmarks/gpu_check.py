"""Is jacops right and fast on a device? One command, ten minutes: `python -m benchmarks.gpu_check --device cuda`.

Every row is one question. Its answer is held against plain autograd in float64 on the same device, and a row without
such an error, or with a larger one than it allows, fails. Its time is printed beside that of torch.func, curvlinops and
kronfluence, as a ratio (above 1 jacops is faster); those that are not installed are said to be. `--tiny` takes seconds
and needs no device: it shows that the script runs. The last line is `PASS`, or how many rows failed and were not
reached; so is the exit status.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

import jacops
from jacops.solvers import CG, EKFAC, MINRES

from .gpu_models import TINY, Chain, Language, Plain, Sizes, convolutions, flat, next_word, perceptron
from .harness import curvlinops_module

SECONDS = 600  # for all rows
DAMPING = 0.1

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        name: One line for the table.
        ours: Our answer.
        error: Returns how far an answer is from plain autograd in float64, relative to its size.
        allowed: The largest error that passes: some hundred roundings of the arithmetic.
        rivals: Others who answer it, by name.
    """

    name: str
    ours: Call
    error: Callable[[Any], float]
    allowed: float = 1e-4
    rivals: dict[str, Call] = field(default_factory=dict)


class Clock:
    """Times of calls, with the work that they queue on a device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def best(self, call: Call) -> float:
        """Return the milliseconds of the fastest of some calls, after one that is not counted."""
        call()
        self.wait()
        fastest, end = math.inf, time.perf_counter() + self.seconds
        while fastest == math.inf or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            self.wait()
            fastest = min(fastest, time.perf_counter() - start)
        return 1e3 * fastest

    def waits(self, call: Call) -> int | None:
        """Return how often a call waits for the device, as torch reports; None where it does not."""
        if self.device.type != "cuda":
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    def peak(self, call: Call) -> float | None:
        """Return how far a call raises the device's memory, in MiB; None where that is unknown."""
        if self.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def relative(wanted: Call) -> Callable[[Any], float]:
    """Return the error of an answer beside a tensor in float64, which is computed once it is needed."""

    def error(found: Tensor) -> float:
        exact = wanted().detach()
        if found.shape != exact.shape or not bool(found.isfinite().all()):
            return math.nan
        return float((found.double() - exact).norm() / exact.norm())

    return error


def jacobians(s: Sizes, device: torch.device) -> Iterator[Row]:
    """Yield Jacobians by inputs."""
    shapes = {"perceptron": (s.samples, 64), "convolutions": (s.images, 3, 32, 32)}
    for name, model in (("perceptron", perceptron(s.width)), ("convolutions", convolutions())):
        model, x = model.to(device), torch.randn(shapes[name], device=device)
        by_func: Call = lambda m=model, x=x: vmap(jacrev(lambda z: m(z[None])[0]))(x)  # noqa: E731
        error = relative(Plain(model, x).jacobian)
        ours: Call = lambda m=model, x=x: jacops.compute_jacobian(m, x)  # noqa: E731
        yield Row(f"compute_jacobian, {name}", ours, error, 1e-4, {"torch.func: vmap(jacrev)": by_func})


def products(s: Sizes, device: torch.device) -> Iterator[Row]:
    """Yield products with the Jacobian, the Hessian and the Gauss-Newton matrix of a perceptron, and solves."""
    m, x = perceptron(s.width).to(device), torch.randn(s.samples, 64, device=device)
    y = torch.randint(10, (s.samples,), device=device)
    plain, theta = Plain(m, x, y, cross_entropy), {n: p.detach() for n, p in m.named_parameters()}
    P = sum(p.numel() for p in theta.values())  # noqa: N806
    v, u = torch.randn(P, device=device), torch.randn(s.samples, 10, device=device)
    vs = [part.to(x.dtype) for part in plain.parts(v)]
    tree = dict(zip(theta, vs, strict=True))

    def at(values: Any) -> Tensor:
        return functional_call(m, values, (x,))

    pushed: dict[str, Call] = {"torch.func: jvp": lambda: jvp(at, (theta,), (tree,))[1]}
    yield Row("model_jvp", lambda: jacops.model_jvp(m, x, vs), relative(lambda: plain.jvp(v)), 1e-4, pushed)
    pulled: dict[str, Call] = {"torch.func: vjp": lambda: vjp(at, theta)[1](u)}
    yield Row("model_vjp", lambda: flat(jacops.model_vjp(m, x, u)), relative(lambda: plain.vjp(u)), 1e-4, pulled)
    problem = jacops.Problem(m, cross_entropy, list(zip(x.chunk(4), y.chunk(4), strict=True)))
    H, G = problem.hessian(), problem.ggn()  # noqa: N806
    for name, A, exact in (("Hessian", H, plain.hvp), ("GGN", G, plain.ggnvp)):  # noqa: N806
        rivals: dict[str, Call] = {f"curvlinops: {name}": by_curvlinops(f"{name}LinearOperator", m, x, y, v)}
        error = relative(lambda exact=exact: exact(v))
        yield Row(f"{name} product, 4 batches", lambda A=A: A @ v, error, 1e-4, rivals)
    many = torch.randn(16, P, device=device)
    yield Row("GGN times 16 vectors", lambda: G.apply(many), relative(lambda: torch.stack([*map(plain.ggnvp, many)])))
    b = torch.randn(4, P, device=device)
    for solver in (CG(), CG(block=False), MINRES()):
        name = f"{type(solver).__name__}{', block' if getattr(solver, 'block', False) else ''}"
        ours: Call = lambda k=solver: jacops.solve(G, b, k, damping=DAMPING).x  # noqa: E731
        yield Row(f"solve GGN + {DAMPING}, 4 vectors, {name}", ours, residual(plain, b), 1e-3)
    few = Plain(m, x[:32], y[:32], cross_entropy)
    gram: Call = lambda: jacops.sample_gradients(m, cross_entropy, x[:32], y[:32]).gram()  # noqa: E731
    yield Row("sample_gradients, products of 32", gram, relative(lambda: few.gradients() @ few.gradients().T))


def by_curvlinops(kind: str, model: nn.Module, x: Tensor, y: Tensor, v: Tensor) -> Call:
    """Return a product by curvlinops, its operator built once."""
    built: list[Any] = []

    def call() -> Tensor:
        make = getattr(curvlinops_module(), kind)
        options: dict[str, Any] = {"check_deterministic": False, "num_data": len(x)}
        data = list(zip(x.chunk(4), y.chunk(4), strict=True))
        built or built.append(make(model, nn.CrossEntropyLoss(), list(model.parameters()), data, **options))
        return built[0] @ v

    return call


def residual(plain: Plain, b: Tensor) -> Callable[[Any], float]:
    """Return the true residual of solutions, by plain products in float64."""

    def error(x: Tensor) -> float:
        images = torch.stack([plain.ggnvp(row) + DAMPING * row.double() for row in x])
        return float(((images - b).norm(dim=1) / b.double().norm(dim=1)).max())

    return error


def influence(s: Sizes, device: torch.device) -> Iterator[Row]:
    """Yield EK-FAC and influences on a linear layer with a squared loss, whose curvature EK-FAC has exactly."""
    m, x = nn.Linear(64, 10).to(device), torch.randn(s.rows, 64, device=device)
    y = torch.randn(s.rows, 10, device=device)
    plain, P = Plain(m, x, y, mse_loss), 650  # noqa: N806
    v = torch.randn(P, device=device)
    data = list(zip(x.chunk(4), y.chunk(4), strict=True))
    fitted: Call = lambda: EKFAC().approximate(jacops.Problem(m, mse_loss, data).ggn()) @ v  # noqa: E731
    yield Row("EK-FAC of a linear layer", fitted, relative(lambda: plain.ggnvp(v)))

    def exact() -> Tensor:
        unit = torch.eye(P, device=device, dtype=torch.float64)
        matrix = torch.stack([plain.ggnvp(row) for row in unit])
        test = Plain(m, x[:8], y[:8], mse_loss).gradients()
        return test @ torch.linalg.solve(matrix + DAMPING * unit, plain.gradients().T)

    options: Any = {"loss": mse_loss, "test_data": [(x[:8], y[:8])], "damping": DAMPING}
    for name, solver in (("CG", CG()), ("EK-FAC", EKFAC(report_residual=False))):
        ours: Call = lambda k=solver: jacops.compute_influences(m, data, solver=k, **options).values  # noqa: E731
        rivals = {"kronfluence: EK-FAC": by_kronfluence(m, x, y)} if name == "EK-FAC" else {}
        yield Row(f"compute_influences, {name}, 8 × {s.rows}", ours, relative(exact), 1e-3, rivals)


def by_kronfluence(model: nn.Module, x: Tensor, y: Tensor) -> Call:
    """Return the same factors and scores by kronfluence, whose Fisher matrix is drawn."""

    def call() -> Tensor:
        import tempfile

        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        class Squares(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                output = model(batch[0])
                target = output.detach() + 0.5**0.5 * torch.randn_like(output) if sample else batch[1]
                return mse_loss(output, target, reduction="sum") / 10

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        task = Squares()
        prepared = prepare_model(nn.Sequential(copy.deepcopy(model)), task)  # it wraps children alone
        rows, few = (torch.utils.data.TensorDataset(x[:k].cpu(), y[:k].cpu()) for k in (len(x), 8))
        with tempfile.TemporaryDirectory() as folder:
            quiet: Any = {"disable_tqdm": True, "disable_model_save": True, "output_dir": folder}
            run = Analyzer("check", prepared, task, cpu=x.device.type == "cpu", **quiet)
            size = -(-len(x) // 4)
            how = FactorArguments(strategy="ekfac")
            run.fit_all_factors("factors", rows, per_device_batch_size=size, factor_args=how)
            sizes: Any = {"per_device_query_batch_size": 8, "per_device_train_batch_size": size}
            scored = {"query_dataset": few, "train_dataset": rows, "score_args": ScoreArguments(damping_factor=DAMPING)}
            run.compute_pairwise_scores("scores", "factors", **scored, **sizes)
            return run.load_pairwise_scores("scores")["all_modules"]

    return call


def least_squares(s: Sizes, device: torch.device) -> Iterator[Row]:
    """Yield a sparse Jacobian and a fit, whose matrices are factored on the processor."""
    chain = Chain(s.chain, device)
    plan = jacops.sparse_plan(chain, None)

    def error(found: Any) -> float:
        x, matrix = chain.x.detach().cpu().numpy(), found.tocsr()
        wanted = matrix.__class__((s.chain - 1, s.chain))
        wanted.setdiag(-2 * x[:-1])
        wanted.setdiag(1.0, 1)
        return abs(matrix - wanted).max() / abs(wanted).max()

    yield Row(f"sparse Jacobian, chain of {s.chain}", lambda: plan.evaluate(chain, None).matrix, error, 1e-12)
    x, y = torch.randn(128, 64, device=device).double(), torch.randn(128, 1, device=device).double()

    def fitted() -> Tensor:
        model = nn.Linear(64, 1, bias=False).to(device).double()
        jacops.levenberg_marquardt(model, x, target=y)
        return model.weight.detach()

    yield Row("levenberg_marquardt, linear", fitted, relative(lambda: torch.linalg.lstsq(x, y).solution.T), 1e-4)


def language(s: Sizes, device: torch.device) -> Iterator[Row]:
    """Yield products with a language model in single precision, under autocast, and with weights in bfloat16."""
    m, tokens = Language(s).to(device), torch.randint(s.words, (2, s.tokens), device=device)
    plain, P = Plain(m, tokens, tokens, next_word), sum(p.numel() for p in m.parameters())  # noqa: N806
    v, u = torch.randn(P, device=device), torch.randn(2, s.tokens, s.words, device=device)

    def hessian_by_func() -> Tensor:
        names, tree = [n for n, _ in m.named_parameters()], [part.to(v.dtype) for part in plain.parts(v)]

        def gradient(values: Any) -> Any:
            return torch.func.grad(lambda p: next_word(functional_call(m, p, (tokens,)), tokens))(values)

        with sdpa_kernel(SDPBackend.MATH):
            return flat([*jvp(gradient, ({n: p.detach() for n, p in m.named_parameters()},),
                              (dict(zip(names, tree, strict=True)),))[1].values()])  # fmt: skip

    what = f"language model, {P / 1e6:.1f}M"
    yield Row(f"{what}: model_vjp", lambda: flat(jacops.model_vjp(m, tokens, u)), relative(lambda: plain.vjp(u)), 1e-3)
    for name, call, exact in (("hvp", jacops.hvp, plain.hvp), ("ggnvp", jacops.ggnvp, plain.ggnvp)):
        rivals: dict[str, Call] = {"torch.func: jvp of grad": hessian_by_func} if name == "hvp" else {}
        ours: Call = lambda call=call: call(m, next_word, tokens, tokens, v)  # noqa: E731
        yield Row(f"{what}: {name}", ours, relative(lambda exact=exact: exact(v)), 1e-3, rivals)
    low = copy.deepcopy(m).bfloat16()
    near = Plain(low, tokens)  # of the rounded weights
    pulled: Call = lambda: flat(jacops.model_vjp(low, tokens, u.bfloat16()))  # noqa: E731
    # Eight digits of mantissa through some layers: a few per cent.
    yield Row(f"{what}: model_vjp, bfloat16", pulled, relative(lambda: near.vjp(u.bfloat16())), 0.1)

    def cast() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = m(tokens)
            return flat(jacops.model_vjp(m, tokens, u.to(out.dtype)))

    yield Row(f"{what}: model_vjp, autocast", cast, relative(lambda: plain.vjp(u)), 0.1)


GROUPS = (jacobians, products, influence, least_squares, language)


def row_passes(row: Row, clock: Clock) -> bool:
    """Print a row; return whether it passed."""
    try:
        answer = row.ours()
        error = row.error(answer)
        figures = clock.best(row.ours), clock.peak(row.ours), clock.waits(row.ours)
    except Exception as reason:  # a call that fails is what this looks for
        print(f"FAIL  {row.name:52s} {type(reason).__name__}: {str(reason)[:300]}", flush=True)
        return False
    passed = error <= row.allowed  # not so where there is none: NaN
    ms, peak, waits = figures
    beside = "" if peak is None else f"  peak {peak:7.0f} MiB  {waits} waits"
    print(f"{'ok   ' if passed else 'WRONG'} {row.name:52s} {ms:10.2f} ms  error {error:.0e}{beside}", flush=True)
    for name, call in row.rivals.items():
        try:
            print(f"      / {name:50s} {(taken := clock.best(call)):10.2f} ms  ratio {taken / ms:.2f}", flush=True)
        except ModuleNotFoundError as missing:
            print(f"      / {name:50s} not installed: {missing.name}", flush=True)
        except Exception as reason:  # a rival that cannot is a finding
            print(f"      / {name:50s} fails: {type(reason).__name__}: {str(reason)[:200]}", flush=True)
    return passed


def main(given: Sequence[str] | None = None) -> int:
    """Run all rows; return how many failed or were not reached."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, on any device")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no further row begins")
    options = parser.parse_args(given)
    device, sizes = torch.device(options.device), TINY if options.tiny else Sizes()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # errors are those of float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"torch {torch.__version__}, {name}, jacops {jacops.__version__}, {'tiny' if options.tiny else 'full'} sizes")
    torch.manual_seed(0)
    start, clock = time.monotonic(), Clock(device, 0.02 if options.tiny else 1.0)
    failed: list[str] = []
    late: list[str] = []
    for rows in GROUPS:
        if time.monotonic() - start > options.seconds:
            late.append(rows.__name__)
            continue
        for row in rows(sizes, device):
            if time.monotonic() - start > options.seconds:
                late.append(row.name)
            elif not row_passes(row, clock):
                failed.append(row.name)
    took = f"in {time.monotonic() - start:.0f} s"
    bad = [f"{len(failed)} FAILED: {failed}"] if failed else []
    bad += [f"{len(late)} NOT REACHED: {late}"] if late else []
    print("; ".join(bad) + f" {took}" if bad else f"PASS {took}")
    return len(failed) + len(late)


if __name__ == "__main__":
    sys.exit(min(1, main()))
