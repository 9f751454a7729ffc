"""A file that is written a row at a time and is its own state: what is in it is done, whatever happened to the writer.

One process writes (`locked`), each line is on the disk before the next (`Appender`), a last line torn by a crash is cut
off (`mend`), and at the end the lines are put in order (`put_in_order`).
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, field

from data.files import replacing
from data.jsonl import RecordError

BEGIN = b'{"id": '  # of every line


def mend(path):
    """Cut off a last line that a crash has torn. Returns the bytes cut off; a whole row that only lacks its line end
    gets one."""
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        tail = b""
        while end and b"\n" not in tail:  # backwards to the last line end
            start = max(0, end - (1 << 16))
            file.seek(start)
            tail, end = file.read(end - start) + tail, start
        torn = tail.rpartition(b"\n")[2]
        if not torn:
            return 0
        try:
            whole = isinstance(json.loads(torn), dict)
        except ValueError:
            whole = False
        if whole:
            file.seek(size)
            file.write(b"\n")
        else:
            file.truncate(size - len(torn))
        os.fsync(file.fileno())
        return 0 if whole else len(torn)


def read_rows(path):
    """Yield (where, row) of a file that extract.py wrote, but for a torn last line.

    Raises RecordError, naming file and line, for another file.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n") and (number > 1 or line[:7] == BEGIN[: len(line)]):
                    return  # the last line, torn
                row = None
            if not isinstance(row, dict) or "id" not in row or "request_sha256" not in (row.get("teacher") or ()):
                raise RecordError(f"{where}: not a row that extract.py wrote; name another file, or give --overwrite")
            yield where, row


@dataclass
class State:
    """What earlier starts have left."""

    hashes: dict = field(default_factory=dict)  # id -> request hash
    done: set = field(default_factory=set)  # ids in the output
    failed: dict = field(default_factory=dict)  # id -> kind of error, of those in the errors file
    right: Counter = field(default_factory=Counter)  # `correct` of the rows in the output
    torn: list = field(default_factory=list)  # (path, bytes cut off)


def read_state(output, errors):
    """The State that the output and the errors file hold. Raises RecordError for files that are not extract.py's."""
    state = State()
    for path in (errors, output):  # the output has the last word
        if not os.path.exists(path):
            continue
        for where, row in read_rows(path):
            name = row["id"]
            if path == errors:
                state.failed[name] = row.get("error", {}).get("kind", "unknown")
            elif name in state.done:
                raise RecordError(f"{where}: the id {name!r} is there twice; remove one of the lines")
            else:
                state.done.add(name)
                state.failed.pop(name, None)
                state.right[row.get("correct")] += 1
            state.hashes[name] = row["teacher"]["request_sha256"]
        if torn := mend(path):  # not before every line is known to be ours
            state.torn.append((path, torn))
    return state


class Appender:
    """Appends lines to a file; each is on the disk when `write` returns."""

    def __init__(self, path):
        self.path, self.file = path, None

    def write(self, line):
        if self.file is None:  # no file for no rows
            self.file = open(self.path, "ab", buffering=0)  # a full disk must not leave a rest to be flushed later
        rest = memoryview(line.encode() + b"\n")
        while rest:
            rest = rest[self.file.write(rest) :]
        os.fsync(self.file.fileno())

    def close(self):
        if self.file is not None:
            self.file.close()


def put_in_order(path, order, leave_out=()):
    """Put the lines of a file in the order of their ids, others after them; of several with one id the last stays.

    Lines with an id in `leave_out` go; a file left without lines goes, too. Memory: an id and an offset a line.
    """
    if not os.path.exists(path):
        return
    places, offset, count = {}, 0, 0
    with open(path, "rb") as file:
        for line in file:
            name = json.loads(line)["id"]
            places.pop(name, None)
            places[name] = offset
            offset, count = offset + len(line), count + 1
    for name in [name for name in places if name in leave_out]:
        del places[name]
    wanted = [places.pop(name) for name in order if name in places]
    wanted += places.values()
    if not wanted:
        os.unlink(path)
    elif len(wanted) < count or wanted != sorted(wanted):
        with replacing(path) as ordered, open(path, "rb") as file:
            for offset in wanted:
                file.seek(offset)
                ordered.write(file.readline())


def what_changed(path, name, now):
    """Name what makes the request of row `name` another than the one its line in the file was made with.

    now: the `teacher` of this run's rows. The answer is in the words of the command line.
    """
    before = next(row["teacher"] for _, row in read_rows(path) if row["id"] == name)
    flags = {name: f"--{name}" for name in ("temperature", "seed", "n", "reasoning")} | {"top_p": "--top-p"}
    flags |= {"max_tokens": "--max-tokens", "max_completion_tokens": "--max-tokens", "stop": "(--no-stop) stop texts"}
    found = [f"--{n} {before.get(n)}, not {now[n]}" for n in ("model", "endpoint") if before.get(n) != now[n]]
    if before.get("rationalize") != now["rationalize"]:
        found.append("--rationalize" if before.get("rationalize") else "no --rationalize")
    old, new = before.get("params", {}), now["params"]
    if ("max_tokens" in old) != ("max_tokens" in new):
        found.append(f"--max-tokens-field {'max_tokens' if 'max_tokens' in old else 'max_completion_tokens'}")
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            flag = flags.get(key, f"--extra-body {key}")
            found.append(f"{flag} {old.get(key, 'unset')}, not {new.get(key, 'unset')}")
    if before.get("prompt_sha256") != now["prompt_sha256"]:
        found.append(f"another --prompt file (sha256 {str(before.get('prompt_sha256'))[:12]})")
    return "; ".join(found) or f"another input in row {name!r}"
