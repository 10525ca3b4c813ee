"""Names and groups of features: they fit the features or are refused, and sums over groups leave the identity exact."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jacops
from jacops._features import FeatureNames
from jacops.errors import InputError, InputTypeError, JacopsError
from jacops.results import Contributions, TopFeatures
from small import by_hand, close, draw, refused, settled

X = draw(5, 6)
NET = settled(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)))
GROUPS = {"left": ["a", "b"], "right": ["e", 5]}


def found(**options: Any) -> Contributions:
    return jacops.contributions(NET, X, **options)


def several(**options: Any) -> Contributions:
    """Of an image (2, 3) and a table (4,), to three outputs of shape (3,)."""
    values = {"image": draw(5, 3, 2, 3), "token": None, "table": draw(5, 3, 4, seed=1)}
    names = FeatureNames.of(
        {k: v[:, 0] if v is not None else torch.ones(5, dtype=int) for k, v in values.items()}, **options
    )
    return by_hand(values, names=names)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [list("abcdef"), "abcdef", np.array(list("abcdef")), tuple("abcdef"), (letter for letter in "abcdef")]
)
def test_every_sequence_names_features(names: Any) -> None:
    kept = found(names=names).names
    assert kept is not None
    assert kept.labels() == list("abcdef")
    assert (kept.inputs, kept.shapes, kept.axes, kept.groups) == (("",), ((6,),), ((tuple("abcdef"),),), ())


def test_tables_name_features_by_their_columns() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X.numpy(), columns=list("abcdef"))
    for names in (frame, frame.columns, pandas.Series(list("abcdef"))):
        kept = found(names=names).names
        assert kept is not None
        assert kept.labels() == list("abcdef")


def test_names_stand_along_axes() -> None:
    names = FeatureNames.of(torch.ones(5, 4, 3), ("ACGT", None))
    assert names.labels() == [f"{letter}, {k}" for letter in "ACGT" for k in range(3)]
    assert [names.label(place) for place in (0, 11)] == ["A, 0", "T, 2"]
    plain = FeatureNames.of(torch.ones(5, 2, 2))
    assert plain.labels() == ["0, 0", "0, 1", "1, 0", "1, 1"]
    assert FeatureNames.of(torch.ones(5)).labels() == [""]


def test_features_of_several_inputs_are_named_after_them() -> None:
    names = several(names={"table": "wxyz"}).names
    assert names is not None
    assert names.inputs == ("image", "table")  # integers have no derivative
    assert names.labels()[:3] == ["image[0, 0]", "image[0, 1]", "image[0, 2]"]
    assert names.labels()[6:] == ["table[w]", "table[x]", "table[y]", "table[z]"]
    pair = FeatureNames.of((torch.ones(5, 1), torch.ones(5, 2), torch.ones(5)), [["a"], None, None])
    assert pair.labels() == ["x[0][a]", "x[1][0]", "x[1][1]", "x[2]"]


def test_an_estimator_that_was_fitted_with_names_gives_them() -> None:
    pandas = pytest.importorskip("pandas")
    pca = pytest.importorskip("sklearn.decomposition").PCA(6)
    frame = pandas.DataFrame(draw(20, 6).numpy(), columns=list("abcdef"))
    x = torch.from_numpy(pca.fit_transform(frame))
    features = torch.from_numpy(frame.to_numpy(copy=True))
    for names, labels in ((None, list("abcdef")), ("uvwxyz", list("uvwxyz"))):
        result = jacops.contributions(NET, x, projection=pca, features=features, names=names)
        assert result.names is not None
        assert result.names.labels() == labels


def test_names_of_another_result_are_taken_over() -> None:
    first = found(names="abcdef", groups=GROUPS).names
    again = found(names=first)
    assert again.names is first
    other = found(names=first, groups=list("ppqqrr")).names
    assert other is not None
    assert (other.groups, other.labels()) == (("p", "q", "r"), list("abcdef"))


REFUSED: list[tuple[dict[str, Any], type[JacopsError], str]] = [
    ({"names": "abc"}, InputError, r"`names` is 3 names, but 6 are needed, one for each feature"),
    ({"names": 3}, InputTypeError, r"`names` is an int"),
    ({"names": {"x": "abcdef"}}, InputTypeError, r"`names` is a mapping, but with one input"),
    ({"names": FeatureNames.of(torch.ones(2, 3))}, InputError, r"`names` is of features of shapes \(\(3,\),\)"),
    ({"groups": {"left": "bb"}}, InputError, r"`groups\['left'\]` is given 'bb', .*the nearest are b"),
    ({"groups": {"left": "zz*"}}, InputError, r"`groups\['left'\]` is given 'zz\*', .*the nearest are a, b, c"),
    ({"groups": {"left": [6]}}, InputError, r"given 6, but features have shape \(6,\)"),
    ({"groups": {"left": [-1]}}, InputError, r"given -1"),
    ({"groups": {"left": [(0, 1)]}}, InputError, r"given \(0, 1\)"),
    ({"groups": {"left": [1.5]}}, InputTypeError, r"given a float"),
    ({"groups": {"left": 1.5}}, InputTypeError, r"`groups\['left'\]` is a float"),
    ({"groups": {"left": "a", "right": "[ab]"}}, InputError, r"given 'a', which is in 'left' too"),
    ({"groups": list("abc")}, InputError, r"labels of shape \(3,\), but features have shape \(6,\)"),
    ({"groups": [["a"], ["b", "c"]]}, InputError, r"`groups` is"),
    ({"groups": "abcdef"}, InputTypeError, r"`groups` is a str"),
    ({"groups": 3}, InputTypeError, r"`groups` is an int"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "words"), REFUSED, ids=[str(k) for k in range(len(REFUSED))])
def test_what_does_not_fit_is_refused(options: dict[str, Any], kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        found(**{"names": "abcdef", **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [({"names": {"tabel": "wxyz"}}, r"`names` is given for 'tabel', .*the nearest are table"),
     ({"names": {"table": "wx"}}, "4 are needed, one for each feature of table"),
     ({"names": {"image": ["ab"]}}, r"features of image have shape \(2, 3\): an entry per axis"),
     ({"names": {"image": ["abc", None]}}, "2 are needed, one for each place along axis 0 of image"),
     ({"names": {"image": [1, None]}}, "an entry per axis is needed"),
     ({"names": ["ab"]}, "there are 2 inputs: image, table"),
     ({"groups": {"g": [3]}}, r"names are needed, such as 'image\[0, 0\]'"),
     ({"groups": list("abcdefghij")}, "mapping"),
     ({"groups": {"g": "tables"}}, "the nearest are table")],
)  # fmt: skip
def test_what_does_not_fit_several_inputs_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        several(**options)


def test_names_describe_themselves() -> None:
    text = repr(several(names={"table": "wxyz"}, groups={"g": "table"}).names)
    for words in (
        "FeatureNames(2x3, 4 features)",
        "inputs: image, table",
        "axis 0 of table: w, x, y, z",
        "groups: g, oth",
    ):
        assert words in text


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "expected"),
    [(GROUPS, {"left": [0, 1], "right": [4, 5], "other": [2, 3]}),
     ({"vowels": "[ae]", "c": "c", "other": "d", "more": range(1, 2)},
      {"vowels": [0, 4], "c": [2], "other": [3, 5], "more": [1]}),
     (["p", "q", "p", "q", "p", None], {"p": [0, 2, 4], "q": [1, 3], "other": [5]}),
     (np.array([3, 10, 3, 10, 2, 2]), {"2": [4, 5], "3": [0, 2], "10": [1, 3]}),
     (torch.tensor([1, 1, 1, 0, 0, 0]), {"0": [3, 4, 5], "1": [0, 1, 2]}),
     ({"one": np.int64(3), "all": [0, 1, 2, 4, 5]}, {"one": [3], "all": [0, 1, 2, 4, 5]})],
)  # fmt: skip
def test_sums_over_groups_are_exact(groups: Any, expected: dict[str, list[int]]) -> None:
    given = found(names="abcdef", groups=groups)
    whole = given.grouped()
    assert given.names is not None
    assert whole.names is not None
    assert given.names.groups == tuple(expected)
    assert whole.names.labels() == list(expected)
    assert whole.values.shape == (5, 2, len(expected))
    for number, places in enumerate(expected.values()):
        close(whole.values[..., number], given.values[..., places].sum(-1), rtol=1e-14)
    close(whole.values.sum(-1) + whole.bias, whole.output, rtol=1e-12)
    assert whole.jacobian is None
    assert (whole.bias is given.bias, whole.output is given.output) == (True, True)
    close(given.grouped(groups).values, whole.values)
    assert repr(whole).startswith("Contributions(5 samples, 2 outputs,")


def test_groups_follow_axes_and_inputs() -> None:
    image = by_hand(
        draw(5, 3, 4, 2), names=FeatureNames.of(torch.ones(5, 4, 2), ("ACGT", None), {"purines": ["A", "G"]})
    )
    close(image.grouped().values[..., 0], image.values[:, :, [0, 2]].sum((2, 3)))
    segments = np.array([[0, 0], [0, 1], [1, 1], [2, 1]])
    for number in range(3):
        part = image.grouped(segments).values[..., number]
        close(part, torch.where(torch.tensor(segments == number), image.values, 0.0).sum((2, 3)))
    pixel = image.grouped({"one": [(1, 1)], "two": "G, 0"})
    close(pixel.values[..., :2], torch.stack([image.values[:, :, 1, 1], image.values[:, :, 2, 0]], -1))
    mixed = several(groups={"picture": "image", "cell": "table[2]"})
    picture, cell, other = mixed.grouped().values.unbind(-1)
    close(picture, mixed.values["image"].sum((2, 3)))
    close(cell, mixed.values["table"][..., 2])
    close(other, mixed.values["table"][..., [0, 1, 3]].sum(-1))


def test_half_precision_is_summed_in_double() -> None:
    values = torch.full((1, 1, 1000), 0.1).bfloat16()
    whole = by_hand(values).grouped(["all"] * 1000)
    assert whole.values.dtype == torch.bfloat16
    close(whole.values.double(), values.double().sum(-1, keepdim=True).bfloat16().double())


def test_groups_have_to_come_from_somewhere() -> None:
    refused(InputError, lambda: found().grouped(), "`groups` is missing", "Pass `groups=`")


# ---- the largest features --------------------------------------------------------------------------------------------


def test_top_is_the_mean_absolute_contribution() -> None:
    given = found(names="abcdef")
    sizes = given.values.abs().mean((0, 1))
    top = given.top(4)
    assert top.places.tolist() == sizes.argsort(descending=True)[:4].tolist()
    assert top.features == tuple("abcdef"[i] for i in top.places.tolist())
    close(top.sizes, sizes[top.places])
    close(top.contributions, given.values.mean((0, 1))[top.places])
    close(top.shares, (sizes / sizes.sum())[top.places])
    assert top.count == 10
    close(torch.as_tensor(np.asarray(top)), top.sizes)
    one = given.top(100, sample=3, output=1)
    assert sorted(one.places.tolist()) == list(range(6))
    close(one.contributions, given.values[3, 1][one.places])
    close(one.sizes, one.contributions.abs())
    assert (one.of, one.count) == ("sample 3, output 1", 1)
    assert "mean" not in repr(one)
    close(given.top(2, output=0).sizes, given.values[:, 0].abs().mean(0).sort(descending=True).values[:2])
    close(given.top(2, sample=0).sizes, given.values[0].abs().mean(0).sort(descending=True).values[:2])


def test_top_over_several_inputs_and_axes_of_outputs() -> None:
    given = several(names={"table": "wxyz"})
    flat = torch.cat([given.values["image"].flatten(2), given.values["table"]], -1)
    top = given.top(10)
    close(top.sizes, flat.abs().mean((0, 1)).sort(descending=True).values)
    assert set(top.features) == set(given.names.labels())  # pyright: ignore[reportOptionalMemberAccess]
    grid = by_hand(draw(5, 2, 3, 4), out=2)
    close(grid.top(1, 2, (1, 2)).contributions, grid.values[2, 1, 2][grid.values[2, 1, 2].abs().argmax()][None])
    lone = by_hand(draw(5, 4), out=0)
    close(lone.top(4, 2).contributions.abs(), lone.values[2].abs().sort(descending=True).values)


def test_top_describes_itself_and_converts() -> None:
    pandas = pytest.importorskip("pandas")
    top = found(names=["a", "<b>", "c", "d", "e", "f"]).top(6)
    assert "<b>" in repr(top)
    assert "&lt;b&gt;" in top._repr_html_()
    table = top.to_pandas()
    assert type(table) is pandas.DataFrame
    assert (table.index.name, list(table.columns)) == ("feature", ["size", "contribution", "share"])
    assert list(table.index) == list(top.features)
    np.testing.assert_array_equal(table["share"], top.shares.numpy())


@pytest.mark.parametrize(
    ("call", "words"),
    [(lambda f: f.top(0), "`k`"), (lambda f: f.top(sample=5), "`sample` is 5, but there are 5"),
     (lambda f: f.top(sample=-1), "`sample`"), (lambda f: f.top(output=2), "`output` is 2, but there are 2"),
     (lambda f: f.top(output=(0, 0)), "`output`"), (lambda f: f.top(output=True), "`output`")],
)  # fmt: skip
def test_what_there_is_not_is_refused(call: Callable[[Contributions], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(found())


def test_without_samples_there_is_no_top() -> None:
    empty = by_hand(torch.ones(0, 2, 3))
    refused(InputError, lambda: empty.top(), "`top` is called with no samples")
    assert empty.grouped(["a", "a", "b"]).values.shape == (0, 2, 2)


@pytest.mark.parametrize("call", ["top", "grouped", "to_pandas", "plot", "to_html"])
def test_one_of_several_outputs_has_to_be_picked(call: str) -> None:
    parts: dict[str, Tensor] = {"mu": draw(5, 2, 3), "spread": draw(5, 2, 3)}
    given = replace(by_hand(draw(5, 2, 3)), values=parts, bias=parts, output=parts, jacobian=parts)  # pyright: ignore
    words = rf"`{call}` is called with several outputs, but one is needed: pick it, as in found\['mu'\]\.{call}\(\)"
    with pytest.raises(InputError, match=words):
        getattr(given, call)()


def test_names_are_saved_with_the_result(tmp_path: Path) -> None:
    given = found(names="abcdef", groups=GROUPS)
    given.save(tmp_path / "found.safetensors")
    back = jacops.load(tmp_path / "found.safetensors")
    assert back.names.labels() == list("abcdef")
    close(back.grouped().values, given.grouped().values)
    given.grouped().save(tmp_path / "whole.safetensors")
    assert jacops.load(tmp_path / "whole.safetensors").jacobian is None
    given.top(3).save(tmp_path / "top.safetensors")
    assert TopFeatures.load(tmp_path / "top.safetensors").features == given.top(3).features
