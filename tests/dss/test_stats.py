"""The statistics against plain formulas."""

import numpy as np
import pytest
from running import write_rows

from data.jsonl import Record, write_jsonl
from data.official import FORMATS, import_split
from dss import stats
from dss.config import TrainConfig
from dss.rows import Rows, load_rows
from dss.stats import features, paired_interval


def test_the_interval_is_that_of_a_bootstrap_over_seeds_and_questions():
    """Against a plain bootstrap that draws every question."""
    rng = np.random.default_rng(1)
    differences = [rng.choice([-1, 0, 1], size=60, p=[0.1, 0.6, 0.3]) for _ in range(4)]
    mean, low, high = paired_interval(differences)
    seeds = rng.integers(4, size=(4000, 4, 1))
    questions = rng.integers(60, size=(4000, 4, 60))
    means = np.array(differences)[seeds, questions].mean((1, 2))
    assert np.allclose([low, high], np.percentile(means, [2.5, 97.5]), atol=0.015)
    assert mean == pytest.approx(np.mean(differences))
    assert paired_interval([np.ones(5, dtype=int)]) == (1.0, 1.0, 1.0)


def rows_of(train, asked, metric):
    labelled = [Record(f"{i}", "x", label) for i, label in enumerate(train)]
    return Rows("", labelled, [], asked, metric, [], 0, False)


def test_the_commonest_label_counts_as_right_by_the_metric():
    asked = [
        Record("1", "Which?\n(a) car\n(b) park", "park"),
        Record("2", "Which?\n(a) x\n(b) y", "x"),
    ]
    assert stats.commonest_label(rows_of("bab", asked, "choice")) == ("b", 0.5)
    assert stats.commonest_label(rows_of("bab", asked, "text")) == ("b", 0.0)


def test_the_features_of_a_pair_say_which_words_are_new():
    found = set(features("A man sleeps.</s>A man is awake."))
    assert {"man", "a man", "< a", "awake >", "new: awake", "new words: 2"} <= found
    assert "new: man" not in found and "sleeps" not in found and "share of new words: 0.5" in found
    assert features("Two boys") == ["< two", "boys", "boys >", "two", "two boys"]  # in one order


def test_a_bag_of_words_on_a_tenth_of_esnli_has_the_known_accuracy(official, tmp_path):
    for split in ("valid", "test"):
        rows = import_split(official / "esnli" / f"esnli_{split}.json", [], FORMATS["esnli"])
        write_jsonl(tmp_path / split, rows)
    files = dict(data=(str(tmp_path / "valid"),), test_data=str(tmp_path / "test"))
    rows = load_rows(TrainConfig(**files, subsample=0.1, method=("standard",)))
    assert len(rows.train) == 886
    assert stats.bag_of_words(rows) == pytest.approx(0.582, abs=0.01)


def test_the_command_prints_both_predictors(tmp_path, capsys, refused):
    rows = []
    for i in range(60):
        rows.append(Record(f"{i}", f"It is {('cold', 'hot', 'hot')[i % 3]} {i}", "abb"[i % 3]))
    _, train_file, _, test_file = write_rows(tmp_path, rows, 40)
    assert stats.main([train_file, test_file]) == 0
    shown = capsys.readouterr().out
    assert "always answering 'b': 70.0%" in shown and "bag of words: 100.0%" in shown
    assert "none.jsonl" in refused(stats.main, tmp_path / "none.jsonl", test_file)


@pytest.mark.parametrize("label, answer", [("10 km²", "10 km2"), ("ﬁx", "fix"), ("a\u0301", "á")])
def test_macro_f1_weighs_labels_alike_in_their_written_form(label, answer):
    gold = ["a", "a", label, "b"]
    figures = stats.reliability(["a", "a", "b", answer], gold, [True] * 4, None)
    assert figures == {"macro_f1": pytest.approx((1 + 0 + 0) / 3)}
    assert stats.reliability([answer], [label], [True], [0.5])["macro_f1"] == 1


def test_calibration_error_is_the_mean_gap_of_the_bins():
    confidence = np.array([0.95, 0.91, 0.35, 0.31, 1.0])
    correct = np.array([1, 0, 0, 1, 1])
    high = 3 * abs((0.95 + 0.91 + 1.0) / 3 - 2 / 3)
    low = 2 * abs(0.33 - 0.5)
    assert stats.calibration_error(confidence, correct) == pytest.approx((high + low) / 5)


def test_coverage_takes_the_most_confident_answers():
    confidence = np.array([0.2, 0.9, 0.8, 0.1])
    correct = np.array([0, 1, 0, 1])
    found = [stats.accuracy_at(share, confidence, correct) for share in (0.25, 0.5, 1.0)]
    assert found == [1.0, 0.5, 0.5]


def test_a_line_separator_in_a_question_is_no_end_of_its_line(tmp_path):
    write_jsonl(tmp_path / "predictions.jsonl", [dict(input="a\u2028b\x85", correct=True)])
    assert stats.read_correct(tmp_path).tolist() == [1]
