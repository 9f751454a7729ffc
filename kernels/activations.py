"""The feed-forward activations of T5, each with the dropout that follows it.

    T5 1.1:  y = gelu(gate) * up  (Shazeer 2020, "GEGLU")          T5 1.0:  y = max(x, 0)

T5 uses the tanh approximation of GELU, gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))); the exact one
differs in the fourth digit, enough to fail a comparison of logits. Since 1 + tanh(u) = 2 sigmoid(2 u),

    gelu(x) = x sigmoid(2 u),     u = sqrt(2 / pi) (x + 0.044715 x^3)

which is how the kernel has it. All of it is bound by memory: one pass reads the inputs and writes y, in fp32 between.
The backward pass keeps the inputs alone and makes gelu and the dropout mask (kernels/dropout.py) again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import dropout_reference, kept, seed_on, threshold_of
from .launch import INTERPRETED, check_tensors, launch, rows_together, tl, triton

# Of a tile: 16 values a thread, and rows long enough for whole cache lines. The interpreter likes few, large tiles.
ROWS, BLOCK, NUM_WARPS = (64 if INTERPRETED else 4), 512, 4
TWO_ROOT_2_BY_PI = tl.constexpr(2 * (2 / torch.pi) ** 0.5)
CUBIC = tl.constexpr(0.044715)


# ---- Reference ------------------------------------------------------------------------------------------------------


def geglu_reference(gate: Tensor, up: Tensor, dropout_p: float = 0.0, seed: int | Tensor | None = None) -> Tensor:
    """dropout(gelu_tanh(gate) * up). gate, up: (T, F), one float dtype. Returns (T, F) in that dtype.

    seed: of the dropout; None draws one from torch's generator. Raises ValueError if shapes or dtypes differ.
    """
    check_gate(gate, up)
    return dropout_reference(F.gelu(gate, approximate="tanh") * up, dropout_p, seed)


def relu_reference(x: Tensor, dropout_p: float = 0.0, seed: int | Tensor | None = None) -> Tensor:
    """dropout(max(x, 0)). x: (T, F), any float dtype, which the result has; seed as in `geglu_reference`."""
    return dropout_reference(F.relu(x), dropout_p, seed)


def check_gate(gate, up):
    if gate.shape != up.shape or gate.dtype != up.dtype:
        shapes = f"{list(gate.shape)} {gate.dtype} and {list(up.shape)} {up.dtype}"
        raise ValueError(f"geglu: gate and up must have one shape and dtype, got {shapes}")


# ---- Triton ---------------------------------------------------------------------------------------------------------
#
# With r the dropout mask (0 or 1 / keep), t = sigmoid(2 u) and gelu = x t:
#
#     d up = dy r gelu(gate),     d gate = dy r up gelu'(gate),     gelu'(x) = t + x t (1 - t) 2 u'
#     2 u' = 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2)


@triton.jit
def gelu(x):
    """gelu(x) and its derivative; the compiler drops the one that the caller does not use."""
    t = 1 / (1 + tl.exp(-(x + x * x * x * CUBIC) * TWO_ROOT_2_BY_PI))
    return x * t, t + x * t * (1 - t) * (1 + x * x * (3 * CUBIC)) * TWO_ROOT_2_BY_PI


@triton.jit(do_not_specialize=["T", "threshold"])  # these change: compile once for all
def activation_kernel(
    gate_ptr, up_ptr,  # x of relu is up
    dy_ptr, y_ptr, d_gate_ptr,  # (T, F), contiguous; BACKWARD: y is d up
    seed_ptr,
    T, F, gate_stride, up_stride, threshold,
    BACKWARD: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows[:, None] < T) & (columns[None, :] < F)
    far = rows[:, None].to(tl.int64)
    here = far * F + columns[None, :]
    factor = tl.full([ROWS, BLOCK], 1.0, tl.float32)
    if DROPOUT:
        keep = kept(tl.load(seed_ptr), rows, 0, tl.program_id(1) * BLOCK, threshold, BLOCK)
        factor = tl.where(keep, 256.0 / (256 - threshold), 0.0)
    if BACKWARD:
        factor *= tl.load(dy_ptr + here, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + far * up_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + far * gate_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        value, slope = gelu(gate)
        if BACKWARD:
            d_gate = factor * up * slope
            tl.store(d_gate_ptr + here, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
            y = factor * value
        else:
            y = factor * value * up
    elif BACKWARD:
        y = tl.where(up > 0, factor, 0.0)
    else:
        y = factor * tl.maximum(up, 0.0)
    tl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask=inside)


class Activation(torch.autograd.Function):
    """gate is None for relu."""

    @staticmethod
    def forward(ctx, gate, up, dropout_p, seed):
        ctx.threshold = threshold_of(dropout_p)
        seed = seed_on(up.device, seed) if ctx.threshold else None
        ctx.save_for_backward(gate, up, seed)
        y = up.new_empty(up.shape)
        launch_activation(gate, up, y, y, y, seed, ctx.threshold, backward=False)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up, seed = ctx.saved_tensors
        d_up = up.new_empty(up.shape)
        d_gate = d_up if gate is None else torch.empty_like(d_up)
        launch_activation(gate, up, dy.contiguous(), d_up, d_gate, seed, ctx.threshold, backward=True)
        return None if gate is None else d_gate, d_up, None, None


def launch_activation(gate, up, dy, y, d_gate, seed, threshold, backward):
    (T, width), gated, gate = up.shape, gate is not None, up if gate is None else gate
    grid = (-(-T // ROWS), -(-width // BLOCK))
    sizes = (T, width, gate.stride(0), up.stride(0), threshold)
    flags = dict(BACKWARD=backward, GATED=gated, DROPOUT=threshold > 0, ROWS=ROWS, BLOCK=BLOCK, num_warps=NUM_WARPS)
    launch(activation_kernel, grid, gate, up, dy, y, d_gate, up if seed is None else seed, *sizes, **flags)


def geglu_triton(gate: Tensor, up: Tensor, dropout_p: float = 0.0, seed: int | Tensor | None = None) -> Tensor:
    """`geglu_reference` in one pass; dropout_p is rounded to a multiple of 1/256 (kernels/dropout.py)."""
    check_gate(gate, up)
    return activation("geglu", gate, up, dropout_p, seed)


def relu_triton(x: Tensor, dropout_p: float = 0.0, seed: int | Tensor | None = None) -> Tensor:
    """`relu_reference` in one pass, as `geglu_triton`."""
    return activation("relu", None, x, dropout_p, seed)


def activation(name, gate, up, dropout_p, seed):
    if up.dim() != 2:
        raise ValueError(f"{name}: the Triton kernel takes inputs of (T, F), got {list(up.shape)}")
    check_tensors(name, input=up, gate=gate)
    return Activation.apply(*rows_together(gate, up), dropout_p, seed)
