"""Label new inputs with a trained student:  python -m dss.predict STUDENT [FILE|-]

    python -m dss.predict runs/toy/dss/student questions.txt            a line in, a label out
    python -m dss.predict runs/toy/dss/student rows.jsonl --explain     JSONL in, JSONL with "prediction" out
    python -m dss.predict STUDENT nli.jsonl --labels entailment neutral contradiction --scores

A label is decoded greedily, as when the student was tested. With --labels or --choices it is instead the likeliest of
a closed set: p(label | input) is the product of its tokens' probabilities, </s> included, and --scores gives these
products divided by their sum, so they add up to 1. (That is for students that answer at once; one of single_task
writes its rationale first, and is told from the others by the separator it writes.)
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from functools import partial

import torch
from tqdm import tqdm

import tokenizer
from data import arguments
from data.answers import CHOICES
from data.files import replacing
from data.jsonl import Record, RecordError, parse_record, to_line
from dss.batch import EXPLAIN, PREDICT, SEPARATOR, encode, split_answer
from dss.config import TrainConfig
from dss.generate import generate, score
from dss.run.output import choose_device, choose_threads
from dss.weights import load_t5, locate


def main(argv=None):
    """Exit status: 0 done, 2 the arguments or files are wrong, 130 interrupted."""
    args = parse(argv)
    try:
        device = choose_device(args.device)
        student = Student(args, device)
        lines = check_file(args) if args.file != "-" else None
    except (OSError, ValueError) as problem:
        return fail(2, problem)
    source = sys.stdin.buffer if args.file == "-" else open(args.file, "rb")
    window = 1 if args.file == "-" and sys.stdin.isatty() else 8 * args.batch_size  # rows sorted by length together
    bar = tqdm(total=lines, unit="row", disable=None if args.file != "-" else not sys.stderr.isatty(), delay=1)
    try:
        with source, bar, replacing(args.out) if args.out else contextlib.nullcontext(sys.stdout.buffer) as sink:
            rows = read_rows(source, args)
            while part := list(itertools.islice(rows, window)):
                for line in student.answer(part):
                    sink.write(line.encode() + b"\n")
                sink.flush()
                bar.update(len(part))
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, RecordError) as problem:
        return fail(2, problem)
    return 0


class Student:
    """A trained T5 with its tokenizer, and how it is to answer."""

    def __init__(self, args, device):
        """Raises OSError or ValueError, naming the file, if args.student is no student."""
        directory = locate(args.student)
        self.tokenizer = tokenizer.T5Tokenizer(directory)
        self.model = load_t5(directory).to(device)
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise ValueError(f"{directory}: the tokenizer has more ids than the student embeds")
        choose_threads(0, self.model)
        self.args, self.device = args, device

    def answer(self, rows):
        """A line of output for each (record, its JSON or None) of rows, in order. A blank line has a blank answer."""
        asked = [record for record, _ in rows if record.input.strip()]
        answers = iter(self.predict(asked))
        for record, line in rows:
            found = next(answers) if record.input.strip() else dict(prediction="")
            if line is not None:
                yield to_line(json.loads(line) | found)
            elif self.args.explain or self.args.scores:
                yield to_line(dict(input=record.input) | found)
            else:
                yield " ".join(found["prediction"].split())

    def predict(self, records):
        """A dict for each record: prediction, and explanation and scores as asked for."""
        questions = [self.encode(PREDICT, record) for record in records]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            answers = self.choose(records, questions) if self.closed else self.write(questions)
            if self.args.explain and not all("explanation" in answer for answer in answers):
                questions = [self.encode(EXPLAIN, record) for record in records]
                outputs = generate(self.model, questions, self.args.max_explanation, self.args.batch_size)
                answers = [dict(explanation=self.tokenizer.decode(ids)) | a for a, ids in zip(answers, outputs)]
        return answers

    @property
    def closed(self):
        return self.args.labels or self.args.choices

    def write(self, questions):
        """Greedy answers. Behind a separator stands the label, before it the rationale (single_task)."""
        separator, decode = self.tokenizer.special[SEPARATOR], self.tokenizer.decode
        answers = []
        for ids in generate(self.model, questions, self.args.max_new_tokens, self.args.batch_size):
            rationale, label = split_answer(ids, separator) if separator in ids else (None, ids)
            explanation = dict(explanation=decode(rationale)) if rationale is not None and self.args.explain else {}
            answers.append(dict(prediction=decode(label)) | explanation)
        return answers

    def choose(self, records, questions):
        """The likeliest label of the set of each record, and with --scores the share of each, likeliest first."""
        sets = [self.args.labels or list_choices(record.input) for record in records]
        bare = next((record for record, labels in zip(records, sets) if not labels), None)
        if bare:
            raise RecordError(f'row {bare.id}: --choices, but the input lists none, a line each: "(a) park"')
        tokens = [[self.tokenizer.encode(label) for label in labels] for labels in sets]
        answers = []
        for labels, logs in zip(sets, score(self.model, questions, tokens, self.args.batch_size)):
            ranked = sorted(zip(logs, labels), key=lambda pair: -pair[0])  # stable: a tie goes to the first named
            shares = [math.exp(log - ranked[0][0]) for log, _ in ranked]
            scores = {label: share / sum(shares) for (_, label), share in zip(ranked, shares)}
            answers.append(dict(prediction=ranked[0][1]) | (dict(scores=scores) if self.args.scores else {}))
        return answers

    def encode(self, prefix, record):
        return encode(self.tokenizer, prefix + record.input, self.args.max_input_length)


def list_choices(text):
    """The choices that a question lists, in order, one given twice once."""
    return list(dict.fromkeys(choice for _, choice in CHOICES.findall(text)))


def read_rows(source, args):
    """Yield (Record, its line of JSON or None) from a binary file. Raises RecordError for a line that is no record."""
    name, is_json = "standard input" if args.file == "-" else args.file, args.format == "jsonl"
    known = args.format != "auto"
    for number, line in enumerate(source, 1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as problem:
            raise RecordError(f"{where}: not UTF-8 ({problem.reason} at byte {problem.start})") from None
        if not known and text.strip():
            is_json, known = text.lstrip().startswith("{"), True
        if not is_json:
            yield Record(where, text), None
        elif text.strip():
            yield parse_record(text, where, where), text


def check_file(args):
    """The number of rows of args.file. A bad line is found here, before the first answer is written."""
    with open(args.file, "rb") as source:
        return sum(1 for _ in read_rows(source, args))


def parse(argv):
    parser = arguments.OneLineParser(
        prog="python -m dss.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("student", help="directory of a student (OUT/METHOD/student), or any T5 that was trained with these prefixes")
    add(
        "file", nargs="?", default="-", metavar="FILE", help="rows as JSONL, or one input a line; -: standard input [-]"
    )
    add(
        "--format",
        choices=("auto", "jsonl", "lines"),
        default="auto",
        help="auto: JSONL if the first line begins with { [auto]",
    )
    add("--out", default="", help="file to write, complete or not at all; none: standard output")
    closed = parser.add_mutually_exclusive_group()
    closed.add_argument("--labels", nargs="+", metavar="LABEL", help="answer with the likeliest of these labels")
    closed.add_argument(
        "--choices", action="store_true", help='answer with the likeliest choice that the input lists: "(a) park"'
    )
    add("--scores", action="store_true", help="the probability of each label of the set, for a threshold of your own")
    add("--explain", action="store_true", help='add the student\'s own rationale as "explanation"')
    add("--batch-size", type=int, default=64, help="rows at a time [64]")
    add(
        "--max-input-length",
        type=int,
        default=TrainConfig.max_input_length,
        help="tokens; longer inputs are cut [%(default)s]",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=TrainConfig.max_new_tokens,
        help="tokens of a label; a single_task student needs room for its rationale too [%(default)s]",
    )
    add(
        "--max-explanation",
        type=int,
        default=TrainConfig.max_target_length,
        help="tokens of an explanation [%(default)s]",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one [auto]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="[float32]")
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "max_explanation"):
        if getattr(args, name) < 1:
            parser.error(f"{arguments.flag(name)} must be at least 1, got {getattr(args, name)}")
    if args.max_input_length < 2:
        parser.error(f"--max-input-length must be at least 2, got {args.max_input_length}")
    if args.scores and not (args.labels or args.choices):
        parser.error("--scores needs a closed set: --labels A B C, or --choices for those that each input lists")
    if args.labels and (len(set(args.labels)) < len(args.labels) or not all(label.strip() for label in args.labels)):
        parser.error("--labels must be different and not blank")
    return args


fail = partial(arguments.fail, "dss.predict")


if __name__ == "__main__":
    arguments.run("dss.predict", main)
