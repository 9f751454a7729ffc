"""Atomic writes, locks and strict JSON, shared by all programs."""

import json
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
        if isinstance(problem, OSError) and problem.filename in (None, temporary):
            problem.filename = path
        raise


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Hold the lock file PATH.lock for the block. Raises BlockingIOError if another process holds
    it.

    The system releases the lock of a process that is killed.
    """
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{Path(path).parent}: no such directory")
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


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file. Raises OSError, or ValueError as `parse_json` does."""
    return parse_json(Path(path).read_bytes(), path)


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write a JSON file, complete or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of a JSON text.

    Raises ValueError, whose message begins with `where`, for a text that is no JSON or not UTF-8.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: not JSON (nested too deeply)") from None
    except ValueError as problem:
        raise ValueError(f"{where}: not JSON ({problem})") from None


def reason(problem: BaseException) -> str:
    """Why torch failed: the system's reason if its error followed from one, else its first line."""
    cause = problem.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    lines = str(problem).splitlines()
    return lines[0] if lines else type(problem).__name__
