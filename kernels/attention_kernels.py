# ruff: noqa: ANN001, ANN201
"""The Triton kernels of attention; flash_attention.py explains what they compute.

Triton reads the annotations of a kernel: nothing but tl.constexpr may stand there.
"""

from .dropout import dropout_mask
from .launch import INTERPRETED, tl, triton

VARYING = ["Tq", "reach", "threshold"]  # change often: one compilation serves all values
MARGIN = tl.constexpr(128)  # distances of `diag` beyond `reach` on each side; at least BM + BN
WIDEN = tl.constexpr(INTERPRETED)  # convert the operands of products to fp32
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x log2 e): the hardware knows 2^x only


# ---- Helpers ------------------------------------------------------------------------------------
#
# Query i of a sequence has the position i + N - M if causal, else i. Key j has the position j.
# A tile holds the scores of BM queries, the first at position p0, and BN keys from j0 on. The
# distance from query to key at its top left corner is j0 - p0.
#
# LONG kernels have two loops. "Plain" tiles are full, need no mask and have one bias for all their
# scores. "Edge" tiles are the others. A loop runs over range(begin, end): tile t as long as
# t < stop, then tile t + skip. Kernels for short sequences have the second loop alone.


@triton.jit
def locate(tiles_ptr, cu_q_ptr, cu_k_ptr):
    """(first row of the tile in its sequence, q_start, M, k_start, N) of this program."""
    tile = tiles_ptr + 2 * tl.program_id(0)
    sequence = tl.load(tile)
    q_start = tl.load(cu_q_ptr + sequence)
    k_start = tl.load(cu_k_ptr + sequence)
    M = tl.load(cu_q_ptr + sequence + 1) - q_start
    N = tl.load(cu_k_ptr + sequence + 1) - k_start
    return tl.load(tile + 1), q_start, M, k_start, N


@triton.jit
def rows_at(ptr, token, h, token_stride, head_stride):
    """The rows of head h from a token on. Numbers of elements may need 64 bits."""
    return ptr + token.to(tl.int64) * token_stride + h.to(tl.int64) * head_stride


@triton.jit
def far_bias(diag_ptr, reach, FAR):
    """The bias of keys far before, and of keys far after the query, times log2 e."""
    before = 0.0
    after = 0.0
    if FAR:
        before = tl.load(diag_ptr) * LOG2E
        after = tl.load(diag_ptr + 2 * (reach + MARGIN)) * LOG2E
    return before, after


@triton.jit
def key_tiles(EDGE, p0, N, reach, CAUSAL, BIAS, LONG, BM, BN):
    """(begin, stop, skip, end) of the key tiles that the queries from position p0 on see.

    Plain tiles are the first `left`, and `right` more from first_right on. Edge tiles lie between
    them and, where BN does not divide N, at the end.
    """
    whole = N // BN
    left = 0
    first_right = whole
    visible = N
    if CAUSAL:
        visible = tl.minimum(N, p0 + BM)
    if LONG:
        left = whole
        if BIAS or CAUSAL:
            left = tl.minimum(tl.maximum(p0 - reach + 1, 0) // BN, whole)
        if BIAS and not CAUSAL:
            first_right = tl.minimum((p0 + BM - 1 + reach + BN - 1) // BN, whole)
    right = whole - first_right
    if EDGE:
        return left, first_right, right, (visible + BN - 1) // BN - right
    return 0, left, first_right - left, left + right


@triton.jit
def query_tiles(EDGE, j0, M, shift, reach, CAUSAL, BIAS, LONG, BM, BN):
    """(begin, stop, skip, end) of the query tiles that see the keys from j0 on.

    Plain tiles are 0 .. early - 1 and late .. whole - 1. Edge tiles are first .. late - 1 and,
    where BM does not divide M, the last one.
    """
    whole = M // BM
    early = 0
    first = 0
    late = whole
    if LONG and not (BIAS or CAUSAL):
        early = whole
        first = whole
    if LONG and (BIAS or CAUSAL):
        late = tl.minimum((tl.maximum(j0 + BN - 1 + reach - shift, 0) + BM - 1) // BM, whole)
    if LONG and BIAS and not CAUSAL:
        early = tl.minimum(tl.maximum(j0 - reach - shift + 1, 0) // BM, late)
        first = early
    if CAUSAL:
        first = tl.minimum(tl.maximum(j0 - shift, 0) // BM, late)
    if EDGE:
        return first, late, whole - late, late + (M + BM - 1) // BM - whole
    return 0, early, late - early, early + whole - late


@triton.jit
def load_rows(ptr, first, count, stride, ROWS, D, MASK):
    """(ROWS, D) from row `first` on; rows are `stride` apart. MASK: 0 from row `count` on."""
    row = tl.arange(0, ROWS)[:, None]
    place = ptr + first.to(tl.int64) * stride + (row * stride + tl.arange(0, D)[None, :])
    if MASK:
        x = tl.load(place, mask=first + row < count, other=0.0)
    else:
        x = tl.load(place)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def store_rows(ptr, x, first, count, stride):
    """Store x (ROWS, D) from row `first` on, except for rows from `count` on."""
    row = first + tl.arange(0, x.shape[0])[:, None]
    place = ptr + row * stride + tl.arange(0, x.shape[1])[None, :]
    tl.store(place, x.to(ptr.dtype.element_ty), mask=row < count)


@triton.jit
def limit(corner, reach):
    """A corner whose tile has the same buckets, and whose distances `diag` and `lut` all hold."""
    return tl.minimum(tl.maximum(corner, -reach - MARGIN // 2), reach + MARGIN // 2)


@triton.jit
def add_bias(s, row, column, diag_ptr, corner, reach):
    """s plus the bias of each distance corner + column - row. row, column: (n, 1) and (1, m)."""
    start = diag_ptr + (limit(corner, reach) + reach + MARGIN)
    return s + tl.load(start + (column.to(tl.int64) - row.to(tl.int64)))


@triton.jit
def edge_scores(s, diag_ptr, corner, keys_left, reach, CAUSAL, BIAS):
    """The scores s of an edge tile with their bias, and -inf for a key that is not seen."""
    row = tl.arange(0, s.shape[0])[:, None]
    column = tl.arange(0, s.shape[1])[None, :]
    if BIAS:
        s = add_bias(s, row, column, diag_ptr, corner, reach)
    visible = column < keys_left
    if CAUSAL:
        visible = visible & (column - row <= -corner)
    return tl.where(visible, s, float("-inf"))


# ---- Forward ------------------------------------------------------------------------------------
#
# Per query: m is the largest score so far, l = sum 2^(s - m), acc = sum 2^(s - m) v, where s is the
# score times log2 e. A tile with a larger score first shrinks l and acc by 2^(old m - new m). At
# the end o = acc / l and lse = m + log2 l. Dropout acts after the softmax: l sums all weights, acc
# those that are kept, and the factor 1 / (1 - p) enters once, at the end.


@triton.jit(do_not_specialize=VARYING)
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, diag_ptr,
    o_ptr,  # (Tq, H, D), contiguous
    lse_ptr,  # (H, Tq) fp32
    tiles_ptr, cu_q_ptr, cu_k_ptr,
    seed_ptr,  # (1,) int64
    Tq, H, q_stride, q_head, k_stride, k_head, v_stride, v_head, reach, threshold,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, LONG: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    i0, q_start, M, k_start, N = locate(tiles_ptr, cu_q_ptr, cu_k_ptr)
    if i0 >= M:
        return
    seed = tl.load(seed_ptr) if DROPOUT else 0
    q_ptr = rows_at(q_ptr, q_start, h, q_stride, q_head)
    k_ptr = rows_at(k_ptr, k_start, h, k_stride, k_head)
    v_ptr = rows_at(v_ptr, k_start, h, v_stride, v_head)
    o_ptr = rows_at(o_ptr, q_start, h, H * D, D)
    p0 = i0 + (N - M if CAUSAL else 0)
    if BIAS:
        diag_ptr += h * (2 * (reach + MARGIN) + 1)
    before, after = far_bias(diag_ptr, reach, LONG and BIAS)

    q = load_rows(q_ptr, i0, M, q_stride, BM, D, True)
    rows = i0 + tl.arange(0, BM)
    acc = tl.zeros([BM, D], tl.float32)
    l = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)

    for EDGE in tl.static_range(0 if LONG else 1, 2):  # plain tiles, then edge tiles
        begin, stop, skip, end = key_tiles(EDGE, p0, N, reach, CAUSAL, BIAS, LONG, BM, BN)
        for t in range(begin, end):
            j0 = tl.where(t < stop, t, t + skip) * BN
            k = load_rows(k_ptr, j0, N, k_stride, BN, D, EDGE)
            v = load_rows(v_ptr, j0, N, v_stride, BN, D, EDGE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            bias = 0.0  # of the whole tile, times log2 e
            if EDGE:
                s = edge_scores(s, diag_ptr, j0 - p0, N - j0, reach, CAUSAL, BIAS)
            else:
                bias = tl.where(t < stop, before, after)
            higher = tl.maximum(m, tl.max(s, 1) * LOG2E + bias)
            p = tl.exp2(s * LOG2E - (higher - bias)[:, None])  # one multiply-add and a power
            shrink = tl.exp2(m - higher)
            l = l * shrink + tl.sum(p, 1)
            m = higher
            if DROPOUT:
                p = tl.where(dropout_mask(seed, q_start + rows, h, j0, threshold, BN), p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")

    if DROPOUT:
        acc *= 256.0 / (256 - threshold)
    tl.store(lse_ptr + h * Tq + q_start + rows, m + tl.log2(l), mask=rows < M)
    store_rows(o_ptr, acc / l[:, None], i0, M, H * D)


# ---- Backward -----------------------------------------------------------------------------------
#
# R is the dropout mask (0 or 1 / (1 - p)), dO the gradient of O = (P o R) V. In row i, for key j:
#
#     dV = (P o R)^T dO,   dP = (dO V^T) o R,   dS_ij = P_ij (dP_ij - delta_i)
#     dQ = dS K,           dK = dS^T Q,         delta_i = sum_j P_ij dP_ij = dO_i . O_i
#
# The bias enters S as it is, so the gradient of table[c, h] is the sum of dS_ij over all i, j with
# bucket(j - i) = c. A plain tile belongs to one bucket. In an edge tile the bucket depends on j -
# i, so that the tile is skewed first, skewed[r, c] = dS[r, (c + r) mod BN]. Now the entries of
# column c lie on the diagonal j - i = c (counted from the top left corner of the tile), or on c -
# BN, c - 2 BN, ... where the column has wrapped round once, twice, ... A product with a matrix of
# zeros and ones, diagonals to buckets, adds them up. Like dQ and dK it takes dS rounded to q's
# dtype. A program writes the sums of its query tile, and PyTorch adds the tiles in a fixed order,
# in fp32.


@triton.jit
def add_diagonals(sums, ds, lut_ptr, corner, reach, dtype):
    """sums (BM, BUCKETS) plus those of an edge tile ds (BM, BN), to be added over the rows."""
    BM: tl.constexpr = ds.shape[0]
    BN: tl.constexpr = ds.shape[1]
    lut_ptr += limit(corner, reach) + reach + MARGIN + tl.arange(0, BN)
    place = tl.arange(0, BM)[:, None] + tl.arange(0, BN)[None, :]
    skewed = tl.gather(ds, place % BN, 1)
    bucket = tl.arange(0, sums.shape[1])[None, :]
    for wraps in tl.static_range((BM + BN - 2) // BN + 1):
        of_diagonals = tl.where(place // BN == wraps, skewed, 0.0).to(dtype)
        chosen = (tl.load(lut_ptr - wraps * BN)[:, None] == bucket).to(dtype)
        sums = tl.dot(of_diagonals, chosen, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=VARYING)
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, diag_ptr,
    lut_ptr,  # (2 (reach + MARGIN) + 1,) int32, the bucket of each distance
    o_ptr, do_ptr, dq_ptr,  # (Tq, H, D), contiguous
    lse_ptr,
    stats_ptr,  # (H, Tq, 2) fp32: lse and delta, written here for attention_dkdv_kernel
    partial_ptr,  # (programs, H, BUCKETS) fp32
    tiles_ptr, cu_q_ptr, cu_k_ptr, seed_ptr,  # as in forward
    Tq, H, q_stride, q_head, k_stride, k_head, v_stride, v_head, reach, threshold,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, LONG: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BUCKETS: tl.constexpr,  # a power of two; 0: the table needs no gradient
):  # fmt: skip
    h = tl.program_id(1)
    i0, q_start, M, k_start, N = locate(tiles_ptr, cu_q_ptr, cu_k_ptr)
    if BUCKETS > 0:
        bucket = tl.arange(0, BUCKETS)
        partial_ptr += (tl.program_id(0).to(tl.int64) * H + h) * BUCKETS + bucket
        sums = tl.zeros([BM, BUCKETS], tl.float32)
        sum_before = tl.zeros([BM], tl.float32)
        sum_after = tl.zeros([BM], tl.float32)
    if i0 >= M:
        if BUCKETS > 0:
            tl.store(partial_ptr, tl.zeros([BUCKETS], tl.float32))
        return
    seed = tl.load(seed_ptr) if DROPOUT else 0
    q_ptr = rows_at(q_ptr, q_start, h, q_stride, q_head)
    k_ptr = rows_at(k_ptr, k_start, h, k_stride, k_head)
    v_ptr = rows_at(v_ptr, k_start, h, v_stride, v_head)
    o_ptr = rows_at(o_ptr, q_start, h, H * D, D)
    do_ptr = rows_at(do_ptr, q_start, h, H * D, D)
    dq_ptr = rows_at(dq_ptr, q_start, h, H * D, D)
    p0 = i0 + (N - M if CAUSAL else 0)
    if BIAS:
        diag_ptr += h * (2 * (reach + MARGIN) + 1)
    before, after = far_bias(diag_ptr, reach, LONG and BIAS)

    q = load_rows(q_ptr, i0, M, q_stride, BM, D, True)
    do = load_rows(do_ptr, i0, M, H * D, BM, D, True)
    o = load_rows(o_ptr, i0, M, H * D, BM, D, True)
    rows = i0 + tl.arange(0, BM)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + h * Tq + q_start + rows, mask=rows < M, other=float("inf"))  # P = 0
    stats_ptr += 2 * (h * Tq + q_start + rows)
    tl.store(stats_ptr, lse, mask=rows < M)
    tl.store(stats_ptr + 1, delta, mask=rows < M)
    dq = tl.zeros([BM, D], tl.float32)

    for EDGE in tl.static_range(0 if LONG else 1, 2):  # plain tiles, then edge tiles
        begin, stop, skip, end = key_tiles(EDGE, p0, N, reach, CAUSAL, BIAS, LONG, BM, BN)
        for t in range(begin, end):
            j0 = tl.where(t < stop, t, t + skip) * BN
            k = load_rows(k_ptr, j0, N, k_stride, BN, D, EDGE)
            v = load_rows(v_ptr, j0, N, v_stride, BN, D, EDGE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            bias = 0.0
            if EDGE:
                s = edge_scores(s, diag_ptr, j0 - p0, N - j0, reach, CAUSAL, BIAS)
            else:
                bias = tl.where(t < stop, before, after)
            p = tl.exp2(s * LOG2E - (lse - bias)[:, None])  # 0 where s is -inf
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if DROPOUT:
                mask = dropout_mask(seed, q_start + rows, h, j0, threshold, BN)
                dp = tl.where(mask, dp * (256.0 / (256 - threshold)), 0.0)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
            if BUCKETS > 0:
                if EDGE:
                    sums = add_diagonals(sums, ds, lut_ptr, j0 - p0, reach, q.dtype)
                else:
                    of_row = tl.sum(ds, 1)
                    sum_before += tl.where(t < stop, of_row, 0.0)
                    sum_after += tl.where(t < stop, 0.0, of_row)

    store_rows(dq_ptr, dq, i0, M, H * D)
    if BUCKETS > 0:
        total = tl.sum(sums, 0)
        if LONG:
            last = tl.load(lut_ptr + 2 * (reach + MARGIN))
            total += tl.where(bucket == tl.load(lut_ptr), tl.sum(sum_before, 0), 0.0)
            total += tl.where(bucket == last, tl.sum(sum_after, 0), 0.0)
        tl.store(partial_ptr, total)


@triton.jit(do_not_specialize=VARYING)
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, diag_ptr,
    do_ptr,  # (Tq, H, D), contiguous
    dk_ptr, dv_ptr,  # (Tk, H, D), contiguous
    stats_ptr,
    tiles_ptr,  # of the keys
    cu_q_ptr, cu_k_ptr, seed_ptr,
    Tq, H, q_stride, q_head, k_stride, k_head, v_stride, v_head, reach, threshold,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, LONG: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    j0, q_start, M, k_start, N = locate(tiles_ptr, cu_q_ptr, cu_k_ptr)
    if j0 >= N:
        return
    seed = tl.load(seed_ptr) if DROPOUT else 0
    q_ptr = rows_at(q_ptr, q_start, h, q_stride, q_head)
    k_ptr = rows_at(k_ptr, k_start, h, k_stride, k_head)
    v_ptr = rows_at(v_ptr, k_start, h, v_stride, v_head)
    do_ptr = rows_at(do_ptr, q_start, h, H * D, D)
    stats_ptr += 2 * (h * Tq + q_start)
    dk_ptr = rows_at(dk_ptr, k_start, h, H * D, D)
    dv_ptr = rows_at(dv_ptr, k_start, h, H * D, D)
    shift = N - M if CAUSAL else 0
    if BIAS:
        diag_ptr += h * (2 * (reach + MARGIN) + 1)
    before, after = far_bias(diag_ptr, reach, LONG and BIAS)

    k = load_rows(k_ptr, j0, N, k_stride, BN, D, True)
    v = load_rows(v_ptr, j0, N, v_stride, BN, D, True)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)

    for EDGE in tl.static_range(0 if LONG else 1, 2):  # plain tiles, then edge tiles
        begin, stop, skip, end = query_tiles(EDGE, j0, M, shift, reach, CAUSAL, BIAS, LONG, BM, BN)
        for t in range(begin, end):
            i0 = tl.where(t < stop, t, t + skip) * BM
            rows = i0 + tl.arange(0, BM)
            q = load_rows(q_ptr, i0, M, q_stride, BM, D, EDGE)
            do = load_rows(do_ptr, i0, M, H * D, BM, D, EDGE)
            stats = load_rows(stats_ptr, i0, M, 2, BM, 2, EDGE)  # in one load
            lse, delta = tl.split(stats)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BN, BM), as both products want it
            bias = 0.0
            if EDGE:
                lse = tl.where(rows < M, lse, float("inf"))  # P = 0 past the end
                row = tl.arange(0, BM)[None, :]
                column = tl.arange(0, BN)[:, None]
                if BIAS:
                    s = add_bias(s, row, column, diag_ptr, j0 - i0 - shift, reach)
                if CAUSAL:
                    s = tl.where(column - row <= i0 + shift - j0, s, float("-inf"))
            else:
                bias = tl.where(t < stop, after, before)  # the keys lie far after early queries
            p = tl.exp2(s * LOG2E - (lse - bias)[None, :])
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            dropped = p
            if DROPOUT:
                mask = tl.trans(dropout_mask(seed, q_start + rows, h, j0, threshold, BN))
                scale = 256.0 / (256 - threshold)
                dropped = tl.where(mask, p * scale, 0.0)
                dp = tl.where(mask, dp * scale, 0.0)
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    store_rows(dk_ptr, dk, j0, N, H * D)
    store_rows(dv_ptr, dv, j0, N, H * D)
