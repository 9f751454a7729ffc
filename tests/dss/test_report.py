"""The report claims no more than it knows."""

import json

import pytest
from running import QUICK, few_rows, result, run

from data.files import write_json
from dss.report import reason_to_doubt


def test_the_report_shows_three_answers_and_what_to_run_next(tmp_path, capsys):
    files = few_rows(tmp_path)
    one_step = f"{files} {QUICK} --steps 1 --out {tmp_path}/out"
    assert run(one_step, "--method standard") == 0
    shown = capsys.readouterr().out
    assert "14 training rows, 14 with a rationale; 2 validation, 4 test" in shown
    assert "weights, gradients and optimiser state take" in shown
    assert shown.count("  question   ") == 3 and "(nothing)   (label: 16 + 1)" in shown
    finished = result(tmp_path / "out", "standard")
    finished["samples"][0]["input"] = "字" * 500
    write_json(tmp_path / "out" / "standard" / "result.json", finished)
    assert run(one_step, "--method standard dss --resume") == 0
    shown = capsys.readouterr().out
    assert "dss - standard:" in shown and "as the dss student answers them" in shown
    assert run(one_step, "--method standard --resume") == 0
    assert "字" * 96 + " ...\n" in capsys.readouterr().out, "a text without spaces is cut, too"


@pytest.mark.parametrize(
    "losses, commonest, bag, reason",
    [
        ([2.0, 1.0], 0.5, 0.5, "its loss was falling fast"),
        ([0.038, 0.030], 0.5, None, ""),  # fast for its size, but at its end
        ([2.0, 1.0], 0.9, None, "no better than the commonest label"),
        ([1.0, 1.0], 0.5, 0.95, "less accurate than a bag of words"),
    ],
)
def test_a_run_is_doubted_that_was_too_short_or_no_better_than_what_is_simple(
    tmp_path, losses, commonest, bag, reason
):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"label_loss": loss}) + "\n" for loss in losses))
    figures = dict(validation_accuracy=0.9, test_accuracy=None, best_step=9, steps=9)
    figures |= dict(commonest_label=commonest, bag_of_words=bag)
    said = reason_to_doubt(figures, metrics)
    assert reason in said and bool(said) == bool(reason)
    assert "commonest" not in reason_to_doubt(figures | {"token_f1": 0.3}, metrics), "free text"
