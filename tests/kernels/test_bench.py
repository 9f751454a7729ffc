"""The benchmark: that peers compute what ours does, and that a failure does not end it."""

import json

import numpy as np
import pytest
import torch
from comparing import needs_triton

import kernels
from kernels import bench

pytestmark = needs_triton
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@without_gpu
def test_without_a_gpu_it_prints_what_is_known_without_one(capsys, tmp_path):
    names = ["encoder CQA 64", "geglu CQA 64"]
    assert bench.main(["--only", *names, "--json", str(tmp_path / "rows")]) == 0
    printed = capsys.readouterr().out
    assert "no GPU: nothing is timed" in printed and "geglu CQA 64 rows" in printed
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) == 2 and 0 < rows[0]["useful"] < 1 and rows[0]["both"] is None
    assert rows[0]["megabytes"] == pytest.approx(139, abs=5), "46 MB forward and 92 backward"


@without_gpu
@pytest.mark.parametrize("flags", [["--only", "softmax"], ["--json", "no/such/file"]])
def test_wrong_arguments_are_one_line_and_exit_2(flags, refused):
    problem = refused(bench.main, *flags)
    assert problem.startswith(f"python -m kernels.bench: {flags[0]}")


@pytest.mark.parametrize("dataset", bench.DATASETS)
def test_lengths_are_like_those_of_the_data_sets(dataset):
    mean, percentile, longest, label, rationale = bench.DATASETS[dataset]
    inputs, targets = bench.draw_lengths(dataset, 2000)
    assert len(inputs) == len(targets) == 4000
    assert np.mean(inputs) == pytest.approx(mean, rel=0.02)
    assert np.percentile(inputs, 95) == pytest.approx(percentile, rel=0.05)
    assert max(inputs) <= longest and min(targets) >= 1
    assert np.mean(targets) == pytest.approx((label + rationale) / 2, rel=0.03)


@pytest.fixture
def plain(monkeypatch):
    """Leaves are fp32 without gradient (FlexAttention has none on a CPU); nothing is compiled."""

    def leaf(*shape, dtype=None, scale=1.0):
        return torch.randn(*shape) * scale

    monkeypatch.setattr(bench, "leaf", leaf)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "case, peers",
    [
        (bench.Attention("encoder", [5, 40], [5, 40]).case("small"), {"flex", "eager"}),
        (bench.Attention("decoder", [5, 40], [5, 40]).case("small"), {"eager"}),
        (bench.loss_case("small", 16, linear=True, V=70), {"torch", "eager"}),
        (bench.loss_case("small", 16, linear=False, V=70), {"eager"}),
        (bench.norm_case("small", 16), {"eager"}),
        (bench.geglu_case("small", 16), {"eager"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_peers_compute_what_ours_does(case, peers, plain):
    results = {}
    for name in ("ours", *peers):
        torch.manual_seed(0)  # each makes its own inputs
        results[name] = case.peers[name]().function()
    if "flex" in peers:
        results["flex"] = results["flex"][0].transpose(0, 1)  # (1, H, T, D) -> (T, H, D)
    for name in peers:
        torch.testing.assert_close(results[name], results["ours"], rtol=1e-4, atol=1e-5)


def test_an_implementation_that_raises_is_noted_and_the_next_is_timed(monkeypatch):
    def microseconds(function, short):
        function()
        return 2.0 if short else 3.0

    monkeypatch.setattr(bench, "microseconds", microseconds)
    case = bench.geglu_case("small", 16)
    case.peers = dict(ours=case.peers["ours"], broken=lambda: 1 / 0, eager=case.peers["eager"])
    row = bench.Row(case.name, None, 1.0, roof=1.0)
    bench.measure(case, row)
    assert row.both == row.forward == 2.0 and row.peers == dict(eager=1.0)
    assert "broken failed: ZeroDivisionError: division by zero" in row.line()


def test_every_kernel_has_a_case():
    names = [case.name for case in bench.all_cases()]
    assert names[0].startswith("attention encoder CQA 64") and len(set(names)) == len(names)
    operations = {name.split()[0] for name in names}
    assert operations == {"attention", "linear_cross_entropy", "cross_entropy", "rms_norm", "geglu"}
    assert all(hasattr(kernels, operation) for operation in operations)
