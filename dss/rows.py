"""Which rows train the student, which select it and which test it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import toy
from data.answers import choose_label_type
from data.jsonl import Record, read_jsonl
from dss.config import TrainConfig


@dataclass(frozen=True)
class Rows:
    name: str  # of the data, for the output directory
    train: list[Record]  # .label is the one to train on, gold or the teacher's
    validation: list[Record]
    test: list[Record]  # may be empty
    metric: str  # text, choice or equation
    labels: list[str]  # all labels that training rows have, sorted, if they are a closed set; else empty
    unlabelled: int  # training rows left out because they have no label of the kind asked for


def load_rows(config: TrainConfig, read: Callable[[str], Iterable[Record]] = read_jsonl) -> Rows:
    """The `Rows` of a TrainConfig. Raises OSError or ValueError, naming the file, for rows that cannot be used.

    The validation rows are those of --eval-data, or a share cut from the training rows. A share that is cut has the
    labels of training: with --labels teacher, students are selected on a teacher's labels. Test labels are always gold.
    --subsample is the share of all labelled rows of --data, and the validation cut comes out of that share. With
    --labels gold-or-teacher it is the share of gold labels; every other row with a teacher's label trains on that, as
    the paper does with unlabelled questions (section 4.2). read: reads a file; a study reads each once for all runs.
    """
    if config.data:
        name = Path(config.data[0]).stem
        rows = [record for path in config.data for record in read(path)]
        validation = labelled(read(config.eval_data), config.eval_data, "evaluate on") if config.eval_data else []
        test = labelled(read(config.test_data), config.test_data, "test on") if config.test_data else []
    elif config.eval_data or config.test_data:
        raise ValueError("--eval-data and --test-data go with --data")
    else:
        name, (rows, validation, test) = "toy", toy.make_rows(config.seed)
    files, everything = ", ".join(config.data) or name, rows
    if config.labels == "teacher":
        rows = [replace(record, label=record.teacher_label) for record in rows]
    rows = labelled(rows, files, "train on", "teacher" if config.labels == "teacher" else "gold")

    order = np.random.default_rng(config.seed).permutation(len(rows))
    share = max(1, round(config.subsample * len(rows)))
    unlabelled = len(everything) - len(rows)
    rows, left = [rows[i] for i in order[:share]], [rows[i] for i in order[share:]]
    if not validation:
        cut = max(1, round(config.eval_fraction * len(rows)))
        validation, rows = rows[:cut], rows[cut:]
    if config.labels == "gold-or-teacher":
        left += [record for record in everything if record.label is None]
        added = [replace(record, label=record.teacher_label) for record in left if record.teacher_label is not None]
        rows, unlabelled = rows + added, len(left) - len(added)
    if not rows:
        flags = "--eval-fraction, --eval-data, --subsample"
        raise ValueError(f"{files}: one usable row cannot both train and validate; see {flags}")
    require_rationales(files, rows, config)
    metric = config.metric if config.metric != "auto" else choose_label_type(rows + validation + test)
    return Rows(name, rows, validation, test, metric, closed_set(rows, metric), unlabelled)


def closed_set(rows: list[Record], metric: str) -> list[str]:
    """The labels of the rows, sorted, if they look like classes: texts, 2 to 50 of them, each 5 times on average."""
    labels = sorted({record.label for record in rows})
    return labels if metric == "text" and 2 <= len(labels) <= min(50, len(rows) / 5) else []


def require_rationales(files: str, rows: list[Record], config: TrainConfig) -> None:
    """Raise ValueError for a method whose rows have too few rationales: none, or only one to swap."""
    having = sum(record.rationale is not None for record in rows)
    for method in config.method:
        least = {"standard": 0, "standard-matched": 0, "dss-shuffled": 2}.get(method, 1)
        if having < least and (config.lam or not method.startswith("dss")):
            few = "no training row has" if not having else "only one training row has"
            raise ValueError(f"{files}: {few} a rationale, too few for --method {method}; --method standard needs none")


def count_shared(rows: Rows) -> tuple[int, int]:
    """(n, m): how many validation inputs, and how many test inputs, are inputs of training rows too."""
    known = {record.input for record in rows.train}
    return tuple(sum(record.input in known for record in part) for part in (rows.validation, rows.test))


def labelled(rows: Iterable[Record], files: str, use: str, kind: str = "gold") -> list[Record]:
    """Those that have a label. Raises ValueError if there are none."""
    if rows := [record for record in rows if record.label is not None]:
        return rows
    raise ValueError(f"{files}: no row has a {kind} label to {use}")


def rows_for(method: str, rows: list[Record], seed: int) -> list[Record]:
    """The rows as a method trains on them: two of the controls change the rationales."""
    if method == "dss-shuffled":
        return swap_rationales(rows, seed)
    if method == "dss-scrambled":
        return [scramble_rationale(row, (seed, i)) for i, row in enumerate(rows)]
    return rows


def swap_rationales(rows: list[Record], seed: int) -> list[Record]:
    """The rows with each rationale moved to another row that had one: the control that keeps everything of
    step-by-step (text, length, extra steps) but the link between a question and its rationale."""
    having = [i for i, record in enumerate(rows) if record.rationale is not None]
    order = [having[j] for j in np.random.default_rng(seed).permutation(len(having))]
    swapped = list(rows)
    for giver, taker in zip(order, order[1:] + order[:1]):
        swapped[taker] = replace(rows[taker], rationale=rows[giver].rationale)
    return swapped


def scramble_rationale(row: Record, seed: tuple[int, int]) -> Record:
    """The row with the words of its rationale in a random order, the same in every epoch: the control that keeps what a
    rationale mentions but not what it says."""
    if row.rationale is None:
        return row
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.permutation(text.split())) for text in as_list(row.rationale)]
    return replace(row, rationale=texts if isinstance(row.rationale, list) else texts[0])


def single_rationales(row: Record) -> list[Record]:
    """The row once for each of its rationales, or as it is if it has none."""
    return [replace(row, rationale=text) for text in as_list(row.rationale)] or [row]


def as_list(rationale: str | list[str] | None) -> list[str]:
    return [] if rationale is None else [rationale] if isinstance(rationale, str) else rationale
