"""Products with models whose parameters are sharded over ranks, by FSDP2 or as DTensors.

Ranks are processes of one gloo group, started once (`sharded_ranks.py`): each check there compares with plain autograd
on the whole model in float64, or returns the words of an error. What they found is judged here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RANKS, PATIENCE, ROUNDING = 2, 240, 1e-13  # PATIENCE in seconds, for all checks together
MODELS = ("mlp", "block", "tied", "unused", "convolution")
WAYS = ("by_parts", "at_once", "first_axis", "mixed")
OTHER_PRODUCTS = (
    "a_rank_without_rows",
    "own_cotangents_of_the_same_rows_are_summed",
    "frozen_parameters_have_no_part_in_curvature",
    "dropout_draws_a_mask_of_its_own_for_own_rows_and_nothing_is_drawn_from_the_callers_state",
    "the_model_stays_as_it_was_and_trains_on",
    "functions_over_dtensors",
    "a_pull_gathers_one_layer_at_a_time",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found, by check."""
    folder = tmp_path_factory.mktemp("ranks")
    script, environment = Path(__file__).with_name("sharded_ranks.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"{rank}.log").open("w") for rank in range(RANKS)]
    ranks = [
        subprocess.Popen([sys.executable, script, str(r), str(RANKS), folder], stdout=log, stderr=log, env=environment)
        for r, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(PATIENCE) for rank in ranks]
    finally:
        for rank, log in zip(ranks, logs, strict=True):
            rank.kill()
            rank.wait()
            log.close()
    assert codes == [0] * RANKS, [(folder / f"{rank}.log").read_text()[-3000:] for rank in range(RANKS)]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def is_zero(result: Any) -> bool:
    numbers = result.values() if isinstance(result, dict) else [result]
    return all(isinstance(number, float) and number <= ROUNDING for number in numbers)


@pytest.mark.parametrize("rows", ["same rows", "own rows"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_products_are_those_of_the_whole_model_on_all_rows(found: Any, model: str, way: str, rows: str):
    for rank in found:
        result = rank[f"{model}, {way}, {rows}"]
        assert is_zero(result), result
        assert set(result) == {"vjp", "jvp", "hvp", "ggnvp"}


@pytest.mark.parametrize("name", OTHER_PRODUCTS)
def test_what_is_right_beside_them(found: Any, name: str):
    for rank in found:
        assert is_zero(rank[name]), rank[name]


def test_a_failure_on_one_rank_ends_all(found: Any):
    own = ["KeyError: 'in the loss'", "KeyError: 'within the forward'", "InputError", "NonFiniteError"]
    *others, after = found[0]["a_failure_on_one_rank_ends_all"]
    for words, error in zip(others, own, strict=True):
        assert words.startswith("PeerFailedError")
        assert f"rank 1 failed: {error}" in words
    *there, _ = found[1]["a_failure_on_one_rank_ends_all"]
    assert all(words.startswith(error) for words, error in zip(there, own, strict=True))
    assert float(after) <= ROUNDING


WORDS = {
    "what_ranks_must_have_in_common": [
        ("InputError", "`v`", "not the same on all ranks"),
        ("InputError", "`buffers`", "not the same on all ranks"),
        ("InputError", "`parameters that are not sharded`"),
        ("ModelStateError", "different outputs", "eval()"),
        ("InputError", "`the call`"),
    ],
    "tangents_that_do_not_fit": [
        ("InputError", "one form"),
        ("InputError", "`v for 0.weight`", "redistribute"),
        ("InputError", "torch.float32"),
        ("InputError", "7 tensor(s)"),
        ("InputError", "of shape (1, 4)"),
        ("NonFiniteError", "`v`"),
        ("InputError", "a DTensor", "full_tensor()"),
        ("InputError", "`input`", "a DTensor"),
    ],
    "models_that_are_refused": [
        ("ModelStateError", "gathered state", "reshard()"),
        ("ModelStateError", "MixedPrecisionPolicy"),
        ("ModelStateError", "2 axes", "one axis"),
        ("ModelStateError", "FSDP1", "fully_shard"),
        ("ModelStateError", "`model.0`", "FSDP1"),
        ("ModelStateError", "2 axes"),
        ("ModelStateError", "outside the module that holds it"),
    ],
    "options_that_are_refused": [
        ("InputError", "`create_graph`"),
        ("InputError", "`outputs`"),
        ("InputError", "`parameters`"),
        ("InputError", "`wrt`"),
    ],
    "functions_that_are_refused": [
        ("InputError", "grad_placements=[Partial()]"),
        ("InputError", "p.full_tensor()"),
        ("ModelStateError", "under FSDP", "model_vjp"),
        ("InputError", "`func()`", "a DTensor"),
        *[("InputError", "`params[0]`", "`model_vjp`")] * 4,
    ],
}


@pytest.mark.parametrize("name", WORDS)
def test_what_does_not_fit_is_refused_in_words_on_every_rank(found: Any, name: str):
    for rank in found:
        assert isinstance(rank[name], list), rank[name]
        for words, (error, *needed) in zip(rank[name], WORDS[name], strict=True):
            assert words.startswith(f"{error}:"), words
            assert all(word in words for word in needed), words


def test_second_derivatives_that_torch_drops_are_refused(found: Any):
    for rank in found:
        words, first = rank["second_derivatives_that_torch_drops_are_refused"]
        assert words.startswith("NotDifferentiableError: `the graph` is with the custom Function Cut")
        assert float(first) <= ROUNDING


def test_every_other_call_is_refused_and_names_those_that_work(found: Any):
    for rank in found:
        refusals = rank["all_other_calls_are_refused"]
        assert len(refusals) > 50, refusals
        for call, words in refusals.items():
            assert words.startswith("ModelStateError: `model` is a "), (call, words)
            assert "sharded over processes" in words
            assert all(f"`{name}`" in words for name in ("model_vjp", "model_jvp", "hvp", "ggnvp", "vjp", "jvp"))
