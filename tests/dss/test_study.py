"""The study: its grid, its statistics, its files, and that nothing finished is ever run twice."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from running import ROOT, wait_until, write_rows

from data.jsonl import Record, write_jsonl
from dss.config import parse_args
from dss.study import __main__ as study
from dss.study.__main__ import StudyConfig, command_line
from dss.study.presets import PRESETS
from dss.study.report import summarise

QUICK = "--steps 4 --eval_every 2 --log_every 2 --batch_size 4 --warmup 1 --max_target_length 8".split()
ROWS = [Record(f"r{i}", f"How many are {i}?", str(i % 3), f"Count {i}.", str(i % 2)) for i in range(30)]


@pytest.fixture
def files(tmp_path):
    return write_rows(tmp_path, ROWS, 20)


def run(*arguments):
    return study.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a study of one run."""
    directory = tmp_path_factory.mktemp("finished")
    assert run(*write_rows(directory, ROWS, 20), *ONE, "--out", directory / "study") == 0
    return directory / "study"


ONE = [*QUICK, "--method", "standard", "--seed", "0"]


def times(out):
    return {path: path.stat().st_mtime_ns for path in sorted(out.rglob("result.json"))}


def test_a_study_runs_its_grid_once_and_a_wider_one_adds_to_it(files, tmp_path, capsys, refused):
    out = tmp_path / "study"
    grid = [*files, *QUICK, "--method", "standard", "dss", "--jobs", "2", "--out", out]
    assert run(*grid, "--seed", "0", "1") == 0
    shown = capsys.readouterr().out
    made = {p.parent.relative_to(out).as_posix() for p in times(out)}
    assert made == {f"gold-tiny-1-seed{s}/{m}" for s in (0, 1) for m in ("standard", "dss")}
    content = json.loads((out / "study.json").read_text())
    assert [g["method"] for g in content["groups"]] == ["standard", "dss"] and len(content["runs"]) == 4
    assert content["groups"][1]["seeds"] == [0, 1] and len(content["groups"][1]["interval"]) == 2
    assert 0 <= content["lines"]["teacher"] < 1, "the teacher is sometimes wrong in these rows"
    assert (out / "study.md").read_text() in shown and "| gold | tiny | 1 | 18 | dss |" in shown

    before = times(out)
    assert "--resume goes on" in refused(study.main, *grid, "--seed", "0", "1"), "it exists"
    assert run(*grid, "--seed", "0", "1", "--resume") == 0 and times(out) == before
    assert "2 of them done before" in capsys.readouterr().out
    assert run(*grid, "--seed", "0", "--subsample", "0.5", "1", "--resume") == 0
    assert before.items() < times(out).items() and len(times(out)) == 6
    if (out / "accuracy_by_share.png").exists():  # matplotlib is optional
        assert (out / "accuracy_by_share.png").read_bytes()[:4] == b"\x89PNG"


def test_a_study_gives_each_run_several_processes(files, tmp_path, capsys):
    out = tmp_path / "study"
    grid = [*files, *QUICK, "--method", "dss", "--seed", "0", "--processes", "2", "--device", "cpu", "--out", out]
    assert run(*grid) == 0 and "1 at a time" in capsys.readouterr().out
    assert "2 x cpu" in (out / "gold-tiny-1-seed0.log").read_text()


def test_other_settings_or_rows_are_refused_by_name(files, tmp_path, refused, finished):
    out = shutil.copytree(finished, tmp_path / "study")
    grid, before = [*files, *ONE, "--out", out], times(out)
    assert "--lr 0.001, not --lr 0.5" in refused(study.main, *grid, "--resume", "--lr", "0.5")
    write_jsonl(files[1], [Record("new", "How many?", "1", "Count.")] * 20)
    assert "other rows" in refused(study.main, *grid, "--resume") and times(out) == before


def test_a_stopped_study_goes_on_where_it_was_and_leaves_no_run_behind(files, tmp_path):
    """Killed while its first run trains, which then ends by itself, and stopped by Ctrl-C in the second."""
    out = tmp_path / "study"
    quick = ["--steps", "80", "--eval_every", "10", *QUICK[4:], "--method", "standard", "dss", "--seed", "0", "1"]
    arguments = [*files, *quick, "--jobs", "1", "--resume", "--out", str(out)]
    command = [sys.executable, "-m", "dss.study", *arguments]
    done = {}
    for stop, status, seed in ((signal.SIGKILL, -signal.SIGKILL, 0), (signal.SIGINT, 130, 1)):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        first = out / f"gold-tiny-1-seed{seed}" / "standard" / "result.json"
        wait_until(first.exists)
        process.send_signal(stop)
        process.communicate(timeout=60)
        assert process.returncode == status
        wait_until(lambda: str(out) not in commands())
        assert str(out) not in commands()
        before, done = done, times(out)
        assert first in done and len(done) < 3 + seed and before.items() <= done.items()
    assert run(*arguments) == 0
    assert len(times(out)) == 4 and done.items() < times(out).items()


def commands():
    """The command lines of all processes here: that of a run has its --out."""
    return subprocess.run("cat /proc/[0-9]*/cmdline", shell=True, capture_output=True, text=True).stdout


def test_bad_input_ends_in_one_line_and_nothing_is_made(files, tmp_path, refused):
    for wrong, what in (
        (["--data", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--subsample", "0.5", "2"], "--subsample must be"),
        (["--jobs", "-1"], "--jobs must be"),
        (["--weights", tmp_path], "config.json: missing"),
    ):
        assert what in refused(study.main, *files, *QUICK, *wrong, "--out", tmp_path / "study")
        assert not (tmp_path / "study").exists()


def test_a_cell_has_the_command_line_of_its_settings():
    """A study's run, repeated by hand with the same flags, is the same run. (A weight decay of 0 was once left out.)"""
    for name in ("toy", "cqa-base", "svamp-large"):
        cells = StudyConfig(**PRESETS[name], preset=name, data_dir="D").cells()
        for cell in cells.values():
            assert parse_args(command_line(cell)) == cell


def test_presets_have_the_papers_settings():
    cells = StudyConfig(**PRESETS["cqa-base"], preset="cqa-base", data_dir="D").cells()
    cell = cells["gold-google--t5-v1_1-base-1-seed3"]
    assert (cell.steps, cell.batch_size, cell.learning_rate, cell.schedule) == (10_000, 64, 5e-5, "linear")
    assert (cell.data, cell.test_data) == (("D/cqa_train.jsonl",), "D/cqa_test.jsonl")
    assert round(cell.eval_fraction * 9741) == 975 and cell.weights == "google/t5-v1_1-base"


def test_students_of_one_name_are_two_runs():
    """The last part of the path alone named a run, and of two students called `student` one was left out."""
    cells = StudyConfig(weights=["a/dss/student", "./b/dss/student"], seed=[0]).cells()
    assert sorted(cells) == ["gold-a--dss--student-1-seed0", "gold-b--dss--student-1-seed0"]


def test_overwrite_deletes_runs_and_nothing_else(files, tmp_path, refused, finished):
    """It deleted a directory of a run's name whatever was in it."""
    mine = tmp_path / "mine" / "gold-tiny-1-seed0" / "standard" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    said = refused(study.main, *files, *ONE, "--overwrite", "--out", tmp_path / "mine")
    assert "is not the output of a run" in said and mine.exists()
    out = shutil.copytree(finished, tmp_path / "study")
    before = times(out)
    assert run(*files, *ONE, "--overwrite", "--out", out) == 0
    assert times(out).keys() == before.keys() and times(out) != before


def test_gains_are_paired_within_a_run():
    base = dict(labels="gold", student="tiny", share=1.0, rows=4, steps=1, tokens=1, seconds=1, parameters=1)
    runs = []
    for seed, (standard, dss) in enumerate([([1, 0, 0, 0], [1, 1, 0, 0]), ([1, 1, 1, 0], [1, 1, 1, 1])]):
        for method, answers in (("standard", standard), ("dss", dss)):
            answers = np.array(answers)
            runs.append(base | dict(run=f"r{seed}", seed=seed, method=method, answers=answers, accuracy=answers.mean()))
    standard, dss = summarise(runs)
    assert standard["accuracy"] == 0.5 and dss["accuracy"] == 0.75 and dss["gain"] == 0.25 and "gain" not in standard
    assert np.isclose(standard["deviation"], np.std([0.25, 0.75], ddof=1))


def test_without_matplotlib_the_table_says_how_to_get_pictures(files, tmp_path, capsys, monkeypatch, finished):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*files, *ONE, "--resume", "--out", shutil.copytree(finished, tmp_path / "study")) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
