"""From rows to packed batches: each row becomes the sequences its method trains on, and a step's sequences one stream.

The method in two sequences (Hsieh et al. 2023, section 3.2): from one input x,

    predict: x  ->  label            explain: x  ->  rationale

There is no padding, which would be computed for nothing. A `Batch`, which is a step or a part of one, holds its inputs
one after another in one stream of tokens, its targets in a second, and `Segments` says where each begins. Both tasks
lie in the same two streams, so a batch is one forward and one backward pass.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from data.jsonl import Record
from tokenizer import T5Tokenizer

Device = str | torch.device
PREDICT, EXPLAIN = "predict: ", "explain: "  # the task prefixes of the paper's released code
LABEL, RATIONALE = 0, 1  # the two tasks
SEPARATOR = "<extra_id_0>"  # between label and rationale in one target; a sentinel is one token of every T5 vocabulary


class Sequence(NamedTuple):
    input_ids: list[int]  # or an array of ints, as in `Examples`
    target_ids: list[int]
    task: int  # LABEL or RATIONALE


NOTHING = Sequence([1], [1], -1)  # of no task, so of no weight in the loss: for a process with no row to compute


class Segments(NamedTuple):
    """Where the sequences of a packed stream begin, in FlashAttention's terms."""

    cu_seqlens: torch.Tensor  # (B + 1,) int32: sequence b is the tokens cu_seqlens[b] : cu_seqlens[b + 1]
    max_seqlen: int  # on the host, so that nobody has to ask the device


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor  # (T_in,) int64, all inputs
    inputs: Segments
    decoder_input_ids: torch.Tensor  # (T,) int64, all targets, each shifted right, after a start token
    labels: torch.Tensor  # (T,) int64, the tokens to predict
    task: torch.Tensor  # (T,) int64, LABEL or RATIONALE (or neither: NOTHING) for each target token
    targets: Segments


def sequences(
    row: Record,
    method: str,
    tokenizer: T5Tokenizer,
    max_input_length: int = 1024,
    max_target_length: int = 256,
    cut: Counter | None = None,
) -> list[Sequence]:
    """The sequences that `method`, one of dss.config.METHODS, trains on for a row whose rationale is a text or None.

    A row whose label is None has none. cut: counts the inputs and targets that were too long.
    """
    cut = Counter() if cut is None else cut
    if row.label is None:
        return []
    question, label = tokenizer.encode(PREDICT + row.input), label_ids(tokenizer, row.label, method)
    rationale = tokenizer.encode(row.rationale or "")
    if method == "single_task":
        label = [tokenizer.special[SEPARATOR], *label]
        cut["targets"] += len(rationale) - 1 + len(label) > max_target_length
        label = shorten(label, max_target_length)  # where there is no room for both, the rationale is cut
        pairs = [(question, rationale[:-1][: max_target_length - len(label)] + label, LABEL)]
    elif method == "label_first":
        pairs = [(question, label + rationale, LABEL)]
    else:
        pairs = [(question, label, LABEL)]
        if method.startswith("dss") and row.rationale is not None:
            pairs.append((tokenizer.encode(EXPLAIN + row.input), rationale, RATIONALE))
    cut["inputs"] += sum(len(ids) > max_input_length for ids, _, _ in pairs)
    cut["targets"] += sum(len(ids) > max_target_length for _, ids, _ in pairs)
    return [Sequence(shorten(x, max_input_length), shorten(y, max_target_length), task) for x, y, task in pairs]


def label_ids(tokenizer: T5Tokenizer, label: str, method: str) -> list[int]:
    """The ids of a label, ending in what ends it: </s>, or for label_first the separator before the rationale."""
    ids = tokenizer.encode(label)
    return [*ids[:-1], tokenizer.special[SEPARATOR]] if method == "label_first" else ids


def shorten(ids: list[int], longest: int) -> list[int]:
    """At most `longest` ids: cut at the end, but the last one, </s>, stays."""
    return ids if len(ids) <= longest else ids[: longest - 1] + ids[-1:]


class Examples(list):
    """For each row, for each of its rationales, the sequences: in arrays, since lists take four times the memory."""

    def add(self, variants: Iterable[list[Sequence]]) -> None:
        """Add a row: for each of its rationales the sequences to train on."""
        self.append([[Sequence(array("i", x), array("i", y), task) for x, y, task in variant] for variant in variants])

    def sequences(self, row: int, epoch: int = 0) -> list[Sequence]:
        """What to train on of a row: each epoch takes the next of its rationales."""
        return self[row][epoch % len(self[row])]


def count_targets(sequences: list[Sequence]) -> tuple[int, int]:
    """(N_label, N_rationale): target tokens of each task, what the mean in each task's loss is taken over."""
    return tuple(sum(len(s.target_ids) for s in sequences if s.task == task) for task in (LABEL, RATIONALE))


def segments(lengths: list[int], device: Device = "cpu") -> Segments:
    """`Segments` for sequences of these lengths (integers >= 1)."""
    return Segments(to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device), max(lengths))


def pack(sequences: list[Sequence], device: Device = "cpu", start_token: int = 0) -> Batch:
    """A non-empty list of Sequences, inputs and targets non-empty, as one Batch on `device`."""

    def stream(ids: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(ids.astype(np.int64)), device)

    inputs, targets = ([len(s[side]) for s in sequences] for side in (0, 1))
    labels = np.concatenate([s.target_ids for s in sequences])
    shifted = np.roll(labels, 1)
    shifted[[0, *accumulate(targets[:-1])]] = start_token
    return Batch(
        input_ids=stream(np.concatenate([s.input_ids for s in sequences])),
        inputs=segments(inputs, device),
        decoder_input_ids=stream(shifted),
        labels=stream(labels),
        task=stream(np.repeat([s.task for s in sequences], targets)),
        targets=segments(targets, device),
    )


class Step(NamedTuple):
    """What one process computes of an optimiser step, and what it has to know of the whole step."""

    batches: list[Batch]  # as many in every process
    n_label: int  # target tokens of the whole step
    n_rationale: int
    tokens: int  # inputs and targets of the whole step


def make_step(
    rows: list[list[Sequence]], micro_batch: int, device: Device, start_token: int = 0, rank: int = 0, size: int = 1
) -> Step:
    """The part of process `rank` of `size` in a step: a share of the rows' tokens, `micro_batch` rows at a time."""
    parts = share_tokens(rows, size)
    most = max(map(len, parts))
    passes = [parts[rank][i : i + (micro_batch or most)] for i in range(0, most, micro_batch or most)]
    batches = [pack([s for row in part for s in row] or [NOTHING], device, start_token) for part in passes]
    return Step(batches, *count_targets([s for row in rows for s in row]), sum(map(count_tokens, rows)))


def ahead(prepare: Callable, items: Iterable, depth: int = 2) -> Iterator:
    """prepare(item) for each item, by a thread that is `depth` items ahead of whoever takes the results."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque()
        for item in items:
            waiting.append(thread.submit(prepare, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def share_tokens(rows: list[list[Sequence]], size: int) -> list[list[list[Sequence]]]:
    """The rows in `size` parts of about as many tokens: the longest rows first, each to the part that has least."""
    if size == 1:
        return [rows]
    parts, tokens = [[] for _ in range(size)], [0] * size
    for row in sorted(rows, key=count_tokens, reverse=True):
        least = tokens.index(min(tokens))
        parts[least].append(row)
        tokens[least] += count_tokens(row)
    return parts


def count_tokens(row: list[Sequence]) -> int:
    return sum(len(s.input_ids) + len(s.target_ids) for s in row)


def to_device(tensor: torch.Tensor, device: Device) -> torch.Tensor:
    """A CPU tensor on `device`. The host does not wait for a GPU: it copies from pinned memory, on its own."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
