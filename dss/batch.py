"""Packed batches: the sequences of a step in two streams of tokens, without padding.

A `Batch`, which is a step or a part of one, holds its inputs one after another in one stream, its
targets in a second, and `Segments` says where each begins. The sequences of both tasks are in the
same two streams, so a batch is one forward and one backward pass. (Padded to the longest, 29 % of
the positions of a CommonsenseQA batch would be padding.)
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

import kernels

Device = str | torch.device
LABEL = 0  # the two tasks
RATIONALE = 1
NO_TASK = -1  # of sequences that fill up a batch and count for nothing


class Sequence(NamedTuple):
    input_ids: list[int]  # or an array of ints
    target_ids: list[int]
    task: int  # LABEL, RATIONALE or NO_TASK


class Segments(NamedTuple):
    """Where the sequences of a packed stream begin, in FlashAttention's terms."""

    cu_seqlens: torch.Tensor  # (B + 1,) int32: sequence b is cu_seqlens[b] : cu_seqlens[b + 1]
    max_seqlen: int  # a Python int, so that nobody has to ask the device
    tiles: kernels.Tiles | None = None  # for the Triton kernels, listed once a batch


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor  # (T_in,) int64, all inputs
    inputs: Segments
    decoder_input_ids: torch.Tensor  # (T,) int64, all targets, each shifted right by a start token
    labels: torch.Tensor  # (T,) int64, the tokens to predict
    task: torch.Tensor  # (T,) int64, the task of each target token
    targets: Segments


def pack(
    sequences: list[Sequence],
    device: Device = "cpu",
    start_token: int = 0,
    exact_tiles: bool = True,
) -> Batch:
    """One Batch on `device` of a non-empty list of Sequences, none of whose ids are empty.

    exact_tiles: see `kernels.make_tiles`.
    """
    target_lengths = [len(s.target_ids) for s in sequences]
    labels = np.concatenate([s.target_ids for s in sequences])
    decoder_input_ids = np.roll(labels, 1)
    decoder_input_ids[[0, *accumulate(target_lengths[:-1])]] = start_token
    return Batch(
        input_ids=stream(np.concatenate([s.input_ids for s in sequences]), device),
        inputs=segments([len(s.input_ids) for s in sequences], device, exact_tiles),
        decoder_input_ids=stream(decoder_input_ids, device),
        labels=stream(labels, device),
        task=stream(np.repeat([s.task for s in sequences], target_lengths), device),
        targets=segments(target_lengths, device, exact_tiles),
    )


def segments(lengths: list[int], device: Device = "cpu", exact_tiles: bool = True) -> Segments:
    """`Segments` for sequences of these lengths (integers >= 1)."""
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    tiles = None
    if kernels.choice(torch.device(device)) == "triton":
        tiles = kernels.make_tiles(cu_seqlens, sum(lengths), exact=exact_tiles)
        tiles = replace(
            tiles, queries=to_device(tiles.queries, device), keys=to_device(tiles.keys, device)
        )
    return Segments(to_device(cu_seqlens, device), max(lengths), tiles)


def stream(ids: np.ndarray, device: Device) -> torch.Tensor:
    return to_device(torch.from_numpy(ids.astype(np.int64)), device)


def to_device(tensor: torch.Tensor, device: Device) -> torch.Tensor:
    """A CPU tensor on `device`. A GPU copies from pinned memory, so that the host does not wait."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def count_targets(sequences: list[Sequence]) -> tuple[int, int]:
    """(N_label, N_rationale): the target tokens of each task, over which its loss is a mean."""
    count = {LABEL: 0, RATIONALE: 0}
    for s in sequences:
        count[s.task] += len(s.target_ids)
    return count[LABEL], count[RATIONALE]


def count_tokens(row: list[Sequence]) -> int:
    """Input and target tokens."""
    return sum(len(s.input_ids) + len(s.target_ids) for s in row)


# ---- A step of training: its rows divided among processes and into micro-batches -----------------


@dataclass(frozen=True)
class Step:
    """What one process computes of an optimiser step, and the counts of the whole step."""

    batches: list[Batch]  # as many in every process
    n_label: int | torch.Tensor  # target tokens of the whole step
    n_rationale: int | torch.Tensor  # tensors in a step that is captured (dss/graph.py)
    tokens: int  # inputs and targets of the whole step
    padded: bool = False  # whether its batch is as large as the budget


def make_step(
    rows: list[list[Sequence]],
    micro_batch: int,
    device: Device,
    start_token: int = 0,
    rank: int = 0,
    size: int = 1,
    budget: "Budget | None" = None,
) -> Step:
    """The part of process `rank` of `size`: a share of the rows' tokens, `micro_batch` rows at a
    time (0: all); padded to a budget if it fits."""
    parts = share_tokens(rows, size)
    most = max(len(part) for part in parts)
    rows_at_a_time = micro_batch or most
    batches = []
    padding = []
    for first in range(0, most, rows_at_a_time):
        part = parts[rank][first : first + rows_at_a_time]
        sequences = join(part) or [NOTHING]
        if budget:
            padding = budget.padding(sequences)
        batches.append(pack(sequences + padding, device, start_token, exact_tiles=not padding))
    n_label, n_rationale = count_targets(join(rows))
    return Step(batches, n_label, n_rationale, count_tokens(join(rows)), padded=bool(padding))


NOTHING = Sequence([1], [1], NO_TASK)  # for a process without a row


SPARE = 8  # sequences of padding beside the largest batch: so many are about as short as real ones


@dataclass(frozen=True)
class Budget:
    """What batches are padded to where all must have one shape (dss/graph.py)."""

    sequences: int
    input_tokens: int
    target_tokens: int

    @classmethod
    def of(cls, batches: list[list[Sequence]]) -> "Budget":
        """The least into which each of these batches fits."""
        sequences = max(map(len, batches)) + SPARE
        inputs = []
        targets = []
        for batch in batches:
            added = sequences - len(batch)  # each of at least one token
            inputs.append(sum(len(s.input_ids) for s in batch) + added)
            targets.append(sum(len(s.target_ids) for s in batch) + added)
        return cls(sequences, round_up(max(inputs)), round_up(max(targets)))

    def padding(self, sequences: list[Sequence]) -> list[Sequence]:
        """Sequences of NO_TASK that fill a batch up; none if it does not fit."""
        number = self.sequences - len(sequences)
        inputs = self.input_tokens - sum(len(s.input_ids) for s in sequences)
        targets = self.target_tokens - sum(len(s.target_ids) for s in sequences)
        if not 1 <= number <= min(inputs, targets):
            return []
        lengths = zip(divide(inputs, number), divide(targets, number))
        return [Sequence([1] * n, [1] * m, NO_TASK) for n, m in lengths]


def round_up(tokens: int) -> int:
    """To a multiple of 64, the rows of the largest tiles."""
    return -(-tokens // 64) * 64


def divide(total: int, parts: int) -> list[int]:
    """Integers that differ by at most 1 and add up to the total."""
    return [(total + part) // parts for part in range(parts)]


def join(rows: list[list[Sequence]]) -> list[Sequence]:
    return [sequence for row in rows for sequence in row]


def share_tokens(rows: list[list[Sequence]], size: int) -> list[list[list[Sequence]]]:
    """The rows in `size` parts of about as many tokens: longest rows first, each to the part that
    has least."""
    if size == 1:
        return [rows]
    parts = [[] for _ in range(size)]
    tokens = [0] * size
    for row in sorted(rows, key=count_tokens, reverse=True):
        least = tokens.index(min(tokens))
        parts[least].append(row)
        tokens[least] += count_tokens(row)
    return parts


def ahead(prepare: Callable[[Any], Any], items: Iterable, depth: int = 2) -> Iterator:
    """prepare(item) for each item, made by a thread that keeps `depth` results ready."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque()
        for item in items:
            waiting.append(thread.submit(prepare, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
