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
memory for B x H x M x N scores. The **Triton kernels** (attention_kernels.py) keep nothing of that size in device
memory:

    forward    reads q, k, v; writes o and, per query, lse = log2 sum_j 2^(S log2 e)
    backward   reads those and do; writes dq, dk, dv, stats (lse and delta), and sums of the table's gradient
    recomputed in backward: S, P from S and lse, the dropout mask from its seed

FlashAttention's online softmax (Milakov and Gimelshein 2018; Dao 2023) runs over tiles of BM queries and BN keys. One
program owns one tile of queries (or, for dk and dv, of keys) of one sequence and head, and walks along the other side.

**Bias.** diag = table[bucket], (H, 2 (reach + MARGIN) + 1), holds the bias of every distance up to `reach`, where the
last bucket of each direction begins, and of a few more, so that a tile can be read without limiting each distance. A
tile whose distances are all beyond adds one number to all its scores ("plain"). The others, a band along the diagonal
of about 2 reach + BM keys a query tile, look each distance up ("edge"); so do tiles that need a mask. Plain tiles and
edge tiles have a loop each: a branch inside one loop would put both bodies into it.

**No sync.** The grid is laid out for max_seqlen_q and max_seqlen_k; programs past the end of a sequence return at once.
On a GPU cu_seqlens are not checked: a sequence without keys gives NaN, and so does M > N with causal. On the CPU both
raise ValueError.
"""

from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_kernels import MARGIN, attention_dkdv_kernel, attention_dq_kernel, attention_forward_kernel
from .buckets import near_buckets, relative_position_bucket
from .dropout import dropout_reference, seed_on, threshold_of
from .launch import architecture, check_tensors, launch, make_rows_contiguous, triton

# ---- Reference ------------------------------------------------------------------------------------------------------


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    causal: bool = False, dropout_p: float = 0.0, seed: int | Tensor | None = None, max_distance: int = 128,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention within each packed sequence, with T5's relative position bias, in plain PyTorch.

    q: (Tq, H, D); k, v: (Tk, H, D); any float dtype. The products have that dtype, bias and softmax are fp32.
    table: (num_buckets, H), the bias of each bucket, or None for no bias (cross-attention).
    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where sequences begin; every sequence needs a query and a key.
    causal: the table is one-directional, and queries are the *last* M of the N positions (FlashAttention's
        convention): query i sees keys j <= i + N - M. So a decoding step is M = 1, and M > N is refused.
    dropout_p: of the attention weights. seed: of that dropout; None draws one from torch's generator, and a (1,) int64
        tensor on q's device is read when the kernels run (a CUDA graph may change it between replays).
    max_distance: T5's relative_attention_max_distance.
    max_seqlen_q, max_seqlen_k: the longest sequence, as a host integer; without it the device is asked.

    Returns (Tq, H, D) in q's dtype. Raises ValueError for shapes that do not fit together.
    """
    longest = (max_seqlen_q, max_seqlen_k)
    M, N = check_arguments(q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal, max_distance, longest)
    B, len_q, len_k = len(cu_seqlens_q) - 1, cu_seqlens_q.diff(), cu_seqlens_k.diff()
    slot_q = padded_slots(cu_seqlens_q, len_q, M, q.shape[0])
    slot_k = slot_q if cu_seqlens_k is cu_seqlens_q else padded_slots(cu_seqlens_k, len_k, N, k.shape[0])
    q, k, v = pad(q, slot_q, B, M), pad(k, slot_k, B, N), pad(v, slot_k, B, N)  # (B, H, M, D), (B, H, N, D)

    scores = (q @ k.mT).float()  # (B, H, M, N); T5 does not divide by sqrt(D)
    i = torch.arange(M, device=q.device)[:, None]
    j = torch.arange(N, device=q.device)[None, :]
    if causal and cu_seqlens_k is not cu_seqlens_q:
        i = i + (len_k - len_q)[:, None, None]  # (B, M, 1): queries are the last positions
    if table is not None:
        bucket = relative_position_bucket(j - i, table.shape[0], max_distance, bidirectional=not causal)
        bias = F.embedding(bucket, table.float())  # (M, N, H), or (B, M, N, H) where the offset differs by sequence
        scores += bias.movedim(-1, -3)  # in place, here and below: scores are the largest tensor by far
    if causal or slot_k is not None:
        hidden = j > i if causal else j >= len_k[:, None, None]  # later keys, the padding among them; or padding alone
        scores += torch.where(hidden, float("-inf"), 0.0).unsqueeze(-3)  # a fifth of the time of masked_fill_

    weights = dropout_reference(scores.softmax(-1), dropout_p, seed)
    return unpad((weights.to(v.dtype) @ v), slot_q)


def check_arguments(q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal, max_distance, longest):
    """The lengths of the longest sequences, where they are not given; ValueError, which names what does not fit."""
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
    sides = [("q", cu_seqlens_q, len(q), longest[0]), ("k", cu_seqlens_k, len(k), longest[1])]
    for name, cu, total, given in sides:
        if total == 0:
            raise ValueError(f"attention: {name} has no tokens; give at least one")
        if cu.dim() != 1 or cu.dtype != torch.int32 or len(cu) != len(cu_seqlens_q) or len(cu) < 2:
            raise ValueError(f"attention: cu_seqlens_{name} must be (B + 1,) int32, got {list(cu.shape)} {cu.dtype}")
        if cu.device.type == "cpu":  # on a GPU reading the values would stall the queue
            starts = cu.tolist()
            lengths = [end - start for start, end in pairwise(starts)]
            if starts[0] != 0 or starts[-1] != total:
                raise ValueError(f"attention: cu_seqlens_{name} must run from 0 to {total}, got {starts}")
            if min(lengths) < 1:
                raise ValueError(f"attention: cu_seqlens_{name} holds an empty sequence; each needs at least one token")
            if given is not None and given < max(lengths):
                raise ValueError(f"attention: max_seqlen_{name} must be at least {max(lengths)}, got {given}")
    if causal and cu_seqlens_q.device.type == "cpu" and (cu_seqlens_q.diff() > cu_seqlens_k.diff()).any():
        raise ValueError("attention: causal queries are the last of the positions, but a sequence has more than keys")
    return tuple(int(cu.diff().max()) if given is None else given for _, cu, _, given in sides)


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


# ---- Launchers ------------------------------------------------------------------------------------------------------


# {(kernel, bytes per number): {D: (BM, BN, num_warps, num_stages)}}, found with `python -m kernels.aot`. In half
# precision a chain of two products puts all warps along the rows of a tile, 16 to each: more warps than that compute
# the same scores twice. Among the others, large tiles that do not spill inside a loop; smaller ones for wider heads,
# and for fp32, whose products do without tensor cores to keep its digits. "causal" rows are exceptions: masks need
# registers too.
FP32 = {
    ("forward", 4): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (16, 32, 8, 2)},
    ("dq", 4): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (16, 32, 8, 2)},
    ("dkdv", 4): {32: (32, 32, 8, 2), 64: (32, 32, 8, 2), 128: (16, 32, 8, 2)},
}
CONFIGURATIONS = {
    "sm_90": {
        ("forward", 2): dict.fromkeys((32, 64, 128), (64, 64, 4, 2)),
        ("dq", 2): {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 32, 4, 2)},
        ("dq causal", 2): {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 4, 1)},
        ("dkdv", 2): {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (32, 128, 8, 2)},
        ("dkdv causal", 2): {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (16, 128, 8, 2)},
        **FP32,
    },
    "sm_80": {
        ("forward", 2): {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 32, 4, 2)},
        ("dq", 2): dict.fromkeys((32, 64, 128), (64, 32, 4, 2)),
        ("dkdv", 2): {32: (32, 64, 4, 2), 64: (16, 64, 4, 2), 128: (32, 64, 4, 2)},
        **FP32,
        ("forward", 4): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 8, 2)},
    },
    "interpreter": {
        key: dict.fromkeys((32, 64, 128), (128, 128, 1, 1)) for key in product(("forward", "dq", "dkdv"), (2, 4))
    },
}


def tile(q, name, causal):
    """(BM, BN, num_warps, num_stages)"""
    table, size = CONFIGURATIONS[architecture(q.device)], q.element_size()
    row = (causal and table.get((f"{name} causal", size))) or table[name, size]
    return row[max(q.shape[2], 32)]


def launch_tiles(kernel, name, side, inputs, setting, *tensors, **flags):
    """Run a kernel with a program for each tile of side 0 (queries) or 1 (keys), and head."""
    q, k, v, _, *where = inputs
    causal, bias, threshold, reach, longest = setting
    (Tq, H, D), B = q.shape, len(where[0]) - 1
    BM, BN, warps, stages = tile(q, name, causal)
    tiles = -(-longest[side] // (BN if side else BM))
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]  # of tokens and heads
    numbers = (tiles, Tq, H, *strides, reach, threshold)
    flags |= dict(CAUSAL=causal, BIAS=bias, DROPOUT=threshold > 0, D=D, BM=BM, BN=BN)
    flags |= dict(num_warps=warps, num_stages=stages)
    few = D <= 64 and not (causal or threshold)  # values to hold at once
    if name == "forward" and few and (BM, warps) == (64, 4) and architecture(q.device) == "sm_90":
        flags["maxnreg"] = 168  # three blocks on a multiprocessor; the others would spill
    launch(kernel, (B * tiles, H), *inputs[:4], *tensors, *where, *numbers, **flags)


class Attention(torch.autograd.Function):
    """seed: (1,) int64 on the device, or None without dropout."""

    @staticmethod
    def forward(ctx, q, k, v, table, cu_seqlens_q, cu_seqlens_k, seed, causal, threshold, max_distance, longest):
        diag, lut, reach, ctx.num_buckets = q, cu_seqlens_q, 0, 0  # without a table nothing reads them
        if table is not None:
            ctx.num_buckets = len(table)
            reach, lut = near_buckets(len(table), max_distance, not causal, table.device, MARGIN.value)
            diag = table.float().T.index_select(1, lut)  # the bias of every distance, (H, 2 (reach + MARGIN) + 1)
        inputs = (q, k, v, diag, cu_seqlens_q, cu_seqlens_k, q if seed is None else seed)
        ctx.setting = causal, table is not None, threshold, reach, longest
        o, lse = q.new_empty(q.shape), torch.empty(q.shape[1], q.shape[0], device=q.device)
        launch_tiles(attention_forward_kernel, "forward", 0, inputs, ctx.setting, o, lse)
        ctx.save_for_backward(*inputs, lut, o, lse)
        return o

    @staticmethod
    def backward(ctx, do):
        *inputs, lut, o, lse = ctx.saved_tensors
        q, k, do, wanted = *inputs[:2], do.contiguous(), ctx.needs_input_grad
        causal, *_, longest = ctx.setting
        buckets = ctx.num_buckets if wanted[3] else 0
        programs = (len(inputs[4]) - 1) * -(-longest[0] // tile(q, "dq", causal)[0]) if buckets else 1
        partial = torch.empty(programs, q.shape[1], triton.next_power_of_2(max(buckets, 1)), device=q.device)
        dq, stats = torch.empty_like(o), torch.empty(*lse.shape, 2, device=q.device)
        flags = dict(BUCKETS=partial.shape[2], TABLE_GRADIENT=buckets > 0)
        launch_tiles(attention_dq_kernel, "dq", 0, inputs, ctx.setting, lut, o, do, dq, lse, stats, partial, **flags)
        d_table = partial.sum(0).T[:buckets] if buckets else None
        dk = dv = None
        if wanted[1] or wanted[2]:
            dk, dv = (k.new_empty(k.shape) for _ in range(2))
            launch_tiles(attention_dkdv_kernel, "dkdv", 1, inputs, ctx.setting, do, dk, dv, stats)
        return dq, dk, dv, d_table, *[None] * 7


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    causal: bool = False, dropout_p: float = 0.0, seed: int | Tensor | None = None, max_distance: int = 128,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> Tensor:  # fmt: skip
    """`attention_reference` by the Triton kernels; dropout_p is rounded to a multiple of 1/256 (kernels/dropout.py).

    q, k, v: fp32, fp16 or bf16; D of 16, 32, 64 or 128; any strides of tokens and heads. The gradients are contiguous.
    """
    longest = (max_seqlen_q, max_seqlen_k)
    longest = check_arguments(q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal, max_distance, longest)
    if q.shape[2] not in (16, 32, 64, 128):
        raise ValueError(f"attention: the Triton kernel takes D of 16, 32, 64 or 128, got {q.shape[2]}")
    check_tensors("attention", q=q, k=k, v=v, table=table, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    q, k, v = make_rows_contiguous(q, k, v)
    threshold = threshold_of(dropout_p)
    seed = seed_on(q.device, seed) if threshold else None
    return Attention.apply(q, k, v, table, cu_seqlens_q, cu_seqlens_k, seed, causal, threshold, max_distance, longest)
