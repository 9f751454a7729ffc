"""Compile every kernel without a GPU: registers, shared memory, spills.

    python -m kernels.compile
    python -m kernels.compile --arch sm_80 --only "attention D=64" geglu

The cases call the public Triton functions, forward and backward, on CPU tensors. What these would
launch on a GPU is recorded and compiled for sm_90 (H100, H200) or sm_80 (A100). Registers are those
of a thread, shared memory is that of a block; spills counts instructions that access local memory.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import launch
from .activations import geglu_triton
from .flash_attention import attention_triton
from .losses import cross_entropy_triton
from .norms import rms_norm_triton


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)


def attention_case(D: int, use: str, length: int, dropout_p: float) -> None:
    q, k, v = (leaf(2 * length, 12, D) for _ in range(3))
    table = None if use == "cross" else leaf(32, 12, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    causal = use == "decoder"
    o = attention_triton(q, k, v, table, cu_seqlens, cu_seqlens.clone(), causal, dropout_p)
    o.sum().backward()


def cross_entropy_case(V: int) -> None:
    labels = torch.zeros(64, dtype=torch.int64)
    cross_entropy_triton(leaf(64, V), labels, torch.ones(64)).backward()


def rms_norm_case(C: int) -> None:
    """As under autocast: a bf16 branch beside an fp32 residual stream."""
    weight = leaf(C, dtype=torch.float32)
    residual = leaf(64, C, dtype=torch.float32)
    s, y = rms_norm_triton(leaf(64, C), weight, 1e-6, residual, 0.1)
    (s + y).sum().backward()


def geglu_case(F: int) -> None:
    geglu_triton(leaf(64, F), leaf(64, F), 0.1).sum().backward()


CASES: dict[str, Callable[[], None]] = {
    "cross_entropy V=32128": partial(cross_entropy_case, 32128),
    "cross_entropy V=250112": partial(cross_entropy_case, 250112),
    "rms_norm C=768": partial(rms_norm_case, 768),
    "rms_norm C=4096": partial(rms_norm_case, 4096),
    "geglu F=2048": partial(geglu_case, 2048),
}
for D in (64, 128):
    for use in ("encoder", "decoder", "cross"):
        for length in (1024, 60, 24):
            for p in (0.0, 0.1):
                name = f"attention D={D} {use} N={length} p={p}"
                CASES[name] = partial(attention_case, D, use, length, p)


@dataclass
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]  # constexpr arguments, num_warps, num_stages


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Within this, launches are recorded instead of made, as on a GPU of this architecture."""
    launches = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launches.append(Launch(kernel, grid, arguments, options))

    replacements = {launch.launch: record, launch.architecture: lambda device: architecture}
    modules = [module for name, module in sys.modules.items() if name.startswith("kernels.")]
    with ExitStack() as patches:
        for module in modules:
            for original, replacement in replacements.items():
                if getattr(module, original.__name__, None) is original:
                    patch = mock.patch.object(module, original.__name__, replacement)
                    patches.enter_context(patch)
        yield launches


def compile_launch(call: Launch, architecture: str) -> str:
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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = launch.triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", "-sass", file.name]
        machine_code = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
    registers = re.search(r"REG:(\d+)", machine_code)[1]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", machine_code))
    warps = call.options["num_warps"]
    shared = built.metadata.shared
    return f"{call.kernel.__name__:<28} {warps:>5} {registers:>9} {shared:>12} {spills:>6}"


HEADER = f"{'case':<40} {'kernel':<28} warps registers shared bytes spills"


class OneLineParser(argparse.ArgumentParser):
    """Wrong arguments are one line, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m kernels.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=["sm_80", "sm_90"], default="sm_90")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of cases")
    args = parser.parse_args(argv)
    cases = [case for case in CASES if any(text in case for text in args.only)]
    if not cases:
        parser.error(f"--only: no case is named {' or '.join(args.only)}")
    if not launch.INSTALLED or launch.INTERPRETED:
        parser.error("needs Triton, and TRITON_INTERPRET unset")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # triton 3.9 says it once
    print(HEADER)
    for case in cases:
        with recording(args.arch) as launches:
            CASES[case]()
        for call in launches:
            print(f"{case:<40} {compile_launch(call, args.arch)}", flush=True)


if __name__ == "__main__":
    main()
