"""T5 attention over packed sequences: softmax(q k^T + bias) v.

The mathematics, for one sequence of M queries and N keys and one head:

    S = Q K^T + B,   P = softmax(S),   O = P V,      B[i, j] = table[bucket(j - i), head]

Two things set T5 apart from other transformers. There is no 1/sqrt(D): T5 folds that factor into
the initialisation of the query projection. And positions enter only through B, a learned scalar per
head and *bucket* of the distance j - i from query to key (kernels/buckets.py).

Sequences are packed, as in FlashAttention's varlen interface: q is (Tq, H, D), all sequences one
after another, and sequence b owns the rows cu_seqlens_q[b] : cu_seqlens_q[b + 1]. Keys and values
have their own cu_seqlens, so that cross-attention (other lengths, no bias) and decoding (one query,
many keys) are the same call.

The **reference** is the formula in PyTorch, on padded sequences. Tests compare with it, and CPUs
use it. The **Triton kernels** (attention_kernels.py) store no scores:

    forward    reads q, k, v; writes o and, per query, lse = log2 sum_j 2^(S log2 e)
    backward   reads those and do; writes dq, dk, dv, delta, and sums of the table's gradient;
               computes S, P and the dropout mask again

They use FlashAttention's online softmax (Milakov and Gimelshein 2018; Dao 2023) over tiles of
scores.

**Tiles.** Each sequence is cut into tiles of 16, 32 or 64 tokens. A program takes one tile of
queries (or, for dk and dv, of keys) of one head, and walks along the tiles of the other side.
`Tiles` lists the tiles of a stream, so that no program is started for nothing; it is made once a
batch. Their size depends on the mean length alone. Large tiles compute mostly padding where
sequences are short, small ones read the other side too often where they are long. NOTES.md has the
counts.

**Bias.** diag = table[bucket], (H, 2 (reach + MARGIN) + 1), holds the bias of every distance up to
`reach`, where the last bucket of each direction begins, and of a few more, so that a tile can be
read without limiting each distance.

**No wait for the device.** On a GPU the values of cu_seqlens are not checked: a sequence without
keys gives NaN, and so does M > N with causal. On the CPU both raise ValueError.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from . import launch
from .attention_kernels import (
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_forward_kernel,
)
from .buckets import near_buckets, relative_position_bucket
from .dropout import dropout_reference, seed_on, threshold_of
from .launch import INTERPRETED, check_tensors, require, triton


@dataclass(frozen=True)
class Tiles:
    """The sequences of a packed stream, cut into tiles for its queries and tiles for its keys.

    queries, keys: (number of tiles, 2) int32, on the stream's device: the sequence of each tile,
        and its first row within that sequence. A tile past the end of its sequence is skipped.
    query_rows, key_rows: tokens of a tile: 16, 32 or 64.
    """

    query_rows: int
    queries: Tensor
    key_rows: int
    keys: Tensor


def make_tiles(
    cu_seqlens: Tensor,
    total: int,
    query_rows: int | None = None,
    key_rows: int | None = None,
    exact: bool = True,
) -> Tiles:
    """The `Tiles` of a stream of `total` tokens; by default as large as its mean length suggests.

    cu_seqlens: (B + 1,) int32. Where it lies on a GPU the host does not wait for its values. The
    lists are then as long as they can become, at most B tiles too long. On the CPU they are exact,
    or as long if not `exact`: their length then depends on B and `total` alone.
    """
    mean = total / (len(cu_seqlens) - 1)
    long = mean >= 128 or INTERPRETED  # the interpreter takes as long for a small tile
    if query_rows is None:
        query_rows = 64 if long else 16
    if key_rows is None:
        key_rows = 64 if long else 32 if mean >= 32 else 16
    queries = cut(cu_seqlens, total, query_rows, exact)
    keys = cut(cu_seqlens, total, key_rows, exact)
    return Tiles(query_rows, queries, key_rows, keys)


def cut(cu_seqlens: Tensor, total: int, rows: int, exact: bool) -> Tensor:
    """(tiles, 2) int32. A sequence has length / rows tiles, rounded up."""
    sequences = len(cu_seqlens) - 1
    counts = (cu_seqlens.diff() + rows - 1) // rows
    ends = counts.cumsum(0)
    tile = torch.arange(total // rows + sequences, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tile, right=True).clamp(max=sequences - 1)
    first_row = (tile - (ends - counts)[sequence]) * rows
    tiles = torch.stack([sequence, first_row], 1).int()
    if exact and cu_seqlens.device.type == "cpu":
        tiles = tiles[: int(ends[-1])]
    return tiles


def bias_by_distance(table: Tensor, causal: bool, max_distance: int = 128) -> Tensor:
    """The argument `diag` of `attention`: layers that share a table can share it.

    table: (num_buckets, H). Returns (H, distances) fp32. No gradient flows through it; that of the
    table comes from `attention` itself.
    """
    _, lut = near_buckets(len(table), max_distance, not causal, table.device)
    return table.detach().float().T.index_select(1, lut)


def attention_reference(
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
    """Attention within each packed sequence, with T5's relative position bias.

    q: (Tq, H, D); k, v: (Tk, H, D); one float dtype. The products have that dtype; bias and softmax
        are fp32.
    table: (num_buckets, H), the bias of each bucket, or None for no bias (cross-attention).
    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where sequences begin. Every sequence needs a query
        and a key.
    causal: the table is one-directional, and the queries are the *last* M of the N positions
        (FlashAttention's convention): query i sees the keys j <= i + N - M. So a decoding step is
        M = 1, and M > N is refused.
    dropout_p: of the attention weights. seed: of that dropout; None draws one from torch's
        generator. A (1,) int64 tensor on q's device is read when the kernels run, so that a CUDA
        graph may change it between replays.
    max_distance: T5's relative_attention_max_distance.
    max_seqlen_q, max_seqlen_k: the longest sequence. Not needed, and ignored.
    tiles_q, tiles_k: `make_tiles` of the two streams, made once a batch and shared by all layers.
    diag: `bias_by_distance` of the table, made once for all layers that share the table.
        The Triton kernels make these three where they are None; the reference ignores them.

    Returns (Tq, H, D) in q's dtype. Raises ValueError for shapes that do not fit together.
    """
    check_arguments(q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal)
    len_q = cu_seqlens_q.diff()[:, None]  # (B, 1)
    len_k = cu_seqlens_k.diff()[:, None]
    i = torch.arange(int(len_q.max()), device=q.device)  # (M,)
    j = torch.arange(int(len_k.max()), device=q.device)  # (N,)
    is_query = i < len_q  # (B, M)
    is_key = j < len_k  # (B, N)
    place_q = is_query.flatten().nonzero()[:, 0]  # (Tq,): where each is among B * M
    place_k = is_key.flatten().nonzero()[:, 0]

    products = pad(q, place_q, is_query.shape) @ pad(k, place_k, is_key.shape).mT
    scores = products.float()  # (H, B, M, N)
    distance = (j - i[:, None])[None]  # (1, M, N)
    if causal and cu_seqlens_q is not cu_seqlens_k:
        distance = distance - (len_k - len_q)[:, None]  # (B, M, N): queries are the last positions
    if table is not None:
        bucket = relative_position_bucket(distance, len(table), max_distance, not causal)
        scores += F.embedding(bucket, table.float()).movedim(-1, 0)
    hidden = ~is_key[:, None]  # (B, 1, N)
    if causal:
        hidden = hidden | (distance > 0)
    scores += torch.where(hidden, float("-inf"), 0.0)
    weights = dropout_reference(scores.softmax(-1), dropout_p, seed)
    outputs = weights.to(v.dtype) @ pad(v, place_k, is_key.shape)  # (H, B, M, D)
    return outputs.flatten(1, 2).index_select(1, place_q).transpose(0, 1).contiguous()


def pad(x: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
    """(T, H, D) packed -> (H, B, N, D), 0 where no token is. shape: (B, N); place: (T,), where each
    token goes among B * N."""
    B, N = shape
    padded = x.new_zeros(x.shape[1], B * N, x.shape[2])
    return padded.index_copy_(1, place, x.transpose(0, 1)).unflatten(1, shape)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
) -> None:
    """Raise ValueError and name what does not fit. Values are read on the CPU only."""
    shapes = q.dim() == k.dim() == 3 and q.shape[1:] == k.shape[1:] and v.shape == k.shape
    text = "attention: q, k and v must be (Tq, H, D), (Tk, H, D) and (Tk, H, D), of one float dtype"
    require(shapes and q.dtype == k.dtype == v.dtype and q.is_floating_point(), text, q, k, v)
    if table is not None:
        one_a_head = table.dim() == 2 and table.shape[1] == q.shape[1]
        require(one_a_head, "attention: table must be (num_buckets, H)", table, q)
    lengths = []
    for name, cu_seqlens, x in (("q", cu_seqlens_q, q), ("k", cu_seqlens_k, k)):
        fits = cu_seqlens.shape == cu_seqlens_q.shape and cu_seqlens.dtype == torch.int32
        require(fits, f"attention: cu_seqlens_{name} must be (B + 1,) int32", cu_seqlens)
        if cu_seqlens.device.type == "cpu":  # on a GPU reading the values would stall the queue
            starts = cu_seqlens.tolist()
            fits = starts[0] == 0 and starts[-1] == len(x)
            require(fits, f"attention: cu_seqlens_{name} must run from 0 to {len(x)}", cu_seqlens)
            lengths.append([end - start for start, end in pairwise(starts)])
            require(min(lengths[-1]) > 0, "attention: a sequence is empty", cu_seqlens)
    if causal and len(lengths) == 2:
        fits = all(queries <= keys for queries, keys in zip(*lengths))
        require(fits, "attention: causal: a sequence has more queries than keys", q, k)


# ---- Triton --------------------------------------------------------------------------------------

HEAD_WIDTHS = (16, 32, 64, 128)


@dataclass
class Call:
    """What forward and backward of one call share, beside q, k and v."""

    causal: bool
    threshold: int  # of dropout, in 1/256
    seed: Tensor | None  # None without dropout
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    tiles_q: Tiles
    tiles_k: Tiles
    diag: Tensor | None  # None without a bias
    num_buckets: int = 0
    reach: int = 0
    lut: Tensor | None = None  # the bucket of each distance that `diag` holds


# Tokens of the other side that a kernel for long sequences takes at a time, where 64 would not fit
# into the registers: causal. Half as many for wide heads, for fp32 and on sm_80. Found by
# `python -m kernels.compile`.
LONG_STEPS = {attention_forward_kernel: 64, attention_dq_kernel: 32, attention_dkdv_kernel: 32}


def launch_kernel(
    kernel: Callable, call: Call, of_keys: bool, tensors: list[Tensor | None], **flags: int
) -> None:
    """Run a kernel with a program for each head and tile of queries, or of keys.

    tensors: what the kernel takes up to `tiles_ptr`; the first is q.
    """
    q = tensors[0]
    Tq, H, D = q.shape
    rows = call.tiles_q.query_rows
    step = call.tiles_k.key_rows
    tiles = call.tiles_q.queries
    if of_keys:
        rows, step = step, rows
        tiles = call.tiles_k.keys
    fp32 = q.dtype == torch.float32
    warps = rows // 16
    num_stages = 1
    wide = D > 64
    long = rows == step == 64
    if long and not INTERPRETED:
        wide = wide or fp32 or launch.architecture(q.device) == "sm_80"
        num_stages = launch.stages(q.device)
        if wide or call.causal:
            step = LONG_STEPS[kernel]
    if wide:
        step = max(step // 2, 16)
    if fp32:
        warps *= 2 if D <= 64 else 4
    if of_keys and D > 64:
        warps = max(warps, 2)  # dk and dv of 16 keys do not fit into the registers of one
    size = dict(BM=step, BN=rows) if of_keys else dict(BM=rows, BN=step)
    flags |= dict(CAUSAL=call.causal, DROPOUT=call.threshold > 0, LONG=long, D=D)
    flags |= dict(num_warps=warps, num_stages=num_stages, **size)
    numbers = [Tq, H, call.reach, call.threshold]
    where = [tiles, call.cu_seqlens_q, call.cu_seqlens_k, call.seed]
    launch.launch(kernel, (len(tiles), H), *tensors, *where, *numbers, **flags)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, call: Call
    ) -> Tensor:
        o = torch.empty_like(q)
        lse = torch.empty(q.shape[1], q.shape[0], device=q.device)
        launch_kernel(attention_forward_kernel, call, False, [q, k, v, call.diag, o, lse])
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.call = call
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        call = ctx.call
        do = do.contiguous()
        dq = torch.empty_like(q)
        dk = torch.empty_like(k)
        dv = torch.empty_like(v)
        delta = torch.empty_like(lse)
        buckets = 0
        partial = None
        if ctx.needs_input_grad[3]:
            buckets = max(triton.next_power_of_2(call.num_buckets), 16)  # a product needs 16
            partial = torch.empty(len(call.tiles_q.queries), q.shape[1], buckets, device=q.device)
        tensors = [q, k, v, call.diag, call.lut, o, do, dq, lse, delta, partial]
        launch_kernel(attention_dq_kernel, call, False, tensors, BUCKETS=buckets)
        tensors = [q, k, v, call.diag, do, dk, dv, lse, delta]
        launch_kernel(attention_dkdv_kernel, call, True, tensors)
        d_table = None if partial is None else partial.sum(0).T[: call.num_buckets]
        return dq, dk, dv, d_table, None


def attention_triton(
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
    """`attention_reference` by the Triton kernels. dropout_p is rounded to a multiple of 1/256.

    q, k, v: fp32, fp16 or bf16; D of 16, 32, 64 or 128; copied where they are not contiguous.
    """
    check_arguments(q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal)
    require(q.shape[2] in HEAD_WIDTHS, "attention: Triton takes D of 16, 32, 64 or 128", q)
    check_tensors("attention", q, k, v, table, cu_seqlens_q, cu_seqlens_k)
    tiles_q = tiles_q or make_tiles(cu_seqlens_q, len(q))
    tiles_k = tiles_k or make_tiles(cu_seqlens_k, len(k))
    threshold = threshold_of(dropout_p)
    seed = seed_on(q.device, seed) if threshold > 0 else None
    call = Call(causal, threshold, seed, cu_seqlens_q, cu_seqlens_k, tiles_q, tiles_k, diag)
    if table is not None:
        call.num_buckets = len(table)
        call.reach, call.lut = near_buckets(len(table), max_distance, not causal, q.device)
        if diag is None:
            call.diag = bias_by_distance(table, causal, max_distance)
    return Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), table, call)
