"""The methods that are compared: what each trains a student on. The paper's idea is the entry
`dss`.

From one input x, Distilling Step-by-Step (Hsieh et al. 2023, section 3.2) trains two sequences,

    predict: x  ->  label            explain: x  ->  rationale

and answers with the first alone. `METHODS` holds this method, the methods it is compared with, and
its controls. To add a method, add an entry: train.py, predict and study read this table.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data.jsonl import Record
from dss.batch import LABEL, RATIONALE, Sequence
from tokenizer import T5Tokenizer

PREDICT = "predict: "  # the task prefixes of the paper's released code
EXPLAIN = "explain: "
SEPARATOR = "<extra_id_0>"  # between label and rationale in one target; every T5 has it


@dataclass(frozen=True)
class Target:
    """One task of a row, before anything is cut to length."""

    prefix: str  # PREDICT or EXPLAIN, before the input
    ids: list[int]  # what the student shall write
    task: int  # LABEL or RATIONALE: which mean in the loss its tokens belong to
    keep_last: int = 1  # ids at the end that stay when the target is too long


# ---- What a row with a label trains: one function a kind of method -------------------------------


def label_only(row: Record, tokenizer: T5Tokenizer) -> list[Target]:
    return [Target(PREDICT, tokenizer.encode(row.label), LABEL)]


def label_and_rationale(row: Record, tokenizer: T5Tokenizer) -> list[Target]:
    """Two tasks. A row without a rationale trains the label alone."""
    targets = label_only(row, tokenizer)
    if row.rationale is not None:
        targets.append(Target(EXPLAIN, tokenizer.encode(row.rationale), RATIONALE))
    return targets


def label_then_rationale(row: Record, tokenizer: T5Tokenizer) -> list[Target]:
    """One target: label <extra_id_0> rationale </s>. An answer ends at the separator.

    All of it counts as LABEL: one mean, and no lambda.
    """
    label = tokenizer.encode(row.label)[:-1]
    rationale = tokenizer.encode(row.rationale or "")
    return [Target(PREDICT, [*label, tokenizer.special[SEPARATOR], *rationale], LABEL)]


def rationale_then_label(row: Record, tokenizer: T5Tokenizer) -> list[Target]:
    """One target, which counts as LABEL: rationale <extra_id_0> label </s>.

    If it is too long, the rationale is cut.
    """
    rationale = tokenizer.encode(row.rationale or "")[:-1]
    label = [tokenizer.special[SEPARATOR], *tokenizer.encode(row.label)]
    return [Target(PREDICT, rationale + label, LABEL, keep_last=len(label))]


# ---- What a control does to the rows first -------------------------------------------------------


def same_rows(rows: list[Record], seed: int) -> list[Record]:
    return rows


def swap_rationales(rows: list[Record], seed: int) -> list[Record]:
    """Move each rationale to another row that had one. Text, length and extra steps stay as in
    step-by-step; the link between a question and its rationale is gone."""
    having = [i for i, row in enumerate(rows) if row.rationale is not None]
    order = [having[i] for i in np.random.default_rng(seed).permutation(len(having))]
    swapped = list(rows)
    for place, giver in enumerate(order):
        taker = order[(place + 1) % len(order)]
        swapped[taker] = replace(rows[taker], rationale=rows[giver].rationale)
    return swapped


def scramble_rationales(rows: list[Record], seed: int) -> list[Record]:
    """Put the words of each rationale into a random order. What it mentions stays, what it says is
    gone."""
    scrambled = []
    for i, row in enumerate(rows):
        if row.rationale is not None:
            words = np.random.default_rng((seed, i)).permutation(row.rationale.split())
            row = replace(row, rationale=" ".join(words))
        scrambled.append(row)
    return scrambled


# ---- The table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    targets: Callable[[Record, T5Tokenizer], list[Target]]  # what a row trains
    change_rows: Callable[[list[Record], int], list[Record]] = same_rows  # (rows, seed) -> rows
    rationales_needed: int = 0  # training rows with a rationale, at least
    label_position: Literal["alone", "first", "last"] = "alone"  # in what is written after PREDICT
    match_tokens_of: str = ""  # train for as many tokens as this method sees in --steps
    # How a picture shows it, which may be left out. The colours below are Okabe and Ito's, which
    # colour-blind readers tell apart.
    colour: str = "black"
    marker: str = "o"

    @property
    def learns_rationales(self) -> bool:
        return self.rationales_needed > 0


METHODS = {
    "standard": Method(label_only, colour="#555555", marker="o"),
    "dss": Method(
        label_and_rationale,
        rationales_needed=1,
        colour="#0072B2",
        marker="s",
    ),
    "label_first": Method(
        label_then_rationale,
        rationales_needed=1,
        label_position="first",
        colour="#CC79A7",
        marker="P",
    ),
    "single_task": Method(
        rationale_then_label,
        rationales_needed=1,
        label_position="last",
        colour="#009E73",
        marker="^",
    ),
    "dss-shuffled": Method(
        label_and_rationale,
        change_rows=swap_rationales,
        rationales_needed=2,
        colour="#D55E00",
        marker="D",
    ),
    "dss-scrambled": Method(
        label_and_rationale,
        change_rows=scramble_rationales,
        rationales_needed=1,
        colour="#E69F00",
        marker="X",
    ),
    "standard-matched": Method(
        label_only,
        match_tokens_of="dss",
        colour="#999999",
        marker="v",
    ),
}
BASELINE = "standard"  # reports compare the others with it


def require_methods(names: tuple[str, ...]) -> None:
    """Raise ValueError for a name that is not in the table."""
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--method {name}: no such method; known: {', '.join(METHODS)}")


def sequences(
    row: Record,
    method: str,
    tokenizer: T5Tokenizer,
    max_input_length: int = 1024,
    max_target_length: int = 256,
    cut: Counter | None = None,
) -> list[Sequence]:
    """The sequences that a method trains on for one row; none if its label is None.

    method: a name in METHODS. Lengths are in tokens, prefix and </s> included. cut: counts the
    "inputs" and "targets" that were too long.
    """
    if row.label is None:
        return []
    found = []
    for target in METHODS[method].targets(row, tokenizer):
        input_ids = tokenizer.encode(target.prefix + row.input)
        if cut is not None:
            cut["inputs"] += len(input_ids) > max_input_length
            cut["targets"] += len(target.ids) > max_target_length
        input_ids = shorten(input_ids, max_input_length)
        target_ids = shorten(target.ids, max_target_length, target.keep_last)
        found.append(Sequence(input_ids, target_ids, target.task))
    return found


def shorten(ids: list[int], longest: int, keep_last: int = 1) -> list[int]:
    """At most `longest` ids: the last `keep_last` stay, and what stands before them is cut at its
    end."""
    if len(ids) <= longest:
        return ids
    end = ids[-keep_last:]
    if len(end) > longest:
        end = shorten(end, longest)
    return ids[: longest - len(end)] + end


def label_ids(tokenizer: T5Tokenizer, label: str, method: str) -> list[int]:
    """The ids of a label as a student of this method writes it, with the token that ends it: </s>,
    or the separator where a rationale follows."""
    ids = tokenizer.encode(label)
    if METHODS[method].label_position == "first":
        ids[-1] = tokenizer.special[SEPARATOR]
    return ids
