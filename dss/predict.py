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

import numpy as np
from tqdm import tqdm

from data import cli
from data.answers import same_label
from data.files import replacing
from data.jsonl import START, Record, other_format, parse_record, read_lines, to_line
from dss.distributed import choose_device
from dss.stats import COVERAGES, accuracy_at, calibration_error, macro_f1
from dss.student import Student

BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark and white space
LEAST = {"batch_size": 1, "max_input_length": 2, "max_new_tokens": 1}


@dataclass
class Row:
    record: Record
    line: str | None  # its JSON; None for a line of text


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the arguments or files are wrong, 130 interrupted."""
    args = parse(argv)
    try:
        rows = read_rows(args.file)
        settings = {"dtype": args.dtype}
        for name in LEAST:
            if getattr(args, name) is not None:  # it replaces the setting of the training
                settings[name] = getattr(args, name)
        device = choose_device(args.device, args.dtype)
        student = Student.load(args.student, device, **settings)
        labels = choose_labels(args, student)
        answers = []
        part_size = 8 * args.batch_size  # enough to sort by length
        to_stdout = contextlib.nullcontext(sys.stdout.buffer)
        bar = tqdm(total=len(rows), unit="row", delay=2, leave=False)
        with bar, replacing(args.output) if args.output else to_stdout as sink:
            for start in range(0, len(rows), part_size):
                part = rows[start : start + part_size]
                for row, answer in zip(part, answer_rows(student, part, labels, args)):
                    sink.write(output_line(row, answer).encode() + b"\n")
                    answers.append(answer)
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
    if args.labels:
        if len(args.labels) < 2:
            raise ValueError(
                f"--labels needs at least two, with spaces between; got {args.labels[0]!r}"
            )
        for label in args.labels:
            if student.labels and label not in student.labels:
                raise ValueError(
                    f"--labels: {label!r} is not a label of this student: "
                    f"{', '.join(student.labels)}"
                )
        return args.labels
    if args.labels is None and not args.scores:
        return []
    if not student.labels:
        raise ValueError(
            f"{args.student}: no closed set of labels is stored with it; name them after --labels"
        )
    return student.labels


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
    """Print to stderr what a reader of the answers should know: how many inputs were cut, how many
    answers are not labels (unless they were `chosen` from a set), and how many are right."""
    cut = 0
    outside = 0
    right = []
    asked = []
    for row, given in zip(rows, answers):
        answer = given["prediction"]
        record = row.record
        ids = student.tokenizer.encode(student.prefixes["predict"] + record.input)
        cut += len(ids) > student.max_input_length
        same = [same_label(answer, label, student.metric, record.input) for label in student.labels]
        outside += record.input.strip() != "" and not any(same)
        if record.label is not None:
            right.append(same_label(answer, record.label, student.metric, record.input))
            asked.append((record.label, given))
    lines = []
    if cut:
        lines.append(
            f"{cut:,} of {len(rows):,} inputs cut at {student.max_input_length:,} tokens "
            "(--max-input-length)"
        )
    if outside and student.labels and not chosen:
        lines.append(
            f"{outside:,} of {len(rows):,} answers are not among the student's labels; "
            "--labels chooses among these"
        )
    if right:
        share = sum(right) / len(right)
        lines.append(f"right on {sum(right):,} of {len(right):,} rows with a label ({share:.1%})")
        lines += reliability(student, asked, right)
    for line in lines:
        print(line, file=sys.stderr)


def reliability(student: Student, asked: list[tuple[str, dict]], right: list[bool]) -> list[str]:
    """Lines with macro-F1, where labels are a closed set, and, with --scores, the expected
    calibration error and the accuracies at three coverages. asked: (gold label, answer) pairs."""
    lines = []
    if student.labels:
        gold = [label for label, _ in asked]
        score = macro_f1([answer["prediction"] for _, answer in asked], gold)
        lines.append(f"macro-F1 {score:.1%}")
    if all("scores" in answer for _, answer in asked):
        confidence = np.array([max(answer["scores"].values()) for _, answer in asked])
        correct = np.array(right, dtype=float)
        text = f"expected calibration error {calibration_error(confidence, correct):.1%}"
        for coverage in COVERAGES:
            accuracy = accuracy_at(coverage, confidence, correct)
            text += f", right on {accuracy:.1%} at {coverage:.0%} coverage"
        lines.append(text)
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
    add("--batch-size", type=int, default=64, help="inputs at a time [64]")
    add("--max-input-length", type=int, help="tokens; longer inputs are cut [as trained]")
    add("--max-new-tokens", type=int, help="tokens of a label [as trained]")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda if there is one",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="[float32]")
    args = parser.parse_args(argv)
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= 2**20:
            parser.error(f"{cli.flag(name)} must be from {least} to {2**20}, got {value}")
    return args


if __name__ == "__main__":
    cli.run("dss.predict", main)
