"""How every program of ours touches files: they are written whole or not at all, by one process at a time, and what is
read may come from anybody."""

import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes apart
    fcntl = None

DEEPEST = 100  # brackets within brackets of a JSON text
MOST_JSON = 1 << 24  # bytes of a JSON text; in memory the worst takes some twenty times as many


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write, moved onto `path` when the block ends, removed if it raises.

    A symbolic link stays one: the file it points to is replaced. What is no regular file (/dev/stdout, a pipe) is
    written directly.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield file
        return
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as problem:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(problem, OSError) and problem.errno and problem.filename is None:
            problem.filename = str(path)  # write() names none
        raise


@contextmanager
def locked(path: str | os.PathLike, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold PATH.lock for the block, so that one process at a time writes to `path`. A killed process holds nothing.

    If another process holds it: raises BlockingIOError or, given a function `waiting`, calls that and waits.
    """
    name = f"{path}.lock"
    with open(name, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                raise BlockingIOError(f"{path}: another process (which holds {name}) writes it") from None
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        if ours := not fcntl or os.path.exists(name) and os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
            try:
                yield
            finally:
                Path(name).unlink(missing_ok=True)
    if not ours:  # its holder deleted it between our open and our lock
        with locked(path, waiting):
            yield


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """open(path, "rb"), but OSError for a pipe, which may never be written, and a device, which may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def digest(path: str | os.PathLike, size: int = sys.maxsize, kind: str = "sha256", start: bytes = b"") -> bytes:
    """The digest of `start` and the first `size` bytes of a regular file."""
    hashed = hashlib.new(kind, start)
    with open_regular(path) as file:
        while block := file.read(min(size, 1 << 20)):
            hashed.update(block)
            size -= len(block)
    return hashed.digest()


def read_json(path: str | os.PathLike, most: int = MOST_JSON) -> object:
    """The value in a regular JSON file of at most `most` bytes. Raises OSError, or ValueError as `parse_json` does."""
    with open_regular(path) as file:
        return parse_json(file.read(most + 1), path, most)


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write a JSON file, complete or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def parse_json(text: str | bytes, where: object, most: int = MOST_JSON) -> object:
    """The value of a JSON text that anybody may have written.

    Raises ValueError, whose message begins with `where`, if it is longer than `most` or nested deeper than DEEPEST,
    gives a key twice, or has a number that is not finite: NaN, Infinity, 1e400.
    """
    if len(text) > most:
        raise ValueError(f"{where}: longer than {most:,} bytes, too long for a JSON text")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, parse_constant=finite, parse_float=finite, object_pairs_hook=unrepeated)
        if text.count("[") + text.count("{") > DEEPEST and depth(value) > DEEPEST:
            raise RecursionError
    except UnicodeDecodeError as problem:
        raise ValueError(f"{where}: not UTF-8 ({problem.reason} at byte {problem.start})") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON (nested deeper than {DEEPEST})") from None
    except ValueError as problem:
        raise ValueError(f"{where}: not JSON ({problem})") from None
    return value


def finite(text):
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def unrepeated(pairs):
    if len(result := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return result


def depth(value):
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


def reason(problem: BaseException) -> str:
    """Why torch failed: the system's reason where its error followed from one, else its first line."""
    system = problem.__context__
    lines = str(problem).splitlines() or [type(problem).__name__]
    return (system.strerror if isinstance(system, OSError) else None) or lines[0]
