"""T5 attention over packed sequences: softmax(q k^T + bias) v.

The mathematics, for one sequence of M queries and N keys and one head:

    S = Q K^T + B,   P = softmax(S),   O = P V,      B[i, j] = table[bucket(j - i), head]

Two things set T5 apart from other transformers. There is no 1/sqrt(D): T5 folds that factor into the initialisation
of the query projection. And positions enter only through B, a learned scalar per head and *bucket* of the distance
j - i from query to key: near distances have a bucket each, far ones share buckets on a logarithmic scale, and all
beyond `max_distance` share the last (Raffel et al. 2020, section 2.1; the formula is `relative_position_bucket`).

Sequences are packed, as in FlashAttention's varlen interface: q is (Tq, H, D), all sequences one after another,
and sequence b owns the rows cu_seqlens_q[b] : cu_seqlens_q[b + 1]. Keys and values have their own cu_seqlens, so
cross-attention (other lengths, no bias) and decoding (one query, many keys) are the same call.

This file holds the reference: plain PyTorch, the oracle of every test and the path the CPU takes. It pads inside,
so it needs memory for B x H x M x N scores; nothing outside this file ever sees a padded tensor.
"""

import functools
import math

import torch
import torch.nn.functional as F


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

    q: (Tq, H, D); k, v: (Tk, H, D); any float dtype. Scores and softmax are computed in fp32.
    table: (num_buckets, H), the bias of each bucket, or None for no bias (cross-attention).
    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where sequences begin; every sequence needs a query and a key.
    causal: the table is one-directional, and queries are the *last* M of the N positions (FlashAttention's
        convention): query i sees keys j <= i + N - M. So a decoding step is M = 1, and M > N is refused.
    dropout_p, seed: dropout on the attention weights; the mask depends on `seed` alone, not on the global generator.
    max_distance: T5's relative_attention_max_distance.
    max_seqlen_q, max_seqlen_k: the longest sequence, as a host integer; without it the device is asked.

    Returns (Tq, H, D) in q's dtype. Raises ValueError for shapes that do not fit together.
    """
    check_arguments(q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal)
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
        i = i + (len_k - len_q)[:, None, None]  # (B, M, 1): the queries are the last of the positions
    if table is not None:
        bucket = relative_position_bucket(j - i, table.shape[0], max_distance, bidirectional=not causal)
        bias = F.embedding(bucket, table.float())  # (M, N, H), or (B, M, N, H) where the offset differs by sequence
        scores = scores + bias.movedim(-1, -3)
    visible = j < len_k[:, None, None]  # (B, 1, N): padding is no key
    if causal:
        visible = visible & (j <= i)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))

    weights = scores.softmax(-1)
    if dropout_p > 0:
        weights = weights * dropout_mask(weights.shape, dropout_p, seed, weights.device)
    return unpad((weights.to(v.dtype) @ v), slot_q)


def check_arguments(q, k, v, table, cu_seqlens_q, cu_seqlens_k, causal):
    """Raise ValueError, naming the argument, unless shapes, dtypes and devices fit together."""
    if q.dim() != 3 or k.dim() != 3 or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"attention: q and k must be (Tq, H, D) and (Tk, H, D), got {list(q.shape)}, {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"attention: v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"attention: q, k and v must share one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if table is not None and (table.dim() != 2 or table.shape[1] != q.shape[1]):
        raise ValueError(f"attention: table must be (num_buckets, {q.shape[1]}), got {list(table.shape)}")
    for name, cu, total in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, len(k))):
        if cu.dim() != 1 or cu.dtype != torch.int32 or len(cu) != len(cu_seqlens_q) or len(cu) < 2:
            raise ValueError(f"attention: {name} must be (B + 1,) int32, got {list(cu.shape)} {cu.dtype}")
        if cu.device.type == "cpu":  # on a GPU reading the values would stall the queue
            if cu[0] != 0 or cu[-1] != total:
                raise ValueError(f"attention: {name} must run from 0 to {total}, got {int(cu[0])} to {int(cu[-1])}")
            if int(cu.diff().min()) < 1:
                raise ValueError(f"attention: {name} holds an empty sequence; each needs at least one token")
    if causal and cu_seqlens_q.device.type == "cpu" and bool((cu_seqlens_q.diff() > cu_seqlens_k.diff()).any()):
        raise ValueError(
            "attention: causal queries are the last of the positions, so no sequence may have more than keys"
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


def relative_position_bucket(distance, num_buckets=32, max_distance=128, bidirectional=True):
    """T5's bucket of each distance `key position - query position` (any integer shape), as int64.

    The logarithm is exact at powers of two, where a rounding error would move a bucket's edge, so buckets are looked
    up in a table made once on the host rather than computed where they are needed.
    """
    lut = bucket_table(num_buckets, max_distance, bidirectional, distance.device)
    return lut[distance.clamp(-max_distance, max_distance) + max_distance]


@functools.cache
def bucket_table(num_buckets, max_distance, bidirectional, device):
    """(2 * max_distance + 1,) int64: the bucket of every distance from -max_distance to max_distance, made on the host.

    Half the buckets of a direction count single positions, the others grow logarithmically up to max_distance.
    A bidirectional table splits its buckets between keys before (first half) and after the query; bucket
    num_buckets / 2 is then never used, for it would be "after, by nothing". In a causal table later keys fall into
    bucket 0; they are masked anyway.
    """
    distance = torch.arange(-max_distance, max_distance + 1)
    per_side = num_buckets // 2 if bidirectional else num_buckets
    exact = per_side // 2
    back = distance.abs() if bidirectional else (-distance).clamp(min=0)
    log = torch.log(back.clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + (log * (per_side - exact)).long()).clamp(max=per_side - 1)
    bucket = torch.where(back < exact, back, far)
    return (bucket + per_side * (distance > 0) if bidirectional else bucket).to(device)


def dropout_mask(shape, p, seed, device):
    """A tensor of 0 (with probability p) and 1 / (1 - p), determined by `seed`."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, device=device).bernoulli_(1 - p, generator=generator).div_(1 - p)
