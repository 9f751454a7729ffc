"""The benchmark compares like with like: it finds a peer that computes something else, and counts what there is."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dss import bench
from dss.batch import LABEL, RATIONALE, Sequence

SMALL = ["--batch-size", "3", "--questions", "5", "--repeats", "2", "--max-new-tokens", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    config = bench.arguments.parse(SMALL, bench.BenchConfig)
    return bench.prepare(config, tmp_path_factory.mktemp("student"))


@pytest.mark.parametrize("name", [bench.EAGER, bench.SDPA])
def test_ours_is_the_released_recipe_faster(setting, transformers, name, measured):
    """Loss and gradient of one step, and the tokens decoded, are those of transformers."""
    found = bench.check_training(setting, name)
    measured(f"{name}: loss", found["loss"], 1e-6)
    measured(f"{name}: gradient", found["gradient"], 2e-6)
    inputs = bench.questions(setting)
    assert bench.decoder(setting, name)(inputs) == bench.decoder(setting, bench.OURS)(inputs)


def test_a_peer_that_computes_something_else_ends_it_with_1(setting, transformers, monkeypatch, capsys, tmp_path):
    loss = bench.recipe_loss
    monkeypatch.setattr(bench, "recipe_loss", lambda model, rows: 1.001 * loss(model, rows))
    monkeypatch.setattr(bench, "peak_of", lambda *_: None)
    out = tmp_path / "b.json"
    argv = [*SMALL, "--what", "training", "--peers", bench.SDPA, "--json", str(out)]
    assert bench.main(argv) == 1
    assert "computes something else" in capsys.readouterr().err
    report = json.loads(out.read_text())
    assert report["training"]["ours"]["ratio"] == 1 and len(report["training"][bench.SDPA]["all seconds"]) == 2
    assert report["transformers-sdpa, differences"]["loss"] == pytest.approx(1e-3, rel=0.01)


def test_products_are_those_that_a_step_on_these_tokens_takes(setting):
    """As PyTorch counts them, for sequences of one length, where there is no padding to count."""
    rows = [[Sequence(list(range(3, 11)), list(range(3, 11)), task) for task in (LABEL, RATIONALE)]] * 2
    with FlopCounterMode(display=False) as counter:
        bench.our_loss(setting.load(bench.OURS), rows).backward()
    counted = counter.get_total_flops()
    c = setting.shape.config
    causal = 3 * 4 * (4 * 8 * 8 // 2) * c.num_heads * c.d_kv * c.num_decoder_layers  # it counts what is masked, too
    assert bench.products(setting.shape, rows) == counted - causal


def test_ratios_are_of_one_turn_each():
    rows = bench.summary({"ours": [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)], "peer": [(3.0, 1.0), (4.0, 1.0), (4.0, 1.0)]})
    assert (rows["peer"]["ratio"], rows["peer"]["ratio from"], rows["peer"]["ratio to"]) == (2.0, 1.5, 2.5)
    assert rows["peer"]["seconds"] == 4.0


def test_peak_memory_is_that_of_a_process_of_its_own():
    """A large tensor here must not count there."""
    large = torch.ones(2**27)  # half a gigabyte
    peak = bench.peak_of(bench.OURS, "training", SMALL)
    assert 50e6 < peak < large.numel() * 4 + 200e6


def test_too_few_rows_are_said_in_one_line(capsys):
    assert bench.main(["--questions", "100000"]) == 2
    assert capsys.readouterr().err.startswith("dss.bench: ")
