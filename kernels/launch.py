"""Triton where it is installed, and the one way our kernels are launched.

There is no Triton for macOS and Windows. There the kernels below `@triton.jit` are plain Python functions that nobody
calls: `kernels/__init__.py` chooses the references.

`TRITON_INTERPRET=1`, set before Triton is imported, runs the kernels in NumPy on CPU tensors. The interpreter differs
from a GPU in three ways (triton 3.9): `tl.dot` of bfloat16 is silently wrong, so kernels widen their operands to fp32
when INTERPRETED; rounding from fp32 to bfloat16 truncates; and `tl.dot` ignores `input_precision`.
"""

import functools
import os
from collections.abc import Callable
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

recording = None  # (architecture, launches) while launches are written down instead of made, by kernels.aot
compiled = {}  # {what Triton compiles anew for: (launcher, function, metadata, constexpr arguments)}


def launch(kernel: Callable, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Run kernel[grid](*arguments) with options: its constexpr arguments, num_warps, num_stages and maxnreg.

    The first argument is a tensor; the kernel runs on its device. Triton's own way to a compiled kernel costs the host
    more than many of our kernels take, so that a kernel that has run before is called directly.
    """
    device = arguments[0].device
    if recording is not None:
        recording[1].append((kernel, arguments, options))
    elif 0 in grid:
        return
    elif INTERPRETED:
        kernel[grid](*arguments, **options)
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, **options)
    else:
        key = [kernel, device, *options.values()]
        for x in arguments:  # what Triton tells apart: dtype and alignment; of an integer 1, multiples of 16, 64 bits
            if isinstance(x, int):
                key.append((x == 1) - (x % 16 == 0) if x < 2**31 else 2 + x % 16)
            elif not isinstance(x, float):
                key += x.dtype, x.data_ptr() % 16
        found = compiled.get(key := tuple(key))
        if found is None:
            built = kernel[grid](*arguments, **options)
            constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
            compiled[key] = built.run, built.function, built.packed_metadata, constants
        else:
            run, function, metadata, constants = found
            stream = triton.runtime.driver.active.get_current_stream(device.index)
            x, y, z = (*grid, 1, 1)[:3]
            run(x, y, z, stream, function, metadata, None, None, None, *arguments, *constants)  # None: no hooks


def architecture(device):
    """The row of a table of configurations that holds for a device: "sm_90", "sm_80", "interpreter", or None.

    Datacentre Blackwell takes Hopper's, other GPUs from Ampere on take Ampere's, whose tiles fit 99 KiB of shared
    memory. Older ones have less, and AMD's are untested.
    """
    return recording[0] if recording is not None else architecture_of(device)


@functools.cache
def architecture_of(device):
    if device.type != "cuda":
        return "interpreter"
    capability = torch.cuda.get_device_capability(device)[0]
    if torch.version.hip or capability < 8:
        return None
    return "sm_90" if capability in (9, 10) else "sm_80"


def check_tensors(operation, **tensors):
    """Raise ValueError for a tensor on another device than the first, or of a float dtype that no kernel takes."""
    given = {name: x for name, x in tensors.items() if x is not None}
    device = next(iter(given.values())).device
    for name, x in given.items():
        if x.device != device:
            raise ValueError(f"{operation}: {name} must be on {device} as the others, got {x.device}")
        if x.is_floating_point() and x.element_size() not in (2, 4):
            raise ValueError(f"{operation}: {name} must be float32, float16 or bfloat16, got {x.dtype}")


def rows_together(*tensors):
    """The tensors, copied where the numbers of a row do not lie side by side."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
