"""Influence against the truth: samples are really left out, and the model trained again to convergence."""

import pytest

pytest.importorskip("sklearn")

from benchmarks.leave_one_out import Case, cases, rows

CASES = {case.name: case for case in cases()}


@pytest.mark.parametrize("name", ["diabetes, ridge 1", "breast cancer, C = 0.01"])
def test_predicted_changes_are_the_real_ones(name: str):
    for row in rows(CASES[name]):
        assert row.pearson >= 0.99
        assert abs(row.slope - 1) <= 0.05


def test_weak_regularisation_overshoots_and_the_leverage_correction_brings_it_back():
    plain, corrected = rows(CASES["breast cancer, C = 10.0"])
    assert plain.slope > 1.2
    assert abs(corrected.slope - 1) < abs(plain.slope - 1) / 4
    assert corrected.pearson > plain.pearson


def test_for_least_squares_the_corrected_step_is_exact():
    """A quadratic has no higher order: what is left is the curvature of the test loss along the step."""
    case: Case = CASES["diabetes, ridge 1"]
    (_, corrected) = rows(case)
    assert corrected.pearson > 0.9999
