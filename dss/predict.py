"""Label new inputs with a trained student:  python -m dss.predict STUDENT [FILE|-]

    python -m dss.predict runs/toy/dss/student questions.txt            a line in, a label out
    python -m dss.predict runs/toy/dss/student rows.jsonl --explain     JSONL in, JSONL with "prediction" out
    python -m dss.predict STUDENT nli.jsonl --labels entailment neutral contradiction --scores

A label is decoded greedily, as when the student was tested. With --labels or --choices it is the likeliest of a closed
set instead, and --scores gives the probability of each label of the set; they add up to 1. Rows that have a label are
also judged: accuracy, a table by class and the confusion matrix go to standard error.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends at once and without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import io
import json
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice

from tqdm import tqdm

from data import cli
from data.answers import CHOICES, same_label
from data.files import replacing
from data.jsonl import Record, parse_record, read_lines, to_line
from dss.run.start import choose_device, choose_threads
from dss.student import Student

Row = tuple[Record, str | None]  # and its line of JSON, if it is one
MOMENT = 0.05  # seconds to wait for more piped inputs before answering


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the arguments or files are wrong, 130 interrupted."""
    args = parse(argv)
    try:
        given = ("max_input_length", "max_new_tokens", "max_target_length")
        settings = {name: value for name in given if (value := getattr(args, name)) is not None}
        device = choose_device(args.device, args.dtype)
        student = Student.load(args.student, device, dtype=args.dtype, batch_size=args.batch_size, **settings)
        choose_threads(0, student.model)
        if args.labels == []:
            args.labels = student.labels
            if not args.labels:
                raise ValueError(f"{args.student}: no closed set of labels is stored with it; name them after --labels")
        judged = Counter()  # (gold label, predicted, right or not) of rows with a label
        is_file = os.path.isfile(args.file)
        with open(args.file, "rb") if args.file != "-" else contextlib.nullcontext(sys.stdin.buffer) as source:
            total = None
            if is_file:  # a bad line is found here, before the first answer
                total = sum(1 for _ in read_rows(source, args))
                source.seek(0)
            if args.file == "-" and sys.stdin.isatty():
                print("dss.predict: an input a line; Ctrl-D ends", file=sys.stderr)
            rows, many = read_rows(source, args), 8 * args.batch_size  # enough to sort by length
            parts = iter(lambda: list(islice(rows, many)), []) if is_file else as_they_come(rows, args.batch_size)
            bar = tqdm(total=total, unit="row", disable=not is_file, delay=1)
            with bar, replacing(args.output) if args.output else contextlib.nullcontext(sys.stdout.buffer) as sink:
                for part in parts:
                    for line in answer(student, part, args, judged):
                        sink.write(line.encode() + b"\n")
                    sink.flush()
                    bar.update(len(part))
        print_report(judged)
    except (OSError, ValueError) as error:
        return cli.fail("dss.predict", 2, error)
    return 0


def answer(student: Student, rows: list[Row], args: argparse.Namespace, judged: Counter) -> Iterator[str]:
    """A line of output for each (record, its JSON or None), in order. A blank line has a blank answer."""
    records = [record for record, _ in rows if record.input.strip()]
    inputs = [record.input for record in records]
    if args.labels or args.choices:
        ranked = student.score(inputs, [args.labels or list_choices(record) for record in records])
        found = [dict(prediction=next(iter(scores))) for scores in ranked]
        if args.scores:
            found = [f | dict(scores={k: round(v, 6) for k, v in s.items()}) for f, s in zip(found, ranked)]
    else:
        found = [dict(prediction=label) for label in student.answer(inputs)]
    if args.explain:
        found = [f | dict(explanation=text) for f, text in zip(found, student.explain(inputs))]
    left = iter(found)
    for record, line in rows:
        result = next(left) if record.input.strip() else dict(prediction="")
        if record.label is not None:
            right = same_label(result["prediction"], record.label, student.metric, record.input)
            judged[record.label, record.label if right else result["prediction"], right] += 1
        if line is not None:
            yield to_line(json.loads(line) | result)
        elif args.explain or args.scores:
            yield to_line(dict(input=record.input) | result)
        else:
            yield " ".join(result["prediction"].split())


def list_choices(record: Record) -> list[str]:
    """The choices that a question lists, in order, one given twice once. Raises ValueError if it lists none."""
    choices = list(dict.fromkeys(choice for _, choice in CHOICES.findall(record.input)))
    if not choices:
        raise ValueError(f'row {record.id}: --choices, but the input lists none, such as a line "(a) park"')
    return choices


def print_report(judged: Counter) -> None:
    """Accuracy and, for at most 12 classes, a row each: how many are right, and what was predicted instead."""
    classes, n, say = sorted({gold for gold, _, _ in judged}), judged.total(), partial(print, file=sys.stderr)
    if not n:
        return
    right = sum(judged[gold, gold, True] for gold in classes)
    say(f"right on {right:,} of {n:,} rows with a label ({right / n:.1%})")
    if not 1 < len(classes) <= 12:
        return
    numbers = [f"({i})" for i in range(1, len(classes) + 1)]
    heads = "".join(f"{head:>7}" for head in [*numbers, "other"])
    say(f"{'label':<24}{'rows':>7}{'right':>8}  predicted as{heads}")
    for number, gold in zip(numbers, classes):
        row = [judged[gold, c, c == gold] for c in classes]
        rows = sum(count for (label, _, _), count in judged.items() if label == gold)
        cells = "".join(f"{x:>7,}" for x in [*row, rows - sum(row)])
        say(f"{number:>4} {gold[:18]:<19}{rows:>7,}{judged[gold, gold, True] / rows:>8.1%}{'':>14}{cells}")


def read_rows(source: io.BufferedIOBase, args: argparse.Namespace) -> Iterator[Row]:
    """Yield (Record, its line of JSON or None) from a binary file. Raises ValueError for an invalid record."""
    is_json, known = args.format == "jsonl", args.format != "auto"
    for where, _, text in read_lines(source, "standard input" if args.file == "-" else args.file):
        if not known and text.strip():
            is_json, known = text.lstrip().startswith("{"), True
        if not is_json:
            yield Record(where, text), None
        elif text.strip():
            yield parse_record(text, where, where), text


def as_they_come(rows: Iterator, most: int) -> Iterator[list]:
    """The rows of a pipe or terminal: those that come within a moment of one another, at most `most` at a time."""
    waiting = queue.Queue(maxsize=4 * most)

    def read() -> None:
        try:
            for row in rows:
                waiting.put(row)
            waiting.put(None)
        except Exception as error:  # raised below, after the rows before it
            waiting.put(error)

    threading.Thread(target=read, daemon=True).start()
    item = ()
    while isinstance(item, tuple):
        part, patience = [], None
        with contextlib.suppress(queue.Empty):
            while len(part) < most and isinstance(item := waiting.get(timeout=patience), tuple):
                part.append(item)
                patience = MOMENT
        if part:
            yield part
    if item is not None:
        raise item


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.OneLineParser(prog="dss.predict", description=__doc__)
    add = parser.add_argument
    add("student", help="directory of a student (OUT/METHOD/student), or any T5 that was trained with these prefixes")
    add("file", nargs="?", default="-", metavar="FILE", help="rows as JSONL, or an input a line; -: standard input [-]")
    add("--format", choices=("auto", "jsonl", "lines"), default="auto", help="auto: JSONL if a row begins with {")
    add("--output", default="", metavar="FILE", help="file to write, whole or not at all; default: standard output")
    closed = parser.add_mutually_exclusive_group()
    which = "answer with the likeliest of these labels; none named: of those that the student was trained on"
    closed.add_argument("--labels", nargs="*", metavar="LABEL", help=which)
    which = 'answer with the likeliest choice that the input lists: "(a) park"'
    closed.add_argument("--choices", action="store_true", help=which)
    add("--scores", action="store_true", help="the probability of each label of the set, for a threshold of your own")
    add("--explain", action="store_true", help='add the student\'s own rationale as "explanation"')
    add("--batch-size", type=int, default=64, metavar="N", help="rows at a time [64]")
    kept = "default: as in its training"
    add("--max-input-length", type=int, metavar="N", help=f"tokens; longer inputs are cut; {kept}")
    add("--max-new-tokens", type=int, metavar="N", help=f"tokens of a label; {kept}")
    add("--max-target-length", type=int, metavar="N", help=f"tokens of an explanation; {kept}")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one [auto]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="[float32]")
    args = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("max_target_length", 1), ("max_input_length", 2)):
        value = getattr(args, name)
        if value is not None and not least <= value < 2**31:
            parser.error(f"{cli.flag(name)} must be at least {least}, got {value}")
    if args.scores and args.labels is None and not args.choices:
        parser.error("--scores needs a closed set: --labels A B C, or --choices for those that each input lists")
    if args.format == "auto" and args.file.endswith((".csv", ".tsv")):
        parser.error(f"{args.file}: a table; give JSONL or one input per line; --format lines labels lines as they are")
    if args.file == "-" and args.labels and os.path.exists(args.labels[-1]):
        parser.error(f"{args.labels[-1]} would be a label; the file stands before --labels")
    if args.labels and (len(set(args.labels)) < len(args.labels) or not all(label.strip() for label in args.labels)):
        parser.error("--labels must be different and not blank")
    return args


if __name__ == "__main__":
    cli.run("dss.predict", main)
