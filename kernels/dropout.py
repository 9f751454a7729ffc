"""Dropout. For the Triton kernels it is a mask that is a function of a seed and an element's place alone.

A mask is never stored. The backward pass makes it again, whatever tiles it works in, because the bits of an element
come from Philox (Salmon et al. 2011), a generator without state: four 32-bit counters and a 64-bit key, the seed, go
in, four random words come out. One call serves 16 neighbours in a row, which get a byte each:

    counters (row, plane, column // 16, 0)  ->  16 bytes;   element kept  <=>  its byte >= 256 p

So p is rounded to a multiple of 1/256 (0.1 becomes 26/256 = 0.1016), and the survivors are scaled by what the rounded p
calls for; an expectation is exact. A word per element would cost four times the arithmetic, which in attention is more
than the matrix products take. Seven rounds are the fewest with which Philox passes its authors' tests.
"""

import torch
import torch.nn.functional as F

from .launch import tl, triton


def dropout_reference(x, p, seed=None):
    """x with each element 0 (probability p) or divided by 1 - p: torch's own dropout, drawn from its generator, unless
    a seed says what to draw."""
    if p == 0:
        return x
    return F.dropout(x, p) if seed is None else x * dropout_mask(x.shape, p, seed, x.device).to(x.dtype)


def dropout_mask(shape, p, seed, device):
    """A tensor of 0 (with probability p) and 1 / (1 - p), determined by `seed`."""
    generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)  # meta: shapes alone
    return torch.empty(shape, device=device).bernoulli_(1 - p, generator=generator).div_(1 - p)


ROUNDS = tl.constexpr(7)


@triton.jit
def kept(seed, rows, plane, first_column, threshold, COLUMNS: tl.constexpr):
    """(len(rows), COLUMNS) booleans. rows: int32 (R,); first_column: a multiple of 16; COLUMNS: 16, 32, 64, ..."""
    R: tl.constexpr = rows.shape[0]
    groups = first_column // 16 + tl.arange(0, COLUMNS // 16)
    c0 = rows[:, None] + tl.zeros_like(groups)[None, :]
    c1 = tl.zeros_like(c0) + plane
    c2 = tl.zeros_like(c0) + groups[None, :]
    a, b, c, d = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), ROUNDS)  # each (R, COLUMNS / 16)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (R, COLUMNS // 4))  # in the order a, b, c, d
    bytes = (words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :].to(tl.uint32)) & 0xFF
    return tl.reshape(bytes, (R, COLUMNS)).to(tl.int32) >= threshold


def threshold_of(p):
    """256 p, rounded, for 0 <= p < 1; at least 1 where p > 0 and at most 255. Raises ValueError for another p."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {p}")
    return min(max(round(256 * p), 1), 255) if p else 0


def draw_seed():
    """A seed from torch's generator on the host, so that `torch.manual_seed` governs it and no device is asked."""
    return int(torch.randint(2**31, ()))
