"""Cached, batched decoding writes what a model without a cache, one input at a time, would write."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dss.config import T5Config
from dss.generate import generate
from dss.model import T5


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    shape = dict(vocab_size=12, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2)
    model = T5(T5Config(**shape, initializer_factor=2.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def uncached(model, ids, max_new_tokens):
    written = []
    while len(written) < max_new_tokens:
        (logits,) = model.logits([ids], [[0, *written]])
        token = logits[-1].argmax().item()
        if token == 1:
            break
        written.append(token)
    return written


inputs = st.lists(st.lists(st.integers(1, 11), min_size=1, max_size=9), max_size=7)


@settings(max_examples=30)
@given(inputs, st.integers(0, 10), st.integers(1, 4))
def test_batched_with_cache_is_one_at_a_time_without(model, many, longest, batch_size):
    assert generate(model, many, longest, batch_size) == [uncached(model, ids, longest) for ids in many]


def test_sequences_end_at_different_steps(model):
    """What the property above is about: some sequences must leave the batch before others."""
    g = torch.Generator().manual_seed(0)
    many = [torch.randint(1, 12, (n % 9 + 1,), generator=g).tolist() for n in range(40)]
    lengths = {len(ids) for ids in generate(model, many, 10)}
    assert len(lengths) > 3 and 10 in lengths and min(lengths) < 5


def test_an_empty_input_is_refused(model):
    with pytest.raises(ValueError, match="input 1 is empty"):
        generate(model, [[3, 1], []])
