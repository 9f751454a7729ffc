"""Root-mean-square normalisation:  y = x / sqrt(mean(x^2) + eps) * weight.

T5's layer norm subtracts no mean and adds no bias (Zhang and Sennrich 2019). The mean of squares is taken in fp32
whatever the input's dtype: in half precision the sum of a few hundred squares has lost its last digits.

In T5 most norms follow a residual connection with dropout, and all three are bound by memory. With `residual` they are
one pass, which reads the two inputs and writes the two outputs that the layer goes on with:

    s = residual + dropout(x),     y = s / sqrt(mean(s^2) + eps) * weight

The backward pass keeps s and the weight; 1 / rms and the dropout mask (kernels/dropout.py) are made again. The weight's
gradient is a sum over all tokens: each program adds up its own rows in fp32, PyTorch adds up the programs.
"""

import torch
from torch import Tensor

from .dropout import dropout_reference, kept, seed_on, threshold_of
from .launch import INTERPRETED, check_tensors, launch, rows_together, tl, triton

# {columns: (rows at a time, num_warps)}: 16 to 32 fp32 values a thread, which backward needs three times.
TILES = {512: (4, 4), 1024: (2, 4), 2048: (1, 4), 4096: (1, 8), 16384: (1, 16)}
PROGRAMS = 256  # in backward: about two for each multiprocessor of an H100, each with a row of fp32 sums to write


# ---- Reference ------------------------------------------------------------------------------------------------------


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None,
    dropout_p: float = 0.0, seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Normalised x; with a residual (T, C), the pair (s, normalised s) of s = residual + dropout(x).

    x: (T, C), any float dtype; weight: (C,). s has the dtype of residual + x. The normalised result has s's dtype or,
    under autocast, autocast's; the arithmetic of the norm is fp32. seed: of the dropout; None draws one from torch's
    generator. Raises ValueError if shapes differ.
    """
    check_arguments(x, weight, residual, dropout_p)
    s = x if residual is None else residual + dropout_reference(x, dropout_p, seed)
    y = Normalise.apply(s.float(), weight.float(), eps).to(compute_dtype(x) or s.dtype)
    return y if residual is None else (s, y)


class Normalise(torch.autograd.Function):
    """The norm alone, in fp32, with the gradient derived below: autograd's own takes twice the time and memory."""

    @staticmethod
    def forward(ctx, s, weight, eps):
        inverse = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)  # 1 / rms
        ctx.save_for_backward(s, weight, inverse)
        return (s * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, dy):
        s, weight, inverse = ctx.saved_tensors
        n = s * inverse
        product = n * dy
        mean = (product @ weight).div_(s.shape[-1])[..., None]  # of g n
        return (dy * weight).sub_(n.mul_(mean)).mul_(inverse), product.flatten(0, -2).sum(0), None


def compute_dtype(x):
    """What autocast has matrix products computed in, where it is on: the norm writes it, so that nothing casts it."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)  # it is not for "meta", which `kernels.aot` works on
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def check_arguments(x, weight, residual, dropout_p):
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be ({x.shape[-1]},), got {list(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual must have x's shape {list(x.shape)}, got {list(residual.shape)}")
    if dropout_p and residual is None:
        raise ValueError(f"rms_norm: dropout_p is for x beside a residual; without one it must be 0, got {dropout_p}")


# ---- Triton ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "threshold"])  # these change: compile once for all
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, s_ptr,
    y_ptr,  # s, y: (T, C), contiguous
    seed_ptr,
    T, C, x_stride, residual_stride, eps, threshold,
    RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (rows[:, None] < T) & (columns[None, :] < C)
    far = rows[:, None].to(tl.int64)
    s = tl.load(x_ptr + far * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        s = tl.where(kept(tl.load(seed_ptr), rows, 0, 0, threshold, BLOCK), s * (256.0 / (256 - threshold)), 0.0)
    if RESIDUAL:
        s += tl.load(residual_ptr + far * residual_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + far * C + columns[None, :], rounded, mask=inside)
        s = rounded.to(tl.float32)  # backward will see the rounded ones
    rms = tl.sqrt(tl.sum(s * s, 1) / C + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    y = s / rms[:, None] * weight[None, :]
    tl.store(y_ptr + far * C + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


# With n = s / rms, g = w dy and rms^2 = mean(s^2) + eps, whose derivative by s_i is 2 s_i / C:
#
#     dy / dw:   dw = sum over rows of  n dy
#     dy / ds:   ds = (g - n mean(g n)) / rms,   to which the gradient of the output s itself is added
#     dx = ds, dropped as x was, and d residual = ds.


@triton.jit(do_not_specialize=["T", "rows_each", "threshold"])
def rms_norm_backward_kernel(
    dy_ptr, ds_ptr,  # gradients of the outputs y and s
    s_ptr, weight_ptr, dx_ptr, d_residual_ptr,  # all but the weight (T, C), the gradients contiguous
    partial_ptr,  # (programs, C) fp32
    seed_ptr,
    T, C, s_stride,
    rows_each,  # of a program; a multiple of ROWS
    eps, threshold,
    RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * rows_each
    for start in range(first, tl.minimum(first + rows_each, T), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < T) & (columns[None, :] < C)
        far = rows[:, None].to(tl.int64)
        here = far * C + columns[None, :]
        s = tl.load(s_ptr + far * s_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + here, mask=inside, other=0.0).to(tl.float32)
        rms = tl.sqrt(tl.sum(s * s, 1) / C + eps)
        n = s / rms[:, None]
        d_weight += tl.sum(n * dy, 0)
        g = dy * weight[None, :]
        d = (g - n * (tl.sum(g * n, 1) / C)[:, None]) / rms[:, None]
        if RESIDUAL:
            d += tl.load(ds_ptr + here, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_residual_ptr + here, d.to(d_residual_ptr.dtype.element_ty), mask=inside)
        if DROPOUT:
            d = tl.where(kept(tl.load(seed_ptr), rows, 0, 0, threshold, BLOCK), d * (256.0 / (256 - threshold)), 0.0)
        tl.store(dx_ptr + here, d.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0) * C + columns, d_weight, mask=columns < C)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual, dropout_p, seed, dtype):
        (T, C), threshold = x.shape, threshold_of(dropout_p)
        rows, warps = (32, 1) if INTERPRETED else next(TILES[size] for size in TILES if size >= C)
        flags = dict(RESIDUAL=residual is not None, DROPOUT=threshold > 0)
        flags |= dict(ROWS=rows, BLOCK=max(triton.next_power_of_2(C), 16), num_warps=warps)
        seed = seed_on(x.device, seed) if threshold else x  # without dropout nothing reads it
        beside = x if residual is None else residual
        wider = torch.promote_types(x.dtype, beside.dtype)
        s = x if residual is None else torch.empty(T, C, dtype=wider, device=x.device)
        y = torch.empty(T, C, dtype=dtype or wider, device=x.device)
        sizes = (T, C, x.stride(0), beside.stride(0), eps, threshold)
        launch(rms_norm_forward_kernel, (-(-T // rows),), x, beside, weight, s, y, seed, *sizes, **flags)
        ctx.save_for_backward(s, weight, seed)
        ctx.rest = (eps, threshold), flags, x.dtype, None if residual is None else residual.dtype
        return y if residual is None else (s, y)

    @staticmethod
    def backward(ctx, *upstream):
        s, weight, seed = ctx.saved_tensors
        numbers, flags, x_dtype, residual_dtype = ctx.rest
        (T, C), rows = s.shape, flags["ROWS"]
        rows_each = -(-T // (PROGRAMS * rows)) * rows
        programs = -(-T // rows_each) if T else 0
        ds, dy = (x.contiguous() for x in (upstream[0], upstream[-1]))  # one and the same without a residual
        dx = torch.empty(T, C, dtype=x_dtype, device=s.device)
        d_residual = torch.empty_like(dx, dtype=residual_dtype) if residual_dtype else None
        partial = torch.empty(programs, C, device=s.device)
        tensors = (dy, ds, s, weight, dx, dx if d_residual is None else d_residual, partial, seed)
        launch(rms_norm_backward_kernel, (programs,), *tensors, T, C, s.stride(0), rows_each, *numbers, **flags)
        return dx, partial.sum(0).to(weight.dtype), None, d_residual, None, None, None


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None,
    dropout_p: float = 0.0, seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`rms_norm_reference` in one pass; dropout_p is rounded to a multiple of 1/256 (kernels/dropout.py)."""
    check_arguments(x, weight, residual, dropout_p)
    if x.dim() != 2 or not 1 <= x.shape[1] <= 16384:
        raise ValueError(f"rms_norm: the Triton kernel takes x of (T, C) with C up to 16384, got {list(x.shape)}")
    check_tensors("rms_norm", x=x, weight=weight, residual=residual)
    x, residual = rows_together(x, residual)
    return RMSNorm.apply(x, weight.contiguous(), eps, residual, dropout_p, seed, compute_dtype(x))
