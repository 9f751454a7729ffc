"""Cross-entropy with a weight per token, over logits or straight from hidden states.

    loss = sum_t  w_t * ( logsumexp(z_t) - z_t[label_t] ),        z_t = scale * W h_t

The weights carry the method: 1 / N_label on the tokens of label targets and lambda / N_rationale on those of
rationales make one weighted sum of  L_label + lambda * L_rationale,  so both tasks are one pass over one stream.
A token whose label is -100, or whose weight is 0, adds nothing to the loss and nothing to any gradient.

**Rows.** One program computes one row, in fp32. Up to V = 32768 it stays in registers between the sum and the gradient:
the logits are read once and the gradient is written once. Longer rows (mT5 has V = 250112) are read twice.

**Linear.** T x V logits would be the largest tensor of the whole model. `linear_cross_entropy` takes the tokens in
chunks: one matrix product makes a chunk's logits, LOGITS_BYTES of them, the row kernel turns them into their gradient
in place, and two more products give d(hidden) and a summand of d(weight). On the CPU a few operations of PyTorch,
`fill_rows`, do the row kernel's work. Small chunks are expensive, because each reads and writes all of d(weight), which
is fp32 whatever the dtype of the inputs: sums of bfloat16 over 32 chunks are off by 7e-3.

**The gradient is computed in the forward pass**, while the logits are at hand, for an upstream gradient of 1. The
backward pass multiplies by the real one, on the device and in place, and a kernel that finds a 1 there returns at once;
a second backward pass through the same graph is refused.

Labels outside [0, V) other than -100 are refused; on a GPU, where reading them would make the host wait, they give NaN.
In fp16 a gradient below 6e-8 is 0, and w_t / V gets there; train in bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import launch, rows_together, tl, triton

IGNORE = -100  # the label of a token that is not a target, as everywhere in PyTorch
LOGITS_BYTES = 256 * 2**20  # of one chunk of logits: about 4k tokens of T5's vocabulary in bfloat16
CPU_LOGITS_BYTES = 32 * 2**20  # without Triton: about 256 tokens of it in fp32, which stay in a large CPU's cache

# {columns: num_warps} of a row's block. The longest row takes 64 fp32 values a thread; with 32 warps it would take 32,
# but a thread then has only 64 registers, and 4 to 30 values spill.
WARPS = {1024: 4, 8192: 8, 32768: 16}


# ---- Reference ------------------------------------------------------------------------------------------------------


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, weights: Tensor, return_token_losses: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """sum_t weights[t] * -log softmax(logits[t])[labels[t]], computed in fp32.

    logits: (T, V), any float dtype; labels: (T,) int64 in [0, V), or -100 for "ignored"; weights: (T,) fp32.
    Returns a scalar fp32 tensor and, if asked, also the (T,) unweighted losses in nats, detached, 0 where ignored.
    Raises ValueError for arguments that do not fit together.
    """
    check_arguments(logits, labels, weights)
    nll = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    loss = (nll * weights).sum()
    return (loss, nll.detach()) if return_token_losses else loss


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, scale: float = 1.0,
    return_token_losses: bool = False, logits_bytes: int = CPU_LOGITS_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`cross_entropy_reference` of the logits scale * hidden @ weight^T, chunk by chunk.

    hidden: (T, C); weight: (V, C); scale: d_model**-0.5 where T5 ties the output to the embedding, else 1;
    logits_bytes bounds the logits of one chunk. The matrix products are in hidden's dtype, or in autocast's where it is
    on; weight may be fp32 beside hidden in half precision, and its gradient is fp32 then. Other arguments, results and
    errors as in `cross_entropy_reference`.
    """
    return in_chunks(fill_rows, hidden, weight, labels, weights, scale, return_token_losses, logits_bytes)


def fill_rows(logits, gradient, labels, weights, losses, nll):
    """`launch_rows` in plain PyTorch; where there is a gradient it is written over the logits."""
    z, known = logits.float(), labels != IGNORE
    lse, label = z.logsumexp(-1, keepdim=True), torch.where(known, labels, 0)[:, None]
    nll.copy_(torch.where(known, (lse - z.gather(1, label))[:, 0], 0.0))
    torch.mul(nll, weights, out=losses)
    if gradient is not None:
        p = z.sub_(lse).exp_()
        p.scatter_add_(1, label, torch.full_like(lse, -1.0)).mul_(torch.where(known, weights, 0.0)[:, None])
        gradient.copy_(p)


def multiply_reference_(x, factor):
    """`multiply_` in plain PyTorch; on the CPU the factor can be looked at."""
    return x if x.device.type == "cpu" and factor == 1 else x.mul_(factor)


def check_arguments(logits: Tensor, labels: Tensor, weights: Tensor) -> None:
    """Raise ValueError, naming the argument, unless shapes, dtypes and values fit together."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or weights.shape != labels.shape:
        shapes = ", ".join(str(list(x.shape)) for x in (logits, labels, weights))
        raise ValueError(f"cross_entropy: logits, labels and weights must be (T, V), (T,) and (T,), got {shapes}")
    if not logits.is_floating_point() or labels.dtype != torch.int64:
        raise ValueError(f"cross_entropy: logits must be float and labels int64, got {logits.dtype}, {labels.dtype}")
    if weights.requires_grad:
        raise ValueError("cross_entropy: weights get no gradient and must not require one")
    V = logits.shape[1]
    if labels.device.type == "cpu":  # reading values from a GPU would make the host wait
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= V))]
        if len(wrong):
            raise ValueError(f"cross_entropy: labels must be in [0, {V}) or {IGNORE}, got {int(wrong[0])}")


# ---- Triton ---------------------------------------------------------------------------------------------------------
#
# With p = softmax(z) and y the label,  d loss_t / d z_v = w_t (p_v - [v = y]).  At v = y a confident row has p near 1,
# and what is left of p - 1 is formed here, in fp32, before it is rounded to the dtype of the logits.


@triton.jit
def load_logits(ptr, columns, V):
    return tl.load(ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)


@triton.jit
def cross_entropy_row_kernel(
    logits_ptr,
    gradient_ptr,  # may be logits_ptr: a thread writes what it has read
    labels_ptr, weights_ptr,
    losses_ptr,  # weighted
    nll_ptr,  # unweighted
    V, logits_stride, gradient_stride,
    HAS_GRADIENT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # V <= BLOCK: the row is read once
    BLOCK: tl.constexpr, IGNORED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    ignored = label == IGNORED
    weight = tl.where(ignored, 0.0, tl.load(weights_ptr + row))
    logits_ptr += row * logits_stride
    gradient_ptr += row * gradient_stride
    columns = tl.arange(0, BLOCK)

    known = (label >= 0) & (label < V)
    y = label.to(tl.int32)  # comparing in 64 bits takes more registers
    # 1. lse = log sum exp z, and z[label], which is read before the first reduction: no warp writes its gradient
    #    before all have met there.
    z_label = tl.load(logits_ptr + y, mask=known, other=float("nan")).to(tl.float32)
    if ONE_BLOCK:
        z = load_logits(logits_ptr, columns, V)
        top = tl.max(z, 0)
        total = tl.sum(tl.exp(z - top), 0)
    else:
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        for start in range(0, V, BLOCK):
            z = load_logits(logits_ptr, start + columns, V)
            higher = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
            top = higher
    lse = top + tl.log(total)

    # 2. The loss; NaN for a label that is no column.
    nll = tl.where(ignored, 0.0, lse - z_label)
    tl.store(nll_ptr + row, nll)
    tl.store(losses_ptr + row, weight * nll)

    # 3. The gradient.
    if HAS_GRADIENT:
        for start in range(0, BLOCK if ONE_BLOCK else V, BLOCK):
            here = start + columns
            if not ONE_BLOCK:
                z = load_logits(logits_ptr, here, V)
            g = tl.where(ignored, 0.0, tl.exp(z - lse) * weight - tl.where(here == y, weight, 0.0))
            tl.store(gradient_ptr + here, g.to(gradient_ptr.dtype.element_ty), mask=here < V)


@triton.jit
def cross_entropy_scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """x *= factor, which is on the device; nothing is read or written where it is 1, as in `loss.backward()`."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
        tl.store(x_ptr + i, (x * factor).to(x_ptr.dtype.element_ty), mask=i < n)


def launch_rows(logits, gradient, labels, weights, losses, nll):
    """Fill losses and nll (T,) fp32 and, unless it is None, gradient (T, V), which may be `logits` itself."""
    T, V = logits.shape
    block = min(max(triton.next_power_of_2(V), 16), max(WARPS))
    target = logits if gradient is None else gradient
    tensors, strides = (logits, target, labels, weights, losses, nll), (logits.stride(0), target.stride(0))
    flags = dict(HAS_GRADIENT=gradient is not None, ONE_BLOCK=block >= V, BLOCK=block, IGNORED=IGNORE)
    warps = next(WARPS[size] for size in WARPS if block <= size)
    launch(cross_entropy_row_kernel, (T,), *tensors, V, *strides, **flags, num_warps=warps)


def multiply_(x, factor):
    """x (contiguous) times a scalar tensor, in place, without a look at the scalar from the host."""
    block = 4096
    launch(cross_entropy_scale_kernel, (-(-x.numel() // block),), x, factor, x.numel(), BLOCK=block, num_warps=8)
    return x


class Known(torch.autograd.Function):
    """A loss, and the gradients of its inputs that are known already. multiply: scales them in place."""

    @staticmethod
    def forward(ctx, loss, gradients, multiply, *inputs):
        ctx.gradients, ctx.multiply = gradients, multiply
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError("cross_entropy: the gradient is scaled in place; a second backward needs a new forward")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *(g if g is None else ctx.multiply(g, upstream) for g in gradients)


@torch.no_grad()
def loss_in_chunks(fill, hidden, weight, labels, weights, logits_bytes):
    """(the token losses, weighted; unweighted; the gradients of hidden and, where it is wanted, of weight)"""
    T, V = len(hidden), len(weight)
    matrix, d_hidden, d_weight = weight.to(hidden.dtype), torch.empty_like(hidden), None
    losses, nll = (torch.empty(T, device=hidden.device) for _ in range(2))
    chunks = -(-T * V * hidden.element_size() // logits_bytes)
    rows = max(-(-T // max(chunks, 1)), 1)  # of each chunk but the last, which may be smaller
    for h, d_h, *of_rows in zip(*(x.split(rows) for x in (hidden, d_hidden, labels, weights, losses, nll))):
        logits = h @ matrix.T  # (rows, V)
        fill(logits, logits if hidden.requires_grad or weight.requires_grad else None, *of_rows)
        if hidden.requires_grad:  # from here on the logits are their own gradient
            torch.mm(logits, matrix, out=d_h)
        if weight.requires_grad:
            d_weight = add_product(d_weight, logits.T, h)  # (V, C)
    return losses, nll, [d_hidden, d_weight]


def add_product(total, a, b):
    """total + a @ b as fp32, never rounded to the dtype of a and b on the way; in place, where there is a total."""
    if a.dtype == torch.float32:
        return a @ b if total is None else total.addmm_(a, b)
    product = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
    return product if total is None else total.add_(product)


# ---- The public functions -------------------------------------------------------------------------------------------


def cross_entropy_triton(
    logits: Tensor, labels: Tensor, weights: Tensor, return_token_losses: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_entropy_reference` with the row kernel."""
    check_arguments(logits, labels, weights)
    (z,) = rows_together(logits.detach())
    losses, nll = (torch.empty(len(labels), device=logits.device) for _ in range(2))
    gradient = torch.empty_like(z) if logits.requires_grad else None
    launch_rows(z, gradient, labels.contiguous(), weights.float().contiguous(), losses, nll)
    loss = Known.apply(losses.sum(), [gradient], multiply_, logits)
    return (loss, nll) if return_token_losses else loss


def linear_cross_entropy_triton(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, scale: float = 1.0,
    return_token_losses: bool = False, logits_bytes: int = LOGITS_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`linear_cross_entropy_reference` with the row kernel."""
    return in_chunks(launch_rows, hidden, weight, labels, weights, scale, return_token_losses, logits_bytes)


def in_chunks(fill, hidden, weight, labels, weights, scale, return_token_losses, logits_bytes):
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)}, {list(weight.shape)}"
        raise ValueError(f"linear_cross_entropy: hidden and weight must be (T, C) and (V, C), got {shapes}")
    check_arguments(hidden[:, :1].expand(-1, len(weight)), labels, weights)
    device = "cpu" if hidden.is_meta else hidden.device.type  # on meta there are shapes alone
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        hidden = (hidden * scale).to(dtype).contiguous()
        arguments = (hidden, weight, labels.contiguous(), weights.float().contiguous(), logits_bytes)
        losses, nll, gradients = loss_in_chunks(fill, *arguments)
        multiply = multiply_ if fill is launch_rows else multiply_reference_
        loss = Known.apply(losses.sum(), gradients, multiply, hidden, weight)
    return (loss, nll) if return_token_losses else loss
