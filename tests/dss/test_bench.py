"""The benchmark compares like with like: it finds a peer that computes something else, and counts what there is."""

import json

import pytest
import torch

from dss import bench

SMALL = ["--batch-size", "3", "--questions", "5", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return bench.Setting(
        bench.arguments.parse(SMALL, bench.BenchConfig), tmp_path_factory.mktemp("student")
    )


@pytest.mark.parametrize("name", [bench.EAGER, bench.SDPA])
def test_ours_is_the_released_recipe_faster(setting, transformers, name, measured):
    """Loss and gradient of one step, and the tokens decoded, are those of transformers."""
    found = bench.check_training(setting, name)
    measured(f"{name}: loss", found["loss"], 1e-6)
    measured(f"{name}: gradient", found["gradient"], 2e-6)
    assert bench.decoder(setting, name)(setting.inputs) == bench.decoder(setting, bench.OURS)(
        setting.inputs
    )


def test_a_peer_that_computes_something_else_ends_it_with_1(
    transformers, monkeypatch, capsys, tmp_path
):
    loss, out = bench.recipe_loss, tmp_path / "b.json"
    monkeypatch.setattr(bench, "recipe_loss", lambda model, rows: 1.001 * loss(model, rows))
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 0)
    assert bench.main([*SMALL, "--what", "training", "--json", str(out)]) == 1
    assert "computes something else" in capsys.readouterr().err
    report = json.loads(out.read_text())
    assert (
        report["training"]["ours"]["x ours"] == 1
        and 0 < report["training"]["ours"]["of the machine"] < 2
    )
    assert report["transformers-sdpa, differences"]["loss"] == pytest.approx(1e-3, rel=0.01)


def test_ratios_are_of_one_turn_each(monkeypatch):
    clock = iter(
        [0, 9, 0, 9, 0, 1, 0, 3, 0, 2, 0, 4, 0, 4, 0, 4]
    )  # begin and end of ours and of the peer
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    row = bench.take_turns(dict.fromkeys(("ours", "peer"), lambda _: None), lambda turn: turn, 3)[
        "peer"
    ]
    assert (
        row["x ours, quartile 1"],
        row["x ours"],
        row["x ours, quartile 3"],
        row["seconds"],
    ) == (1.5, 2.0, 2.5, 4)


def test_peak_memory_is_that_of_a_process_of_its_own(setting):
    """A large tensor here must not count there."""
    large = torch.ones(2**27)  # half a gigabyte
    assert 50e6 < bench.peak_memory(setting, "training", bench.OURS) < large.numel() * 4 + 200e6
