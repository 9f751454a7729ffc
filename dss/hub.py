"""Download a public T5 from the hub, once, with the standard library.

Files land in $DSS_CACHE/ORG--NAME (default ~/.cache/dss), one process at a time. Each is written to a .part file and
moved into place whole; an interrupted download goes on where it stopped, if the hub still has the same file (its ETag,
kept in .part.etag). HF_ENDPOINT names another hub or a mirror, as for other tools.
"""

import contextlib
import errno
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two downloads of one model at a time are not kept apart
    fcntl = None

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference, each whole or in shards
COMPLETE = ".complete"  # marks a directory that holds all it is going to
TIMEOUT = 60  # seconds without a byte


def fetch(hub_id, weights=True):
    """The local directory of model `hub_id`, such as google/t5-v1_1-base: config, tokenizer and, if asked for, weights.

    Raises FileNotFoundError if the hub has no such T5, PermissionError if it wants to know who asks, ConnectionError if
    it cannot be reached.
    """
    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + f"/{hub_id}/resolve/main/"
    directory = Path(os.environ.get("DSS_CACHE", "~/.cache/dss")).expanduser() / hub_id.replace("/", "--")
    if (directory / COMPLETE).exists():
        return directory
    with locked(directory, hub_id):
        if not (directory / COMPLETE).exists():  # or another process has brought it meanwhile
            try:
                if not download(base, "config.json", directory):
                    raise FileNotFoundError(f"{base} has no config.json")
            except OSError as problem:
                with contextlib.suppress(OSError):  # leave it if an earlier download left parts in it
                    directory.rmdir()
                raise type(problem)(f"{hub_id}: no such directory here, and {problem}") from None
            for name in ("spiece.model", "tokenizer_config.json"):  # small: what is missing shows before the weights
                download(base, name, directory)
            if weights:
                download_weights(base, directory)
                (directory / COMPLETE).touch()
    return directory


def download_weights(base, directory):
    for name in WEIGHTS:
        if download(base, name, directory):
            return
        if download(base, f"{name}.index.json", directory):
            for shard in shards(directory / f"{name}.index.json"):
                if not download(base, shard, directory):
                    raise FileNotFoundError(f"{base}{shard}: missing, though the index names it")
            return
    raise FileNotFoundError(f"{base}: no {' or '.join(WEIGHTS)}, whole or in shards")


@contextlib.contextmanager
def locked(directory, hub_id):
    """Make the directory, and keep other processes out of it for the length of the block; wait for one that is in."""
    handle = None
    while handle is None:
        directory.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            break
        handle = os.open(directory, os.O_RDONLY)
        lock(handle, hub_id)
        if not directory.exists() or not os.path.samestat(os.fstat(handle), os.stat(directory)):
            os.close(handle)  # the process waited for has removed it, for the hub has no such model
            handle = None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)  # and with it the lock


def lock(handle, hub_id):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another download of {hub_id}", file=sys.stderr)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return


def download(base, name, directory):
    """Bring base + name into the directory, unless it is there. Returns whether the hub has it."""
    path, part, tag = directory / name, directory / f"{name}.part", directory / f"{name}.part.etag"
    if path.exists():
        return True
    known = tag.read_text("utf-8") if tag.exists() else ""
    have = part.stat().st_size if part.exists() and known else 0
    request = urllib.request.Request(
        base + name, headers={"Range": f"bytes={have}-", "If-Range": known} if have else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            resumed = have > 0 and reply.status == 206
            length, etag = reply.headers.get("Content-Length"), reply.headers.get("ETag", "")
            if resumed and not continues(reply.headers, have, known):
                return download_anew(base, name, directory)
            if not resumed:
                have = 0
                part.unlink(missing_ok=True)  # before its tag changes: never one version's part with another's tag
                tag.write_text("" if etag.startswith("W/") else etag, "utf-8")
            total = have + int(length) if length else None
            with (
                open(part, "ab") as file,
                tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, leave=False) as bar,
            ):
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
                got = file.tell()
    except urllib.error.HTTPError as problem:
        if problem.code == 416 and have:  # the part is all there was, or longer than what there is now
            return download_anew(base, name, directory)
        if problem.code == 404:
            return False
        if problem.code in (401, 403):  # the hub says 401 also for a model that does not exist
            raise PermissionError(
                f"{base}{name}: HTTP {problem.code}, no such model or one that needs a login (private, gated): "
                "download it yourself and give the directory"
            ) from None
        raise ConnectionError(f"{base}{name}: HTTP {problem.code} {problem.reason}") from None
    except (OSError, http.client.HTTPException) as problem:
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise OSError(problem.errno, problem.strerror, str(part)) from None
        raise ConnectionError(
            f"{base}{name}: {getattr(problem, 'reason', None) or problem!r}; run again to go on"
        ) from None
    if total is not None and got != total:
        raise ConnectionError(f"{base}{name}: {got} of {total} bytes came; run again to go on")
    os.replace(part, path)
    tag.unlink()
    return True


def continues(headers, have, known):
    """Whether a reply of status 206 holds what follows the first `have` bytes of the version whose ETag is `known`."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
    if not match or int(match[1]) != have or headers.get("ETag", known) != known:
        return False
    return match[3] == "*" or int(match[2]) + 1 == int(match[3])


def download_anew(base, name, directory):
    (directory / f"{name}.part").unlink()
    return download(base, name, directory)


def shards(index):
    """The file names that an index.json lists. Raises ValueError if it is not such an index."""
    try:
        names = sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))
        if any(name != os.path.basename(name) or name in ("", ".", "..") for name in names):
            raise ValueError("it names a file in another directory")
        return names
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{index}: not an index of shards ({problem})") from None
