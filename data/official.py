"""The paper's released datasets -> JSONL:  python -m data.official DATASETS_DIR --out DIR

DATASETS_DIR holds NAME/NAME_SPLIT.json, one JSON object a line, NAME/llm/SPLIT_CoT_K.json, PaLM 540B's raw outputs for
those rows as lists that continue one another, and perhaps gpt-neox/NAME/SPLIT.json with GPT-NeoX 20B's. Every split
becomes NAME_SPLIT.jsonl, and NAME_SPLIT_gpt-neox.jsonl beside it.

An output is a rationale, a marker, an answer ("... So the answer is (c) wooded area.") and nearly always an invented
next example, which is cut off first. Without a marker it ended in mid-thought, and the row has neither rationale nor
teacher label. A marker with no usable answer after it (two choices, an unknown x) leaves the rationale alone.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from data import cli
from data.answers import choice_answer, class_answer, equation_answer, read_answer, same_label
from data.files import parse_json, read_json
from data.jsonl import Record, parse_record, read_lines, write_jsonl

NLI = ("entailment", "neutral", "contradiction")  # the labels 0, 1, 2 of the release


def read_cqa(row):
    choices = (f"({letter}) " + choice for letter, choice in zip("abcde", row["choices"], strict=True))
    return "\n".join([row["question"], "Answer Choices:", *choices]), row["answer"]


def read_nli(row):
    return "</s>".join([row["premise"], row["hypothesis"]]), NLI[row["label"]] if 0 <= row["label"] < 3 else None


class Format(NamedTuple):
    """How one dataset's rows and outputs are written."""

    read: Callable  # a row of the release -> (input, gold label)
    next_example: str  # begins the invented next example
    markers: list[str]  # between rationale and answer, in order of preference
    answer: Callable  # what follows the marker -> teacher label or None
    label_type: str  # how labels compare, as in data/answers.py


nli_answer = partial(class_answer, labels=NLI)
FORMATS = {
    "cqa": Format(read_cqa, "Q:", ["So the answer is"], choice_answer, "choice"),
    "svamp": Format(itemgetter("input", "label"), "Q:", ["The answer is"], equation_answer, "equation"),
    "anli1": Format(read_nli, "Premise:", ["So the answer is", "The answer is"], nli_answer, "class"),
    "esnli": Format(read_nli, "Premise:", ["Answer:"], nli_answer, "class"),
}


def parse_output(output: str, form: Format, text: str = "") -> tuple[str | None, str | None]:
    """One raw output for the question `text` -> (rationale or None, teacher label or None)."""
    same = partial(same_label, label_type=form.label_type, input=text)
    return read_answer(output, [form.next_example], form.markers, form.answer, same)[:2]


def import_split(path: Path, outputs: list, form: Format, teacher: str) -> list[Record]:
    """The Records of one split file. outputs: [(raw output, where it lies)], in the rows' order; the last rows may have
    none. Raises ValueError, for one where the release holds something else than a text."""
    records = []
    with open(path, "rb") as file:
        lines = [(place, line) for place, _, line in read_lines(file, str(path)) if line.strip()]
    if len(outputs) > len(lines):
        raise ValueError(f"{path}: {len(lines)} rows, but {len(outputs)} teacher outputs; they must be row by row")
    for index, ((place, line), output) in enumerate(zip_longest(lines, outputs)):
        try:
            text, label = form.read(parse_json(line, place))
            rationale, answer = parse_output(output[0], form, text) if output else (None, None)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{place}: not a row of this dataset ({error!r})") from None
        provenance = {"model": teacher, "output": output[1]} if output else {}
        record = Record(f"{path.stem}-{index}", text, label, rationale, answer, provenance)
        records.append(parse_record(record.to_json(), place, ""))
    return records


def read_outputs(files):
    """[(raw output, "FILE:INDEX")] of JSON lists that continue one another."""
    outputs = []
    for path in files:
        items = read_json(path, most=1 << 30)  # one file may hold the outputs for a whole split
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{path}: not a JSON list of texts")
        outputs += [(item, f"{path.name}:{index}") for index, item in enumerate(items)]
    return outputs


def import_all(root: Path, out: Path) -> Iterator[str]:
    """Import every split below `root` into `out`; yield a line on each file written.

    Raises FileNotFoundError if `root` holds none of the datasets, ValueError for a file that is not as released.
    """
    splits = [(path, form) for name, form in FORMATS.items() for path in sorted((root / name).glob(f"{name}_*.json"))]
    if not splits:
        raise FileNotFoundError(f"{root}: none of {', '.join(f'{n}/{n}_SPLIT.json' for n in FORMATS)} is there")
    out.mkdir(parents=True, exist_ok=True)
    for path, form in splits:
        name, split = path.stem.rsplit("_", 1)
        palm = sorted(path.parent.glob(f"llm/{split}_CoT_*.json"), key=lambda file: (len(file.name), file.name))
        neox = root / "gpt-neox" / name / f"{split}.json"
        for suffix, teacher, files in (("", "PaLM 540B", palm), ("_gpt-neox", "GPT-NeoX 20B", [neox])):
            if all(file.exists() for file in files):
                rows = import_split(path, read_outputs(files), form, teacher)
                write_jsonl(out / f"{path.stem}{suffix}.jsonl", rows)
                yield f"{path.stem}{suffix}.jsonl: {summary(rows, form)}"


def summary(rows, form):
    both = [r for r in rows if r.label is not None and r.teacher_label is not None]
    right = sum(same_label(r.teacher_label, r.label, form.label_type, r.input) for r in both)
    reasons, labels = (sum(r.rationale is not None for r in rows), sum(r.teacher_label is not None for r in rows))
    share = right / max(sum(bool(r.teacher) for r in rows), 1)
    return f"{len(rows):,} rows, {reasons:,} rationales, {labels:,} teacher labels; teacher right on {share:.1%}"


def main(argv: list[str] | None = None) -> int:
    parser = cli.OneLineParser(prog="python -m data.official", description="The paper's datasets -> JSONL.")
    parser.add_argument("datasets", type=Path, help="the release's folder `datasets`")
    parser.add_argument("--out", type=Path, required=True, help="where NAME_SPLIT.jsonl are written")
    args = parser.parse_args(argv)
    try:
        for line in import_all(args.datasets, args.out):
            print(line)
    except (OSError, ValueError) as error:
        return cli.fail("data.official", 2, error)
    return 0


if __name__ == "__main__":
    cli.run("data.official", main)
