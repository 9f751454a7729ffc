"""From rows to packed batches: each row becomes the sequences its method trains on, and a step's sequences one stream.

The method in two sequences (Hsieh et al. 2023, section 3.2): from one input x,

    predict: x  ->  label            explain: x  ->  rationale

There is no padding. A `Batch` holds all inputs of a step one after another in one stream of tokens, all targets in
another, and `Segments` says where each sequence begins. Both tasks lie in the same two streams, so a step is one
forward and one backward pass.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

PREDICT, EXPLAIN = "predict: ", "explain: "  # the task prefixes of the paper's released code
LABEL, RATIONALE = 0, 1  # the two tasks
SEPARATOR = "<extra_id_0>"  # single_task: RATIONALE <extra_id_0> LABEL; a sentinel is one token of every T5 vocabulary


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


def sequences(row, method, tokenizer, max_input_length=1024, max_target_length=256, cut=None):
    """The sequences that `method` trains on for one row, any object with .input, .label and .rationale.

    standard, standard-matched: predict -> label. dss, dss-shuffled: that, and explain -> rationale where the row has
    one. single_task: predict -> rationale and label in one target. A row whose label is None trains nothing.
    cut: a Counter that is told of every input and target too long for its limit.
    """
    cut = Counter() if cut is None else cut
    if row.label is None:
        return []
    question = encode(tokenizer, PREDICT + row.input, max_input_length, cut, "inputs")
    if method == "single_task":
        rationale, label = tokenizer.encode(row.rationale or "")[:-1], tokenizer.encode(f"{SEPARATOR} {row.label}")
        cut["targets"] += len(rationale) + len(label) > max_target_length
        label = shorten(label, max_target_length)
        return [Sequence(question, rationale[: max_target_length - len(label)] + label, LABEL)]
    result = [Sequence(question, encode(tokenizer, row.label, max_target_length, cut, "targets"), LABEL)]
    if method.startswith("dss") and row.rationale is not None:
        question = encode(tokenizer, EXPLAIN + row.input, max_input_length, cut, "inputs")
        target = encode(tokenizer, row.rationale, max_target_length, cut, "targets")
        result.append(Sequence(question, target, RATIONALE))
    return result


def split_answer(ids, separator):
    """What a single_task student writes -> (rationale ids, label ids). No separator, no label: it ended too early."""
    cut = ids.index(separator) if separator in ids else len(ids)
    return ids[:cut], ids[cut:]


def encode(tokenizer, text, longest, cut=None, kind=""):
    """The ids of a text, at most `longest`: cut at the end, but </s> stays, and counted in the Counter `cut`."""
    ids = tokenizer.encode(text)
    if cut is not None:
        cut[kind] += len(ids) > longest
    return shorten(ids, longest)


def shorten(ids, longest):
    return ids if len(ids) <= longest else ids[: longest - 1] + ids[-1:]


def count_targets(sequences):
    """(N_label, N_rationale): target tokens of each task, what the mean in each task's loss is taken over."""
    counts = [0, 0]
    for sequence in sequences:
        counts[sequence.task] += len(sequence.target_ids)
    return tuple(counts)


def segments(lengths, device="cpu"):
    """`Segments` for sequences of these lengths (integers >= 1)."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return Segments(starts.to(device, non_blocking=True), max(lengths))  # the host does not wait for the device


def pack(sequences, device="cpu", start_token=0):
    """A non-empty list of Sequences, each side of each non-empty, as one Batch on `device`."""

    def stream(lists):
        return torch.tensor([token for ids in lists for token in ids]).to(device, non_blocking=True)

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
