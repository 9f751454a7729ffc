"""Import the paper's released datasets:  python -m data.official DATASETS_DIR --out DIR

DATASETS_DIR holds NAME/NAME_SPLIT.json, JSON lines, and NAME/llm/SPLIT_CoT_K.json for K = 0, 1,
...: PaLM 540B's raw outputs for those rows, as lists that continue one another. Every split becomes
NAME_SPLIT.jsonl.

An output is a rationale, a marker, an answer ("... So the answer is (c) wooded area.") and nearly
always an invented next example, which is cut off first. An output without a marker gives neither
rationale nor teacher label. A marker without a usable answer leaves the rationale alone.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import cli
from data.answers import (
    Reading,
    choice_answer,
    class_answer,
    equation_answer,
    read_answer,
    same_label,
)
from data.files import read_json
from data.jsonl import Record, parse_record, read_lines, write_jsonl

NLI = ("entailment", "neutral", "contradiction")  # the labels 0, 1, 2 of the release


def read_cqa(row: dict) -> tuple[str, str]:
    lines = [row["question"], "Answer Choices:"]
    for letter, choice in zip("abcde", row["choices"], strict=True):
        lines.append(f"({letter}) {choice}")
    return "\n".join(lines), row["answer"]


def read_nli(row: dict) -> tuple[str, str | None]:
    label = NLI[row["label"]] if 0 <= row["label"] < 3 else None
    return "</s>".join([row["premise"], row["hypothesis"]]), label


def read_svamp(row: dict) -> tuple[str, str]:
    return row["input"], row["label"]


@dataclass(frozen=True)
class Format:
    """How one dataset's rows and outputs are written."""

    read: Callable[[dict], tuple[str, str | None]]  # a row of the release -> (input, gold label)
    next_example: str  # begins the invented next example
    markers: list[str]  # between rationale and answer, in order of preference
    answer: Callable[[str], str | None]  # what follows the marker -> teacher label
    label_type: str  # how labels compare, as in data/answers.py


nli_answer = partial(class_answer, labels=NLI)
FORMATS = {
    "cqa": Format(read_cqa, "Q:", ["So the answer is"], choice_answer, "choice"),
    "svamp": Format(read_svamp, "Q:", ["The answer is"], equation_answer, "equation"),
    "anli1": Format(
        read_nli, "Premise:", ["So the answer is", "The answer is"], nli_answer, "class"
    ),
    "esnli": Format(read_nli, "Premise:", ["Answer:"], nli_answer, "class"),
}


def parse_output(output: str, form: Format, input: str = "") -> Reading:
    """The rationale and the teacher's label in one raw output for the question `input`."""
    same = partial(same_label, label_type=form.label_type, input=input)
    return read_answer(output, [form.next_example], form.markers, form.answer, same)


def import_split(path: Path, outputs: list[str], form: Format) -> list[Record]:
    """The Records of one split file. outputs: in the rows' order; the last rows may have none.

    Raises ValueError for a file that is not as released.
    """
    with open(path, "rb") as file:
        lines = list(read_lines(file, str(path)))
    if len(outputs) > len(lines):
        what = f"{len(lines)} rows, but {len(outputs)} teacher outputs; they must be row by row"
        raise ValueError(f"{path}: {what}")
    records = []
    for index, (where, _, line) in enumerate(lines):
        try:
            text, label = form.read(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: not a row of this dataset ({error!r})") from None
        row = {"id": f"{path.stem}-{index}", "input": text, "label": label}
        if index < len(outputs):
            found = parse_output(outputs[index], form, text)
            row["rationale"] = found.rationale
            row["teacher_label"] = found.label
            row["teacher"] = {"model": "PaLM 540B"}
        records.append(parse_record(json.dumps(row), where, ""))
    return records


def read_outputs(folder: Path, split: str) -> list[str]:
    """The outputs in SPLIT_CoT_0.json, SPLIT_CoT_1.json, ..., which continue one another.

    Raises ValueError if one is missing or another file is among them: every later row would get the
    output of another row.
    """
    outputs = []
    found = {path.name for path in folder.glob(f"{split}_CoT*")}
    for number in range(len(found)):
        name = f"{split}_CoT_{number}.json"
        if name not in found:
            what = f"{name} is missing among {', '.join(sorted(found))}"
            raise ValueError(f"{folder}: {what}; they must be numbered 0, 1, 2, ...")
        texts = read_json(folder / name)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{folder / name}: not a JSON list of texts")
        outputs += texts
    return outputs


def import_all(root: Path, out: Path) -> Iterator[str]:
    """Import every split below `root` into `out`; yield a line on each file written.

    Raises FileNotFoundError if `root` holds none of the datasets, ValueError for a file that is not
    as released.
    """
    splits = []
    for name in FORMATS:
        for path in sorted((root / name).glob(f"{name}_*.json")):
            splits.append((name, path))
    if not splits:
        wanted = ", ".join(f"{name}/{name}_SPLIT.json" for name in FORMATS)
        raise FileNotFoundError(f"{root}: none of {wanted} is there")
    out.mkdir(parents=True, exist_ok=True)
    for name, path in splits:
        outputs = read_outputs(path.parent / "llm", path.stem.removeprefix(f"{name}_"))
        rows = import_split(path, outputs, FORMATS[name])
        write_jsonl(out / f"{path.stem}.jsonl", rows)
        rationales = sum(row.rationale is not None for row in rows)
        labels = sum(row.teacher_label is not None for row in rows)
        counts = f"{len(rows):,} rows, {rationales:,} rationales, {labels:,} teacher labels"
        yield f"{path.stem}.jsonl: {counts}"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the arguments or files are wrong."""
    what = "Import the paper's datasets as JSONL."
    parser = cli.OneLineParser(prog="python -m data.official", description=what)
    parser.add_argument("datasets", type=Path, help="the release's folder `datasets`")
    parser.add_argument("--out", type=Path, required=True, help="where the files are written")
    args = parser.parse_args(argv)
    try:
        for line in import_all(args.datasets, args.out):
            print(line)
    except (OSError, ValueError) as error:
        return cli.fail("data.official", 2, error)
    return 0


if __name__ == "__main__":
    cli.run("data.official", main)
