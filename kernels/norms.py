"""Root-mean-square normalisation:  y = x / sqrt(mean(x^2) + eps) * weight.

T5's layer norm subtracts no mean and adds no bias (Zhang and Sennrich 2019). The mean of squares is
taken in fp32 whatever the dtype of the input: in half precision, the sum of a few hundred squares
has lost its last digits.

In T5 most norms follow dropout and a residual connection. All three are bound by memory. With
`residual` they are one pass, which reads the two inputs and writes the two outputs that the layer
goes on with:

    s = residual + dropout(x),     y = s / sqrt(mean(s^2) + eps) * weight

The backward pass keeps s and the weight. It computes 1 / rms and the dropout mask (dropout.py)
again. The gradient of the weight is a sum over all tokens: each program adds up its own rows in
fp32, and PyTorch adds up the programs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launch
from .dropout import drop, dropout_reference, seed_on, threshold_of
from .launch import autocast_dtype, check_tensors, load_fp32, require, tl, triton

PROGRAMS = 256  # in backward: about two for each multiprocessor of an H100


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalised x; with a residual, the pair (s, normalised s) of s = residual + dropout(x).

    x, residual: (T, C), any float dtype; weight: (C,). s has the dtype of residual + x. The
    normalised result has s's dtype or, under autocast, autocast's; the arithmetic of the norm is
    fp32. seed: of the dropout; None draws one from torch's generator. Raises ValueError if shapes
    differ.
    """
    check_arguments(x, weight, residual, dropout_p)
    s = x if residual is None else residual + dropout_reference(x, dropout_p, seed)
    s32 = s.float()
    inverse_rms = torch.rsqrt(s32.square().mean(-1, keepdim=True) + eps)
    y = (s32 * inverse_rms * weight).to(autocast_dtype(x.device) or s.dtype)
    return y if residual is None else (s, y)


def check_arguments(x: Tensor, weight: Tensor, residual: Tensor | None, dropout_p: float) -> None:
    require(weight.shape == x.shape[-1:], "rms_norm: weight must be (C,)", weight, x)
    if residual is None:
        require(dropout_p == 0, "rms_norm: dropout_p is for x beside a residual", x)
    else:
        require(residual.shape == x.shape, "rms_norm: residual must have x's shape", residual, x)


# ---- Triton -------------------------------------------------------------------------------------


# ruff: disable[ANN001, ANN201]
@triton.jit(do_not_specialize=["T", "threshold"])  # these change often: compile once for all
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,  # None without a residual, as s_ptr is
    weight_ptr,
    s_ptr,  # s, y: (T, C)
    y_ptr,
    seed_ptr,  # None without dropout
    T,
    C,
    eps,
    threshold,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    row = rows[:, None].to(tl.int64)
    column = columns[None, :]
    inside = (row < T) & (column < C)
    here = row * C + column
    s = load_fp32(x_ptr + here, inside)
    s = drop(s, seed_ptr, rows, 0, threshold, BLOCK)
    if residual_ptr is not None:
        s += load_fp32(residual_ptr + here, inside)
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + here, rounded, mask=inside)
        s = rounded.to(tl.float32)  # as backward will read it
    rms = tl.sqrt(tl.sum(s * s, 1) / C + eps)
    weight = load_fp32(weight_ptr + columns, columns < C)
    y = s / rms[:, None] * weight[None, :]
    tl.store(y_ptr + here, y, mask=inside)


# With n = s / rms, g = weight dy and rms^2 = mean(s^2) + eps, whose derivative by s_i is 2 s_i / C:
#
#     d weight = sum over rows of  n dy
#     d s = (g - n mean(g n)) / rms,   to which the gradient of the output s itself is added
#     d x = d s, dropped as x was,     d residual = d s


@triton.jit(do_not_specialize=["T", "rows_each", "threshold"])
def rms_norm_backward_kernel(
    dy_ptr,  # gradients of the outputs y and s
    ds_ptr,  # None without a residual, as d_residual_ptr is
    s_ptr,
    weight_ptr,
    dx_ptr,
    d_residual_ptr,
    partial_ptr,  # (programs, C) fp32
    seed_ptr,  # None without dropout
    T,
    C,
    rows_each,  # of a program; a multiple of ROWS
    eps,
    threshold,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    column = columns[None, :]
    weight = load_fp32(weight_ptr + columns, columns < C)
    d_weight = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * rows_each
    for start in range(first, tl.minimum(first + rows_each, T), ROWS):
        rows = start + tl.arange(0, ROWS)
        row = rows[:, None].to(tl.int64)
        inside = (row < T) & (column < C)
        here = row * C + column
        s = load_fp32(s_ptr + here, inside)
        dy = load_fp32(dy_ptr + here, inside)
        rms = tl.sqrt(tl.sum(s * s, 1) / C + eps)
        n = s / rms[:, None]
        d_weight += tl.sum(n * dy, 0)
        g = dy * weight[None, :]
        mean = tl.sum(g * n, 1) / C
        dx = (g - n * mean[:, None]) / rms[:, None]
        if ds_ptr is not None:
            dx += load_fp32(ds_ptr + here, inside)
            tl.store(d_residual_ptr + here, dx, mask=inside)
        dx = drop(dx, seed_ptr, rows, 0, threshold, BLOCK)
        tl.store(dx_ptr + here, dx, mask=inside)
    tl.store(partial_ptr + tl.program_id(0) * C + columns, d_weight, mask=columns < C)


# ruff: enable[ANN001, ANN201]


def tile_for(columns: int) -> dict[str, int]:
    """ROWS rows at a time: 16 to 32 fp32 values a thread, which backward needs three times."""
    block = max(triton.next_power_of_2(columns), 16)
    num_warps = min(max(block // 512, 4), 16)
    return dict(ROWS=max(2048 // block, 1), BLOCK=block, num_warps=num_warps)


class RMSNorm(torch.autograd.Function):
    """y of x, or (s, y) with a residual. seed: (1,) int64 on the device, None without dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        seed: Tensor | None,
        eps: float,
        threshold: int,
        dtype: torch.dtype | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        T, C = x.shape
        s = None
        sum_dtype = x.dtype
        if residual is not None:
            sum_dtype = torch.promote_types(x.dtype, residual.dtype)
            s = torch.empty_like(x, dtype=sum_dtype)
        y = torch.empty_like(x, dtype=dtype or sum_dtype)
        tile = tile_for(C)
        grid = (triton.cdiv(T, tile["ROWS"]),)
        tensors = (x, residual, weight, s, y, seed)
        launch.launch(rms_norm_forward_kernel, grid, *tensors, T, C, eps, threshold, **tile)
        ctx.save_for_backward(x if s is None else s, weight, seed)
        ctx.eps = eps
        ctx.threshold = threshold
        ctx.x_dtype = x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y if s is None else (s, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        s, weight, seed = ctx.saved_tensors
        T, C = s.shape
        dy = upstream[-1].contiguous()
        dx = torch.empty_like(s, dtype=ctx.x_dtype)
        ds = None
        d_residual = None
        if ctx.residual_dtype is not None:
            ds = upstream[0].contiguous()
            d_residual = torch.empty_like(s, dtype=ctx.residual_dtype)
        tile = tile_for(C)
        rows_each = triton.cdiv(max(T, 1), PROGRAMS * tile["ROWS"]) * tile["ROWS"]
        programs = triton.cdiv(T, rows_each)
        partial = s.new_empty(programs, C, dtype=torch.float32)
        tensors = (dy, ds, s, weight, dx, d_residual, partial, seed)
        numbers = (T, C, rows_each, ctx.eps, ctx.threshold)
        launch.launch(rms_norm_backward_kernel, (programs,), *tensors, *numbers, **tile)
        return dx, partial.sum(0), d_residual, None, None, None, None


def rms_norm_triton(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm_reference` in one pass; dropout_p is rounded as dropout.py says."""
    check_arguments(x, weight, residual, dropout_p)
    require(x.dim() == 2, "rms_norm: the Triton kernel takes x of (T, C)", x)
    check_tensors("rms_norm", x, weight, residual)
    threshold = threshold_of(dropout_p)
    seed = seed_on(x.device, seed) if threshold else None
    if residual is not None:
        residual = residual.contiguous()
    tensors = (x.contiguous(), weight.contiguous(), residual, seed)
    return RMSNorm.apply(*tensors, eps, threshold, autocast_dtype(x.device))
