"""Every kernel compiles for NVIDIA's sm_80 and sm_90 and AMD's gfx942 without a GPU, and spills nothing on sm_90.

In a process of its own, because TRITON_INTERPRET decides what a kernel is when it is defined. The table of sm_90 is
printed at the end of the test run; kernels/RESULTS.md keeps one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

from kernels import aot

ROOT = Path(__file__).resolve().parents[1]
EACH_KERNEL = ["D=64 decoder", "decoding D=64 cross", "V=32128, fp32", "dropout C=768", "geglu", "relu"]


def python(*arguments, **environment):
    without = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=without | environment, capture_output=True, text=True)


def compiled(*arguments):
    run = python("kernels.aot", "--json", *arguments)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_no_spills_in_any_configuration_of_sm_90(table):
    rows = compiled("--arch", "sm_90")
    assert {row["case"] for row in rows} == set(aot.CASES)
    table("compiled ahead of time for sm_90", [aot.HEADER, *map(aot.line, rows)])
    import triton

    if triton.__version__.startswith("3.9."):  # other versions allocate registers otherwise; see RESULTS.md
        assert [row for row in rows if row["spills"]] == []
    assert all(row["registers"] <= 255 and row["shared"] <= 227 * 1024 for row in rows)


def test_every_kernel_compiles_for_ampere_and_for_amd():
    rows = compiled("--arch", "sm_80", "gfx942", "--only", *EACH_KERNEL)
    for architecture, shared in (("sm_80", 99), ("gfx942", 64)):
        ours = [row for row in rows if row["architecture"] == architecture]
        assert {row["kernel"] for row in ours} == {
            "forward_kernel", "dq_kernel", "dkdv_kernel", "row_kernel", "multiply_kernel", "backward_kernel",
            "activation_kernel",
        }  # fmt: skip
        assert all(row["shared"] <= shared * 1024 for row in ours), "of an RTX 30 or 40, or of an MI300"


def test_recorded_launches_are_those_a_gpu_would_make():
    """Forward and backward of the public functions, and nothing is left recording afterwards."""
    names = [kernel.__name__ for kernel, _, _ in aot.launches_of("attention D=64 encoder", "sm_90")]
    assert names == ["forward_kernel", "dq_kernel", "dkdv_kernel"]
    _, _, options = aot.launches_of("cross_entropy V=32128", "gfx942")[0]
    assert options["BLOCK"] == 32768 and options["num_warps"] * 64 <= 1024
    assert aot.launch.recording is None


def test_under_the_interpreter_it_says_what_to_do():
    run = python("kernels.aot", TRITON_INTERPRET="1")
    assert run.returncode == 2 and run.stderr == "kernels.aot: needs Triton, and TRITON_INTERPRET unset\n"
