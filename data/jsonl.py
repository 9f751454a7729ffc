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
        row = dict(vars(self))
        other = row.pop("other")
        return to_line(row | other)


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
    """Remove the text under a key of the row and return it, None if it is absent or blank. A whole
    number is its text.
    """
    value = row.pop(name, None)
    if type(value) is int:
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
            raise ValueError(f"{where}: not UTF-8 ({problem.reason})") from None
        yield where, number, text.rstrip("\r\n")


def read_jsonl(path: str | PathLike) -> Iterator[Record]:
    """Yield the Records of a file, one at a time. Blank lines are passed over.

    A row without an id gets the file's name and its line, such as `rows-2`.
    Raises ValueError for another format or an invalid record, OSError for a file that cannot be
    read.
    """
    with open(path, "rb", buffering=START) as file:
        start = file.peek(START)
        what = other_format(start)
        text = start.decode("utf-8-sig", "replace").lstrip()
        if not what and text and not text.startswith("{"):
            what = "this is not JSONL (a JSON object a line); data/README.md converts a table (CSV)"
        if what:
            raise ValueError(f"{path}: {what}")
        for where, number, line in read_lines(file, str(path)):
            if line.strip():
                yield parse_record(line, where, f"{Path(path).stem}-{number}")


def other_format(start: bytes) -> str:
    """What a file is, by its first bytes, and what to do. "" for JSONL or lines of text."""
    if start.startswith(b"\x1f\x8b"):
        return "this is a gzip file; unpack it first"
    if b"\0" in start[:100]:
        return "this is UTF-16 or no text; iconv -f UTF-16 -t UTF-8 converts UTF-16"
    text = start.decode("utf-8-sig", "replace").lstrip()
    if re.match(r"\[\s*[{\[\"\]]", text):
        return "this is a JSON array, not one object a line; jq -c '.[]' converts it"
    if not text.startswith("{"):
        return ""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return ""
    if "\n" in text[:end] or text[end:].partition("\n")[0].strip():
        return "this has JSON objects over several lines or several on a line; jq -c . converts it"
    return ""


def write_jsonl(path: str | PathLike, records: Iterable[Record | dict]) -> None:
    """Write Records, or dicts as they are, a line each. The file appears complete or not at all."""
    with replacing(path) as file:
        for record in records:
            line = record.to_json() if isinstance(record, Record) else to_line(record)
            file.write(line.encode() + b"\n")


def to_line(row: dict[str, Any]) -> str:
    """The JSON of a dict. Half a character, as in the name of a file, becomes its escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
