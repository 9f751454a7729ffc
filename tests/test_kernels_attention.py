"""The attention reference against an independent fp64 computation, one dense sequence at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels.attention import relative_position_bucket

lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


def cu(counts):
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def dense(q, k, v, table, causal, max_distance=128):
    """One sequence in fp64, every position's bias looked up alone."""
    M, N = len(q), len(k)
    i = torch.arange(M)[:, None] + (N - M if causal else 0)
    j = torch.arange(N)[None, :]
    scores = torch.einsum("mhd,nhd->hmn", q, k)
    if table is not None:
        bucket = relative_position_bucket(j - i, len(table), max_distance, bidirectional=not causal)
        scores = scores + table[bucket].permute(2, 0, 1)
    if causal:
        scores = scores.masked_fill(j > i, float("-inf"))
    return torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v)


def inputs(counts_q, counts_k, H=2, D=4, num_buckets=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(sum(c), H, D, generator=g) for c in (counts_q, counts_k, counts_k))
    return q, k, v, torch.randn(num_buckets, H, generator=g)


def check_against_dense(q, k, v, table, counts_q, counts_k, causal):
    """Output and every gradient within 2e-6 of fp64, relative."""
    arguments = [x for x in (q, k, v, table) if x is not None]
    single = [x.clone().requires_grad_() for x in arguments]
    double = [x.double().requires_grad_() for x in arguments]
    pad_table = [None] if table is None else []
    cu_q, cu_k = cu(counts_q), cu(counts_k)
    got = kernels.attention(*single, *pad_table, cu_q, cu_k, causal=causal)
    parts = zip(*(x.split(c) for x, c in zip(double[:3], (counts_q, counts_k, counts_k))))
    want = torch.cat([dense(*part, None if table is None else double[3], causal) for part in parts])
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    got_gradients = torch.autograd.grad((got * weight).sum(), single)
    want_gradients = torch.autograd.grad((want * weight).sum(), double)
    for a, b in zip((got, *got_gradients), (want, *want_gradients)):
        assert (a.double() - b).norm() <= 2e-6 * (b.norm() + 1)


@given(lengths)
def test_encoder_attention_is_the_dense_one(pairs):
    counts = [m for m, _ in pairs]
    check_against_dense(*inputs(counts, counts), counts, counts, causal=False)


@given(lengths)
def test_decoder_attention_is_the_dense_one(pairs):
    counts = [m for m, _ in pairs]
    check_against_dense(*inputs(counts, counts), counts, counts, causal=True)


@given(lengths)
def test_cross_attention_is_the_dense_one_at_different_lengths(pairs):
    counts_q, counts_k = zip(*pairs)
    q, k, v, _ = inputs(counts_q, counts_k)
    check_against_dense(q, k, v, None, list(counts_q), list(counts_k), causal=False)


@given(lengths)
def test_causal_queries_are_the_last_positions(pairs):
    """M queries of N >= M positions, as in cached decoding, sequences with different N - M in one batch."""
    counts_q, counts_k = zip(*((min(p), max(p)) for p in pairs))
    check_against_dense(*inputs(counts_q, counts_k), list(counts_q), list(counts_k), causal=True)


@given(lengths)
def test_packed_equals_one_sequence_at_a_time(pairs):
    counts = [m for m, _ in pairs]
    q, k, v, table = inputs(counts, counts)
    together = kernels.attention(q, k, v, table, cu(counts), cu(counts), causal=True)
    one = [
        kernels.attention(a, b, c, table, cu([len(a)]), cu([len(a)]), causal=True)
        for a, b, c in zip(q.split(counts), k.split(counts), v.split(counts))
    ]
    torch.testing.assert_close(together, torch.cat(one), rtol=1e-5, atol=1e-6)


def test_gradient_of_the_table_sums_to_zero_and_skips_the_unreachable_bucket():
    """Adding a constant to all biases changes no softmax; bucket 16 of a bidirectional table means "after, by 0"."""
    counts = [40, 7]
    q, k, v, table = inputs(counts, counts)
    table.requires_grad_()
    y = kernels.attention(q, k, v, table, cu(counts), cu(counts))
    (gradient,) = torch.autograd.grad((y * torch.arange(4)).sum(), table)
    assert gradient.sum(0).abs().max() <= 1e-5 * gradient.abs().sum()
    assert (gradient[16] == 0).all() and (gradient[:16].abs().sum(-1) > 0).sum() >= 10


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (16, 64), (8, 20), (64, 256), (32, 20)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(transformers, num_buckets, max_distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    assert torch.equal(relative_position_bucket(distance, num_buckets, max_distance, bidirectional), theirs)


def test_dropout_keeps_its_rate_and_repeats_with_its_seed():
    q, k, v, table = inputs([60], [60], H=4)
    v = torch.ones_like(v)  # an output is then the sum of its kept weights, 1 on average

    def run(seed, p=0.3):
        return kernels.attention(q, k, v, table, cu([60]), cu([60]), dropout_p=p, seed=seed)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    mean = torch.stack([run(seed) for seed in range(30)]).mean()
    assert abs(mean - 1) < 0.02


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(q=torch.zeros(5, 2, 3)), "q and k"),
        (dict(v=torch.zeros(4, 2, 4)), "v must have"),
        (dict(k=torch.zeros(5, 2, 4, dtype=torch.float16)), "one float dtype"),
        (dict(table=torch.zeros(32, 3)), "table"),
        (dict(cu_seqlens_q=torch.tensor([0, 5])), "cu_seqlens_q"),
        (dict(cu_seqlens_k=torch.tensor([0, 4], dtype=torch.int32)), "from 0 to 5"),
        (dict(cu_seqlens_q=cu([5, 0]), cu_seqlens_k=cu([4, 1])), "empty"),
        (dict(cu_seqlens_k=cu([4, 1])), "cu_seqlens_k"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, word):
    good = dict(q=torch.zeros(5, 2, 4), k=torch.zeros(5, 2, 4), v=torch.zeros(5, 2, 4), table=torch.zeros(32, 2))
    good |= dict(cu_seqlens_q=cu([5]), cu_seqlens_k=cu([5]))
    with pytest.raises(ValueError, match=word):
        kernels.attention(*(good | change).values())


def test_more_queries_than_positions_are_refused_when_causal():
    q, k, v, table = inputs([3], [2])
    with pytest.raises(ValueError, match="causal"):
        kernels.attention(q, k, v, table, cu([3]), cu([2]), causal=True)
