"""The whole model on the Triton kernels against the same model on the references: a training step and generation."""

import pytest
import torch
from comparing import DEVICE, relative_error
from running import V1_1, student

pytest.importorskip("triton", reason="Triton is not installed here")

from dss.batch import LABEL, RATIONALE, Sequence, count_targets, pack
from dss.generate import generate
from dss.loss import distillation_loss

WIDE = dict(d_model=32, d_kv=16, d_ff=48, num_heads=2, dropout_rate=0.0)
V1_0 = dict(feed_forward_proj="relu")
SEQUENCES = [
    Sequence([5, 6, 7, 8, 1], [11, 1], LABEL),
    Sequence([9, 6, 7, 8, 1], [12, 13, 14, 15, 1], RATIONALE),
    Sequence([9, 1], [16, 1], LABEL),
    Sequence([*range(3, 60), 1], [*range(20, 55), 1], RATIONALE),
]


def model_of(shape, **changes):
    model = student(**(WIDE | shape | changes)).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initial ones and from alike scores
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def train_step(model, monkeypatch, kernels, bf16=False, sequences=SEQUENCES):
    """(L, L_label, L_rationale) and {name: gradient} of one step."""
    monkeypatch.setenv("DSS_KERNELS", kernels)
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        losses = distillation_loss(model, pack(sequences, DEVICE), *count_targets(sequences), lam=0.5)
    losses[0].backward()
    return torch.stack([x.detach() for x in losses]), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [V1_0, V1_1], ids=["T5 1.0", "T5 1.1"])
def test_every_gradient_of_a_training_step(shape, monkeypatch, measured):
    model = model_of(shape)
    losses, gradients = train_step(model, monkeypatch, "triton")
    want_losses, want = train_step(model, monkeypatch, "reference")
    torch.testing.assert_close(losses, want_losses, rtol=1e-5, atol=1e-6)
    assert all((g != 0).any() for g in want.values()), "a parameter that plays no part compares nothing"
    worst = max(relative_error(gradients[name], want[name]) for name in want)
    measured(f"Triton against reference: worst of {len(want)} gradients of a training step", worst, 2e-5)


def test_every_gradient_under_bfloat16_autocast(monkeypatch, measured):
    """fp32 master weights, products in bf16: Triton is at most twice as far from fp32 as the reference."""
    model = model_of(V1_1)
    exact = train_step(model, monkeypatch, "reference")[1]
    ours = train_step(model, monkeypatch, "triton", bf16=True)[1]
    theirs = train_step(model, monkeypatch, "reference", bf16=True)[1]
    assert all(g.dtype == torch.float32 for g in ours.values())
    worst = max(relative_error(ours[n], exact[n]) / max(relative_error(theirs[n], exact[n]), 5e-3) for n in exact)
    measured("Triton against reference, bf16: worst ratio of their gradients' errors against fp32", worst, 2.0)


def test_dropout_trains_and_follows_torch_s_seed(monkeypatch):
    model = model_of(V1_1, dropout_rate=0.2, num_layers=1, num_decoder_layers=1).train()
    one, again, other = (
        torch.manual_seed(seed) and train_step(model, monkeypatch, "triton", sequences=SEQUENCES[:2])
        for seed in (1, 1, 2)
    )
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0], other[0])
    assert all(torch.equal(one[1][name], again[1][name]) and one[1][name].isfinite().all() for name in one[1])


def test_generation_is_equal(monkeypatch):
    model = model_of(V1_0).eval()
    inputs = [[5, 6, 7, 8, 1], [9, 1], [*range(3, 43), 1]]
    written = []
    for kernels in ("triton", "reference"):
        monkeypatch.setenv("DSS_KERNELS", kernels)
        written.append(generate(model, inputs, max_new_tokens=5))
    assert written[0] == written[1] and any(written[0])
