"""Compile every kernel without a GPU: does it build, does it fit, does it spill?

    python -m kernels.compile
    python -m kernels.compile --arch sm_80 --only attention geglu --json

The cases call the public Triton functions, forward and backward, on CPU tensors. What these would
launch on a GPU is recorded and compiled for sm_90 (H100, H200) or sm_80 (A100). Columns:

    registers   of a thread
    shared KiB  of shared memory of a block
    blocks      that fit on a multiprocessor at once, by registers and shared memory
    spills      instructions that load from or store to local memory
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
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

BF16 = torch.bfloat16
FP32 = torch.float32
SHARED_KIB = {"sm_90": 227, "sm_80": 163}  # of a multiprocessor


# ---- The cases ----------------------------------------------------------------------------------


def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)


def attention_case(
    D: int, use: str, length: int, dropout_p: float = 0.1, dtype: torch.dtype = BF16
) -> None:
    tokens = 2 * length
    q, k, v = (leaf(tokens, 12, D, dtype=dtype) for _ in range(3))
    cu_seqlens = torch.tensor([0, length, tokens], dtype=torch.int32)
    table = None if use == "cross" else leaf(32, 12, dtype=FP32)
    options = dict(max_seqlen_q=length, max_seqlen_k=length)
    causal = use == "decoder"
    o = attention_triton(
        q, k, v, table, cu_seqlens, cu_seqlens.clone(), causal, dropout_p, **options
    )
    o.sum().backward()


def cross_entropy_case(V: int, dtype: torch.dtype = BF16) -> None:
    labels = torch.zeros(64, dtype=torch.int64)
    cross_entropy_triton(leaf(64, V, dtype=dtype), labels, torch.ones(64)).backward()


def norm_case(C: int, dropout_p: float = 0.1) -> None:
    """As under autocast: a bf16 branch beside an fp32 residual stream."""
    residual = leaf(64, C, dtype=FP32)
    s, y = rms_norm_triton(leaf(64, C), leaf(C, dtype=FP32), 1e-6, residual, dropout_p)
    (s + y).sum().backward()


def geglu_case(dropout_p: float = 0.1) -> None:
    geglu_triton(leaf(64, 2048), leaf(64, 2048), dropout_p).sum().backward()


def all_cases() -> dict[str, Callable[[], None]]:
    cases = {}
    for D in (64, 128, 32):
        for use in ("encoder", "decoder", "cross"):
            for length in (1024, 60, 24):
                name = f"attention D={D} {use} N={length}"
                cases[name] = partial(attention_case, D, use, length)
                cases[f"{name}, no dropout"] = partial(attention_case, D, use, length, 0.0)
        cases[f"attention D={D} encoder fp32"] = partial(
            attention_case, D, "encoder", 1024, dtype=FP32
        )
    for V in (32128, 250112):
        cases[f"cross_entropy V={V}"] = partial(cross_entropy_case, V)
    cases["cross_entropy V=32128 fp32"] = partial(cross_entropy_case, 32128, FP32)
    for C in (768, 2048, 4096):
        cases[f"rms_norm C={C}"] = partial(norm_case, C)
    cases["rms_norm C=768, no dropout"] = partial(norm_case, 768, 0.0)
    cases["geglu F=2048"] = geglu_case
    cases["geglu F=2048, no dropout"] = partial(geglu_case, 0.0)
    return cases


# ---- Recording ----------------------------------------------------------------------------------


@dataclass
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]  # constexpr arguments, num_warps, num_stages, maxnreg


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Within this, launches are recorded instead of made, as on a GPU of this architecture."""
    launches = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launches.append(Launch(kernel, grid, arguments, options))

    replacements = {
        launch.launch: record,
        launch.architecture: lambda device: architecture,
    }
    modules = [module for name, module in sys.modules.items() if name.startswith("kernels.")]
    with ExitStack() as patches:
        for module in modules:
            for original, replacement in replacements.items():
                if getattr(module, original.__name__, None) is original:
                    patch = mock.patch.object(module, original.__name__, replacement)
                    patches.enter_context(patch)
        yield launches


# ---- Compilation --------------------------------------------------------------------------------


@dataclass
class Figures:
    case: str
    architecture: str
    kernel: str
    num_warps: int
    num_stages: int
    registers: int
    shared_bytes: int
    blocks: int
    spills: int

    def line(self) -> str:
        shared = f"{self.shared_bytes / 1024:.1f}"
        names = f"{self.case:<36} {self.kernel:<20}"
        code = f"{self.registers:>10} {shared:>11} {self.blocks:>7} {self.spills:>7}"
        return f"{names} {self.num_warps:>6} {self.num_stages:>7} {code}"


HEADER = f"{'case':<36} {'kernel':<20}  warps  stages  registers  shared KiB  blocks  spills"


def set_target(architecture: str) -> None:
    """Give Triton a driver that knows the target and launches nothing."""
    capability = int(architecture.removeprefix("sm_"))
    target = launch.triton.backends.compiler.GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,  # Triton keeps compilations by device
        get_current_stream=lambda device: 0,
    )
    launch.triton.runtime.driver.set_active(driver)


def compile_launch(case: str, architecture: str, call: Launch) -> Figures:
    """Raises what Triton raises where a kernel does not build."""
    set_target(architecture)
    built = call.kernel.warmup(*call.arguments, grid=(1,), **call.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = launch.triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", "-sass", file.name]
        machine_code = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
    registers = int(re.search(r"REG:(\d+)", machine_code)[1])
    shared = built.metadata.shared
    warps = call.options["num_warps"]
    rounded = -(-registers // 8) * 8  # registers are given out in eights
    by_registers = 65536 // (rounded * 32 * warps)
    by_shared = SHARED_KIB[architecture] * 1024 // (shared + 1024)
    return Figures(
        case=case,
        architecture=architecture,
        kernel=call.kernel.__name__.removesuffix("_kernel"),
        num_warps=warps,
        num_stages=call.options.get("num_stages", 3),
        registers=registers,
        shared_bytes=shared,
        blocks=min(by_registers, by_shared, 64 // warps),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", machine_code)),
    )


def compile_case(case: str, architecture: str) -> Iterator[Figures]:
    with recording(architecture) as launches:
        all_cases()[case]()
    for call in launches:
        yield compile_launch(case, architecture, call)


class OneLineParser(argparse.ArgumentParser):
    """An argument that is wrong is one line, not the usage as well."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="python -m kernels.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", choices=["sm_80", "sm_90"], nargs="+", default=["sm_90"])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="cases whose name holds one of these",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line, not a table")
    args = parser.parse_args(argv)
    cases = [case for case in all_cases() if any(text in case for text in args.only)]
    if not cases:
        parser.error(f"--only: no case is named {' or '.join(args.only)}")
    if not launch.INSTALLED or launch.INTERPRETED:
        parser.error("needs Triton, and TRITON_INTERPRET unset")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # triton 3.9 says it once
    if not args.json:
        print(HEADER)
    for architecture in args.arch:
        for case in cases:
            for figures in compile_case(case, architecture):
                print(json.dumps(asdict(figures)) if args.json else figures.line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
