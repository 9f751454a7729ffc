"""Download a T5 from huggingface.co into Hugging Face's cache.

HF_ENDPOINT names another hub, HF_HUB_CACHE another cache. The package huggingface_hub does the work
where it is installed; only it sends HF_TOKEN. Without it, torch.hub downloads public models.
"""

import os
import re
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch

from data.files import read_json
from tokenizer import T5Tokenizer

CONFIGS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that exists is used
SHARD = r"[\w.-]+\.(safetensors|bin)"


def download(hub_id: str, weights: bool = True) -> Path:
    """The local directory of a hub's T5: config.json, the tokenizer and, if asked for, the weights.

    hub_id: such as "google/t5-v1_1-base". A file that is in the cache is not downloaded again.
    Raises OSError or ValueError, in one line, if the hub has no such T5, refuses it or cannot be
    reached, or if a file is not the one whose sha256 the hub states.
    """
    config = fetch(hub_id, "config.json", "main")
    if config is None:
        raise FileNotFoundError(f"{hub_id}: no such directory here, and no such T5 on the hub")
    directory = config.parent
    revision = directory.name  # the other files are of the same commit
    for name in ("spiece.model", *CONFIGS):
        fetch(hub_id, name, revision)
    try:
        T5Tokenizer(directory)
    except (OSError, ValueError) as problem:  # before the weights, which may take an hour
        raise ValueError(f"{hub_id} has no tokenizer that can be used: {problem}") from None
    if weights:
        fetch_weights(hub_id, revision)
    return directory


def fetch_weights(hub_id: str, revision: str) -> None:
    """Fetch the weights, whole or in shards. Whoever reads them finds out which are missing."""
    for name in WEIGHTS:
        if fetch(hub_id, name, revision):
            return
        index = fetch(hub_id, f"{name}.index.json", revision)
        if index:
            for shard in shard_names(index):
                fetch(hub_id, shard, revision)
            return


def shard_names(index: Path) -> list[str]:
    """The files that an index.json lists. Raises ValueError, naming the index."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        beside = all(re.fullmatch(SHARD, name) for name in names)
    except Exception:
        beside = False
    if not beside:
        raise ValueError(f"{index}: not an index of files of weights beside it")
    return names


def fetch(hub_id: str, name: str, revision: str) -> Path | None:
    """The local path of a file, downloaded unless it is in the cache; None if the hub has none."""
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        return fetch_with_torch(hub_id, name, revision)
    place = dict(cache_dir=os.environ.get("HF_HUB_CACHE"), endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        return Path(hf_hub_download(hub_id, name, revision=revision, **place))
    except Exception as problem:
        unreached = isinstance(problem, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
        if isinstance(problem, EntryNotFoundError) and not unreached:
            return None
        answer = problem.__cause__ or problem
        raise ConnectionError(f"{hub_id}: no such directory here, and the hub: {answer}") from None


def fetch_with_torch(hub_id: str, name: str, revision: str) -> Path | None:
    """`fetch` without huggingface_hub."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or "~/.cache/huggingface/hub").expanduser()
    path = cache / f"models--{hub_id.replace('/', '--')}" / "snapshots" / revision / name
    if path.exists():
        return path
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{endpoint}/{hub_id}/resolve/{revision}/{name}"
    try:
        try:
            reply = build_opener(StopAtDigest).open(url, timeout=60)
        except HTTPError as error:  # or the redirection at which StopAtDigest stops
            reply = error
        if reply.status == 404:
            return None
        if reply.status >= 400:
            raise PermissionError(
                f"HTTP {reply.status}; if the model is not public, install huggingface_hub, "
                "which sends HF_TOKEN"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = reply.headers.get("X-Linked-Etag", "").strip('"')
        if digest:
            torch.hub.download_url_to_file(url, str(path), digest)
        else:  # a small file; a reply that breaks off raises IncompleteRead
            path.write_bytes(reply.read())
    except (OSError, HTTPException, RuntimeError) as problem:  # RuntimeError: another digest
        raise ConnectionError(f"{hub_id}: no such directory here, and {url}: {problem}") from None
    return path


class StopAtDigest(HTTPRedirectHandler):
    """Follows redirections until a reply states the digest of the file."""

    def redirect_request(self, request: Request, *details: Any) -> Request | None:
        headers = details[3]
        if "X-Linked-Etag" in headers:
            return None
        return super().redirect_request(request, *details)
