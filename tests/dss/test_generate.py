"""Cached, batched decoding and scoring give what a model without cache gives, one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import student

from dss.generate import generate, score


@pytest.fixture(scope="module")
def model():
    shape = dict(vocab_size=12, d_model=16, d_ff=24, num_heads=2, initializer_factor=2.0)
    model = student(**shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def uncached(model, ids, max_new_tokens, stop):
    written = []
    while len(written) < max_new_tokens:
        (logits,) = model.logits([ids], [[0, *written]])
        token = logits[-1].argmax().item()
        if token in (1, stop):
            break
        written.append(token)
    return written


some_ids = st.lists(st.integers(1, 11), min_size=1, max_size=9)
inputs = st.lists(some_ids, max_size=7)


@given(inputs, st.integers(0, 10), st.integers(1, 4), st.none() | st.integers(2, 11))
def test_batched_with_cache_is_one_at_a_time_without(model, many, longest, batch_size, stop):
    written = generate(model, many, longest, batch_size, stop)
    assert written == [uncached(model, ids, longest, stop) for ids in many]


def test_sequences_end_at_different_steps(model):
    """Else the property above would say little."""
    lengths = {len(ids) for ids in generate(model, [[n] for n in range(1, 12)], 8)}
    assert len(lengths) > 2 and 8 in lengths and min(lengths) < 5


with_candidates = st.tuples(some_ids, st.lists(some_ids, min_size=1, max_size=3))


@settings(max_examples=15)
@given(st.lists(with_candidates, max_size=4), st.integers(1, 5))
def test_a_score_is_the_models_likelihood_and_depends_on_nothing_else_scored(
    model, many, batch_size
):
    asked = [ids for ids, _ in many]
    candidates = [some for _, some in many]
    got = score(model, asked, candidates, batch_size)
    assert [len(row) for row in got] == [len(some) for some in candidates]
    for (ids, some), row in zip(many, got):
        for candidate, found in zip(some, row):
            (logits,) = model.logits([ids], [[0, *candidate[:-1]]])
            log_p = logits.log_softmax(-1)[range(len(candidate)), candidate].sum()
            assert found == pytest.approx(log_p.item(), rel=1e-4)


@pytest.mark.parametrize("inputs, candidates", [([[]], [[[1]]]), ([[1]], [[]]), ([[1]], [[[]]])])
def test_empty_inputs_and_candidates_are_refused(model, inputs, candidates):
    with pytest.raises(ValueError, match="score: .* is empty"):
        score(model, inputs, candidates)
    with pytest.raises(ValueError, match="input 1 is empty"):
        generate(model, [[3, 1], []])
