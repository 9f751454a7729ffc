"""From rows to packed batches: each row becomes the sequences its method trains on, and a step's sequences one stream.

The method in two sequences (Hsieh et al. 2023, section 3.2): from one input x,

    predict: x  ->  label            explain: x  ->  rationale

There is no padding. A `Batch` holds all inputs of a step one after another in one stream of tokens, all targets in
another, and `Segments` says where each sequence begins. Both tasks lie in the same two streams, so a step is one
forward and one backward pass.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import torch

from data.jsonl import Record
from tokenizer import T5Tokenizer

Device = str | torch.device
PREDICT, EXPLAIN = "predict: ", "explain: "  # the task prefixes of the paper's released code
LABEL, RATIONALE = 0, 1  # the two tasks
SEPARATOR = "<extra_id_0>"  # between label and rationale in one target; a sentinel is one token of every T5 vocabulary


class Sequence(NamedTuple):
    input_ids: list[int]
    target_ids: list[int]
    task: int  # LABEL or RATIONALE


class Segments(NamedTuple):
    """Where the sequences of a packed stream begin, in FlashAttention's terms."""

    cu_seqlens: torch.Tensor  # (B + 1,) int32: sequence b is the tokens cu_seqlens[b] : cu_seqlens[b + 1]
    max_seqlen: int  # on the host, so that nobody has to ask the device


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor  # (T_in,) int64, all inputs
    inputs: Segments
    decoder_input_ids: torch.Tensor  # (T,) int64, all targets, each shifted right behind a start token
    labels: torch.Tensor  # (T,) int64, the tokens to predict
    task: torch.Tensor  # (T,) int64, LABEL or RATIONALE, for each target token
    targets: Segments


def sequences(
    row: Record,
    method: str,
    tokenizer: T5Tokenizer,
    max_input_length: int = 1024,
    max_target_length: int = 256,
    cut: Counter | None = None,
) -> list[Sequence]:
    """The sequences that `method` trains on for one row, whose rationale is a text or None.

    standard: predict -> label. dss: that, and explain -> rationale where the row has one. With both in one target:
    predict -> rationale, separator, label (single_task); predict -> label, separator, rationale (label_first). A
    control trains on what the method that it is named after does. A row whose label is None trains nothing.
    cut: counts the inputs and targets that were too long.
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


def count_targets(sequences: list[Sequence]) -> tuple[int, int]:
    """(N_label, N_rationale): target tokens of each task, what the mean in each task's loss is taken over."""
    counts = [0, 0]
    for sequence in sequences:
        counts[sequence.task] += len(sequence.target_ids)
    return tuple(counts)


def segments(lengths: list[int], device: Device = "cpu") -> Segments:
    """`Segments` for sequences of these lengths (integers >= 1)."""
    return Segments(to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device), max(lengths))


def pack(sequences: list[Sequence], device: Device = "cpu", start_token: int = 0) -> Batch:
    """A non-empty list of Sequences, each side of each non-empty, as one Batch on `device`."""

    def stream(lists: Iterable[list[int]]) -> torch.Tensor:
        return to_device(torch.tensor(list(chain.from_iterable(lists))), device)

    inputs = [s.input_ids for s in sequences]
    targets = [s.target_ids for s in sequences]
    return Batch(
        input_ids=stream(inputs),
        inputs=segments(list(map(len, inputs)), device),
        decoder_input_ids=stream([start_token, *ids[:-1]] for ids in targets),
        labels=stream(targets),
        task=stream([s.task] * len(s.target_ids) for s in sequences),
        targets=segments(list(map(len, targets)), device),
    )


def to_device(tensor: torch.Tensor, device: Device) -> torch.Tensor:
    """A CPU tensor on `device`. The host does not wait for a GPU: it copies from pinned memory, on its own."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
