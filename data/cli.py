"""How every program of ours begins and ends: its command line, interruption, one line on what is wrong.

A command line is made from a dataclass, one flag per field. A field reads `name: type = default  # help text`; a
comment on a line of its own begins a group of the help page.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import signal
import sys
import time
import types
from typing import Literal, get_args, get_origin


def parse(argv, config, presets=None, prog=None):
    """The command line `argv` as a `config` (a dataclass of commented fields, with a method `check` that raises
    ValueError). Exits 2 with one line if it is wrong. presets: {name: {field: default}}, the defaults that a flag
    --preset NAME puts in place of the class's own."""
    parser = OneLineParser(prog=prog, description=inspect.cleandoc(config.__doc__), usage="%(prog)s [--FLAG VALUE ...]")
    groups, comments = {}, field_comments(config)
    for field in dataclasses.fields(config):
        group, comment = comments[field.name]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        groups[group].add_argument(flag(field.name), **argument(field, comment))
    values = parser.parse_args(argv)
    if presets and values.preset:
        parser.set_defaults(**presets[values.preset])
        values = parser.parse_args(argv)
    try:
        result = config(**{name: tuple(v) if isinstance(v, list) else v for name, v in vars(values).items()})
        result.check()
    except ValueError as problem:
        parser.error(str(problem))
    return result


def argument(field, comment):
    """The keyword arguments of argparse for one field: type, choices, default and help from its declaration."""
    kind, default, nargs, text = field.type, field.default, None, comment.replace("%", "%%")
    if get_origin(kind) is tuple:
        (kind, _), nargs = get_args(kind), "+"
    if isinstance(kind, types.UnionType):
        kind, _ = get_args(kind)
    if kind is bool:
        return dict(action="store_true", help=text)
    shown = " ".join(map(str, default)) if nargs else default
    text += f" [{shown}]" if shown not in ("", None) else ""
    if get_origin(kind) is not Literal:
        name = {int: "N", float: "X", str: "NAME"}[kind]
        return dict(type=kind, default=default, nargs=nargs, metavar=name, help=text)
    choices, name = get_args(kind), None
    if len(" ".join(choices)) > 40:  # argparse prints them in place of the value, twice if it takes several
        name, text = "NAME", f"{text}; {' '.join(filter(None, choices))}"
    return dict(choices=choices, default=default, nargs=nargs, metavar=name, help=text)


def field_comments(config):
    """{field: (the heading of its group, its comment)}, read from the source of a dataclass and what it builds on."""
    source = "\n".join(inspect.getsource(c) for c in reversed(config.__mro__[:-1]))
    comments, group = {}, "options"
    for heading, name, comment in re.findall(r"^    (?:# ([a-z ]+)|(\w+): .*?  # (.+))$", source, re.MULTILINE):
        group = heading or group
        if name:
            comments[name] = group, comment
    return comments


def flag(name):
    """`batch_size` -> `--batch-size`: how the flag of a field is written. With `_` it is understood, too."""
    return "--" + name.replace("_", "-")


def require(condition, name, what, config):
    """Raise ValueError, naming the flag of a config's field, what it must be and what it is, unless `condition`."""
    if not condition:
        value = getattr(config, name)
        raise ValueError(f"{flag(name)} must be {what}" + ("" if value is True or value == "" else f", got {value!r}"))


def run(program, main):
    """Run a program's main() and exit with its status: 130 after Ctrl-C, 0 where the reader (`head`, say) has left."""
    guard_streams()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as programs with slow imports set it until those are done
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = fail(program, 130, "interrupted")
    except OSError as problem:  # of standard output: other errors are main()'s to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = problem if problem.filename else f"standard output: {problem.strerror}"
        status = 0 if isinstance(problem, BrokenPipeError) else fail(program, 2, what)
    sys.exit(status)


class Interrupted(Exception):
    """End now and keep what is there: after Ctrl-C, SIGTERM or, in extract.py, an abort."""


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


def fail(program, status, problem):
    """Print one line, `PROGRAM: what is wrong`, to stderr; returns the exit status for main() to return. A closed pipe
    (`| head`) is not an error: it is raised again, and `run` ends quietly."""
    if isinstance(problem, BrokenPipeError):
        raise problem
    print(f"{program}: {one_line(problem)}", file=sys.stderr)
    return status


def one_line(problem):
    """What an exception says, or a text, on one line; an error of the system as FILE: REASON."""
    if isinstance(problem, OSError) and problem.filename and problem.strerror:
        return f"{problem.filename}: {problem.strerror}"
    return " ".join(str(problem).splitlines())


def guard_streams():
    """Let no program fail because it cannot show a character, or a message on a terminal that is gone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None where whoever started us has closed it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)
    sys.stderr.write, sys.stderr.flush = map(Suppressed(OSError), (sys.stderr.write, sys.stderr.flush))


class Suppressed(contextlib.suppress, contextlib.ContextDecorator):
    """contextlib.suppress for a whole function, which does nothing where it fails (a full disk, a closed terminal)."""


class OneLineParser(argparse.ArgumentParser):
    """argparse for every program: errors on one line, the nearest flag named for an unknown one, no abbreviations,
    `--batch_size` understood as `--batch-size`."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(allow_abbrev=False, formatter_class=formatter_class, **options)

    def parse_args(self, argv=None):
        words = sys.argv[1:] if argv is None else argv
        return super().parse_args([re.sub("^--[^=]+", lambda name: flag(name[0][2:]), word) for word in words])

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"unknown flag {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")
        print(f"{self.prog}: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)
