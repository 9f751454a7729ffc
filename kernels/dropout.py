"""Dropout. For the Triton kernels it is a mask that is a function of a seed and an element's place alone.

A mask is never stored. The backward pass makes it again, whatever tiles it works in, because the bits of an element
come from Philox (Salmon et al. 2011), a generator without state: four 32-bit counters and a 64-bit key, the seed, go
in, four random words come out. One call serves 16 elements of a row, which get a byte each. They are the 16 of 64
columns that one thread of a matrix product holds, columns 8 k + 2 q + e with k = 0 .. 7 and e = 0, 1, so that in
attention the mask is where the scores are:

    counters (row, plane, 4 (column // 64) + q, 0)  ->  byte 2 k + e;   element kept  <=>  its byte >= 256 p

So p is rounded to a multiple of 1/256 (0.1 becomes 26/256 = 0.1016), and the survivors are scaled by what the rounded p
calls for; an expectation is exact. Seven rounds are the fewest with which Philox passes its authors' tests.

The reference rounds p alike and takes a byte each from torch's generator, seeded; autograd stores its mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .launch import tl, triton


def dropout_reference(x: Tensor, p: float, seed: int | Tensor | None = None) -> Tensor:
    """Inverted dropout: each element of x is 0 with probability p, rounded to a multiple of 1/256, or scaled up.

    seed: what the mask is a function of; None draws one from torch's generator.
    """
    if p == 0:
        return x
    device, n, threshold = x.device, x.numel(), threshold_of(p)
    seed = 0 if x.is_meta else int(seed_on(device, seed))  # on meta there are shapes alone
    generator = torch.Generator("cpu" if x.is_meta else device).manual_seed(seed)
    words = torch.empty(-(-n // 8), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    keep = words.view(torch.uint8)[:n].view(x.shape).ge_(threshold)  # 0 or 1; booleans would take ten times as long
    return x * keep.to(x.dtype).mul_(256 / (256 - threshold))


ROUNDS = tl.constexpr(7)


@triton.jit
def kept(seed, rows, plane, first_column, threshold, COLUMNS: tl.constexpr):
    """(len(rows), COLUMNS) booleans. rows: int32 (R,); first_column: a multiple of COLUMNS, which is 16, 32, 64, ..."""
    R: tl.constexpr = rows.shape[0]
    GROUPS: tl.constexpr = 4 * ((COLUMNS + 63) // 64)
    groups = first_column // 64 * 4 + tl.arange(0, GROUPS)
    c0 = rows[:, None] + tl.zeros_like(groups)[None, :]
    c1 = tl.zeros_like(c0) + plane
    c2 = tl.zeros_like(c0) + groups[None, :]
    a, b, c, d = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), ROUNDS)  # each (R, GROUPS)
    if COLUMNS == 16:  # a quarter of the bytes
        part = first_column // 16 % 4
        words = tl.where(part < 2, tl.where(part == 0, a, b), tl.where(part == 2, c, d))
    elif COLUMNS == 32:  # half of them
        first = first_column // 32 % 2 == 0
        words = tl.join(tl.where(first, a, c), tl.where(first, b, d))
    else:
        words = tl.join(tl.join(a, c), tl.join(b, d))  # in the order a, b, c, d
    PAIRS: tl.constexpr = COLUMNS // (2 * GROUPS)  # of neighbours that a group decides
    words = tl.reshape(words, (R, GROUPS, PAIRS // 2))
    bytes = words[:, :, :, None] << (24 - 8 * tl.arange(0, 4))[None, None, None, :].to(tl.uint32)
    bytes = tl.permute(tl.reshape(bytes, (R, GROUPS // 4, 4, PAIRS, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(bytes, (R, COLUMNS)) >= (threshold.to(tl.uint32) << 24)


def threshold_of(p):
    """256 p, rounded, for 0 <= p < 1; at least 1 where p > 0 and at most 255. Raises ValueError for another p."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {p}")
    return min(max(round(256 * p), 1), 255) if p else 0


together = None  # an iterator over seeds, within `seeds_drawn_together`


@contextmanager
def seeds_drawn_together(device: torch.device) -> Iterator[None]:
    """Within this, Triton operations that are given no seed take the next of 64 drawn at once: one launch, not 64."""
    global together
    before, together = together, drawn(device)
    try:
        yield
    finally:
        together = before


def drawn(device):
    while True:
        yield from torch.randint(2**31, (64, 1), device=device).unbind()


def seed_on(device, seed):
    """A seed as a (1,) int64 tensor on the device, drawn there from torch's generator if it is None.

    The host does not wait for it, and a CUDA graph draws a new one at every replay. A tensor is returned as it is.
    """
    if seed is None:
        return next(drawn(device) if together is None else together)
    if isinstance(seed, Tensor):
        return seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"dropout: seed must be at least 0 and less than 2^63, got {seed}")
    return torch.full((1,), seed, device=device)
