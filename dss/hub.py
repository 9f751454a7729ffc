"""Download a public T5 from the hub, once, with the standard library.

Files land in $DSS_CACHE/ORG--NAME (default ~/.cache/dss). Each is written to a .part file and moved into place whole;
an interrupted download goes on where it stopped. HF_ENDPOINT names another hub or a mirror, as for other tools.
"""

import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference, each whole or in shards
COMPLETE = ".complete"  # marks a directory that holds all it is going to
TIMEOUT = 60  # seconds without a byte


def fetch(hub_id):
    """The local directory of model `hub_id`, such as google/t5-v1_1-base: config, weights and tokenizer.

    Raises FileNotFoundError if the hub has no such T5, ConnectionError if the hub cannot be reached.
    """
    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + f"/{hub_id}/resolve/main/"
    directory = Path(os.environ.get("DSS_CACHE", "~/.cache/dss")).expanduser() / hub_id.replace("/", "--")
    if (directory / COMPLETE).exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    if not download(base, "config.json", directory):
        with contextlib.suppress(OSError):  # leave it if an earlier download left parts in it
            directory.rmdir()
        raise FileNotFoundError(f"{hub_id}: no such directory, and {base} has no config.json")
    for name in WEIGHTS:
        if download(base, name, directory):
            break
        if download(base, f"{name}.index.json", directory):
            for shard in shards(directory / f"{name}.index.json"):
                if not download(base, shard, directory):
                    raise FileNotFoundError(f"{base}{shard}: missing, though the index names it")
            break
    else:
        raise FileNotFoundError(f"{base}: no {' or '.join(WEIGHTS)}, whole or in shards")
    for name in ("spiece.model", "tokenizer_config.json"):
        download(base, name, directory)
    (directory / COMPLETE).touch()
    return directory


def download(base, name, directory):
    """Bring base + name into the directory, unless it is there. Returns whether the hub has it."""
    path, part = directory / name, directory / f"{name}.part"
    if path.exists():
        return True
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(base + name, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            resumed = reply.status == 206
            have = have if resumed else 0
            length = reply.headers.get("Content-Length")
            total = have + int(length) if length else None
            with (
                open(part, "ab" if resumed else "wb") as file,
                tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, leave=False) as bar,
            ):
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
                got = file.tell()
    except urllib.error.HTTPError as problem:
        if problem.code == 416:  # the part is all there was, or a leftover of another version: start again
            part.unlink()
            return download(base, name, directory)
        if problem.code in (401, 403, 404):  # the hub says 401 for a model that does not exist
            return False
        raise ConnectionError(f"{base}{name}: HTTP {problem.code} {problem.reason}") from None
    except (OSError, http.client.HTTPException) as problem:
        raise ConnectionError(
            f"{base}{name}: {getattr(problem, 'reason', None) or problem!r}; run again to go on"
        ) from None
    if total is not None and got != total:
        raise ConnectionError(f"{base}{name}: {got} of {total} bytes came; run again to go on")
    os.replace(part, path)
    return True


def shards(index):
    """The file names that an index.json lists. Raises ValueError if it is not such an index."""
    try:
        names = sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))
        if any(name != os.path.basename(name) for name in names):
            raise ValueError("it names a file in another directory")
        return names
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{index}: not an index of shards ({problem})") from None
