"""The record: one JSON object a line, UTF-8, the only thing that passes between a teacher and a student.

    {"id": "svamp-17", "input": "...", "label": "...", "rationale": "...", "teacher_label": "...", "teacher": {...}}

Only `input` is required. `label` is gold, `teacher_label` and `rationale` are the teacher's, `teacher` says where those
came from. Null, absent and blank mean the same: there is none. Keys not listed here
are kept.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from reprlib import repr  # cut short: a value may be megabytes long
from typing import BinaryIO

from data.files import MOST_JSON, parse_json, replacing

TEXTS = ("label", "rationale", "teacher_label")
KINDS = dict.fromkeys(TEXTS, (str, "a text or null")) | {
    "id": (str, "a text"),
    "teacher": (dict, "an object"),
}


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
        row = {"id": self.id, "input": self.input, **{name: getattr(self, name) for name in TEXTS}}
        return to_line(row | {"teacher": self.teacher} | self.other)


def parse_record(line: str, where: str, default_id: str) -> Record:
    """One line -> Record. `where` ("FILE:LINE") begins the message of the ValueError that a bad line raises.
    A whole number as id or label is taken as its text."""
    try:
        row = parse_json(line, where)
        if "\\ud" in line.lower():  # only an escape can be half a character, which UTF-8 cannot hold
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: it holds half a character, a lone \\ud800 to \\udfff") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a record is a JSON object, this is {type(row).__name__}")
    if not is_text(row.get("input")):
        raise ValueError(f'{where}: "input" must be a text that is not blank, got {repr(row.get("input"))}')
    found = {}
    for name, (kind, what) in KINDS.items():
        value = row.pop(name, None)
        if name in ("id", "label", "teacher_label") and type(value) is int:
            value = str(value)
        if not isinstance(value, kind | None):
            raise ValueError(f'{where}: "{name}" must be {what}, got {repr(value)}')
        blank = name in TEXTS and isinstance(value, str) and not value.strip()
        found[name] = None if blank else value
    found["id"] = default_id if found["id"] is None else found["id"]
    found["teacher"] = found["teacher"] or {}
    return Record(input=row.pop("input"), other=row, **found)


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def read_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, int, str]]:
    """Yield ("NAME:NUMBER", number, line without its end) for each line of a binary file, in UTF-8.

    Raises ValueError for a line that is not, or too long to be a JSON text.
    """
    for number, line in enumerate(iter(lambda: file.readline(MOST_JSON + 1), b""), 1):
        where = f"{name}:{number}"
        if len(line) > MOST_JSON:
            raise ValueError(f"{where}: longer than {MOST_JSON:,} bytes, too long for a line")
        try:
            yield where, number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as problem:
            raise ValueError(f"{where}: not UTF-8 ({problem.reason} at byte {problem.start})") from None


def read_jsonl(path: str | PathLike) -> Iterator[Record]:
    """Yield the Records of a file, one at a time; blank lines are passed over. A row without an id gets STEM-LINE.

    Raises ValueError for an invalid record, OSError for a file that cannot be read.
    """
    with open(path, "rb") as file:
        for where, number, line in read_lines(file, str(path)):
            if line.strip():
                yield parse_record(line, where, f"{Path(path).stem}-{number}")


def write_jsonl(path: str | PathLike, records: Iterable[Record | dict]) -> None:
    """Write Records, or dicts as they are, a line each; the file appears complete or not at all."""
    with replacing(path) as file:
        for record in records:
            line = record.to_json() if isinstance(record, Record) else to_line(record)
            file.write(line.encode() + b"\n")


def to_line(row: dict) -> str:
    """The JSON of a dict, text that UTF-8 can hold: half a character, as in the name of a file, becomes its escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
