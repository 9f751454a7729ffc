"""The benchmark compares like with like, and finds a peer that computes something else."""

import json

import pytest

from dss import bench

SMALL = ["--batch-size", "3", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    config = bench.cli.parse(SMALL, bench.BenchConfig, "dss.bench")
    return bench.prepare(config, tmp_path_factory.mktemp("student"))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_released_recipe_computes_the_same(setting, transformers, name, measured):
    """Loss of one step, and the tokens decoded."""
    _, ours = bench.trainer(setting, bench.OURS)
    _, theirs = bench.trainer(setting, name)
    measured(f"{name}: loss", abs(theirs / ours - 1), 1e-6)
    assert bench.decoder(setting, name)[1] == bench.decoder(setting, bench.OURS)[1]


def test_a_peer_that_computes_something_else_ends_it_with_1(
    transformers, monkeypatch, capsys, tmp_path
):
    """And a peer that cannot run is left out."""
    loss, out = bench.recipe_loss, tmp_path / "b.json"
    monkeypatch.setattr(bench, "recipe_loss", lambda model, rows: 1.001 * loss(model, rows))
    monkeypatch.setattr(bench, "PEERS", ("eager", "no such attention"))
    load = bench.load
    monkeypatch.setattr(
        bench, "load", lambda setting, name: load(setting, name) if " " not in name else 1 / 0
    )
    assert bench.main([*SMALL, "--what", "training", "--json", str(out)]) == 1
    shown = capsys.readouterr()
    assert "computes something else than ours: eager" in shown.err
    assert "no such attention: not timed: division by zero" in shown.out
    report = json.loads(out.read_text())["training"]
    assert report["ours"]["x ours"] == 1 and list(report) == ["ours", "eager"]


def test_ratios_are_of_one_turn_each(setting, monkeypatch):
    # Begin and end of ours and of the peer, in three turns, of which the first does not count.
    clock = iter([0, 9, 0, 9, 0, 1, 0, 3, 0, 2, 0, 4])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    row = bench.time_in_turns(dict.fromkeys(("ours", "peer"), lambda rows: None), setting)["peer"]
    assert (row["quartile 1"], row["x ours"], row["quartile 3"]) == (2.25, 2.5, 2.75)
    assert row["ms"] == 3500
