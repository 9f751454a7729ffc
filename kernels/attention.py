"""T5 attention over packed sequences: softmax(q k^T + bias) v.

The mathematics, for one sequence of M queries and N keys and one head:

    S = Q K^T + B,   P = softmax(S),   O = P V,      B[i, j] = table[bucket(j - i), head]

Two things set T5 apart from other transformers. There is no 1/sqrt(D): T5 folds that factor into the initialisation
of the query projection. And positions enter only through B, a learned scalar per head and *bucket* of the distance
j - i from query to key (kernels/buckets.py).

Sequences are packed, as in FlashAttention's varlen interface: q is (Tq, H, D), all sequences one after another,
and sequence b owns the rows cu_seqlens_q[b] : cu_seqlens_q[b + 1]. Keys and values have their own cu_seqlens, so
cross-attention (other lengths, no bias) and decoding (one query, many keys) are the same call.

The **reference** is plain PyTorch, the oracle of every test and the path the CPU takes. It pads inside, so it needs
memory for B x H x M x N scores.

The **Triton kernels** keep nothing of size M x N in device memory, neither scores, bias nor mask. What they hold:

    forward    reads q, k, v; writes o and, per query, lse = log2 sum_j 2^(S log2 e)       2 T H D + T H numbers
    backward   reads those and do; writes dq, dk, dv, delta (T, H), and the partial sums of the table's gradient
    recomputed in backward: S, P from S and lse, the dropout mask from its seed

FlashAttention's online softmax (Milakov and Gimelshein 2018; Dao 2023) runs over tiles of BM queries and BN keys. One
program owns one tile of queries (or, for dk and dv, of keys) of one sequence and head, and walks along the other side.

**Bias.** diag = table[bucket], (H, 2 reach + 1), holds the bias of every distance up to `reach`, where the last bucket
of each direction begins. A tile whose distances are all beyond adds one number to all its scores ("plain"). The others,
a band along the diagonal of about 2 reach + BM keys a query tile, look each distance up ("edge"); so do tiles that need
a mask. Plain tiles and edge tiles have a loop each: a branch inside one loop would put both bodies into it.

**Determinism.** No atomics: every number is written by one program, which adds in a fixed order. Two runs are equal bit
for bit, on one device with one configuration.

**Dropout** (kernels/dropout.py): an element's mask depends on the query's place in the stream, the head, the key's
place in its sequence and the seed; forward and both backward kernels make the same mask in different tiles.

**No sync.** The grid is laid out for max_seqlen_q and max_seqlen_k, integers of the host; programs past the end of a
sequence return at once. Where they are not given the device is asked for them.

Limits: D of 16, 32, 64 or 128; fp32, fp16, bf16. Refused: all else, and empty sequences where the host can see them (on
CPU tensors). On a GPU cu_seqlens are not looked at: an empty key side gives NaN, as does M > N with causal.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from .buckets import near_buckets, relative_position_bucket
from .dropout import dropout_mask, kept, threshold_of
from .launch import INTERPRETED, architecture, launch, next_power_of_2, tl, triton

CHANGING = ["tiles", "Tq", "reach", "seed", "threshold"]  # from call to call: no reason to compile anew for a 1 or a 16
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x log2 e): the hardware has a power of two only

# {(kernel, bytes per number): {D: (BM, BN, num_warps, num_stages)}}, found with `python -m kernels.aot`: large
# tiles that neither spill nor exceed shared memory. Wider heads take smaller ones, and so does fp32, whose products do
# without tensor cores to keep its digits. dq needs BM <= BN (see the backward pass); decoding has one query a sequence,
# and 16 is the least a product takes.
CONFIGURATIONS = {
    "sm_90": {
        ("forward", 2): {32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (128, 32, 8, 2)},
        ("decode", 2): {32: (16, 128, 4, 2), 64: (16, 128, 4, 2), 128: (16, 64, 4, 2)},
        ("dq", 2): {32: (64, 64, 8, 2), 64: (64, 64, 8, 2), 128: (64, 64, 8, 2)},
        ("dkdv", 2): {32: (64, 64, 8, 2), 64: (64, 64, 8, 2), 128: (32, 64, 8, 2)},
        ("forward", 4): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (16, 32, 8, 2)},
        ("decode", 4): {32: (16, 32, 4, 2), 64: (16, 32, 4, 2), 128: (16, 32, 4, 2)},
        ("dq", 4): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (16, 32, 8, 2)},
        ("dkdv", 4): {32: (32, 32, 8, 2), 64: (32, 32, 8, 2), 128: (16, 32, 8, 2)},
    },
    "sm_80": {
        ("forward", 2): {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 32, 4, 2)},
        ("decode", 2): {32: (16, 128, 4, 2), 64: (16, 64, 4, 2), 128: (16, 64, 4, 2)},
        ("dq", 2): {32: (32, 64, 4, 2), 64: (32, 64, 8, 2), 128: (32, 32, 4, 2)},
        ("dkdv", 2): {32: (32, 64, 4, 2), 64: (32, 32, 4, 2), 128: (32, 64, 8, 2)},
        ("forward", 4): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 8, 2)},
        ("decode", 4): {32: (16, 32, 4, 2), 64: (16, 32, 4, 2), 128: (16, 32, 4, 2)},
        ("dq", 4): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (16, 32, 8, 2)},
        ("dkdv", 4): {32: (32, 32, 8, 2), 64: (32, 32, 8, 2), 128: (16, 32, 8, 2)},
    },
    "gfx942": {
        ("forward", 2): {32: (128, 64, 4, 2), 64: (128, 64, 4, 2), 128: (64, 32, 4, 2)},
        ("decode", 2): {32: (16, 64, 4, 2), 64: (16, 64, 4, 2), 128: (16, 32, 4, 2)},
        ("dq", 2): {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (32, 32, 4, 2)},
        ("dkdv", 2): {32: (32, 64, 4, 2), 64: (32, 64, 4, 2), 128: (32, 32, 4, 2)},
        ("forward", 4): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 4, 1)},
        ("decode", 4): {32: (16, 32, 4, 2), 64: (16, 32, 4, 2), 128: (16, 16, 4, 1)},
        ("dq", 4): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (16, 16, 4, 1)},
        ("dkdv", 4): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (16, 16, 4, 1)},
    },
    "interpreter": {
        (kernel, size): dict.fromkeys((32, 64, 128), (16 if kernel == "decode" else 128, 128, 1, 1))
        for kernel in ("forward", "decode", "dq", "dkdv")
        for size in (2, 4)
    },
}


# ---- Reference ------------------------------------------------------------------------------------------------------


def attention_reference(
    q,
    k,
    v,
    table,
    cu_seqlens_q,
    cu_seqlens_k,
    causal=False,
    dropout_p=0.0,
    seed=0,
    max_distance=128,
    max_seqlen_q=None,
    max_seqlen_k=None,
):
    """Attention within each packed sequence, with T5's relative position bias, in plain PyTorch.

    q: (Tq, H, D); k, v: (Tk, H, D); any float dtype. The products have that dtype, bias and softmax are fp32.
    table: (num_buckets, H), the bias of each bucket, or None for no bias (cross-attention).
    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where sequences begin; every sequence needs a query and a key.
    causal: the table is one-directional, and queries are the *last* M of the N positions (FlashAttention's
        convention): query i sees keys j <= i + N - M. So a decoding step is M = 1, and M > N is refused.
    dropout_p, seed: dropout on the attention weights; the mask depends on `seed` alone, not on the global generator.
    max_distance: T5's relative_attention_max_distance.
    max_seqlen_q, max_seqlen_k: the longest sequence, as a host integer; without it the device is asked.

    Returns (Tq, H, D) in q's dtype. Raises ValueError for shapes that do not fit together.
    """
    check_arguments(q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal, max_distance, max_seqlen_q, max_seqlen_k)
    B = len(cu_seqlens_q) - 1
    len_q, len_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()  # (B,)
    M = int(len_q.max()) if max_seqlen_q is None else max_seqlen_q
    N = int(len_k.max()) if max_seqlen_k is None else max_seqlen_k
    slot_q = padded_slots(cu_seqlens_q, len_q, M, q.shape[0])
    slot_k = slot_q if cu_seqlens_k is cu_seqlens_q else padded_slots(cu_seqlens_k, len_k, N, k.shape[0])
    q, k, v = pad(q, slot_q, B, M), pad(k, slot_k, B, N), pad(v, slot_k, B, N)  # (B, H, M, D), (B, H, N, D)

    scores = (q @ k.mT).float()  # (B, H, M, N); T5 does not divide by sqrt(D)
    i = torch.arange(M, device=q.device)[:, None]
    j = torch.arange(N, device=q.device)[None, :]
    if causal and cu_seqlens_k is not cu_seqlens_q:
        alike = slot_q is None and slot_k is None  # then one offset serves all sequences
        i = i + (N - M if alike else (len_k - len_q)[:, None, None])  # (B, M, 1): queries are the last positions
    if table is not None:
        bucket = relative_position_bucket(j - i, table.shape[0], max_distance, bidirectional=not causal)
        bias = F.embedding(bucket, table.float())  # (M, N, H), or (B, M, N, H) where the offset differs by sequence
        scores += bias.movedim(-1, -3)  # in place, here and below: scores are the largest tensor by far
    if slot_k is not None:
        scores.masked_fill_((j >= len_k[:, None, None])[:, None], float("-inf"))  # padding is no key
    if causal and M > 1:
        scores.masked_fill_((j > i)[..., None, :, :], float("-inf"))

    weights = scores.softmax(-1)
    if dropout_p > 0:
        weights = weights * dropout_mask(weights.shape, dropout_p, seed, weights.device)
    return unpad((weights.to(v.dtype) @ v), slot_q)


def check_arguments(
    q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal, max_distance=128, max_seqlen_q=None, max_seqlen_k=None
):
    """Raise ValueError, naming the argument, unless shapes, dtypes and devices fit together."""
    if q.dim() != 3 or k.dim() != 3 or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"attention: q and k must be (Tq, H, D) and (Tk, H, D), got {list(q.shape)}, {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"attention: v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"attention: q, k and v must share one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if table is not None and (table.dim() != 2 or table.shape[1] != q.shape[1]):
        raise ValueError(f"attention: table must be (num_buckets, {q.shape[1]}), got {list(table.shape)}")
    if max_distance < 1:
        raise ValueError(f"attention: max_distance must be at least 1, got {max_distance}")
    for name, x in (("q", q), ("k", k)):
        if len(x) == 0:
            raise ValueError(f"attention: {name} has no tokens; give at least one")
    for name, cu, total in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, len(k))):
        if cu.dim() != 1 or cu.dtype != torch.int32 or len(cu) != len(cu_seqlens_q) or len(cu) < 2:
            raise ValueError(f"attention: {name} must be (B + 1,) int32, got {list(cu.shape)} {cu.dtype}")
        if cu.device.type == "cpu":  # on a GPU reading the values would stall the queue
            starts = cu.tolist()
            if starts[0] != 0 or starts[-1] != total:
                raise ValueError(f"attention: {name} must run from 0 to {total}, got {starts[0]} to {starts[-1]}")
            lengths = [end - start for start, end in pairwise(starts)]
            if min(lengths) < 1:
                raise ValueError(f"attention: {name} holds an empty sequence; each needs at least one token")
            given = max_seqlen_q if cu is cu_seqlens_q else max_seqlen_k
            if given is not None and given < max(lengths):
                raise ValueError(f"attention: max_seqlen_{name[-1]} must be at least {max(lengths)}, got {given}")
    if causal and cu_seqlens_k is not cu_seqlens_q and cu_seqlens_q.device.type == "cpu":
        more = (cu_seqlens_q.diff() > cu_seqlens_k.diff()).nonzero()
        if len(more):
            raise ValueError(
                "attention: causal queries are the last of the positions, so no sequence may have more than keys, "
                f"but sequence {int(more[0])} has"
            )


def padded_slots(cu_seqlens, lengths, longest, total):
    """(T,) where each packed token lies in a (B * longest) padded array; None where there is no padding to add."""
    B = len(lengths)
    if B * longest == total:  # all equally long: packed is padded
        return None
    shift = torch.arange(B, device=cu_seqlens.device) * longest - cu_seqlens[:-1]
    return torch.arange(total, device=cu_seqlens.device) + shift.repeat_interleave(lengths, output_size=total)


def pad(x, slot, B, longest):
    """(T, H, D) packed -> (B, H, longest, D), zeros where a sequence has ended."""
    if slot is not None:
        x = x.new_zeros(B * longest, *x.shape[1:]).index_copy(0, slot, x)
    return x.unflatten(0, (B, longest)).transpose(1, 2)


def unpad(x, slot):
    """(B, H, longest, D) -> (T, H, D) packed."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if slot is None else x.index_select(0, slot)


# ---- Triton, shared by forward and backward -------------------------------------------------------------------------
#
# Positions: query i of a sequence has position p = i + shift, key j position j; shift is N - M where causal, else 0.
# A tile of queries [p0, p0 + BM) and keys [j0, j0 + BN) has distances j - p from j0 - p0 - BM + 1 to j0 + BN - 1 - p0.


@triton.jit
def key_tiles(p0, N, reach, CAUSAL: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Which key tiles the queries from p0 on see: (left, right, first_right, edge).

    Plain tiles, whole, visible and of one bias: the first `left`, and `right` more from first_right on. The `edge`
    other ones lie between them and, where BN does not divide N, at the end.
    """
    whole = N // BN
    left, first_right, visible = whole, whole, N
    if BIAS or CAUSAL:
        left = tl.minimum(tl.maximum(p0 - reach + 1, 0) // BN, whole)
    if BIAS and not CAUSAL:
        first_right = tl.minimum((p0 + BM - 1 + reach + BN - 1) // BN, whole)
    if CAUSAL:
        visible = tl.minimum(N, p0 + BM)
    right = whole - first_right
    return left, right, first_right, (visible + BN - 1) // BN - left - right


@triton.jit
def query_tiles(j0, M, shift, reach, CAUSAL: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Which query tiles see the keys from j0 on: (early, first, late, end). Plain tiles are 0 .. early - 1 and
    late .. end - 1, edge tiles first .. late - 1. A tile that runs past M may be plain: its missing rows have P = 0."""
    end = (M + BM - 1) // BM
    early, first, late = end, end, end
    if BIAS or CAUSAL:
        late = tl.minimum((tl.maximum(j0 + BN - 1 + reach - shift, 0) + BM - 1) // BM, end)
        early = 0
        first = 0
    if BIAS and not CAUSAL:
        early = tl.minimum(tl.maximum(j0 - reach - shift + 1, 0) // BM, late)
        first = early
    if CAUSAL:
        first = tl.minimum(tl.maximum(j0 - shift, 0) // BM, late)
    return early, first, late, end


@triton.jit
def rows_of(ptr, rows, count, stride, D: tl.constexpr, WIDEN: tl.constexpr):
    """(len(rows), D) of a tensor whose rows are `stride` apart, 0 from row `count` on."""
    x = tl.load(ptr + rows[:, None] * stride + tl.arange(0, D)[None, :], mask=rows[:, None] < count, other=0.0)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def bias_of(diag_ptr, distance, reach):
    return tl.load(diag_ptr + tl.minimum(tl.maximum(distance, -reach), reach) + reach)


# ---- Triton, forward ------------------------------------------------------------------------------------------------
#
# Per query: m the largest score so far, l = sum 2^(s - m), acc = sum 2^(s - m) v, s the score times log2 e. A tile with
# a larger score first shrinks l and acc by 2^(old m - new m). At the end o = acc / l, lse = m + log2 l.
# Dropout acts on P behind the softmax: l sums all weights, acc the kept ones, and 1 / keep enters once, at the end.


@triton.jit
def softmax_step(s, v, acc, l, m, seed, rows, h, j0, threshold, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    higher = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(m - higher)
    l = l * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(seed, rows, h, j0, threshold, s.shape[1]), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, l, higher


@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    diag_ptr,
    o_ptr,  # (Tq, H, D), contiguous
    lse_ptr,  # (H, Tq) fp32
    cu_q_ptr,
    cu_k_ptr,
    tiles,  # query tiles of the longest sequence
    Tq,
    H,
    q_stride,
    q_head,
    k_stride,
    k_head,
    v_stride,
    v_head,
    reach,
    seed,
    threshold,
    CAUSAL: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    i0 = tl.program_id(0) % tiles * BM
    q_start, k_start = tl.load(cu_q_ptr + b), tl.load(cu_k_ptr + b)
    M, N = tl.load(cu_q_ptr + b + 1) - q_start, tl.load(cu_k_ptr + b + 1) - k_start
    if i0 >= M:
        return
    q_ptr += q_start.to(tl.int64) * q_stride + h * q_head
    k_ptr += k_start.to(tl.int64) * k_stride + h * k_head
    v_ptr += k_start.to(tl.int64) * v_stride + h * v_head
    diag_ptr += h * (2 * reach + 1)
    rows = i0 + tl.arange(0, BM)
    columns = tl.arange(0, BN)
    shift = N - M if CAUSAL else 0
    p0 = i0 + shift
    left, right, first_right, edge = key_tiles(p0, N, reach, CAUSAL, BIAS, BM, BN)

    q = rows_of(q_ptr, rows, M, q_stride, D, WIDEN)
    acc = tl.zeros([BM, D], tl.float32)
    l = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    before = tl.load(diag_ptr) * LOG2E if BIAS else 0.0
    after = tl.load(diag_ptr + 2 * reach) * LOG2E if BIAS else 0.0

    for t in range(0, left + right):  # plain tiles
        j0 = tl.where(t < left, t, t - left + first_right) * BN
        k = rows_of(k_ptr, j0 + columns, N, k_stride, D, WIDEN)
        v = rows_of(v_ptr, j0 + columns, N, v_stride, D, WIDEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * LOG2E + tl.where(t < left, before, after)
        acc, l, m = softmax_step(s, v, acc, l, m, seed, q_start + rows, h, j0, threshold, DROPOUT, PRECISION)

    for t in range(left, left + edge):
        j0 = tl.where(t < first_right, t, t + right) * BN
        k = rows_of(k_ptr, j0 + columns, N, k_stride, D, WIDEN)
        v = rows_of(v_ptr, j0 + columns, N, v_stride, D, WIDEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        distance = (j0 + columns)[None, :] - (shift + rows)[:, None]
        if BIAS:
            s += bias_of(diag_ptr, distance, reach)
        visible = (j0 + columns)[None, :] < N
        if CAUSAL:
            visible = visible & (distance <= 0)
        s = tl.where(visible, s * LOG2E, float("-inf"))
        acc, l, m = softmax_step(s, v, acc, l, m, seed, q_start + rows, h, j0, threshold, DROPOUT, PRECISION)

    if DROPOUT:
        acc *= 256.0 / (256 - threshold)
    tl.store(lse_ptr + h * Tq + q_start + rows, m + tl.log2(l), mask=rows < M)
    o_ptr += q_start.to(tl.int64) * H * D + h * D
    o = (acc / l[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + rows[:, None] * (H * D) + tl.arange(0, D)[None, :], o, mask=rows[:, None] < M)


# ---- Triton, backward -----------------------------------------------------------------------------------------------
#
# With R the dropout mask (0 or 1 / keep) and dO the gradient of O = (P o R) V, row i, keys j:
#
#     dV = (P o R)^T dO,   dP = (dO V^T) o R,   dS_ij = P_ij (dP_ij - sum_k P_ik dP_ik),   dQ = dS K,   dK = dS^T Q
#
# where the sum over k is delta_i = dO_i . O_i, for O_i = sum_k P_ik R_ik V_k. The bias enters S as it stands, so
#
#     d table[c, h] = sum of dS_ij over all i, j with bucket(j - i) = c.
#
# A plain tile is one bucket. In an edge tile the bucket is a function of j - i, so first each *diagonal* is summed. The
# tile is skewed, skewed[r, s] = dS[r, (s + r) mod BN]: the entries of column s lie on the diagonal j - i = s (from the
# top left corner of the tile) where s + r < BN, on s - BN where the column wrapped round; BM <= BN, so it wraps once.
# That makes 2 BN sums, which are added to their buckets by comparison with 0, 1, 2, ... A program writes the sums of
# its query tile, PyTorch adds those of all tiles, all in fp32. A bucket that no distance has gets exactly 0.


@triton.jit
def score_gradient(s, do, v, lse, delta, seed, rows, h, j0, threshold, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    """dS of a tile (BM, BN) from its scores s, times log2 e; 0 where s is -inf."""
    p = tl.exp2(s - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(kept(seed, rows, h, j0, threshold, s.shape[1]), dp * (256.0 / (256 - threshold)), 0.0)
    return p * (dp - delta[:, None])


@triton.jit
def add_diagonals(sums, ds, lut_ptr, corner, reach):
    """sums (1, BUCKETS) + those of an edge tile ds (BM, BN), whose top left corner has the distance `corner`."""
    BM: tl.constexpr = ds.shape[0]
    BN: tl.constexpr = ds.shape[1]
    r, s = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    skewed = tl.gather(ds, (s + r) % BN, 1)
    straight = tl.sum(tl.where(s + r < BN, skewed, 0.0), 0)  # (BN,): distances corner + s
    wrapped = tl.sum(tl.where(s + r < BN, 0.0, skewed), 0)  # corner + s - BN
    distance = corner + tl.arange(0, BN)
    bucket = tl.arange(0, sums.shape[1])[None, :]
    here = tl.where(bias_of(lut_ptr, distance, reach)[:, None] == bucket, straight[:, None], 0.0)
    here += tl.where(bias_of(lut_ptr, distance - BN, reach)[:, None] == bucket, wrapped[:, None], 0.0)
    return sums + tl.sum(here, 0)[None, :]


@triton.jit(do_not_specialize=CHANGING)
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    diag_ptr,
    lut_ptr,  # (2 reach + 1,) int32, the bucket of each distance
    o_ptr,
    do_ptr,
    dq_ptr,  # o, do, dq: (Tq, H, D), contiguous
    lse_ptr,
    delta_ptr,  # (H, Tq) fp32, written here for dkdv_kernel
    partial_ptr,  # (slots, H, BUCKETS) fp32; a query tile has the slot  its sequence's first token // BM + b + tile
    cu_q_ptr,
    cu_k_ptr,
    tiles,
    Tq,
    H,
    q_stride,
    q_head,
    k_stride,
    k_head,
    v_stride,
    v_head,
    reach,
    seed,
    threshold,
    CAUSAL: tl.constexpr,
    BIAS: tl.constexpr,
    TABLE_GRADIENT: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BUCKETS: tl.constexpr,  # a power of two
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    i0 = tl.program_id(0) % tiles * BM
    q_start, k_start = tl.load(cu_q_ptr + b), tl.load(cu_k_ptr + b)
    M, N = tl.load(cu_q_ptr + b + 1) - q_start, tl.load(cu_k_ptr + b + 1) - k_start
    if i0 >= M:
        return
    q_ptr += q_start.to(tl.int64) * q_stride + h * q_head
    k_ptr += k_start.to(tl.int64) * k_stride + h * k_head
    v_ptr += k_start.to(tl.int64) * v_stride + h * v_head
    here = q_start.to(tl.int64) * H * D + h * D
    diag_ptr += h * (2 * reach + 1)
    rows = i0 + tl.arange(0, BM)
    columns = tl.arange(0, BN)
    shift = N - M if CAUSAL else 0
    p0 = i0 + shift
    left, right, first_right, edge = key_tiles(p0, N, reach, CAUSAL, BIAS, BM, BN)

    q = rows_of(q_ptr, rows, M, q_stride, D, WIDEN)
    do = rows_of(do_ptr + here, rows, M, H * D, D, WIDEN)
    o = rows_of(o_ptr + here, rows, M, H * D, D, WIDEN)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + h * Tq + q_start + rows, delta, mask=rows < M)
    lse = tl.load(lse_ptr + h * Tq + q_start + rows, mask=rows < M, other=float("inf"))  # P = 0 past the end
    dq = tl.zeros([BM, D], tl.float32)
    before = tl.load(diag_ptr) * LOG2E if BIAS else 0.0
    after = tl.load(diag_ptr + 2 * reach) * LOG2E if BIAS else 0.0
    sum_before = tl.zeros([BM], tl.float32)
    sum_after = tl.zeros([BM], tl.float32)
    sums = tl.zeros([1, BUCKETS], tl.float32)

    for t in range(0, left + right):  # plain tiles
        j0 = tl.where(t < left, t, t - left + first_right) * BN
        k = rows_of(k_ptr, j0 + columns, N, k_stride, D, WIDEN)
        v = rows_of(v_ptr, j0 + columns, N, v_stride, D, WIDEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * LOG2E + tl.where(t < left, before, after)
        ds = score_gradient(s, do, v, lse, delta, seed, q_start + rows, h, j0, threshold, DROPOUT, PRECISION)
        if TABLE_GRADIENT:
            of_row = tl.sum(ds, 1)
            sum_before += tl.where(t < left, of_row, 0.0)
            sum_after += tl.where(t < left, 0.0, of_row)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    for t in range(left, left + edge):
        j0 = tl.where(t < first_right, t, t + right) * BN
        k = rows_of(k_ptr, j0 + columns, N, k_stride, D, WIDEN)
        v = rows_of(v_ptr, j0 + columns, N, v_stride, D, WIDEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        distance = (j0 + columns)[None, :] - (shift + rows)[:, None]
        if BIAS:
            s += bias_of(diag_ptr, distance, reach)
        visible = (j0 + columns)[None, :] < N
        if CAUSAL:
            visible = visible & (distance <= 0)
        s = tl.where(visible, s * LOG2E, float("-inf"))
        ds = score_gradient(s, do, v, lse, delta, seed, q_start + rows, h, j0, threshold, DROPOUT, PRECISION)
        if TABLE_GRADIENT:
            sums = add_diagonals(sums, ds, lut_ptr, j0 - p0, reach)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_ptr += here
    dq = dq.to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + rows[:, None] * (H * D) + tl.arange(0, D)[None, :], dq, mask=rows[:, None] < M)
    if TABLE_GRADIENT:
        bucket = tl.arange(0, BUCKETS)[None, :]
        sums += tl.where(bucket == tl.load(lut_ptr), tl.sum(sum_before, 0), 0.0)
        sums += tl.where(bucket == tl.load(lut_ptr + 2 * reach), tl.sum(sum_after, 0), 0.0)
        slot = (q_start // BM + b + i0 // BM).to(tl.int64)
        tl.store(partial_ptr + (slot * H + h) * BUCKETS + bucket, sums)


@triton.jit
def dkdv_step(
    i0,
    bias_before,  # of all distances of the tile, times log2 e; unless EDGE, which looks them up
    k,
    v,
    dk,
    dv,
    q_ptr,
    do_ptr,
    diag_ptr,
    lse_ptr,
    delta_ptr,
    q_stride,
    do_stride,
    j0,
    M,
    shift,
    reach,
    seed,
    q_start,
    h,
    threshold,
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv with the queries from i0 on added. Scores are transposed here, (BN, BM), as both products want them."""
    BN: tl.constexpr = k.shape[0]
    rows = i0 + tl.arange(0, BM)
    q = rows_of(q_ptr, rows, M, q_stride, k.shape[1], WIDEN)
    do = rows_of(do_ptr, rows, M, do_stride, k.shape[1], WIDEN)
    lse = tl.load(lse_ptr + rows, mask=rows < M, other=float("inf"))  # P = 0 past the end
    delta = tl.load(delta_ptr + rows, mask=rows < M, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if EDGE:
        distance = (j0 + tl.arange(0, BN))[:, None] - (shift + rows)[None, :]
        if BIAS:
            s += bias_of(diag_ptr, distance, reach)
        s *= LOG2E
        if CAUSAL:
            s = tl.where(distance <= 0, s, float("-inf"))
    else:
        s = s * LOG2E + bias_before
    p = tl.exp2(s - lse[None, :])
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        mask = tl.trans(kept(seed, q_start + rows, h, j0, threshold, BN))
        scale = 256.0 / (256 - threshold)
        dropped = tl.where(mask, p * scale, 0.0)
        dp = tl.where(mask, dp * scale, 0.0)
    dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=CHANGING)
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    diag_ptr,
    do_ptr,  # (Tq, H, D), contiguous
    dk_ptr,
    dv_ptr,  # dk, dv: (Tk, H, D), contiguous
    lse_ptr,
    delta_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles,  # key tiles of the longest sequence
    Tq,
    H,
    q_stride,
    q_head,
    k_stride,
    k_head,
    v_stride,
    v_head,
    reach,
    seed,
    threshold,
    CAUSAL: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    j0 = tl.program_id(0) % tiles * BN
    q_start, k_start = tl.load(cu_q_ptr + b), tl.load(cu_k_ptr + b)
    M, N = tl.load(cu_q_ptr + b + 1) - q_start, tl.load(cu_k_ptr + b + 1) - k_start
    if j0 >= N:
        return
    q_ptr += q_start.to(tl.int64) * q_stride + h * q_head
    k_ptr += k_start.to(tl.int64) * k_stride + h * k_head
    v_ptr += k_start.to(tl.int64) * v_stride + h * v_head
    do_ptr += q_start.to(tl.int64) * H * D + h * D
    lse_ptr += h * Tq + q_start
    delta_ptr += h * Tq + q_start
    diag_ptr += h * (2 * reach + 1)
    keys = j0 + tl.arange(0, BN)
    shift = N - M if CAUSAL else 0
    early, first, late, end = query_tiles(j0, M, shift, reach, CAUSAL, BIAS, BM, BN)

    k = rows_of(k_ptr, keys, N, k_stride, D, WIDEN)
    v = rows_of(v_ptr, keys, N, v_stride, D, WIDEN)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    before = tl.load(diag_ptr) * LOG2E if BIAS else 0.0
    after = tl.load(diag_ptr + 2 * reach) * LOG2E if BIAS else 0.0

    for t in range(0, early + end - late):  # plain tiles; for early queries the keys lie far after
        i0 = tl.where(t < early, t, t - early + late) * BM
        bias = tl.where(t < early, after, before)
        dk, dv = dkdv_step(
            i0, bias, k, v, dk, dv, q_ptr, do_ptr, diag_ptr, lse_ptr, delta_ptr, q_stride, H * D, j0, M, shift,
            reach, seed, q_start, h, threshold, False, CAUSAL, BIAS, DROPOUT, BM, WIDEN, PRECISION,
        )  # fmt: skip
    for t in range(first, late):
        dk, dv = dkdv_step(
            t * BM, 0.0, k, v, dk, dv, q_ptr, do_ptr, diag_ptr, lse_ptr, delta_ptr, q_stride, H * D, j0, M, shift,
            reach, seed, q_start, h, threshold, True, CAUSAL, BIAS, DROPOUT, BM, WIDEN, PRECISION,
        )  # fmt: skip

    here = k_start.to(tl.int64) * H * D + h * D + keys[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + here, dk.to(dk_ptr.dtype.element_ty), mask=keys[:, None] < N)
    tl.store(dv_ptr + here, dv.to(dv_ptr.dtype.element_ty), mask=keys[:, None] < N)


# ---- Launchers ------------------------------------------------------------------------------------------------------


def configuration(kernel, q):
    """(BM, BN, num_warps, num_stages) for a kernel on these queries."""
    return CONFIGURATIONS[architecture(q.device)][kernel, q.element_size()][max(q.shape[2], 32)]


def strides(*tensors):
    """The strides of tokens and heads of each."""
    return [x.stride(dim) for x in tensors for dim in (0, 1)]


class Problem:
    """What all three launches have in common."""

    def __init__(self, q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal, dropout_p, seed, max_distance, longest):
        self.q, self.k, self.v, self.cu_q, self.cu_k = q, k, v, cu_seqlens_q, cu_seqlens_k
        self.longest_q, self.longest_k = longest
        self.reach, self.lut, self.diag = 0, cu_seqlens_q, q  # without a table no kernel reads them
        if table is not None:
            self.reach, self.lut = near_buckets(len(table), max_distance, not causal, table.device)
            self.diag = table.float().T.index_select(1, self.lut)  # (H, 2 reach + 1)
        self.seed, self.threshold = seed, threshold_of(dropout_p)
        self.flags = dict(CAUSAL=causal, BIAS=table is not None, DROPOUT=self.threshold > 0, D=q.shape[2])
        self.flags |= dict(WIDEN=INTERPRETED, PRECISION="ieee")

    def sizes(self, longest, block):
        """(the grid, the arguments that follow the pointers) for one program per `block` tokens and head."""
        (Tq, H, _), tiles, B = self.q.shape, -(-longest // block), len(self.cu_q) - 1
        arguments = (self.cu_q, self.cu_k, tiles, Tq, H, *strides(self.q, self.k, self.v))
        return (B * tiles, H), (*arguments, self.reach, self.seed, self.threshold)

    def forward(self):
        """o (Tq, H, D) and lse (H, Tq)."""
        Tq, H, _ = self.q.shape
        BM, BN, warps, stages = configuration("forward" if self.longest_q > 16 else "decode", self.q)
        o = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        lse = torch.empty(H, Tq, device=self.q.device)
        grid, sizes = self.sizes(self.longest_q, BM)
        options = dict(self.flags, BM=BM, BN=BN, num_warps=warps, num_stages=stages)
        launch(forward_kernel, grid, self.q, self.k, self.v, self.diag, o, lse, *sizes, **options)
        return o, lse

    def dq(self, o, lse, do, num_buckets):
        """dq, delta (H, Tq), and d table (num_buckets, H) or, for num_buckets = 0, None."""
        Tq, H, _ = self.q.shape
        BM, BN, warps, stages = configuration("dq", self.q)
        assert BM <= BN
        dq, delta = torch.empty_like(o), torch.empty_like(lse)
        buckets = next_power_of_2(num_buckets) if num_buckets else 1
        slots = Tq // BM + len(self.cu_q) - 1 if num_buckets else 1
        partial = torch.zeros(slots, H, buckets, device=o.device)
        grid, sizes = self.sizes(self.longest_q, BM)
        options = dict(self.flags, BM=BM, BN=BN, num_warps=warps, num_stages=stages)
        options |= dict(BUCKETS=buckets, TABLE_GRADIENT=num_buckets > 0)
        tensors = (self.q, self.k, self.v, self.diag, self.lut, o, do, dq, lse, delta, partial)
        launch(dq_kernel, grid, *tensors, *sizes, **options)
        return dq, delta, partial.sum(0).T[:num_buckets] if num_buckets else None

    def dkdv(self, lse, delta, do):
        BM, BN, warps, stages = configuration("dkdv", self.q)
        dk, dv = (torch.empty(self.k.shape, dtype=do.dtype, device=do.device) for _ in range(2))
        grid, sizes = self.sizes(self.longest_k, BN)
        options = dict(self.flags, BM=BM, BN=BN, num_warps=warps, num_stages=stages)
        tensors = (self.q, self.k, self.v, self.diag, do, dk, dv, lse, delta)
        launch(dkdv_kernel, grid, *tensors, *sizes, **options)
        return dk, dv


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table, *rest):
        problem = Problem(q, k, v, table, *rest)
        o, lse = problem.forward()
        ctx.save_for_backward(q, k, v, table, o, lse)
        ctx.rest = rest
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, table, o, lse = ctx.saved_tensors
        problem, do = Problem(q, k, v, table, *ctx.rest), do.contiguous()
        wanted = ctx.needs_input_grad
        dq, delta, d_table = problem.dq(o, lse, do, len(table) if wanted[3] else 0)
        dk, dv = problem.dkdv(lse, delta, do) if wanted[1] or wanted[2] else (None, None)
        return dq, dk, dv, d_table, *[None] * len(ctx.rest)


# ---- The public function --------------------------------------------------------------------------------------------


def attention_triton(
    q,
    k,
    v,
    table,
    cu_seqlens_q,
    cu_seqlens_k,
    causal=False,
    dropout_p=0.0,
    seed=0,
    max_distance=128,
    max_seqlen_q=None,
    max_seqlen_k=None,
):
    """`attention_reference` by the kernels above; dropout_p is rounded to a multiple of 1/256 (kernels/dropout.py).

    q, k, v: fp32, fp16 or bf16; D of 16, 32, 64 or 128; any strides of tokens and heads. The gradients are contiguous.
    """
    check_arguments(q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal, max_distance, max_seqlen_q, max_seqlen_k)
    if not 0 <= seed < 2**63:
        raise ValueError(f"attention: seed must be at least 0 and less than 2^63, got {seed}")
    if q.shape[2] not in (16, 32, 64, 128):
        raise ValueError(f"attention: the Triton kernel takes D of 16, 32, 64 or 128, got {q.shape[2]}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"attention: the Triton kernel takes q of float32, float16 or bfloat16, got {q.dtype}")
    for name, x in (
        ("k", k),
        ("v", v),
        ("table", table),
        ("cu_seqlens_q", cu_seqlens_q),
        ("cu_seqlens_k", cu_seqlens_k),
    ):
        if x is not None and x.device != q.device:
            raise ValueError(f"attention: {name} must be on q's device, {q.device}, got {x.device}")
    longest = (
        int(cu.diff().max()) if given is None else given
        for cu, given in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k))
    )
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    rest = (cu_seqlens_q, cu_seqlens_k, causal, dropout_p, seed, max_distance, tuple(longest))
    return Attention.apply(q, k, v, table, *rest)
