"""T5's relative position buckets (Raffel et al. 2020, section 2.1): which entry of the bias table a distance uses.

Half the buckets of a direction count single positions; the others grow logarithmically up to `max_distance`, and all
beyond share the last. A bidirectional table splits its buckets between keys before (first half) and after the query.
"""

import functools
import math

import torch
from torch import Tensor


def relative_position_bucket(
    distance: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """T5's bucket of each distance `key position - query position` (any integer shape), as int64."""
    lut = bucket_table(num_buckets, max_distance, bidirectional, distance.device)
    return lut[distance.clamp(-max_distance, max_distance) + max_distance]


@functools.cache
def bucket_table(num_buckets, max_distance, bidirectional, device):
    """(2 * max_distance + 1,) int64: the bucket of every distance from -max_distance to max_distance.

    It is made on the host, where the logarithm is exact at powers of two: a rounding error would move a bucket's edge.
    Bucket num_buckets / 2 of a bidirectional table is never used: it would be "after, by nothing". In a causal
    table later keys fall into bucket 0; they are masked anyway.
    """
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    per_side = num_buckets // 2 if bidirectional else num_buckets
    exact = per_side // 2
    back = distance.abs() if bidirectional else (-distance).clamp(min=0)
    log = torch.log(back.clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + (log * (per_side - exact)).long()).clamp(max=per_side - 1)
    bucket = torch.where(back < exact, back, far)
    return (bucket + per_side * (distance > 0) if bidirectional else bucket).to(device)


@functools.cache
def near_buckets(num_buckets, max_distance, bidirectional, device, margin):
    """(reach, buckets): the least reach >= 1 such that all distances <= -reach share a bucket, and all >= reach
    another, and the buckets of the distances up to reach + margin each way, (2 * (reach + margin) + 1,) int32.
    """
    bucket = bucket_table(num_buckets, max_distance, bidirectional, torch.device("cpu"))
    before, after = bucket[:max_distance] != bucket[0], bucket[max_distance + 1 :] != bucket[-1]
    reach = 1 + max(int(before.sum()), int(after.sum()))
    near = torch.arange(-reach - margin, reach + margin + 1, device="cpu").clamp(-max_distance, max_distance)
    return reach, bucket[near + max_distance].int().to(device)
