# ruff: noqa: ANN001, ANN201
"""The Triton kernels of attention; flash_attention.py explains what they compute.

Triton reads the annotations of a kernel: nothing but tl.constexpr may stand there.
"""

from . import buckets
from .dropout import dropout_mask
from .launch import INTERPRETED, tl, triton

VARYING = ["Tq", "reach", "threshold"]  # change often: one compilation serves all values
MARGIN = tl.constexpr(buckets.MARGIN)
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
def tile_range(EDGE, p0, count, diag_ptr, reach, OF_KEYS, CAUSAL, LONG, ROWS, STEP):
    """(begin, stop, skip, end) of the tiles, of STEP tokens, that a program walks along.

    The program has ROWS queries, and the tiles hold the `count` keys, or the reverse if OF_KEYS.
    p0: the token of the tiles' side that has distance 0 from the program's first.
    """
    # In sight are first .. last - 1. Plain (P) are those before `left`, and those from `right` up
    # to `whole`; all others are edge tiles (E): near the query, where the bias changes from token
    # to token, and a last one that the end of the sequence cuts off.
    #
    #     encoder     P P P P E E E P P P E        decoder, keys       P P P P E E
    #                 |       |     |     | |      decoder, OF_KEYS    E E P P P P E
    #             first    left right whole last
    first = 0
    last = (count + STEP - 1) // STEP
    if CAUSAL and OF_KEYS:
        first = tl.maximum(p0, 0) // STEP
    if CAUSAL and not OF_KEYS:
        last = tl.minimum(last, (p0 + ROWS + STEP - 1) // STEP)
    whole = tl.minimum(count // STEP, last)
    left = first
    right = whole
    if LONG:
        if diag_ptr is None and not CAUSAL:
            left = whole
        elif not (CAUSAL and OF_KEYS):
            left = tl.minimum(tl.maximum(p0 - reach + 1, 0) // STEP, whole)
        if OF_KEYS or not CAUSAL:
            near = tl.maximum(p0 + ROWS - 1 + reach, 0)
            right = tl.maximum(tl.minimum((near + STEP - 1) // STEP, whole), left)
    if EDGE:
        return left, right, whole - right, last - whole + right
    return first, left, right - left, left + whole - right


@triton.jit
def place_of(ptr, start, first, h, H, ROWS, D):
    """Where rows (ROWS, D) of head h are, from row `first` of a sequence on. May need 64 bits."""
    ptr += ((start + first).to(tl.int64) * H + h) * D
    return ptr + (tl.arange(0, ROWS)[:, None] * (H * D) + tl.arange(0, D)[None, :])


@triton.jit
def load_rows(ptr, start, first, count, h, H, ROWS, D, MASK):
    """MASK: 0 from row `count` on."""
    place = place_of(ptr, start, first, h, H, ROWS, D)
    if MASK:
        x = tl.load(place, mask=first + tl.arange(0, ROWS)[:, None] < count, other=0.0)
    else:
        x = tl.load(place)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def store_rows(ptr, x, start, first, count, h, H):
    """All but the rows from `count` on."""
    place = place_of(ptr, start, first, h, H, x.shape[0], x.shape[1])
    row = first + tl.arange(0, x.shape[0])[:, None]
    tl.store(place, x.to(ptr.dtype.element_ty), mask=row < count)


@triton.jit
def at_distance(ptr, h, corner, reach):
    """Where row h of `diag` or of `lut` has the distance of a tile's corner.

    Or one whose tile has the same buckets: the rows hold MARGIN distances beyond `reach` only.
    """
    corner = tl.minimum(tl.maximum(corner, -reach - MARGIN // 2), reach + MARGIN // 2)
    return ptr + (h * (2 * (reach + MARGIN) + 1) + corner + reach + MARGIN)


@triton.jit
def tile_scores(a, b, diag_ptr, h, corner, keys, reach, EDGE, OF_KEYS, CAUSAL):
    """(a b^T, bias). In an edge tile the scores have their bias, and -inf for a key out of sight.

    In a plain tile, `bias` is that of the whole tile, times log2 e. a: queries, and b: keys, of
    which `keys` are left; the reverse if OF_KEYS. Then keys past the end are not masked: what
    they get is not stored.
    """
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    bias = 0.0
    if diag_ptr is not None:
        diag_ptr = at_distance(diag_ptr, h, corner, reach)
    if EDGE:
        row = tl.arange(0, a.shape[0])[:, None]
        column = tl.arange(0, b.shape[0])[None, :]
        distance = row - column if OF_KEYS else column - row  # from the corner's
        if diag_ptr is not None:
            s += tl.load(diag_ptr + distance.to(tl.int64))
        if CAUSAL:
            s = tl.where(distance <= -corner, s, float("-inf"))
        if not OF_KEYS:
            s = tl.where(column < keys, s, float("-inf"))
    elif diag_ptr is not None:
        bias = tl.load(diag_ptr) * LOG2E
    return s, bias


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
    Tq, H, reach, threshold,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, LONG: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    i0, q_start, M, k_start, N = locate(tiles_ptr, cu_q_ptr, cu_k_ptr)
    if i0 >= M:
        return
    seed = tl.load(seed_ptr) if DROPOUT else 0
    p0 = i0 + (N - M if CAUSAL else 0)

    q = load_rows(q_ptr, q_start, i0, M, h, H, BM, D, True)
    rows = i0 + tl.arange(0, BM)
    acc = tl.zeros([BM, D], tl.float32)
    l = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)

    for EDGE in tl.static_range(0 if LONG else 1, 2):  # plain tiles, then edge tiles
        begin, stop, skip, end = tile_range(
            EDGE, p0, N, diag_ptr, reach, False, CAUSAL, LONG, BM, BN
        )
        for t in range(begin, end):
            j0 = tl.where(t < stop, t, t + skip) * BN
            k = load_rows(k_ptr, k_start, j0, N, h, H, BN, D, EDGE)
            v = load_rows(v_ptr, k_start, j0, N, h, H, BN, D, EDGE)
            s, bias = tile_scores(q, k, diag_ptr, h, j0 - p0, N - j0, reach, EDGE, False, CAUSAL)
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
    store_rows(o_ptr, acc / l[:, None], q_start, i0, M, h, H)


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
    lut_ptr = at_distance(lut_ptr, 0, corner, reach) + tl.arange(0, BN)
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
    delta_ptr,  # (H, Tq) fp32, written here for attention_dkdv_kernel
    partial_ptr,  # (programs, H, BUCKETS) fp32
    tiles_ptr, cu_q_ptr, cu_k_ptr, seed_ptr,  # as in forward
    Tq, H, reach, threshold,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, LONG: tl.constexpr,
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
        N = 0  # sees no key, and its sums are 0
    seed = tl.load(seed_ptr) if DROPOUT else 0
    p0 = i0 + (N - M if CAUSAL else 0)

    q = load_rows(q_ptr, q_start, i0, M, h, H, BM, D, True)
    do = load_rows(do_ptr, q_start, i0, M, h, H, BM, D, True)
    o = load_rows(o_ptr, q_start, i0, M, h, H, BM, D, True)
    rows = i0 + tl.arange(0, BM)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    place = h * Tq + q_start + rows
    lse = tl.load(lse_ptr + place, mask=rows < M, other=float("inf"))  # P = 0 past the end
    tl.store(delta_ptr + place, delta, mask=rows < M)
    dq = tl.zeros([BM, D], tl.float32)

    for EDGE in tl.static_range(0 if LONG else 1, 2):  # plain tiles, then edge tiles
        begin, stop, skip, end = tile_range(
            EDGE, p0, N, diag_ptr, reach, False, CAUSAL, LONG, BM, BN
        )
        for t in range(begin, end):
            j0 = tl.where(t < stop, t, t + skip) * BN
            k = load_rows(k_ptr, k_start, j0, N, h, H, BN, D, EDGE)
            v = load_rows(v_ptr, k_start, j0, N, h, H, BN, D, EDGE)
            s, bias = tile_scores(q, k, diag_ptr, h, j0 - p0, N - j0, reach, EDGE, False, CAUSAL)
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

    store_rows(dq_ptr, dq, q_start, i0, M, h, H)
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
    lse_ptr, delta_ptr,
    tiles_ptr,  # of the keys
    cu_q_ptr, cu_k_ptr, seed_ptr,
    Tq, H, reach, threshold,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, LONG: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    j0, q_start, M, k_start, N = locate(tiles_ptr, cu_q_ptr, cu_k_ptr)
    if j0 >= N:
        return
    seed = tl.load(seed_ptr) if DROPOUT else 0
    p0 = j0 - (N - M if CAUSAL else 0)

    k = load_rows(k_ptr, k_start, j0, N, h, H, BN, D, True)
    v = load_rows(v_ptr, k_start, j0, N, h, H, BN, D, True)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)

    for EDGE in tl.static_range(0 if LONG else 1, 2):  # plain tiles, then edge tiles
        begin, stop, skip, end = tile_range(
            EDGE, p0, M, diag_ptr, reach, True, CAUSAL, LONG, BN, BM
        )
        for t in range(begin, end):
            i0 = tl.where(t < stop, t, t + skip) * BM
            rows = i0 + tl.arange(0, BM)
            q = load_rows(q_ptr, q_start, i0, M, h, H, BM, D, EDGE)
            do = load_rows(do_ptr, q_start, i0, M, h, H, BM, D, EDGE)
            place = h * Tq + q_start + rows
            lse = tl.load(lse_ptr + place, mask=rows < M, other=float("inf"))
            delta = tl.load(delta_ptr + place, mask=rows < M, other=0.0)
            s, bias = tile_scores(  # (BN, BM), as both products want it
                k, q, diag_ptr, h, p0 - i0, N - j0, reach, EDGE, True, CAUSAL
            )
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

    store_rows(dk_ptr, dk, k_start, j0, N, h, H)
    store_rows(dv_ptr, dv, k_start, j0, N, h, H)
