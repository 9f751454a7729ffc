"""Dropout. In the Triton kernels a mask depends on a seed and on an element's place alone.

A mask is never stored. The backward pass makes it again, whatever tiles it works in, because the
bits of an element come from Philox (Salmon et al. 2011), a generator without state: four 32-bit
counters and a 64-bit key, the seed, go in, and four random words come out. One call serves 16
elements of a row, one byte each. They are those of 64 columns that one thread of a matrix product
holds, columns 8 k + 2 q + e with k = 0 .. 7 and e = 0, 1, so that in attention the mask is where
the scores are:

    counters (row, plane, 4 (column // 64) + q, 0)  ->  byte 2 k + e
    element kept  <=>  its byte >= 256 p

So p is rounded to a multiple of 1/256 (0.1 becomes 26/256 = 0.1016). Kept elements are scaled by
1 / (1 - rounded p), so the mean is exact. Seven rounds are the fewest with which Philox passes its
authors' tests.

The reference rounds p in the same way and takes a byte for each element from torch's generator.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .launch import tl, triton

SEEDS_AT_ONCE = 8  # a decoder layer needs six


def dropout_reference(x: Tensor, p: float, seed: int | Tensor | None = None) -> Tensor:
    """Inverted dropout: an element of x becomes 0 with probability p, or is scaled by 1 / (1 - p).

    p is rounded to a multiple of 1/256. seed: the mask is a function of it; None draws one.
    """
    if p == 0:
        return x
    threshold = threshold_of(p)
    generator = torch.Generator(x.device).manual_seed(int(seed_on(x.device, seed)))
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape)
    keep.ge_(threshold)  # 0 or 1; a tensor of booleans takes ten times as long on a CPU
    return x * keep.to(x.dtype).mul_(256 / (256 - threshold))


ROUNDS = tl.constexpr(7)


# ruff: disable[ANN001, ANN201]
@triton.jit
def dropout_mask(seed, rows, plane, first_column, threshold, COLUMNS: tl.constexpr):
    """(R, COLUMNS) booleans, true where an element is kept.

    rows: (R,) int32. first_column: a multiple of COLUMNS, which is 16, 32, 64, 128, ...
    """
    R: tl.constexpr = rows.shape[0]
    GROUPS: tl.constexpr = 4 * ((COLUMNS + 63) // 64)
    groups = first_column // 64 * 4 + tl.arange(0, GROUPS)
    c0 = rows[:, None] + tl.zeros_like(groups)[None, :]
    c1 = tl.zeros_like(c0) + plane
    c2 = tl.zeros_like(c0) + groups[None, :]
    a, b, c, d = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), ROUNDS)  # each (R, GROUPS)
    if COLUMNS == 16:  # a quarter of the bytes
        part = first_column // 16 % 4
        first_half = tl.where(part == 0, a, b)
        second_half = tl.where(part == 2, c, d)
        words = tl.where(part < 2, first_half, second_half)
    elif COLUMNS == 32:  # half of them
        first = first_column // 32 % 2 == 0
        words = tl.join(tl.where(first, a, c), tl.where(first, b, d))
    else:
        words = tl.join(tl.join(a, c), tl.join(b, d))  # in the order a, b, c, d
    PAIRS: tl.constexpr = COLUMNS // (2 * GROUPS)  # of neighbours that a group decides
    words = tl.reshape(words, (R, GROUPS, PAIRS // 2))
    shifts = (24 - 8 * tl.arange(0, 4)).to(tl.uint32)
    bytes = words[:, :, :, None] << shifts[None, None, None, :]  # a byte on top of each word
    bytes = tl.reshape(bytes, (R, GROUPS // 4, 4, PAIRS, 2))
    bytes = tl.permute(bytes, (0, 1, 3, 2, 4))
    return tl.reshape(bytes, (R, COLUMNS)) >= (threshold.to(tl.uint32) << 24)


@triton.jit
def drop(x, seed_ptr, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """x (R, COLUMNS) after dropout; x itself where seed_ptr is None."""
    if seed_ptr is not None:
        keep = dropout_mask(tl.load(seed_ptr), rows, 0, first_column, threshold, COLUMNS)
        x = tl.where(keep, x * (256.0 / (256 - threshold)), 0.0)
    return x


# ruff: enable[ANN001, ANN201]


def threshold_of(p: float) -> int:
    """256 p, rounded, and from 1 to 255 where p > 0. Raises ValueError unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {p}")
    if p == 0:
        return 0
    return min(max(round(256 * p), 1), 255)


seeds_at_hand: Iterator[Tensor] | None = None  # within `seeds_drawn_together`


@contextmanager
def seeds_drawn_together(device: torch.device) -> Iterator[None]:
    """Within this, operations that are given no seed take one of several drawn by one launch.

    A layer that is checkpointed must enter this inside its own forward pass: only then does it draw
    the same seeds when it is computed again.
    """
    global seeds_at_hand
    before = seeds_at_hand
    seeds_at_hand = draw_seeds(device)
    try:
        yield
    finally:
        seeds_at_hand = before


def draw_seeds(device: torch.device) -> Iterator[Tensor]:
    while True:
        yield from torch.randint(2**31, (SEEDS_AT_ONCE, 1), device=device).unbind()


def seed_on(device: torch.device, seed: int | Tensor | None) -> Tensor:
    """A seed as a (1,) int64 tensor on the device, drawn from torch's generator if it is None.

    The host does not wait for it, and a CUDA graph draws a new one at every replay. Raises
    ValueError for an integer outside [0, 2^63), or a tensor of another shape, dtype or device.
    """
    if seed is None:
        return next(draw_seeds(device) if seeds_at_hand is None else seeds_at_hand)
    if isinstance(seed, Tensor):
        if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != device:
            got = f"{list(seed.shape)} {seed.dtype} on {seed.device}"
            raise ValueError(f"dropout: seed must be (1,) int64 on {device}, got {got}")
        return seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"dropout: seed must be at least 0 and less than 2^63, got {seed}")
    return torch.full((1,), seed, device=device)
