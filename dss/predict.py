"""Label new inputs with a trained student:  python -m dss.predict STUDENT [FILE]

    python -m dss.predict runs/toy/dss/student questions.txt           a line in, a label out
    python -m dss.predict runs/toy/dss/student rows.jsonl --explain    JSONL in and out
    python -m dss.predict STUDENT nli.jsonl --labels entailment neutral contradiction --scores

A label is written greedily, or chosen where the student was tested so (train.py --answers). With
--labels it is the likeliest of a closed set instead, and --scores gives the probability of each
label of the set; they add up to 1. Rows of JSONL keep their keys and gain "prediction", "scores"
and "explanation". Standard error says how many inputs were cut, how many answers are no label and,
of rows with a label, how many are right.
"""

import argparse
import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import cli
from data.answers import written
from data.files import replacing
from data.jsonl import START, Record, other_format, parse_record, read_lines, to_line
from dss.distributed import choose_device
from dss.methods import PREDICT
from dss.stats import TITLES, reliability
from dss.student import Student

BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark and white space


@dataclass
class Row:
    record: Record
    line: str | None  # its JSON; None for a line of text


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the arguments or files are wrong, 130 interrupted."""
    args = parse(argv)
    settings = {"dtype": args.dtype, "batch_size": args.batch_size}
    for name in ("max_input_length", "max_new_tokens"):
        if getattr(args, name):  # it replaces the setting of the training
            settings[name] = getattr(args, name)
    try:
        rows = read_rows(args.file)
        student = Student.load(args.student, choose_device(args.device), **settings)
        labels = choose_labels(args, student)
        answers = []
        part_size = 8 * args.batch_size  # enough to sort by length
        to_stdout = contextlib.nullcontext(sys.stdout.buffer)
        bar = tqdm(total=len(rows), unit="row", delay=2, leave=False)
        with bar, replacing(args.output) if args.output else to_stdout as sink:
            for start in range(0, len(rows), part_size):
                part = rows[start : start + part_size]
                answers += answer_rows(student, part, labels, args)
                for row, answer in zip(part, answers[start:]):
                    sink.write(output_line(row, answer).encode() + b"\n")
                sink.flush()
                bar.update(len(part))
        report(student, rows, answers, chosen=bool(labels))
    except (OSError, ValueError) as problem:
        return cli.fail("dss.predict", 2, problem)
    return 0


def choose_labels(args: argparse.Namespace, student: Student) -> list[str]:
    """The closed set to choose from; empty if labels are decoded freely.

    Raises ValueError for a label that the student was not trained on, if its labels are known.
    """
    if args.labels is None and not args.scores:
        return []
    labels = args.labels or student.labels
    if len(labels) < 2:
        raise ValueError(
            f"name at least two labels after --labels, with spaces between; got {labels}"
        )
    for label in labels:
        if student.labels and label not in student.labels:
            known = ", ".join(student.labels)
            raise ValueError(f"--labels: {label!r} is not a label of this student: {known}")
    return labels


def read_rows(file: str) -> list[Row]:
    """The rows of a file, "-" for standard input. It is JSONL if its first row begins with {.

    Blank lines between rows of JSON are passed over. Raises OSError, or ValueError for another
    format or an invalid record.
    """
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    what = other_format(content[:START])
    if file.endswith((".csv", ".tsv")):
        what = "a table; give JSONL or a file with one input a line"
    if what:
        raise ValueError(f"{file}: {what}")
    is_jsonl = content.lstrip(BLANK).startswith(b"{")
    rows = []
    for where, _, text in read_lines(io.BytesIO(content), file):
        if not is_jsonl:
            rows.append(Row(Record(where, text), None))
        elif text.strip():
            rows.append(Row(parse_record(text, where, where), text))
    return rows


def answer_rows(
    student: Student, rows: list[Row], labels: list[str], args: argparse.Namespace
) -> list[dict]:
    """{"prediction", and "scores", "explanation" if asked for} for each row."""
    inputs = [row.record.input for row in rows]
    if labels:
        answers = []
        for scores in student.score(inputs, [labels] * len(inputs)):
            answer = {"prediction": next(iter(scores))}  # the likeliest is first
            if args.scores:
                answer["scores"] = {label: round(p, 6) for label, p in scores.items()}
            answers.append(answer)
    else:
        answers = [{"prediction": label} for label in student.answer(inputs)]
    if args.explain:
        for answer, rationale in zip(answers, student.explain(inputs)):
            answer["explanation"] = rationale
    return answers


def output_line(row: Row, answer: dict) -> str:
    """The line to write for a row, without a line end. That of a blank line is blank."""
    if row.line is not None:
        return to_line(json.loads(row.line) | answer)
    if not row.record.input.strip():
        return ""
    if len(answer) > 1:
        return to_line({"input": row.record.input} | answer)
    return " ".join(answer["prediction"].split())


def report(student: Student, rows: list[Row], answers: list[dict], chosen: bool) -> None:
    """Print to stderr how many inputs were cut, how many answers are not labels (unless they were
    `chosen` from a set), and of rows with a label how many are right."""
    labels = {written(label) for label in student.labels}
    cut = 0
    outside = 0
    labelled = []
    for row, answer in zip(rows, answers):
        record = row.record
        cut += len(student.tokenizer.encode(PREDICT + record.input)) > student.max_input_length
        outside += bool(record.input.strip()) and written(answer["prediction"]) not in labels
        if record.label is not None:
            labelled.append((record, answer))
    total = f"of {len(rows):,}"
    lines = []
    if cut:
        limit = f"{student.max_input_length:,} tokens (--max-input-length)"
        lines.append(f"{cut:,} {total} inputs cut at {limit}")
    if outside and labels and not chosen:
        lines.append(
            f"{outside:,} {total} answers are not among the student's labels; "
            "--labels chooses among these"
        )
    if labelled:
        lines += figures(student, labelled, closed=bool(labels) or chosen)
    for line in lines:
        print(line, file=sys.stderr)


def figures(student: Student, labelled: list[tuple[Record, dict]], closed: bool) -> list[str]:
    """Lines with the accuracy, and for a closed set of labels `reliability`.

    labelled: (row, answer) pairs.
    """
    gold = [record.label for record, _ in labelled]
    predicted = [answer["prediction"] for _, answer in labelled]
    right = [student.is_right(answer["prediction"], record) for record, answer in labelled]
    share = sum(right) / len(right)
    lines = [f"right on {sum(right):,} of {len(right):,} rows with a label ({share:.1%})"]
    if closed:
        scores = [answer["scores"] for _, answer in labelled if "scores" in answer]
        confidence = [max(row.values()) for row in scores]
        measured = reliability(predicted, gold, right, confidence)
        lines.append(", ".join(f"{TITLES[name]} {value:.1%}" for name, value in measured.items()))
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.OneLineParser(prog="dss.predict", description=__doc__)
    add = parser.add_argument
    add("student", help="directory or hub id of a student (OUT/METHOD/student), or of any T5")
    add("file", nargs="?", default="-", help="JSONL, or an input a line; -: standard input [-]")
    add("--output", help="written whole or not at all [standard output]")
    add(
        "--labels", nargs="*", help="the likeliest of these; none named: of those it was trained on"
    )
    add("--scores", action="store_true", help="--labels, with the probability of each")
    add("--explain", action="store_true", help='add the student\'s own rationale, "explanation"')
    add("--batch-size", type=number, default=64, help="inputs at a time [64]")
    add("--max-input-length", type=number, help="tokens; longer inputs are cut [as trained]")
    add("--max-new-tokens", type=number, help="tokens of a label [as trained]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="[float32]")
    return parser.parse_args(argv)


def number(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 2**20:
        raise argparse.ArgumentTypeError(f"must be from 1 to {2**20}, got {text}")
    return value


if __name__ == "__main__":
    cli.run("dss.predict", main)
