"""What a failure means for a row depends on whether others are answered."""

import threading
import time
from collections import deque

from data.asking import Asker
from data.prompt import Answer
from data.teacher import Reply, RequestError

USAGE = {"prompt": 1, "completion": 1, "cached": 0}


class Teacher:
    """Answers after a moment, but not from its second `begins` to `ends`."""

    def __init__(self, begins, ends):
        self.start = time.monotonic()
        self.begins = begins
        self.ends = ends

    def ask(self, body):
        sent = time.monotonic() - self.start
        time.sleep(0.05)
        if self.begins < sent < self.ends:
            raise RequestError("http_503", "503", "moment")
        return Reply("text", "", False, "model", USAGE)


def test_no_row_is_lost_whose_last_attempt_fell_into_an_outage():
    """Others are answered again just after it; the row is asked once more then."""
    teacher = Teacher(0.1, 0.9)
    asker = Asker(teacher, {}, 5, 600.0, lambda *_: None, lambda usage: "", scale=0.01)
    rows = deque(range(48))
    answers = []

    def work():
        while rows:
            rows.popleft()
            answers.append(asker.ask({}, lambda reply: Answer("reasons", "label")).answer)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 48 and not any(answer.error for answer in answers)
