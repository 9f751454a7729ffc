"""The plan: what it estimates is what a run takes, and it is made without taking it."""

import subprocess
import sys
from pathlib import Path

import pytest

from data.jsonl import Record, write_jsonl
from dss.config import parse_args
from dss.run.plan import GB, plan_of

ROOT = Path(__file__).resolve().parents[1]
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
    measured(
        f"plan of {size} with {optimizer}, {estimate:.2f} GB, against {peak:.2f} GB", abs(estimate / peak - 1), 0.2
    )
