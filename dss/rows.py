"""Which rows train the student, which select it and which test it; and the tokenizer that they
train."""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import toy
from data.answers import choose_label_type, closed_set, is_free_text, label_key
from data.jsonl import Record, read_jsonl
from dss.config import TrainConfig
from dss.methods import BASELINE, EXPLAIN, METHODS, PREDICT, SEPARATOR
from dss.weights import resolve_checkpoint
from tokenizer import T5Tokenizer, train

TEXTS_ROWS = 50_000  # rows whose texts train a tokenizer; more take minutes and change little


@dataclass(frozen=True)
class Rows:
    name: str  # of the data, for the output directory
    train: list[Record]  # .label is the one to train on, gold or the teacher's
    validation: list[Record]
    test: list[Record]  # may be empty
    metric: str  # text, choice or equation
    labels: list[str]  # all labels of training rows, sorted, if they are a closed set; else empty
    unlabelled: int  # training rows left out because they have no label of the kind asked for
    free_text: bool  # whether labels are sentences, nearly all of them different

    @property
    def asked(self) -> list[Record]:
        """The rows that students are compared on."""
        return self.test or self.validation

    @property
    def asked_name(self) -> str:
        return "test" if self.test else "validation"


def load_rows(config: TrainConfig) -> Rows:
    """The `Rows` of a TrainConfig. Raises OSError or ValueError, naming the file, for rows that
    cannot be used.

    The validation rows are those of --eval-data, or a share cut from the training rows. A share
    that is cut has the labels of training: with --labels teacher, students are selected on a
    teacher's labels. Test labels are always gold. --subsample is the share of all labelled rows of
    --data, and the validation cut comes out of that share. With --labels gold-or-teacher it is the
    share of gold labels; every other row with a teacher's label trains on that, as the paper does
    with unlabelled questions (section 4.2).
    """
    name, everything, validation, test = read_files(config)
    files = ", ".join(config.data) or name
    kind = "teacher" if config.labels == "teacher" else "gold"
    usable = labelled(everything, files, kind, "train on")

    order = np.random.default_rng(config.seed).permutation(len(usable))
    share = max(1, round(config.subsample * len(usable)))
    rows = [usable[i] for i in order[:share]]
    unlabelled = len(everything) - len(usable)
    if not validation:
        cut = max(1, round(config.eval_fraction * len(rows)))
        validation = rows[:cut]
        rows = rows[cut:]
    if config.labels == "gold-or-teacher":
        left = [usable[i] for i in order[share:]]
        left += [record for record in everything if record.label is None]
        added = with_teacher_labels(left)
        rows = rows + added
        unlabelled = len(left) - len(added)
    if not rows:
        flags = "--eval-fraction, --eval-data, --subsample"
        raise ValueError(f"{files}: one usable row cannot both train and validate; see {flags}")
    require_rationales(files, rows, config.method)
    metric = config.metric
    if metric == "auto":
        metric = choose_label_type(rows + validation + test)
    labels = [row.label for row in rows]
    return Rows(
        name,
        rows,
        validation,
        test,
        metric,
        labels=closed_set(labels, metric),
        unlabelled=unlabelled,
        free_text=is_free_text(labels, metric),
    )


def read_files(config: TrainConfig) -> tuple[str, list[Record], list[Record], list[Record]]:
    """(name of the data, rows of --data, labelled rows of --eval-data, and of --test-data)."""
    if not config.data and (config.eval_data or config.test_data):
        raise ValueError("--eval-data and --test-data go with --data")
    if not config.data:
        return "toy", *toy.make_rows(config.seed)
    everything = [record for path in config.data for record in read_jsonl(path)]
    validation = read_labelled(config.eval_data, "evaluate on")
    test = read_labelled(config.test_data, "test on")
    return Path(config.data[0]).stem, everything, validation, test


def read_labelled(path: str, use: str) -> list[Record]:
    if not path:
        return []
    return labelled(list(read_jsonl(path)), path, "gold", use)


def labelled(rows: list[Record], files: str, kind: str, use: str) -> list[Record]:
    """The rows with a label of this kind, gold or teacher, as their label. Raises ValueError if
    there are none."""
    if kind == "teacher":
        found = with_teacher_labels(rows)
    else:
        found = [row for row in rows if row.label is not None]
    if not found:
        raise ValueError(f"{files}: no row has a {kind} label to {use}")
    return found


def with_teacher_labels(rows: list[Record]) -> list[Record]:
    """The rows that have a teacher's label, with that as their label."""
    return [replace(row, label=row.teacher_label) for row in rows if row.teacher_label is not None]


def require_rationales(files: str, rows: list[Record], methods: tuple[str, ...]) -> None:
    """Raise ValueError for a method that needs more rationales than the rows have."""
    number = sum(record.rationale is not None for record in rows)
    unread = sorted({key for record in rows for key in record.other})
    keys = f" (keys that are not read: {', '.join(unread[:5])})" if unread else ""
    for method in methods:
        if number < METHODS[method].rationales_needed:
            raise ValueError(
                f"{files}: {number} training rows have a rationale{keys}, too few for --method "
                f"{method}; --method {BASELINE} needs none"
            )


def make_tokenizer(config: TrainConfig, rows: Rows, out: Path) -> T5Tokenizer:
    """--spiece, or the weights' own, or one trained on the texts of the training rows; under
    --resume the run's own.

    Raises ValueError where a method needs a separator and there is none, and for labels that the
    tokenizer cannot tell apart; warns of a --spiece that is not the weights'.
    """
    if config.spiece:
        tokenizer = T5Tokenizer(config.spiece)
        if config.weights:
            own = resolve_checkpoint(config.weights, weights=False) / "spiece.model"
            if own.exists() and own.read_bytes() != tokenizer.model:
                what = f"--spiece {config.spiece} is not the tokenizer of {config.weights}"
                print(f"train.py: warning: {what}", file=sys.stderr)
    elif config.weights:
        tokenizer = T5Tokenizer(resolve_checkpoint(config.weights, weights=False))
    elif config.resume and (out / "spiece.model").exists():
        tokenizer = T5Tokenizer(out)
    else:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "spiece.model"
            tokenizer = train(texts_of(rows.train), path, config.vocab_size)
    for method in config.method:
        writes_separator = METHODS[method].label_position != "alone"
        if writes_separator and SEPARATOR not in tokenizer.special:
            raise ValueError(
                f"--method {method} needs the token {SEPARATOR}, and this tokenizer has "
                "no sentinels"
            )
    if not rows.free_text:
        require_different_ids(rows, tokenizer)
    return tokenizer


def require_different_ids(rows: Rows, tokenizer: T5Tokenizer) -> None:
    """Raise ValueError for two different labels of training rows that are the same token ids."""
    known: dict[tuple, str] = {}
    for label in sorted({row.label for row in rows.train}):
        other = known.setdefault(tuple(tokenizer.encode(label)), label)
        if label_key(label, rows.metric) != label_key(other, rows.metric):
            raise ValueError(
                f"{rows.name}: the labels {other!r} and {label!r} are the same token ids, so that "
                "no student can tell them apart; rename them or give a --spiece that has all their "
                "characters"
            )


def sample_rows(rows: list[Record]) -> list[Record]:
    """The rows, or of many a regular sample."""
    return rows[:: -(-len(rows) // TEXTS_ROWS)]


def texts_of(rows: list[Record]) -> list[str]:
    """What a tokenizer is trained on: the texts of the rows, or of a regular sample of them."""
    texts = []
    for row in sample_rows(rows):
        texts += [PREDICT + row.input, EXPLAIN + row.input, row.label]
        if row.rationale is not None:
            texts.append(row.rationale)
    return texts
