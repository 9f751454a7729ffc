"""Rationales help, and because of what they say. Shortened in CI, whole under -m slow."""

import subprocess
import sys

import pytest
from running import ROOT, result

METHODS = ["standard", "dss", "dss-shuffled"]
SHORT = "--steps 300 --eval-every 150 --warmup 50".split()  # less than half of the work


def train(out, *arguments):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *arguments,
        "--method",
        *METHODS,
        "--out",
        str(out / "out"),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def accuracies(process, out):
    """Of the METHODS."""
    assert process.wait() == 0
    return [result(out / "out", method)["test_accuracy"] for method in METHODS]


@pytest.mark.beside(lambda out: train(out, *SHORT))
def test_step_by_step_beats_standard_and_other_rows_rationales_in_a_short_run(beside, request):
    standard, dss, shuffled = accuracies(*beside[request.node.name])
    assert dss > standard and dss > shuffled


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_step_by_step_beats_standard_and_other_rows_rationales_do_not(tmp_path, seed):
    standard, dss, shuffled = accuracies(train(tmp_path, "--seed", str(seed)), tmp_path)
    assert dss >= standard + 0.2 and standard + 0.05 > shuffled
