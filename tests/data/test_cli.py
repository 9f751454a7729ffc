"""How programs end; that command lines are read is shown by every program."""

import io
import os
import signal
import sys

import pytest

from data import cli
from data.cli import Interrupted, Stop


def test_errors_are_one_line_that_a_terminal_does_not_obey(capsys):
    assert cli.fail("p", 2, FileNotFoundError(2, "No such file", "x.jsonl")) == 2
    assert cli.fail("p", 1, ValueError("two\nlines\x1b")) == 1
    assert capsys.readouterr().err == "p: x.jsonl: No such file\np: two lines \n"


ENDS = {130: KeyboardInterrupt(), 2: OSError(28, "full"), 0: BrokenPipeError()}


@pytest.mark.parametrize("status", ENDS)
def test_run_ends_with_the_status(status, monkeypatch, capsys):
    def main():
        raise ENDS[status]

    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    with pytest.raises(SystemExit) as end:
        cli.run("p", main)
    assert end.value.code == status
    assert capsys.readouterr().err.startswith("p: ") == bool(status)


def test_a_terminal_without_unicode_does_not_end_a_program(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        cli.run("p", lambda: print("café"))
    assert stream.buffer.getvalue() == b"caf?\n"


def test_the_first_signal_asks_and_a_later_one_ends(capfd):
    before = signal.getsignal(signal.SIGINT)
    with Stop("stopping") as stop:
        for _ in range(2):  # torchrun sends the terminal's Ctrl-C again
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            stop.check()
        stop.since -= 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == "\nstopping\n"
    assert signal.getsignal(signal.SIGINT) is before
