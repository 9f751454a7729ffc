"""Get a file from a hub: a busy hub is asked again, another host is not shown who asks, half a file is continued."""

import contextlib
import errno
import http.client
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import HTTPErrorProcessor, Request, build_opener

TIMEOUT = 60  # seconds without a byte
WAITS = (1, 2, 4)  # seconds before a busy hub is asked again, unless it names another time
LONGEST_WAIT = 120  # seconds


def get(url: str, have: int, host: str, who: dict[str, str]) -> http.client.HTTPResponse:
    """The reply, of status 200, 206 or 404, for the bytes of a file from `have` on. `start` is where it begins; `size`
    (or None) and `tag` (a digest or "") are the file's, as the hub states them before it sends us on to another host.

    host: how the hub's own addresses begin, which alone are sent the headers `who`. Raises PermissionError if the hub
    wants to know who asks, OSError, ValueError or HTTPException if it cannot be reached.
    """
    size, tag, waits = None, "", list(WAITS)
    for _ in range(20):
        own = url.startswith(host)
        headers = ({"Range": f"bytes={have}-"} if have else {}) | (who if own else {})
        reply = build_opener(AsItIs).open(Request(url, headers=headers), timeout=TIMEOUT)
        code, header = reply.status, reply.headers.get
        if own and not tag:
            size, tag = stated(header)
        wait = int(header("Retry-After")) if header("Retry-After", "").isdecimal() else (waits or [0])[0]
        if code in (301, 302, 303, 307, 308) and re.match("https?://", urljoin(url, header("Location"))):
            url = urljoin(url, header("Location"))
        elif (code == 429 or code >= 500) and waits and wait <= LONGEST_WAIT:
            print(f"{url}: HTTP {code}, asking again in {wait} s", file=sys.stderr)
            time.sleep(wait)
            waits.pop(0)
        elif code == 416 or (code == 206 and not (tag and header("Content-Range", "").startswith(f"bytes {have}-"))):
            have = 0  # what is here may not be the beginning of this file, and without a digest that would not show
        elif code in (200, 206, 404):
            reply.tag, reply.start = tag, have if code == 206 else 0
            reply.size = size if size is not None or reply.length is None else reply.start + reply.length
            return reply
        elif code in (401, 403):  # 401 also for a model that does not exist
            raise PermissionError(f"HTTP {code}: no such model, or it needs HF_TOKEN; or download it yourself")
        else:
            raise ConnectionError(f"HTTP {code} {reply.reason}")
        reply.close()
    raise ConnectionError("sent on without end")


class AsItIs(HTTPErrorProcessor):
    """Gives back every reply: urllib's own way would show the next host who asks, and forget what the hub said."""

    http_response = https_response = lambda self, request, reply: reply


def stated(header):
    """(size or None, digest or "") of a file as a hub's headers state them: sha256 of a large file, git's sha1 of a
    small one. Other tags say nothing of the content."""
    linked, size = header("X-Linked-Etag"), header("X-Linked-Size", "")
    tag = (linked or header("ETag", "")).removeprefix("W/").strip('"')
    return int(size) if size.isdecimal() else None, tag if len(tag) == 40 or (linked and len(tag) == 64) else ""


@contextlib.contextmanager
def reaching(where: str, part: Path) -> Iterator[None]:
    """Say which download has failed. What the disk refuses is not the connection's failure."""
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException) as problem:
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise OSError(problem.errno, problem.strerror, str(part)) from None
        kind = PermissionError if isinstance(problem, PermissionError) else ConnectionError
        raise kind(f"{where}: {getattr(problem, 'reason', None) or str(problem) or repr(problem)}") from None
