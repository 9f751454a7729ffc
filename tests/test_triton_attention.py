"""The attention kernels against an independent fp64 computation: the output and each gradient, in every use T5 has.

Interpreted on the CPU, compiled on a GPU. The interpreter's time goes by tiles, not by their size, so most tests have a
few tiles of 32 and every oddity a tile can have: sequences of length 1, shorter and longer than a tile, M != N.
"""

import pytest
import torch
from conftest import BOUNDS, DEVICE, relative_error
from hypothesis import example, given, settings
from hypothesis import strategies as st
from philox import kept

pytest.importorskip("triton", reason="Triton is not installed here")

from kernels.attention import CONFIGURATIONS, attention_triton
from kernels.buckets import near_buckets, relative_position_bucket
from kernels.launch import architecture

ROW = CONFIGURATIONS[architecture(torch.device(DEVICE))]
ENCODER, DECODER, CROSS = "encoder", "decoder", "cross"
USES = (ENCODER, DECODER, CROSS)


@pytest.fixture
def tiles(monkeypatch):
    """A function (BM, BN): from now on all kernels work in such tiles."""

    def use(BM, BN):
        for (kernel, size), _ in ROW.items():
            tile = (BN, BM) if kernel == "dkdv" else (BM, BN)
            monkeypatch.setitem(ROW, (kernel, size), dict.fromkeys((32, 64, 128), (*tile, 4, 1)))

    return use


def cu(counts):
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(DEVICE)


def inputs(counts_q, counts_k, use, dtype=torch.float32, H=2, D=32, num_buckets=32, seed=0):
    """[q, k, v, table or None], q, k and v slices of one fused projection where the two sides are one."""
    g = torch.Generator().manual_seed(seed)
    Tq, Tk = sum(counts_q), sum(counts_k)
    if counts_q == counts_k:
        q, k, v = (torch.randn(Tq, 3, H, D, generator=g) * 0.8).to(dtype).to(DEVICE).unbind(1)
    else:
        q, k, v = ((torch.randn(T, H, D, generator=g) * 0.8).to(dtype).to(DEVICE) for T in (Tq, Tk, Tk))
    q = q * (32 / D) ** 0.5  # scores of one size for every D, as T5's initialisation has them
    return [q, k, v, None if use == CROSS else torch.randn(num_buckets, H, generator=g).to(DEVICE)]


def dense(q, k, v, table, causal, max_distance=128, mask=None):
    """One sequence in fp64, every position's bias looked up alone. mask: (H, M, N), what dropout multiplies by."""
    M, N = len(q), len(k)
    i = torch.arange(M, device=q.device)[:, None] + (N - M if causal else 0)
    j = torch.arange(N, device=q.device)[None, :]
    scores = torch.einsum("mhd,nhd->hmn", q, k)
    if table is not None:
        bucket = relative_position_bucket(j - i, len(table), max_distance, bidirectional=not causal)
        scores = scores + table[bucket].permute(2, 0, 1)
    if causal:
        scores = scores.masked_fill(j > i, float("-inf"))
    weights = scores.softmax(-1)
    return torch.einsum("hmn,nhd->mhd", weights if mask is None else weights * mask, v)


def run(arguments, counts_q, counts_k, use, **options):
    """[output, dq, dk, dv and, where there is a table, d table] of the Triton kernels."""
    leaves = [x.detach().requires_grad_() for x in arguments if x is not None]
    table = [] if arguments[3] is not None else [None]
    options = dict(max_seqlen_q=max(counts_q), max_seqlen_k=max(counts_k)) | options
    got = attention_triton(*leaves, *table, cu(counts_q), cu(counts_k), causal=use == DECODER, **options)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(got)
    return [got.detach(), *torch.autograd.grad(got, leaves, upstream)]


def expected(arguments, counts_q, counts_k, use, max_distance=128, masks=None):
    """The same in fp64."""
    leaves = [x.detach().double().requires_grad_() for x in arguments if x is not None]
    table = leaves[3] if len(leaves) > 3 else None
    parts = zip(*(x.split(c) for x, c in zip(leaves[:3], (counts_q, counts_k, counts_k))))
    masks = masks or [None] * len(counts_q)
    want = torch.cat([dense(*part, table, use == DECODER, max_distance, m) for part, m in zip(parts, masks)])
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(arguments[0].dtype).double().to(want.device)  # as `run` rounds it
    return [want.detach(), *torch.autograd.grad(want, leaves, upstream)]


NAMES = ("output", "dq", "dk", "dv", "d table")


def check(arguments, counts_q, counts_k, use, max_distance=128, bound=None, masks=None, **options):
    bound = bound or BOUNDS[arguments[0].dtype]
    got = run(arguments, counts_q, counts_k, use, max_distance=max_distance, **options)
    want = expected(arguments, counts_q, counts_k, use, max_distance, masks)
    for name, a, b in zip(NAMES, got, want):
        # with one visible key dS = P (dP - delta) is 0 in exact arithmetic: the size of what cancels counts then
        size = max(b.norm().item(), 0.5 * want[0].norm().item())
        assert a.isfinite().all(), name
        assert (a.double() - b).norm().item() <= bound * size, f"{name} of {use}: {relative_error(a, b):.1e}"


lengths = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=2)


def counts_of(pairs, use):
    """(counts_q, counts_k) as a use allows them: the encoder's sides are one; a decoder has as many keys or more."""
    if use == ENCODER:
        return [m for m, _ in pairs], [m for m, _ in pairs]
    return tuple(map(list, zip(*((min(p), max(p)) if use == DECODER else p for p in pairs))))


@settings(max_examples=10)
@given(lengths, st.sampled_from(USES), st.integers(0, 99))
@example([(1, 1)], ENCODER, 0)
@example([(1, 1), (33, 33)], DECODER, 0)
@example([(64, 64)], DECODER, 1)
@example([(1, 70), (40, 41)], DECODER, 2)  # a decoding step beside a longer one: queries are the last positions
@example([(70, 1), (1, 70)], CROSS, 0)
def test_output_and_each_gradient(pairs, use, seed):
    counts = counts_of(pairs, use)
    with pytest.MonkeyPatch.context() as patch:
        for key in ROW:
            patch.setitem(ROW, key, dict.fromkeys((32, 64, 128), (32, 32, 4, 1)))
        check(inputs(*counts, use, seed=seed), *counts, use)


@pytest.mark.parametrize("use", USES)
def test_each_dtype(use, tiles):
    tiles(32, 64)
    for dtype, bound in BOUNDS.items():
        counts = ([70, 5], [70, 5]) if use != CROSS else ([70, 5], [9, 66])
        check(inputs(*counts, use, dtype), *counts, use, bound=bound)


@pytest.mark.parametrize("D", [16, 64, 128])
def test_each_head_width(D):
    for use in (ENCODER, DECODER):
        check(inputs([50], [50], use, D=D, H=1), [50], [50], use)


@pytest.mark.parametrize("use", USES)
def test_far_tiles_on_both_sides(use, tiles):
    """Longer than reach and tiles together: plain tiles before and after the band, and a last one cut off."""
    tiles(64, 64)
    counts = ([331], [331]) if use != CROSS else ([40], [331])
    check(inputs(*counts, use, H=1), *counts, use)


def test_a_table_between_sides_of_different_lengths(tiles):
    """Not in T5, but in the contract: bidirectional bias with M != N, more queries than keys and fewer."""
    tiles(32, 64)
    for counts in (([150], [20]), ([20], [150])):
        check(inputs(*counts, ENCODER, H=1, num_buckets=8), *counts, ENCODER, max_distance=20)


def test_causality_without_a_table(tiles):
    tiles(32, 32)
    arguments = inputs([40], [75], CROSS)
    check(arguments, [40], [75], DECODER)


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (20, 40), (64, 256)])
@pytest.mark.parametrize("use", [ENCODER, DECODER])
def test_buckets_at_both_ends_of_their_reach(num_buckets, max_distance, use, tiles):
    """All positions alike but for the bias: an edge moved by one bucket or one distance would show."""
    N = max_distance + 40
    tiles(64, 64)
    arguments = inputs([N], [N], use, H=1, num_buckets=num_buckets)
    arguments[:2] = [0.01 * x for x in arguments[:2]]
    arguments[3] *= 3
    check(arguments, [N], [N], use, max_distance=max_distance)


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (20, 40), (64, 256), (2, 4)])
def test_reach_is_where_the_last_bucket_begins_and_not_one_later(num_buckets, max_distance):
    for bidirectional in (True, False):
        if num_buckets == 2 and bidirectional:
            continue  # one bucket a side has no formula
        reach, near = near_buckets(num_buckets, max_distance, bidirectional, torch.device("cpu"))
        far = torch.arange(-3 * max_distance, 3 * max_distance + 1)
        want = relative_position_bucket(far, num_buckets, max_distance, bidirectional)
        assert torch.equal(near[far.clamp(-reach, reach) + reach].long(), want)
        if reach > 1:
            closer = near[1:-1][far.clamp(1 - reach, reach - 1) + reach - 1]
            assert not torch.equal(closer.long(), want)


def test_the_tiles_do_not_matter(tiles):
    """Neither to the results nor, with dropout, to the mask."""
    counts = [100, 17]
    results = []
    for BM, BN in ((16, 16), (32, 64), (64, 128)):
        tiles(BM, BN)
        results.append(run(inputs(counts, counts, ENCODER, H=1), counts, counts, ENCODER, dropout_p=0.2, seed=5))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            assert relative_error(a, b) <= 2e-6


def dropout_masks(counts_q, counts_k, H, seed, threshold):
    """What dropout multiplies each sequence's weights by, (H, M, N), from Philox in NumPy."""
    masks, start = [], 0
    for M, N in zip(counts_q, counts_k):
        planes = [kept(seed, range(start, start + M), h, N, threshold) for h in range(H)]
        masks.append((torch.stack(planes) * (256 / (256 - threshold))).double().to(DEVICE))
        start += M
    return masks


@pytest.mark.parametrize("use", USES)
def test_dropout_is_the_mask_of_philox_in_forward_and_backward(use, tiles):
    """Each gradient against fp64 with the mask drawn in NumPy: were backward's another one, none would fit."""
    tiles(32, 64)
    counts = ([30, 70], [30, 70]) if use != CROSS else ([30, 20], [5, 70])
    seed = 2**40 + 12345  # beyond 32 bits
    masks = dropout_masks(*counts, H=2, seed=seed, threshold=51)  # 0.2 * 256, rounded
    check(inputs(*counts, use), *counts, use, masks=masks, dropout_p=0.2, seed=seed)


def test_dropout_keeps_its_rate_and_depends_on_its_seed():
    counts = [120]
    q, k, _, table = inputs(counts, counts, ENCODER)
    ones = torch.ones_like(k)  # an output is then the sum of the kept weights, 1 on average

    def once(seed, p):
        return attention_triton(q * 0, k, ones, table * 0, cu(counts), cu(counts), dropout_p=p, seed=seed)

    for p in (0.1, 0.5):
        mean = torch.stack([once(seed, p) for seed in range(4)])[..., 0].mean()
        assert abs(mean - 1) < 4 * (p / (1 - p) / (4 * 2 * 120 * 120)) ** 0.5, "four standard deviations"
    assert torch.equal(once(1, 0.1), once(1, 0.1)) and not torch.equal(once(1, 0.1), once(2, 0.1))
    assert once(0, 1e-4).mean() != 1, "a small rate is not rounded to none"


@pytest.mark.parametrize("use", USES)
def test_repeats_are_equal_bit_for_bit(use, tiles):
    tiles(32, 32)
    counts = [40, 3, 33]
    arguments = inputs(counts, counts, use)
    first, second = (run(arguments, counts, counts, use, dropout_p=0.1, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("use", USES)
def test_packed_is_one_sequence_at_a_time(use, tiles):
    tiles(32, 32)
    counts = counts_of([(33, 40), (1, 2), (20, 5)], use)
    q, k, v, table = inputs(*counts, use)
    together = run([q, k, v, table], *counts, use)
    alone = [
        run([a, b, c, table], [len(a)], [len(b)], use)[0]
        for a, b, c in zip(q.split(counts[0]), k.split(counts[1]), v.split(counts[1]))
    ]
    assert torch.equal(together[0], torch.cat(alone))


def test_gradient_of_the_table_sums_to_zero_and_skips_the_unreachable_bucket(tiles):
    """Adding a constant to all biases changes no softmax; bucket 16 of a bidirectional table means "after, by 0"."""
    tiles(64, 64)
    counts = [200]
    for use in (ENCODER, DECODER):
        gradient = run(inputs(counts, counts, use), counts, counts, use)[4]
        assert gradient.sum(0).abs().max() <= 1e-5 * gradient.abs().sum()
        unreachable = gradient[16] if use == ENCODER else gradient[:0]
        assert (unreachable == 0).all() and (gradient.abs().sum(-1) > 0).sum() == (31 if use == ENCODER else 32)


def test_one_query_over_many_keys_takes_the_decoding_tile():
    """The shape of cached decoding, with and without bias, many sequences of different lengths at once."""
    counts_k = [1, 17, 4096, 64]
    for use in (DECODER, CROSS):
        check(inputs([1] * 4, counts_k, use), [1] * 4, counts_k, use)


def test_strides_of_heads_and_tokens_in_any_order():
    counts = [45]
    q, k, v, table = inputs(counts, counts, ENCODER, H=3)
    want = run([x.contiguous() if x is not table else x for x in (q, k, v, table)], counts, counts, ENCODER)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]  # heads outermost
    columns = v.transpose(1, 2).contiguous().transpose(1, 2)  # last dimension not contiguous: copied
    for a, b in zip(run([*turned, columns, table], counts, counts, ENCODER), want):
        assert torch.equal(a, b)


def test_confident_scores_stay_finite(tiles):
    """Scores of several hundred, far above exp's range, in every tile."""
    tiles(32, 32)
    arguments = inputs([70], [70], DECODER)
    arguments[0] = arguments[0] * 30
    check(arguments, [70], [70], DECODER, bound=1e-4)


def test_only_the_gradients_that_are_asked_for():
    counts = [20]
    q, k, v, table = inputs(counts, counts, ENCODER)
    q.requires_grad_()
    o = attention_triton(q, k, v, table, cu(counts), cu(counts))
    o.sum().backward()
    assert q.grad is not None and table.grad is None


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(q=torch.zeros(5, 2, 8)), "q and k"),
        (dict(v=torch.zeros(4, 2, 32)), "v must have"),
        (dict(k=torch.zeros(5, 2, 32, dtype=torch.float16)), "one float dtype"),
        (dict(table=torch.zeros(32, 3)), "table"),
        (dict(cu_seqlens_q=torch.tensor([0, 4, 4, 5], dtype=torch.int32)[[0, 1, 2]]), "from 0 to 5"),
        (dict(cu_seqlens_q=torch.tensor([0, 5, 5], dtype=torch.int32)), "empty"),
        (dict(dropout_p=1.0), "dropout_p"),
        (dict(seed=-1), "seed"),
        (dict(max_seqlen_q=3), "max_seqlen_q must be at least 5, got 3"),
        (dict(max_distance=0), "max_distance"),
        (dict(q=torch.zeros(0, 2, 32)), "q has no tokens"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, word):
    """Refused before a launch; the empty side among them."""
    good = {name: torch.zeros(5, 2, 32) for name in "qkv"} | dict(table=torch.zeros(32, 2))
    good |= {f"cu_seqlens_{side}": torch.tensor([0, 5], dtype=torch.int32) for side in "qk"}
    if "empty" in word or "from 0" in word:
        good["cu_seqlens_k"] = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=word):
        attention_triton(**(good | change))


def test_head_widths_and_dtypes_without_a_kernel_are_refused():
    for D, dtype, word in ((24, torch.float32, "D of 16, 32, 64 or 128, got 24"), (32, torch.float64, "float64")):
        x = torch.zeros(5, 2, D, dtype=dtype)
        with pytest.raises(ValueError, match=word):
            attention_triton(x, x, x, None, *[torch.tensor([0, 5], dtype=torch.int32)] * 2)


# ---- On a GPU only --------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("use", USES)
def test_full_size(use, D, dtype):
    """Lengths from 1 to 4096 with the shipped tiles, against fp64; every gradient; repeats bit for bit."""
    counts_q = [4096, 1, 517, 64, 1023]
    counts_k = counts_q if use != CROSS else [1, 4096, 300, 65, 128]
    arguments = inputs(counts_q, counts_k, use, dtype, H=2, D=D)
    check(arguments, counts_q, counts_k, use, bound=max(BOUNDS[dtype], 5e-6))
    first, second = (run(arguments, counts_q, counts_k, use, dropout_p=0.1, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.gpu
@needs_gpu
def test_memory_is_linear_in_length_and_the_host_never_waits():
    H, D, peaks = 12, 64, []
    for N in (2048, 4096):
        q, k, v = (torch.randn(2 * N, H, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        table, where = torch.randn(32, H, device=DEVICE, requires_grad=True), cu([N, N])
        for _ in range(2):  # the first run compiles
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error")
            o = attention_triton(q, k, v, table, where, where, False, 0.1, 1, 128, N, N)
            torch.autograd.grad(o, [q, k, v, table], torch.ones_like(o))
            torch.cuda.set_sync_debug_mode("default")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]
