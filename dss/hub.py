"""Download a public T5 from the hub, once, with the standard library.

    python -m dss.hub google/flan-t5-small --check     download it, load it, decode one known input: run this first

Files land in $DSS_CACHE/ORG--NAME (default ~/.cache/dss), or are linked from Hugging Face's own cache. One is kept if
its size and digest are those that the hub states, or, where it states none, if it can be read as what it should be. An
interrupted download (.part) is continued, a file that you delete is downloaded again. HF_ENDPOINT names another hub,
HF_TOKEN is sent to the hub alone, HF_HUB_OFFLINE=1 forbids all downloads.
"""

import contextlib
import errno
import http.client
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from data import cli
from data.files import digest, locked

QUESTION = "translate English to German: The house is wonderful."  # T5 1.0 and Flan-T5 have learned to
WAITS = (1, 2, 4)  # seconds before a busy hub is asked again, unless it names another time
TIMEOUT, LONGEST_WAIT = 60, 120  # seconds without a byte, and of Retry-After
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # errors of ours, not of the connection


def fetch(hub_id: str, check: Callable, list_weights: Callable | None) -> Path:
    """The local directory of model `hub_id`, such as google/t5-v1_1-base: config, tokenizer and, if asked for, weights.

    check(path, name) raises OSError or ValueError for a file that is not what `name` must be, and so does this.
    list_weights(directory, bring) names the files of the weights, asking bring(name) for each that may be one. Raises
    FileNotFoundError, PermissionError or ConnectionError: the hub has no such T5, needs a token, or is out of reach.
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
        if list_weights:  # in the form that is here already, if any
            names = list_weights(directory, partial(hub.bring, ask=False)) or list_weights(directory, hub.bring)
            if missing := [name for name in names or ["model.safetensors"] if not hub.bring(name)]:
                raise FileNotFoundError(f"{hub.url}{missing[0]}: missing{hub.offline}")
            if not hub.offline:
                (directory / ".complete").write_text("\n".join(path.name for path in directory.iterdir()), "utf-8")
    return directory


def is_complete(directory):
    names = directory / ".complete"  # lists all that was downloaded
    return names.exists() and all((directory / name).exists() for name in names.read_text("utf-8").split())


class Hub:
    """One model of the hub, and the directory that its files go to."""

    def __init__(self, hub_id, directory, check):
        get = os.environ.get
        address, token = get("HF_ENDPOINT") or "https://huggingface.co", get("HF_TOKEN") or ""
        if not re.fullmatch("https?://[^@]+", address) or not re.fullmatch("[!-~]*", token):  # neither is shown
            raise ValueError("HF_ENDPOINT or HF_TOKEN is not the address of a hub (https://huggingface.co) or a token")
        self.url = f"{address.rstrip('/')}/{hub_id}/resolve/main/"
        self.offline = ", and HF_HUB_OFFLINE is set" * (get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"))
        cache = Path(get("HF_HUB_CACHE") or (get("HF_HOME") or "~/.cache/huggingface") + "/hub").expanduser()
        self.other = cache / f"models--{hub_id.replace('/', '--')}"  # where Hugging Face keeps this model
        self.id, self.directory, self.check, self.token = hub_id, directory, check, token

    def bring(self, name, ask=True):
        """Link or, if `ask`, download a file into the directory, unless it is there. Returns whether it is now."""
        path, part, url = self.directory / name, self.directory / f"{name}.part", f"{self.url}{name}"
        if path.exists() or self.borrow(name, path):
            return True
        if self.offline or not ask:
            return False
        where = f"{self.id}: no such directory here, and {url}" if name == "config.json" else url
        try:
            have = part.stat().st_size if part.exists() else 0
            reply, size, tag = self.get(url, have)
            if reply.status == 404:
                return False
            have = have if reply.status == 206 else 0
            self.directory.mkdir(exist_ok=True)
            bar = tqdm.wrapattr(reply, "read", total=size, initial=have, desc=name, leave=False)
            with reply, open(part, "ab" if have else "wb") as file, bar as source:
                shutil.copyfileobj(source, file, 1 << 20)
                got = file.tell()
            if got < (size or 0):
                raise ConnectionError(f"{got} of {size} bytes came; run again to go on")
        except (OSError, ValueError, http.client.HTTPException) as problem:
            if getattr(problem, "errno", None) in DISK:
                raise OSError(problem.errno, problem.strerror, str(part)) from None
            kind = PermissionError if isinstance(problem, PermissionError) else ConnectionError
            raise kind(f"{where}: {getattr(problem, 'reason', None) or str(problem) or repr(problem)}") from None
        try:
            kind = dict(kind="sha1", start=b"blob %d\0" % got) if len(tag) == 40 else {}  # git's, of small files
            if size not in (None, got) or (tag and tag != digest(part, **kind).hex()):
                raise ValueError("its size or digest is not the one that the hub states")
            if not tag:
                self.check(part, name)
        except (OSError, ValueError) as problem:
            part.unlink()
            if have:  # the rest was of another version
                return self.bring(name)
            raise ValueError(f"{where}: not the expected file ({problem}); run again") from None
        os.replace(part, path)
        return True

    def get(self, url, have):
        """(reply, size, tag): a reply of status 404, or 206 with the bytes of a file from `have` on, or 200 with all of
        them; size (or None) and tag (a digest or "") as the hub states them before it sends us on to another host."""
        waits = list(WAITS)
        while True:
            request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            if self.token:
                request.add_unredirected_header("Authorization", f"Bearer {self.token}")  # not sent to another host
            try:
                reply = build_opener(redirects := Redirects()).open(request, timeout=TIMEOUT)
            except HTTPError as error:
                reply = error
            code, header, stated = reply.status, reply.headers.get, redirects.stated or reply.headers
            # sha256 of a large file, git's sha1 of a small one; other tags say nothing of the content
            linked, size = stated.get("X-Linked-Etag"), stated.get("X-Linked-Size", "")
            tag = (linked or stated.get("ETag", "")).removeprefix("W/").strip('"')
            tag = tag if len(tag) == 40 or (linked and len(tag) == 64) else ""
            wait = int(header("Retry-After")) if header("Retry-After", "").isdecimal() else (waits or [0])[0]
            if code in (200, 404) or (code == 206 and tag and header("Content-Range", "").startswith(f"bytes {have}-")):
                rest = reply.length and have * (code == 206) + reply.length
                return reply, int(size) if size.isdecimal() else rest, tag
            if code in (206, 416) and have:
                have = 0  # what is here may not be the beginning of this file, and without a digest that would not show
            elif (code == 429 or code >= 500) and waits and wait <= LONGEST_WAIT:
                print(f"{url}: HTTP {code}, asking again in {wait} s", file=sys.stderr)
                time.sleep(wait)
                waits.pop(0)
            elif code in (401, 403):  # 401 also for a model that does not exist
                raise PermissionError(f"HTTP {code}: no such model, or it needs HF_TOKEN; or name a directory")
            else:
                raise ConnectionError(f"HTTP {code} {reply.reason}")

    def borrow(self, name, path):
        """Link a file that Hugging Face's own cache holds. Returns whether it does."""
        with contextlib.suppress(OSError, ValueError):
            commit = (self.other / "refs" / "main").read_text("utf-8").strip()
            file = (self.other / "snapshots" / commit / name).resolve(strict=True)
            self.directory.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)  # a link that leads nowhere
            path.symlink_to(file)
        return path.exists()


class Redirects(HTTPRedirectHandler):
    stated = None  # what the hub says of a file, on the way to another host

    def redirect_request(self, request, reply, code, message, headers, url):
        self.stated = headers if "X-Linked-Etag" in headers else self.stated
        new = super().redirect_request(request, reply, code, message, headers, url)
        if new and urlsplit(url)[:2] == urlsplit(request.full_url)[:2]:  # the hub itself may know who asks
            new.unredirected_hdrs.update(request.unredirected_hdrs)
        return new


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 there is no such model, or it is not one that this code computes."""
    from dss.student import Student  # these import this module
    from dss.weights import resolve_checkpoint

    parser = cli.OneLineParser(prog="python -m dss.hub", description="Download a public T5.")
    parser.add_argument("model", help="its id on the hub, such as google/flan-t5-small, or a directory")
    parser.add_argument("--check", action="store_true", help="load it, too, and decode one known input")
    args = parser.parse_args(argv)
    try:
        line = str(directory := resolve_checkpoint(args.model))
        if args.check:
            student = Student.load(directory, prefixes={"predict": ""}, max_new_tokens=32)
            (answer,) = student.answer([QUESTION])
            line += f": {student.model.num_parameters():,} parameters; {QUESTION!r} -> {answer!r}"
    except (OSError, ValueError) as problem:
        return cli.fail("dss.hub", 2, problem)
    print(line)
    return 0


if __name__ == "__main__":
    cli.run("dss.hub", main)
