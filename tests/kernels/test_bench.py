"""The benchmark: that its peers are peers, and that a failure does not end it."""

import pytest
import torch
from comparing import needs_triton

from data import cli
from dss.bench import BenchConfig
from kernels import bench

pytestmark = needs_triton
KERNELS = ["attention", "cross_entropy", "linear_cross_entropy", "rms_norm", "geglu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(
    "line, word", [("", "needs a GPU"), ("--only softmax", "softmax"), ("--json no/f", "--json")]
)
def test_without_a_gpu_and_with_bad_arguments_it_is_one_line_and_exit_2(line, word, refused):
    said = refused(bench.main, *line.split())
    assert word in said and said.startswith("python -m kernels.bench: ")


def test_the_most_wanted_cases_come_first_and_each_kernel_has_its_turn():
    names = list(bench.cases())
    assert [name.split()[0] for name in names[:5]] == KERNELS and len(names) > 25
    assert names[0] == bench.COUNTED[-1] == "attention encoder N=1024 D=64"


def test_dss_bench_takes_the_arguments_that_all_gives_it():
    assert cli.parse(bench.STEPS[1:], BenchConfig).dtype == "bfloat16"


@pytest.fixture
def no_compiler(monkeypatch):
    """What torch.compile compiles on a GPU, in plain PyTorch."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    bench.flex_attention.cache_clear()
    yield
    bench.flex_attention.cache_clear()


def test_a_case_that_fails_is_reported_and_the_next_is_timed(monkeypatch, no_compiler):
    timed = dict.fromkeys([*bench.COLUMNS[2:], "both rate", "both roofline"], 1.0) | dict(
        unit="GB/s"
    )
    monkeypatch.setattr(
        bench, "timings", lambda case, function, inputs, best: (function(**inputs), timed)[1]
    )
    case = bench.geglu(16, 48, torch.float32)
    case.peers = {"a peer": (lambda gate, up: 1 / 0, case.inputs)}
    rows = {row["implementation"]: row for row in bench.measure("geglu", case, {})}
    assert list(rows) == ["ours", "a peer", "eager", "torch.compile", "ours, again"]
    assert "ZeroDivisionError: division by zero" in bench.show(rows["a peer"])
    assert bench.show(rows["eager"]).count("|") == len(bench.COLUMNS) + 1


SMALL = [(bench.attention, use, 2, 48, 2, 32) for use in ("encoder", "decoder", "cross")]
SMALL += [(bench.cross_entropy, 8, 70), (bench.linear_cross_entropy, 16, 8, 70)]
SMALL += [(bench.rms_norm, 16, 48), (bench.geglu, 16, 48)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("make, size", [(make, size) for make, *size in SMALL])
def test_peers_compute_what_ours_does(make, size, no_compiler):
    """In fp32, forward alone, which is what FlexAttention has on a CPU."""
    detached = lambda inputs: {name: x if x is None else x.detach() for name, x in inputs.items()}
    todo = make(*size, torch.float32).todo()
    got = {name: function(**detached(inputs)) for name, (function, inputs) in todo.items()}
    others = {
        "ours with dropout 0.1",
        "ours without bias",
        "torch, no weights",
    }  # they compute something else
    others |= {"SDPA without bias"} if "SDPA, materialised bias" in got else set()
    for name in got.keys() - others:
        torch.testing.assert_close(got[name], got["eager"], rtol=1e-4, atol=1e-5)
