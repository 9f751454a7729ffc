"""Philox4x32-7 in NumPy, after the paper, and the masks that the Triton kernels draw with it.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy as np
import torch


def philox(seed, counters, rounds=7):
    """Four uint64 arrays of 32-bit words for four arrays of 32-bit counters and a 64-bit seed."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(x, dtype=np.uint64) for x in counters]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(rounds):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            b >> np.uint64(32) ^ c[1] ^ np.uint64(k[0]),
            b & low,
            a >> np.uint64(32) ^ c[3] ^ np.uint64(k[1]),
            a & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def mask(seed, rows, plane, columns, threshold):
    """What kernels/dropout.py multiplies by: (R, columns) for rows (R,)."""
    row, column = np.broadcast_arrays(np.asarray(rows)[:, None], np.arange(columns)[None, :])
    group = 4 * (column // 64) + column % 8 // 2
    words = philox(seed, (row, np.full_like(row, plane), group, np.zeros_like(row)))
    place = 2 * (column % 64 // 8) + column % 2
    byte = np.choose(place // 4, words) >> (8 * (place % 4)).astype(np.uint64) & np.uint64(255)
    return torch.from_numpy((byte >= threshold) * (256 / (256 - threshold)))
