"""Ask a teacher from several threads; decide what a failure means for a row and the run."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from data.cli import Interrupted
from data.prompt import Answer
from data.teacher import Reply, RequestError, Teacher

FIRST_PAUSE = 0.5  # seconds between two attempts, where the server asks for none
LONGEST_PAUSE = 20.0


@dataclass(frozen=True)
class Asked:
    """What came of one row, and what it took."""

    answer: Answer
    raw: str = ""  # text of the reply
    model: str = ""  # that answered, as the server says
    attempts: int = 1
    usage: Counter = field(default_factory=Counter)  # tokens of all attempts


class Asker:
    """What the threads share: how the teacher is doing. There are three kinds of failure.

    - The row's: its text is filtered or too long, or its 5xx or timeout outlasts max_retries while
      others are answered. The row fails, and the others go on.
    - The moment's: 429 (which is no attempt), 5xx, no connection. It is waited for, and all threads
      honour Retry-After. While nobody is answered no row fails, and after `patience` seconds the
      run ends.
    - The run's: the key, the model, a refused parameter. The run ends at once.
    """

    def __init__(
        self,
        teacher: Teacher,
        probe: dict,
        max_retries: int,
        patience: float,
        warn: Callable[[str, str], None],
        pay: Callable[[dict[str, int]], str],
        scale: float = 1.0,
    ) -> None:
        """probe: a request that the teacher can answer. scale: of all pauses, for tests.

        warn(kind, message) prints. pay(tokens) counts, and gives a reason if no more may be spent.
        """
        self.teacher = teacher
        self.probe = probe
        self.max_retries = max_retries
        self.patience = patience
        self.warn = warn
        self.pay = pay
        self.scale = scale
        self.stopped = threading.Event()
        self.problem = ""  # why the run ends
        self.opens = 0.0  # no request goes out before this time
        self.heard = time.monotonic()  # when the teacher last answered
        self.answered = False  # at least once
        self.search = threading.Lock()  # held by the one thread that sends the probe

    def ask(self, body: dict, read: Callable[[Reply], Answer]) -> Asked:
        """Ask until there is an answer or the row fails. `read` may raise RequestError, too.

        Raises Interrupted if the run ends meanwhile, RequestError if it ends by this request.
        """
        attempts = 0
        pause = 0.0
        usage: Counter = Counter()
        while True:
            self.wait(pause * random.uniform(0.75, 1) * self.scale)
            sent = time.monotonic()
            try:
                reply = self.send(body)
                usage.update(reply.usage)
                answer = read(reply)
            except RequestError as error:
                verdict = self.judge(error, sent, attempts + 1)
                if verdict == "fails":
                    answer = Answer(error=error.kind, detail=str(error))
                    return Asked(answer, error.raw, "", attempts + 1, usage)
                if verdict == "counts":
                    attempts += 1
                self.opens = max(self.opens, time.monotonic() + error.wait * self.scale)
                pause = min(LONGEST_PAUSE, 2 * pause or FIRST_PAUSE)
            else:
                self.heard = time.monotonic()
                self.answered = True
                raw = reply.text or reply.reasoning
                return Asked(answer, raw, reply.model, attempts + 1, usage)

    def judge(self, error: RequestError, sent: float, attempts: int) -> str:
        """What an error means for the row: it "fails", or is asked again; the attempt "counts" or
        not.

        sent: when the request went out. attempts: with this one. Raises the error if it ends the
        run.
        """
        if error.then == "run":
            raise error
        self.warn(error.kind, str(error))
        if error.then == "row":
            return "fails"
        if error.wait > self.patience:
            raise ends(error, f"it asks for a pause of {error.wait:.0f} s (--patience)")
        unclear = error.then == "unclear"
        last = error.then == "moment" and attempts >= self.max_retries
        silent = time.monotonic() - self.heard > self.patience * self.scale
        again = "is no attempt" if error.then == "pace" else "counts"
        if not (unclear or last or silent):
            return again
        if last and not self.answered and error.kind in ("disconnect", "bad_reply", "empty"):
            raise error  # the wrong place, most likely
        others = self.others_are_answered(sent)
        if others:
            fails = unclear or (last and attempts > self.max_retries)
            return "fails" if fails else again
        if unclear and others is False:
            raise error
        if silent:
            raise ends(error, f"nobody was answered for {self.patience:g} s (--patience)")
        self.warn("silence", f"the teacher answers nobody; waiting for it (--patience): {error}")
        return "is no attempt"

    def others_are_answered(self, since: float) -> bool | None:
        """Whether the teacher answers other requests now; None if that cannot be told."""
        with self.search:
            self.wait()
            if self.heard > since:
                return True
            try:
                self.send(self.probe)
            except RequestError as error:
                if error.then in ("moment", "pace"):
                    return None
                return error.then == "row"
            self.heard = time.monotonic()
            self.answered = True
            return True

    def send(self, body: dict) -> Reply:
        reply = self.teacher.ask(body)
        problem = self.pay(reply.usage)
        if problem:
            self.end(problem)
        return reply

    def wait(self, pause: float = 0.0) -> None:
        """Return after a pause, when a request may go out. Raises Interrupted if the run ends
        first.
        """
        until = time.monotonic() + pause
        rest = 0.0
        while not self.stopped.wait(rest):
            rest = max(until, self.opens) - time.monotonic()
            if rest <= 0:
                return
        raise Interrupted

    def end(self, problem: str) -> None:
        """Let no further request go out."""
        self.problem = self.problem or problem
        self.stopped.set()


def ends(error: RequestError, why: str) -> RequestError:
    return RequestError(error.kind, f"{error}; {why}", "run")
