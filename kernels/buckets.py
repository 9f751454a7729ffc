"""T5's relative position buckets (Raffel et al. 2020, section 2.1).

A bucket is the entry of the bias table that a distance uses. Half of the buckets of a direction
count single positions. The others grow logarithmically up to `max_distance`, and all distances
beyond share the last one. A bidirectional table has one half for keys before the query and one
for keys after it.
"""

import functools
import math

import torch
from torch import Tensor

MARGIN = 128  # distances of `near_buckets` beyond `reach` on each side; at least two tiles' rows


def relative_position_bucket(
    distance: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """T5's bucket of each distance `key position - query position` (integers), as int64."""
    buckets = bucket_table(num_buckets, max_distance, bidirectional, distance.device)
    return buckets[distance.clamp(-max_distance, max_distance) + max_distance]


@functools.cache
@torch.inference_mode(False)  # what is cached must serve training, whoever calls first
def bucket_table(
    num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device
) -> Tensor:
    """(2 * max_distance + 1,) int64: the buckets of -max_distance .. max_distance.

    It is made on the host, where the logarithm is exact at powers of two: a rounding error would
    move the edge of a bucket. Bucket num_buckets / 2 of a bidirectional table is never used: it
    would mean "after the query, at distance 0". In a causal table later keys have bucket 0; they
    are masked.
    """
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    if bidirectional:
        per_side = num_buckets // 2
        back = distance.abs()
        first = per_side * (distance > 0)
    else:
        per_side = num_buckets
        back = (-distance).clamp(min=0)
        first = 0
    exact = per_side // 2
    log = torch.log(back.clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + (log * (per_side - exact)).long()).clamp(max=per_side - 1)
    return (first + torch.where(back < exact, back, far)).to(device)


@functools.cache
@torch.inference_mode(False)
def near_buckets(
    num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device
) -> tuple[int, Tensor]:
    """(reach, buckets).

    reach: the least number >= 1 such that all distances <= -reach share a bucket, and all >= reach
    share another. buckets: those of the distances from -(reach + MARGIN) to reach + MARGIN, int32.
    """
    bucket = bucket_table(num_buckets, max_distance, bidirectional, torch.device("cpu"))
    before = bucket[:max_distance] != bucket[0]
    after = bucket[max_distance + 1 :] != bucket[-1]
    reach = 1 + max(int(before.sum()), int(after.sum()))
    distances = torch.arange(-reach - MARGIN, reach + MARGIN + 1, device="cpu")
    near = distances.clamp(-max_distance, max_distance)
    return reach, bucket[near + max_distance].int().to(device)
