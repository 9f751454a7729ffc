"""The record: one JSON object a line, UTF-8. All programs exchange rows in this form.

    {"id": "svamp-17", "input": "...", "label": "...", "rationale": "...", "teacher_label": "...",
    "teacher": {...}}

Only `input` is required. `label` is gold, `teacher_label` and `rationale` are the teacher's, and
`teacher` says where those came from. Null, absent and blank all mean that there is none. Other
keys are kept.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from reprlib import repr  # cut short: a value may be megabytes long
from typing import Any, BinaryIO

from data.files import parse_json, replacing

NUMBER_OR_TEXT = ("id", "label", "teacher_label")  # a whole number is its text
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
START = 1 << 16  # bytes at the beginning of a file that tell its format


@dataclass(frozen=True)
class Record:
    id: str
    input: str
    label: str | None = None
    rationale: str | None = None
    teacher_label: str | None = None
    teacher: dict = field(default_factory=dict)
    other: dict = field(default_factory=dict)  # keys of the line that are none of the above

    def to_json(self) -> str:
        """The line of this record, without a line end. Absent texts are written as null."""
        row = {
            "id": self.id,
            "input": self.input,
            "label": self.label,
            "rationale": self.rationale,
            "teacher_label": self.teacher_label,
            "teacher": self.teacher,
        }
        return to_line(row | self.other)


def parse_record(line: str, where: str, default_id: str) -> Record:
    """One line -> Record. Raises ValueError, whose message begins with `where` ("FILE:LINE")."""
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a record is a JSON object, this is {type(row).__name__}")
    if "input" not in row:
        keys = ", ".join(row) or "nothing"
        raise ValueError(f'{where}: there is no "input"; the line has {keys}')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        what = "it holds half a character, a lone \\ud800 to \\udfff"
        raise ValueError(f"{where}: {what}") from None
    text = row.pop("input")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: "input" must be a text that is not blank, got {repr(text)}')
    teacher = row.pop("teacher", None)
    if not isinstance(teacher, dict | None):
        raise ValueError(f'{where}: "teacher" must be an object, got {repr(teacher)}')
    return Record(
        id=take_text(row, "id", where) or default_id,
        input=text,
        label=take_text(row, "label", where),
        rationale=take_text(row, "rationale", where),
        teacher_label=take_text(row, "teacher_label", where),
        teacher=teacher or {},
        other=row,
    )


def take_text(row: dict, name: str, where: str) -> str | None:
    """Remove the text under a key of the row and return it, None if it is absent or blank."""
    value = row.pop(name, None)
    if name in NUMBER_OR_TEXT and type(value) is int:
        value = str(value)
    if not isinstance(value, str | None):
        raise ValueError(f'{where}: "{name}" must be a text or null, got {repr(value)}')
    if value is None or not value.strip():
        return None
    return value


def read_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, int, str]]:
    """Yield ("NAME:NUMBER", number, line without its end) for each line of a binary file, in UTF-8.

    Raises ValueError for a line that is not UTF-8. A byte order mark is passed over.
    """
    for number, line in enumerate(file, 1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as problem:
            what = f"not UTF-8 ({problem.reason} at byte {problem.start})"
            raise ValueError(f"{where}: {what}") from None
        yield where, number, text.rstrip("\r\n")


def read_jsonl(path: str | PathLike) -> Iterator[Record]:
    """Yield the Records of a file, one at a time. Blank lines are passed over.

    A row without an id gets the file's name and its line, such as `rows-2`.
    Raises ValueError for another format or an invalid record, OSError for a file that cannot be
    read.
    """
    with open(path, "rb", buffering=START) as file:
        start = file.peek(START)
        what = other_format(start) or table_format(start)
        if what:
            raise ValueError(f"{path}: {what}")
        for where, number, line in read_lines(file, str(path)):
            if line.strip():
                yield parse_record(line, where, f"{Path(path).stem}-{number}")


def other_format(start: bytes) -> str:
    """What a file is, by its first bytes, and what to do. "" for JSONL or lines of text."""
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            return f"this is a {name} file; unpack it first"
    if start.startswith((b"PK\x03\x04", b"PAR1")):
        return "this is a zip, Excel or Parquet file, not JSONL (one JSON object a line)"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:100]:
        return "this is UTF-16, not UTF-8; iconv -f UTF-16 -t UTF-8 converts it"
    text = start.decode("utf-8-sig", "replace").lstrip()
    if re.match(r"\[\s*[{\[\"\]]", text):
        return "this is a JSON array, not one object a line; jq -c '.[]' converts it"
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return ""
    if text.startswith("{") and "\n" in text[:end]:
        return "this has JSON objects over several lines, not one a line; jq -c . converts it"
    if text.startswith("{") and re.match(r"\s*,", text[end:]):
        return "this has JSON objects joined by commas, not one a line without commas"
    if text.startswith("{") and re.match(r"[ \t]*\{", text[end:]):
        return "this has several JSON objects on a line, not one a line; jq -c . converts it"
    return ""


def table_format(start: bytes) -> str:
    """The same for a file that must be JSONL. "" if its first line may be a JSON object."""
    text = start.decode("utf-8-sig", "replace").lstrip()
    if not text or text.startswith("{"):
        return ""
    if re.search(r"[,;\t]", text.splitlines()[0]) and not text.startswith("["):
        return "this is a table (CSV or TSV), not JSONL; data/README.md says how to convert it"
    return "this is not JSONL, whose lines are JSON objects; data/README.md says how to make it"


def write_jsonl(path: str | PathLike, records: Iterable[Record | dict]) -> None:
    """Write Records, or dicts as they are, a line each. The file appears complete or not at all."""
    with replacing(path) as file:
        for record in records:
            line = record.to_json() if isinstance(record, Record) else to_line(record)
            file.write(line.encode() + b"\n")


def to_line(row: dict[str, Any]) -> str:
    """The JSON of a dict. Half a character, as in the name of a file, becomes its escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
