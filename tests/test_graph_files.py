"""Files of graphs and bundles: read whole, or refused with file and line; real ones solved where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from synthetic_graphs import grid_graph, sphere_graph, synthetic_bundle

from jacops._extras.graph_files import read_bal, read_g2o, read_toro
from jacops._extras.graph_problems import projected
from jacops.charts import SE2, SE3, SO3
from jacops.errors import DataError
from jacops.fit import gauss_newton, levenberg_marquardt

DATA = Path(os.environ.get("JACOPS_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
EYE3 = "1 0 0 1 0 1"
EYE6 = "1 0 0 0 0 0 1 0 0 0 0 1 0 0 0 1 0 0 1 0 1"


def written(folder: Path, text: str, name: str = "graph.txt") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not at hand; set JACOPS_DATA to the folder that holds it")
    return DATA / name


# ---- reading -------------------------------------------------------------------------------------------------------


def test_toro_in_the_plane(tmp_path: Path) -> None:
    text = "# a comment\nVERTEX2 7 0 0 0\n\nVERTEX2 3 1 0.5 0.1\nEDGE2 7 3 1 0.4 0.1  4 0.5 3 9 0.1 0.2\nEQUIV 3 7\n"
    graph = read_toro(written(tmp_path, text))
    assert graph.chart is SE2
    assert graph.ids == (7, 3)
    assert (graph.source.tolist(), graph.target.tolist()) == ([0], [1])
    assert graph.information[0].tolist() == [[4, 0.5, 0.1], [0.5, 3, 0.2], [0.1, 0.2, 9]]
    assert graph.equivalent.tolist() == [[1, 0]]
    assert not graph.chained
    assert repr(graph) == "PoseGraph(SE2: 2 poses, 1 edges, 1 equivalent pairs)"
    assert len(graph.merged().poses) == 1
    assert len(graph.merged().source) == 0


def test_toro_in_space_chains_odometry(tmp_path: Path) -> None:
    graph = read_toro(
        written(
            tmp_path,
            f"EDGE3 2 0 -2 0 0 0 0 0 {EYE6}\nEDGE3 0 1 1 0 0 0.1 0.2 0.3 {EYE6}\nEDGE3 1 2 1 0 0 0 0 0 {EYE6}\n",
        )
    )
    assert graph.chained
    roll, pitch, yaw = (torch.tensor(v).double() for v in ([0.1, 0, 0], [0, 0.2, 0], [0, 0, 0.3]))
    R = SO3.matrix(SO3.exp(yaw)) @ SO3.matrix(SO3.exp(pitch)) @ SO3.matrix(SO3.exp(roll))
    torch.testing.assert_close(SE3.matrix(graph.poses[1])[:3, :3], R)
    torch.testing.assert_close(graph.poses[2][:3], graph.poses[1][:3] + R[:, 0])


def test_g2o(tmp_path: Path) -> None:
    flat = read_g2o(
        written(tmp_path, "VERTEX_SE2 0 0 0 0\nVERTEX_SE2 1 1 0 0\nFIX 0\nEDGE_SE2 0 1 1 0 0 2 0.1 0.2 3 0.3 4\n")
    )
    assert flat.information[0].tolist() == [[2, 0.1, 0.2], [0.1, 3, 0.3], [0.2, 0.3, 4]]
    text = "VERTEX_SE3:QUAT 0 0 0 0 0 0 0 1\nVERTEX_SE3:QUAT 1 1 0 0 0 0 0.6001 0.8\n"
    text += f"EDGE_SE3:QUAT 0 1 1 0 0 0 0 0.6 0.8 {EYE6}\n"
    space = read_g2o(written(tmp_path, text))
    assert space.chart is SE3
    SE3.check(space.poses)
    assert float(space.poses[1, 3:].norm()) == pytest.approx(1, abs=1e-15)


def test_bal(tmp_path: Path) -> None:
    text = "1 2 2\n0 0 1.5 -2\n0 1 3 4\n" + "\n".join(map(str, range(9))) + "\n1 2 3\n4 5 6\n"
    bundle = read_bal(written(tmp_path, text))
    assert bundle.cameras.tolist() == [list(range(9))]
    assert bundle.points.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert bundle.observed.tolist() == [[1.5, -2], [3, 4]]
    assert repr(bundle) == "Bundle(1 cameras, 2 points, 2 observations)"


E2 = f"EDGE_SE2 0 1 1 0 0 {EYE3}\n"
V2 = "VERTEX_SE2 0 0 0 0\nVERTEX_SE2 1 0 0 0\n"


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_g2o, "", "there is no edge in it"),
        (read_g2o, V2, "there is no edge in it"),
        (read_g2o, V2 + "EDGE_SE2 0 1 1 0\n", "line 3: EDGE_SE2 is followed by 4 numbers, but 11 are needed"),
        (read_g2o, V2 + f"EDGE_SE2 0 1 1 0 x {EYE3}\n", "line 3: EDGE_SE2 is followed by 'x' in place 5, but a number"),
        (read_g2o, V2 + f"EDGE_SE2 0 1.5 1 0 0 {EYE3}\n", "line 3: .*'1.5' in place 2, but a whole number"),
        (read_g2o, V2 + f"EDGE_SE2 0 1 nan 0 0 {EYE3}\n", "line 3: .*'nan' in place 3, but finite"),
        (read_g2o, V2 + f"EDGE_SE2 0 2 1 0 0 {EYE3}\n", "line 3: EDGE_SE2 is naming vertex 2, but there is no such"),
        (read_g2o, V2 + f"EDGE_SE2 1 1 1 0 0 {EYE3}\n", "line 3: .*from 1 to itself"),
        (read_g2o, V2 + V2 + E2, "line 3: VERTEX_SE2 is naming vertex 0 again"),
        (read_g2o, V2 + E2 + "LANDMARK 1 2\n", "line 4: LANDMARK is not known"),
        (
            read_g2o,
            V2 + E2 + "VERTEX_SE3:QUAT 5 0 0 0 0 0 0 1\n",
            "line 4: .*of SE3, but the file is of SE2 since line 1",
        ),
        (read_g2o, V2 + "EDGE_SE2 0 1 1 0 0 -1 0 0 1 0 1\n", "line 3: .*eigenvalue -1"),
        (read_g2o, "VERTEX_SE3:QUAT 0 0 0 0 0 0 0 2\n", "line 1: .*quaternion of length 2"),
        (read_toro, "EDGE2 0 1 1 0 0 1 0 1 1 0 0\nEDGE2 2 3 1 0 0 1 0 1 1 0 0\n", "leading nowhere near pose 2"),
        (read_toro, "EQUIV 0\n", "line 1: EQUIV is followed by 1 numbers"),
        (read_toro, V2, "line 1: VERTEX_SE2 is not known"),
        (read_bal, "", "line 1: the file is empty"),
        (read_bal, "1 2\n", "line 1: the first line is followed by 2 numbers"),
        (read_bal, "0 1 1\n", "line 1: the first line is with a count below one"),
        (read_bal, "1 1 2\n0 0 1 1\n", "line 2: the file ends after 1 of 2 observations"),
        (read_bal, "1 1 1\n0 1 1 1\n", "line 2: an observation is of camera 0, point 1"),
        (read_bal, "1 1 1\n0 0 1 1\n" + "1\n" * 11, "line 13: the file ends after 11 of 12 numbers"),
        (read_bal, "1 1 1\n0 0 1 1\n" + "1\n" * 13, "line 15: a camera or point is holding the number 13"),
        (read_bal, "1 1 1\n0 0 1 1\n" + "1\n" * 11 + "one\n", "line 14: .*followed by 'one' in place 1"),
    ],
)
def test_malformed_files_are_refused_with_file_and_line(read: object, text: str, message: str, tmp_path: Path) -> None:
    file = written(tmp_path, text, "bad.txt")
    with pytest.raises(DataError, match=f"bad.txt.*{message}"):
        read(file)  # type: ignore[operator]


def test_every_cut_of_a_file_is_refused_or_whole(tmp_path: Path) -> None:
    """A file that breaks off anywhere never gives half an edge."""
    text = V2 + E2 + f"EDGE_SE2 0 1 1 0 0.125 {EYE3}"
    for end in range(len(text)):
        try:
            graph = read_g2o(written(tmp_path, text[:end]))
        except DataError:
            continue
        assert len(graph.poses) == 2
        assert len(graph.source) == text[:end].count("EDGE")


def test_what_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "graph.g2o"
    file.write_bytes(b"VERTEX_SE2 0 0 0 0\n\x1f\x8b\xff\xfe")
    with pytest.raises(DataError, match=r"graph.g2o, line 2: this is not text"):
        read_g2o(file)
    with pytest.raises(FileNotFoundError):
        read_g2o(tmp_path / "none")


def test_the_camera_model_is_that_of_the_format() -> None:
    bundle = synthetic_bundle(2, 5)
    cameras, points = bundle.cameras.numpy()[bundle.camera], bundle.points.numpy()[bundle.point]
    for camera, point, found in zip(
        cameras, points, projected(bundle.cameras[bundle.camera], bundle.points[bundle.point]), strict=True
    ):
        moved = Rotation.from_rotvec(camera[:3]).apply(point) + camera[3:6]
        p = -moved[:2] / moved[2]
        right = camera[6] * (1 + camera[7] * (p @ p) + camera[8] * (p @ p) ** 2) * p
        np.testing.assert_allclose(found.numpy(), right, rtol=1e-12)


# ---- made up -------------------------------------------------------------------------------------------------------


def test_generators_are_reproducible_and_noise_free_ones_are_solved_from_the_start() -> None:
    for make in (lambda n: sphere_graph(3, 6, noise=n), lambda n: grid_graph(4, 5, noise=n)):
        assert torch.equal(make(0.1).measured, make(0.1).measured)
        exact = make(0.0)
        assert float(exact.residual()().detach().abs().max()) < 1e-10
    bundle = synthetic_bundle(3, 8, noise=0.0)
    assert levenberg_marquardt(bundle.residual(), max_steps=300).cost < 1e-12


# ---- real ones -----------------------------------------------------------------------------------------------------


def test_w100_reaches_the_objective_of_another_solver() -> None:
    graph = read_toro(real("w100.graph"))
    assert (len(graph.poses), len(graph.source), len(graph.equivalent)) == (100, 300, 40)
    for solve in (gauss_newton, levenberg_marquardt):
        fit = solve(
            graph.residual(),
            manifolds={"poses": SE2},
            weight=graph.information,
            fixed={"poses": 0},
            ftol=None,
            gtol=1e-8,
        )
        assert fit.cost == pytest.approx(0.5689273820972534, rel=1e-9)  # GTSAM 4.3
    merged = graph.merged()
    assert len(merged.poses) == 60
    assert gauss_newton(merged.residual(), manifolds={"poses": SE2}, fixed={"poses": 0}).success


def test_dubrovnik_is_solved_to_rounding() -> None:
    bundle = read_bal(real("dubrovnik-3-7-pre.txt"))
    assert (len(bundle.cameras), len(bundle.points), len(bundle.observed)) == (3, 7, 19)
    assert levenberg_marquardt(bundle.residual(), ftol=None, xtol=None, gtol=None, max_steps=300).cost < 1e-20


@pytest.mark.slow
def test_sphere2500_from_odometry_to_convergence() -> None:
    graph = read_toro(real("sphere2500.txt"))
    assert (len(graph.poses), len(graph.source)) == (2500, 4949)
    fit = levenberg_marquardt(
        graph.residual(),
        manifolds={"poses": SE3},
        weight=graph.information,
        fixed={"poses": 0},
        ftol=None,
        xtol=None,
        gtol=1e-6,
    )
    assert fit.optimality <= 1e-6
    assert fit.cost == pytest.approx(364.4948685908282, rel=1e-6)  # GTSAM 4.3
    assert len(fit.log) < 30
