"""The paper's comparisons, one command each:  python -m dss.study [--preset NAME] [--FLAG VALUE ...]

    python -m dss.study --preset toy                       the embedded task: accuracy against share of training rows
    python -m dss.study --preset cqa-base --data-dir D     a row of the paper's table 1; D is data.official's output

A study is a grid: label sources x students x shares of the training rows x seeds. Each cell of the grid is one run of
`train.py --resume` with all methods, in a process and a directory of its own. So a study that was killed goes on where
it was, and a cell can be looked at, or repeated by hand, like any other run. What makes the comparison fair: the
methods of a cell have the same rows, labels, tokenizer, first weights, optimiser steps and order of rows
(`standard-matched` has the tokens of dss instead of its steps); each student is selected on validation rows, and the
test rows are read once. dss/study/report.py makes tables and pictures of what the cells wrote.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends at once and without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data import cli
from data.cli import Interrupted, Stop, require
from data.files import read_json
from data.jsonl import read_jsonl
from dss.config import LABELS, METHODS, SIZES, TrainConfig
from dss.rows import load_rows
from dss.run.start import find_output, identify, require_free, require_same
from dss.study.presets import PRESETS
from dss.study.report import levels, write_report
from dss.weights import resolve_checkpoint

TRAIN = Path(__file__).resolve().parents[2] / "train.py"


@dataclass(frozen=True)
class StudyConfig(TrainConfig):
    """A grid of runs, and its tables and pictures. Flags that take several values span the grid; every other flag is
    train.py's and holds for all runs."""

    # the grid
    preset: Literal[("", *PRESETS)] = ""  # a named study; flags given beside it override its settings
    data_dir: str = "."  # where a preset's files are, as data.official names them
    method: tuple[Literal[METHODS], ...] = ("standard", "dss", "dss-shuffled")  # students of every run, in order
    labels: tuple[Literal[LABELS], ...] = ("gold",)  # label sources
    weights: tuple[str, ...] = ()  # public T5 weights, directories or hub ids; default: random weights of --size
    size: tuple[Literal[tuple(SIZES)], ...] = ("tiny",)  # students with random weights
    subsample: tuple[float, ...] = (1.0,)  # shares of all labelled rows, the validation cut included
    seed: tuple[int, ...] = (0, 1, 2)  # each draws weights, order of rows and subsample anew
    jobs: int = 0  # runs at a time; 0: one a GPU where there are GPUs, else one a core
    out: str = ""  # output directory; default: runs/study-NAME

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that makes no sense."""
        require(self.jobs >= 0, "jobs", "0 or more", self)
        require(not (self.resume and self.overwrite), "resume", "left out beside --overwrite", self)
        for name in ("labels", "weights", "size", "subsample", "seed"):
            require(len(set(getattr(self, name))) == len(getattr(self, name)), name, "different values", self)
        for cell in self.cells().values():
            cell.check()

    def cells(self) -> dict[str, TrainConfig]:
        """{name of a run: its TrainConfig}, in the order in which they are started."""
        students = [dict(weights=w) for w in self.weights] or [dict(size=s) for s in self.size]
        grid = itertools.product(self.labels, students, self.subsample, self.seed)
        shared = {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        if self.preset:  # whose files are below --data-dir
            below = Path(self.data_dir)
            shared["data"] = tuple(str(below / name) for name in self.data)
            shared |= {name: str(below / shared[name]) for name in ("eval_data", "test_data") if shared[name]}
        cells = {}
        for labels, student, share, seed in grid:
            (which,) = student.values()  # two students may be called .../student, so the whole path names a run
            name = f"{labels}-{which.strip('./').replace('/', '--')}-{share:g}-seed{seed}"
            own = dict(weights="", size=TrainConfig.size) | student | dict(labels=labels, subsample=share, seed=seed)
            place = dict(out=str(self.directory / name), resume=True, overwrite=False)
            cells[name] = TrainConfig(**shared | own | place)
        return cells

    @property
    def directory(self) -> Path:
        name = self.preset or (Path(self.data[0]).stem if self.data else "toy")
        return Path(self.out or f"runs/study-{name}")

    @property
    def gpus(self) -> int:
        return torch.cuda.device_count() if self.device != "cpu" else 0

    @property
    def parallel(self) -> int:
        return self.jobs or self.gpus or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a run failed, 2 the arguments or files are wrong, 130 interrupted."""
    config = cli.parse(argv, StudyConfig, presets=PRESETS, prog="python -m dss.study")
    out, cells = config.directory, config.cells()
    try:
        require_free(out, config)
        for weights in config.weights:
            resolve_checkpoint(weights, weights=False)
        levels, done = look_at_rows(config, cells)  # whatever is wrong with a file is found here
        if config.overwrite:
            for cell in cells.values():  # refuses to delete what is no run, or holds what a run reads
                find_output(replace(cell, resume=False, overwrite=True), "")
            for name in filter(os.path.isdir, (out / name for name in cells)):
                shutil.rmtree(name)
        out.mkdir(parents=True, exist_ok=True)
        before = f", {len(done)} of them done before" if done else ""
        print(f"{out}: {len(cells)} runs of {', '.join(config.method)}{before}; {config.parallel} at a time")
        with Stop("stopping; the runs under way save their state") as stop:
            failed = run_all(config, {name: cell for name, cell in cells.items() if name not in done}, stop)
            if finished := {name: cell for name, cell in cells.items() if name not in failed}:
                print("\n" + write_report(out, finished, levels))
    except Interrupted:
        return fail(130, f"interrupted; {out} keeps what is done, --resume goes on")
    except (OSError, ValueError) as problem:
        return fail(2, problem)
    for name in failed:
        print(f"dss.study: {name} failed; see {out / name}.log", file=sys.stderr)
    return 1 if failed else 0


def look_at_rows(config: StudyConfig, cells: dict[str, TrainConfig]) -> tuple[dict[str, dict], set[str]]:
    """{name of a run: what its students are compared with} and the names of those whose students are all tested.

    One run's rows at a time, and one copy of each file's: a study of any number of runs needs the memory of one.
    Raises ValueError if --resume finds a student that was trained with other settings or rows.
    """
    read, found, done = cache(lambda path: list(read_jsonl(path))), {}, set()
    for name, cell in cells.items():
        rows = load_rows(cell, read)
        found[name] = levels(rows)
        if config.resume:
            identity, students = identify(cell, rows), [Path(cell.out) / method for method in cell.method]
            for directory in students:
                require_same(directory, identity)
            if all((directory / "result.json").exists() for directory in students):
                done.add(name)
    return found, done


def run_all(config: StudyConfig, cells: dict[str, TrainConfig], stop: Stop) -> list[str]:
    """Run the cells, `config.parallel` at a time, each as train.py. Returns the names of those that failed.

    Raises Interrupted on Ctrl-C, after the runs under way have saved their state, and ValueError if the very first run
    to end finds its arguments or files wrong, because then all of them would.
    """
    waiting, running, failed, succeeded = list(cells), {}, [], 0
    results = [Path(cell.out) / method / "result.json" for cell in cells.values() for method in cell.method]
    with tqdm(total=len(results), unit="student", mininterval=0.5 if sys.stderr.isatty() else 60) as bar:
        try:
            while waiting or running:
                stop.check()
                while waiting and len(running) < config.parallel:
                    name = waiting.pop(0)
                    slot = min(set(range(config.parallel)) - {slot for _, slot in running.values()})
                    running[name] = start(config, name, cells[name], slot), slot
                for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
                    status = running.pop(name)[0].returncode
                    if status == 2 and not succeeded:
                        raise ValueError(last_line(f"{config.directory / name}.log"))
                    succeeded += status == 0
                    failed += [name] if status else []
                    bar.write(summary(name, cells[name], status, config.directory), file=sys.stderr)
                bar.update(sum(result.exists() for result in results) - bar.n)
                time.sleep(0.5)
        finally:
            for process, _ in running.values():
                process.terminate()  # train.py saves its state on SIGTERM
            for process, _ in running.values():
                process.wait()
    return failed


def start(config: StudyConfig, name: str, cell: TrainConfig, slot: int) -> subprocess.Popen:
    """One run: train.py with its output in a file and its share of the cores, on a GPU of its own where there are any."""
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // config.parallel))} | os.environ
    if config.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % config.gpus)
    with open(f"{config.directory / name}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, str(TRAIN), *command_line(cell)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the study, which then ends its runs
        )


def command_line(cell: TrainConfig) -> list[str]:
    """The arguments that give train.py this TrainConfig: a flag for each value that is not the default."""
    words = []
    for field in fields(TrainConfig):
        value = getattr(cell, field.name)
        if value != field.default:
            values = value if isinstance(value, list | tuple) else [value] if value is not True else []
            words += [cli.flag(field.name), *map(str, values)]
    return words


def summary(name: str, cell: TrainConfig, status: int, out: Path) -> str:
    if status:
        return f"{name}: failed with status {status}: {last_line(f'{out / name}.log')}"
    results = [read_json(Path(cell.out) / m / "result.json") for m in cell.method]
    which = "test" if results[0]["test_accuracy"] is not None else "validation"
    return f"{name}: " + ", ".join(f"{r['method']} {r[f'{which}_accuracy']:.1%}" for r in results) + f" ({which})"


def last_line(log: str) -> str:
    lines = Path(log).read_text("utf-8").splitlines()
    return next((line for line in reversed(lines) if line.startswith("train.py: ")), f"see {log}")


fail = partial(cli.fail, "dss.study")


if __name__ == "__main__":
    cli.run("dss.study", main)
