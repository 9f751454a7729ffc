"""Ctrl-C, SIGTERM and a closed terminal as a request to end at a clean point, for train.py and extract.py alike."""

import contextlib
import os
import signal
import sys
import time


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: end now and keep what is there."""


class Stop:
    """In a `with` block the first SIGINT, SIGTERM or SIGHUP sets `requested`, for a run to end cleanly, and prints the
    line `notice`, if any; a second one ends the run where it is."""

    def __init__(self, notice=""):
        self.notice = notice

    def __enter__(self):
        self.requested = False
        heard = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
            heard.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.handle) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, *_):
        if self.requested:
            if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() < self.since + 1:
                return  # torchrun passes on the Ctrl-C that its processes have had from the terminal
            raise KeyboardInterrupt
        self.requested, self.since = True, time.monotonic()
        with contextlib.suppress(RuntimeError):  # in the middle of another print
            if self.notice:
                print(f"\n{self.notice}", file=sys.stderr, flush=True)

    def check(self):
        if self.requested:
            raise Interrupted
