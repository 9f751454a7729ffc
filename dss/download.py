"""Download a T5 from huggingface.co into Hugging Face's cache.

HF_ENDPOINT names another hub, HF_HUB_CACHE another cache. The package huggingface_hub does the work
where it is installed; only it sends HF_TOKEN. Without it, torch.hub downloads public models.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch

from data.files import read_json
from tokenizer import T5Tokenizer

TOKENIZER = ("tokenizer_config.json", "added_tokens.json", "spiece.model", "tokenizer.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that exists is used
SHARD = r"[\w.-]+\.(safetensors|bin)"

Fetch = Callable[[str, str, str], Path | None]  # (hub id, file name, revision) -> local path


def download(hub_id: str, weights: bool = True) -> Path:
    """The local directory of a hub's T5: config.json, the tokenizer and, if asked for, the weights.

    hub_id: such as "google/t5-v1_1-base". A file that is in the cache is not downloaded again.
    Raises OSError or ValueError, in one line, if the hub has no such T5, refuses it or cannot be
    reached, or if a file is not the one whose sha256 the hub states.
    """
    fetch = fetch_with_torch
    if importlib.util.find_spec("huggingface_hub"):
        fetch = fetch_with_huggingface_hub
    config = fetch(hub_id, "config.json", "main")
    if config is None:
        raise FileNotFoundError(f"{hub_id}: no such directory here, and no such T5 on the hub")
    directory = config.parent
    revision = directory.name  # the other files are of the same commit
    for name in TOKENIZER:
        fetch(hub_id, name, revision)
    try:
        T5Tokenizer(directory)
    except (OSError, ValueError) as problem:  # before the weights, which may take an hour
        raise ValueError(f"{hub_id} has no tokenizer that can be used: {problem}") from None
    if weights:
        fetch_weights(fetch, hub_id, revision)
    return directory


def fetch_weights(fetch: Fetch, hub_id: str, revision: str) -> None:
    """Fetch the weights, whole or in shards. Raises FileNotFoundError if they are not all there."""
    for name in WEIGHTS:
        if fetch(hub_id, name, revision):
            return
        index = fetch(hub_id, f"{name}.index.json", revision)
        if index:
            for shard in shard_names(index):
                if not fetch(hub_id, shard, revision):
                    raise FileNotFoundError(f"{hub_id}: {shard} is not on the hub")
            return
    raise FileNotFoundError(f"{hub_id}: neither {' nor '.join(WEIGHTS)} is on the hub")


def shard_names(index: Path) -> list[str]:
    """The files that an index.json lists. Raises OSError or ValueError, naming the index."""
    content = read_json(index)
    try:
        names = sorted(set(content["weight_map"].values()))
        wrong = [name for name in names if not re.fullmatch(SHARD, name)]
    except Exception as problem:
        raise ValueError(f"{index}: not an index of shards ({problem!r})") from None
    if wrong:
        raise ValueError(f"{index}: {wrong[0]!r} is not a file of weights beside it")
    return names


def fetch_with_huggingface_hub(hub_id: str, name: str, revision: str) -> Path | None:
    """The local path of a file, downloaded unless it is in the cache; None if the hub has none."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place = dict(cache_dir=os.environ.get("HF_HUB_CACHE"), revision=revision)
    cached = try_to_load_from_cache(hub_id, name, **place)
    if cached is not None and not isinstance(cached, str):
        return None  # the hub has said before that it has no such file
    try:
        return Path(hf_hub_download(hub_id, name, endpoint=os.environ.get("HF_ENDPOINT"), **place))
    except Exception as problem:
        unknown = isinstance(problem, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
        if isinstance(problem, EntryNotFoundError) and not unknown:
            return None
        answer = " ".join(str(problem.__cause__ or problem).split())
        raise ConnectionError(f"{hub_id}: no such directory here, and the hub: {answer}") from None


def fetch_with_torch(hub_id: str, name: str, revision: str) -> Path | None:
    """The same without huggingface_hub."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or "~/.cache/huggingface/hub").expanduser()
    path = cache / f"models--{hub_id.replace('/', '--')}" / "snapshots" / revision / name
    if path.exists():
        return path
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{endpoint.rstrip('/')}/{hub_id}/resolve/{revision}/{name}"
    try:
        reply = build_opener(StopAtDigest).open(Request(url, method="HEAD"), timeout=60)
    except HTTPError as error:  # one of these is the redirection at which StopAtDigest stops
        reply = error
    except (OSError, HTTPException) as problem:
        raise ConnectionError(f"{hub_id}: no such directory here, and {url}: {problem}") from None
    if reply.status == 404:
        return None
    if reply.status in (401, 403):
        hint = "not public; install huggingface_hub, which sends HF_TOKEN"
        raise PermissionError(f"{url}: HTTP {reply.status}, {hint}")
    if reply.status >= 400:
        raise ConnectionError(f"{url}: HTTP {reply.status}; try again later")
    digest = reply.headers.get("X-Linked-Etag", "").strip('"')
    if len(digest) != 64:
        digest = None  # not a sha256
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), digest)
    except (OSError, HTTPException, RuntimeError) as problem:  # RuntimeError: another digest
        raise ConnectionError(f"{url}: {problem}; try again") from None
    size = reply.headers.get("Content-Length")
    if not digest and size and path.stat().st_size != int(size):
        path.unlink()
        raise ConnectionError(f"{url}: the download broke off; try again")
    return path


class StopAtDigest(HTTPRedirectHandler):
    """Follows redirections until a reply states the digest of the file."""

    def redirect_request(self, request: Request, *details: Any) -> Request | None:
        headers = details[3]
        if "X-Linked-Etag" in headers:
            return None
        return super().redirect_request(request, *details)
