"""The command line of a dataclass, and how programs end."""

import io
import os
import signal
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from data import cli
from data.cli import Interrupted, Stop


@dataclass(frozen=True)
class Config:
    """A config."""

    # first group
    steps: int = 3  # how many, 100 % of them
    rate: float | None = None  # of learning
    names: tuple[str, ...] = ("a", "b")  # of things
    kind: Literal["x", "y"] = "x"  # of thing
    # second group
    long_name: bool = False  # a switch

    def check(self):
        cli.require(self.steps > 0, "steps", "at least 1", self)


def parse(line):
    return cli.parse(line.split(), Config, "p")


def test_flags_are_the_fields_with_their_types():
    assert parse("") == Config()
    given = parse("--steps 5 --rate=1e-3 --names c d --kind y --long_name")
    assert given == Config(5, 1e-3, ("c", "d"), "y", True)


def test_a_wrong_value_is_one_line_and_exit_2(refused):
    assert "p: --steps must be at least 1, got 0" in refused(lambda _: parse("--steps 0"))


def test_errors_are_one_line_that_a_terminal_does_not_obey(capsys):
    assert cli.fail("p", 2, FileNotFoundError(2, "No such file", "x.jsonl")) == 2
    assert cli.fail("p", 1, ValueError("two\nlines\x1b")) == 1
    assert capsys.readouterr().err == "p: x.jsonl: No such file\np: two lines \n"


def ending(main):
    """The exit status of a program."""
    with pytest.raises(SystemExit) as end:
        cli.run("p", main)
    return end.value.code


ENDS = {130: KeyboardInterrupt(), 2: OSError(28, "full"), 0: BrokenPipeError()}


@pytest.mark.parametrize("status", ENDS)
def test_run_ends_with_the_status(status, monkeypatch, capsys):
    def main():
        raise ENDS[status]

    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    assert ending(main) == status
    assert capsys.readouterr().err.startswith("p: ") == bool(status)


def test_a_terminal_without_unicode_does_not_end_a_program(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    ending(lambda: print("café"))
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
