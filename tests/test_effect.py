"""The headline claim: rationales help, and it is what they say that does. Shortened in CI, whole under -m slow."""

import json

import pytest

import train

SHORT = "--steps 1000 --eval-every 500 --lr 2e-3 --batch-size 16 --subsample 0.5".split()  # a sixth of the work


def accuracies(out, *arguments):
    methods = ["standard", "dss", "dss-shuffled"]
    assert train.main(["--method", *methods, "--out", str(out), *arguments]) == 0
    return [json.loads((out / method / "result.json").read_text())["test_accuracy"] for method in methods]


def test_step_by_step_beats_standard_and_other_rows_rationales_in_a_short_run(tmp_path):
    standard, dss, shuffled = accuracies(tmp_path / "out", *SHORT)
    assert dss > standard and dss > shuffled


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_step_by_step_beats_standard_and_other_rows_rationales_do_not(tmp_path, seed):
    standard, dss, shuffled = accuracies(tmp_path / "out", "--seed", str(seed))
    assert dss >= standard + 0.05 > shuffled
