"""The operations a T5 spends its time in, and the one place that chooses how each is computed.

Every operation has a reference in plain PyTorch, `<name>_reference`, and Triton kernels, `<name>_triton`, side by side
in one module: flash_attention, losses, norms, activations. Tensors on a GPU go to Triton where it is installed, all
others to the reference. DSS_KERNELS=reference or triton overrides that; `TRITON_INTERPRET=1 DSS_KERNELS=triton` runs
the Triton code on CPU tensors, slowly. The model calls only what is defined here.
"""

import functools
import os
import warnings
from collections.abc import Callable

import torch

from . import launch
from .activations import geglu_reference, geglu_triton, relu_reference, relu_triton
from .dropout import seeds_drawn_together  # noqa: F401, for the model
from .flash_attention import attention_reference, attention_triton
from .losses import (
    cross_entropy_reference,
    cross_entropy_triton,
    linear_cross_entropy_reference,
    linear_cross_entropy_triton,
)
from .norms import rms_norm_reference, rms_norm_triton

__version__ = "0.3.0"  # transformers probes for a package named `kernels` and reads its version


def choice(device: torch.device) -> str:
    """Which implementation tensors on this device get: "triton" or "reference".

    Raises ValueError for a DSS_KERNELS that is misspelt or impossible here. A program calls this once before it begins,
    so that no run ends in the middle; on a GPU that our kernels do not fit it is told so, once.
    """
    value, gpu = os.environ.get("DSS_KERNELS", ""), device.type == "cuda"
    if value not in ("", "reference", "triton"):
        raise ValueError(f"DSS_KERNELS must be 'triton' or 'reference', got {value!r}")
    if value == "triton" and not launch.INSTALLED:
        raise ValueError("DSS_KERNELS=triton: Triton is not installed here; unset it to use the references")
    if value == "triton" and not gpu and not launch.INTERPRETED:
        raise ValueError(f"DSS_KERNELS=triton: Triton needs a GPU, not {device.type}, or TRITON_INTERPRET=1 as well")
    if value:
        return value
    if gpu and launch.INSTALLED and launch.architecture(device) is None:
        text = "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or more; the references compute instead"
        warnings.warn(f"{device}: {text}", stacklevel=2)
        return "reference"
    return "triton" if gpu and launch.INSTALLED else "reference"


def chosen(reference: Callable, triton: Callable) -> Callable:
    """`reference`, or `triton` in its place, whichever `choice` says for the device of the first tensor."""

    @functools.wraps(reference)
    def operation(x, *arguments, **options):
        return (triton if choice(x.device) == "triton" else reference)(x, *arguments, **options)

    return operation


attention = chosen(attention_reference, attention_triton)
cross_entropy = chosen(cross_entropy_reference, cross_entropy_triton)
linear_cross_entropy = chosen(linear_cross_entropy_reference, linear_cross_entropy_triton)
rms_norm = chosen(rms_norm_reference, rms_norm_triton)
geglu = chosen(geglu_reference, geglu_triton)
relu = chosen(relu_reference, relu_triton)
