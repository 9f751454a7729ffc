"""Compare methods: a grid of training runs, their table and their picture.

    python -m dss.study --preset toy                     the embedded task with more and more rows
    python -m dss.study --preset cqa-base --data-dir D   a row of the paper's table 1
                                                         (D is the output of data.official)

Each cell of the grid is one call of `train.py --resume` in a directory of its own. So a study that
was stopped goes on where it was, and a cell can be repeated by hand like any other run. Cells of
one seed have the same rows, tokenizer, initial weights and order of rows. With several values of
--lr, each method gets the rate that is best on the validation rows of the first seed.
"""

import itertools
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data import cli
from data.cli import Interrupted, Stop, require
from data.files import read_json, replacing, write_json
from dss.checkpoint import require_free
from dss.config import LABELS, SIZES, TrainConfig
from dss.methods import BASELINE, METHODS, require_methods
from dss.rows import load_rows
from dss.stats import paired_interval, read_correct
from dss.weights import resolve_checkpoint

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
GRID = ("labels", "weights", "size", "subsample", "method", "lam", "lr", "seed")
BASELINES = ("commonest_label", "bag_of_words")  # their accuracies are in result.json

DATASETS = {  # DIR stands for --data-dir; the last two have no validation file
    "esnli": "--data DIR/esnli_train.jsonl --eval-data DIR/esnli_valid.jsonl"
    " --test-data DIR/esnli_test.jsonl",
    "anli": "--data DIR/anli1_train.jsonl --eval-data DIR/anli1_valid.jsonl"
    " --test-data DIR/anli1_test.jsonl",
    "cqa": "--data DIR/cqa_train.jsonl --test-data DIR/cqa_test.jsonl --eval-fraction 0.1001",
    "svamp": "--data DIR/svamp_train.jsonl --test-data DIR/svamp_test.jsonl --eval-fraction 0.1",
}


def paper(dataset: str, size: str) -> str:
    """The flags of a row of the paper's table 1 (Hsieh et al. 2023, section 4 and appendix A).

    The released code sets no schedule, and transformers then lowers the rate linearly to 0.
    """
    return (
        f"{DATASETS[dataset]} --weights google/t5-v1_1-{size} --method standard single_task dss "
        "--seed 0 1 2 3 --steps 10000 --batch-size 64 --lr 5e-5 --schedule linear --warmup 0 "
        "--beta2 0.999 --weight-decay 0 --eval-every 250 --max-input-length 1024 "
        "--max-target-length 256 --max-new-tokens 64 --answers write"
    )


CPU = "--method standard dss label_first dss-shuffled"
PRESETS = {
    "": "",
    "toy": "--method standard dss --subsample 0.25 0.5 1",
    "esnli-cpu": (
        f"{CPU} standard-matched --data DIR/esnli_valid.jsonl --test-data DIR/esnli_test.jsonl "
        "--size tiny-wide --look-alike --rename-words 0.6 --dropout 0 --lam 0.25 --steps 3000 "
        "--batch-size 32 --lr 0.01 --eval-every 500 --max-new-tokens 8"
    ),
    "cqa-cpu": f"{CPU} {DATASETS['cqa']} --steps 1000 --batch-size 32 --max-new-tokens 16",
    "svamp-cpu": f"{CPU} {DATASETS['svamp']} --steps 1000 --batch-size 32 --max-new-tokens 32",
}
for dataset in DATASETS:
    for size in ("base", "large"):
        PRESETS[f"{dataset}-{size}"] = paper(dataset, size)


@dataclass(frozen=True)
class StudyConfig:
    """A grid of training runs. Every flag that is not listed here is train.py's, for all runs."""

    preset: Literal[tuple(PRESETS)] = ""  # a named study; flags given beside it override its own
    data_dir: str = "."  # where the files of a preset are, as data.official writes them
    method: tuple[str, ...] = ("standard", "dss", "dss-shuffled")  # names in dss/methods.py
    labels: tuple[Literal[LABELS], ...] = ("gold",)  # label sources
    weights: tuple[str, ...] = ()  # students: public T5 weights, directories or hub ids
    size: tuple[Literal[tuple(SIZES)], ...] = ("tiny",)  # without --weights: students' shapes
    subsample: tuple[float, ...] = (1.0,)  # shares of the labelled rows, validation cut included
    lam: tuple[float, ...] = ()  # weights of the rationale loss
    lr: tuple[float, ...] = ()  # learning rates; of several, each method gets its best
    seed: tuple[int, ...] = (0, 1, 2)  # each draws weights, order of rows and subsample anew
    jobs: int = 1  # runs at a time; each has a GPU of its own where there are GPUs
    out: str = ""  # output directory; default: runs/study-PRESET
    resume: bool = False  # continue the study in --out; finished runs are kept
    overwrite: bool = False  # replace the runs in --out

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that makes no sense."""
        require(self.jobs >= 1, "jobs", "at least 1", self)
        require(not (self.resume and self.overwrite), "resume", "left out beside --overwrite", self)
        for name in GRID:
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, "different values", self)

    @property
    def directory(self) -> Path:
        return Path(self.out or f"runs/study-{self.preset or 'grid'}")


Cell = dict[str, object]  # {a name of GRID: its value}


@dataclass(frozen=True)
class FinishedRun:
    cell: Cell
    result: dict  # its result.json
    correct: np.ndarray  # (questions,): 1 where the answer is right, else 0

    def key(self, *without: str) -> tuple:
        """The cell's values but some, to be compared with those of other cells."""
        return tuple(value for name, value in self.cell.items() if name not in without)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a run failed, 2 the arguments or files are wrong, 130 interrupted."""
    study, train_flags = parse(sys.argv[1:] if argv is None else argv)
    out = study.directory
    cells = make_cells(study)
    try:
        require_methods(study.method)
        for cell in cells:
            config = cli.parse(command(cell, study, train_flags), TrainConfig, prog="dss.study")
        load_rows(config)
        for weights in study.weights:
            resolve_checkpoint(weights, weights=False)
        require_free(out, study)
        out.mkdir(parents=True, exist_ok=True)
        with Stop("stopping; the runs under way save their state") as stop:
            failed = run_cells(cells, study, train_flags, stop)
            if len(study.lr) > 1 and not failed:
                cells = choose_rates(cells, study)
                failed = run_cells(cells, study, train_flags, stop)
        if not failed:
            print("\n" + write_report(out, read_runs(cells, out)))
    except Interrupted:
        return cli.fail("dss.study", 130, f"interrupted; --resume goes on with {out}")
    except (OSError, ValueError) as problem:
        return cli.fail("dss.study", 2, problem)
    return 1 if failed else 0


def parse(argv: list[str]) -> tuple[StudyConfig, list[str]]:
    """The study's flags, and those for train.py. Exits 2 with one line if the study's are wrong."""
    own, _ = divide(argv)
    study = cli.parse(own, StudyConfig, prog="dss.study")
    preset = PRESETS[study.preset].split()
    preset = [word.replace("DIR/", f"{study.data_dir}/") for word in preset]
    own, train_flags = divide(preset + argv)  # of two equal flags, the last counts
    return cli.parse(own, StudyConfig, prog="dss.study"), train_flags


def divide(words: list[str]) -> tuple[list[str], list[str]]:
    """A command line, divided into StudyConfig's flags and all others, with their values."""
    names = {"help", *StudyConfig.__dataclass_fields__}
    own: list[str] = []
    others: list[str] = []
    part = others
    for word in words:
        if word.startswith("--"):
            name = word[2:].split("=")[0].replace("-", "_")
            part = own if name in names else others
        part.append(word)
    return own, others


def make_cells(study: StudyConfig) -> list[Cell]:
    """All cells of the grid; where learning rates are compared, those of the first seed alone."""
    values = {name: getattr(study, name) for name in GRID if getattr(study, name)}
    if study.weights:
        del values["size"]
    if len(study.lr) > 1:
        values["seed"] = study.seed[:1]
    return [dict(zip(values, combination)) for combination in itertools.product(*values.values())]


def choose_rates(cells: list[Cell], study: StudyConfig) -> list[Cell]:
    """The cells with the best rate of each method on validation rows, for all seeds."""
    best: dict[tuple, FinishedRun] = {}
    for run in read_runs(cells, study.directory):
        arm = run.key("lr", "seed")
        score = run.result["validation_score"]
        if arm not in best or score > best[arm].result["validation_score"]:
            best[arm] = run
    return [run.cell | {"seed": seed} for run in best.values() for seed in study.seed]


# ---- Running train.py ----


def directory_name(cell: Cell) -> str:
    parts = [f"{name}={value}" for name, value in cell.items()]
    return ",".join(parts).replace("/", "--")


def command(cell: Cell, study: StudyConfig, train_flags: list[str]) -> list[str]:
    """The arguments of train.py."""
    words = [*train_flags, "--overwrite" if study.overwrite else "--resume"]
    words += ["--out", str(study.directory / directory_name(cell))]
    for name, value in cell.items():
        words += [f"--{name}", str(value)]
    return words


def run_cells(cells: list[Cell], study: StudyConfig, train_flags: list[str], stop: Stop) -> bool:
    """Run the cells, --jobs at a time. Returns whether one of them failed in training.

    Raises Interrupted on Ctrl-C and ValueError if a run finds its arguments or files wrong, after
    the runs under way have saved their state.
    """
    print(f"{study.directory}: {len(cells)} runs, {study.jobs} at a time")
    waiting = list(cells)
    running: dict[int, tuple[Path, subprocess.Popen]] = {}  # at most one in each of --jobs slots
    failed = False
    with tqdm(total=len(cells), unit="run") as bar:
        try:
            while waiting or running:
                stop.check()
                for slot in range(study.jobs):
                    if slot in running and running[slot][1].poll() is not None:
                        failed |= has_failed(*running.pop(slot))
                        bar.update()
                    if slot not in running and waiting:
                        cell = waiting.pop(0)
                        log = study.directory / f"{directory_name(cell)}.log"
                        running[slot] = (log, start(command(cell, study, train_flags), log, slot))
                time.sleep(0.2)
        finally:
            for _, process in running.values():
                process.terminate()  # train.py saves its state on SIGTERM
            for _, process in running.values():
                process.wait()
    return failed


def has_failed(log: Path, process: subprocess.Popen) -> bool:
    """Whether a run that has ended failed in training, which is printed. Raises ValueError if its
    arguments or files were wrong."""
    if process.returncode == 0:
        return False
    problem = log.read_text("utf-8").splitlines()[-1]
    if process.returncode == 2:
        raise ValueError(problem)
    tqdm.write(f"dss.study: see {log}: {problem}", file=sys.stderr)
    return True


def start(words: list[str], log: Path, slot: int) -> subprocess.Popen:
    """train.py as a process whose output goes to a file. Ctrl-C does not reach it by itself."""
    environment = dict(os.environ)
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
    with open(log, "a", encoding="utf-8") as file:
        process = [sys.executable, str(TRAIN), *words]
        return subprocess.Popen(
            process, stdout=file, stderr=file, env=environment, start_new_session=True
        )


# ---- The report ----


def read_runs(cells: list[Cell], out: Path) -> list[FinishedRun]:
    runs = []
    for cell in cells:
        directory = out / directory_name(cell) / cell["method"]
        result = read_json(directory / "result.json")
        runs.append(FinishedRun(cell, result, read_correct(directory)))
    return runs


def write_report(out: Path, runs: list[FinishedRun]) -> str:
    """Write study.md, study.json and, with several --subsample and matplotlib, study.png. Returns
    the text of study.md."""
    groups = summarise(runs)
    command = f"python -m dss.study {shlex.join(sys.argv[1:])}"
    about = f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}: `{command}`"
    write_json(out / "study.json", dict(about=about, groups=groups))
    text = f"{table(groups)}\n{ABOUT_TABLE}\n\n{about}\n"
    with replacing(out / "study.md") as file:
        file.write(text.encode())
    if len({group["subsample"] for group in groups}) > 1:  # else there is no line to draw
        try:
            draw(groups, out / "study.png")
        except ImportError:
            text += "\nNo picture: it needs matplotlib; the same command with --resume draws it.\n"
    return text


def summarise(runs: list[FinishedRun]) -> list[dict]:
    """For each cell, seeds taken together: figures, and the difference from standard finetuning."""
    standard = {}
    members: dict[tuple, list[FinishedRun]] = {}
    for run in runs:
        if run.cell["method"] == BASELINE:
            standard[run.key("method", "lam", "lr")] = run.correct
        members.setdefault(run.key("seed"), []).append(run)
    groups = []
    for same_but_seed in members.values():
        first = same_but_seed[0]
        accuracies = [run.correct.mean() for run in same_but_seed]
        group = first.cell | {
            "seed": len(accuracies),
            "accuracies": accuracies,
            "accuracy": np.mean(accuracies),
            "deviation": np.std(accuracies, ddof=min(1, len(accuracies) - 1)),
            "doubts": sorted({run.result["doubt"] for run in same_but_seed} - {""}),
        }
        for figure in ("rows", "steps", "seconds"):
            group[figure] = np.mean([run.result[figure] for run in same_but_seed])
        for baseline in BASELINES:
            values = [run.result[baseline] for run in same_but_seed]
            group[baseline] = None if None in values else np.mean(values)
        differences = []
        for run in same_but_seed:
            partner = standard.get(run.key("method", "lam", "lr"))
            if partner is not None:
                differences.append(run.correct - partner)
        if differences and first.cell["method"] != BASELINE:
            group["gain"] = paired_interval(differences)
        groups.append(group)
    return groups


ABOUT_TABLE = """
seed: their number. Label accuracy is a mean over seeds ± the standard deviation between them. Its
difference from standard finetuning on the same rows and questions has a 95 % bootstrap interval
over seeds and questions. Beside it: always answering the commonest label, and a bag of words."""


def table(groups: list[dict]) -> str:
    """The groups in Markdown."""
    names = [name for name in (*GRID, "rows", "steps", "seconds") if name in groups[0]]
    heads = [*names, "accuracy, %", f"- {BASELINE}, points", *BASELINES, "doubt"]
    lines = [heads, ["---"] * len(heads)]
    for group in groups:
        line = []
        for name in names:
            value = group[name]
            line.append(f"{value:,.4g}" if isinstance(value, float) else str(value))
        line.append(f"{100 * group['accuracy']:.1f} ± {100 * group['deviation']:.1f}")
        gain = ""
        if "gain" in group and not group["doubts"]:  # no interval beside a student in doubt
            mean, low, high = (100 * value for value in group["gain"])
            gain = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        line.append(gain)
        for name in BASELINES:
            line.append("none" if group[name] is None else f"{100 * group[name]:.1f}")
        line.append("; ".join(group["doubts"]))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(groups: list[dict], path: Path) -> None:
    """Accuracy over the number of training rows: a line for each method (and, if there are several,
    student, source of labels and lambda) and baseline. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    names = ["method"]
    for name in ("labels", "weights", "size", "lam"):
        if len({group.get(name) for group in groups}) > 1:
            names.append(name)
    lines: dict[str, list[dict]] = {}
    for group in sorted(groups, key=lambda group: group["rows"]):
        label = ", ".join(str(group[name]) for name in names)
        lines.setdefault(label, []).append(group)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for label, points in lines.items():
        method = METHODS[points[0]["method"]]
        axis.errorbar(
            [group["rows"] for group in points],
            [group["accuracy"] for group in points],
            [group["deviation"] for group in points],
            label=label,
            color=method.colour,
            marker=method.marker,
            capsize=3,
        )
    rows = [group["rows"] for group in points]
    for baseline, style in zip(BASELINES, (":", "--")):
        level = [group[baseline] for group in points]
        if None not in level:
            axis.plot(rows, level, color="black", linestyle=style, label=baseline.replace("_", " "))
    axis.set(xscale="log", xlabel="training rows", ylabel="label accuracy")
    axis.set_xticks(rows, [f"{number:,.0f}" for number in rows])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")


if __name__ == "__main__":
    cli.run("dss.study", main)
