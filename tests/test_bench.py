"""The benchmark: what it does without a GPU, that its check tells right from wrong, that its peers are peers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from kernels import bench

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def run(*arguments):
    command = [sys.executable, "-m", "kernels.bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)


@on_the_cpu
def test_without_a_gpu_it_says_so_and_shows_what_it_can(tmp_path):
    got = run("--quick", "--kernel", "rms_norm", "--json", tmp_path / "r.json", "--plot", tmp_path / "plots")
    assert got.returncode == 0, got.stderr
    assert "No GPU here" in got.stdout and "| rms_norm C=768 | rms_norm_backward_kernel |" in got.stdout
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["machine"]["torch"] == torch.__version__ and content["rows"][0]["both ms"] > 0
    if importlib.util.find_spec("matplotlib"):
        assert os.listdir(tmp_path / "plots") == ["rms_norm.png"]
    else:
        assert "matplotlib is not installed" in got.stderr and not (tmp_path / "plots").exists()
    assert not list(tmp_path.glob("*.replacing"))


def test_bad_arguments_are_one_line_and_exit_2(tmp_path):
    for arguments, word in ((["--kernel", "softmax"], "softmax"), (["--json", tmp_path / "no" / "f.json"], "--json")):
        got = run(*arguments)
        assert got.returncode == 2 and word in got.stderr.splitlines()[-1] and "Traceback" not in got.stderr
    assert "--quick" in run("--help").stdout


def small(kernel):
    """The first case of a kernel on the CPU, in fp32; eager is then exact, and our error may be 1e-5."""
    return next(bench.cases(kernel, CPU, quick=True, dtype=torch.float32))()


@on_the_cpu
@pytest.mark.parametrize("kernel", list(bench.KERNELS))
def test_the_check_passes_ours_and_fails_one_gradient_that_is_off(kernel):
    case = small(kernel)
    if kernel == "attention":
        case.parts = case.parts[:1]
    assert bench.worst_ratio(case, case.ours) <= bench.RATIO
    last = max(i for i, x in enumerate(case.inputs) if x is not None)

    def wrong(*inputs):  # the right output, and a gradient of the last input that is off by a thousandth
        inputs = list(inputs)
        inputs[last] = 1.001 * inputs[last] - 0.001 * inputs[last].detach()
        return case.ours(*inputs)

    assert bench.worst_ratio(case, wrong) > bench.RATIO


def test_a_case_that_fails_its_check_is_reported_and_not_timed(monkeypatch):
    case = small("geglu")
    case.ours = lambda gate, up: gate * up
    case.variants = {"a peer": lambda gate, up: 1 / 0}
    monkeypatch.setattr(bench, "timings", lambda *_: dict.fromkeys(("forward ms", "both ms"), 1.0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    rows = {row["implementation"]: row for row in bench.measure(case, 3, {})}
    assert rows["eager"]["both ms"] == 1.0
    monkeypatch.undo()
    assert "FAILED its check" in rows["ours"]["failed"] and "both ms" not in rows["ours"]
    assert "FAILED its check" in bench.show(rows["ours"])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("use", range(3))
def test_the_attention_peers_compute_attention(use, monkeypatch):
    """SDPA with its gradients; FlexAttention, which is compiled on a GPU, in plain PyTorch and forward only."""
    from torch.nn.attention.flex_attention import flex_attention

    case = list(bench.cases("attention", CPU, quick=True, dtype=torch.float32))[use]()
    assert bench.worst_ratio(case, case.peers["SDPA, materialised bias"]) <= bench.RATIO
    monkeypatch.setattr(bench, "compiled_flex", lambda: flex_attention)
    bench.causal_mask.cache_clear()
    inputs = [x if x is None else x.detach() for x in case.inputs]
    got = case.peers["FlexAttention, learned table"](*inputs)
    torch.testing.assert_close(got, case.eager(*inputs), rtol=1e-4, atol=1e-5)
