"""Import the paper's released datasets:  python -m data.official DATASETS_DIR --out DIR

DATASETS_DIR holds NAME/NAME_SPLIT.json, JSON lines, and NAME/llm/SPLIT_CoT_K.json for K = 0, 1,
...: PaLM 540B's raw outputs for those rows, as lists that continue one another. It may hold
gpt-neox/NAME/SPLIT.json with GPT-NeoX 20B's. Every split becomes NAME_SPLIT.jsonl, and
NAME_SPLIT_gpt-neox.jsonl beside it.

An output is a rationale, a marker, an answer ("... So the answer is (c) wooded area.") and nearly
always an invented next example, which is cut off first. An output without a marker gives neither
rationale nor teacher label. A marker without a usable answer leaves the rationale alone.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import cli
from data.answers import choice_answer, class_answer, equation_answer, read_answer, same_label
from data.files import parse_json, read_json
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


@dataclass(frozen=True)
class Output:
    text: str
    place: str  # FILE:INDEX


def parse_output(output: str, form: Format, input: str = "") -> tuple[str | None, str | None]:
    """One raw output for the question `input` -> (rationale or None, teacher label or None)."""
    same = partial(same_label, label_type=form.label_type, input=input)
    found = read_answer(output, [form.next_example], form.markers, form.answer, same)
    return found.rationale, found.label


def import_split(path: Path, outputs: list[Output], form: Format, teacher: str) -> list[Record]:
    """The Records of one split file. outputs: in the rows' order; the last rows may have none.

    Raises ValueError for a file that is not as released.
    """
    with open(path, "rb") as file:
        lines = [(where, line) for where, _, line in read_lines(file, str(path)) if line.strip()]
    if len(outputs) > len(lines):
        what = f"{len(lines)} rows, but {len(outputs)} teacher outputs; they must be row by row"
        raise ValueError(f"{path}: {what}")
    records = []
    for index, (where, line) in enumerate(lines):
        row = parse_json(line, where)
        rationale = answer = None
        provenance = {}
        try:
            text, label = form.read(row)
            if index < len(outputs):
                rationale, answer = parse_output(outputs[index].text, form, text)
                provenance = {"model": teacher, "output": outputs[index].place}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: not a row of this dataset ({error!r})") from None
        record = Record(f"{path.stem}-{index}", text, label, rationale, answer, provenance)
        records.append(parse_record(record.to_json(), where, ""))  # checks the types
    return records


def palm_files(folder: Path, split: str) -> list[Path]:
    """SPLIT_CoT_0.json, SPLIT_CoT_1.json, ... of a folder.

    Raises ValueError if one is missing or another file is among them: every later row would get the
    output of another row.
    """
    found = {path.name for path in folder.glob(f"{split}_CoT*")}
    files = [folder / f"{split}_CoT_{number}.json" for number in range(len(found))]
    for path in files:
        if path.name not in found:
            foreign = sorted(found - {each.name for each in files})
            what = f"{path.name} is missing, and {foreign[0]} is there"
            raise ValueError(f"{folder}: {what}; the outputs must be numbered 0, 1, 2, ...")
    return files


def read_outputs(files: list[Path]) -> list[Output]:
    """The outputs in JSON lists that continue one another."""
    outputs = []
    for path in files:
        items = read_json(path)
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{path}: not a JSON list of texts")
        for index, item in enumerate(items):
            outputs.append(Output(item, f"{path.name}:{index}"))
    return outputs


def import_all(root: Path, out: Path) -> Iterator[str]:
    """Import every split below `root` into `out`; yield a line on each file written.

    Raises FileNotFoundError if `root` holds none of the datasets, ValueError for a file that is not
    as released.
    """
    splits = []
    for name, form in FORMATS.items():
        for path in sorted((root / name).glob(f"{name}_*.json")):
            if re.fullmatch(rf"{name}_[a-z]+\.json", path.name):
                splits.append((name, path, form))
    if not splits:
        wanted = ", ".join(f"{name}/{name}_SPLIT.json" for name in FORMATS)
        raise FileNotFoundError(f"{root}: none of {wanted} is there")
    out.mkdir(parents=True, exist_ok=True)
    for name, path, form in splits:
        split = path.stem.removeprefix(f"{name}_")
        outputs = read_outputs(palm_files(path.parent / "llm", split))
        yield import_file(path, out / f"{path.stem}.jsonl", outputs, form, "PaLM 540B")
        neox = root / "gpt-neox" / name / f"{split}.json"
        if neox.exists():
            outputs = read_outputs([neox])
            to = out / f"{path.stem}_gpt-neox.jsonl"
            yield import_file(path, to, outputs, form, "GPT-NeoX 20B")


def import_file(path: Path, to: Path, outputs: list[Output], form: Format, teacher: str) -> str:
    """Write the rows of one split, and say what they are."""
    rows = import_split(path, outputs, form, teacher)
    write_jsonl(to, rows)
    rationales = sum(row.rationale is not None for row in rows)
    labels = 0
    right = 0
    for row in rows:
        if row.teacher_label is not None:
            labels += 1
            if row.label is not None:
                right += same_label(row.teacher_label, row.label, form.label_type, row.input)
    share = right / max(len(outputs), 1)
    counts = f"{len(rows):,} rows, {rationales:,} rationales, {labels:,} teacher labels"
    return f"{to.name}: {counts}; teacher right on {share:.1%}"


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
