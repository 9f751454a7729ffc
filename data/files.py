"""Atomic writes, locks and strict JSON, shared by all programs."""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes apart
    fcntl = None


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write. It replaces `path` when the block ends and is removed if the block
    raises.

    A symbolic link stays: the file that it points to is replaced. A device or a pipe is written
    directly.
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
            problem.filename = str(path)  # the error of a write names no file
        raise


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Hold the lock file PATH.lock for the block. Raises BlockingIOError if another process holds
    it.

    The system releases the lock of a process that is killed.
    """
    name = f"{path}.lock"
    with open(name, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                raise FileNotFoundError  # deleted by its last holder after we had opened it
        except (BlockingIOError, FileNotFoundError):
            what = f"{path}: another process is writing it ({name} is locked)"
            raise BlockingIOError(what) from None
        try:
            yield
        finally:
            Path(name).unlink(missing_ok=True)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """open(path, "rb"). Raises OSError for a pipe or a device, whose reading may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file. Raises OSError, or ValueError as `parse_json` does."""
    with open_regular(path) as file:
        return parse_json(file.read(), path)


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write a JSON file, complete or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of a JSON text.

    Raises ValueError, whose message begins with `where`, for a text that is no JSON or not UTF-8,
    for a repeated key, and for a number that is not finite (NaN, Infinity, 1e400).
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(
            text,
            parse_constant=finite_number,
            parse_float=finite_number,
            object_pairs_hook=without_repeated_keys,
        )
    except UnicodeDecodeError as problem:
        raise ValueError(f"{where}: not UTF-8 ({problem.reason} at byte {problem.start})") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON (nested too deeply)") from None
    except ValueError as problem:
        raise ValueError(f"{where}: not JSON ({problem})") from None


def finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is there twice")
    return result


def reason(problem: BaseException) -> str:
    """Why torch failed: the system's reason if its error followed from one, else its first line."""
    cause = problem.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    lines = str(problem).splitlines()
    return lines[0] if lines else type(problem).__name__
