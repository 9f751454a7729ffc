"""The command line of train.py is its TrainConfig."""

import dataclasses

import pytest

from data.cli import field_comments, flag
from dss.config import TrainConfig, parse_args


def test_help_names_every_flag_with_its_comment_and_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(["--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    comments = field_comments(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        _, comment = comments[field.name]
        assert flag(field.name) in shown and comment in shown
    assert "for methods with two tasks [1.0]" in shown and "[standard dss]" in shown


def test_flags_become_values_with_dash_and_underscore():
    parsed = parse_args("--batch_size 7 --eval-data x --method a b --shard --lam=0.5".split())
    given = dict(batch_size=7, eval_data="x", method=("a", "b"), shard=True, lam=0.5)
    assert parsed == dataclasses.replace(TrainConfig(), **given)


def test_the_learning_rate_left_out_depends_on_the_start():
    """Random weights get scaled rates, and pretrained ones the paper's."""
    assert parse_args([]).scales_rates and parse_args([]).learning_rate == 0.03
    plain = parse_args(["--optimizer", "adamw"])
    assert not plain.scales_rates and plain.learning_rate == 1e-3
    pretrained = parse_args(["--weights", "x"])
    assert not pretrained.scales_rates and pretrained.learning_rate == 5e-5
    assert parse_args(["--weights", "x", "--optimizer", "adamw-scaled"]).scales_rates
    assert parse_args(["--weights", "x", "--lr", "1e-4"]).learning_rate == 1e-4
