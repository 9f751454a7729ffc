"""The Triton kernels of attention. flash_attention.py says what they compute, and why, and in which tiles."""

from .dropout import dropout_mask
from .launch import INTERPRETED, tl, triton

CHANGING = ["tiles", "Tq", "reach", "threshold"]  # from call to call: one compilation serves all their values
MARGIN = tl.constexpr(256)  # of diag past `reach` on each side; at least BM + BN
WIDEN = tl.constexpr(INTERPRETED)  # operands of products to fp32
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x log2 e): the hardware has a power of two only


# ---- Shared by forward and backward ---------------------------------------------------------------------------------
#
# Positions: query i of a sequence has position p = i + shift, key j position j; shift is N - M where causal, else 0.
# A tile of queries [p0, p0 + BM) and keys [j0, j0 + BN) has distances j - p from j0 - p0 - BM + 1 to j0 + BN - 1 - p0.
#
# Plain tiles have a loop and edge tiles another, each over range(begin, end): tile t up to `stop`, then tile t + skip.


@triton.jit
def key_tiles(EDGE, p0, N, reach, CAUSAL: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(begin, stop, skip, end) of the key tiles that the queries from p0 on see.

    Plain tiles are full and visible and have one bias: the first `left`, and `right` more from first_right on. Edge
    tiles lie between them and, where BN does not divide N, at the end.
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
    if EDGE:
        return left, first_right, right, (visible + BN - 1) // BN - right
    return 0, left, first_right - left, left + right


@triton.jit
def query_tiles(
    EDGE, j0, M, shift, reach, CAUSAL: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """(begin, stop, skip, end) of the query tiles that see the keys from j0 on.

    Plain tiles are full, see all the keys and have one bias: 0 .. early - 1 and late .. whole - 1. Edge tiles are
    first .. late - 1 and, where BM does not divide M, the last one.
    """
    whole = M // BM
    early, first, late = whole, whole, whole
    if BIAS or CAUSAL:
        late = tl.minimum((tl.maximum(j0 + BN - 1 + reach - shift, 0) + BM - 1) // BM, whole)
        early, first = 0, 0
    if BIAS and not CAUSAL:
        early = tl.minimum(tl.maximum(j0 - reach - shift + 1, 0) // BM, late)
        first = early
    if CAUSAL:
        first = tl.minimum(tl.maximum(j0 - shift, 0) // BM, late)
    if EDGE:
        return first, late, whole - late, late + (M + BM - 1) // BM - whole
    return 0, early, late - early, early + whole - late


@triton.jit
def rows_of(ptr, first, count, stride, ROWS: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr):
    """(ROWS, D): the rows from `first` on of a tensor whose rows are `stride` apart; MASK: 0 from row `count` on."""
    r = tl.arange(0, ROWS)[:, None]
    place = ptr + first.to(tl.int64) * stride + (r * stride + tl.arange(0, D)[None, :])
    x = tl.load(place, mask=first + r < count, other=0.0) if MASK else tl.load(place)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def add_bias(s, r, c, diag_ptr, corner, reach):
    """s plus the bias of the distances corner + c - r; r, c: places in the tile, one (n, 1), the other (1, m).

    A tile far out is moved to where all its distances are still past `reach`, and diag goes on for a MARGIN, so that
    no distance needs to be clamped.
    """
    corner = tl.minimum(tl.maximum(corner, -reach - MARGIN // 2), reach + MARGIN // 2)
    return s + tl.load(diag_ptr + (corner + reach + MARGIN) + (c.to(tl.int64) - r.to(tl.int64)))


@triton.jit
def edge_scores(s, diag_ptr, corner, keys_left, reach, CAUSAL: tl.constexpr, BIAS: tl.constexpr):
    """The scores s (BM, BN) of an edge tile with their bias, -inf where there is no key to see. corner: the distance at
    the top left of the tile."""
    r, c = tl.arange(0, s.shape[0])[:, None], tl.arange(0, s.shape[1])[None, :]
    if BIAS:
        s = add_bias(s, r, c, diag_ptr, corner, reach)
    visible = c < keys_left
    if CAUSAL:
        visible = visible & (c - r <= -corner)
    return tl.where(visible, s, float("-inf"))


# ---- Forward --------------------------------------------------------------------------------------------------------
#
# Per query: m the largest score so far, l = sum 2^(s - m), acc = sum 2^(s - m) v, s the score times log2 e. A tile with
# a larger score first shrinks l and acc by 2^(old m - new m). At the end o = acc / l, lse = m + log2 l.
# Dropout acts on P after the softmax: l sums all weights, acc the kept ones, and 1 / keep enters once, at the end.


@triton.jit(do_not_specialize=CHANGING)
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, diag_ptr,
    o_ptr,  # (Tq, H, D), contiguous
    lse_ptr,  # (H, Tq) fp32
    cu_q_ptr, cu_k_ptr,
    seed_ptr,  # (1,) int64
    tiles,  # query tiles of the longest sequence
    Tq, H, q_stride, q_head, k_stride, k_head, v_stride, v_head, reach, threshold,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    i0 = tl.program_id(0) % tiles * BM
    q_start, k_start = tl.load(cu_q_ptr + b), tl.load(cu_k_ptr + b)
    M, N = tl.load(cu_q_ptr + b + 1) - q_start, tl.load(cu_k_ptr + b + 1) - k_start
    if i0 >= M:
        return
    q_ptr += q_start.to(tl.int64) * q_stride + h.to(tl.int64) * q_head
    k_ptr += k_start.to(tl.int64) * k_stride + h.to(tl.int64) * k_head
    v_ptr += k_start.to(tl.int64) * v_stride + h.to(tl.int64) * v_head
    diag_ptr += h * (2 * (reach + MARGIN) + 1)
    rows = i0 + tl.arange(0, BM)
    p0 = i0 + (N - M if CAUSAL else 0)

    q = rows_of(q_ptr, i0, M, q_stride, BM, D, True)
    acc = tl.zeros([BM, D], tl.float32)
    l = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    before = tl.load(diag_ptr) * LOG2E if BIAS else 0.0
    after = tl.load(diag_ptr + 2 * (reach + MARGIN)) * LOG2E if BIAS else 0.0

    for EDGE in tl.static_range(2):  # plain tiles, then edge tiles
        begin, stop, skip, end = key_tiles(EDGE, p0, N, reach, CAUSAL, BIAS, BM, BN)
        for t in range(begin, end):
            j0 = tl.where(t < stop, t, t + skip) * BN
            k = rows_of(k_ptr, j0, N, k_stride, BN, D, EDGE)
            v = rows_of(v_ptr, j0, N, v_stride, BN, D, EDGE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if EDGE:
                s = edge_scores(s, diag_ptr, j0 - p0, N - j0, reach, CAUSAL, BIAS)
            bias = 0.0 if EDGE else tl.where(t < stop, before, after)  # of the whole tile, times log2 e
            higher = tl.maximum(m, tl.max(s, 1) * LOG2E + bias)
            p = tl.exp2(s * LOG2E - (higher - bias)[:, None])  # one multiplication and addition, fused
            shrink = tl.exp2(m - higher)
            l = l * shrink + tl.sum(p, 1)
            m = higher
            if DROPOUT:
                p = tl.where(dropout_mask(seed, q_start + rows, h, j0, threshold, BN), p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")

    if DROPOUT:
        acc *= 256.0 / (256 - threshold)
    tl.store(lse_ptr + h * Tq + q_start + rows, m + tl.log2(l), mask=rows < M)
    o_ptr += (q_start.to(tl.int64) * H + h) * D
    o = (acc / l[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + rows[:, None] * (H * D) + tl.arange(0, D)[None, :], o, mask=rows[:, None] < M)


# ---- Backward -------------------------------------------------------------------------------------------------------
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
# top left corner of the tile), or on s - BN, s - 2 BN, ... where the column has wrapped round once, twice, ... The sums
# are added to their buckets by comparison with 0, 1, 2, ... A program writes the sums of its query tile, PyTorch adds
# those of all tiles, all in fp32. A bucket that no distance has gets exactly 0.


@triton.jit
def add_diagonals(sums, ds, lut_ptr, corner, reach):
    """sums (1, BUCKETS) + those of an edge tile ds (BM, BN), whose top left corner has the distance `corner`."""
    BM: tl.constexpr = ds.shape[0]
    BN: tl.constexpr = ds.shape[1]
    corner = tl.minimum(tl.maximum(corner, -reach - MARGIN // 2), reach + MARGIN // 2)  # as in add_bias
    lut_ptr += corner + reach + MARGIN + tl.arange(0, BN)
    place = tl.arange(0, BM)[:, None] + tl.arange(0, BN)[None, :]  # r + s
    skewed = tl.gather(ds, place % BN, 1)
    bucket = tl.arange(0, sums.shape[1])[None, :]
    here = tl.zeros([BN, sums.shape[1]], tl.float32)
    for wraps in tl.static_range((BM + BN - 2) // BN + 1):
        of_diagonal = tl.sum(tl.where(place // BN == wraps, skewed, 0.0), 0)  # (BN,)
        here += tl.where(tl.load(lut_ptr - wraps * BN)[:, None] == bucket, of_diagonal[:, None], 0.0)
    return sums + tl.sum(here, 0)[None, :]


@triton.jit(do_not_specialize=CHANGING)
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, diag_ptr,
    lut_ptr,  # (2 (reach + MARGIN) + 1,) int32, the bucket of each distance
    o_ptr, do_ptr, dq_ptr,  # (Tq, H, D), contiguous
    lse_ptr,
    stats_ptr,  # (H, Tq, 2) fp32: lse and delta, written here for attention_dkdv_kernel
    partial_ptr,  # (programs, H, BUCKETS) fp32
    cu_q_ptr, cu_k_ptr, seed_ptr,  # as in forward
    tiles, Tq, H, q_stride, q_head, k_stride, k_head, v_stride, v_head, reach, threshold,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, TABLE_GRADIENT: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    BUCKETS: tl.constexpr,  # a power of two
):  # fmt: skip
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    i0 = tl.program_id(0) % tiles * BM
    q_start, k_start = tl.load(cu_q_ptr + b), tl.load(cu_k_ptr + b)
    M, N = tl.load(cu_q_ptr + b + 1) - q_start, tl.load(cu_k_ptr + b + 1) - k_start
    partial_ptr += (tl.program_id(0).to(tl.int64) * H + h) * BUCKETS + tl.arange(0, BUCKETS)[None, :]
    if i0 >= M:
        if TABLE_GRADIENT:
            tl.store(partial_ptr, tl.zeros([1, BUCKETS], tl.float32))
        return
    q_ptr += q_start.to(tl.int64) * q_stride + h.to(tl.int64) * q_head
    k_ptr += k_start.to(tl.int64) * k_stride + h.to(tl.int64) * k_head
    v_ptr += k_start.to(tl.int64) * v_stride + h.to(tl.int64) * v_head
    here = (q_start.to(tl.int64) * H + h) * D
    diag_ptr += h * (2 * (reach + MARGIN) + 1)
    rows = i0 + tl.arange(0, BM)
    p0 = i0 + (N - M if CAUSAL else 0)

    q = rows_of(q_ptr, i0, M, q_stride, BM, D, True)
    do = rows_of(do_ptr + here, i0, M, H * D, BM, D, True)
    o = rows_of(o_ptr + here, i0, M, H * D, BM, D, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + h * Tq + q_start + rows, mask=rows < M, other=float("inf"))  # P = 0 past the end
    stats_ptr += 2 * (h * Tq + q_start + rows)
    tl.store(stats_ptr, lse, mask=rows < M)
    tl.store(stats_ptr + 1, delta, mask=rows < M)
    dq = tl.zeros([BM, D], tl.float32)
    before = tl.load(diag_ptr) * LOG2E if BIAS else 0.0
    after = tl.load(diag_ptr + 2 * (reach + MARGIN)) * LOG2E if BIAS else 0.0
    sum_before = tl.zeros([BM], tl.float32)
    sum_after = tl.zeros([BM], tl.float32)
    sums = tl.zeros([1, BUCKETS], tl.float32)

    for EDGE in tl.static_range(2):  # plain tiles, then edge tiles
        begin, stop, skip, end = key_tiles(EDGE, p0, N, reach, CAUSAL, BIAS, BM, BN)
        for t in range(begin, end):
            j0 = tl.where(t < stop, t, t + skip) * BN
            k = rows_of(k_ptr, j0, N, k_stride, BN, D, EDGE)
            v = rows_of(v_ptr, j0, N, v_stride, BN, D, EDGE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if EDGE:
                s = edge_scores(s, diag_ptr, j0 - p0, N - j0, reach, CAUSAL, BIAS)
            bias = 0.0 if EDGE else tl.where(t < stop, before, after)
            p = tl.exp2(s * LOG2E - (lse - bias)[:, None])  # 0 where s is -inf
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if DROPOUT:
                mask = dropout_mask(seed, q_start + rows, h, j0, threshold, BN)
                dp = tl.where(mask, dp * (256.0 / (256 - threshold)), 0.0)
            ds = p * (dp - delta[:, None])
            if TABLE_GRADIENT and not EDGE:
                of_row = tl.sum(ds, 1)
                sum_before += tl.where(t < stop, of_row, 0.0)
                sum_after += tl.where(t < stop, 0.0, of_row)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
            if TABLE_GRADIENT and EDGE:
                sums = add_diagonals(sums, ds, lut_ptr, j0 - p0, reach)

    dq_ptr += here
    dq = dq.to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + rows[:, None] * (H * D) + tl.arange(0, D)[None, :], dq, mask=rows[:, None] < M)
    if TABLE_GRADIENT:
        bucket = tl.arange(0, BUCKETS)[None, :]
        sums += tl.where(bucket == tl.load(lut_ptr), tl.sum(sum_before, 0), 0.0)
        sums += tl.where(bucket == tl.load(lut_ptr + 2 * (reach + MARGIN)), tl.sum(sum_after, 0), 0.0)
        tl.store(partial_ptr, sums)


@triton.jit(do_not_specialize=CHANGING)
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, diag_ptr,
    do_ptr,  # (Tq, H, D), contiguous
    dk_ptr, dv_ptr,  # (Tk, H, D), contiguous
    stats_ptr, cu_q_ptr, cu_k_ptr, seed_ptr,
    tiles,  # key tiles of the longest sequence
    Tq, H, q_stride, q_head, k_stride, k_head, v_stride, v_head, reach, threshold,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    j0 = tl.program_id(0) % tiles * BN
    q_start, k_start = tl.load(cu_q_ptr + b), tl.load(cu_k_ptr + b)
    M, N = tl.load(cu_q_ptr + b + 1) - q_start, tl.load(cu_k_ptr + b + 1) - k_start
    if j0 >= N:
        return
    q_ptr += q_start.to(tl.int64) * q_stride + h.to(tl.int64) * q_head
    k_ptr += k_start.to(tl.int64) * k_stride + h.to(tl.int64) * k_head
    v_ptr += k_start.to(tl.int64) * v_stride + h.to(tl.int64) * v_head
    do_ptr += (q_start.to(tl.int64) * H + h) * D
    stats_ptr += 2 * (h * Tq + q_start)
    diag_ptr += h * (2 * (reach + MARGIN) + 1)
    keys = j0 + tl.arange(0, BN)
    shift = N - M if CAUSAL else 0

    k = rows_of(k_ptr, j0, N, k_stride, BN, D, True)
    v = rows_of(v_ptr, j0, N, v_stride, BN, D, True)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    before = tl.load(diag_ptr) * LOG2E if BIAS else 0.0
    after = tl.load(diag_ptr + 2 * (reach + MARGIN)) * LOG2E if BIAS else 0.0

    for EDGE in tl.static_range(2):  # plain tiles, then edge tiles
        begin, stop, skip, end = query_tiles(EDGE, j0, M, shift, reach, CAUSAL, BIAS, BM, BN)
        for t in range(begin, end):
            i0 = tl.where(t < stop, t, t + skip) * BM
            rows = i0 + tl.arange(0, BM)
            q = rows_of(q_ptr, i0, M, q_stride, BM, D, EDGE)
            do = rows_of(do_ptr, i0, M, H * D, BM, D, EDGE)
            stats = rows_of(stats_ptr, i0, M, 2, BM, 2, EDGE)  # two loads would be 32 copies of 4 bytes (triton 3.6)
            lse, delta = tl.split(stats)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BN, BM), as both products want it
            if EDGE:
                lse = tl.where(rows < M, lse, float("inf"))  # P = 0 past the end
                r, c = tl.arange(0, BM)[None, :], tl.arange(0, BN)[:, None]
                if BIAS:
                    s = add_bias(s, r, c, diag_ptr, j0 - i0 - shift, reach)
                if CAUSAL:
                    s = tl.where(c - r <= i0 + shift - j0, s, float("-inf"))
            bias = 0.0 if EDGE else tl.where(t < stop, after, before)  # for early queries the keys lie far after
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

    here = k_start.to(tl.int64) * H * D + h * D + keys[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + here, dk.to(dk_ptr.dtype.element_ty), mask=keys[:, None] < N)
    tl.store(dv_ptr + here, dv.to(dv_ptr.dtype.element_ty), mask=keys[:, None] < N)
