"""Stored runs: what is written is what is read, and nothing else is taken for it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jacops.errors import (
    InputError,
    InputTypeError,
    JacopsError,
    JacopsWarning,
    MemoryBudgetError,
    MissingExtraError,
    NonFiniteError,
    StoreError,
    StoreFileError,
    StoreIncompleteError,
    StoreMismatchError,
)
from jacops.store import Grid, Store, StoredRun, read_store
from stored_run import ARRAYS, FACTORS, IDENTITY, INFLUENCES, TILES, fill, tile, truth, whole


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- writing and reading -------------------------------------------------------------------------------------------


def test_a_finished_run_is_read_bit_for_bit(tmp_path: Path):
    computed = whole(tmp_path / "run")
    assert len(computed) == len(set(computed)) == TILES
    for name in ARRAYS:
        assert np.array_equal(read_store(tmp_path / "run", name), truth(name))
    store = Store.open(tmp_path / "run")
    assert (store.is_complete, store.identity, store.arrays) == (True, IDENTITY, ARRAYS)
    assert np.array_equal(store.tile("influences", (2, 3)), tile("influences", (2, 3)))


def test_a_finished_run_computes_nothing_again_and_changes_no_file(tmp_path: Path):
    whole(tmp_path / "run")
    before = files(tmp_path)
    assert whole(tmp_path / "run") == []
    assert files(tmp_path) == before
    assert not any("lock" in name or "partial" in name for name in before)


def test_any_zarr_reader_opens_it(tmp_path: Path):
    import zarr

    whole(tmp_path / "run")
    group = zarr.open_group(tmp_path / "run", mode="r", zarr_format=3)
    assert sorted(name for name, _ in group.members()) == sorted(ARRAYS)
    for name in ARRAYS:
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert np.array_equal(np.asarray(array[:]), truth(name))
        assert np.isnan(array.fill_value)


def test_one_file_and_one_mark_per_tile_also_for_zeros(tmp_path: Path):
    with StoredRun.open(tmp_path / "run", IDENTITY, {"zeros": Grid((5, 5), (2, 5))}) as run:
        for index in run.missing("zeros"):
            run.write("zeros", index, np.zeros(run.arrays["zeros"].tile_shape(index)))
        run.complete()
    assert sorted(files(tmp_path / "run" / "zeros")) == [
        *("c/0/0", "c/1/0", "c/2/0", "done/0.0", "done/1.0", "done/2.0", "zarr.json")
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64", "complex128", "int8", "int64", "uint16"])
@pytest.mark.parametrize(("shape", "cut"), [((7,), (3,)), ((2, 3, 5), (1, 3, 2)), ((0, 4), (2, 2)), ((3, 2), (9, 9))])
def test_every_dtype_and_shape(tmp_path: Path, dtype: str, shape: tuple[int, ...], cut: tuple[int, ...]):
    grid = Grid(shape, cut, dtype)
    whole_array = np.random.default_rng(0).normal(size=shape, scale=20).astype(dtype)
    with StoredRun.open(tmp_path / "run", IDENTITY, {"a": grid}) as run:
        for index in run.missing("a"):
            run.write("a", index, whole_array[grid.selection(index)])
        run.complete()
        assert np.array_equal(run.read("a"), whole_array)
    found = read_store(tmp_path / "run", "a")
    assert np.array_equal(found, whole_array)
    assert found.dtype == whole_array.dtype


def test_tensors_are_written_as_they_stand(tmp_path: Path):
    tensor = torch.arange(12.0, dtype=torch.float64).reshape(3, 4).T.requires_grad_()
    with StoredRun.open(tmp_path / "run", IDENTITY, {"a": Grid((4, 3), (4, 3), str(torch.float64))}) as run:
        assert np.array_equal(run.obtain("a", (0, 0), lambda: tensor), tensor.detach().numpy())
    assert tensor.requires_grad


def test_grids_walk_their_tiles_in_order():
    grid = Grid((5, 4), (2, 3))
    assert list(grid.indices()) == [(i, j) for i in range(3) for j in range(2)]
    assert grid.selection((2, 1)) == (slice(4, 5), slice(3, 4))
    covered = np.zeros(grid.shape, int)
    for index in grid.indices():
        covered[grid.selection(index)] += 1
    assert (covered == 1).all()


# ---- unfinished runs -----------------------------------------------------------------------------------------------


def half(path: Path) -> StoredRun:
    run = StoredRun.open(path, IDENTITY, ARRAYS)
    for index in [(0, 0), (1, 2)]:
        run.write("influences", index, tile("influences", index))
    return run


def test_an_unfinished_run_is_read_only_when_asked_for(tmp_path: Path):
    with half(tmp_path / "run") as run, pytest.raises(StoreIncompleteError):
        run.complete()
    with pytest.raises(
        StoreIncompleteError, match=r"10 tiles of 'influences', 3 tiles of 'factors'.*partial=True"
    ) as error:
        read_store(tmp_path / "run")
    assert error.value.missing == {"influences": 10, "factors": 3}
    found = read_store(tmp_path / "run", partial=True)
    for index in INFLUENCES.indices():
        block = found[INFLUENCES.selection(index)]
        expected = tile("influences", index) if index in [(0, 0), (1, 2)] else np.full(block.shape, np.nan)
        np.testing.assert_array_equal(block, expected)
    with pytest.raises(StoreIncompleteError, match="1 tiles of 'influences'"):
        Store.open(tmp_path / "run").tile("influences", (2, 2))


def test_all_tiles_without_the_last_mark_are_no_finished_run(tmp_path: Path):
    with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as run:
        for name in ARRAYS:
            for index in run.missing(name):
                run.write(name, index, tile(name, index))
        assert np.array_equal(run.read("influences"), truth("influences"))  # its own writer may
    with pytest.raises(StoreIncompleteError, match="lacks its last mark"):
        read_store(tmp_path / "run")


def test_resuming_computes_what_is_missing_only(tmp_path: Path):
    half(tmp_path / "run").close()
    computed = whole(tmp_path / "run")
    assert len(computed) == TILES - 2
    assert not {"influences(0, 0)", "influences(1, 2)"} & set(computed)
    assert np.array_equal(read_store(tmp_path / "run"), truth("influences"))


def test_what_is_missing_in_whole_numbers_cannot_be_taken_for_a_number_of_theirs(tmp_path: Path):
    grids = {"status": Grid((4,), (2,), "int32"), "steps": Grid((4,), (2,), "uint8")}
    StoredRun.open(tmp_path / "run", IDENTITY, grids).close()
    assert (read_store(tmp_path / "run", "status", partial=True) == -(2**31)).all()
    assert (read_store(tmp_path / "run", "steps", partial=True) == 255).all()


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", IDENTITY)
def test_another_identity_is_refused_by_name(tmp_path: Path, field: str):
    half(tmp_path / "run").close()
    before = files(tmp_path)
    with pytest.raises(StoreMismatchError) as error:
        StoredRun.open(tmp_path / "run", {**IDENTITY, field: "other"}, ARRAYS)
    assert error.value.differences == {field: (IDENTITY[field], "other")}
    assert f"{field}: the store has {IDENTITY[field]!r}, this run has 'other'" in str(error.value)
    assert files(tmp_path) == before


def test_every_difference_is_listed_also_fields_and_arrays_that_one_side_lacks(tmp_path: Path):
    half(tmp_path / "run").close()
    identity = {name: value for name, value in IDENTITY.items() if name != "seed"} | {"solver": "cg", "loss": "l2"}
    arrays = {"influences": Grid((11, 17), (4, 6), "float32")}
    with pytest.raises(StoreMismatchError) as error:
        StoredRun.open(tmp_path / "run", identity, arrays)
    assert error.value.differences == {
        "seed": ("0", None),
        "solver": (None, "cg"),
        "loss": ("l1", "l2"),
        "arrays.influences.tile": ("[4, 5]", "[4, 6]"),
        "arrays.influences.dtype": ("float64", "float32"),
        "arrays.factors.shape": ("[11, 6]", None),
        "arrays.factors.tile": ("[4, 6]", None),
        "arrays.factors.dtype": ("float32", None),
    }
    assert "seed: the store has '0', this run has nothing" in str(error.value)


def test_other_surroundings_are_warned_of(tmp_path: Path):
    StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS, surroundings={"torch": "2.8", "threads": "1"}).close()
    with pytest.warns(JacopsWarning, match="torch: 2.8 then, 2.13 now"):
        run = StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS, surroundings={"torch": "2.13", "threads": "1"})
    with run:
        assert run.surroundings == {"torch": "2.8", "threads": "1"}


def test_a_second_run_shares_the_tiles_that_are_left(tmp_path: Path):
    with half(tmp_path / "run") as one, StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as two:
        first, second = one.missing("influences"), two.missing("influences")
        taken = [next(walk) for walk in (first, second, first, second)]
        assert len(set(taken)) == 4
        assert not {(0, 0), (1, 2)} & set(taken)
        read_store(tmp_path / "run", partial=True)  # readers come and go
    assert not (tmp_path / "run.jacops-locks").exists()
    assert len(whole(tmp_path / "run")) == TILES - 2  # what was taken and not written is free again


def test_a_closed_run_writes_no_more(tmp_path: Path):
    run = half(tmp_path / "run")
    run.close()
    with pytest.raises(StoreError, match="closed"):
        run.write("influences", (0, 1), tile("influences", (0, 1)))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    before = files(tmp_path)
    for name in ("thesis", "file"):
        with pytest.raises((InputError, StoreFileError)):
            StoredRun.open(tmp_path / name, IDENTITY, ARRAYS)
        with pytest.raises((InputError, StoreFileError)):
            Store.open(tmp_path / name)
    assert files(tmp_path) == before


def test_another_zarr_group_is_left_alone(tmp_path: Path):
    import zarr

    zarr.create_group(tmp_path / "group", zarr_format=3, attributes={"mine": 1})
    before = files(tmp_path)
    with pytest.raises(InputError, match="no stored run"):
        StoredRun.open(tmp_path / "group", IDENTITY, ARRAYS)
    assert files(tmp_path) == before


def test_there_must_be_a_store_to_read(tmp_path: Path):
    with pytest.raises(InputError, match="no stored run"):
        read_store(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(InputTypeError, match="is None"):
        read_store(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="address"):
        StoredRun.open("s3://bucket/run", IDENTITY, ARRAYS)


BAD_GRIDS = {
    "dtype": lambda: Grid((4,), (2,), "object"),
    "bfloat16": lambda: Grid((4,), (2,), str(torch.bfloat16)),
    "negative": lambda: Grid((-1,), (2,)),
    "empty tile": lambda: Grid((4,), (0,)),
    "a bool": lambda: Grid((True,), (2,)),
    "axes": lambda: Grid((4, 4), (2,)),
    "no axis": lambda: Grid((), ()),
    "a number": lambda: Grid(4, (2,)),  # type: ignore[arg-type]
    "too large": lambda: Grid((2**40, 2**40), (1, 1)),
}


@pytest.mark.parametrize("kind", BAD_GRIDS)
def test_bad_grids_are_refused(kind: str):
    with pytest.raises(InputError):
        BAD_GRIDS[kind]()


@pytest.mark.parametrize(
    ("identity", "arrays"),
    [
        ({}, ARRAYS),
        ({"damping": 0.1}, ARRAYS),
        ("model", ARRAYS),
        (IDENTITY, {}),
        (IDENTITY, {"../up": INFLUENCES}),
        (IDENTITY, {"a/b": INFLUENCES}),
        (IDENTITY, {"a": (3, 4)}),
    ],
)
def test_bad_identities_and_names_are_refused_before_anything_is_made(tmp_path: Path, identity: object, arrays: object):
    with pytest.raises((InputError, InputTypeError)):
        StoredRun.open(tmp_path / "run", identity, arrays)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("block", "error", "told"),
    [
        (np.zeros((4, 4)), InputError, r"\(4, 4\) of float64.*\(4, 5\) of float64"),
        (np.zeros((4, 5), "f4"), InputError, "float32"),
        (torch.zeros(4, 5, dtype=torch.bfloat16), InputError, "bfloat16"),
        ([[0.0] * 5] * 4, InputTypeError, "list"),
        (np.full((4, 5), np.nan), NonFiniteError, r"tile influences\[0, 0\], 20 of 20"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(tmp_path: Path, block: object, error: type[JacopsError], told: str):
    with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as run:
        with pytest.raises(error, match=told):
            run.write("influences", (0, 0), block)  # type: ignore[arg-type]
        assert run.marked("influences") == set()
        for name, index in (("influence", (0, 0)), ("influences", (3, 0)), ("influences", (-1, 0)), ("influences", 0)):
            with pytest.raises(InputError):
                run.write(name, index, tile("influences", (0, 0)))  # type: ignore[arg-type]


def test_non_finite_values_are_let_in_when_asked_for(tmp_path: Path):
    grid = Grid((2,), (2,), finite=False)
    for _ in range(2):
        with StoredRun.open(tmp_path / "run", IDENTITY, {"a": grid}) as run:
            run.write("a", (0,), np.array([np.nan, np.inf]))
    np.testing.assert_array_equal(read_store(tmp_path / "run", "a", partial=True), [np.nan, np.inf])


def test_an_array_beyond_memory_is_read_tile_by_tile(tmp_path: Path):
    with StoredRun.open(tmp_path / "run", IDENTITY, {"a": Grid((2**28, 2**28), (2, 2))}) as run:
        run.write("a", (2**27 - 1, 5), np.ones((2, 2)))
        assert next(run.missing("a")) == (0, 0)
    with pytest.raises(MemoryBudgetError, match="tile by tile"):
        read_store(tmp_path / "run", "a", partial=True)
    assert Store.open(tmp_path / "run").tile("a", (2**27 - 1, 5)).sum() == 4


def test_without_zarr_the_extra_is_named_and_nothing_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "zarr", None)
    for call in (lambda: StoredRun.open(tmp_path / "new", IDENTITY, ARRAYS), lambda: read_store(tmp_path / "run")):
        with pytest.raises(MissingExtraError, match=r"'zarr': pip install 'jacops\[store\]'"):
            call()
    assert not (tmp_path / "new").exists()


def test_a_store_may_be_moved_and_reached_through_a_link(tmp_path: Path):
    whole(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    assert np.array_equal(read_store(tmp_path / "link", "factors"), truth("factors"))
    assert whole(tmp_path / "link") == []
    (tmp_path / "moved" / "influences" / "done" / "0.0").unlink()
    with (
        StoredRun.open(tmp_path / "link", IDENTITY, ARRAYS) as one,
        StoredRun.open(tmp_path / "moved", IDENTITY, ARRAYS) as two,
    ):
        assert one.take("influences", (0, 0))
        assert not two.take("influences", (0, 0))  # one folder, one lock


def test_a_run_that_has_only_begun_is_unfinished_and_not_damaged(tmp_path: Path):
    StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS).close()
    shutil.rmtree(tmp_path / "run" / "influences")  # as a kill right after the header leaves it
    assert np.isnan(read_store(tmp_path / "run", partial=True)).all()
    with pytest.raises(StoreIncompleteError):
        read_store(tmp_path / "run")


def test_the_header_is_strict_json_and_holds_no_more_than_it_must(tmp_path: Path):
    whole(tmp_path / "run")
    header = json.loads((tmp_path / "run" / "zarr.json").read_text())["attributes"]["jacops_store"]
    assert sorted(header) == ["arrays", "complete", "identity", "schema", "surroundings"]
    assert header["arrays"]["factors"] == FACTORS.described()


def test_a_fresh_run_in_an_empty_folder(tmp_path: Path):
    (tmp_path / "run").mkdir()
    with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as run:
        assert len(fill(run)) == TILES
