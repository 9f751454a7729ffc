"""Rationales help, and because of what they say. Shortened in CI, whole under -m slow."""

import pytest
from running import result, run

from data import toy
from data.jsonl import write_jsonl

METHODS = ["standard", "dss", "dss-shuffled"]


def accuracies(out, settings):
    """Of the METHODS, on the embedded task."""
    assert run(settings, "--method", *METHODS, "--out", out / "out") == 0
    return [result(out / "out", method)["test_accuracy"] for method in METHODS]


def test_step_by_step_beats_standard_and_other_rows_rationales_in_a_short_run(tmp_path):
    """Less than half of the steps, and a third of the test rows."""
    rows = dict(zip(("data", "eval-data", "test-data"), toy.make_rows(0)))
    settings = "--steps 300 --eval-every 300 --warmup 50"
    for name, records in rows.items():
        write_jsonl(tmp_path / name, records[:400])
        settings += f" --{name} {tmp_path / name}"
    standard, dss, shuffled = accuracies(tmp_path, settings)
    assert dss > standard and dss > shuffled


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_step_by_step_beats_standard_and_other_rows_rationales_do_not(tmp_path, seed):
    standard, dss, shuffled = accuracies(tmp_path, f"--seed {seed}")
    assert dss >= standard + 0.2 and standard + 0.05 > shuffled
