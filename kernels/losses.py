"""Cross-entropy with a weight for each token, of given logits or straight from hidden states.

    loss = sum_t  w_t * ( logsumexp(z_t) - z_t[label_t] ),        z_t = scale * W h_t

The weights carry the method: 1 / N_label on the tokens of label targets and lambda / N_rationale
on those of rationales make one weighted sum of  L_label + lambda * L_rationale,  so both tasks
are one pass over one stream. A token whose label is -100, or whose weight is 0, adds nothing to
the loss and nothing to any gradient.

**Rows.** One program computes one row in fp32. Up to V = 32768 the row stays in registers between
the sum and the gradient: the logits are read once and the gradient is written once. Longer rows
(mT5 has V = 250112) are read twice.

**Linear.** T x V logits would be the largest tensor of the model. The Triton version takes the
tokens in chunks: one matrix product makes a chunk's logits (LOGITS_BYTES of them), the row kernel
turns them into their gradient in place, and two more products give d(hidden) and a summand of
d(weight). Each chunk reads and writes all of d(weight), so small chunks are expensive. d(weight)
is summed in fp32 whatever the dtype of the inputs: sums of bfloat16 over 32 chunks are off by
7e-3.

**The gradient is computed in the forward pass**, while the logits are at hand, for an upstream
gradient of 1. The backward pass multiplies it by the real one.

Labels outside [0, V) other than -100 are refused. On a GPU reading them would make the host wait,
so there they give a loss of NaN.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launch
from .launch import autocast_dtype, check_tensors, require, tl, triton

IGNORE = -100  # the label of a token that is not a target, as everywhere in PyTorch
LOGITS_BYTES = 256 * 2**20  # of one chunk: about 4k tokens of T5's vocabulary in bfloat16
MAX_BLOCK = 32768  # the longest row that stays in registers


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, weights: Tensor, return_token_losses: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """sum_t weights[t] * -log softmax(logits[t])[labels[t]], computed in fp32.

    logits: (T, V), any float dtype. labels: (T,) int64 in [0, V), or -100 for "ignored".
    weights: (T,) fp32; they get no gradient.
    Returns a scalar fp32 tensor and, if asked, also the (T,) unweighted losses in nats, detached, 0
    where ignored. Raises ValueError for arguments that do not fit together.
    """
    check_arguments(logits.shape, labels, weights)
    nll = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    loss = (nll * weights).sum()
    return (loss, nll.detach()) if return_token_losses else loss


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    scale: float = 1.0,
    return_token_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_entropy_reference` of the logits scale * hidden @ weight^T.

    hidden: (T, C); weight: (V, C), also fp32 beside hidden in half precision. scale: d_model**-0.5
    where T5 ties the output matrix to the embedding, else 1. The product is in hidden's dtype or,
    under autocast, in autocast's. Other arguments, results and errors as in
    `cross_entropy_reference`.
    """
    check_linear_arguments(hidden, weight, labels, weights)
    logits = F.linear(hidden * scale, weight.to(hidden.dtype))
    return cross_entropy_reference(logits, labels, weights, return_token_losses)


def check_arguments(shape: torch.Size, labels: Tensor, weights: Tensor) -> None:
    """Raise ValueError, naming the argument, unless logits of this shape fit the rest."""
    fits = len(shape) == 2 and labels.shape == weights.shape == shape[:1]
    text = (
        f"cross_entropy: for logits {list(shape)}, labels and weights must be (T,), int64 and fp32"
    )
    require(fits and labels.dtype == torch.int64, text, labels, weights)
    require(not weights.requires_grad, "cross_entropy: weights get no gradient", weights)
    if labels.device.type == "cpu":  # reading values from a GPU would make the host wait
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= shape[1]))].tolist()
        text = f"cross_entropy: labels must be in [0, {shape[1]}) or {IGNORE}, not {wrong[:1]}"
        require(not wrong, text, labels)


def check_linear_arguments(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> None:
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    text = "linear_cross_entropy: hidden and weight must be (T, C) and (V, C)"
    require(fits, text, hidden, weight)
    check_arguments(torch.Size([len(hidden), len(weight)]), labels, weights)


# ---- Triton -------------------------------------------------------------------------------------
#
# With p = softmax(z) and y the label,  d loss_t / d z_v = w_t (p_v - [v = y]).  At v = y a
# confident row has p near 1, and what is left of p - 1 is formed here, in fp32, before it is
# rounded to the dtype of the logits.


# ruff: disable[ANN001, ANN201]
@triton.jit
def load_logits(ptr, columns, V):
    return tl.load(ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)


@triton.jit
def cross_entropy_row_kernel(
    logits_ptr,
    gradient_ptr,  # None, or logits_ptr itself: a thread writes what it has read
    labels_ptr,
    weights_ptr,
    nll_ptr,  # -log softmax(z)[label]
    V,
    ONE_BLOCK: tl.constexpr,  # V <= BLOCK: the row is read once
    BLOCK: tl.constexpr,
    IGNORED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    ignored = label == IGNORED
    weight = tl.where(ignored, 0.0, tl.load(weights_ptr + row))
    logits_ptr += row * V
    columns = tl.arange(0, BLOCK)
    known = (label >= 0) & (label < V)
    y = label.to(tl.int32)  # comparing in 64 bits takes more registers

    # 1. lse = log sum exp z, and z[label], which is read before the first reduction: no warp writes
    #    its gradient before all have met there.
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
    tl.store(nll_ptr + row, tl.where(ignored, 0.0, lse - z_label))

    # 3. The gradient.
    if gradient_ptr is not None:
        gradient_ptr += row * V
        for start in range(0, BLOCK if ONE_BLOCK else V, BLOCK):
            here = start + columns
            if not ONE_BLOCK:
                z = load_logits(logits_ptr, here, V)
            of_label = tl.where(here == y, weight, 0.0)
            g = tl.where(ignored, 0.0, tl.exp(z - lse) * weight - of_label)
            tl.store(gradient_ptr + here, g, mask=here < V)


# ruff: enable[ANN001, ANN201]


def launch_rows(
    logits: Tensor, gradient: Tensor | None, labels: Tensor, weights: Tensor, nll: Tensor
) -> None:
    """Fill nll, (T,) fp32, and gradient, (T, V), which may be `logits` itself."""
    T, V = logits.shape
    block = min(max(triton.next_power_of_2(V), 16), MAX_BLOCK)
    # The longest row takes 64 fp32 values a thread. With 32 warps it would take 32, but a thread
    # then has only 64 registers, and 4 to 30 values spill.
    options = dict(ONE_BLOCK=block >= V, BLOCK=block, IGNORED=IGNORE)
    options["num_warps"] = min(max(block // 1024, 4), 16)
    tensors = (logits, gradient, labels.contiguous(), weights.contiguous(), nll)
    launch.launch(cross_entropy_row_kernel, (T,), *tensors, V, **options)


class PrecomputedGradient(torch.autograd.Function):
    """A loss, and the gradients of its inputs, which are known up to the upstream factor."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd converts the products to the dtypes of the inputs.
        results = [None if x is None else x * upstream for x in ctx.saved_tensors]
        return None, None, *results


def cross_entropy_triton(
    logits: Tensor, labels: Tensor, weights: Tensor, return_token_losses: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_entropy_reference` with the row kernel."""
    check_arguments(logits.shape, labels, weights)
    check_tensors("cross_entropy", logits, labels, weights)
    z = logits.detach().contiguous()
    weights = weights.float()
    nll = torch.empty_like(weights)
    gradient = None
    if logits.requires_grad and torch.is_grad_enabled():
        # In fp16 small entries would be lost before a loss scaler's factor reaches them.
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    launch_rows(z, gradient, labels, weights, nll)
    loss = PrecomputedGradient.apply((nll * weights).sum(), [gradient], logits)
    return (loss, nll) if return_token_losses else loss


def linear_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    scale: float = 1.0,
    return_token_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_cross_entropy_reference`, chunk by chunk, with the row kernel.

    Raises ValueError in fp16 where a gradient is wanted: entries below 6e-8 would be lost before
    the factor of a loss scaler reaches them, and w_t / V is that small.
    """
    check_linear_arguments(hidden, weight, labels, weights)
    check_tensors("linear_cross_entropy", hidden, weight, labels, weights)
    if not torch.is_grad_enabled():
        weight = weight.detach()
    dtype = autocast_dtype(hidden.device) or hidden.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        states = (hidden * scale).to(dtype)
        if dtype == torch.float16 and (states.requires_grad or weight.requires_grad):
            raise ValueError("linear_cross_entropy: float16 loses small gradients; use bfloat16")
        weights = weights.float()
        nll = torch.empty_like(weights)
        gradients = fill_chunks(states, weight, labels, weights, nll)
        loss = PrecomputedGradient.apply((nll * weights).sum(), gradients, states, weight)
    return (loss, nll) if return_token_losses else loss


@torch.no_grad()
def fill_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, nll: Tensor
) -> list[Tensor | None]:
    """Fill nll. The gradients of hidden, and of weight in fp32, unless neither requires one."""
    T = len(hidden)
    matrix = weight.to(hidden.dtype)
    wanted = hidden.requires_grad or weight.requires_grad
    d_hidden = torch.empty_like(hidden) if wanted else None
    d_weight = None
    row_bytes = len(weight) * hidden.element_size()
    rows = max(LOGITS_BYTES // (16 * row_bytes), 1) * 16  # one compilation serves multiples of 16
    for start in range(0, max(T, 1), rows):
        chunk = slice(start, start + rows)
        logits = hidden[chunk] @ matrix.T  # (rows, V)
        gradient = logits if wanted else None  # in place
        launch_rows(logits, gradient, labels[chunk], weights[chunk], nll[chunk])
        if wanted:
            torch.mm(gradient, matrix, out=d_hidden[chunk])
            summand = multiply_in_fp32(gradient.T, hidden[chunk])
            d_weight = summand if d_weight is None else d_weight.add_(summand)
    return [d_hidden, d_weight]


def multiply_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, not rounded to the dtype of a and b."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
