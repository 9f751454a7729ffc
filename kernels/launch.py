"""Triton where it is installed, and the one way our kernels are launched.

There is no Triton for macOS and Windows. There the kernels below `@triton.jit` are plain Python functions that nobody
calls: `kernels/__init__.py` chooses the references.

`TRITON_INTERPRET=1`, set before Triton is imported, runs the kernels in NumPy on CPU tensors. The interpreter differs
from a GPU in three ways (triton 3.9): `tl.dot` of bfloat16 is silently wrong, so kernels widen their operands to fp32
when INTERPRETED; rounding from fp32 to bfloat16 truncates; and `tl.dot` ignores `input_precision`.
"""

import functools
import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INSTALLED = triton is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"

if not INSTALLED:  # what defining the kernels, as opposed to launching them, needs of Triton
    triton = SimpleNamespace(jit=lambda f=None, **_: f or (lambda g: g))
    tl = SimpleNamespace(constexpr=lambda value: value)

recording = None  # a `kernels.aot.Recording` while launches are written down instead of made


def launch(kernel, grid, *arguments, **options):
    """Run kernel[grid](*arguments) with options: its constexpr arguments, num_warps and num_stages."""
    if recording is not None:
        recording.add(kernel, arguments, options)
    elif 0 not in grid:
        kernel[grid](*arguments, **options)


def architecture(device):
    """The row of a table of configurations that holds for a device: "sm_90", "sm_80" or "interpreter".

    GPUs we have no row for take the nearest: datacentre Blackwell Hopper's, others Ampere's, whose tiles fit 99 KiB.
    """
    return recording.architecture if recording is not None else architecture_of(device)


@functools.cache
def architecture_of(device):
    if device.type != "cuda":
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


def next_power_of_2(n):
    return 1 << max(n - 1, 0).bit_length()
