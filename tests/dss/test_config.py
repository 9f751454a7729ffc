"""The command line is the TrainConfig, each flag with its comment, and a wrong one is a single line."""

import dataclasses

import pytest

from data.cli import fail, field_comments, flag
from dss.config import TrainConfig, parse_args


def test_every_field_has_a_comment_and_every_default_is_what_the_command_line_gives():
    comments = field_comments(TrainConfig)
    fields = dataclasses.fields(TrainConfig)
    assert [f.name for f in fields] == list(comments)
    parsed = parse_args([])
    for field in fields:
        assert getattr(parsed, field.name) == field.default


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in dataclasses.fields(TrainConfig):
        assert flag(field.name) in text
    assert "L = L_label + lambda * L_rationale, for the dss methods [1.0]" in text and "[standard dss]" in text


def test_the_learning_rate_left_out_depends_on_the_start():
    assert parse_args([]).learning_rate == 0.02
    assert parse_args(["--weights", "x"]).learning_rate == 5e-5
    assert parse_args(["--weights", "x", "--lr", "1e-4"]).learning_rate == 1e-4


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--stepz 3", "unknown flag --stepz; did you mean --steps?"),
        ("--step 3", "unknown flag --step"),
        ("stray", "unrecognized arguments: stray"),
        ("--steps", "--steps: expected one argument"),
        ("--steps x", "--steps: invalid int value: 'x'"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--subsample 0", "--subsample must be more than 0 and at most 1, got 0.0"),
        ("--lam -1", "--lam must be at least 0"),
        ("--method finetune", "--method: invalid choice: 'finetune'"),
        ("--method dss dss", "--method must be named once each"),
        ("--size huge", "--size: invalid choice: 'huge'"),
        ("--resume --overwrite", "--resume must be left out beside --overwrite"),
        ("--lr inf", "--lr must be a finite number, got inf"),
        ("--weight_decay inf", "--weight-decay must be a finite number, got inf"),
        ("--clip inf", "--clip must be a finite number, got inf"),
        ("--clip nan", "--clip must be at least 0, got nan"),
        ("--seed 9223372036854775808", "--seed must be below 2**63"),
        ("--threads 100000", "--threads must be at most"),
        ("--dropout 1", "--dropout must be at least 0 and less than 1, got 1.0"),
        ("--max_input_length 1", "--max-input-length must be at least 2, got 1"),
        ("--max_new_tokens 2147483647", "--max-new-tokens must be at most 1,048,576"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(refused, arguments, words):
    assert words in refused(parse_args, *arguments.split())


def test_an_error_of_the_system_is_told_as_file_and_reason(tmp_path, capsys):
    """It used to be Python's "[Errno 2] No such file or directory: 'x.jsonl'"."""
    with pytest.raises(OSError) as error:
        open(tmp_path / "x.jsonl")
    assert fail("program", 2, error.value) == 2
    assert capsys.readouterr().err == f"program: {tmp_path / 'x.jsonl'}: No such file or directory\n"
    with pytest.raises(BrokenPipeError):  # a reader who has left is no fault: `data.report FILE | head` exits with 0
        fail("program", 2, BrokenPipeError())
    assert fail("program", 1, ValueError("two\nlines")) == 1
    assert capsys.readouterr().err == "program: two lines\n"
