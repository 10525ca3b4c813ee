"""Results as pandas tables: every number stands under the names of its axes."""

import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jacops
from jacops.errors import InputError, MissingExtraError
from jacops.results import FeatureNames, Influences
from small import by_hand, draw, refused, settled, small_net

X, Y = draw(5, 3), torch.tensor([0, 1, 1, 0, 1])


def influences(**options: Any) -> Influences:
    wrapped = jacops.TorchTwiceDifferentiable(small_net(), F.cross_entropy)
    return jacops.compute_influences(
        wrapped, [(X, Y)], test_data=[(X[:2], Y[:2])], curvature="ggn", damping=0.1, **options
    )


def parts(**options: Any) -> Any:
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    return jacops.contributions(model, X, **options)


def test_influences_are_a_matrix_of_test_by_training_samples():
    found = influences()
    table = found.to_pandas()
    assert type(table) is pd.DataFrame
    np.testing.assert_array_equal(table.to_numpy(), found.values.numpy())
    assert (table.index.name, table.columns.name, table.shape) == ("test", "train", (2, 5))
    named = found.to_pandas(test=["a", "b"], train=list("vwxyz"))
    for t, test in enumerate("ab"):
        for k, train in enumerate("vwxyz"):
            assert named.loc[test, train] == float(found[t, k])


def test_the_largest_influences_are_a_tidy_table():
    found, names = influences(), list("vwxyz")
    table = found.to_pandas(3, test=["a", "b"], train=names)
    assert list(table.columns) == ["test", "rank", "train", "influence"]
    values, indices = found.top(3)
    expected = [("ab"[t], r + 1, names[indices[t, r]], float(values[t, r])) for t in range(2) for r in range(3)]
    assert list(table.itertuples(index=False, name=None)) == expected
    assert list(found.to_pandas(top=2)["train"]) == found.top(2)[1].flatten().tolist()
    refused(InputError, lambda: found.to_pandas(6), "`k`")


def test_perturbation_influences_are_one_row_per_entry():
    found = influences(influence_type="perturbation")
    table = found.to_pandas(train=list("vwxyz"))
    assert list(table.columns) == ["test", "train", "feature", "influence"]
    cells = table.set_index(["test", "train", "feature"])["influence"]
    assert len(cells) == found.values.numel()
    for t, k, f in np.ndindex(*found.shape):
        assert cells[t, "vwxyz"[k], f] == float(found[t, k, f])
    wide = Influences(draw(2, 3, 2, 2), "perturbation", "", "", 0.1, {}).to_pandas()
    assert list(wide.columns) == ["test", "train", "feature_0", "feature_1", "influence"]
    refused(InputError, lambda: found.to_pandas(1), "two axes")


def test_contributions_are_one_row_per_sample_output_and_feature():
    found = parts()
    table = found.to_pandas(samples=list("abcde"), outputs=["yes", "no"], features=["x", "y", "z"])
    assert list(table.columns) == ["sample", "output", "feature", "value"]
    cells = table.set_index(["sample", "output", "feature"])["value"]
    for n, o, f in np.ndindex(*found.values.shape):
        assert cells["abcde"[n], ["yes", "no"][o], "xyz"[f]] == float(found.values[n, o, f])
    plain = found.to_pandas()
    assert plain["sample"].dtype.kind == plain["output"].dtype.kind == plain["feature"].dtype.kind == "i"
    sums = found.to_pandas(bias=True).groupby(["sample", "output"])["value"].sum().to_numpy().reshape(5, 2)
    np.testing.assert_allclose(sums, found.output.numpy())


def test_features_of_a_hidden_layer_with_several_axes():
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 2)))
    found = jacops.contributions(model, X, at="1")
    table = found.to_pandas()
    assert list(table.columns) == ["sample", "output", "feature_0", "feature_1", "value"]
    cells = table.set_index(list(table.columns[:-1]))["value"]
    for place in np.ndindex(*found.values.shape):
        assert cells[place] == float(found.values[place])
    refused(InputError, lambda: found.to_pandas(bias=True), "bias")
    refused(InputError, lambda: found.to_pandas(features=["x"]), "features")


def test_names_and_groups_of_the_result_stand_in_the_table():
    found = parts(names="xyz", groups={"first": "x", "last": ["y", "z"]})
    table = found.to_pandas(bias=True)
    assert list(table.columns) == ["sample", "output", "feature", "group", "value"]
    assert list(table["feature"][:4]) == ["x", "y", "z", "bias"]
    assert list(table["group"][:4]) == ["first", "last", "last", "bias"]
    sums = table.groupby(["sample", "output", "group"])["value"].sum()
    whole = found.grouped()
    for n, o, g in np.ndindex(*whole.values.shape):
        np.testing.assert_allclose(sums[n, o, ["first", "last"][g]], whole.values[n, o, g], atol=1e-15)
    assert list(found.to_pandas(features="uvw")["feature"][:3]) == list("uvw")
    assert list(whole.to_pandas()["feature"][:2]) == ["first", "last"]


def test_features_and_outputs_with_several_axes_have_a_column_for_each():
    names = FeatureNames.of(torch.ones(2, 4, 3), ("ACGT", None))
    found = by_hand(draw(2, 2, 3, 4, 3), out=2, names=names)
    table = found.to_pandas()
    assert list(table.columns) == ["sample", "output_0", "output_1", "feature_0", "feature_1", "value"]
    cells = table.set_index(list(table.columns[:-1]))["value"]
    assert cells[1, 0, 2, "G", 1] == float(found.values[1, 0, 2, 2, 1])
    refused(InputError, lambda: found.to_pandas(outputs=["a", "b"]), "outputs")
    assert list(by_hand(draw(2, 3), out=0).to_pandas().columns) == ["sample", "feature", "value"]
    assert len(by_hand(draw(0, 2, 3)).to_pandas()) == 0


def test_features_of_several_inputs_are_distinguished():
    values = {"image": draw(2, 3, 2, 2), "table": draw(2, 3, 4, seed=1)}
    found = by_hand(values, names=FeatureNames.of({k: v[:, 0] for k, v in values.items()}, None, {"all": "image"}))
    table = found.to_pandas(samples=["u", "v"], outputs=list("abc"), bias=True)
    assert list(table.columns) == ["sample", "output", "input", "feature", "group", "value"]
    assert list(table["input"][:9]) == ["image"] * 4 + ["table"] * 4 + [""]
    assert list(table["group"][:9]) == ["all"] * 4 + ["other"] * 4 + ["bias"]
    cells = table.set_index(["sample", "output", "feature"])["value"]
    assert cells["v", "c", "image[1, 0]"] == float(values["image"][1, 2, 1, 0])
    assert cells["u", "b", "table[3]"] == float(values["table"][0, 1, 3])
    sums = table.groupby(["sample", "output"])["value"].sum().to_numpy().reshape(2, 3)
    np.testing.assert_allclose(sums, found.output.numpy())


def test_the_steps_of_a_fit_and_the_routes_of_a_plan():
    fit = jacops.levenberg_marquardt(lambda x: x**3 - torch.tensor([1.0, 8.0]), params=torch.ones(2) * 3)
    table = fit.to_pandas()
    assert list(table.index) == [record.step for record in fit.log]
    assert list(table["objective"]) == [record.objective for record in fit.log]
    plan = jacops.plan(jacops.compute_jacobian, small_net(), X)
    assert list(plan.to_pandas().index) == [route.name for route in plan.routes]
    done = jacops.gauss_newton(lambda x: x, params=torch.zeros(2))
    assert "objective" in done.to_pandas().columns


@pytest.mark.parametrize("axis", ["test", "train"])
def test_names_are_counted(axis: str):
    names: Any = {axis: ["a"]}
    refused(InputError, lambda: influences().to_pandas(**names), axis, "1 names")


def test_half_precision_is_widened():
    table = Influences(draw(2, 3).bfloat16(), "up", "", "", 0.1, {}).to_pandas()
    assert table.to_numpy().dtype == np.float32


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    refused(MissingExtraError, lambda: influences().to_pandas(), "pip install 'jacops[pandas]'")
