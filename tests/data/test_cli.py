"""The command line of a dataclass, and how programs end."""

import contextlib
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
    preset: str = ""  # named defaults

    def check(self):
        cli.require(self.steps > 0, "steps", "at least 1", self)


def parse(line, **options):
    return cli.parse(line.split(), Config, prog="p", **options)


def test_flags_are_the_fields_with_their_types_and_presets_are_other_defaults():
    assert parse("") == Config()
    given = parse("--steps 5 --rate 1e-3 --names c d --kind y --long_name")
    assert given == Config(5, 1e-3, ("c", "d"), "y", True)
    presets = {"many": {"steps": 9, "kind": "y"}}
    assert parse("--preset many --kind x", presets=presets) == Config(9, preset="many")


@pytest.mark.parametrize(
    "line, words",
    [
        ("--stepz 3", "p: unknown flag --stepz; did you mean --steps?"),
        ("--long_nam", "did you mean --long-name?"),
        ("--step 3", "unknown flag --step"),
        ("--steps 0", "p: --steps must be at least 1, got 0"),
        ("--kind z", "--kind: invalid choice: 'z'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(refused, line, words):
    assert words in refused(lambda argv: parse(" ".join(argv)), *line.split())


def test_errors_are_one_line(tmp_path, capsys):
    with pytest.raises(OSError) as error:
        open(tmp_path / "x.jsonl")
    assert cli.fail("p", 2, error.value) == 2
    assert capsys.readouterr().err == f"p: {tmp_path / 'x.jsonl'}: No such file or directory\n"
    assert cli.fail("p", 1, ValueError("two\nlines")) == 1
    assert capsys.readouterr().err == "p: two lines\n"


def raising(problem):
    def main():
        raise problem

    return main


@pytest.mark.parametrize("problem, status", [(KeyboardInterrupt(), 130), (OSError(28, "full"), 2)])
def test_run_ends_with_the_status(problem, status, monkeypatch, capsys):
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    with pytest.raises(SystemExit) as end:
        cli.run("p", raising(problem))
    assert end.value.code == status and capsys.readouterr().err.startswith("p: ")


def test_a_terminal_without_unicode_does_not_end_a_program(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        cli.run("p", lambda: print("café"))
    assert stream.buffer.getvalue() == b"caf?\n"


def test_the_first_signal_asks_and_a_later_one_ends(monkeypatch, capfd):
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


@pytest.mark.parametrize("handler, heard", [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_asks_to_stop_unless_nohup_has_it_ignored(handler, heard):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested == heard
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_full_log_costs_the_display_and_not_the_run(monkeypatch):
    def main():
        for _ in range(3):
            print("x" * 10_000, file=sys.stderr, flush=True)
        return 0

    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w", buffering=1))
    with pytest.raises(SystemExit) as end:
        cli.run("program", main)
    assert end.value.code == 0
    with contextlib.suppress(OSError):  # of what could not be written
        sys.stderr.close()
