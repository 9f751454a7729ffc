"""Triton where it is installed, and the one function by which our kernels are launched.

There is no Triton for macOS and Windows. There `@triton.jit` leaves a plain Python function that
nobody calls: `kernels/__init__.py` chooses the references.

`TRITON_INTERPRET=1`, set before Triton is imported, runs the kernels in NumPy on CPU tensors. The
interpreter differs from a GPU in three ways (triton 3.9): `tl.dot` of bfloat16 is silently wrong,
so kernels widen their operands to fp32 when INTERPRETED; rounding from fp32 to bfloat16
truncates; and `tl.dot` ignores `input_precision`.
"""

import functools
import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INSTALLED = triton is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"

if not INSTALLED:  # enough of Triton to define kernels that are never launched

    def jit(function: Callable | None = None, **options: object) -> Callable:
        return function or jit

    triton = SimpleNamespace(jit=jit)
    tl = SimpleNamespace(constexpr=lambda value: value)


@triton.jit
def load_fp32(ptr, mask):  # noqa: ANN001, ANN201
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Run kernel[grid](*arguments, **options) on the device of the first argument, a tensor.

    options: the constexpr arguments, num_warps and num_stages. Kernels take contiguous tensors.
    Tools and tests record launches by replacing this function (kernels/compile.py).
    """
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


@functools.cache
def architecture(device: torch.device) -> str | None:
    """Which row of a table of tiles holds for a device: "sm_90", "sm_80", "interpreter", or None.

    Datacentre Blackwell takes Hopper's row. Other GPUs from Ampere on take Ampere's, whose tiles
    fit into 99 KiB of shared memory. None: an older GPU, which has less, or one by AMD (not
    tested).
    """
    if device.type != "cuda":
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(device)
    if torch.version.hip or major < 8:
        return None
    return "sm_90" if major in (9, 10) else "sm_80"


def stages(device: torch.device) -> int:
    """num_stages for loops that load tiles and multiply them: 2, or 1 where that is not safe.

    On Hopper, Triton before 3.7.1 leaves out the fence between an asynchronous copy to shared
    memory and the product (wgmma) that reads it, so that a pipelined loop may read too early.
    """
    version = [int(part) for part in re.findall(r"\d+", triton.__version__)[:3]]
    if architecture(device) == "sm_90" and version < [3, 7, 1]:
        return 1
    return 2


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products, or None where it is off."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def require(condition: bool, text: str, *tensors: Tensor) -> None:
    """Raise ValueError with the text and what the tensors are, unless the condition holds."""
    if not condition:
        got = [f"{list(x.shape)} {x.dtype} on {x.device}" for x in tensors]
        raise ValueError(f"{text}, got {', '.join(got)}")


def check_tensors(operation: str, *tensors: Tensor | None) -> None:
    """Raise ValueError for tensors on several devices, or of a dtype that no kernel takes."""
    given = [x for x in tensors if x is not None]
    for x in given:
        require(x.device == given[0].device, f"{operation}: tensors on several devices", *given)
        require(x.dtype != torch.float64, f"{operation}: no kernel computes in float64", *given)
