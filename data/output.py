"""The output of extract.py, which is its own state: what is in it is done."""

import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from data.files import replacing
from data.jsonl import Record

BEGINNING = b'{"id": '  # of every row


@dataclass(frozen=True)
class Done:
    """What is known about a row that was asked about."""

    kind: str | None  # of error; None: the row is in the output
    request_sha256: str | None  # None for a row that has a rationale and was copied


def read_rows(path: str) -> Iterator[tuple[dict, bytes]]:
    """Yield (row, line) of a file that extract.py wrote, but for a last line that a crash has torn.

    Raises ValueError for another file or a damaged line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            whole = line.endswith(b"\n")
            try:
                row = json.loads(line)
                ours = row["teacher"] is None or "request_sha256" in row["teacher"]
            except (ValueError, LookupError, TypeError) as problem:
                ours = False
                whole = whole or not isinstance(problem, ValueError)
            if not ours and (whole or (number == 1 and not BEGINNING.startswith(line[:7]))):
                what = "not a row that extract.py wrote; remove the line or name another file"
                raise ValueError(f"{path}:{number}: {what}")
            if whole:
                yield row, line


def read_state(output: str, errors: str) -> dict[str, Done]:
    """{id: Done} of the output and the errors file. A last line that a crash has torn is cut off.

    Raises ValueError for files that are not extract.py's, and leaves them as they are.
    """
    state: dict[str, Done] = {}
    sizes = {}
    for path in (errors, output):  # the output has the last word
        if not os.path.exists(path):
            continue
        sizes[path] = 0
        for row, line in read_rows(path):
            kind = row["error"]["kind"] if path == errors else None
            teacher = row["teacher"] or {}
            state[row["id"]] = Done(kind, teacher.get("request_sha256"))
            sizes[path] += len(line)
    for path, size in sizes.items():
        os.truncate(path, size)
    return state


def append(path: str, row: Record) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(row.to_json() + "\n")


def put_in_order(path: str, order: Iterable[str], leave_out: Collection[str] = ()) -> None:
    """Put the lines of a file in the order of their ids, others after them.

    Of several lines with one id the last stays. Lines with an id in `leave_out` go.
    """
    if not os.path.exists(path):
        return
    lines = {row["id"]: line for row, line in read_rows(path)}
    with replacing(path) as file:
        for name in dict.fromkeys([*order, *lines]):
            if name in lines and name not in leave_out:
                file.write(lines[name])
