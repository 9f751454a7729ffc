"""The operations a T5 spends its time in, and the one place that chooses how each is computed.

Every operation has a reference in plain PyTorch, `<name>_reference`, and Triton kernels,
`<name>_triton`, in one of flash_attention, losses, norms and activations. Tensors on an NVIDIA GPU
go to Triton where it is installed, all others to the reference. DSS_KERNELS=reference or triton
overrides that. `TRITON_INTERPRET=1 DSS_KERNELS=triton` runs the Triton code on CPU tensors, slowly.
`plain_dropout` has no kernel. The model calls only what is defined here.
"""

import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from . import launch
from .activations import geglu_reference, geglu_triton
from .dropout import dropout_reference, seeds_drawn_together  # noqa: F401, for the model
from .flash_attention import (  # noqa: F401, for the model
    HEAD_WIDTHS,
    Tiles,
    attention_reference,
    attention_triton,
    bias_by_distance,
    make_tiles,
)
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

    Raises ValueError for a DSS_KERNELS that is misspelt or impossible here. A program calls this
    once before it begins, so that no run ends in the middle. Warns once on a GPU without kernels.
    """
    asked = os.environ.get("DSS_KERNELS", "")
    if asked not in ("", "reference", "triton"):
        raise ValueError(f"DSS_KERNELS must be 'triton' or 'reference', got {asked!r}")
    if asked == "reference":
        return "reference"
    problem = why_not_triton(device)
    if problem is None and (asked == "triton" or device.type == "cuda"):
        return "triton"
    if asked == "triton":
        raise ValueError(f"DSS_KERNELS=triton: {problem}; unset it to use the references")
    if device.type == "cuda" and launch.INSTALLED:
        warnings.warn(f"{device}: {problem}; the references compute instead", stacklevel=2)
    return "reference"


def why_not_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this device, or None if they can."""
    if not launch.INSTALLED:
        return "Triton is not installed here"
    if device.type != "cuda" and not launch.INTERPRETED:
        return f"Triton needs a GPU, not {device.type}, or TRITON_INTERPRET=1 as well"
    if launch.architecture(device) is None:
        return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or more"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    max_distance: int = 128,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    tiles_q: Tiles | None = None,
    tiles_k: Tiles | None = None,
    diag: Tensor | None = None,
) -> Tensor:
    """Attention within packed sequences, with T5's position bias: see `attention_reference`."""
    options = (causal, dropout_p, seed, max_distance, max_seqlen_q, max_seqlen_k)
    function = attention_reference
    if choice(q.device) == "triton":
        if q.shape[-1] in HEAD_WIDTHS:
            function = attention_triton
        else:
            text = f"attention: no Triton kernel for heads of width {q.shape[-1]}"
            warnings.warn(f"{text}; the reference computes instead", stacklevel=2)
    return function(q, k, v, table, cu_seqlens_q, cu_seqlens_k, *options, tiles_q, tiles_k, diag)


def cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, return_token_losses: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy with a weight for each token: see `cross_entropy_reference`."""
    function = cross_entropy_reference
    if choice(logits.device) == "triton":
        function = cross_entropy_triton
    return function(logits, labels, weights, return_token_losses)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    scale: float = 1.0,
    return_token_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Output matrix and cross-entropy in one: see `linear_cross_entropy_reference`."""
    function = linear_cross_entropy_reference
    if choice(hidden.device) == "triton":
        function = linear_cross_entropy_triton
    return function(hidden, weight, labels, weights, scale, return_token_losses)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """T5's layer norm, with the residual connection before it: see `rms_norm_reference`."""
    function = rms_norm_reference
    if choice(x.device) == "triton":
        function = rms_norm_triton
    return function(x, weight, eps, residual, dropout_p, seed)


def geglu(
    gate: Tensor, up: Tensor, dropout_p: float = 0.0, seed: int | Tensor | None = None
) -> Tensor:
    """gelu(gate) * up with dropout: see `geglu_reference`."""
    function = geglu_reference
    if choice(gate.device) == "triton":
        function = geglu_triton
    return function(gate, up, dropout_p, seed)


def plain_dropout(x: Tensor, p: float) -> Tensor:
    """Inverted dropout that is part of no other operation, with a seed from torch's generator.

    On a GPU it is PyTorch's own, one launch; elsewhere `dropout_reference`, which rounds p to a
    multiple of 1/256 and on a CPU takes half of the time or less.
    """
    if x.device.type == "cuda":
        return F.dropout(x, p)
    return dropout_reference(x, p)
