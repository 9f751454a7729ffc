"""Gated GELU, the feed-forward activation of T5 1.1, with the dropout that follows it.

    y = dropout(gelu(gate) * up)            (Shazeer 2020, "GEGLU")

T5 uses the tanh approximation, gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).
The exact function differs in the fourth digit, enough to fail a comparison of logits. The kernels
use 1 + tanh(u) = 2 sigmoid(2 u):

    gelu(x) = x sigmoid(2 u),     u = sqrt(2 / pi) (x + 0.044715 x^3)

The operation is bound by memory. One pass reads both inputs and writes y, with fp32 arithmetic
between. The backward pass keeps only the inputs. It computes gelu and the dropout mask again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launch
from .dropout import drop, dropout_reference, seed_on, threshold_of
from .launch import INTERPRETED, check_tensors, load_fp32, require, tl, triton

# A tile is 4 rows of 512 numbers: 16 values a thread, and rows long enough for whole cache lines.
# The interpreter takes as long for a large tile as for a small one.
ROWS = 64 if INTERPRETED else 4
BLOCK = 512
NUM_WARPS = 4

TWO_ROOT_2_BY_PI = tl.constexpr(2 * (2 / torch.pi) ** 0.5)
CUBIC = tl.constexpr(0.044715)


def geglu_reference(
    gate: Tensor, up: Tensor, dropout_p: float = 0.0, seed: int | Tensor | None = None
) -> Tensor:
    """dropout(gelu(gate) * up) with the tanh approximation of GELU.

    gate, up: (T, F), one float dtype. seed: of the dropout; None draws one from torch's generator.
    Returns (T, F) in the dtype of the inputs. Raises ValueError if shapes or dtypes differ.
    """
    check_arguments(gate, up)
    return dropout_reference(F.gelu(gate, approximate="tanh") * up, dropout_p, seed)


def check_arguments(gate: Tensor, up: Tensor) -> None:
    fits = gate.shape == up.shape and gate.dtype == up.dtype
    require(fits, "geglu: gate and up must have one shape and dtype", gate, up)


# ---- Triton -------------------------------------------------------------------------------------
#
# With r the dropout mask (0 or 1 / (1 - p)) and t = sigmoid(2 u):
#
#     d up = dy r gelu(gate)
#     d gate = dy r up gelu'(gate),     gelu'(x) = t + x t (1 - t) 2 u'
#     2 u' = 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2)


# ruff: disable[ANN001, ANN201]
@triton.jit(do_not_specialize=["T", "threshold"])  # these change often: compile once for all
def geglu_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,  # forward's result, or None in backward; (T, F) as all are
    dy_ptr,  # backward's input and results, or None in forward
    d_gate_ptr,
    d_up_ptr,
    seed_ptr,  # None without dropout
    T,
    F,
    threshold,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * BLOCK
    columns = first_column + tl.arange(0, BLOCK)[None, :]
    row = rows[:, None].to(tl.int64)
    inside = (row < T) & (columns < F)
    here = row * F + columns
    gate = load_fp32(gate_ptr + here, inside)
    up = load_fp32(up_ptr + here, inside)
    t = 1 / (1 + tl.exp(-(gate + gate * gate * gate * CUBIC) * TWO_ROOT_2_BY_PI))
    if dy_ptr is None:
        y = drop(gate * t * up, seed_ptr, rows, first_column, threshold, BLOCK)
        tl.store(y_ptr + here, y, mask=inside)
    else:
        dy = load_fp32(dy_ptr + here, inside)
        dy = drop(dy, seed_ptr, rows, first_column, threshold, BLOCK)
        slope = t + gate * t * (1 - t) * (1 + gate * gate * (3 * CUBIC)) * TWO_ROOT_2_BY_PI
        tl.store(d_gate_ptr + here, dy * up * slope, mask=inside)
        tl.store(d_up_ptr + here, dy * gate * t, mask=inside)


# ruff: enable[ANN001, ANN201]


class GEGLU(torch.autograd.Function):
    """seed: (1,) int64 on the device, or None without dropout."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
        y = torch.empty_like(up)
        launch_tiles([gate, up, y, None, None, None, seed], threshold)
        ctx.save_for_backward(gate, up, seed)
        ctx.threshold = threshold
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, seed = ctx.saved_tensors
        d_gate = torch.empty_like(gate)
        d_up = torch.empty_like(up)
        launch_tiles([gate, up, None, dy.contiguous(), d_gate, d_up, seed], ctx.threshold)
        return d_gate, d_up, None, None


def launch_tiles(tensors: list[Tensor | None], threshold: int) -> None:
    """tensors: the kernel's, in order."""
    T, width = tensors[0].shape
    grid = (triton.cdiv(T, ROWS), triton.cdiv(width, BLOCK))
    tile = dict(ROWS=ROWS, BLOCK=BLOCK, num_warps=NUM_WARPS)
    launch.launch(geglu_kernel, grid, *tensors, T, width, threshold, **tile)


def geglu_triton(
    gate: Tensor, up: Tensor, dropout_p: float = 0.0, seed: int | Tensor | None = None
) -> Tensor:
    """`geglu_reference` in one pass; dropout_p is rounded as dropout.py says."""
    check_arguments(gate, up)
    require(up.dim() == 2, "geglu: the Triton kernel takes inputs of (T, F)", up)
    check_tensors("geglu", gate, up)
    threshold = threshold_of(dropout_p)
    seed = seed_on(up.device, seed) if threshold else None
    return GEGLU.apply(gate.contiguous(), up.contiguous(), seed, threshold)
