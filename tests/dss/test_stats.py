"""The statistics against plain formulas."""

import numpy as np
import pytest

from data.jsonl import Record
from dss.stats import commonest_label, paired_interval


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
