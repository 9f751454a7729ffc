"""Kernels compile for sm_90 without a GPU, and fit. `python -m pytest -m slow` compiles all cases.

In a process of its own, because TRITON_INTERPRET decides what a kernel is when it is defined.
"""

import os
import subprocess
import sys

import pytest
from running import ROOT

pytest.importorskip("triton", reason="Triton is not installed here")

ONE_EACH = ["D=64 encoder N=60 p=0.0", "cross_entropy V=32128", "C=768", "geglu"]


def compiled(*flags, interpret="0"):
    command = [sys.executable, "-m", "kernels.compile", *flags]
    environment = os.environ | dict(TRITON_INTERPRET=interpret)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def check(*flags):
    process = compiled(*flags)
    assert process.returncode == 0, process.stderr[-2000:]
    lines = process.stdout.splitlines()[1:]  # without the header
    limit = 99 if "sm_80" in flags else 227  # KiB of a block; 99 on an RTX 3090
    for line in lines:
        *names, _, registers, shared, spills = line.split()
        assert int(registers) <= 255 and int(shared) <= limit * 1024, line
        assert names[0] == "attention" or spills == "0", line
    return {line.split()[-5] for line in lines}


def test_each_kernel_compiles_for_hopper():
    kernels = {"rms_norm_forward_kernel", "rms_norm_backward_kernel", "geglu_kernel"}
    kernels |= {"cross_entropy_row_kernel", "cross_entropy_scale_kernel"}
    kernels |= {f"attention_{name}_kernel" for name in ("forward", "dq", "dkdv")}
    assert check("--only", *ONE_EACH) >= kernels


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_case_compiles(architecture):
    check("--arch", architecture)


def test_under_the_interpreter_it_is_one_line_and_exit_2():
    process = compiled(interpret="1")
    problem = "python -m kernels.compile: needs Triton, and TRITON_INTERPRET unset\n"
    assert (process.returncode, process.stderr) == (2, problem)
