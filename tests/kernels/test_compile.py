"""Kernels compile for sm_90 without a GPU, and fit. `python -m pytest -m slow` compiles all cases.

In a process of its own, because TRITON_INTERPRET decides what a kernel is when it is defined.
"""

import os
import subprocess
import sys

import pytest
from running import ROOT

from kernels import compile

pytest.importorskip("triton", reason="Triton is not installed here")

ONE_EACH = ["encoder D=64 N=24 p=0.0", "linear_cross_entropy V=32128", "C=768", "geglu"]


def check(*flags):
    command = [sys.executable, "-m", "kernels.compile", *flags]
    environment = os.environ | dict(TRITON_INTERPRET="0")
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    limit = 99 if "sm_80" in flags else 227  # KiB of a block; 99 on an RTX 3090
    names = set()
    for line in process.stdout.splitlines()[1:]:  # without the header
        *_, name, _, registers, shared, spills = line.split()
        assert int(registers) <= 255 and int(shared) <= limit * 1024, line
        assert "sm_80" in flags or int(spills) <= 16, line
        names.add(name)
    return names


def test_each_kernel_compiles_for_hopper():
    kernels = {"rms_norm_forward_kernel", "rms_norm_backward_kernel", "geglu_kernel"}
    kernels |= {"cross_entropy_row_kernel"}
    kernels |= {f"attention_{name}_kernel" for name in ("forward", "dq", "dkdv")}
    assert check("--only", *ONE_EACH) == kernels


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_case_compiles(architecture):
    check("--arch", architecture)


def test_under_the_interpreter_it_is_one_line_and_exit_2(monkeypatch, refused):
    monkeypatch.setattr("kernels.launch.INTERPRETED", True)
    problem = "python -m kernels.compile: needs Triton, and TRITON_INTERPRET unset\n"
    assert refused(compile.main) == problem
