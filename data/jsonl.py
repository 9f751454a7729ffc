"""The record: one JSON object a line, UTF-8, the only thing that passes between a teacher and a student.

    {"id": "svamp-17", "input": "...", "label": "...", "rationale": "...", "teacher_label": "...", "teacher": {...}}

Only `input` is required. `label` is gold, `teacher_label` and `rationale` are the teacher's, `teacher` says where those
came from; several rationales for one label are a list of texts. Null, absent and blank mean the same: there is none.
Keys not listed here are kept.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from data.files import replacing

TEXTS = ("label", "rationale", "teacher_label")


class RecordError(ValueError):
    """A line that is no record; the message gives file, line and reason."""


@dataclass(frozen=True)
class Record:
    id: str
    input: str
    label: str | None = None
    rationale: str | list[str] | None = None
    teacher_label: str | None = None
    teacher: dict = field(default_factory=dict)
    other: dict = field(default_factory=dict)  # keys of the line that are none of the above

    def to_json(self):
        """The line of this record, without a line end. Absent texts are written as null."""
        row = {"id": self.id, "input": self.input, **{name: getattr(self, name) for name in TEXTS}}
        return to_line(row | {"teacher": self.teacher} | self.other)


def parse_record(line, where, default_id, names=None):
    """One line -> Record. `where` ("FILE:LINE") begins the message of the RecordError that a bad line raises.

    names: {"input": "question"} where the file has another name for a key of the record. A key so hidden is kept as
    "original_KEY"; an id or a label may then be a number.
    """
    try:
        row = json.loads(line)
    except ValueError as problem:
        raise RecordError(f"{where}: not JSON ({problem})") from None
    if not isinstance(row, dict):
        raise RecordError(f"{where}: a record is a JSON object, this is {type(row).__name__}")
    for key, value in row.items() if "\\ud" in line.lower() else ():  # only an escape can be half a character
        if not is_unicode(key, value):
            raise RecordError(f"{where}: {json.dumps(key)} holds half a character, a lone \\ud800 to \\udfff")
    row = renamed(row, where, names or {})
    if not isinstance(row.get("input"), str) or not row["input"].strip():
        raise RecordError(f'{where}: "input" must be a text that is not blank, got {row.get("input")!r}')
    texts = {}
    for name in TEXTS:
        value = row.pop(name, None)
        if name == "rationale" and isinstance(value, list):
            if not value or not all(isinstance(text, str) and text.strip() for text in value):
                raise RecordError(f'{where}: "rationale" must be a text or a list of texts, none blank, got {value!r}')
            texts[name] = value
            continue
        if value is not None and not isinstance(value, str):
            raise RecordError(f'{where}: "{name}" must be a text or null, got {value!r}')
        texts[name] = value if value and value.strip() else None
    identity, teacher = row.pop("id", None), row.pop("teacher", None)
    if identity is not None and not isinstance(identity, str):
        raise RecordError(f'{where}: "id" must be a text, got {identity!r}')
    if teacher is not None and not isinstance(teacher, dict):
        raise RecordError(f'{where}: "teacher" must be an object, got {teacher!r}')
    identity = default_id if identity is None else identity
    return Record(id=identity, input=row.pop("input"), teacher=teacher or {}, other=row, **texts)


def is_unicode(*values):
    """Whether JSON values can be written in UTF-8: a lone surrogate, half of a pair, cannot."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def renamed(row, where, names):
    """The row with the keys of the record in place of the file's own. With names, an id or label may be a number."""
    for name in (names[key] for key in ("id", "label") if key in names):
        if isinstance(row.get(name), int) and not isinstance(row[name], bool):
            row[name] = str(row[name])
    names = {key: name for key, name in names.items() if key != name}
    for name in names.values():
        if name not in row:
            raise RecordError(f'{where}: there is no "{name}"; the line has {", ".join(row) or "nothing"}')
    taken = {key: row.pop(name) for key, name in names.items()}
    return {f"original_{key}" if key in taken else key: value for key, value in row.items()} | taken


def read_jsonl(path, names=None):
    """Yield the Records of a file, one at a time; blank lines are passed over. A row without an id gets STEM-LINE.
    `names` as in parse_record.

    Raises RecordError for a line that is no record, OSError for a file that cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as problem:
                raise RecordError(f"{where}: not UTF-8 ({problem.reason} at byte {problem.start})") from None
            if text.strip():
                yield parse_record(text, where, f"{path.stem}-{number}", names)


def write_jsonl(path, records):
    """Write Records, or dicts as they are, a line each; the file appears complete or not at all."""
    with replacing(path) as file:
        for record in records:
            line = record.to_json() if isinstance(record, Record) else to_line(record)
            file.write(line.encode() + b"\n")


def to_line(row):
    """The JSON of a dict, text that UTF-8 can hold: half a character, as in the name of a file, becomes its escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
