"""Statistics of a comparison: intervals, and the simple predictors that a student must beat.

    python -m dss.stats TRAIN TEST   the accuracies of the commonest label and of a bag of words

The bag of words is multinomial logistic regression. A student that is less accurate has not learned
enough for a comparison of methods to mean anything.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import cli
from data.answers import merge_labels, same_label, written
from data.jsonl import Record, read_lines
from dss.config import TrainConfig
from dss.rows import Rows, load_rows

RESAMPLES = 10_000
COVERAGES = (0.5, 0.8, 0.9)  # shares of the questions, of which the most confident answers count
STRENGTHS = (2e-4, 5e-4, 1e-3)  # of the sum of squared weights in the bag of words' loss
MOST_BAG_ROWS = 50_000  # with more training rows a bag of words would take minutes

TITLES = {"macro_f1": "macro-F1", "calibration_error": "ECE"}  # of what `reliability` returns
for share in COVERAGES:
    TITLES[f"accuracy_at_{share}"] = f"at {share:.0%} coverage"


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


def read_correct(directory: Path) -> np.ndarray:
    """(n,) of 0 or 1: whether each prediction in OUT/METHOD/predictions.jsonl is right."""
    path = directory / "predictions.jsonl"
    with open(path, "rb") as file:
        right = [json.loads(line)["correct"] for _, _, line in read_lines(file, str(path))]
    return np.array(right, dtype=int)


# ---- How far the answers of one student can be trusted -------------------------------------------


def reliability(
    answers: list[str], gold: list[str], right: list[bool], confidence: list[float] | None
) -> dict[str, float]:
    """Macro-F1 of labels of a closed set; and with a confidence, which is the probability of each
    answer among the labels, the calibration error and the accuracies at COVERAGES.

    The keys of the result are those of TITLES.
    """
    answers = [written(text) for text in answers]
    figures = {"macro_f1": macro_f1(answers, [written(text) for text in gold])}
    if confidence:
        confidences = np.array(confidence)
        correct = np.array(right, dtype=float)
        figures["calibration_error"] = calibration_error(confidences, correct)
        for coverage in COVERAGES:
            figures[f"accuracy_at_{coverage}"] = accuracy_at(coverage, confidences, correct)
    return figures


def macro_f1(predicted: list[str], gold: list[str]) -> float:
    """The mean, over the gold labels, of each label's F1."""
    scores = []
    for label in sorted(set(gold)):
        hits = sum(a == b == label for a, b in zip(predicted, gold))
        scores.append(2 * hits / (predicted.count(label) + gold.count(label)))
    return float(np.mean(scores))


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The expected calibration error: the mean distance between confidence and accuracy.

    confidence: (n,) from 0 to 1; correct: (n,) of 0 or 1. Ten bins of equal width (Guo et al. 2017,
    arXiv 1706.04599).
    """
    bins = np.minimum((10 * confidence).astype(int), 9)
    gaps = [abs(np.sum((confidence - correct)[bins == number])) for number in range(10)]
    return float(sum(gaps) / len(correct))


def accuracy_at(coverage: float, confidence: np.ndarray, correct: np.ndarray) -> float:
    """The accuracy on that share of the questions whose answers have the highest confidence."""
    most_confident = np.argsort(-confidence, kind="stable")
    kept = most_confident[: max(1, round(coverage * len(correct)))]
    return float(correct[kept].mean())


# ---- Simple predictors ---------------------------------------------------------------------------


def measure_baselines(rows: Rows) -> dict[str, float | None]:
    """The accuracies of simple predictors on the rows that students are compared on; None for a bag
    of words where labels are no closed set."""
    bag = None
    if rows.labels and len(rows.train) <= MOST_BAG_ROWS:
        bag = bag_of_words(rows)
    return {"commonest_label": commonest_label(rows)[1], "bag_of_words": bag}


def commonest_label(rows: Rows) -> tuple[str, float]:
    """The commonest training label, and the accuracy of answering every asked row with it."""
    labels = [row.label for row in rows.train]
    spelling = merge_labels(labels, rows.metric)
    label, _ = Counter(spelling[label] for label in labels).most_common(1)[0]
    right = [same_label(label, row.label, rows.metric, row.input) for row in rows.asked]
    return label, sum(right) / len(right)


def features(text: str) -> list[str]:
    """The features of a text: words and pairs of neighbours; if `</s>` divides it into parts, those
    of its last part, the words there that no other part has, their number and their share.

    Sorted: a set's order differs from process to process, and sums of floats with it.
    """
    *others, last = text.lower().split("</s>")
    words = re.findall(r"\w+", last)
    framed = ["<", *words, ">"]
    names = set(words)
    names.update(f"{a} {b}" for a, b in pairwise(framed))
    if others:
        known = set(re.findall(r"\w+", " ".join(others)))
        new = [word for word in words if word not in known]
        names.update(f"new: {word}" for word in new)
        names.add(f"new words: {len(new)}")
        names.add(f"share of new words: {len(new) / max(len(words), 1):.1f}")
    return sorted(names)


@dataclass(frozen=True)
class Bags:
    """Rows as numbers of features, one after another in a stream."""

    ids: Tensor  # (features of all rows,) int64
    offsets: Tensor  # (rows,) int64: where the features of a row begin
    labels: Tensor  # (rows,) int64; -1: a label that no training row has

    def logits(self, weight: Tensor) -> Tensor:
        """weight: (F, K) of F features and K labels -> (rows, K)."""
        return F.embedding_bag(self.ids, weight, self.offsets, mode="sum")

    def accuracy(self, weight: Tensor) -> float:
        return (self.logits(weight).argmax(1) == self.labels).double().mean().item()


def bag_of_words(rows: Rows) -> float:
    """The accuracy, on the asked rows, of multinomial logistic regression on `features`.

    The strength of its regularisation is the best of STRENGTHS on validation rows.
    """
    numbers: dict[str, int] = {}
    for row in rows.train:
        for name in features(row.input):
            numbers.setdefault(name, len(numbers))
    classes = {written(label): number for number, label in enumerate(rows.labels)}

    def encode(records: list[Record]) -> Bags:
        ids: list[int] = []
        offsets = []
        for record in records:
            offsets.append(len(ids))
            ids += [numbers[name] for name in features(record.input) if name in numbers]
        known = [classes.get(written(record.label), -1) for record in records]
        return Bags(torch.tensor(ids), torch.tensor(offsets), torch.tensor(known))

    bags = encode(rows.train)
    fits = [fit(bags, len(numbers), len(classes), strength) for strength in STRENGTHS]
    best = max(fits, key=encode(rows.validation).accuracy)
    return encode(rows.asked).accuracy(best)


def fit(bags: Bags, number_of_features: int, number_of_labels: int, strength: float) -> Tensor:
    """The (F, K) weights that minimise mean cross-entropy + strength * sum of squared weights."""
    weight = torch.zeros(number_of_features, number_of_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(bags.logits(weight), bags.labels, ignore_index=-1)
        loss = loss + strength * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the arguments or files are wrong."""
    parser = cli.OneLineParser(prog="dss.stats", description="Accuracies of two simple predictors.")
    parser.add_argument("train", help="JSONL rows with labels; a tenth is cut for validation")
    parser.add_argument("test", help="JSONL rows with labels")
    files = parser.parse_args(argv)
    try:
        rows = load_rows(TrainConfig(data=(files.train,), test_data=files.test, method=()))
    except (OSError, ValueError) as problem:
        return cli.fail("dss.stats", 2, problem)
    label, accuracy = commonest_label(rows)
    print(f"always answering {label!r}: {accuracy:.1%}")
    bag = measure_baselines(rows)["bag_of_words"]
    print("bag of words: none" if bag is None else f"bag of words: {bag:.1%}")
    return 0


if __name__ == "__main__":
    cli.run("dss.stats", main)
