"""The benchmark: that its check tells right from wrong, that its peers are peers, that a failure does not end it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparing import needs_triton

from kernels import bench

pytestmark = needs_triton
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = {  # in fp32, where eager is exact enough and our error may be 1e-5
    "attention": lambda use="encoder": bench.attention_case(use, 2, 48, 2, 32, CPU, torch.float32),
    "cross_entropy": lambda: bench.cross_entropy_case(8, 70, CPU, torch.float32),
    "linear_cross_entropy": lambda: bench.linear_case(16, 8, 70, CPU, torch.float32),
    "rms_norm": lambda: bench.rms_norm_case(16, 48, CPU, torch.float32),
    "geglu": lambda: bench.geglu_case(16, 48, CPU, torch.float32),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_and_with_bad_arguments_it_is_one_line_and_exit_2(capsys):
    for arguments, word in (([], "needs a GPU"), (["--kernel", "softmax"], "softmax"), (["--json", "no/f"], "--json")):
        with pytest.raises(SystemExit) as stopped:
            bench.main(arguments)
        last = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and word in last and last.startswith("python -m kernels.bench: ")
    run = subprocess.run([sys.executable, "-m", "kernels.bench", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "--minutes" in run.stdout


def test_the_most_wanted_cases_come_first_and_each_kernel_has_its_turn():
    made = [make.func.__name__ for make in bench.cases(bench.KERNELS, CPU, quick=False)]
    assert len(set(made[:5])) == 5 and len(made) > 25
    first = next(bench.cases(["attention"], CPU, quick=True))
    assert first.args[:5] == ("encoder", 64, 1024, 12, 64)


@pytest.mark.parametrize("kernel", bench.KERNELS)
def test_the_check_passes_ours_and_fails_one_gradient_that_is_off(kernel):
    case = SMALL[kernel]()
    assert bench.worst_ratio(case, case.ours) <= bench.RATIO
    last = max(i for i, x in enumerate(case.inputs) if x is not None)

    def wrong(*inputs):  # the right output, and a gradient of the last input that is off by a thousandth
        inputs = list(inputs)
        inputs[last] = 1.001 * inputs[last] - 0.001 * inputs[last].detach()
        return case.ours(*inputs)

    assert bench.worst_ratio(case, wrong) > bench.RATIO


def test_a_case_that_fails_its_check_is_reported_and_the_next_is_timed(monkeypatch):
    case = SMALL["geglu"]()
    case.ours, case.peers = lambda gate, up: gate * up, {"a peer": lambda gate, up: 1 / 0}
    monkeypatch.setattr(bench, "timings", lambda *_: dict.fromkeys(("forward ms", "both ms"), 1.0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    rows = {row["implementation"]: row for row in bench.measure(case, 3, {})}
    assert "FAILED its check" in bench.show(rows["ours"]) and "both ms" not in rows["ours"]
    assert "ZeroDivisionError" in rows["a peer"]["failed"] and rows["eager"]["both ms"] == 1.0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("use", ["encoder", "decoder", "cross"])
def test_the_attention_peers_compute_attention(use, monkeypatch):
    """SDPA with the bias as a leaf; FlexAttention, which is compiled on a GPU, in plain PyTorch and forward only."""
    from torch.nn.attention.flex_attention import flex_attention

    case = SMALL["attention"](use)
    detach = lambda inputs: [x if x is None else x.detach() for x in inputs]
    want = case.eager(*detach(case.inputs))
    name = "SDPA without bias" if use == "cross" else "SDPA, materialised bias"
    function, inputs = case.variants[name]
    torch.testing.assert_close(function(*detach(inputs)), want, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(bench, "compiled_flex", lambda: flex_attention)
    bench.causal_mask.cache_clear()
    got = case.peers["FlexAttention, learned table"](*detach(case.inputs))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
