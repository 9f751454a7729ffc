"""How every program of ours touches files: written whole or not at all, and by one process at a time."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes apart
    fcntl = None


@contextmanager
def replacing(path):
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
def locked(path, waiting=None):
    """Hold PATH.lock for the block, so that one process at a time writes to `path`. A killed process holds nothing.

    Where another process holds it: BlockingIOError at once, or, with a function `waiting`, a call of it and a wait for
    the other's end.
    """
    name = f"{path}.lock"
    while True:
        file = open(name, "ab")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                file.close()
                raise BlockingIOError(f"{path}: another process (which holds {name}) writes it") from None
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            file.close()
            raise  # a file system without locks, for one
        if not fcntl or (os.path.exists(name) and os.path.samestat(os.fstat(file.fileno()), os.stat(name))):
            break
        file.close()  # its holder deleted it between our open and our lock
    try:
        yield
    finally:
        Path(name).unlink(missing_ok=True)
        file.close()


def read_json(path):
    """The content of a JSON file. Raises OSError, or ValueError, naming the file, if it is not JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: not JSON ({problem})") from None
