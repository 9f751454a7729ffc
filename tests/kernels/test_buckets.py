"""T5's relative position buckets are those of transformers; attention can use them anywhere."""

import pytest
import torch
from comparing import DEVICE, TRITON, needs_triton

from kernels import buckets
from kernels.buckets import relative_position_bucket

SHAPES = [(32, 128), (8, 20), (64, 256), (32, 20)]


@pytest.mark.parametrize("num_buckets, max_distance", SHAPES)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(transformers, num_buckets, max_distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-600, 601)
    shape = (bidirectional, num_buckets, max_distance)
    theirs = T5Attention._relative_position_bucket(distance, *shape)
    ours = relative_position_bucket(distance, num_buckets, max_distance, bidirectional)
    assert torch.equal(ours, theirs)


@needs_triton
def test_attention_first_called_in_inference_mode_can_be_trained_afterwards():
    buckets.bucket_table.cache_clear()
    buckets.near_buckets.cache_clear()
    q, k, v = (torch.randn(5, 1, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    table = torch.randn(32, 1, device=DEVICE, requires_grad=True)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    with torch.inference_mode():
        relative_position_bucket(torch.arange(3, device=DEVICE))
        TRITON.attention(q, k, v, table, cu_seqlens, cu_seqlens)
    TRITON.attention(q, k, v, table, cu_seqlens, cu_seqlens).sum().backward()
    assert table.grad.isfinite().all()
