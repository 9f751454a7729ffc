"""The benchmark: that its check tells right from wrong, that its peers are peers, that a failure does not end it."""

import pytest
import torch
from comparing import needs_triton

from data import arguments
from dss.bench import BenchConfig
from kernels import bench

pytestmark = needs_triton
FP32 = torch.float32  # in which eager is exact enough and our error may be 1e-5
SMALL = {
    "attention": lambda use="encoder": bench.attention(use, 2, 48, 2, 32, FP32),
    "cross_entropy": lambda: bench.cross_entropy(8, 70, FP32),
    "linear_cross_entropy": lambda: bench.linear_cross_entropy(16, 8, 70, FP32),
    "rms_norm": lambda: bench.rms_norm(16, 48, FP32),
    "geglu": lambda: bench.geglu(16, 48, FP32),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(
    "argv, word", [([], "needs a GPU"), (["--only", "softmax"], "softmax"), (["--json", "no/f"], "--json")]
)
def test_without_a_gpu_and_with_bad_arguments_it_is_one_line_and_exit_2(argv, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    (said,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and word in said and said.startswith("python -m kernels.bench: ")


def test_the_most_wanted_cases_come_first_and_each_kernel_has_its_turn():
    names = list(bench.cases())
    assert [name.split()[0] for name in names[:5]] == list(SMALL) and len(names) > 25
    assert names[0] == bench.COUNTED[-1] == "attention encoder N=1024 D=64"


def test_dss_bench_takes_the_arguments_that_all_gives_it():
    assert arguments.parse(bench.STEPS[1:], BenchConfig).dtype == "bfloat16"


@pytest.mark.parametrize("kernel", SMALL)
def test_the_check_passes_ours_and_fails_one_gradient_that_is_off(kernel):
    case = SMALL[kernel]()
    assert bench.worst_ratio(case, case.ours) <= bench.RATIO
    last = [name for name, x in case.inputs.items() if x is not None][-1]

    def wrong(**inputs):  # the right output, and a gradient of the last input that is off by a thousandth
        inputs[last] = 1.001 * inputs[last] - 0.001 * inputs[last].detach()
        return case.ours(**inputs)

    assert bench.worst_ratio(case, wrong) > bench.RATIO


def test_a_case_that_fails_its_check_is_reported_and_the_next_is_timed(monkeypatch):
    case, timed = SMALL["geglu"](), dict.fromkeys([*bench.COLUMNS[3:], "both rate", "both roofline"], 1.0)
    case.ours, case.peers = lambda gate, up: gate * up, {"a peer": lambda gate, up: 1 / 0}
    monkeypatch.setattr(bench, "timings", lambda *_: timed | dict(unit="GB/s"))
    rows = {row["implementation"]: row for row in bench.measure("geglu", case, {})}
    assert "times eager's error; not timed" in bench.show(rows["ours"]) and "both ms" not in rows["ours"]
    assert "ZeroDivisionError" in bench.show(rows["a peer"])
    assert bench.show(rows["eager"]).count("|") == len(bench.COLUMNS) + 1 and rows["eager"]["both ms"] == 1.0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("use", ["encoder", "decoder", "cross"])
def test_the_attention_peers_compute_attention(use, monkeypatch):
    """SDPA with the bias as a leaf; FlexAttention, which is compiled on a GPU, in plain PyTorch and forward only."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    bench.flex_attention.cache_clear()
    case = SMALL["attention"](use)
    function, inputs = case.variants["SDPA without bias" if use == "cross" else "SDPA, materialised bias"]
    detached = lambda inputs: {name: x if x is None else x.detach() for name, x in inputs.items()}
    want = case.eager(**detached(case.inputs))
    torch.testing.assert_close(function(**detached(inputs)), want, rtol=1e-4, atol=1e-5)
    got = case.peers["FlexAttention, learned table"](**detached(case.inputs))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    bench.flex_attention.cache_clear()
