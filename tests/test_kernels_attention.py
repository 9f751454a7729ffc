"""Attention against a plain formula, one dense sequence at a time: the output and each gradient, in every use T5 has.

The Triton kernels run compiled on a GPU and interpreted elsewhere. The interpreter's time goes by tiles, not by their
size, so most tests have a few tiles of 32 and every oddity a tile can have: sequences of length 1, shorter and longer
than a tile, M != N.
"""

import pytest
import torch
from comparing import DEVICE, DTYPES, TRITON, both, compare, forward_backward, needs_gpu, needs_triton, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from philox import mask

from kernels.buckets import relative_position_bucket
from kernels.flash_attention import CONFIGURATIONS
from kernels.launch import architecture

ROW = CONFIGURATIONS[architecture(torch.device(DEVICE))]
ENCODER, DECODER, CROSS = "encoder", "decoder", "cross"
USES = (ENCODER, DECODER, CROSS)


def set_tiles(patch, BM, BN):
    """From now on all kernels work in tiles of BM queries and BN keys (dkdv: the other way round)."""
    for kernel, size in ROW:
        tile = (BN, BM) if kernel.startswith("dkdv") else (BM, BN)
        patch.setitem(ROW, (kernel, size), dict.fromkeys((32, 64, 128), (*tile, 4, 1)))


@pytest.fixture
def tiles(monkeypatch):
    return lambda BM, BN: set_tiles(monkeypatch, BM, BN)


def cu(counts):
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(DEVICE)


def inputs(counts_q, counts_k, use, dtype=torch.float32, H=2, D=32, num_buckets=32, seed=0):
    """[q, k, v, table or None]; q, k and v are slices of one tensor where the two sides are one."""
    g = torch.Generator().manual_seed(seed)
    Tq, Tk = sum(counts_q), sum(counts_k)
    if counts_q == counts_k:
        q, k, v = (torch.randn(Tq, 3, H, D, generator=g) * 0.8).to(dtype).to(DEVICE).unbind(1)
    else:
        q, k, v = ((torch.randn(T, H, D, generator=g) * 0.8).to(dtype).to(DEVICE) for T in (Tq, Tk, Tk))
    q = q * (32 / D) ** 0.5  # scores of one size for every D, as T5's initialisation has them
    table = torch.randn(num_buckets, H, generator=g).to(DEVICE)
    return [q, k, v, None if use == CROSS or num_buckets == 0 else table]


def dense(q, k, v, table, causal, max_distance, mask):
    """One sequence, every position's bias looked up alone. mask: (H, M, N), what dropout multiplies by, or None."""
    M, N = len(q), len(k)
    i = torch.arange(M, device=q.device)[:, None] + (N - M if causal else 0)
    j = torch.arange(N, device=q.device)[None, :]
    scores = torch.einsum("mhd,nhd->hmn", q, k).to(torch.promote_types(q.dtype, torch.float32))
    if table is not None:
        bucket = relative_position_bucket(j - i, len(table), max_distance, bidirectional=not causal)
        scores = scores + table[bucket].permute(2, 0, 1)
    if causal:
        scores = scores.masked_fill(j > i, float("-inf"))
    weights = scores.softmax(-1)
    return torch.einsum("hmn,nhd->mhd", (weights if mask is None else weights * mask.to(weights)).to(v.dtype), v)


def call(ours, counts_q, counts_k, use, **options):
    """ours.attention as a function of q, k, v and table."""
    where = (cu(counts_q), cu(counts_k), use == DECODER)
    options = dict(max_seqlen_q=max(counts_q), max_seqlen_k=max(counts_k)) | options
    return lambda q, k, v, table: ours.attention(q, k, v, table, *where, **options)


def check(ours, arguments, counts_q, counts_k, use, max_distance=128, masks=None, **options):
    masks = masks or [None] * len(counts_q)

    def formula(q, k, v, table):
        parts = zip(q.split(counts_q), k.split(counts_k), v.split(counts_k), masks)
        return torch.cat([dense(*part, table, use == DECODER, max_distance, mask) for *part, mask in parts])

    compare(call(ours, counts_q, counts_k, use, max_distance=max_distance, **options), formula, arguments)


CASES = [  # use; (queries, keys) of each sequence; (BM, BN); options of `inputs`
    (ENCODER, [(1, 1)], (32, 32), {}),
    (ENCODER, [(5, 5), (70, 70), (33, 33)], (32, 32), {}),
    (ENCODER, [(70, 20), (20, 150)], (32, 64), {}),  # not in T5, but in the contract: bidirectional bias with M != N
    (DECODER, [(1, 1), (33, 33)], (32, 32), {}),
    (DECODER, [(64, 64)], (32, 32), {}),
    (DECODER, [(1, 70), (40, 41)], (32, 32), {}),  # a decoding step beside a longer one: queries are the last positions
    (DECODER, [(40, 75), (1, 2), (7, 7), (13, 30)], (32, 32), {}),
    (DECODER, [(40, 75)], (32, 64), dict(num_buckets=0)),  # causal without a table
    (CROSS, [(70, 1), (1, 70)], (32, 32), {}),
]
CASES += [(ENCODER, [(70, 70), (5, 5)], (32, 64), dict(dtype=dtype)) for dtype in DTYPES[1:]]
CASES += [(DECODER, [(70, 70), (5, 5)], (32, 64), dict(dtype=dtype)) for dtype in DTYPES[1:]]
CASES += [(CROSS, [(70, 9), (5, 66)], (32, 64), dict(dtype=dtype)) for dtype in DTYPES[1:]]
CASES += [(use, [(50, 50)], (64, 64), dict(D=D, H=1)) for D in (16, 64, 128) for use in (ENCODER, DECODER)]
# Longer than reach and tiles together: plain tiles before and after the band, and a last one cut off.
CASES += [(use, [(m, 331)], (64, 64), dict(H=1)) for use, m in ((ENCODER, 331), (DECODER, 331), (CROSS, 40))]
# Cached decoding: one query each, sequences of different lengths at once.
CASES += [(use, [(1, 1), (1, 17), (1, 1500), (1, 64)], (16, 128), dict(H=1)) for use in (DECODER, CROSS)]


@both
@pytest.mark.parametrize("use, pairs, tile, options", CASES)
def test_output_and_each_gradient(ours, use, pairs, tile, options, tiles):
    tiles(*tile)
    counts = [list(side) for side in zip(*pairs)]
    check(ours, inputs(*counts, use, **options), *counts, use)


@pytest.mark.search
@both
@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3), st.sampled_from(USES))
def test_random_lengths(ours, pairs, use):
    if use != CROSS:  # the encoder's sides are one; a decoder has as many keys as queries, or more
        pairs = [(m, m) if use == ENCODER else (min(m, n), max(m, n)) for m, n in pairs]
    counts = [list(side) for side in zip(*pairs)]
    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, 32, 32)
        check(ours, inputs(*counts, use, seed=sum(counts[0])), *counts, use)


@both
@pytest.mark.parametrize(
    "num_buckets, max_distance, use", [(32, 128, ENCODER), (8, 20, ENCODER), (64, 256, DECODER), (20, 40, DECODER)]
)
def test_buckets_at_both_ends_of_their_reach(ours, num_buckets, max_distance, use, tiles):
    """All positions alike but for the bias: an edge moved by one bucket or one distance would show."""
    N = max_distance + 40
    tiles(128, 128)
    arguments = inputs([N], [N], use, H=1, num_buckets=num_buckets)
    arguments[:2] = [0.01 * x for x in arguments[:2]]
    arguments[3] *= 3
    check(ours, arguments, [N], [N], use, max_distance=max_distance)


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (16, 64), (8, 20), (64, 256), (32, 20)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(transformers, num_buckets, max_distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    assert torch.equal(relative_position_bucket(distance, num_buckets, max_distance, bidirectional), theirs)


def dropout_masks(counts_q, counts_k, H, seed, threshold):
    """What dropout multiplies each sequence's weights by, (H, M, N), from Philox in NumPy."""
    masks, start = [], 0
    for M, N in zip(counts_q, counts_k):
        planes = [mask(seed, range(start, start + M), h, N, threshold) for h in range(H)]
        masks.append(torch.stack(planes).to(DEVICE))
        start += M
    return masks


@needs_triton
@pytest.mark.parametrize("use", USES)
def test_dropout_is_the_mask_of_philox_in_forward_and_backward(use, tiles):
    """Each gradient against a formula with the mask drawn in NumPy: were backward's another one, none would fit."""
    tiles(32, 64)
    counts = ([30, 70], [30, 70]) if use != CROSS else ([30, 20], [5, 70])
    seed = 2**40 + 12345  # beyond 32 bits
    masks = dropout_masks(*counts, H=2, seed=seed, threshold=51)  # 0.2 * 256, rounded
    check(TRITON, inputs(*counts, use), *counts, use, masks=masks, dropout_p=0.2, seed=seed)


@both
def test_dropout_keeps_its_rate_and_the_mean_of_the_weights(ours):
    counts = [120]
    q, k, _, table = inputs(counts, counts, ENCODER)
    ones = torch.ones_like(k)  # an output is then the sum of the kept weights, 1 on average
    for p in (0.1, 0.5):
        options = [dict(dropout_p=p, seed=seed) for seed in range(4)]
        outputs = [call(ours, counts, counts, ENCODER, **o)(q * 0, k, ones, table * 0) for o in options]
        deviations = (torch.stack(outputs)[..., 0].mean() - 1) / (p / (1 - p) / (4 * 2 * 120 * 120)) ** 0.5
        assert abs(deviations) < 4


@both
def test_strides_of_heads_and_tokens_in_any_order(ours):
    counts = [45]
    q, k, v, table = inputs(counts, counts, ENCODER)
    function = call(ours, counts, counts, ENCODER)
    want = forward_backward(function, [q.contiguous(), k.contiguous(), v.contiguous(), table])
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]  # heads outermost
    columns = v.transpose(1, 2).contiguous().transpose(1, 2)  # last dimension not contiguous
    for a, b in zip(forward_backward(function, [*turned, columns, table]), want):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if ours is TRITON else 1e-5)


@both
def test_confident_scores_stay_finite(ours, tiles):
    """Scores of several hundred, far above exp's range, in every tile. Their error is fp32's step at that size."""
    tiles(32, 64)
    q, k, v, table = inputs([70], [70], DECODER)
    function = call(ours, [70], [70], DECODER)
    got = forward_backward(function, [30 * q, k, v, table])
    exact = forward_backward(lambda *x: dense(*x, True, 128, None), [x.double() for x in (30 * q, k, v, table)])
    for a, b in zip(got, exact):
        assert relative_error(a, b) <= 1e-4


@both
def test_only_the_gradients_that_are_asked_for(ours):
    q, *others = inputs([20], [20], ENCODER)
    call(ours, [20], [20], ENCODER)(q.requires_grad_(), *others).sum().backward()
    assert q.grad is not None and others[2].grad is None


@both
@pytest.mark.parametrize(
    "change, word",
    [
        (dict(q=torch.zeros(5, 2, 8)), "q and k"),
        (dict(v=torch.zeros(4, 2, 32)), "v must have"),
        (dict(k=torch.zeros(5, 2, 32, dtype=torch.float16)), "one float dtype"),
        (dict(table=torch.zeros(32, 3)), "table"),
        (dict(cu_seqlens_q=torch.tensor([0, 5])), "cu_seqlens_q"),
        (dict(cu_seqlens_k=torch.tensor([0, 4], dtype=torch.int32)), "from 0 to 5"),
        (dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 5, 5], dtype=torch.int32)), "empty"),
        (dict(cu_seqlens_k=torch.tensor([0, 4, 5], dtype=torch.int32)), "cu_seqlens_k"),
        (dict(q=torch.zeros(6, 2, 32), cu_seqlens_q=torch.tensor([0, 6], dtype=torch.int32), causal=True), "causal"),
        (dict(dropout_p=1.5), "dropout"),
        (dict(max_seqlen_q=3), "max_seqlen_q must be at least 5, got 3"),
        (dict(max_distance=0), "max_distance"),
        (dict(q=torch.zeros(0, 2, 32)), "q has no tokens"),
    ],
)
def test_arguments_that_do_not_fit_are_named(ours, change, word):
    """Refused before anything is computed."""
    good = {name: torch.zeros(5, 2, 32) for name in "qkv"} | dict(table=torch.zeros(32, 2))
    good |= {f"cu_seqlens_{side}": torch.tensor([0, 5], dtype=torch.int32) for side in "qk"}
    with pytest.raises(ValueError, match=word):
        ours.attention(**(good | change))


@needs_triton
@pytest.mark.parametrize("D, dtype, word", [(24, torch.float32, "D of 16, 32"), (32, torch.float64, "float64")])
def test_head_widths_and_dtypes_without_a_kernel_are_refused(D, dtype, word):
    x, where = torch.zeros(5, 2, D, dtype=dtype), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=word):
        TRITON.attention(x, x, x, None, where, where)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("use", [pytest.param(use, marks=needs_gpu) for use in USES])
def test_full_size_in_the_tiles_that_ship(use, D, dtype, dropout_p):
    """Lengths from 1 to 4096, with dropout's mask from NumPy; every gradient; repeats bit for bit."""
    counts_q = [2048 if dropout_p else 4096, 1, 517, 64, 1023]
    counts_k = counts_q if use != CROSS else [1, 2048, 300, 65, 128]
    arguments = inputs(counts_q, counts_k, use, dtype, H=2, D=D)
    masks = dropout_masks(counts_q, counts_k, 2, 3, 26) if dropout_p else None
    check(TRITON, arguments, counts_q, counts_k, use, masks=masks, dropout_p=dropout_p, seed=3)
    function = call(TRITON, counts_q, counts_k, use, dropout_p=dropout_p, seed=3)
    first, second = (forward_backward(function, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("H, D", [pytest.param(12, 64, marks=needs_gpu)])
def test_memory_is_linear_in_length_and_the_host_never_waits(H, D):
    peaks = []
    for N in (2048, 4096):
        q, k, v = (torch.randn(2 * N, H, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        table, where = torch.randn(32, H, device=DEVICE, requires_grad=True), cu([N, N])
        for sync in ("default", "error"):  # the first run compiles and fills caches, which may wait
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode(sync)
            o = TRITON.attention(q, k, v, table, where, where, False, 0.1, None, 128, N, N)
            torch.autograd.grad(o, [q, k, v, table], torch.ones_like(o))
            torch.cuda.set_sync_debug_mode("default")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]
