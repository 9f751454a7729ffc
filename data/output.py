"""The output of extract.py, which is its own state: what is in it is done."""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data.files import replacing


@dataclass(frozen=True)
class Done:
    """What is known about a row that was asked about."""

    kind: str | None  # of error; None: the row is in the output
    correct: bool | None = None
    request_sha256: str | None = None  # None for a row that was kept as it came


def read_rows(path: str) -> Iterator[tuple[str, dict, bytes]]:
    """Yield (FILE:LINE, row, line) of a file that extract.py wrote, but for a torn last line.

    Raises ValueError for another file or a damaged line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n") and (number > 1 or b'{"id": '.startswith(line[:7])):
                    return  # torn: every line begins so
                row = None
            if not is_ours(row):
                what = "remove this line, and its row is asked again"
                if number == 1:
                    what = "name another file"
                raise ValueError(f"{path}:{number}: not a row that extract.py wrote; {what}")
            if line.endswith(b"\n"):  # else it is torn, too
                yield f"{path}:{number}", row, line


def is_ours(row: Any) -> bool:
    if not isinstance(row, dict) or "id" not in row or "teacher" not in row:
        return False
    teacher = row["teacher"]
    return teacher is None or (isinstance(teacher, dict) and "request_sha256" in teacher)


def read_state(output: str, errors: str, say: Callable[[str], None]) -> dict[str, Done]:
    """{id: Done} of the output and the errors file. A last line that a crash has torn is cut off.

    Raises ValueError for files that are not extract.py's, and leaves them as they are.
    """
    state: dict[str, Done] = {}
    sizes = {}
    for path in (errors, output):  # the output has the last word
        if not os.path.exists(path):
            continue
        sizes[path] = 0
        for where, row, line in read_rows(path):
            name = row["id"]
            if name in state and state[name].kind is None:
                raise ValueError(
                    f"{where}: the id {name!r} is there twice; remove one of the lines"
                )
            kind = None
            if path == errors:
                kind = row.get("error", {}).get("kind", "unknown")
            teacher = row["teacher"] or {}
            state[name] = Done(kind, row.get("correct"), teacher.get("request_sha256"))
            sizes[path] += len(line)
    for path, size in sizes.items():
        torn = os.path.getsize(path) - size
        if torn:
            os.truncate(path, size)
            what = f"a last line torn by a crash was cut off ({torn:,} bytes)"
            say(f"{path}: {what}; its row is asked again")
    return state


def append(path: str, lines: list[str]) -> None:
    """Append lines to a file. They are on the disk when this returns."""
    if not lines:
        return
    rest = memoryview("".join(f"{line}\n" for line in lines).encode())
    with open(
        path, "ab", buffering=0
    ) as file:  # a full disk must not leave a rest to be flushed later
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def put_in_order(path: str, order: Iterable[str], leave_out: Collection[str] = ()) -> None:
    """Put the lines of a file in the order of their ids, others after them.

    Of several lines with one id the last stays. Lines with an id in `leave_out` go, and so does a
    file that has no lines then.
    """
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        before = file.readlines()
    by_id = {json.loads(line)["id"]: line for line in before}
    after = []
    for name in dict.fromkeys([*order, *by_id]):
        if name in by_id and name not in leave_out:
            after.append(by_id[name])
    if not after:
        os.unlink(path)
    elif after != before:
        with replacing(path) as file:
            file.writelines(after)


def what_changed(path: str, name: str, now: dict[str, Any]) -> str:
    """Which settings differ between this run's `teacher` and the one of a row in the file."""
    for _, row, _ in read_rows(path):
        if row["id"] == name:
            before = row["teacher"] or {"params": {}}
    old = before | before["params"]
    new = now | now["params"]
    changed = []
    for key in new | before["params"]:
        if key != "params" and old.get(key) != new.get(key):
            changed.append(f"{key} {old.get(key, 'unset')}, not {new.get(key, 'unset')}")
    return "; ".join(changed) or f"another input in row {name!r}"
