"""A file that is written row by row and is its own state: what is in it is done, however the writer ended."""

import json
import os
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from data.files import replacing
from data.teacher.tally import print_line


def read_rows(path: str) -> Iterator[tuple[str, dict, bytes]]:
    """Yield (FILE:LINE, row, line) of a file that extract.py wrote, but for a torn last line. Raises ValueError,
    naming file and line, for another file or a damaged one."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n") and (number > 1 or b'{"id": '.startswith(line[:7])):
                    return  # the last line, torn; every one begins so
                row = None
            teacher = row.get("teacher", "none") if isinstance(row, dict) and "id" in row else "none"
            if teacher is not None and not (isinstance(teacher, dict) and "request_sha256" in teacher):
                what = "name another file" if number == 1 else "remove this line, and its row is asked again"
                raise ValueError(f"{path}:{number}: not a row that extract.py wrote; {what}")
            if line.endswith(b"\n"):  # else it is torn, too
                yield f"{path}:{number}", row, line


class Outcome(NamedTuple):
    """What came of a row, in an earlier start or in this one."""

    kind: str | None  # of error; None: the row is in the output
    correct: bool | None = None
    request_hash: str | None = None  # of earlier starts; None also for a row kept with the rationale it came with


def read_state(output: str, errors: str) -> dict[str, Outcome]:
    """{id: Outcome} of what the output and the errors file hold. A last line that a crash has torn is cut off. Raises
    ValueError for files that are not extract.py's, and then leaves them as they are."""
    state, sizes = {}, {}
    for path in filter(os.path.exists, (errors, output)):  # the output has the last word
        sizes[path] = 0
        for where, row, line in read_rows(path):
            name = row["id"]
            if name in state and not state[name].kind:
                raise ValueError(f"{where}: the id {name!r} is there twice; remove one of the lines")
            kind = row.get("error", {}).get("kind", "unknown") if path == errors else None
            state[name] = Outcome(kind, row.get("correct"), (row["teacher"] or {}).get("request_sha256"))
            sizes[path] += len(line)
    for path, size in sizes.items():
        if torn := os.path.getsize(path) - size:
            os.truncate(path, size)
            print_line(f"{path}: a last line torn by a crash was cut off ({torn:,} bytes); its row is asked again")
    return state


def append(path: str, lines: list[str]):
    """Append lines to a file; they are on the disk when this returns."""
    if lines:  # no file for no rows
        with open(path, "ab", buffering=0) as file:  # a full disk must not leave a rest to be flushed later
            rest = memoryview("".join(f"{line}\n" for line in lines).encode())
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())


def put_in_order(path: str, order: Iterable[str], leave_out: Collection[str] = ()):
    """Put the lines of a file in the order of their ids, others after them; of several with one id the last stays, and
    lines with an id in `leave_out` go. A file left without lines goes, too. Memory: an id and an offset a line."""
    if not os.path.exists(path):
        return
    places, offsets = {}, [0]
    with open(path, "rb") as file:
        for line in file:
            places[json.loads(line)["id"]] = offsets[-1]
            offsets.append(offsets[-1] + len(line))
    wanted = [places[n] for n in dict.fromkeys([*order, *places]) if n in places and n not in leave_out]
    if not wanted:
        os.unlink(path)
    elif wanted != offsets[:-1]:
        with replacing(path) as ordered, open(path, "rb") as file:
            for offset in wanted:
                file.seek(offset)
                ordered.write(file.readline())


def what_changed(path: str, name: str, now: dict | None) -> str:
    """Which settings differ between this run's request for row `name` and the one recorded in the file. now: this run's
    provenance, or None if the row is kept as it came."""
    before = next(row["teacher"] for _, row, _ in read_rows(path) if row["id"] == name)
    if before is None or now is None:
        return f"{'no ' if before is None else ''}--replace, or another rationale in row {name!r}"
    names = now.keys() - {"base_url", "params"}
    old, new = ({n: t.get(n) for n in sorted(names)} | t.get("params", {}) for t in (before, now))
    changed = [n for n in old | new if old.get(n) != new.get(n)]
    shown = (f"{n} {old.get(n, 'unset')}, not {new.get(n, 'unset')}" for n in changed)
    return "; ".join(shown) or f"another input in row {name!r}"
