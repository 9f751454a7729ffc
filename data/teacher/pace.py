"""When the next request may go out, for all workers together.

A 429 is the server's pace and no row's failure. Requests then go out at an even interval, a little shorter than the
time each answer has taken recently, and every answer shortens it: the stream follows the rate that the server allows,
and an occasional 429 shows the limit. A Retry-After stops all workers. A teacher that answers nobody any more is no
row's failure either: one worker looks for it while the others wait. Both waits end after `patience`.
"""

import random
import threading
import time
from collections.abc import Callable

from data.cli import Interrupted
from data.teacher.endpoint import RequestError
from data.teacher.tally import print_line


class Pace:
    def __init__(self, per_minute: int = 0, patience: float = 600.0, scale: float = 1.0):
        """scale shortens every pause, for tests."""
        self.scale, self.patience = scale, patience
        self.shortest = self.interval = 60 / per_minute * scale if per_minute else 0.0  # seconds between two requests
        self.stopped, self.lock = threading.Event(), threading.Lock()
        self.turn = threading.Lock()  # held by the one worker that sends next; the others queue for it
        self.search = threading.Lock()  # held by the one worker that looks for a teacher that is gone
        self.heard = self.since = time.monotonic()  # when the teacher answered last; since when `passed` is counted
        self.open = self.sent = 0.0  # no request goes out before `open`; the last one did at `sent`
        self.slowed = self.missed = 0.0  # when a 429 last changed the interval; when a search last found nobody
        self.passed = 0  # requests that were let through recently

    def wait(self) -> float:
        """Return when a request may go out, with the time. Raises Interrupted if the run ends first."""
        with self.turn:
            while (pause := max(self.open, self.sent + self.interval) - time.monotonic()) > 0:
                self.sleep(pause)
            self.sleep(0)
            self.sent = time.monotonic()
            return self.sent

    def let_through(self, answered: bool):
        """A reply came that is no 429, and is an answer or some other failure."""
        with self.lock:
            self.passed += 1
            self.interval = max(self.shortest, 0.97 * self.interval)
            self.heard = time.monotonic() if answered else self.heard

    def slow_down(self, sent: float, error: RequestError):
        """A 429 for the request that went out at time `sent`. Raises the error if nothing else came for too long."""
        with self.lock:
            now = time.monotonic()
            self.open = max(self.open, now + (error.wait or 0) * self.scale)
            if sent >= self.slowed:  # an earlier request tells nothing about the pace of now
                took = now - self.since
                slower = min(max(2 * self.interval, 0.5 * self.scale), 60 * self.scale)
                measured = min(0.8 * took / max(self.passed, 1), 3 * self.scale)
                self.interval = max(self.shortest, measured if self.passed >= 1 else slower)
                self.slowed, self.since, self.passed = now, now - took / 2, self.passed / 2  # the past counts less
        self.lose_patience(error)

    def back_off(self, attempt: int, wait: float | None):
        """Pause after failed attempt 1, 2, ...: all workers for the server's `wait`, else this one, ever longer."""
        if wait:
            with self.lock:
                self.open = max(self.open, time.monotonic() + wait * self.scale)
        else:
            self.sleep(min(60, 0.25 * 2**attempt) * random.uniform(0.75, 1) * self.scale)

    def await_teacher(self, sent: float, error: RequestError, answers: Callable[[], bool]) -> bool:
        """After a request of time `sent` has failed: return when the teacher has answered since, another worker's
        request or that of `answers`. Returns whether it was gone meanwhile. Raises the error after `patience`."""
        if self.heard >= sent:  # it answers others
            return False
        with self.search:
            pause = 0.5
            while self.heard < sent and not answers():
                if pause == 0.5:
                    print_line(f"the teacher is gone ({error}); waiting {self.patience:,.0f} s at most (--patience)")
                self.missed = time.monotonic()
                self.lose_patience(error)
                self.sleep(pause * self.scale)
                pause = min(10, 2 * pause)
            if pause > 0.5:
                print_line("the teacher is back")
            self.heard = time.monotonic()
        return self.missed > sent

    def lose_patience(self, error):
        silence = time.monotonic() - self.heard
        if silence > self.patience * self.scale:
            raise RequestError(error.kind, f"{error}; no answer for {silence:,.0f} s (--patience)", "stop")

    def sleep(self, seconds: float):
        if self.stopped.wait(seconds) if seconds > 0 else self.stopped.is_set():
            raise Interrupted
