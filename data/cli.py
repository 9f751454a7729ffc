"""Command line, signals and one-line errors, shared by all programs.

A command line is made from a dataclass, one flag per field. A field is written as
`name: type = default  # help text`. A comment on a line of its own begins a group of the help page.
"""

import argparse
import contextlib
import dataclasses
import inspect
import os
import re
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any, Literal, NoReturn, get_args, get_origin


def parse(argv: list[str] | None, config_class: type, prog: str) -> Any:
    """The command line `argv` (None: the program's own) as a `config_class`.

    config_class: a dataclass of commented fields with a method `check` that raises ValueError.
    prog: the program's name, for help and errors.
    Prints one line and exits with status 2 if the command line is wrong.
    """
    parser = OneLineParser(
        prog, "%(prog)s [--FLAG VALUE ...]", inspect.cleandoc(config_class.__doc__)
    )
    comments = field_comments(config_class)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        group, comment = comments[field.name]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(flag(field.name), **argument(field, comment))
    settings = vars(parser.parse_args(argv))
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = tuple(value)
    try:
        config = config_class(**settings)
        config.check()
    except ValueError as problem:
        parser.error(str(problem))
    return config


def argument(field: dataclasses.Field, comment: str) -> dict[str, Any]:
    """The keyword arguments of argparse for one field: type, choices, default and help."""
    kind = field.type
    help_text = comment.replace("%", "%%")
    if kind is bool:
        return dict(action="store_true", help=help_text)
    options: dict[str, Any] = dict(default=field.default)
    shown_default = field.default
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        options["nargs"] = "+"
        shown_default = " ".join(str(value) for value in field.default)
    if isinstance(kind, types.UnionType):  # `float | None`
        kind = get_args(kind)[0]
    if shown_default not in ("", None):
        help_text += f" [{shown_default}]"
    if get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    else:
        options["type"] = kind
        options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
    return dict(options, help=help_text)


def field_comments(config_class: type) -> dict[str, tuple[str, str]]:
    """{field: (its group, its comment)}, read from the source of a dataclass."""
    source = inspect.getsource(config_class)
    comments = {}
    group = "options"
    pattern = r"^    (?:# ([a-z ]+)|(\w+): .*?  # (.+))$"
    for heading, name, comment in re.findall(pattern, source, re.MULTILINE):
        group = heading or group
        if name:
            comments[name] = (group, comment)
    return comments


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`: how the flag of a field is written."""
    return "--" + name.replace("_", "-")


def require(condition: object, name: str, what: str, config: object) -> None:
    """Raise ValueError unless `condition`. It names the flag, what it must be and what it is."""
    if condition:
        return
    value = getattr(config, name)
    got = "" if value is True or value == "" else f", got {value!r}"
    raise ValueError(f"{flag(name)} must be {what}{got}")


def run(program: str, main: Callable[[], int]) -> NoReturn:
    """Run a program and exit with its status: 130 after Ctrl-C, 0 after a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")  # a character that the terminal lacks is no error
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = fail(program, 130, "interrupted")
    except OSError as problem:  # main() reports its own; this one is of standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0 if isinstance(problem, BrokenPipeError) else fail(program, 2, problem)
    sys.exit(status)


class Interrupted(Exception):
    """The run ends now and keeps what it has: after Ctrl-C or SIGTERM."""


class Stop:
    """In a `with` block the first SIGINT or SIGTERM sets `requested`; a later one ends the
    program.

    Signals within a second count as one, because torchrun passes on the Ctrl-C that its processes
    have already had from the terminal. notice: a line to print at the first signal.
    """

    def __init__(self, notice: str) -> None:
        self.notice = notice
        self.requested = False
        self.since = 0.0

    def __enter__(self) -> "Stop":
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, *_: object) -> None:
        if not self.requested:
            self.requested = True
            self.since = time.monotonic()
            with contextlib.suppress(OSError):  # print() may be interrupted in itself
                os.write(2, f"\n{self.notice}\n".encode())
        elif time.monotonic() > self.since + 1:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted


def fail(program: str, status: int, problem: object) -> int:
    """Print `PROGRAM: what is wrong` to stderr, and return the exit status.

    A closed pipe is no error: it is raised again, and `run` ends quietly.
    """
    if isinstance(problem, BrokenPipeError):
        raise problem
    print(f"{program}: {one_line(problem)}", file=sys.stderr)
    return status


def one_line(problem: object) -> str:
    """An exception or a text on one line, without control characters that a terminal would obey.

    An error of the system is written as FILE: REASON.
    """
    if isinstance(problem, OSError) and problem.filename and problem.strerror:
        problem = f"{problem.filename}: {problem.strerror}"
    return "".join(c if c.isprintable() else " " for c in " ".join(str(problem).split()))


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors on one line and no abbreviations.

    `--batch_size` is understood as `--batch-size`.
    """

    def __init__(self, prog: str, usage: str | None = None, description: str = "") -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, usage, description, formatter_class=form, allow_abbrev=False)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        words = []
        for word in sys.argv[1:] if argv is None else argv:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = flag(name[2:])
            words.append(name + equals + value)
        return super().parse_args(words)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)
