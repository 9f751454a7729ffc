"""What a failure means for a row depends on whether others are answered."""

import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

from data.asking import Asker
from data.prompt import Answer
from data.teacher import Reply, RequestError


def test_no_row_is_lost_whose_last_attempt_fell_into_an_outage():
    """Others are answered again just after it; the row is asked once more then."""
    start = time.monotonic()

    def reply(body):
        sent = time.monotonic() - start
        time.sleep(0.03)
        if 0.06 < sent < 0.5:
            raise RequestError("http_503", "503", "moment")
        return Reply("text", "", False, "model", {})

    quiet = lambda *_: ""
    asker = Asker(Mock(ask=reply), {}, 5, 600.0, quiet, quiet, scale=0.005)
    ask = lambda _: asker.ask({}, lambda reply: Answer("reasons", "label")).answer
    with ThreadPoolExecutor(8) as pool:
        assert not any(answer.error for answer in pool.map(ask, range(48)))
