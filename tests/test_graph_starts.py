"""Where poses of a graph start: at the truth where nothing is noisy, in the right valley where odometry is."""

from dataclasses import replace

import pytest
import torch
from synthetic_graphs import grid_graph, sphere_graph, walk_graph

from jacops._extras.graph_problems import Observations, PoseGraph
from jacops.charts import SE2, SE3, GroupChart
from jacops.errors import InputError
from jacops.fit import levenberg_marquardt


def eyes(count: int, width: int) -> torch.Tensor:
    return torch.eye(width, dtype=torch.float64).repeat(count, 1, 1)


def unweighted(graph: PoseGraph) -> PoseGraph:
    return replace(graph, information=eyes(len(graph.source), graph.chart.tangent))


GRAPHS = {"plane": (unweighted(grid_graph(4, 4, 0.0)), SE2), "space": (unweighted(sphere_graph(4, 5, 0.0)), SE3)}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(graph: PoseGraph, chart: GroupChart, first: torch.Tensor) -> PoseGraph:
    """Return a graph whose poses are anywhere, the first where it was."""
    poses = chart.exp(drawn(len(graph.poses), chart.tangent))
    poses[0] = first
    return replace(graph, poses=poses)


def distance(chart: GroupChart, a: torch.Tensor, b: torch.Tensor) -> float:
    return float(chart.local(a, b).abs().max())


@pytest.mark.parametrize("name", GRAPHS)
def test_without_noise_poses_are_where_they_were(name: str) -> None:
    graph, chart = GRAPHS[name]
    found = moved(graph, chart, graph.poses[0]).initialised()
    assert distance(chart, graph.poses, found.poses) < 1e-10
    assert torch.equal(found.poses[0], graph.poses[0])


@pytest.mark.parametrize("name", GRAPHS)
def test_without_noise_whatever_is_observed_agrees(name: str) -> None:
    graph, chart = GRAPHS[name]
    count, space = 6, chart.space
    sensor, true = chart.exp(0.5 * drawn(1, chart.tangent, seed=1)).expand(count, -1), 3 * drawn(2, space, seed=2)
    pose, point = torch.arange(count) + 1, torch.arange(count) % 2
    sensed = chart.compose(graph.poses[pose], sensor)
    seen = chart.act(chart.inverse(sensed), true[point])
    observations = [
        Observations("point", pose, point, sensor, seen, eyes(count, space)),
        Observations("prior", pose[:1], None, sensor[:1], sensed[:1], eyes(1, chart.tangent)),
        Observations("position", pose[3:4], None, None, graph.poses[4:5, :space], eyes(1, space)),
    ]
    if space == 2:
        far = chart.act(chart.inverse(graph.poses[pose]), true[point])
        polar = torch.stack([torch.atan2(far[:, 1], far[:, 0]), far.norm(dim=1)], 1)
        observations.append(Observations("polar", pose, point, None, polar, eyes(count, 2)))
        observations.append(Observations("bearing", pose, point, None, polar[:, :1], eyes(count, 1)))
    start = replace(graph, observations=tuple(observations), landmarks=drawn(2, space), landmark_ids=(98, 99))
    found = moved(start, chart, graph.poses[3]).initialised()  # a prior says where the first pose is, not its start
    assert distance(chart, graph.poses, found.poses) < 1e-9
    assert float((found.landmarks - true).abs().max()) < 1e-9
    assert all(float(o.detach().abs().max()) < 1e-9 for o in found.residual()())


def test_equivalent_poses_tie_and_isolated_ones_stay() -> None:
    graph, chart = GRAPHS["plane"]
    count = len(graph.poses)
    away = torch.tensor([[5.0, 6.0, 0.25]]).double()
    twice = replace(
        graph,
        poses=torch.cat([graph.poses, graph.poses, away]),
        source=torch.cat([graph.source, graph.source + count]),
        target=torch.cat([graph.target, graph.target + count]),
        measured=graph.measured.repeat(2, 1),
        information=graph.information.repeat(2, 1, 1),
        ids=tuple(range(2 * count + 1)),
        equivalent=torch.tensor([[3, count + 3]]),
    )
    start = moved(twice, chart, graph.poses[0])
    start.poses[-1] = away
    assert distance(chart, twice.poses, start.initialised().poses) < 1e-9


def test_parts_that_landmarks_alone_tie_keep_their_turns() -> None:
    poses = torch.tensor([[0.0, 0.0, 0.0], [4.0, 1.0, 0.5]]).double()
    point = torch.tensor([[2.0, 2.0]]).double()
    seen = SE2.act(SE2.inverse(poses), point.expand(2, 2))
    own = Observations("point", torch.arange(2), torch.zeros(2).long(), None, seen, eyes(2, 2))
    none = torch.zeros(0).long()
    graph = PoseGraph(
        SE2, poses, none, none, torch.zeros(0, 3).double(), eyes(0, 3), (0, 1), torch.zeros(0, 2).long(),
        landmarks=torch.zeros(1, 2).double(), landmark_ids=(7,), observations=(own,),
    )  # fmt: skip
    found = moved(graph, SE2, poses[0])
    found.poses[1, 2] = 0.5
    start = found.initialised()
    torch.testing.assert_close(start.poses, poses)
    torch.testing.assert_close(start.landmarks, point)


def test_landmarks_of_which_bearings_alone_are_known_move_with_their_first_pose() -> None:
    graph, _ = GRAPHS["plane"]
    inside = torch.tensor([2.0, 1.0]).double()
    bearing = torch.atan2(inside[1:], inside[:1]).reshape(1, 1)
    own = Observations("bearing", torch.tensor([5]), torch.tensor([0]), None, bearing, eyes(1, 1))
    start = moved(graph, SE2, graph.poses[0])
    landmark = SE2.act(start.poses[5], inside).unsqueeze(0)
    found = replace(start, observations=(own,), landmarks=landmark, landmark_ids=(99,)).initialised()
    torch.testing.assert_close(found.landmarks[0], SE2.act(graph.poses[5], inside))


@pytest.mark.parametrize("seed", [1, 3])
def test_noisy_odometry_leads_to_another_minimum_and_the_linear_start_to_the_least(seed: int) -> None:
    # 808 poses with few ties, as in the public graph "MIT"; the truth is taken for the start that cannot be bettered.
    graph = walk_graph(808, 20, straight=8, side=10, noise=0.1, seed=seed)
    truth = walk_graph(808, 20, straight=8, side=10, noise=0.0, seed=seed).poses

    def fit(start: torch.Tensor) -> tuple[float, int]:
        found = levenberg_marquardt(
            replace(graph, poses=start).residual(),
            weight=graph.information,
            manifolds={"poses": SE2},
            fixed={"poses": graph.anchors},
        )
        assert found.success
        return found.cost, len(found.log)

    least = fit(truth)[0]
    cost, steps = fit(graph.initialised().poses)
    assert cost == pytest.approx(least, rel=1e-8)
    assert steps <= 10
    assert fit(graph.poses)[0] > 2 * least


def test_information_without_part_in_a_direction_still_ties() -> None:
    graph, chart = GRAPHS["space"]
    information = graph.information.clone()
    information[3, 3:], information[3, :, 3:], information[5, 0], information[5, :, 0] = 0, 0, 0, 0
    start = moved(replace(graph, information=information), chart, graph.poses[0])
    assert distance(chart, graph.poses, start.initialised().poses) < 1e-6


def test_information_that_is_not_finite_is_refused() -> None:
    graph, _ = GRAPHS["plane"]
    with pytest.raises(InputError, match="holding NaN or Inf"):
        replace(graph, information=graph.information * float("nan")).initialised()
