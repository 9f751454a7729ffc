"""The plan: what it estimates is what a run takes, and it is made without taking it."""

import subprocess
import sys

import pytest
from running import ROOT

import train
from data.jsonl import Record, write_jsonl
from dss.config import parse_args
from dss.run.plan import GB, plan_of

MEASURE = """
import json, sys, train

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

flags = sys.argv[1:]
train.main([*flags, "--size", "tiny"])  # what torch itself takes is there before
open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
before = kilobytes("VmRSS")
assert train.main(flags) == 0
print(json.dumps(kilobytes("VmHWM") - before), file=sys.stderr)
"""


def planned(*arguments):
    return plan_of(parse_args([str(a) for a in arguments]))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("size", ["t5-small", "t5-v1_1-small", "t5-base"])
def test_the_plan_is_within_a_fifth_of_the_measured_peak(tmp_path, measured, size, optimizer):
    rows = [Record(f"r{i}", f"Tom gave {i} apples. " * 4, f"{i} + 1", f"Add 1 to {i}. " * 5) for i in range(64)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--data", tmp_path / "rows.jsonl", "--size", size, "--optimizer", optimizer, "--method", "dss"]
    flags += ["--batch_size", "16", "--device", "cpu", "--out", tmp_path / "out", "--overwrite"]
    command = [sys.executable, "-c", MEASURE, *flags, "--steps", "3", "--eval_every", "3", "--max_new_tokens", "2"]
    done = subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True, check=True)
    peak = int(done.stderr.splitlines()[-1]) * 1024 / GB
    estimate = planned(*flags).peak
    what = f"plan of {size} with {optimizer}, {estimate:.2f} GB, against {peak:.2f} GB"
    measured(what, abs(estimate / peak - 1), 0.2)


def test_weights_gradients_and_optimiser_are_cut_into_as_many_parts_as_devices():
    """11,135,332,352 parameters of four bytes, as many gradients, and twice as much of AdamW's."""
    whole = planned("--size", "t5-v1_1-xxl")
    part = planned("--size", "t5-v1_1-xxl", "--processes", "8", "--shard", "--device_gb", "80")
    assert [round(x, 2) for x in (whole.weights, whole.gradients, whole.optimizer)] == [44.54, 44.54, 89.08]
    assert [round(x, 2) for x in (part.weights, part.gradients, part.optimizer)] == [5.57, 5.57, 11.14]
    assert part.weights + part.optimizer < part.peak < 80 and "it fits" in str(part)


def test_what_saves_memory_is_estimated_to_save_it():
    base = ["--size", "t5-small", "--method", "dss"]
    plain = planned(*base)
    assert planned(*base, "--micro_batch", "4").activations < plain.activations / 4
    assert planned(*base, "--checkpoint_activations").activations < plain.activations / 2
    assert planned(*base, "--optimizer", "adafactor").optimizer < plain.optimizer / 100


def test_a_plan_is_printed_a_run_that_cannot_fit_refused_and_a_tight_one_warned_of(tmp_path, capsys, refused):
    flags = ["--size", "t5-small", "--out", str(tmp_path / "out"), "--steps", "1", "--device", "cpu"]
    assert train.main(["--plan", *flags[2:]]) == 0
    assert capsys.readouterr().out.startswith("plan: tiny, 185,216 parameters, adamw, ")
    error = refused(train.main, *flags, "--device_gb", "0.5")
    assert "optimizer alone take 1.0 GB of 0.5; " in error and "--shard" in error and "adafactor" in error
    assert not (tmp_path / "out").exists()
    train.prepare(parse_args([*flags, "--device_gb", "1.0", "--method", "dss"]))
    assert "warning: activations may bring the total to" in capsys.readouterr().err
