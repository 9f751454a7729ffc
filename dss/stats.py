"""Statistics of a comparison: intervals, and the simplest predictors that a student must beat."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from data.answers import same_label
from data.jsonl import Record

RESAMPLES = 10_000


def paired_interval(differences: list[np.ndarray], seed: int = 0) -> tuple[float, float, float]:
    """The mean difference between two methods with its 95 % bootstrap interval: (mean, low, high).

    differences: one integer array per seed, with -1, 0 or 1 for each question (one method's 1 for
    right and 0 for wrong, minus the other's). The mean is over seeds of the mean over questions.
    A resample draws seeds with replacement and, for each draw, questions with replacement; the
    interval is between the 2.5 and 97.5 percentiles of 10,000 resamples. With few seeds it is
    rough.
    """
    generator = np.random.default_rng(seed)
    number = len(differences)
    times_drawn = generator.multinomial(number, [1 / number] * number, size=RESAMPLES)
    total = np.zeros(RESAMPLES)
    for s, difference in enumerate(differences):
        # To draw questions with replacement is to draw how many are -1, 0 and 1.
        shares = [np.mean(difference == value) for value in (-1, 0, 1)]
        counts = generator.multinomial(times_drawn[:, s] * len(difference), shares)
        total += (counts[:, 2] - counts[:, 0]) / len(difference)
    low, high = np.percentile(total / number, [2.5, 97.5])
    mean = np.mean([difference.mean() for difference in differences])
    return float(mean), float(low), float(high)


def commonest_label(
    train_labels: Sequence[str], asked_rows: Sequence[Record], metric: str
) -> tuple[str, float]:
    """The commonest training label, and the accuracy of answering every asked row with it."""
    label, _ = Counter(train_labels).most_common(1)[0]
    right = [same_label(label, row.label, metric, row.input) for row in asked_rows]
    return label, sum(right) / len(right)
