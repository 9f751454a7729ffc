"""The benchmark: that peers compute what ours does, and that a failure does not end it."""

import json

import numpy as np
import pytest
import torch
from comparing import DEVICE, needs_triton

from kernels import bench

pytestmark = needs_triton
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture(autouse=True)
def on_the_device():
    """Where main() makes inputs, too: compiled kernels take no CPU tensors."""
    with torch.device(DEVICE):
        yield


@without_gpu
def test_without_a_gpu_it_prints_what_is_known_without_one(capsys, tmp_path):
    flags = ["--only", "encoder CQA 64", "geglu CQA 64", "--json", str(tmp_path / "rows")]
    assert bench.main(flags) == 0
    assert "no GPU: nothing is timed" in capsys.readouterr().out
    attention, geglu = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert 0 < attention["useful"] < 1 and "both" not in attention and "useful" not in geglu
    assert attention["MB"] == pytest.approx(139, abs=5), "46 MB forward and 92 backward"


@pytest.mark.parametrize("dataset", bench.DATASETS)
def test_lengths_are_like_those_of_the_data_sets(dataset):
    mean, _, longest, label, rationale = bench.DATASETS[dataset]
    inputs, targets = bench.draw_lengths(dataset, 2000)
    assert len(inputs) == len(targets) == 4000
    assert np.mean(inputs) == pytest.approx(mean, rel=0.02)
    assert max(inputs) <= longest and min(targets) >= 1
    assert np.mean(targets) == pytest.approx((label + rationale) / 2, rel=0.03)


SMALL = [
    bench.attention_case("encoder", "small", [5, 9], [5, 9]),
    bench.attention_case("decoder", "small", [5, 9], [5, 9]),
    bench.linear_loss_case("small", 16, V=70),
    bench.rms_norm_case("small", 16),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_compute_what_ours_does(case, monkeypatch):
    """In fp32, and without gradients, which FlexAttention lacks on a CPU."""
    leaf = lambda *shape, dtype=None: torch.randn(*shape)
    monkeypatch.setattr(bench, "leaf", leaf)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    results = {}
    for name in {"ours", "eager", "flex", "torch"} & case.peers.keys():
        torch.manual_seed(0)  # each makes its own inputs
        results[name] = case.peers[name]()()
    assert len(results) >= 2
    for result in results.values():
        torch.testing.assert_close(result, results["ours"], rtol=1e-4, atol=1e-5)


def test_an_implementation_that_raises_is_noted_and_the_next_is_timed(monkeypatch):
    case = bench.geglu_case("small", 16)
    case.peers = dict(ours=case.peers["ours"], broken=lambda: 1 / 0, eager=case.peers["eager"])
    monkeypatch.setattr(bench, "microseconds", lambda function, short: (function(), 2.0)[1])
    row = bench.measure_case(case, roof=1.0)
    assert row == dict(
        forward=2.0, both=2.0, share=0.5, broken="ZeroDivisionError: division by zero", eager=1.0
    )
