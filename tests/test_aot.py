"""Kernels compile for NVIDIA's sm_80 and sm_90 without a GPU, and the machine code of attention costs what it should.

In a process of its own, because TRITON_INTERPRET decides what a kernel is when it is defined. By default a few cases
are compiled; `python -m pytest -m slow tests/test_aot.py` compiles all of them and prints the table.
"""

import json
import os
import subprocess
import sys

import pytest
from running import ROOT

pytest.importorskip("triton", reason="Triton is not installed here")

from kernels import aot

EACH_KERNEL = ["D=64 encoder, no dropout", "V=32128, fp32", "dropout C=768", "geglu", "relu"]
KERNELS = "attention_forward attention_dq attention_dkdv cross_entropy_row cross_entropy_scale"
KERNELS += " rms_norm_forward rms_norm_backward activation"


def start(*arguments, **environment):
    without = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command, pipe = [sys.executable, "-m", "kernels.aot", *arguments], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=without | environment, stdout=pipe, stderr=pipe, text=True)


def compiled(process):
    output, error = process.communicate()
    assert process.returncode == 0, error[-2000:]
    return [json.loads(line) for line in output.splitlines()]


def check(rows):
    """Registers and shared memory fit; in bf16 backward computes scores once, and on sm_90 no loop spills."""
    for row in rows:
        assert row["registers"] <= 255 and row["shared"] <= {"sm_80": 99, "sm_90": 227}[row["architecture"]] * 1024
        if "fp32" not in row["case"]:
            assert row["kernel"] not in ("attention_dq_kernel", "attention_dkdv_kernel") or row["exp2"] <= 1.02, row
            assert row["architecture"] != "sm_90" or row["spills"][0] == 0, row


@pytest.mark.beside(lambda _: start("--json", "--arch", "sm_90", "--only", *EACH_KERNEL))
def test_each_kernel_compiles_for_hopper_and_attention_s_loops_are_short(beside, request):
    """Instructions of plain and edge loops as RESULTS.md has them for triton 3.6 and 3.9, and a little more."""
    rows = compiled(beside[request.node.name][0])
    assert {row["kernel"] for row in rows} == {f"{name}_kernel" for name in KERNELS.split()}
    check(rows)
    forward, _, dkdv = rows[:3]
    assert forward["loops"][0] <= 325 and forward["loops"][1] <= 480 and forward["blocks"] >= 2
    assert dkdv["slots"][0] <= 800


@pytest.mark.slow
def test_every_configuration_compiles(figures):
    rows = compiled(start("--json", "--arch", "sm_90", "sm_80"))
    assert {row["case"] for row in rows} == set(aot.CASES)
    figures += [aot.HEADER, *map(aot.line, rows)]
    check(rows)


def test_under_the_interpreter_it_says_what_to_do():
    process = start(TRITON_INTERPRET="1")
    assert process.communicate()[1].startswith("python -m kernels.aot: needs Triton, and TRITON_INTERPRET unset")
    assert process.returncode == 2
