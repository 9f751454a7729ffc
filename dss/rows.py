"""Which rows train the student, which select it and which test it; and the tokenizer that they
train."""

import sys
import tempfile
from collections.abc import Callable, Iterable
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

Read = Callable[[str], Iterable[Record]]
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


def load_rows(config: TrainConfig, read: Read = read_jsonl) -> Rows:
    """The `Rows` of a TrainConfig. Raises OSError or ValueError, naming the file, for rows that
    cannot be used.

    The validation rows are those of --eval-data, or a share cut from the training rows. A share
    that is cut has the labels of training: with --labels teacher, students are selected on a
    teacher's labels. Test labels are always gold. --subsample is the share of all labelled rows of
    --data, and the validation cut comes out of that share. With --labels gold-or-teacher it is the
    share of gold labels; every other row with a teacher's label trains on that, as the paper does
    with unlabelled questions (section 4.2).
    """
    if config.data:
        name = Path(config.data[0]).stem
        everything = [record for path in config.data for record in read(path)]
        validation = read_labelled(config.eval_data, read, "evaluate on")
        test = read_labelled(config.test_data, read, "test on")
    elif config.eval_data or config.test_data:
        raise ValueError("--eval-data and --test-data go with --data")
    else:
        name = "toy"
        everything, validation, test = toy.make_rows(config.seed)
    files = ", ".join(config.data) or name
    usable = labelled(everything, files, "train on", by_teacher=config.labels == "teacher")

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
    texts = [row.label for row in rows]
    labels = closed_set(texts, metric)
    free = is_free_text(texts, metric)
    return Rows(name, rows, validation, test, metric, labels, unlabelled, free)


def read_labelled(path: str, read: Read, use: str) -> list[Record]:
    return labelled(list(read(path)), path, use) if path else []


def labelled(rows: list[Record], files: str, use: str, by_teacher: bool = False) -> list[Record]:
    """The rows with a label, gold or the teacher's. Raises ValueError if there are none."""
    kind = "teacher" if by_teacher else "gold"
    having = with_teacher_labels(rows) if by_teacher else [r for r in rows if r.label is not None]
    if not having:
        raise ValueError(f"{files}: no row has a {kind} label to {use}")
    return having


def with_teacher_labels(rows: list[Record]) -> list[Record]:
    """The rows that have a teacher's label, with that as their label."""
    return [replace(row, label=row.teacher_label) for row in rows if row.teacher_label is not None]


def require_rationales(files: str, rows: list[Record], methods: tuple[str, ...]) -> None:
    """Raise ValueError for a method whose rows have too few rationales: none, or only one to
    swap."""
    having = sum(record.rationale is not None for record in rows)
    for method in methods:
        if having < METHODS[method].rationales_needed:
            few = "only one training row has" if having else "no training row has"
            unread = sorted({key for record in rows for key in record.other})
            keys = f" (keys that are not read: {', '.join(unread[:5])})" if unread else ""
            raise ValueError(
                f"{files}: {few} a rationale{keys}, too few for --method {method}; "
                f"--method {BASELINE} needs none"
            )


def make_tokenizer(config: TrainConfig, rows: Rows, out: Path) -> T5Tokenizer:
    """--spiece, or the weights' own, or one trained on the texts of the training rows; under
    --resume the run's own.

    Raises ValueError where a method needs a separator and there is none, and for labels that the
    tokenizer cannot tell apart; warns of a --spiece that is not the weights'.
    """
    if config.spiece:
        tokenizer = T5Tokenizer(config.spiece)
        warn_of_another_tokenizer(config, tokenizer)
    elif config.weights:
        tokenizer = T5Tokenizer(resolve_checkpoint(config.weights, weights=False))
    elif config.resume and (out / "spiece.model").exists():
        tokenizer = T5Tokenizer(out)
    else:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "spiece.model"
            tokenizer = train(texts_of(rows.train), path, config.vocab_size)
    for method in config.method:
        if METHODS[method].needs_separator and SEPARATOR not in tokenizer.special:
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


def warn_of_another_tokenizer(config: TrainConfig, tokenizer: T5Tokenizer) -> None:
    if not config.weights:
        return
    own = resolve_checkpoint(config.weights, weights=False) / "spiece.model"
    if own.exists() and own.read_bytes() != tokenizer.model:
        print(
            f"train.py: warning: --spiece {config.spiece} is not the tokenizer that "
            f"{config.weights} was trained with",
            file=sys.stderr,
        )
