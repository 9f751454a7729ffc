"""Tables and pictures of a study: OUT/study.md, study.json, and, where matplotlib is installed, PNG files.

Accuracies are label accuracies on the test rows (validation rows where there are no others), means over seeds with the
standard deviation between seeds. A method is compared with `standard` of the same run, question by question.
"""

import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.answers import same_label
from data.files import read_json, replacing, write_json
from dss.config import TrainConfig
from dss.rows import Rows
from dss.run.report import correct
from dss.stats import commonest_label, paired_interval

LOOKS = {  # colour (Okabe and Ito's, told apart by colour-blind readers too), marker, name in a legend
    "standard": ("#555555", "o", "standard finetuning"),
    "standard-matched": ("#999999", "v", "standard, as many tokens as step-by-step"),
    "single_task": ("#009E73", "^", "single-task"),
    "dss": ("#0072B2", "s", "step-by-step"),
    "label_first": ("#CC79A7", "P", "label first, then rationale"),
    "dss-shuffled": ("#D55E00", "D", "step-by-step, rationales of other rows"),
    "dss-scrambled": ("#E69F00", "X", "step-by-step, words in random order"),
}


def write_report(out: Path, cells: dict[str, TrainConfig], compared: dict[str, dict]) -> str:
    """Write the report of finished runs into `out`; returns it. cells, compared: a TrainConfig and levels a run."""
    runs = [read_run(name, cell, method) for name, cell in cells.items() for method in cell.method]
    groups = summarise(runs)
    lines = {level: mean(compared[name][level] for name in cells) for level in ("teacher", "commonest label")}
    pictures, why_not = draw(out, groups, lines)
    command = "python -m dss.study " + shlex.join(sys.argv[1:])
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    machine = f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cores}, torch {torch.__version__}"
    about = dict(date=time.strftime("%Y-%m-%d"), machine=machine, command=command)
    kept = [{key: value for key, value in run.items() if key != "answers"} for run in runs]
    write_json(out / "study.json", about | dict(lines=lines, groups=groups, runs=kept))
    text = f"{markdown(groups, lines, about)}\nWritten to {out}: {', '.join(['study.md', 'study.json', *pictures])}.\n"
    text += f"{why_not}\n" if why_not else ""
    with replacing(out / "study.md") as file:
        file.write(text.encode())
    return text


def read_run(name: str, cell: TrainConfig, method: str) -> dict:
    """What one student of one run came to; `answers` holds right or wrong for each question."""
    directory = Path(cell.out) / method
    result, answers = read_json(directory / "result.json"), correct(directory)
    figures = {key: result[key] for key in ("steps", "rows", "tokens", "seconds", "parameters", "validation_accuracy")}
    split = "validation" if result["test_accuracy"] is None else "test"
    student = cell.weights or cell.size
    where = dict(run=name, labels=cell.labels, student=student, share=cell.subsample, seed=cell.seed, method=method)
    return where | figures | dict(accuracy=float(answers.mean()), split=split, answers=answers)


def summarise(runs: list[dict]) -> list[dict]:
    """One dict for each labels x student x share x method: figures over its seeds, and the gain over standard."""
    groups = []
    standard = {r["run"]: r["answers"] for r in runs if r["method"] == "standard"}
    of_group = itemgetter("labels", "student", "share", "method")
    for key in dict.fromkeys(map(of_group, runs)):
        mine = [r for r in runs if of_group(r) == key]
        accuracies = [r["accuracy"] for r in mine]
        group = dict(zip(("labels", "student", "share", "method"), key))
        group |= dict(seeds=[r["seed"] for r in mine], accuracies=accuracies, accuracy=mean(accuracies))
        group |= dict(deviation=float(np.std(accuracies, ddof=1)) if len(mine) > 1 else None)
        group |= {k: mean(r[k] for r in mine) for k in ("rows", "steps", "tokens", "seconds", "parameters")}
        pairs = [r["answers"] - standard[r["run"]] for r in mine if r["run"] in standard]
        if pairs and group["method"] != "standard":
            gain, low, high = paired_interval(pairs)
            group |= dict(gain=gain, interval=[low, high])
        groups.append(group)
    return groups


def levels(rows: Rows) -> dict[str, float | None]:
    """What the students are compared with: the accuracies of the teacher, no answer being wrong (None where it has
    answered none of the questions), and of always giving the commonest label."""
    asked = rows.test or rows.validation
    answered = any(r.teacher_label is not None for r in asked)
    right = (same_label(r.teacher_label or "", r.label, rows.metric, r.input) for r in asked)
    return {"teacher": mean(right) if answered else None, "commonest label": commonest_label([row.label for row in rows.train], asked, rows.metric)[1]}


def mean(values: Iterable) -> float | None:
    values = list(values)
    return None if None in values else float(np.mean(values))


def markdown(groups: list[dict], lines: dict, about: dict) -> str:
    head = "labels student share rows method steps tokens seeds accuracy".split() + ["- standard, points"]
    table = [head, ["---"] * len(head)]
    for g in groups:
        spread = "" if g["deviation"] is None else f" ± {100 * g['deviation']:.1f}"
        row = [g["labels"], g["student"], f"{g['share']:.4g}", f"{g['rows']:,.0f}", g["method"], f"{g['steps']:,.0f}"]
        row += [tqdm.format_sizeof(g["tokens"]), str(len(g["seeds"])), f"{100 * g['accuracy']:.1f}{spread}"]
        if "gain" in g:
            low, high = g["interval"]
            row += [f"{100 * g['gain']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"]
        table.append(row + [""] * (len(head) - len(row)))
    text = "\n".join("| " + " | ".join(row) + " |" for row in table)
    teacher = "unknown" if lines["teacher"] is None else f"{lines['teacher']:.1%}"
    notes = [
        "Label accuracy in %, mean over seeds ± standard deviation between seeds; beside it the difference from",
        "standard finetuning on the same rows and questions, and its 95 % bootstrap interval over seeds and questions.",
        f"On the same questions the teacher's own accuracy is {teacher}; always giving the commonest",
        f"training label, {lines['commonest label']:.1%}.",
    ]
    return "\n".join([text, "", *notes, "", f"{about['date']}, {about['machine']}: `{about['command']}`", ""])


def draw(out: Path, groups: list[dict], lines: dict) -> tuple[list[str], str]:
    """The pictures that the grid allows. Returns ([file names], a line that says what is missing or "")."""
    try:
        import matplotlib.figure
    except ImportError:
        return [], "No pictures: pip install matplotlib, then the same command with --resume draws them."
    most = max(g["share"] for g in groups)
    shares, sizes = {}, {}  # title of a panel -> its groups
    for g in groups:
        shares.setdefault(f"{g['student']}, {g['labels']} labels", []).append(g)
        if g["share"] == most:
            sizes.setdefault(f"{g['labels']} labels, {100 * most:g} % of the training rows", []).append(g)
    made = []
    for name, x, panels in (("share", "share", shares), ("size", "parameters", sizes)):
        if len({g["student" if name == "size" else x] for g in groups}) == 1:  # a tokenizer changes the parameters
            continue
        figure = matplotlib.figure.Figure(figsize=(6.4 * len(panels), 5), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, mine) in zip(axes, panels.items()):
            curves(axis, mine, x, lines)
            label = "parameters of the student" if x == "parameters" else "share of the training rows, %"
            axis.set(title=title, xscale="log", xlabel=label)
            if x == "share":
                ticks = sorted({g[x] for g in mine})
                axis.set_xticks(ticks, [f"{100 * share:g}" for share in ticks])
                axis.minorticks_off()
        axes[0].set_ylabel("label accuracy on the test rows, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
        with replacing(out / f"accuracy_by_{name}.png") as file:
            figure.savefig(file, dpi=150, format="png")
        made.append(f"accuracy_by_{name}.png")
    return made, "" if made else "No pictures: the grid has one share and one student."


def curves(axis: object, groups: list[dict], x: str, lines: dict) -> None:
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
    axis.set_ylim(max(low, -2), min(high, 102))
    axis.grid(alpha=0.3)
