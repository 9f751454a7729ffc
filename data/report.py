"""What is in JSONL files, before paying for training:  python -m data.report F.jsonl [G.jsonl ...]

What the rows can train, the teacher's accuracy by class, the balance of labels, lengths in tokens
(with --spiece spiece.model), and inputs that files share.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import sentencepiece

from data import cli
from data.answers import choose_label_type, merge_labels, same_label, written
from data.jsonl import Record, read_jsonl

PERCENTS = (50, 90, 99, 100)
LONGEST = {"input": 1024, "label": 64, "rationale": 256}  # tokens: train.py's own limits
CLASSES = 10  # that are shown, the most frequent


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the arguments or files are wrong."""
    parser = cli.OneLineParser(prog="python -m data.report", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="rows as JSONL")
    help_text = "a spiece.model, or its directory, to count tokens with"
    parser.add_argument("--spiece", default="", help=help_text)
    args = parser.parse_args(argv)
    try:
        tokenizer = None
        if args.spiece:
            path = Path(args.spiece)
            path = path / "spiece.model" if path.is_dir() else path
            tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
        inputs = {}
        for path in args.files:
            records = list(read_jsonl(path))
            if not records:
                raise ValueError(f"{path}: there are no rows in it")
            print(f"{path}: {len(records):,} rows")
            lines = [*contents(records), *accuracy(records)]
            if tokenizer:
                lines += lengths(records, tokenizer)
            for line in lines:
                print(f"  {line}")
            inputs[path] = {normal(record.input) for record in records}
        for a, b in combinations(inputs, 2):  # test rows among the training rows
            shared = len(inputs[a] & inputs[b])
            print(f"{a} and {b} share {shared:,} inputs (white space and case apart)")
    except (OSError, ValueError, RuntimeError) as error:  # sentencepiece's is the last
        return cli.fail("data.report", 2, error)
    return 0


def contents(records: list[Record]) -> Iterator[str]:
    """Lines on what rows can train, and on a rationale that many share."""
    for what, count in Counter(trains(record) for record in records).items():
        yield f"{count:>8,}  {count / len(records):>6.1%}  {what}"
    rationales = Counter(normal(r.rationale) for r in records if r.rationale is not None)
    for rationale, count in rationales.most_common(1):
        if count > max(2, rationales.total() / 10):
            yield f"{count:>8,}  rationales are the same: {rationale[:60]!r}"


def trains(record: Record) -> str:
    """What a row can train."""
    if record.label is not None and record.rationale is not None:
        return "a label and a rationale: train both tasks"
    if record.label is not None:
        return "a label, no usable rationale: train the label task alone"
    if record.teacher_label is not None:
        return "only the teacher's label: for --labels teacher or gold-or-teacher"
    return "neither label: train nothing"


def accuracy(records: list[Record]) -> Iterator[str]:
    """Lines on how often the teacher is right, in all and by class.

    A row with gold counts if it has a teacher's label, or an answer of the teacher without one.
    """
    kind = choose_label_type(records)
    gold = [record for record in records if record.label is not None]
    classes = merge_labels([record.label for record in gold], kind)
    rows = Counter(classes[record.label] for record in gold)
    judged = Counter()
    right = Counter()
    for record in gold:
        label = classes[record.label]
        if record.teacher_label is not None:
            right[label] += same_label(record.teacher_label, record.label, kind, record.input)
        judged[label] += record.teacher_label is not None or bool(record.teacher)
    if not judged.total():
        yield "no row with a gold label has a teacher's label"
    else:
        counts = f"{right.total():,} of {judged.total():,} rows with gold"
        share = right.total() / judged.total()
        yield f"teacher right on {counts}, {share:.1%}; labels compared as {kind}"
    yield f"{'class':<24}{'rows':>9}{'share':>9}{'teacher right':>15}"
    for label, count in rows.most_common(CLASSES):
        share = f"{right[label] / judged[label]:.1%}" if judged[label] else "-"
        name = " ".join(label.split())[:22]
        yield f"{name:<24}{count:>9,}{count / len(gold):>9.1%}{share:>15}"


def lengths(
    records: list[Record], tokenizer: sentencepiece.SentencePieceProcessor
) -> Iterator[str]:
    """Lines with percentiles of the lengths, how many rows train.py cuts, and how many have
    characters that the tokenizer does not have.
    """
    head = "".join(f"{percent:>7} %" for percent in PERCENTS)
    yield f"{'length':<34}{head}   rows over train.py's limit   with <unk>"
    for name, longest in LONGEST.items():
        counts = []
        unknown = 0
        for record in records:
            text = getattr(record, name)
            if text is None:
                continue
            if name == "input":
                text = f"{'predict' if record.rationale is None else 'explain'}: {text}"
            tokens = tokenizer.encode(text)
            counts.append(len(tokens) + 1)
            unknown += tokenizer.unk_id() in tokens
        counts.sort()
        if counts:
            ranks = [max(0, -(-percent * len(counts) // 100) - 1) for percent in PERCENTS]
            shown = "".join(f"{counts[rank]:>9,}" for rank in ranks)
            over = sum(count > longest for count in counts)
            yield f"{name:<34}{shown}{over:>12,} (over {longest:,}){unknown:>16,}"


def normal(text: str) -> str:
    return written(text).casefold()


if __name__ == "__main__":
    cli.run("data.report", main)
