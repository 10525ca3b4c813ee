"""Files of graphs and bundles: read whole, or refused with file and line; real ones solved where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import logm
from scipy.spatial.transform import Rotation
from synthetic_graphs import grid_graph, sphere_graph, synthetic_bundle

from jacops._extras.graph_files import read_bal, read_g2o, read_toro
from jacops._extras.graph_problems import projected
from jacops.charts import SE2, SE3, SO3
from jacops.errors import DataError, InputError
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
    assert repr(bundle) == "Bundle(1 cameras, 2 points, 2 observations, 2 of points behind their camera)"


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


# ---- landmarks, priors, and what files leave out -------------------------------------------------------------------

POLE = torch.tensor([2.0, 3.0]).double()


def seen_from(pose: list[float], point: torch.Tensor) -> np.ndarray:
    """Return a point in the axes of a pose in the plane, by a rotation matrix written out."""
    c, s = np.cos(pose[2]), np.sin(pose[2])
    return np.array([[c, s], [-s, c]]) @ (point.numpy() - np.array(pose[:2]))


def test_landmarks_and_priors_in_the_plane(tmp_path: Path) -> None:
    poses = [[0.5, -0.25, 0.75], [1.0, 0.5, -2.5]]
    text = "".join(f"VERTEX_SE2 {4 + i} {p[0]} {p[1]} {p[2]}\n" for i, p in enumerate(poses))
    text += "VERTEX_XY 9 2.5 3.5\nFIX 4\nFIX 5 9\n"
    for i, pose in enumerate(poses):
        x, y = seen_from(pose, POLE)
        text += f"EDGE_SE2_XY {4 + i} 9 {x!r} {y!r} 2 0.5 1\nEDGE_BEARING_SE2_XY {4 + i} 9 {np.arctan2(y, x)!r} 4\n"
        text = text.replace("np.float64(", "").replace(")", "")
    text += f"EDGE_PRIOR_SE2 5 1 0.5 -2.5 {EYE3}\nEDGE_PRIOR_SE2_XY 4 0 0 1 0 1\n"
    graph = read_g2o(written(tmp_path, text))
    assert (graph.landmark_ids, graph.landmarks.tolist()) == ((9,), [[2.5, 3.5]])
    assert (graph.fixed.tolist(), graph.fixed_landmarks.tolist()) == ([0, 1], [0])
    assert [o.kind for o in graph.observations] == ["point", "bearing", "prior", "position"]
    assert graph.observations[0].information[0].tolist() == [[2, 0.5], [0.5, 1]]
    model = graph.residual()
    with torch.no_grad():
        model.landmarks.copy_(POLE)
    outputs = [o.detach() for o in model()]
    assert [float(o.abs().max()) < 1e-12 for o in outputs] == [True, True, True, False]
    torch.testing.assert_close(outputs[3], graph.poses[:1, :2])
    fit = levenberg_marquardt(graph.residual(), weight=graph.weights, manifolds={"poses": SE2}, fixed={"poses": [0, 1]})
    torch.testing.assert_close(fit.x["landmarks"][0], POLE)
    assert "1 landmarks" in repr(graph)
    assert "2 poses fixed" in repr(graph)


def test_landmarks_in_space_are_seen_by_a_sensor_beside_the_pose(tmp_path: Path) -> None:
    turn = Rotation.from_rotvec([0.1, -0.4, 0.3])
    q, offset = turn.as_quat(), np.array([0.5, 0.25, -1.0])
    point, place = np.array([3.0, -2.0, 1.0]), np.array([1.0, 2.0, 0.5])
    seen = turn.inv().apply(point - place) - offset
    words = lambda *v: " ".join(repr(float(n)) for n in v)  # noqa: E731
    text = f"PARAMS_SE3OFFSET 0 {words(*offset, 0, 0, 0, 1)}\nVERTEX_SE3:QUAT 1 {words(*place, *q)}\n"
    text += f"VERTEX_TRACKXYZ 2 {words(*point)}\nEDGE_SE3_TRACKXYZ 1 2 0 {words(*seen)} 1 0 0 1 0 1\n"
    text += f"EDGE_SE3_PRIOR 1 0 {words(*(place + turn.apply(offset)), *q)} {EYE6}\n"
    graph = read_g2o(written(tmp_path, text))
    for output in graph.residual()():
        assert float(output.detach().abs().max()) < 1e-12
    with pytest.raises(DataError, match="line 4: EDGE_SE3_TRACKXYZ is naming offset 3, but there is no such offset"):
        read_g2o(written(tmp_path, text.replace("1 2 0 ", "1 2 3 ")))


def as_matrix(pose: np.ndarray) -> np.ndarray:
    """Return a pose of three or seven numbers as a homogeneous matrix."""
    space = 2 if len(pose) == 3 else 3
    found = np.eye(space + 1)
    found[:space, space] = pose[:space]
    turn = Rotation.from_rotvec([0, 0, pose[2]]) if space == 2 else Rotation.from_quat(pose[3:])
    found[:space, :space] = turn.as_matrix()[:space, :space]
    return found


def as_tangent(matrix: np.ndarray) -> np.ndarray:
    """Return the logarithm of a homogeneous matrix, translation first."""
    found = np.real(logm(matrix))
    turns = [found[1, 0]] if len(matrix) == 3 else [found[2, 1], found[0, 2], found[1, 0]]
    return np.r_[found[:-1, -1], turns]


def random_pose(space: int, generator: np.random.Generator) -> np.ndarray:
    place, turn = generator.normal(size=space), generator.normal(size=3)
    return np.r_[place, turn[2]] if space == 2 else np.r_[place, Rotation.from_rotvec(turn).as_quat()]


@pytest.mark.parametrize(("space", "tag"), [(2, "SE2"), (3, "SE3")])
def test_edges_between_sensors_have_the_length_that_they_measure(space: int, tag: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(space)
    first, second, here, there, measured, plain = (random_pose(space, generator) for _ in range(6))
    width = 3 if space == 2 else 6
    root = generator.normal(size=(width, width))
    full = root.T @ root
    upper = full[np.triu_indices(width)]
    words = lambda *v: " ".join(repr(float(n)) for n in v)  # noqa: E731
    kind = "" if space == 2 else ":QUAT"
    text = f"PARAMS_{tag}OFFSET 0 {words(*here)}\nPARAMS_{tag}OFFSET 1 {words(*there)}\n"
    text += f"VERTEX_{tag}{kind} 4 {words(*first)}\nVERTEX_{tag}{kind} 5 {words(*second)}\n"
    text += f"EDGE_{tag}{kind} 4 5 {words(*plain)} {words(*upper)}\n"
    text += f"EDGE_{tag}_OFFSET 4 5 0 1 {words(*measured)} {words(*upper)}\n"
    graph = read_g2o(written(tmp_path, text))
    X, Y, H, T, M, P = (as_matrix(p) for p in (first, second, here, there, measured, plain))
    errors = [np.linalg.inv(P) @ np.linalg.inv(X) @ Y, np.linalg.inv(M) @ np.linalg.inv(X @ H) @ Y @ T]
    found = graph.residual()().detach().numpy()
    for k, error in enumerate(map(as_tangent, errors)):
        assert found[k] @ graph.information[k].numpy() @ found[k] == pytest.approx(error @ full @ error, rel=1e-9)
    with pytest.raises(DataError, match=rf"line 6: EDGE_{tag}_OFFSET is naming offset 7, but there is no such offset"):
        read_g2o(written(tmp_path, text.replace("4 5 0 1 ", "4 5 0 7 ")))


def test_a_chain_of_sensors_gives_the_chain_of_poses(tmp_path: Path) -> None:
    text = f"PARAMS_SE2OFFSET 3 1 0 0\nEDGE_SE2_OFFSET 0 1 3 3 0 0 {np.pi / 2} {EYE3}\n"
    graph = read_g2o(written(tmp_path, text))  # the sensor, one ahead, turns on the spot: its pose goes round it
    torch.testing.assert_close(graph.poses[1], torch.tensor([1.0, -1.0, np.pi / 2]).double())
    assert graph.ids == (0, 1)


def test_landmarks_in_the_plane_are_seen_by_sensors_beside_their_poses_and_on_them(tmp_path: Path) -> None:
    pose, sensor = np.array([1.0, 2.0, 0.5]), np.array([0.5, -0.25, 1.25])
    near, far = (
        np.linalg.inv(m) @ [*POLE.tolist(), 1.0] for m in (as_matrix(pose), as_matrix(pose) @ as_matrix(sensor))
    )
    text = f"PARAMS_SE2OFFSET 0 0.5 -0.25 1.25\nVERTEX_SE2 1 1 2 0.5\nVERTEX_XY 2 {POLE[0]} {POLE[1]}\n"
    text += f"EDGE_SE2_XY 1 2 {near[0]} {near[1]} 1 0 1\nEDGE_SE2_POINTXY_OFFSET 1 2 0 {far[0]} {far[1]} 1 0 1\n"
    (output,) = read_g2o(written(tmp_path, text)).residual()()
    assert output.shape == (2, 2)
    assert float(output.detach().abs().max()) < 1e-12


def test_bearing_and_range_place_a_landmark(tmp_path: Path) -> None:
    x, y = seen_from([1.0, 0.0, 0.0], POLE)
    text = f"EDGE2 0 1 1 0 0\nBR 1 7 {np.arctan2(y, x)} {np.hypot(x, y)} 0.1 0.5\n"
    graph = read_toro(written(tmp_path, text))
    torch.testing.assert_close(graph.landmarks[0], POLE)
    assert graph.information[0].tolist() == torch.eye(3).tolist()
    torch.testing.assert_close(graph.observations[0].information[0], torch.diag(torch.tensor([100.0, 4.0])).double())
    assert all(float(o.detach().abs().max()) < 1e-12 for o in graph.residual()())
    with pytest.raises(DataError, match="line 2: BR is with a standard deviation of 0"):
        read_toro(written(tmp_path, text.replace("0.1 0.5", "0 0.5")))


def test_edges_without_information_have_the_identity(tmp_path: Path) -> None:
    graph = read_toro(written(tmp_path, f"EDGE3 0 1 1 0 0 0 0 0\nEDGE3 1 2 1 0 0 0 0 0 {EYE6.replace('1', '4')}\n"))
    assert graph.information.tolist() == [torch.eye(6).tolist(), (4 * torch.eye(6)).tolist()]


def test_toro_files_in_the_order_of_g2o(tmp_path: Path) -> None:
    by_rows = written(tmp_path, "EDGE2 0 1 1 0 0 4 0 0 9 0 25\nEDGE2 1 2 1 0 0 4 0.5 0.25 9 0.125 25\n", "rows")
    right = [[4, 0.5, 0.25], [0.5, 9, 0.125], [0.25, 0.125, 25]]
    for order in ("auto", "g2o"):
        found = read_toro(by_rows, order=order).information  # type: ignore[arg-type]
        assert found[0].tolist() == torch.diag(torch.tensor([4, 9, 25])).tolist()
        assert found[1].tolist() == right
    with pytest.raises(DataError, match="line 1: EDGE2 is with an information matrix"):
        read_toro(by_rows, order="toro")
    own = written(tmp_path, "EDGE2 0 1 1 0 0 4 0.5 9 25 0.25 0.125\n")
    for order in ("auto", "toro"):
        assert read_toro(own, order=order).information[0].tolist() == right  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`order` is 'rows'"):
        read_toro(own, order="rows")  # type: ignore[arg-type]


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "marked.g2o"
    file.write_bytes(b"\xef\xbb\xbf" + (V2 + E2).encode())
    assert len(read_g2o(file).poses) == 2


def test_information_rounded_to_seven_digits_is_definite(tmp_path: Path) -> None:
    """Matrices of condition 1e9, of very different scales, whose rounding makes them negative in a direction."""
    draw = np.random.default_rng(0)
    text, exact = V2, []
    while len(exact) < 20:
        Q = np.linalg.qr(draw.normal(size=(3, 3)))[0]
        scale = np.diag([1.0, 1e3, 1e-2])
        A = scale @ Q @ np.diag([1.0, 1.0, 1e-9]) @ Q.T @ scale
        rounded = np.array([[float(f"{v:.6e}") for v in row] for row in A])
        if np.linalg.eigvalsh(rounded)[0] < 0:
            exact.append(A)
            text += "EDGE_SE2 0 1 1 0 0 " + " ".join(f"{A[i, j]:.6e}" for i in range(3) for j in range(i, 3)) + "\n"
    found = read_g2o(written(tmp_path, text)).information
    torch.linalg.cholesky(found)
    assert torch.equal(found, found.mT)
    scale = np.sqrt(np.stack([np.diag(A) for A in exact]))
    error = (found.numpy() - np.stack(exact)) / scale[:, :, None] / scale[:, None]
    assert np.abs(error).max() < 2e-6


def test_matrices_that_are_definite_are_kept_to_the_bit(tmp_path: Path) -> None:
    graph = read_g2o(written(tmp_path, V2 + "EDGE_SE2 0 1 1 0 0 2 0.1 0.2 3 0.3 0.1\nEDGE_SE2 0 1 1 0 0 1 0 0 0 0 1\n"))
    assert graph.information[0].tolist() == [[2, 0.1, 0.2], [0.1, 3, 0.3], [0.2, 0.3, 0.1]]
    assert graph.information[1].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]  # nothing is known of y


def test_all_lines_whose_information_is_negative_are_listed(tmp_path: Path) -> None:
    bad = "EDGE_SE2 0 1 1 0 0 -1 0 0 1 0 1\n"
    with pytest.raises(DataError, match=r"line 4: .*eigenvalue -1, .*\(so are 2 of 3 such lines: 4, 5\)"):
        read_g2o(written(tmp_path, V2 + E2 + 2 * bad))
    with pytest.raises(DataError, match=r"so are 20 of 20 such lines: 3, 4, .*12, \.\.\.\)"):
        read_g2o(written(tmp_path, V2 + 20 * bad))


def test_lines_of_other_kinds_are_skipped_and_counted(tmp_path: Path) -> None:
    file = written(tmp_path, V2 + E2 + "CAMERA 1 2\nCAMERA 3\nGPS x\n")
    graph = read_g2o(file, unknown="skip")
    assert graph.skipped == {"CAMERA": 2, "GPS": 1}
    assert "lines skipped: {'CAMERA': 2, 'GPS': 1}" in repr(graph)
    with pytest.raises(DataError, match='line 4: CAMERA is not known, .*`unknown="skip"`'):
        read_g2o(file)
    with pytest.raises(DataError, match=r"there is no edge in it, .*Lines skipped: \{'GPS': 1\}"):
        read_g2o(written(tmp_path, "GPS x\n"), unknown="skip")
    with pytest.raises(InputError, match="`unknown` is 'ignore'"):
        read_g2o(file, unknown="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("read", "text", "right"),
    [
        (read_toro, V2, "read_g2o"),
        (read_g2o, "EDGE2 0 1 1 0 0 1 0 1 1 0 0\n", "read_toro"),
        (read_g2o, "1 2 2\n0 0 1 1\n", "read_bal"),
        (read_toro, "1 2 2\n0 0 1 1\n", "read_bal"),
        (read_bal, V2, "read_g2o"),
        (read_bal, "VERTEX2 0 0 0 0\n", "read_toro"),
    ],
)
def test_the_wrong_reader_names_the_right_one(read: object, text: str, right: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"line 1: .*`{right}`"):
        read(written(tmp_path, text))  # type: ignore[operator]


def test_parts_and_isolated_poses_are_reported(tmp_path: Path) -> None:
    text = "".join(f"VERTEX_SE2 {n} {n} 0 0\n" for n in range(7)) + "VERTEX_XY 7 0 0\nFIX 3\n"
    text += f"EDGE_SE2 1 0 1 0 0 {EYE3}\nEDGE_SE2 2 3 1 0 0 {EYE3}\n"
    text += "EDGE_SE2_XY 4 7 0 0 1 0 1\nEDGE_SE2_XY 5 7 0 0 1 0 1\n"
    graph = read_g2o(written(tmp_path, text))
    assert graph.components.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert graph.isolated.tolist() == [6]
    assert graph.anchors.tolist() == [0, 3, 4, 6]
    assert "4 parts that nothing ties together, 1 isolated poses" in repr(graph)
    whole = read_g2o(written(tmp_path, V2 + E2))
    assert whole.anchors.tolist() == [0]
    assert "parts" not in repr(whole)
    apart = read_g2o(written(tmp_path, text.replace("FIX 3\n", f"EDGE_PRIOR_SE2 2 0 0 0 {EYE3}\n")))
    assert apart.anchors.tolist() == [0, 4, 6]


@pytest.mark.parametrize("place", range(4))
def test_quaternions_of_zeros_and_numbers_that_are_none_are_refused(place: int, tmp_path: Path) -> None:
    zero = "VERTEX_SE3:QUAT 0 0 0 0 0 0 0 0\n"
    with pytest.raises(DataError, match="line 1: .*with a quaternion of length 0, but length one is needed"):
        read_g2o(written(tmp_path, zero))
    words = ["0", "0", "0", "1"]
    words[place] = "NaN"
    with pytest.raises(DataError, match="line 1: .*followed by 'NaN' in place .*, but finite numbers are needed"):
        read_g2o(written(tmp_path, f"VERTEX_SE3:QUAT 0 0 0 0 {' '.join(words)}\n"))


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
