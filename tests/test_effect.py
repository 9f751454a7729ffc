"""The embedded run shows what the README says: rationales help, and it is their content that does."""

import json

import pytest

import train


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_step_by_step_beats_standard_and_other_rows_rationales_do_not(tmp_path, seed):
    methods = ["standard", "dss", "dss-shuffled"]
    assert train.main(["--method", *methods, "--seed", str(seed), "--out", str(tmp_path / "out")]) == 0
    results = [json.loads((tmp_path / "out" / method / "result.json").read_text()) for method in methods]
    standard, dss, shuffled = (result["test_accuracy"] for result in results)
    assert dss >= standard + 0.05 > shuffled
