"""The end of a run: further figures of a test, and the report, which compares the methods."""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.answers import token_f1
from dss import distributed
from dss.methods import BASELINE, METHODS
from dss.rows import Rows
from dss.stats import TITLES, commonest_label, paired_interval, read_correct, reliability
from dss.student import Prediction, Student

LONGEST_SAMPLE = 100  # characters of a text in the report


def measure(
    student: Student, rows: Rows, right: list[bool], predictions: list[Prediction]
) -> dict[str, float]:
    """What the test says beside accuracy: token F1 of free text, `stats.reliability` where labels
    are a closed set."""
    answers = [prediction.label for prediction in predictions]
    gold = [row.label for row in rows.asked]
    if rows.free_text:
        return {"token_f1": np.mean([token_f1(a, b) for a, b in zip(answers, gold)]).item()}
    if not rows.labels:
        return {}
    confidence = []
    if METHODS[student.method].label_position != "last":  # else its label cannot be scored
        inputs = [row.input for row in rows.asked]
        confidence = distributed.share_out(student.confidence, list(zip(inputs, answers)))
    return reliability(answers, gold, right, confidence)


def report(out: Path, rows: Rows, results: list[dict]) -> None:
    """Print what came of a run. results: the result.json of each method, in order."""
    print_table(results)
    label, accuracy = commonest_label(rows)
    label = shorten_text(label)
    print(f"always answering {label!r}, the commonest label in training: {accuracy:.1%}")
    if results[0]["bag_of_words"] is not None:
        print(f"a bag of words (dss/stats.py): {results[0]['bag_of_words']:.1%}")
    print_differences(out, rows, results)
    for result in results:
        if "token_f1" in result:
            print(f"{result['method']}: token F1 {result['token_f1']:.1%}")
        if result["doubt"]:
            print(f"{result['method']}: {result['doubt']}")
    print_reliability(results)
    print_samples(rows, results)
    print(f"\n{out}/METHOD/ holds result.json, predictions.jsonl, metrics.jsonl and student/.")
    print("The same command with --resume --method NAME ... adds students to the comparison.")


def print_table(results: list[dict]) -> None:
    print(
        f"\n{'method':<18}{'rows':>7}{'steps':>8}{'best at':>9}{'validation':>12}{'test':>8}"
        f"{'tokens':>9}{'time':>9}"
    )
    for r in results:
        test = "-"
        if r["test_accuracy"] is not None:
            test = f"{r['test_accuracy']:.1%}"
        minutes, seconds = divmod(r["seconds"], 60)
        print(
            f"{r['method']:<18}{r['rows']:>7,}{r['steps']:>8,}{r['best_step']:>9,}"
            f"{r['validation_accuracy']:>12.1%}{test:>8}{tqdm.format_sizeof(r['tokens']):>9}"
            f"{minutes:>6.0f}m{seconds:02.0f}s"
        )


def print_differences(out: Path, rows: Rows, results: list[dict]) -> None:
    """Compare every method with the baseline, question by question, if that was trained too."""
    right = {r["method"]: read_correct(out / r["method"]) for r in results}
    baseline = right.pop(BASELINE, None)
    if baseline is None:
        return
    for method in right:
        mean, low, high = paired_interval([right[method] - baseline])
        print(
            f"{method} - {BASELINE}: {100 * mean:+.1f} points of label accuracy "
            f"[{100 * low:+.1f}, {100 * high:+.1f}] on {len(rows.asked):,} {rows.asked_name} rows, "
            "95 % interval over questions"
        )


def print_reliability(results: list[dict]) -> None:
    """How far each student's probabilities can be trusted, where labels are a closed set."""
    shown = [result for result in results if "macro_f1" in result]
    if shown:
        print(f"\n{'method':<18}" + "".join(f"{title:>18}" for title in TITLES.values()))
    for result in shown:
        line = f"{result['method']:<18}"
        for name in TITLES:
            cell = "-"
            if name in result:
                cell = f"{result[name]:.1%}"
            line += f"{cell:>18}"
        print(line)


def print_samples(rows: Rows, results: list[dict]) -> None:
    """Print three questions as one of the students answers them: the last one that explains, if any
    does, else the last."""
    shown = results[-1]
    for result in results:
        if METHODS[result["method"]].learns_rationales:
            shown = result
    print(f"\nThe first {rows.asked_name} rows, as the {shown['method']} student answers them:")
    for sample in shown["samples"]:
        answer = shorten_text(sample["prediction"]) or "(nothing)"
        print(f"\n  question   {shorten_text(sample['input'])}")
        print(f"  predicted  {answer}   (label: {shorten_text(sample['label'])})")
        if sample["rationale"]:
            print(f"  because    {shorten_text(sample['rationale'])}")


def shorten_text(text: str) -> str:
    """On one line, and cut where it is long."""
    line = " ".join(text.split())
    if len(line) > LONGEST_SAMPLE:
        return line[: LONGEST_SAMPLE - 4] + " ..."
    return line


def reason_to_doubt(result: dict, metrics: Path) -> str:
    """Why a run's accuracy may say little about its method; an empty text if nothing speaks against
    it. result: a result.json; metrics: the metrics.jsonl beside it."""
    accuracy = result["test_accuracy"]
    if accuracy is None:
        accuracy = result["validation_accuracy"]
    if accuracy <= result["commonest_label"] + 0.01 and "token_f1" not in result:
        return (
            "no better than the commonest label; try more --steps, another student or "
            "pretrained --weights"
        )
    if result["bag_of_words"] is not None and accuracy < result["bag_of_words"]:
        return "less accurate than a bag of words: nothing follows from comparing it"
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    losses = [line["label_loss"] for line in lines if "label_loss" in line]
    tenth = max(1, len(losses) // 10)
    last = sum(losses[-tenth:]) / tenth
    before = sum(losses[-2 * tenth : -tenth]) / tenth
    fell_fast = before - last > max(0.1 * before, 0.02)  # nats a token
    if fell_fast and result["best_step"] == result["steps"]:
        return (
            "trained too briefly to be judged: its loss was falling fast, its last evaluation "
            "was its best"
        )
    return ""
