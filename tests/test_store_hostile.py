"""Stored runs with metadata that someone else made or a disk mangled: our errors or right numbers, and nothing runs."""

import copy
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jacops.errors import JacopsError, JacopsWarning, StoreDamagedError
from jacops.store import Store, StoredRun
from stored_run import ARRAYS, IDENTITY, truth, whole

HOSTILE: list[Any] = [
    *(None, True, 0, -1, 1.0, 2**31, 2**63, 10**30, "NaN", [], {}, [[]], [0], [2**40, 1], [1] * 40),
    *("", "\0", "\ud800", "x" * 5000, "int8", "object", "pickle", "consolidated", "../../outside", "/etc/passwd"),
    *({"name": "pickle"}, {"name": "marker", "configuration": {}}, ["../outside"]),
    {"../outside": {"shape": [1], "tile": [1], "dtype": "int8"}},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    whole(path)
    return path


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """Return metadata with one value replaced, dropped, renamed or doubled, or with its bytes shaken."""
    kind = draw.randrange(6)
    if kind == 0:
        at = draw.randrange(len(raw))
        return raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :]
    if kind == 1:
        return draw.choice([raw[: draw.randrange(len(raw))], raw * 2, b"[" * 100000, b"\xff" + raw, raw + b" " * 2**20])
    value = json.loads(raw)
    *above, last = draw.choice([place for place in places(value) if place])
    holder = value
    for key in above:
        holder = holder[key]
    if kind == 2 and isinstance(holder, dict):
        holder[str(draw.choice(HOSTILE))] = holder.pop(last)
    elif kind == 3:
        del holder[last]
    elif kind == 4 and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(draw.choice(HOSTILE)))
    else:
        holder[last] = copy.deepcopy(draw.choice(HOSTILE))
    return json.dumps(value).encode()


def quietly(call: Callable[[], Any]) -> Any:
    """What a call gives, None where it raises one of our errors; any other error passes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        try:
            return call()
        except JacopsError:
            return None


def nothing_wrong(found: np.ndarray | None, name: str) -> bool:
    if found is None or found.shape != truth(name).shape:
        return found is None or bool(np.isnan(found).all())
    return bool(((found == truth(name)) | np.isnan(found)).all())


def all_readings(path: Path) -> list[tuple[str, np.ndarray | None]]:
    store = Store.open(path)
    ways = [(name, partial) for name in ARRAYS for partial in (False, True)]
    return [
        (name, quietly(lambda name=name, partial=partial: store.read(name, partial=partial))) for name, partial in ways
    ]


def resumed(path: Path) -> list[tuple[int, ...]]:
    with StoredRun.open(path, IDENTITY, ARRAYS) as run:
        return [index for name in ARRAYS for index in run.missing(name)]


def fuzz(folder: Path, finished: Path, rounds: int, seed: int) -> None:
    draw, path, outside = random.Random(seed), folder / "deep" / "run", folder / "outside"
    outside.write_text("mine")
    shutil.copytree(finished, path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and "c" not in file.parts]
    originals = {file: file.read_bytes() for file in files}
    for _ in range(rounds):
        file = draw.choice(files) if draw.random() < 0.3 else path / draw.choice(["zarr.json", "influences/zarr.json"])
        file.write_bytes(mutated(originals[file], draw))
        for name, found in quietly(lambda: all_readings(path)) or ():
            assert nothing_wrong(found, name)
        quietly(lambda: resumed(path))
        file.write_bytes(originals[file])
        assert sorted(file.name for file in folder.iterdir()) == ["deep", "outside"]
        assert [file.name for file in (folder / "deep").iterdir()] == ["run"]
    assert outside.read_text() == "mine"
    assert whole(path) == []


@pytest.fixture
def marker() -> list[str]:
    """A codec that records when zarr looks it up, which stores that name it must not cause."""
    from zarr.abc.codec import BytesBytesCodec
    from zarr.registry import register_codec

    spoken: list[str] = []

    class Marker(BytesBytesCodec):
        @classmethod
        def from_dict(cls, data: Any) -> "Marker":
            spoken.append(str(data))
            return cls()

    register_codec("marker", Marker)
    return spoken


def test_mutated_metadata_gives_our_errors_or_right_numbers(tmp_path: Path, finished: Path, marker: list[str]):
    fuzz(tmp_path, finished, rounds=200, seed=0)
    assert marker == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_ten_thousand_mutations(tmp_path: Path, finished: Path, marker: list[str], seed: int):
    fuzz(tmp_path, finished, rounds=2000, seed=1 + seed)
    assert marker == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codecs", [{"name": "marker", "configuration": {}}]),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "pickle"}]),
        ("data_type", "object"),
        ("zarr_format", 2),
        ("storage_transformers", [{"name": "marker"}]),
        ("fill_value", 0.0),
    ],
)
def test_other_codecs_and_types_are_refused_by_name(
    tmp_path: Path, finished: Path, marker: list[str], field: str, value: Any
):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "influences" / "zarr.json"
    right = file.read_bytes()
    file.write_text(json.dumps({**json.loads(right), field: value}))
    with pytest.raises(StoreDamagedError, match=f"array 'influences' is damaged: {field}"):
        Store.open(tmp_path / "run")
    assert whole(tmp_path / "run") == []  # the writer replaces it
    assert (file.read_bytes(), marker) == (right, [])
