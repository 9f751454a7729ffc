"""The optimiser against the formula."""

import math

import pytest
import torch
from running import counting, prepare, write_rows

import train
from dss.config import parse_args


def initial_deviation(name, shape):
    """As T5's own code draws it, for d_model = 64 and d_kv = 32 of the size tiny."""
    if "norm" in name or name == "embedding.weight":
        return 1.0
    if name.endswith(".q.weight"):
        return 1 / math.sqrt(64 * 32)
    if name.endswith("bias_table"):
        return 1 / 8
    return 1 / math.sqrt(shape[1])


@pytest.mark.parametrize("optimizer", ["adamw-scaled", "adamw"])
def test_thirty_steps_follow_the_formula_in_fp64(tmp_path, optimizer, measured):
    settings = ["--optimizer", optimizer, "--lr", "0.02", "--weight-decay", "0.1", "--beta2", "0.9"]
    files = write_rows(tmp_path, counting(40), 36)
    run = prepare(*files, *settings, "--batch-size", "4", "--warmup", "10", "--steps", "30")
    student = run.student
    parameters = dict(student.model.named_parameters())
    want = {name: p.detach().double() for name, p in parameters.items()}
    first = {name: torch.zeros_like(w) for name, w in want.items()}
    second = {name: torch.zeros_like(w) for name, w in want.items()}
    gradients = {}
    adamw = train.make_optimizer(student.model, run.config)
    adamw.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.double() for name, p in parameters.items()})
    )
    examples, _ = train.make_examples(run, "dss")
    works = train.steps_ahead(0, examples, student, run.config, torch.device("cpu"))
    for step, work in enumerate(works):
        rate = 0.02 * min((step + 1) / 10, (30 - step) / 20)
        assert train.learning_rate(step, run.config) == pytest.approx(rate)
        train.train_step(student, adamw, work, rate, run)
        for name, w in want.items():
            scale = initial_deviation(name, w.shape) if optimizer == "adamw-scaled" else 1.0
            g = gradients[name]
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            m = first[name] / (1 - 0.9 ** (step + 1))
            v = second[name] / (1 - 0.9 ** (step + 1))
            w -= scale * rate * (0.1 * w + m / (v.sqrt() + 1e-8))
    difference = max((parameters[name] - w).norm() / w.norm() for name, w in want.items())
    measured(f"thirty steps of {optimizer}", difference.item(), 1e-5)


def test_random_weights_get_scaled_rates_and_pretrained_ones_the_papers():
    assert parse_args([]).scales_rates and parse_args([]).learning_rate == 0.02
    plain = parse_args(["--optimizer", "adamw"])
    assert not plain.scales_rates and plain.learning_rate == 1e-3
    pretrained = parse_args(["--weights", "x"])
    assert not pretrained.scales_rates and pretrained.learning_rate == 5e-5
    assert parse_args(["--weights", "x", "--optimizer", "adamw-scaled"]).scales_rates
