"""Pose graphs solved beside GTSAM's Levenberg-Marquardt, in its C++; bundles and batches beside SciPy and SuperLU.

The graphs are of the sizes of well-known public ones. Both begin at the same poses, end at the same objective to eight
digits, and hold the first pose; residuals differ in nothing (`log(Z⁻¹ X_i⁻¹ X_j)`). A fit *again* is one of the same
model, whose plan, ordering and fronts are kept. Goals are for the processor time of one thread: `python -m benchmarks
fits --threads 1 --clock processor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from examples.synthetic_graphs import garage_graph, sphere_graph, synthetic_bundle, walk_graph
from torch import nn

from jacops._extras.graph_problems import Bundle, PoseGraph, projected
from jacops._words import StepSolverName
from jacops.fit import least_squares_batch, levenberg_marquardt

from .harness import Goal, Workload
from .machine import in_a_fresh_process

GTSAM = "gtsam: LevenbergMarquardtOptimizer"
AGAIN, FIRST = "jacops: again", "jacops: first"


def ours(graph: PoseGraph, model: nn.Module) -> float:
    """Return the objective that our fit ends at."""
    found = levenberg_marquardt(
        model,
        manifolds={"poses": graph.chart},
        weight=graph.information,
        fixed={"poses": 0},
        strategy="trust_region",
        inplace=False,
        progress=False,
    )
    return found.cost


def theirs(graph: PoseGraph) -> Callable[[], float]:
    """Return GTSAM's optimisation of the same graph, which is built in the first call."""

    @cache
    def built() -> tuple[Any, Any, Any]:
        import gtsam

        planar = graph.chart.tangent == 3
        order = [0, 1, 2] if planar else [3, 4, 5, 0, 1, 2]  # GTSAM has rotations first

        def pose(numbers: list[float]) -> Any:
            if planar:
                return gtsam.Pose2(*numbers)
            x, y, z, w = numbers[3:]
            return gtsam.Pose3(gtsam.Rot3.Quaternion(w, x, y, z), gtsam.Point3(*numbers[:3]))

        factors, start = gtsam.NonlinearFactorGraph(), gtsam.Values()
        between = gtsam.BetweenFactorPose2 if planar else gtsam.BetweenFactorPose3
        for number, numbers in enumerate(graph.poses.tolist()):
            start.insert(number, pose(numbers))
        edges = zip(graph.source.tolist(), graph.target.tolist(), graph.measured.tolist(), strict=True)
        for (source, target, measured), information in zip(edges, graph.information.numpy(), strict=True):
            noise = gtsam.noiseModel.Gaussian.Information(information[np.ix_(order, order)])
            factors.add(between(source, target, pose(measured), noise))
        prior = gtsam.PriorFactorPose2 if planar else gtsam.PriorFactorPose3
        held = gtsam.noiseModel.Isotropic.Sigma(graph.chart.tangent, 1e-6)
        factors.add(prior(0, pose(graph.poses[0].tolist()), held))
        options = gtsam.LevenbergMarquardtParams()
        options.setRelativeErrorTol(1e-8)
        options.setAbsoluteErrorTol(1e-8)
        return factors, start, options

    def call() -> float:
        import gtsam

        factors, start, options = built()
        return factors.error(gtsam.LevenbergMarquardtOptimizer(factors, start, options).optimize())

    return call


SCIPY, SUPERLU = "scipy: least_squares", "scipy: splu of everything"
_BUNDLE = {"fixed": {"cameras": 0}, "jacobian": "sparse", "inplace": False, "progress": False}


def bundled(model: nn.Module) -> float:
    """Return the objective that our fit of a bundle ends at."""
    return levenberg_marquardt(model, **_BUNDLE).cost


def by_scipy(model: nn.Module) -> Callable[[], float]:
    """Return SciPy's fit of the same bundle, by differences on the true pattern; pattern and start are made once."""
    parameters = dict(model.named_parameters())
    sizes = np.cumsum([p.numel() for p in parameters.values()])[:-1]
    start = torch.cat([p.detach().reshape(-1) for p in parameters.values()]).numpy()
    held, free = start[:9], start[9:]
    pattern = levenberg_marquardt(model, max_steps=1, on_failure="return", **_BUNDLE).jac != 0

    def residual(z: np.ndarray) -> np.ndarray:
        parts = np.split(np.r_[held, z], sizes)
        new = {n: torch.from_numpy(own).view(p.shape) for own, (n, p) in zip(parts, parameters.items(), strict=True)}
        with torch.no_grad():
            return torch.func.functional_call(model, new, ()).reshape(-1).numpy()

    def call() -> float:
        from scipy.optimize import least_squares

        # A tolerance of 1e-8, as it is by default, leaves the objective 4e-9 too large.
        return least_squares(residual, free, jac_sparsity=pattern, method="trf", x_scale="jac", ftol=1e-10).cost

    return call


def one_step(model: nn.Module) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return two ways to take one Levenberg-Marquardt step: ours, and the same with SuperLU on the whole matrix.

    Two cameras are held: with one the scale is free, and an undamped step is not determined.
    """
    held = torch.arange(len(model.get_parameter("cameras"))) < 2
    options = {**_BUNDLE, "fixed": {"cameras": held}, "max_steps": 1, "on_failure": "return"}

    def step(solver: StepSolverName) -> float:
        return levenberg_marquardt(model, solver=solver, **options).cost

    return partial(step, "sparse_cholesky"), partial(step, "splu")


def ring(cameras: int, points: int, seen: int) -> Bundle:
    """Return a bundle whose points are seen by a few neighbours among cameras in a ring."""
    generator = torch.Generator().manual_seed(0)
    views = synthetic_bundle(cameras, 1).cameras
    cloud = torch.randn(points, 3, generator=generator, dtype=torch.float64)
    window = max(2 * seen, cameras // 8)
    near = torch.rand(points, window, generator=generator).argsort(1)[:, :seen]
    camera = ((torch.arange(points)[:, None] * cameras // points + near) % cameras).flatten()
    point = torch.arange(points).repeat_interleave(seen)
    noise = torch.randn(points * seen, 2, generator=generator, dtype=torch.float64)
    return Bundle(views, cloud + 0.01, camera, point, projected(views[camera], cloud[point]) + 0.5 * noise)


def bundles() -> Iterator[Workload]:
    """Yield a small bundle that is solved, and a step of a large one."""
    small = synthetic_bundle(8, 250)
    model = small.residual()
    rivals: dict[str, Callable[[], Any]] = {
        AGAIN: partial(bundled, model),
        FIRST: lambda: bundled(small.residual()),
        SCIPY: by_scipy(model),
    }
    goals = [Goal(SCIPY, faster=1.0, ours=AGAIN), Goal(SCIPY, faster=1.0, ours=FIRST)]
    yield Workload("L7", "bundle of 8 cameras, 4,000 x 822", rivals, alike, goals=goals, compiles=True)
    yield step_of_bundle("L8", 20_000, 3.0)


def step_of_bundle(name: str, points: int, faster: float, rounds: int = 5) -> Workload:
    """Return a step of a bundle of 100 cameras whose points are seen by five each."""
    ours_once, theirs_once = one_step(ring(100, points, 5).residual())
    rivals: dict[str, Callable[[], Any]] = {AGAIN: ours_once, SUPERLU: theirs_once}
    what = f"a step of a bundle of 100 cameras, {10 * points:,} x {900 + 3 * points:,}"
    goals = [Goal(SUPERLU, faster=faster)]
    return Workload(name, what, rivals, alike, rounds, goals, compiles=True)


BATCH, NEW = "jacops: batch", "jacops: batch, first call of a process"
LOOP, WITH_JACOBIANS = "scipy: least_squares, a loop", "scipy: least_squares, a loop, derivatives by hand"
IN_A_BATCH = [Goal(LOOP, faster=20.0, ours=name) for name in (BATCH, NEW)]
_TIMES = np.linspace(0, 2, 20)


def decays(many: int) -> np.ndarray:
    """Return noisy data of as many decays, (many, 20)."""
    rng = np.random.default_rng(0)
    a, b, c = 0.5 + rng.random((3, many, 1)) * np.array([3.0, 2.0, 1.0])[:, None, None]
    return a * np.exp(-b * _TIMES) + c + 0.01 * rng.standard_normal((many, 20))


def curves(many: int) -> Workload:
    """Return fits of three parameters to 20 points each, beside loops over SciPy's with derivatives and without."""
    data = decays(many)
    signals, times = torch.from_numpy(data), torch.from_numpy(_TIMES)

    def batch() -> float:
        def decay(x: torch.Tensor) -> torch.Tensor:
            return x[0] * torch.exp(-x[1] * times) + x[2]

        start = torch.ones(many, 3, dtype=torch.float64)
        return float(least_squares_batch(decay, target=signals, params=start, progress=False).cost.sum())

    def residual(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x[0] * np.exp(-x[1] * _TIMES) + x[2] - y

    def jacobian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        falling = np.exp(-x[1] * _TIMES)
        return np.stack([falling, -x[0] * _TIMES * falling, np.ones(20)], 1)

    def loop(jac: Any) -> float:
        from scipy.optimize import least_squares

        return sum(least_squares(residual, np.ones(3), jac, args=(row,)).cost for row in data)

    rivals: dict[str, Callable[[], Any]] = {
        BATCH: batch,
        NEW: partial(in_a_fresh_process, __name__, f"curves({many}).rivals[BATCH]"),
        LOOP: lambda: loop("2-point"),
        WITH_JACOBIANS: lambda: loop(jacobian),
    }
    what = f"{many:,} curve fits of 3 parameters to 20 points"
    return Workload("L9", what, rivals, nearly, goals=IN_A_BATCH)


def arms(many: int) -> Workload:
    """Return inverse kinematics of planar arms of six joints within limits, each from a posture that it stays near."""
    rng, lengths = np.random.default_rng(1), np.linspace(1.0, 0.5, 6)

    def reached(q: np.ndarray) -> np.ndarray:
        angles = np.cumsum(q, -1)
        return np.stack([(lengths * np.cos(angles)).sum(-1), (lengths * np.sin(angles)).sum(-1)], -1)

    postures = rng.uniform(-1, 1, (many, 6))
    goals = reached(postures + rng.uniform(-0.2, 0.2, (many, 6)))
    links, points, start = torch.from_numpy(lengths), torch.from_numpy(goals), torch.from_numpy(postures)

    def batch() -> np.ndarray:
        def residual(q: torch.Tensor, goal: torch.Tensor, posture: torch.Tensor) -> torch.Tensor:
            angles = torch.cumsum(q, 0)
            hand = torch.stack([(links * torch.cos(angles)).sum(), (links * torch.sin(angles)).sum()])
            return torch.cat([hand - goal, 0.05 * (q - posture)])

        given = {"params": start, "bounds": (-1.2, 1.2), "progress": False}
        return least_squares_batch(residual, (points, start), **given).cost.numpy()

    def loop() -> np.ndarray:
        from scipy.optimize import least_squares

        def residual(q: np.ndarray, goal: np.ndarray, posture: np.ndarray) -> np.ndarray:
            return np.concatenate([reached(q) - goal, 0.05 * (q - posture)])

        pairs = zip(goals, postures, strict=True)
        given = {"bounds": (-1.2, 1.2)}
        return np.array([least_squares(residual, q, args=(goal, q), **given).cost for goal, q in pairs])

    what = f"inverse kinematics of {many:,} arms of 6 joints within limits"
    new = partial(in_a_fresh_process, __name__, f"arms({many}).rivals[BATCH]")
    rivals: dict[str, Callable[[], Any]] = {BATCH: batch, NEW: new, LOOP: loop}
    return Workload("L10", what, rivals, one_by_one, goals=IN_A_BATCH)


def nearly(a: float, b: float) -> bool:
    """Say whether two sums of objectives agree to four digits, as far as SciPy's fits end near minima."""
    return abs(a - b) <= 1e-4 * abs(b)


def one_by_one(a: np.ndarray, b: np.ndarray) -> bool:
    """Say whether objectives agree to six digits, but for one arm in 500, which may fold to another local minimum."""
    return bool((np.abs(a - b) <= 1e-6 * np.abs(b)).mean() >= 0.998)


def alike(a: float, b: float) -> bool:
    """Say whether two objectives agree to eight digits."""
    return abs(a - b) <= 1e-8 * abs(b)


def workloads() -> Iterator[Workload]:
    """Yield graphs like intel, manhattan, kitti_00, parking-garage, sphere2500 and city10000, and bundles."""
    cases = {
        "intel": (walk_graph(1228, 256, straight=12, side=4, noise=0.01), 2.0, 2.8),
        "manhattan": (walk_graph(3500, 1954, straight=5, side=12, noise=0.01), 1.5, 2.0),
        "kitti_00": (walk_graph(4541, 136, straight=90, side=8, noise=0.003), 1.5, 2.0),
        "parking-garage": (garage_graph(), 2.6, 2.8),
        "sphere2500": (sphere_graph(50, 50, 0.02), 1.5, 2.0),
        "city10000": (walk_graph(10_000, 10_688, straight=5, side=20, noise=0.01), 1.0, 2.0),
    }
    for number, (name, (graph, again, first)) in enumerate(cases.items(), 1):
        model = graph.residual()
        rivals: dict[str, Callable[[], Any]] = {
            AGAIN: lambda graph=graph, model=model: ours(graph, model),
            FIRST: lambda graph=graph: ours(graph, graph.residual()),
            GTSAM: theirs(graph),
        }
        goals = [Goal(GTSAM, faster=1 / again, ours=AGAIN), Goal(GTSAM, faster=1 / first, ours=FIRST)]
        what = f"like {name}: {len(graph.poses):,} poses, {len(graph.source):,} edges"
        yield Workload(f"L{number}", what, rivals, alike, goals=goals, compiles=True)
    yield from bundles()
    yield curves(5_000)
    yield arms(2_000)
    # Large: minutes, and 4 GiB for the whole matrix.
    yield step_of_bundle("L11", 100_000, 8.0, rounds=1)
