"""A command line made from a dataclass: a flag a field, its default and its comment from the declaration.

train.py and extract.py are both made so. A field reads `name: type = default  # help text`; a comment on a line of its
own begins a group of the help page.
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
import types
from typing import Literal, get_args, get_origin


def parse(argv, config, presets=None, prog=None):
    """The command line `argv` as a `config` (a dataclass of commented fields, with a method `check` that raises
    ValueError). Exits 2 with one line if it is wrong. presets: {name: {field: default}}, the defaults that a flag
    --preset NAME puts in place of the class's own."""
    comments, groups = field_comments(config), field_groups(config)
    description = inspect.cleandoc(config.__doc__)
    parser = OneLineParser(
        prog=prog,
        description=description,
        usage="%(prog)s [--FLAG VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter if "\n" in description else argparse.HelpFormatter,
    )
    sections = {name: parser.add_argument_group(name) for name in dict.fromkeys(groups.values())}
    for field in dataclasses.fields(config):
        sections[groups[field.name]].add_argument(flag(field.name), **argument(field, comments[field.name]))
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
    kind, default, many = field.type, field.default, get_origin(field.type) is tuple
    if many:
        kind, _ = get_args(kind)
    if isinstance(kind, types.UnionType):
        kind = get_args(kind)[0]
    comment = comment.replace("%", "%%")
    if kind is bool:
        return dict(action="store_true", help=comment)
    shown = " ".join(map(str, default)) if many else default
    options = dict(default=default, help=comment + (f" [{shown}]" if shown not in ("", None) else ""))
    if many:
        options["nargs"] = "+"
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        few = len(" ".join(choices)) < 40  # argparse prints them in place of the value, twice if it takes several
        options["help"] += "" if few else "; " + " ".join(filter(None, choices))
        return dict(options, choices=choices, metavar=None if few else "NAME")
    return dict(options, type=kind, metavar={int: "N", float: "X", str: "NAME"}[kind])


def field_comments(config):
    """{field: the comment behind its declaration}, read from the class's own source."""
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", source(config), re.MULTILINE))


def field_groups(config):
    """{field: the lower-case comment line above it or above its neighbours}, read from the class's own source."""
    groups, group = {}, "options"
    for heading, name in re.findall(r"^    (?:# ([a-z ]+)$|(\w+): )", source(config), re.MULTILINE):
        group = heading or group
        if name:
            groups[name] = group
    return groups


def source(config):
    """The source of a dataclass behind that of the one it builds on, if any."""
    return "\n".join(inspect.getsource(c) for c in reversed(config.__mro__[:-1]))


def flag(name):
    """`batch_size` -> `--batch-size`: how the flag of a field is written. With `_` it is understood, too."""
    return "--" + name.replace("_", "-")


def require(condition, name, what, config):
    """Raise ValueError, naming the flag of a config's field, what it must be and what it is, unless `condition`."""
    if not condition:
        raise ValueError(f"{flag(name)} must be {what}, got {getattr(config, name)!r}")


def run(program, main):
    """Run a program's main() and exit with its status: 130 after Ctrl-C, 0 where the reader (`head`, say) has left."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as programs with slow imports set it until those are done
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = fail(program, 130, "interrupted")
    except OSError as problem:  # of standard output; what else fails is told by main()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0 if isinstance(problem, BrokenPipeError) else fail(program, 2, f"standard output: {problem.strerror}")
    sys.exit(status)


def fail(program, status, problem):
    """Print one line, `PROGRAM: what is wrong`, to stderr; returns the exit status for main() to return."""
    print(f"{program}: {one_line(problem)}", file=sys.stderr)
    return status


def one_line(problem):
    """What an exception says, or a text, on one line; an error of the system as FILE: REASON."""
    if isinstance(problem, OSError) and problem.filename and problem.strerror:
        return f"{problem.filename}: {problem.strerror}"
    return " ".join(str(problem).splitlines())


def print_anything():
    """Let a terminal that cannot show a character, or shows nothing any more, not end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.stderr = Display(sys.stderr)


class Display:
    """A stream of messages. That nobody can read them, on a full disk or a closed terminal, is no reason to stop."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


class OneLineParser(argparse.ArgumentParser):
    """argparse for every program: errors on one line, the nearest flag named for an unknown one, no abbreviations,
    `--batch-size` understood as `--batch-size`. It also makes the terminal one that can print anything."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, argv=None):
        print_anything()
        words = sys.argv[1:] if argv is None else argv
        return super().parse_args([re.sub("^--[^=]+", lambda name: flag(name[0][2:]), word) for word in words])

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"unknown flag {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")
        print(f"{self.prog}: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)
