"""The statistics against plain formulas."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from running import ROOT, write_rows

from data.jsonl import Record
from dss import stats
from dss.config import TrainConfig
from dss.rows import load_rows
from dss.stats import bag_of_words, commonest_label, features, paired_interval


def test_the_interval_is_that_of_a_bootstrap_over_seeds_and_questions():
    """Against a plain bootstrap that draws every question."""
    rng = np.random.default_rng(1)
    differences = [rng.choice([-1, 0, 1], size=60, p=[0.1, 0.6, 0.3]) for _ in range(4)]
    mean, low, high = paired_interval(differences)
    means = []
    for _ in range(4000):
        drawn = [differences[s] for s in rng.integers(4, size=4)]
        means.append(np.mean([d[rng.integers(60, size=60)].mean() for d in drawn]))
    assert np.allclose([low, high], np.percentile(means, [2.5, 97.5]), atol=0.015)
    assert mean == pytest.approx(np.mean(differences))
    assert paired_interval([np.ones(5, dtype=int)]) == (1.0, 1.0, 1.0)


def test_the_commonest_label_counts_as_right_by_the_metric():
    train_labels = ["b", "a", "b"]
    rows = [
        Record("1", "Which?\n(a) car\n(b) park", "park"),
        Record("2", "Which?\n(a) x\n(b) y", "x"),
    ]
    assert commonest_label(train_labels, rows, "choice") == ("b", 0.5)
    assert commonest_label(train_labels, rows, "text") == ("b", 0.0)


def test_the_features_of_a_pair_say_which_words_are_new():
    found = features("A man sleeps.</s>A man is awake.")
    assert {"man", "a man", "< a", "awake >", "new: awake", "new words: 2"} <= found
    assert "new: man" not in found and "sleeps" not in found and "share of new words: 0.5" in found
    assert features("Two boys") == {"two", "boys", "< two", "two boys", "boys >"}


def test_the_fit_minimises_its_loss():
    """At the minimum the gradient is 0."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (200,), generator=generator)
    bags = stats.Bags(ids, torch.arange(0, 200, 4), torch.arange(50) % 3)
    weight = stats.fit(bags, 20, 3, 1e-2).requires_grad_()
    loss = torch.nn.functional.cross_entropy(bags.logits(weight), bags.labels)
    (loss + 1e-2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4


def test_a_bag_of_words_on_esnli_has_the_known_accuracies(official, tmp_path):
    command = [sys.executable, "-m", "data.official", official, "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    data = (str(tmp_path / "esnli_valid.jsonl"),)
    test_data = str(tmp_path / "esnli_test.jsonl")
    for share, rows, expected in [(0.25, 2214, 0.627), (1.0, 8858, 0.674)]:
        found = load_rows(TrainConfig(data=data, test_data=test_data, subsample=share))
        assert len(found.train) == rows
        accuracy = bag_of_words(found.train, found.validation, found.test, found.labels)
        assert abs(accuracy - expected) < 0.01


def test_the_command_prints_both_predictors(tmp_path, capsys, refused):
    rows = [
        Record(f"{i}", f"It is {'hot' if i % 3 else 'cold'} {i}", "ab"[i % 3 > 0])
        for i in range(60)
    ]
    _, train_file, _, test_file = write_rows(tmp_path, rows, 40)
    assert stats.main([train_file, test_file]) == 0
    shown = capsys.readouterr().out
    assert "always answering 'b': 70.0%" in shown and "bag of words: 100.0%" in shown
    assert "none.jsonl" in refused(stats.main, tmp_path / "none.jsonl", test_file)


def test_macro_f1_weighs_labels_alike():
    gold = ["a", "a", "a", "b"]
    assert stats.macro_f1(["a", "a", "b", "b"], gold) == pytest.approx((0.8 + 2 / 3) / 2)
    assert stats.macro_f1(["c"] * 4, gold) == 0


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
