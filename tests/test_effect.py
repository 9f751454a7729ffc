"""The headline claim: rationales help, and it is what they say that does. Shortened in CI, whole under -m slow."""

import subprocess
import sys

import pytest
from running import ROOT, result

SHORT = "--steps 1000 --eval-every 500 --lr 2e-3 --batch-size 16 --subsample 0.5".split()  # a sixth of the work


def accuracies(out, *arguments):
    """Of standard, dss and dss-shuffled. dss is trained beside the others: each run takes one core."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "--method"]
    methods = {"a": ["standard", "dss-shuffled"], "b": ["dss"]}
    runs = [subprocess.Popen([*command, *some, "--out", str(out / name)]) for name, some in methods.items()]
    assert [run.wait() for run in runs] == [0, 0]
    found = {m: result(out / name, m)["test_accuracy"] for name, some in methods.items() for m in some}
    return found["standard"], found["dss"], found["dss-shuffled"]


def test_step_by_step_beats_standard_and_other_rows_rationales_in_a_short_run(tmp_path):
    standard, dss, shuffled = accuracies(tmp_path / "out", *SHORT)
    assert dss > standard and dss > shuffled


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_step_by_step_beats_standard_and_other_rows_rationales_do_not(tmp_path, seed):
    standard, dss, shuffled = accuracies(tmp_path / "out", "--seed", str(seed))
    assert dss >= standard + 0.05 > shuffled
