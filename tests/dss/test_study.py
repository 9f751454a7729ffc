"""The study: its grid, its files, and that nothing finished is ever trained twice."""

import itertools
import json
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import Mock

import numpy as np
import pytest
from running import wait_until, write_rows

import train
from data.jsonl import Record
from dss import study
from dss.config import parse_args

QUICK = "--steps 4 --eval_every 2 --log_every 2 --batch_size 4 --warmup 1".split()
ROWS = [
    Record(f"r{i}", f"How many are {i}?", str(i % 3), f"Count {i}.", str(i % 2)) for i in range(30)
]
ONE = [*QUICK, "--method", "standard", "--seed", "0"]
CELL = "labels=gold,size=tiny,subsample=1.0,method=standard,seed=0"


@pytest.fixture
def files(tmp_path):
    return write_rows(tmp_path, ROWS, 20)


def run(*arguments):
    return study.main([str(a) for a in arguments])


def run_here(words, log, slot):
    """study.start, but the run is made in this process, at once."""
    with open(log, "a") as file, redirect_stdout(file), redirect_stderr(file):
        status = train.main(words)
    return Mock(returncode=status, poll=lambda: status)


def times(out):
    return {path: path.stat().st_mtime_ns for path in sorted(out.rglob("result.json"))}


def cells(*arguments):
    """{directory of a cell: what its command line means to train.py}."""
    config, train_flags = study.parse([str(a) for a in arguments])
    configs = [parse_args(study.command(c, config, train_flags)) for c in study.make_cells(config)]
    return {c.out: c for c in configs}


def test_a_study_runs_its_grid_once_and_a_wider_one_adds_to_it(
    files, tmp_path, capsys, refused, monkeypatch
):
    monkeypatch.setattr(study, "start", run_here)
    out = tmp_path / "study"
    first = [*files, *ONE, "--out", out]
    assert run(*first) == 0
    shown = capsys.readouterr().out
    before = times(out)
    assert [path.parent.parent.name for path in before] == [CELL]
    (group,) = json.loads((out / "study.json").read_text())["groups"]
    assert "gain" not in group and 0 < group["commonest_label"] < 1
    assert (out / "study.md").read_text() in shown and "| gold | tiny | 1 | standard | 1 |" in shown
    assert "--resume goes on" in refused(study.main, *first), "it exists"
    assert run(*first, "--resume", "--subsample", "0.5", "1", "--jobs", "2") == 0
    assert before.items() < times(out).items() and len(times(out)) == 2


BEST = {("standard", 0.1), ("dss", 0.01)}


def test_each_method_gets_the_rate_that_is_best_on_validation_rows(files, tmp_path, monkeypatch):
    """The runs are stood in for; only what their validation rows say depends on the rate."""
    ran = []

    def run_cells(cells, config, train_flags, stop):
        for cell in cells:
            directory = config.directory / study.directory_name(cell) / cell["method"]
            directory.mkdir(parents=True, exist_ok=True)
            accuracy = 0.9 if (cell["method"], cell["lr"]) in BEST else 0.5
            result = dict(FIGURES, validation_score=accuracy)
            (directory / "result.json").write_text(json.dumps(result))
            (directory / "predictions.jsonl").write_text('{"correct": true}\n')
            ran.append((cell["method"], cell["lr"], cell["seed"]))
        return False

    monkeypatch.setattr(study, "run_cells", run_cells)
    grid = ["--method", "standard", "dss", "--lr", "0.1", "0.01", "--seed", "3", "4"]
    assert run(*files, *grid, "--out", tmp_path / "study") == 0
    assert {seed for _, _, seed in ran[:4]} == {3}
    assert {cell[:2] for cell in ran[4:]} == BEST and len(ran) == 8


def test_a_stopped_study_leaves_no_run_behind_and_goes_on_where_it_was(
    files, tmp_path, monkeypatch
):
    out = tmp_path / "study"
    flags = "--eval_every 40 --steps 40 --method standard --seed 0 1".split()
    arguments = [*files, *QUICK, *flags, "--out", out, "--resume"]
    start = study.start
    started = []

    def finish_one_and_stop_the_next(words, log, slot):
        if "seed=0" in log.name:
            return run_here(words, log, slot)
        started.append(start(words, log, slot))
        wait_until((out / log.stem / "standard" / "metrics.jsonl").exists)
        signal.raise_signal(signal.SIGINT)
        return started[0]

    monkeypatch.setattr(study, "start", finish_one_and_stop_the_next)
    assert run(*arguments) == 130
    assert [process.returncode for process in started] == [130]
    before = times(out)
    assert len(before) == 1
    monkeypatch.setattr(study, "start", run_here)
    assert run(*arguments) == 0
    assert len(times(out)) == 2 and before.items() < times(out).items()


def test_a_run_that_fails_is_named(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "start", run_here)
    out = tmp_path / "study"
    assert run(*files, *ONE, "--lr", "1e30", "--clip", "0", "--out", out) == 1
    assert "try a smaller --lr" in capsys.readouterr().err


def test_presets_have_the_papers_settings_and_a_flag_beside_one_overrides_it():
    made = cells("--preset", "cqa-base", "--data-dir", "a b", "--seed", "3")
    (cell,) = [c for c in made.values() if c.method == ("dss",)]
    assert (cell.steps, cell.batch_size, cell.learning_rate, cell.schedule) == (
        10_000,
        64,
        5e-5,
        "linear",
    )
    assert (cell.data, cell.test_data) == (("a b/cqa_train.jsonl",), "a b/cqa_test.jsonl")
    assert round(cell.eval_fraction * 9741) == 975 and cell.weights == "google/t5-v1_1-base"
    assert (cell.weight_decay, cell.warmup, cell.beta2, cell.seed) == (0, 0, 0.999, 3)
    assert {c.steps for c in cells("--preset", "cqa-base", "--steps=7").values()} == {7}
    for name in study.PRESETS:
        assert cells("--preset", name, "--seed", "0")


def test_students_of_one_name_are_two_runs():
    """Once the last part of the path alone named a run."""
    made = cells("--weights", "a/dss/student", "b/dss/student", "--method", "dss", "--seed", "0")
    assert len(made) == 2 and {c.weights for c in made.values()} == {
        "a/dss/student",
        "b/dss/student",
    }


FIGURES = dict(rows=18, steps=1, seconds=1, commonest_label=0.25, bag_of_words=None, doubt="")


def make_runs():
    """Two seeds of two methods at two numbers of rows."""
    runs = []
    for rows, method, seed in itertools.product((10, 20), ("standard", "dss"), (0, 1)):
        right = 1 + 2 * seed + (method == "dss")  # of 4
        cell = dict(size="tiny", subsample=rows / 20, method=method, seed=seed)
        result = FIGURES | dict(rows=rows)
        runs.append(study.FinishedRun(cell, result, (np.arange(4) < right).astype(int)))
    return runs


def test_gains_are_paired_within_a_seed():
    standard, dss, *_ = study.summarise(make_runs())
    assert standard["accuracy"] == 0.5 and dss["accuracy"] == 0.75
    assert dss["gain"][0] == 0.25 and "gain" not in standard
    assert np.isclose(standard["deviation"], np.std([0.25, 0.75], ddof=1))
    assert (standard["commonest_label"], standard["bag_of_words"]) == (0.25, None)


def test_the_picture_has_a_line_for_each_method_and_baseline(tmp_path, monkeypatch):
    figure = pytest.importorskip(
        "matplotlib.figure", reason="matplotlib, which draws the picture, is not installed"
    )
    shown = []
    monkeypatch.setattr(
        figure.Figure, "legend", lambda self, **_: shown.extend(self.axes[0].get_lines())
    )
    study.draw(study.summarise(make_runs()), tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"
    levels = {tuple(line.get_ydata()) for line in shown if list(line.get_xdata()) == [10, 20]}
    assert levels >= {(0.5, 0.5), (0.75, 0.75), (0.25, 0.25)}


def test_without_matplotlib_the_table_says_how_to_get_the_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "No picture: it needs matplotlib" in study.write_report(tmp_path, make_runs())
    assert not (tmp_path / "study.png").exists()
    one_size = study.write_report(tmp_path, make_runs()[:4])
    assert "No picture" not in one_size, "one number of rows gives no line"
