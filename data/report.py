"""What is in JSONL files, before paying for training:  python -m data.report F.jsonl [G.jsonl ...]

Rows and what they lack, the teacher's accuracy by class, the balance of labels, lengths, and
duplicates within and between files. Lengths are in T5's tokens with --spiece spiece.model,
otherwise in words and marks, of which English has about 3 for every 4 tokens.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import sentencepiece

from data import cli
from data.answers import choose_label_type, merge_labels, same_label, written
from data.jsonl import Record, read_jsonl

PERCENTILES = (50, 90, 99, 100)
LONGEST = {"input": 1024, "label": 64, "rationale": 256}  # tokens: train.py's own limits
CLASSES = 10  # that are shown, the most frequent


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the arguments or files are wrong."""
    parser = cli.OneLineParser(prog="python -m data.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows as JSONL")
    help_text = "a spiece.model, or its directory, to count tokens with"
    parser.add_argument("--spiece", default="", help=help_text)
    args = parser.parse_args(argv)
    try:
        lengths = Lengths(args.spiece)
        inputs = {}
        for path in args.files:
            records = list(read_jsonl(path))
            if not records:
                raise ValueError(f"{path}: there are no rows in it")
            print(f"{path}: {len(records):,} rows", *describe(records, lengths), "", sep="\n")
            inputs[path] = {normal(record.input) for record in records}
        for a, b in combinations(inputs, 2):  # test rows among the training rows
            shared = len(inputs[a] & inputs[b])
            print(f"{a} and {b} share {shared:,} inputs (white space and case apart)")
    except (OSError, ValueError) as error:
        return cli.fail("data.report", 2, error)
    return 0


class Lengths:
    """Counts the tokens of a text, or its words and marks."""

    def __init__(self, spiece: str) -> None:
        """spiece: a spiece.model or its directory; "" counts words. Raises OSError or
        ValueError.
        """
        self.pieces = None
        self.unit = "words and marks"
        if not spiece:
            return
        path = Path(spiece)
        if path.is_dir():
            path = path / "spiece.model"
        try:
            model = path.read_bytes()
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model") from None
        self.unit = "tokens, </s> included"

    def count(self, text: str) -> int:
        if self.pieces is None:
            return len(re.findall(r"\w+|[^\w\s]", text))
        return len(self.pieces.encode(text)) + 1

    def has_unknown(self, text: str) -> bool:
        """Whether the text has characters that the tokenizer does not have."""
        return self.pieces is not None and self.pieces.unk_id() in self.pieces.encode(text)

    def alike(self, labels: set[str]) -> list[list[str]]:
        """The groups of labels that the tokenizer cannot tell apart."""
        groups = defaultdict(list)
        for label in sorted(labels):
            if self.pieces is not None:
                groups[tuple(self.pieces.encode(label))].append(label)
        return [group for group in groups.values() if len(group) > 1]


def describe(records: list[Record], lengths: Lengths) -> Iterator[str]:
    """The lines of one file's report."""
    for what, count in Counter(trains(record) for record in records).items():
        yield line(count, len(records), what)
    unlabelled = sum(r.rationale is not None and r.teacher_label is None for r in records)
    if unlabelled:
        yield line(unlabelled, len(records), "a rationale, but no teacher label")
    yield from duplicates(records)
    yield ""
    yield from teacher_accuracy(records)
    yield ""
    yield from length_table(records, lengths)


def line(count: int, of: int, what: str) -> str:
    return f"  {count:>8,}  {count / of:>6.1%}  {what}"


def trains(record: Record) -> str:
    """What a row can train."""
    if record.label is not None and record.rationale is not None:
        return "a label and a rationale: train both tasks"
    if record.label is not None:
        return "a label, no usable rationale: train the label task alone"
    if record.teacher_label is not None:
        return "only the teacher's label: for --labels teacher or gold-or-teacher"
    return "neither label: train nothing"


def duplicates(records: list[Record]) -> Iterator[str]:
    """Lines on inputs, ids and rationales that rows share."""
    groups = defaultdict(list)
    for record in records:
        groups[normal(record.input)].append(record)
    shared = 0
    differing = 0
    for group in groups.values():
        if len(group) > 1:
            shared += len(group)
            labels = {normal(record.label) for record in group if record.label is not None}
            differing += len(labels) > 1
    if shared:
        what = f"rows share their input with another; {differing:,} such inputs"
        yield f"  {shared:>8,}  {what} have more than one label"
    repeated_ids = len(records) - len({record.id for record in records})
    if repeated_ids:
        yield f"  {repeated_ids:>8,}  rows repeat an id"
    rationales = Counter(normal(r.rationale) for r in records if r.rationale is not None)
    for rationale, count in rationales.most_common(1):
        if count > max(2, rationales.total() / 10):
            yield f"  {count:>8,}  rationales are the same: {rationale[:60]!r}"


def teacher_accuracy(records: list[Record]) -> Iterator[str]:
    """Lines on how often the teacher is right, in all and by class."""
    kind = choose_label_type(records)
    gold = [record for record in records if record.label is not None]
    spelling = merge_labels([record.label for record in gold], kind)
    judged = Counter()
    right = Counter()
    missing = Counter()
    for record in gold:
        label = spelling[record.label]
        missing[label] += record.teacher_label is None
        if record.teacher_label is not None or record.teacher:
            judged[label] += 1
        if record.teacher_label is not None:
            right[label] += same_label(record.teacher_label, record.label, kind, record.input)
    if not any(record.teacher_label for record in records):
        yield "  no row has a teacher label"
    elif not judged:
        yield "  no row with a teacher label has a gold label"
    else:
        share = right.total() / judged.total()
        counts = f"{right.total():,} of {judged.total():,} rows with gold, {share:.1%}"
        yield f"  teacher right on {counts}; labels compared as {kind}"
    classes = Counter(spelling[record.label] for record in gold)
    if len(classes) > len(records) / 2 or not classes:
        yield f"  {len(classes):,} different labels: no classes to balance"
        return
    yield f"    {'class':<24}{'rows':>9}{'share':>9}{'teacher right':>15}{'no teacher label':>18}"
    for label, count in classes.most_common(CLASSES):
        accuracy = "-"
        if judged[label]:
            accuracy = f"{right[label] / judged[label]:.1%}"
        name = " ".join(label.split())[:22]
        share = count / classes.total()
        row = f"    {name:<24}{count:>9,}{share:>9.1%}"
        yield f"{row}{accuracy:>15}{missing[label]:>18,}"
    if len(classes) > CLASSES:
        yield f"    and {len(classes) - CLASSES:,} more classes"


def length_table(records: list[Record], lengths: Lengths) -> Iterator[str]:
    """Percentiles of the lengths, and how many rows train.py cuts."""
    head = "".join(f"{percent:>7} %" for percent in PERCENTILES)
    yield f"  {'length in ' + lengths.unit:<34}{head}     rows over train.py's limit"
    unknown = {}
    for name, longest in LONGEST.items():
        texts = [text_of(record, name) for record in records]
        texts = [text for text in texts if text is not None]
        counts = sorted(lengths.count(text) for text in texts)
        over = sum(count > longest for count in counts)
        unknown[name] = sum(lengths.has_unknown(text) for text in texts)
        if counts:
            shown = ""
            for percent in PERCENTILES:
                rank = max(0, -(-percent * len(counts) // 100) - 1)
                shown += f"{counts[rank]:>9,}"
            yield f"    {name:<32}{shown}{over:>12,} (over {longest:,})"
    for name, count in unknown.items():
        if count:
            what = f"have unknown characters (<unk>) in their {name}"
            yield line(count, len(records), what)
    for group in lengths.alike({written(r.label) for r in records if r.label is not None}):
        yield f"  the tokenizer cannot tell these labels apart: {group}"


def text_of(record: Record, name: str) -> str | None:
    """The text that train.py makes of a record's input, label or rationale; None if it has none."""
    value = getattr(record, name)
    if name == "input" and record.rationale is not None:
        return f"explain: {value}"
    if name == "input" and record.label is not None:
        return f"predict: {value}"
    return value


def normal(text: str) -> str:
    return written(text).casefold()


if __name__ == "__main__":
    cli.run("data.report", main)
