"""Compile every kernel without a GPU: registers, shared memory, spills.

    python -m kernels.compile
    python -m kernels.compile --arch sm_80 --only "attention D=64" geglu

The cases call the public Triton functions, forward and backward, on CPU tensors. What these would
launch on a GPU is recorded, and compiled for sm_90 (H100, H200) or sm_80 (A100). Registers are
those of a thread, shared memory is that of a block; spills are bytes of a thread's local memory.
"""

import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from . import bench, launch


def all_cases() -> list[bench.Case]:
    cases = [
        bench.linear_loss_case("V=32128", 64, 32128, 16),
        bench.linear_loss_case("V=250112", 64, 250112, 16),
        bench.rms_norm_case("C=768", 64, 768, 0.1),
        bench.rms_norm_case("C=4096", 64, 4096, 0.1),
        bench.geglu_case("F=2048", 64, 0.1),
    ]
    for use in ("encoder", "decoder", "cross"):
        for D in (64, 128):
            for N in (24, 60, 1024):
                for p in (0.0, 0.1):
                    name = f"D={D} N={N} p={p}"
                    cases.append(bench.attention_case(use, name, [N, N], [N, N], D, p))
    return cases


@contextmanager
def recording(architecture: str) -> Iterator[list[SimpleNamespace]]:
    """Within this, launches are recorded instead of made, as on a GPU of this architecture.

    Of each: kernel, grid, arguments and options (constexpr arguments, num_warps, num_stages).
    """
    launches = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        call = SimpleNamespace(kernel=kernel, grid=grid, arguments=arguments, options=options)
        launches.append(call)

    as_on_gpu = dict(launch=record, architecture=lambda device: architecture)
    with mock.patch.multiple(launch, **as_on_gpu):
        yield launches


def compile_launch(call: SimpleNamespace, architecture: str) -> str:
    """A line of figures. Raises what Triton raises where a kernel does not build."""
    capability = int(architecture.removeprefix("sm_"))
    target = launch.triton.backends.compiler.GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,  # Triton keeps compilations by device
        get_current_stream=lambda device: 0,
    )
    launch.triton.runtime.driver.set_active(driver)
    built = call.kernel.warmup(*call.arguments, grid=(1,), **call.options)
    with tempfile.NamedTemporaryFile() as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = launch.triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    registers, spills = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    warps = call.options["num_warps"]
    shared = built.metadata.shared
    return f"{call.kernel.__name__:<28} {warps:>5} {registers:>9} {shared:>12} {spills:>6}"


HEADER = f"{'case':<40} {'kernel':<28} warps registers shared bytes spills"


def main(argv: list[str] | None = None) -> None:
    parser = bench.OneLineParser(prog="python -m kernels.compile")
    parser.add_argument("--arch", choices=["sm_80", "sm_90"], default="sm_90")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of cases")
    args = parser.parse_args(argv)
    if not launch.INSTALLED or launch.INTERPRETED:
        parser.error("needs Triton, and TRITON_INTERPRET unset")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # triton 3.9 says it once
    print(HEADER)
    for case in all_cases():
        if not any(text in case.name for text in args.only):
            continue
        with recording(args.arch) as launches:
            outputs = case.peers["ours"]()()
            torch.autograd.backward(outputs, outputs)
        for call in launches:
            print(f"{case.name:<40} {compile_launch(call, args.arch)}", flush=True)


if __name__ == "__main__":
    main()
