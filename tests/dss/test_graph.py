"""A captured step is the plain step on the same padded batch, and padding changes nothing."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from comparing import DEVICE, needs_gpu, needs_triton, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from running import SIX, V1_1, counting, run, student, weights, write_rows

import train
from dss import distributed, graph
from dss.batch import (
    LABEL,
    RATIONALE,
    Budget,
    Sequence,
    count_targets,
    count_tokens,
    join,
    make_step,
    pack,
)
from dss.config import parse_args
from dss.loss import distillation_loss
from dss.student import Student
from kernels.compile import recording

ids = st.lists(st.integers(1, 60), min_size=1, max_size=12)
a_sequence = st.builds(Sequence, ids, ids, st.sampled_from([LABEL, RATIONALE]))
some_sequences = st.lists(a_sequence, min_size=1, max_size=6)
# Small, with heads of a width for which there are Triton kernels.
SHAPE = dict(V1_1, d_kv=16, num_heads=2, num_layers=1, num_decoder_layers=1)


def rows(seed, number=4):
    """Rows of two sequences, the last without a rationale."""
    g = torch.Generator().manual_seed(seed)

    def some_ids(most):
        length = int(torch.randint(1, most, (1,), generator=g))
        return torch.randint(3, 61, (length,), generator=g).tolist()

    made = []
    for _ in range(number):
        question = some_ids(40)
        label = Sequence(question, some_ids(5), LABEL)
        made.append([label, Sequence(question, some_ids(30), RATIONALE)])
    made[-1].pop()
    return made


BATCHES = [rows(seed) for seed in range(5)]
BUDGET = Budget.of([join(batch) for batch in BATCHES])
TOO_LARGE = rows(9, number=20)


def works(device=DEVICE):
    """Steps, all of which fit but the fourth."""
    batches = [*BATCHES[:3], TOO_LARGE, *BATCHES[3:]]
    return [make_step(batch, 0, device, budget=BUDGET) for batch in batches]


class Trained:
    """A student, and what train.py gives to its `train_step`."""

    def __init__(self, dropout=0.1, dtype="float32"):
        config = parse_args(["--device", DEVICE, "--dtype", dtype, "--optimizer", "adamw-scaled"])
        placement = distributed.placement(config, torch.device(DEVICE))
        self.run = SimpleNamespace(config=config, placement=placement)
        model = student(**SHAPE, dropout_rate=dropout).to(DEVICE)
        self.student = Student(model, None, dtype=dtype)
        self.optimizer = train.make_optimizer(model, config)

    def step(self, function, number, work):
        distributed.seed(5, number)
        rate = 0.01 / (1 + number)
        losses, norm = function(self.student, self.optimizer, work, rate, self.run)
        return [*losses.tolist(), norm.item()]

    def weights(self):
        return list(self.student.model.parameters())


def plain_step(student, optimizer, work, rate, run):
    """train_step with the counts and the rate in tensors, as a captured step has them."""
    given = graph.to_tensors(work, rate, torch.device(DEVICE))
    return train.train_step(student, optimizer, given.work, given.rate, run)


class FakeGraph:
    """What torch.cuda.graph makes of a step, on a CPU: a replay calls the step."""

    def __init__(self, step):
        self.step = step
        self.results = (torch.zeros(3), torch.zeros(()))
        self.replays = 0

    def replay(self):
        self.replays += 1
        for result, new in zip(self.results, self.step()):
            result.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """The fake graphs that have been recorded."""
    made = []

    def record(step):
        made.append(FakeGraph(step))
        return made[-1], made[-1].results

    monkeypatch.setattr(graph, "record", record)
    return made


# ---- Padding -------------------------------------------------------------------------------------


@given(st.lists(some_sequences, min_size=1, max_size=4))
def test_each_batch_that_set_a_budget_is_filled_up_to_it(batches):
    budget = Budget.of(batches)
    for sequences in batches:
        filled = sequences + budget.padding(sequences)
        assert len(filled) == budget.sequences
        assert sum(len(s.input_ids) for s in filled) == budget.input_tokens
        assert sum(len(s.target_ids) for s in filled) == budget.target_tokens
        assert min(count_tokens([s]) for s in filled) >= 2
        assert count_targets(filled[: len(sequences)]) == count_targets(sequences)
    assert budget.padding(batches[0] * 40) == [], "more sequences than it has"
    longer = Sequence([1] * budget.input_tokens, [1], LABEL)
    assert budget.padding([longer]) == [], "more tokens than it has"


@settings(max_examples=8)
@given(some_sequences)
def test_padding_changes_neither_loss_nor_gradient(sequences):
    model = student(**SHAPE, dropout_rate=0.0)
    counts = count_targets(sequences)
    padding = Budget.of([sequences]).padding(sequences)
    found = []
    for batch in (pack(sequences), pack(sequences + padding)):
        losses = distillation_loss(model, batch, *counts, 0.5)
        model.zero_grad()
        losses[0].backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((torch.stack(losses), gradient))
    (losses, gradient), (padded_losses, padded_gradient) = found
    assert relative_error(padded_losses, losses) < 1e-6
    assert relative_error(padded_gradient, gradient) < 1e-5


# ---- Which step is captured ----------------------------------------------------------------------


def test_steps_that_fit_are_replayed_from_the_second_on_with_the_bits_of_plain_ones(graphs):
    plain = Trained()
    ours = Trained()
    captured = graph.CapturedStep(train.train_step)
    replays = []
    assert [work.padded for work in works()] == [True] * 3 + [False] + [True] * 2
    for number, work in enumerate(works()):
        want = plain.step(plain_step, number, work)
        assert ours.step(captured, number, work) == want
        replays.append([made.replays for made in graphs])
    assert replays == [[], [1], [2], [2], [3], [4]]
    assert all(torch.equal(a, b) for a, b in zip(plain.weights(), ours.weights()))
    assert not any(group["capturable"] for group in ours.optimizer.param_groups)


def test_a_failed_capture_is_one_warning_and_plain_steps(monkeypatch, capsys):
    def fail(step):
        step()  # what a capture that fails has changed on the host
        raise RuntimeError("operation not permitted\nCUDA kernel errors might be")

    monkeypatch.setattr(graph, "record", fail)
    captured = graph.CapturedStep(lambda *arguments: calls.append(arguments) or "results")
    calls = []
    ours = Trained()
    for work in works():
        assert captured(ours.student, ours.optimizer, work, 0.1, ours.run) == "results"
    assert len(calls) == len(works()) + 1, "tried once"
    words = "DSS_GRAPH=1: a step could not be captured (operation not permitted); plain steps"
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not any(group["capturable"] for group in ours.optimizer.param_groups)


@needs_triton
def test_a_captured_step_launches_what_a_plain_one_launches(monkeypatch):
    """Kernels, grids, numbers, and shapes and dtypes of the tensors, as on a GPU."""
    monkeypatch.setenv("DSS_KERNELS", "triton")
    found = []
    for device_numbers in (False, True):
        ours = Trained()
        work = works()[0]
        with recording("sm_90") as launches:
            ours.step(plain_step if device_numbers else train.train_step, 0, work)
        found.append([signature(launch) for launch in launches])
    assert found[0] == found[1]
    assert len(found[0]) > 25


def signature(launch):
    arguments = []
    for value in launch.arguments:
        if isinstance(value, torch.Tensor):
            value = (value.shape, value.stride(), value.dtype)
        arguments.append(value)
    return launch.kernel.__name__, launch.grid, arguments, launch.options


PLANS = [  # device, kernels, flags; what is said
    ("cuda", "triton", "", ""),
    ("cuda", "reference", "", "the reference operations wait for the GPU"),
    ("cpu", "triton", "", "CUDA graphs need a GPU, not cpu"),
    ("cuda", "triton", "--micro-batch 2", "not with --micro-batch"),
    ("cuda", "triton", "--checkpoint-activations", "--checkpoint-activations"),
    ("cuda", "triton", "--shard", "several processes and --shard"),
]


@pytest.mark.parametrize("device, choice, flags, words", PLANS)
def test_what_cannot_be_captured_is_one_warning(monkeypatch, capsys, device, choice, flags, words):
    monkeypatch.setattr("kernels.choice", lambda device: choice)
    config = parse_args(flags.split())
    device = torch.device(device)
    assert not graph.is_wanted(config, device), "nobody asked"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("DSS_GRAPH", "1")
    assert graph.is_wanted(config, device) == (words == "")
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == (words != "")


def test_another_value_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DSS_GRAPH", "yes")
    assert run(f"--out {tmp_path}/out") == 2
    assert capsys.readouterr().err == "train.py: DSS_GRAPH must be 0 or 1, got 'yes'\n"
    assert not (tmp_path / "out").exists()


def test_a_run_with_captured_steps_ends_as_one_with_plain_steps(graphs, monkeypatch, tmp_path):
    """train.py pads the batches and hands them over; the graph is a fake one."""
    files = " ".join(write_rows(tmp_path, counting(24), 20))
    for name, answer in (("captured", True), ("plain", False)):
        monkeypatch.setattr(graph, "is_wanted", Mock(return_value=answer))
        assert run(files, SIX, f"--dropout 0 --out {tmp_path}/{name}") == 0
    assert [made.replays for made in graphs] == [5]
    found = [weights(tmp_path / name / "dss") for name in ("captured", "plain")]
    assert max(relative_error(found[0][name], found[1][name]) for name in found[0]) < 1e-5


# ---- On a GPU ------------------------------------------------------------------------------------


def workspaces():
    """Bytes that cuBLAS held until now: 32 MiB a stream, and a graph is captured on its own."""
    held = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return held - torch.cuda.memory_allocated()


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=needs_gpu)])
def test_a_captured_step_has_the_bits_of_a_plain_one_in_as_much_memory(dtype):
    """With dropout; and the host waits for nothing once the step is captured."""
    peaks = []
    found = []
    for function in (plain_step, graph.CapturedStep(train.train_step)):
        ours = Trained(dtype=dtype)
        results = []
        workspaces()
        torch.cuda.reset_peak_memory_stats()
        for number, work in enumerate(works()):
            results.append(ours.step(function, number, work))
        peaks.append(torch.cuda.max_memory_allocated() - workspaces())
        found.append((results, [w.tolist() for w in ours.weights()]))
    assert function.graph is not None and peaks[1] <= 1.1 * peaks[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(ours.student, ours.optimizer, work, 0.01, ours.run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found[0] == found[1]
