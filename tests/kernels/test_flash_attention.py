"""Attention against a plain formula, one dense sequence at a time: the output and each gradient.

The Triton kernels run compiled on a GPU and interpreted elsewhere. The interpreter's time goes by
tiles, whatever their size, so most tests have few of them, and every oddity a tile can have:
sequences of length 1, shorter and longer than a tile, M != N.
"""

import pytest
import torch
from comparing import (
    DEVICE,
    DTYPES,
    REFERENCE,
    TRITON,
    both,
    compare,
    forward_backward,
    needs_gpu,
    needs_triton,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from philox import mask

from kernels import flash_attention
from kernels.buckets import relative_position_bucket
from kernels.flash_attention import bias_by_distance, make_tiles

ENCODER, DECODER, CROSS = "encoder", "decoder", "cross"
USES = (ENCODER, DECODER, CROSS)


def cu(counts):
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(DEVICE)


def inputs(counts_q, counts_k, use, dtype=torch.float32, H=2, D=32, num_buckets=32, seed=0):
    """[q, k, v, table or None]; k and v are slices of one tensor."""
    g = torch.Generator().manual_seed(seed)

    def draw(tokens):
        return (torch.randn(tokens, 3, H, D, generator=g) * 0.8).to(dtype).to(DEVICE).unbind(1)

    q = draw(sum(counts_q))[0] * (32 / D) ** 0.5  # scores of one size for every D
    k, v, _ = draw(sum(counts_k))
    table = torch.randn(num_buckets, H, generator=g).to(DEVICE)
    return [q, k, v, None if use == CROSS or num_buckets == 0 else table]


def dense(q, k, v, table, causal, max_distance, mask):
    """One sequence, every position's bias looked up alone.

    mask: (H, M, N), what dropout multiplies the weights by, or None.
    """
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
    if mask is not None:
        weights = weights * mask.to(weights)
    return torch.einsum("hmn,nhd->mhd", weights.to(v.dtype), v)


def call(ours, counts_q, counts_k, use, size=None, **options):
    """ours.attention as a function of q, k, v and table, in tiles of this size."""
    cu_q = cu(counts_q)
    cu_k = cu(counts_k)
    if size is not None:
        options["tiles_q"] = make_tiles(cu_q, sum(counts_q), *size)
        options["tiles_k"] = make_tiles(cu_k, sum(counts_k), *size)
    return lambda q, k, v, table: ours.attention(
        q, k, v, table, cu_q, cu_k, use == DECODER, **options
    )


def check(ours, arguments, counts_q, counts_k, use, max_distance=128, masks=None, **options):
    masks = masks or [None] * len(counts_q)

    def formula(q, k, v, table):
        parts = zip(q.split(counts_q), k.split(counts_k), v.split(counts_k), masks)
        return torch.cat(
            [dense(*part, table, use == DECODER, max_distance, mask) for *part, mask in parts]
        )

    compare(
        call(ours, counts_q, counts_k, use, max_distance=max_distance, **options),
        formula,
        arguments,
    )


CASES = [  # use; (queries, keys) of each sequence; rows of a tile; options of `inputs`
    (ENCODER, [(1, 1)], (16, 32), {}),
    (ENCODER, [(5, 5), (40, 40)], (16, 32), {}),
    (ENCODER, [(70, 20), (20, 70)], (32, 64), {}),  # M != N is in the contract, if not in T5
    (DECODER, [(1, 1), (33, 33)], (16, 16), {}),
    (DECODER, [(64, 64)], (64, 64), {}),
    (DECODER, [(40, 75), (1, 2), (13, 30)], (64, 64), {}),  # queries are the last positions
    (DECODER, [(40, 41)], (32, 64), dict(num_buckets=0)),  # causal without a table
    (CROSS, [(70, 1), (1, 70)], (16, 64), {}),
]
CASES += [(ENCODER, [(70, 70), (5, 5)], (64, 64), dict(dtype=dtype, H=1)) for dtype in DTYPES[1:]]
CASES += [(DECODER, [(30, 30), (5, 5)], (16, 16), dict(dtype=dtype, H=1)) for dtype in DTYPES[1:]]
CASES += [(use, [(50, 50)], (64, 64), dict(D=D, H=1)) for D in (16, 128) for use in USES[:2]]
# Longer than reach and tiles together: plain tiles before and after the band, and a last one cut
# off. In small tiles the same lengths have edge tiles alone.
LONG = [(ENCODER, 265), (DECODER, 265), (CROSS, 40)]
CASES += [(use, [(m, 265)], (64, 64), dict(H=1)) for use, m in LONG]
CASES += [(use, [(16, 201)], (16, 64), dict(H=1)) for use in (ENCODER, DECODER)]
# Cached decoding: one query each, sequences of different lengths at once.
CASES += [(use, [(1, 1), (1, 17), (1, 201)], (64, 64), dict(H=1)) for use in (DECODER, CROSS)]


@both
@pytest.mark.parametrize("use, pairs, size, options", CASES)
def test_output_and_each_gradient(ours, use, pairs, size, options):
    counts = [list(side) for side in zip(*pairs)]
    check(ours, inputs(*counts, use, **options), *counts, use, size=size)


@pytest.mark.search
@both
@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3),
    st.sampled_from(USES),
    st.sampled_from([(32, 32), (32, 64), (64, 32), (64, 64)]),
)
def test_random_lengths_and_tiles(ours, pairs, use, size):
    if use == ENCODER:
        pairs = [(m, m) for m, n in pairs]
    if use == DECODER:  # as many keys as queries, or more
        pairs = [(min(m, n), max(m, n)) for m, n in pairs]
    counts = [list(side) for side in zip(*pairs)]
    check(ours, inputs(*counts, use, seed=sum(counts[0])), *counts, use, size=size)


@needs_triton
@pytest.mark.parametrize("use", [DECODER, CROSS])
def test_what_is_prepared_once_a_batch_changes_no_bit(use):
    """Tiles, also from a list that a CUDA graph has padded, and the bias of each distance."""
    counts = [64, 3]
    cu_seqlens = cu(counts)
    q, k, v, table = inputs(counts, counts, use, H=1)
    tiles = make_tiles(cu_seqlens, sum(counts), exact=False)
    assert len(tiles.keys) > len(make_tiles(cu_seqlens.cpu(), sum(counts)).keys)
    options = dict(tiles_q=tiles, tiles_k=tiles, dropout_p=0.1, seed=5)
    if table is not None:
        options["diag"] = bias_by_distance(table, use == DECODER)
    plain = call(TRITON, counts, counts, use, dropout_p=0.1, seed=5)
    prepared = call(TRITON, counts, counts, use, **options)
    first = forward_backward(plain, [q, k, v, table])
    again = forward_backward(prepared, [q, k, v, table])
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=9), st.sampled_from([16, 32, 64]))
def test_tiles_cover_each_token_once(counts, rows):
    tiles = make_tiles(cu(counts).cpu(), sum(counts), rows, rows)
    assert torch.equal(tiles.queries, tiles.keys)
    want = [[b, first] for b, n in enumerate(counts) for first in range(0, n, rows)]
    assert tiles.keys.tolist() == want
    padded = make_tiles(cu(counts).cpu(), sum(counts), rows, rows, exact=False)
    assert len(padded.keys) == sum(counts) // rows + len(counts), "whatever the lengths are"
    assert torch.equal(padded.keys[: len(want)], tiles.keys)


def test_short_sequences_get_small_tiles(monkeypatch):
    """Chosen from the mean length, of which no value has to be read from the device."""
    monkeypatch.setattr(flash_attention, "INTERPRETED", False)
    for mean, rows in ((4, (16, 16)), (40, (16, 32)), (500, (64, 64))):
        tiles = make_tiles(cu([2 * mean - 2, 2]).cpu(), 2 * mean)
        assert (tiles.query_rows, tiles.key_rows) == rows


@needs_triton
@pytest.mark.parametrize(
    "num_buckets, max_distance, use",
    [(32, 128, ENCODER), (8, 20, ENCODER), (20, 40, DECODER)],
)
def test_buckets_at_both_ends_of_their_reach(num_buckets, max_distance, use):
    """All positions alike but for the bias: an edge moved by one distance would show."""
    N = max_distance + 40
    arguments = inputs([N], [N], use, H=1, num_buckets=num_buckets)
    arguments[:2] = [0.01 * x for x in arguments[:2]]
    arguments[3] *= 3
    check(TRITON, arguments, [N], [N], use, max_distance=max_distance)


def dropout_masks(counts_q, counts_k, H, seed, threshold):
    """What dropout multiplies each sequence's weights by, (H, M, N), from Philox in NumPy."""
    masks, start = [], 0
    for M, N in zip(counts_q, counts_k):
        planes = [mask(seed, range(start, start + M), h, N, threshold) for h in range(H)]
        masks.append(torch.stack(planes).to(DEVICE))
        start += M
    return masks


@needs_triton
@pytest.mark.parametrize(
    "use, size",
    [(DECODER, (16, 16)), (ENCODER, (16, 32)), (ENCODER, (64, 64)), (CROSS, (32, 64))],
)
def test_dropout_is_the_mask_of_philox_in_forward_and_backward(use, size):
    """In tiles of each size: the mask is drawn in NumPy, so another one in backward would show."""
    counts = ([17, 20], [5, 40] if use == CROSS else [17, 20])
    seed = 2**40 + 12345  # beyond 32 bits
    masks = dropout_masks(*counts, H=1, seed=seed, threshold=51)  # 0.2 * 256, rounded
    options = dict(masks=masks, dropout_p=0.2, seed=seed, size=size)
    check(TRITON, inputs(*counts, use, H=1), *counts, use, **options)


def test_dropout_of_the_reference_keeps_the_mean_of_the_weights():
    q, k, _, table = inputs([120], [120], ENCODER)
    ones = torch.ones_like(k)  # an output is then the sum of the kept weights, 1 on average
    function = call(REFERENCE, [120], [120], ENCODER, dropout_p=0.5, seed=1)
    sums = function(0 * q, k, ones, 0 * table)[..., 0]
    assert abs(sums.mean() - 1) < 4 / (2 * 120 * 120) ** 0.5
    assert sums.std() > 0.01


@both
def test_inputs_of_any_strides(ours):
    q, k, v, table = inputs([20], [20], ENCODER, H=1)
    function = call(ours, [20], [20], ENCODER)
    want = forward_backward(function, [q.contiguous(), k.contiguous(), v.contiguous(), table])
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    for a, b in zip(forward_backward(function, [*turned, table]), want):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if ours is TRITON else 1e-5)


@both
def test_confident_scores_stay_finite(ours):
    """Scores of several hundred, far above exp's range. Their error is fp32's step at that size."""
    q, k, v, table = inputs([40], [40], DECODER, H=1)
    function = call(ours, [40], [40], DECODER, size=(32, 64))
    got = forward_backward(function, [30 * q, k, v, table])
    exact_inputs = [x.double() for x in (30 * q, k, v, table)]
    exact = forward_backward(lambda *x: dense(*x, True, 128, None), exact_inputs)
    for a, b in zip(got, exact):
        assert relative_error(a, b) <= 1e-4


@both
def test_only_the_gradients_that_are_asked_for(ours):
    q, *others = inputs([20], [20], ENCODER)
    call(ours, [20], [20], ENCODER)(q.requires_grad_(), *others).sum().backward()
    assert q.grad is not None and others[2].grad is None


WRONG = [
    (dict(q=torch.zeros(5, 2, 8)), "q, k and v must be"),
    (dict(v=torch.zeros(4, 2, 32)), "q, k and v must be"),
    (dict(k=torch.zeros(5, 2, 32, dtype=torch.float16)), "of one float dtype"),
    (dict(table=torch.zeros(32, 3)), "table must be"),
    (dict(cu_seqlens_q=torch.tensor([0, 5])), "cu_seqlens_q must be .* int32"),
    (dict(cu_seqlens_k=torch.tensor([0, 4, 5]).int()), "cu_seqlens_k must be"),
    (dict(cu_seqlens_k=torch.tensor([0, 4]).int()), "cu_seqlens_k must run from 0 to 5"),
    (dict.fromkeys(["cu_seqlens_q", "cu_seqlens_k"], torch.tensor([0, 5, 5]).int()), "empty"),
    (dict(q=torch.zeros(6, 2, 32), cu_seqlens_q=torch.tensor([0, 6]).int(), causal=True), "causal"),
    (dict(dropout_p=1.5), "dropout"),
    (dict(q=torch.zeros(0, 2, 32)), "from 0 to 0"),
]


@both
@pytest.mark.parametrize("change, word", WRONG)
def test_arguments_that_do_not_fit_are_named(ours, change, word):
    """Refused before anything is computed."""
    good = {name: torch.zeros(5, 2, 32) for name in "qkv"} | dict(table=torch.zeros(32, 2))
    good |= {f"cu_seqlens_{side}": torch.tensor([0, 5], dtype=torch.int32) for side in "qk"}
    with pytest.raises(ValueError, match=f"attention: .*{word}|{word}_p must be"):
        ours.attention(**(good | change))


@needs_triton
@pytest.mark.parametrize(
    "D, dtype, word", [(24, torch.float32, "D of 16, 32"), (32, torch.float64, "float64")]
)
def test_head_widths_and_dtypes_without_a_kernel_are_refused(D, dtype, word):
    x, where = torch.zeros(5, 2, D, dtype=dtype), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=word):
        TRITON.attention(x, x, x, None, where, where)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("use", [pytest.param(use, marks=needs_gpu) for use in USES])
def test_full_size_in_the_tiles_that_ship(use, D, dtype, dropout_p):
    """Lengths from 1 to 4096, with dropout's mask from NumPy; every gradient; equal repeats."""
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
        q, k, v = (
            torch.randn(2 * N, H, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        table, where = torch.randn(32, H, device=DEVICE, requires_grad=True), cu([N, N])
        for sync in ("default", "error"):  # the first run compiles and fills caches, which may wait
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode(sync)
            o = TRITON.attention(q, k, v, table, where, where, False, 0.1)
            torch.autograd.grad(o, [q, k, v, table], torch.ones_like(o))
            torch.cuda.set_sync_debug_mode("default")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]
