"""What is in a JSONL file, before paying for training on it:  python -m data.report F.jsonl [G.jsonl ...]

Rows and what they lack, the teacher's own accuracy by class, the balance of labels, lengths, and duplicates within and
between files. Lengths are in T5's tokens with --spiece spiece.model, otherwise in words and marks, of which English has
about 3 for every 4 tokens.
"""

import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import sentencepiece

from data import cli
from data.answers import choose_label_type, same_label
from data.jsonl import read_jsonl

PERCENTILES = (50, 90, 99, 100)
PREFIXES = {"label": "predict: ", "rationale": "explain: "}  # what train.py puts before the input, for each target
LONGEST = {"input": 1024, "label": 256, "rationale": 256}  # where train.py cuts by default, the input's prefix included
CLASSES = 10  # that are shown, the most frequent


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the arguments or files are wrong."""
    parser = cli.OneLineParser(prog="python -m data.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows as JSONL")
    parser.add_argument("--spiece", default="", help="a spiece.model, or its directory, to count tokens with")
    args = parser.parse_args(argv)
    try:
        count, unit = counter(args.spiece)
        rows = {path: list(read_jsonl(path)) for path in args.files}
        for path, records in rows.items():
            if not records:
                raise ValueError(f"{path}: no row in it")
            print(f"{path}: {len(records):,} rows", *describe(records, count, unit), "", sep="\n")
        inputs = {path: {normal(r.input) for r in records} for path, records in rows.items()}
        for a, b in combinations(inputs, 2):  # test rows among the training rows are the usual accident
            print(f"{a} and {b} share {len(inputs[a] & inputs[b]):,} inputs (white space and case of letters apart)")
    except (OSError, ValueError) as error:
        return cli.fail("data.report", 2, error)
    return 0


def counter(spiece):
    """(a function that counts what is in a text, the name of what it counts)."""
    if not spiece:
        return lambda text: len(re.findall(r"\w+|[^\w\s]", text)), "words and marks"
    path = Path(spiece) / "spiece.model" if Path(spiece).is_dir() else Path(spiece)
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise ValueError(f"{path}: not a SentencePiece model") from None
    return lambda text: len(pieces.encode(text)) + 1, "tokens, </s> included"


def describe(records, count, unit):
    """The lines of one file's report."""
    unlabelled = sum(r.rationale is not None and r.teacher_label is None for r in records)
    for what, n in (Counter(map(trains, records)) + Counter({"a rationale, but no teacher label": unlabelled})).items():
        yield f"  {n:>8,}  {n / len(records):>6.1%}  {what}"
    inputs = defaultdict(list)
    for record in records:
        inputs[normal(record.input)].append(record)
    repeated = [group for group in inputs.values() if len(group) > 1]
    differing = sum(len({normal(r.label) for r in group if r.label is not None}) > 1 for group in repeated)
    if shared := sum(map(len, repeated)):
        yield f"  {shared:>8,}  rows share their input with another; {differing:,} such inputs have more than one label"
    if ids := len(records) - len({r.id for r in records}):
        yield f"  {ids:>8,}  rows repeat an id"
    yield ""
    yield from teacher(records)
    yield ""
    yield f"  {'length in ' + unit:<34}" + "".join(f"{p:>7} %" for p in PERCENTILES) + "     rows cut by train.py"
    for name, longest in LONGEST.items():
        lengths = [[count(text) for text in texts(r, name)] for r in records]
        cut = sum(any(n > longest for n in row) for row in lengths)
        lengths = sorted(n for row in lengths for n in row)
        if lengths:
            row = "".join(f"{lengths[max(0, -(-p * len(lengths) // 100) - 1)]:>9,}" for p in PERCENTILES)
            yield f"    {name:<32}{row}{cut:>12,} (over {longest:,})"


def texts(record, name):
    """The texts of a record that train.py makes of its input (one for each target it has), label or rationale."""
    value = getattr(record, name)
    if name == "input":
        return [PREFIXES[target] + value for target in PREFIXES if getattr(record, target) is not None] or [value]
    return [] if value is None else [value]


def trains(r):
    """What a row can train."""
    if r.label is not None and r.rationale is not None:
        return "a label and a rationale: train both tasks"
    if r.label is not None:
        return "a label, no usable rationale: train the label task alone"
    if r.teacher_label is not None:
        return "only the teacher's label: for --labels teacher or gold-or-teacher"
    return "neither label: train nothing"


def teacher(records):
    """Lines on the teacher's accuracy, in all and by class."""
    kind = choose_label_type(records)
    judged = [r for r in records if r.label is not None and (r.teacher_label is not None or r.teacher)]
    right = [r for r in judged if r.teacher_label is not None and same_label(r.teacher_label, r.label, kind, r.input)]
    share = f", {len(right) / len(judged):.1%}; labels compared as {kind}" if judged else ""
    yield f"  teacher right on {len(right):,} of {len(judged):,} rows with gold{share}"
    classes = Counter(r.label for r in records if r.label is not None)
    if len(classes) > len(records) / 2 or not classes:
        yield f"  {len(classes):,} different labels: no classes to balance"
        return
    judged, right = (Counter(r.label for r in rows) for rows in (judged, right))
    missing = Counter(r.label for r in records if r.teacher_label is None)
    yield f"    {'class':<24}{'rows':>9}{'share':>9}{'teacher right':>15}{'no teacher label':>18}"
    for label, n in classes.most_common(CLASSES):
        accuracy = f"{right[label] / judged[label]:.1%}" if judged[label] else "-"
        name, share = " ".join(label.split())[:22], n / classes.total()
        yield f"    {name:<24}{n:>9,}{share:>9.1%}{accuracy:>15}{missing[label]:>18,}"
    if len(classes) > CLASSES:
        yield f"    and {len(classes) - CLASSES:,} more classes"


def normal(text):
    return " ".join(text.casefold().split())


if __name__ == "__main__":
    cli.run("data.report", main)
