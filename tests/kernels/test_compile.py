"""Kernels compile for sm_80 and sm_90 without a GPU, and fit.

In a process of its own, because TRITON_INTERPRET decides what a kernel is when it is defined. By
default the kernels of one case each are compiled; `python -m pytest -m slow` compiles all cases.
"""

import json
import os
import subprocess
import sys

import pytest
from running import ROOT

pytest.importorskip("triton", reason="Triton is not installed here")

from kernels.compile import all_cases

ONE_EACH = ["D=32 encoder N=60, no dropout", "V=32128 fp32", "C=768, no", "geglu F=2048, no"]
KERNELS = {
    "attention_forward",
    "attention_dq",
    "attention_dkdv",
    "cross_entropy_row",
    "cross_entropy_scale",
    "rms_norm_forward",
    "rms_norm_backward",
    "geglu_forward",
    "geglu_backward",
}


def run(*arguments, interpret="0"):
    command = [sys.executable, "-m", "kernels.compile", *arguments]
    environment = os.environ | dict(TRITON_INTERPRET=interpret)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def compiled(*arguments):
    process = run("--json", *arguments)
    assert process.returncode == 0, process.stderr[-2000:]
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    for row in rows:
        limit = (
            227 if row["architecture"] == "sm_90" else 99
        )  # of a block; the latter on an RTX 3090
        assert row["registers"] <= 255 and row["shared_bytes"] <= limit * 1024, row
        assert row["blocks"] >= 1, row
    return rows


def test_each_kernel_compiles_for_hopper():
    rows = compiled("--only", *ONE_EACH)
    assert {row["kernel"] for row in rows} >= KERNELS
    others = [row for row in rows if "attention" not in row["case"]]
    assert all(row["spills"] == 0 for row in others)


@pytest.mark.slow
def test_every_case_compiles():
    rows = compiled("--arch", "sm_90", "sm_80")
    assert {row["case"] for row in rows} == set(all_cases())


def test_under_the_interpreter_it_is_one_line_and_exit_2():
    process = run(interpret="1")
    assert process.returncode == 2
    expected = "python -m kernels.compile: needs Triton, and TRITON_INTERPRET unset\n"
    assert process.stderr == expected
