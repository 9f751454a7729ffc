"""The operations a T5 spends its time in, and the one place that chooses how each is computed.

Every operation has a reference in plain PyTorch, `<name>_reference`, and Triton kernels, `<name>_triton`, in one of
flash_attention, losses, norms and activations. Tensors on an NVIDIA GPU go to Triton where it is installed, all others
to the reference. DSS_KERNELS=reference or triton overrides that; `TRITON_INTERPRET=1 DSS_KERNELS=triton` runs the
Triton code on CPU tensors, slowly. The model calls only what is defined here.
"""

import os
import warnings
from typing import Any

import torch
from torch import Tensor

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
    so that no run ends in the middle; on a GPU that our kernels do not fit it warns once.
    """
    value, gpu = os.environ.get("DSS_KERNELS", ""), device.type == "cuda"
    if value not in ("", "reference", "triton"):
        raise ValueError(f"DSS_KERNELS must be 'triton' or 'reference', got {value!r}")
    if value == "triton" and not launch.INSTALLED:
        raise ValueError("DSS_KERNELS=triton: Triton is not installed here; unset it to use the references")
    if value == "triton" and not gpu and not launch.INTERPRETED:
        raise ValueError(f"DSS_KERNELS=triton: Triton needs a GPU, not {device.type}, or TRITON_INTERPRET=1 as well")
    if value or not (gpu and launch.INSTALLED):
        return value or "reference"
    if launch.architecture(device) is None:
        text = "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or more; the references compute instead"
        warnings.warn(f"{device}: {text}", stacklevel=2)
        return "reference"
    return "triton"


def use_triton(x: Tensor) -> bool:
    return choice(x.device) == "triton"


def attention(q: Tensor, *args: Any, **options: Any) -> Tensor:
    """Attention within packed sequences, with T5's position bias: see `attention_reference`."""
    return (attention_triton if use_triton(q) else attention_reference)(q, *args, **options)


def cross_entropy(logits: Tensor, *args: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy with a weight per token: see `cross_entropy_reference`."""
    return (cross_entropy_triton if use_triton(logits) else cross_entropy_reference)(logits, *args, **options)


def linear_cross_entropy(hidden: Tensor, *args: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Output matrix and cross-entropy in one: see `linear_cross_entropy_reference`."""
    implementation = linear_cross_entropy_triton if use_triton(hidden) else linear_cross_entropy_reference
    return implementation(hidden, *args, **options)


def rms_norm(x: Tensor, *args: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """T5's layer norm, with the residual connection before it: see `rms_norm_reference`."""
    return (rms_norm_triton if use_triton(x) else rms_norm_reference)(x, *args, **options)


def geglu(gate: Tensor, *args: Any, **options: Any) -> Tensor:
    """gelu(gate) * up with dropout: see `geglu_reference`."""
    return (geglu_triton if use_triton(gate) else geglu_reference)(gate, *args, **options)


def relu(x: Tensor, *args: Any, **options: Any) -> Tensor:
    """max(x, 0) with dropout: see `relu_reference`."""
    return (relu_triton if use_triton(x) else relu_reference)(x, *args, **options)
