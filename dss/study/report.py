"""Tables and pictures of a study: OUT/study.md, study.json, and, where matplotlib is installed, PNG files.

Accuracies are label accuracies on the test rows (validation rows where there are no others), means over seeds with the
standard deviation between seeds. A method is compared with `standard` of the same run, question by question; the
interval is the 95 % percentile interval of a bootstrap that draws seeds, and for each the questions, with replacement.
With a few seeds it is a rough one.
"""

import json
import os
import platform
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data.files import replacing
from dss.metrics import accuracy
from dss.run.output import write_json

RESAMPLES = 10_000
LOOKS = {  # colour (Okabe and Ito's, told apart by colour-blind readers too), marker, name in a legend
    "standard": ("#555555", "o", "standard finetuning"),
    "standard-matched": ("#999999", "v", "standard, as many tokens as step-by-step"),
    "single_task": ("#009E73", "^", "single-task"),
    "dss": ("#0072B2", "s", "step-by-step"),
    "dss-shuffled": ("#D55E00", "D", "step-by-step, rationales of other rows"),
}


def write_report(out, cells, compared):
    """Write the report of finished runs into `out`; returns it. cells, compared: a TrainConfig and levels a run."""
    runs = [read_run(name, cell, method) for name, cell in cells.items() for method in cell.method]
    groups = summarise(runs)
    lines = {level: mean(compared[name][level] for name in cells) for level in ("teacher", "commonest label")}
    pictures, why_not = draw(out, groups, lines)
    about = dict(
        date=time.strftime("%Y-%m-%d"), machine=machine(), command="python -m dss.study " + shlex.join(sys.argv[1:])
    )
    write_json(out / "study.json", about | dict(lines=lines, groups=groups, runs=[without_answers(r) for r in runs]))
    text = (
        markdown(groups, lines, about)
        + f"\nWritten to {out}: study.md, study.json{''.join(f', {p}' for p in pictures)}.\n"
    )
    text += f"{why_not}\n" if why_not else ""
    with replacing(out / "study.md") as file:
        file.write(text.encode())
    return text


def read_run(name, cell, method):
    """What one arm of one run came to, as a dict; `answers` holds right or wrong for each question."""
    arm = Path(cell.out) / method
    result = json.loads((arm / "result.json").read_text("utf-8"))
    predictions = [json.loads(line) for line in (arm / "predictions.jsonl").read_text("utf-8").splitlines()]
    answers = np.array([p["correct"] for p in predictions], dtype=int)
    figures = {key: result[key] for key in ("steps", "rows", "tokens", "seconds", "parameters", "validation_accuracy")}
    student = cell.weights or cell.size
    where = dict(run=name, labels=cell.labels, student=student, share=cell.subsample, seed=cell.seed, method=method)
    return where | figures | dict(accuracy=float(answers.mean()), split=predictions[0]["split"], answers=answers)


def without_answers(run):
    return {key: value for key, value in run.items() if key != "answers"}


def summarise(runs):
    """One dict for each labels x student x share x method: figures over its seeds, and the gain over standard."""
    groups = []
    for key in dict.fromkeys((r["labels"], r["student"], r["share"], r["method"]) for r in runs):
        mine = [r for r in runs if (r["labels"], r["student"], r["share"], r["method"]) == key]
        base = {r["run"]: r for r in runs if r["method"] == "standard"}
        group = dict(zip(("labels", "student", "share", "method"), key)) | {
            "seeds": [r["seed"] for r in mine],
            "accuracies": [r["accuracy"] for r in mine],
            "accuracy": mean(r["accuracy"] for r in mine),
            "deviation": float(np.std([r["accuracy"] for r in mine], ddof=1)) if len(mine) > 1 else None,
            **{k: mean(r[k] for r in mine) for k in ("rows", "steps", "tokens", "seconds", "parameters")},
        }
        pairs = [r["answers"] - base[r["run"]]["answers"] for r in mine if r["run"] in base]
        if pairs and key[-1] != "standard":
            group |= {"gain": mean(p.mean() for p in pairs), "interval": interval(pairs)}
        groups.append(group)
    return groups


def interval(differences, seed=0):
    """95 % bootstrap interval of the mean of means. differences: for each seed an array of -1, 0, 1, one a question."""
    rng = np.random.default_rng(seed)
    S = len(differences)
    drawn = rng.integers(S, size=(RESAMPLES, S))
    means = np.zeros((RESAMPLES, S))
    for s, d in enumerate(differences):  # to draw n questions with replacement is to draw three counts
        shares = [np.mean(d == value) for value in (-1, 0, 1)]
        counts = rng.multinomial(len(d), shares, size=(RESAMPLES, S))
        means = np.where(drawn == s, (counts[..., 2] - counts[..., 0]) / len(d), means)
    low, high = np.percentile(means.mean(1), [2.5, 97.5])
    return [float(low), float(high)]


def levels(rows):
    """What the students of these rows are compared with."""
    return {"teacher": teacher_accuracy(rows), "commonest label": commonest_accuracy(rows)}


def teacher_accuracy(rows):
    """The teacher's own accuracy on the test rows, no answer being wrong; None where it has answered none of them."""
    test = rows.test or rows.validation
    if all(r.teacher_label is None for r in test):
        return None
    return accuracy([r.teacher_label or "" for r in test], test, rows.metric)[0]


def commonest_accuracy(rows):
    """The accuracy of giving the commonest training label to every test row."""
    label, _ = Counter(r.label for r in rows.train).most_common(1)[0]
    test = rows.test or rows.validation
    return accuracy([label] * len(test), test, rows.metric)[0]


def mean(values):
    values = list(values)
    return None if None in values else float(np.mean(values))


def machine():
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"


def markdown(groups, lines, about):
    head = [
        "labels",
        "student",
        "share",
        "rows",
        "method",
        "steps",
        "tokens",
        "seeds",
        "accuracy",
        "- standard, points",
    ]
    table = [head, ["---"] * len(head)]
    for g in groups:
        spread = "" if g["deviation"] is None else f" ± {100 * g['deviation']:.1f}"
        gain = (
            f"{100 * g['gain']:+.1f} [{100 * g['interval'][0]:+.1f}, {100 * g['interval'][1]:+.1f}]"
            if "gain" in g
            else ""
        )
        row = [g["labels"], g["student"], f"{g['share']:.4g}", f"{g['rows']:,.0f}", g["method"], f"{g['steps']:,.0f}"]
        row += [f"{g['tokens'] / 1e6:.1f}M", str(len(g["seeds"])), f"{100 * g['accuracy']:.1f}{spread}", gain]
        table.append(row)
    text = "\n".join("| " + " | ".join(row) + " |" for row in table)
    notes = [
        "Label accuracy in %, mean over seeds ± standard deviation between seeds; beside it the difference from",
        "standard finetuning on the same rows and questions, and its 95 % bootstrap interval over seeds and questions.",
        f"On the same questions the teacher's own accuracy is {percent(lines['teacher'])}; always giving the commonest",
        f"training label, {percent(lines['commonest label'])}.",
    ]
    return "\n".join([text, "", *notes, "", f"{about['date']}, {about['machine']}: `{about['command']}`", ""])


def percent(share):
    return "unknown" if share is None else f"{share:.1%}"


def draw(out, groups, lines):
    """The pictures that the grid allows. Returns ([file names], a line that says what is missing or "")."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return [], "No pictures: pip install matplotlib, then the same command with --resume draws them."
    made = []
    panels = list(dict.fromkeys((g["labels"], g["student"]) for g in groups))
    if len({g["share"] for g in groups}) > 1:
        figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.6), squeeze=False, sharey=True)
        for axis, (labels, student) in zip(axes[0], panels):
            mine = [g for g in groups if (g["labels"], g["student"]) == (labels, student)]
            curves(axis, mine, "share", lines)
            shares = sorted({g["share"] for g in mine})
            axis.set_xscale("log", base=2)
            axis.set_xticks(shares, [f"{100 * s:g}" for s in shares])
            axis.minorticks_off()
            axis.set_xlabel("share of the training rows, %")
            axis.set_title(f"{student}, {labels} labels", fontsize=10)
        finish(figure, axes, out / "accuracy_by_share.png", pyplot)
        made.append("accuracy_by_share.png")
    if len({g["student"] for g in groups}) > 1:
        sources = list(dict.fromkeys(g["labels"] for g in groups))
        figure, axes = pyplot.subplots(1, len(sources), figsize=(6.4 * len(sources), 4.6), squeeze=False, sharey=True)
        most = max(g["share"] for g in groups)
        for axis, labels in zip(axes[0], sources):
            mine = [g for g in groups if g["labels"] == labels and g["share"] == most]
            curves(axis, mine, "parameters", lines)
            axis.set_xscale("log")
            axis.set_xlabel("parameters of the student")
            axis.set_title(f"{labels} labels, {100 * most:g} % of the training rows", fontsize=10)
        finish(figure, axes, out / "accuracy_by_size.png", pyplot)
        made.append("accuracy_by_size.png")
    return made, "" if made else "No pictures: the grid has one share and one student."


def curves(axis, groups, x, lines):
    """Accuracy over groups[i][x], one line a method with the deviation between seeds, and levels to compare with."""
    methods = [m for m in LOOKS if any(g["method"] == m for g in groups)]
    for number, method in enumerate(methods):
        colour, marker, name = LOOKS[method]
        mine = sorted((g for g in groups if g["method"] == method), key=lambda g: g[x])
        aside = 1.015 ** (number - (len(methods) - 1) / 2)  # so that bars of one x do not hide one another
        y, spread = ([100 * (g[k] or 0) for g in mine] for k in ("accuracy", "deviation"))
        looks = dict(color=colour, marker=marker, markersize=5, capsize=3, label=name)
        axis.errorbar([g[x] * aside for g in mine], y, spread, **looks)
    for (name, level), style in zip(lines.items(), ("--", ":")):
        if level is not None:
            axis.axhline(100 * level, color="black", linestyle=style, linewidth=1, label=f"{name} ({100 * level:.1f})")
    low, high = axis.get_ylim()
    axis.set_ylim(max(low - 2, -2), min(high + 2, 102))
    axis.grid(alpha=0.3)


def finish(figure, axes, path, pyplot):
    axes[0][0].set_ylabel("label accuracy on the test rows, %")
    legend = list(zip(*axes[0][0].get_legend_handles_labels()))
    legend.sort(key=lambda entry: all(entry[1] != name for *_, name in LOOKS.values()))  # methods, then levels
    figure.legend(*zip(*legend), loc="lower center", ncols=2, fontsize=9)
    figure.tight_layout(rect=(0, 0.05 * ((len(legend) + 1) // 2) + 0.01, 1, 1))
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)
