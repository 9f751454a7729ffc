"""A command line made from a dataclass: a flag a field, its default and its comment from the declaration.

train.py and extract.py are both made so. A field reads `name: type = default  # help text`; a comment on a line of its
own begins a group of the help page.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
import types
from typing import Literal, get_args, get_origin


def parse(argv, config, separator="_", presets=None, prog=None):
    """The command line `argv` as a `config` (a dataclass of commented fields, with a method `check` that raises
    ValueError). Exits 2 with one line if it is wrong. `separator` joins the words of a flag. presets: {name: {field:
    default}}, the defaults that a flag --preset NAME puts in place of the class's own."""
    comments, groups = field_comments(config), field_groups(config)
    description = inspect.cleandoc(config.__doc__)
    parser = OneLineParser(
        prog=prog,
        description=description,
        usage="%(prog)s [--FLAG VALUE ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter if "\n" in description else argparse.HelpFormatter,
    )
    sections = {name: parser.add_argument_group(name) for name in dict.fromkeys(groups.values())}
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", separator)
        sections[groups[field.name]].add_argument(flag, **argument(field, comments[field.name]))
    values = parser.parse_args(argv)
    if presets and values.preset:
        parser.set_defaults(**presets[values.preset])
        values = parser.parse_args(argv)
    try:
        result = config(**vars(values))
        result.check()
    except ValueError as problem:
        parser.error(str(problem))
    return result


def argument(field, comment):
    """The keyword arguments of argparse for one field: type, choices, default and help from its declaration."""
    kind, default, many = field.type, field.default, get_origin(field.type) is list
    if many:
        (kind,), default = get_args(kind), list(default)
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
        few = len(choices) < 8  # argparse prints them all in place of the value, twice for a flag that takes several
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


def require(condition, name, what, config, separator="_"):
    """Raise ValueError, naming the flag of a config's field, what it must be and what it is, unless `condition`."""
    if not condition:
        raise ValueError(f"--{name.replace('_', separator)} must be {what}, got {getattr(config, name)!r}")


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
    """Let a terminal that cannot show a character show a question mark, not end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors on one line and the nearest flag named for an unknown one. Every program of ours begins
    with it, so it also makes the terminal one that can print anything."""

    def parse_args(self, *args, **kwargs):
        print_anything()
        return super().parse_args(*args, **kwargs)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            flag = unknown[1]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            message = f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "")
        print(f"{self.prog}: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)
