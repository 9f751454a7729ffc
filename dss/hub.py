"""Download a public T5 from the hub, once, with the standard library.

    python -m dss.hub google/flan-t5-small --check     download it, load it, decode one known input: run this first

Files land in $DSS_CACHE/ORG--NAME (default ~/.cache/dss), or are linked from Hugging Face's own cache. One is kept if
its size and digest are those that the hub states, or, where it states none, if it can be read as what it should be. An
interrupted download (.part) is continued, a file that you delete is downloaded again.

HF_ENDPOINT names another hub or a mirror, HF_TOKEN is shown to the hub alone, HF_HUB_OFFLINE=1 forbids all downloads.
"""

import base64
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from tqdm import tqdm

from data import arguments
from data.files import digest, locked, read_json
from data.web import get, reaching
from tokenizer import T5Tokenizer

NO_WEIGHTS = "no model.safetensors or pytorch_model.bin, whole or in shards"
QUESTION = "translate English to German: The house is wonderful."  # T5 1.0 and Flan-T5 have learned to


def fetch(hub_id: str, weights: bool = True, check: Callable[[Path, str], None] = lambda path, name: None) -> Path:
    """The local directory of model `hub_id`, such as google/t5-v1_1-base: config, tokenizer and, if asked for, weights.

    check(path, name) raises OSError or ValueError for a file that is not what `name` must be, and so does this. Also
    FileNotFoundError if the hub has no such T5, PermissionError if it wants to know who asks, ConnectionError if it
    cannot be reached.
    """
    directory = Path(os.environ.get("DSS_CACHE") or "~/.cache/dss").expanduser() / hub_id.replace("/", "--")
    if is_complete(directory):
        return directory
    hub = Hub(hub_id, directory, check)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory, lambda: print(f"waiting for another download of {hub_id}", file=sys.stderr)):
        if is_complete(directory):  # by another process
            return directory
        if not hub.bring("config.json"):
            raise FileNotFoundError(f"{hub_id}: no such directory here, and {hub.url} has no config.json{hub.offline}")
        for name in ("spiece.model", "tokenizer_config.json"):  # small: what is missing shows before the weights
            hub.bring(name)
        if weights:
            files = weight_files(directory, partial(hub.bring, ask=False)) or weight_files(directory, hub.bring)
            if not files:
                raise FileNotFoundError(f"{hub.url}: {NO_WEIGHTS}{hub.offline}")
            for name in files:
                if not hub.bring(name):
                    raise FileNotFoundError(f"{hub.url}{name}: missing, though the index names it{hub.offline}")
            if not hub.offline:
                names = [path.name for path in directory.iterdir()]
                (directory / ".complete").write_text("\n".join(names), "utf-8")
    return directory


def is_complete(directory):
    """Whether a directory holds all that it is going to."""
    names = directory / ".complete"
    return names.exists() and all((directory / name).exists() for name in names.read_text("utf-8").split())


class Hub:
    """One model of the hub, and the directory that its files go to."""

    def __init__(self, hub_id, directory, check):
        get = os.environ.get
        address = re.fullmatch(r"(https?://)(?:(.*)@)?([^/@]+)(.*?)/*", get("HF_ENDPOINT") or "https://huggingface.co")
        token = get("HF_TOKEN", "")
        if not address or not re.fullmatch("[!-~]*", token):  # neither is shown, for an address may hold a password
            raise ValueError("HF_ENDPOINT or HF_TOKEN is not the address of a hub (https://huggingface.co) or a token")
        scheme, password, host, path = address.groups("")
        basic = "Basic " + base64.b64encode(unquote(password).encode()).decode()
        self.who = {"Authorization": basic if password else f"Bearer {token}"} if password or token else {}
        self.host, self.url = f"{scheme}{host}/", f"{scheme}{host}{path}/{hub_id}/resolve/main/"
        offline = get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        self.offline = ", and HF_HUB_OFFLINE is set" if offline else ""
        cache = Path(get("HF_HUB_CACHE") or (get("HF_HOME") or "~/.cache/huggingface") + "/hub").expanduser()
        self.other = cache / f"models--{hub_id.replace('/', '--')}"  # where Hugging Face keeps this model
        self.id, self.directory, self.check = hub_id, directory, check

    def bring(self, name, ask=True):
        """Link or, if `ask`, download a file into the directory, unless it is there. Returns whether it is now."""
        path, part, url = self.directory / name, self.directory / f"{name}.part", self.url + name
        if path.exists() or self.borrow(name, path):
            return True
        if self.offline or not ask:
            return False
        have = part.stat().st_size if part.exists() else 0
        where = url if name != "config.json" else f"{self.id}: no such directory here, and {url}"
        with reaching(where, part), get(url, have, self.host, self.who) as reply:
            if reply.status == 404:
                return False
            self.directory.mkdir(exist_ok=True)
            bar = tqdm.wrapattr(reply, "read", total=reply.size, initial=reply.start, desc=name, leave=False)
            with open(part, "ab" if reply.start else "wb") as file, bar as source:
                shutil.copyfileobj(source, file, 1 << 20)
                got = file.tell()
            if got < (reply.size or 0):
                raise ConnectionError(f"{got} of {reply.size} bytes came; run again to go on")
        try:
            kind = dict(kind="sha1", start=b"blob %d\0" % got) if len(reply.tag) == 40 else {}  # git's, of small files
            if reply.size not in (None, got) or (reply.tag and reply.tag != digest(part, **kind).hex()):
                raise ValueError("its size or digest is not the one that the hub states")
            if not reply.tag:
                self.check(part, name)
        except (OSError, ValueError) as problem:
            part.unlink()
            if reply.start:  # the rest was of another version
                return self.bring(name)
            raise ValueError(f"{where}: something else came ({problem}); run again") from None
        os.replace(part, path)
        return True

    def borrow(self, name, path):
        """Link a file that Hugging Face's own cache holds. Returns whether it does."""
        with contextlib.suppress(OSError, ValueError):
            commit = (self.other / "refs" / "main").read_text("utf-8").strip()
            file = (self.other / "snapshots" / commit / name).resolve(strict=True)
            self.directory.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)  # a link that leads nowhere
            path.symlink_to(file)
        return path.exists()


def weight_files(directory: Path, has: Callable[[str], bool]) -> list[str]:
    """The names of the files that hold a checkpoint's weights, whole or in shards; [] if there are none.

    has(name) says whether `directory` has a file, or sees to it. Raises ValueError for an index that is none.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if has(name):
            return [name]
        if has(f"{name}.index.json"):
            return shards(directory / f"{name}.index.json")
    return []


def shards(index: str | os.PathLike) -> list[str]:
    """The file names that an index.json lists. Raises ValueError if it is not such an index."""
    try:
        content = read_json(index)
        names, about = sorted(set(content["weight_map"].values())), content.get("metadata", {})
        if not isinstance(about, dict) or any(n != os.path.basename(n) or n in ("", ".", "..") for n in names):
            raise ValueError("its metadata are none, or it names a file in another directory")
        return names
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise ValueError(f"{index}: not an index of shards ({problem})") from None


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 there is no such model, or it is not one that this code computes."""
    from dss.generate import generate  # these import this module
    from dss.weights import load_t5, locate

    parser = arguments.OneLineParser(prog="python -m dss.hub", description="Download a public T5.")
    parser.add_argument("model", help="its id on the hub, such as google/flan-t5-small, or a directory")
    parser.add_argument("--check", action="store_true", help="load it, too, and decode one known input")
    args = parser.parse_args(argv)
    try:
        line = str(directory := locate(args.model))
        if args.check:
            model, tokenizer = load_t5(directory), T5Tokenizer(directory)
            if max(question := tokenizer.encode(QUESTION)) >= model.config.vocab_size:
                raise ValueError(f"{directory}: the tokenizer has more ids than the model embeds")
            [ids] = generate(model, [question], 32)
            line += f": {model.num_parameters():,} parameters; {QUESTION!r} -> {tokenizer.decode(ids)!r}"
    except (OSError, ValueError) as problem:
        return arguments.fail("dss.hub", 2, problem)
    print(line)
    return 0


if __name__ == "__main__":
    arguments.run("dss.hub", main)
