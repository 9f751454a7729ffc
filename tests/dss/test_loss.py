"""The loss is that of the paper's released code, however a step is divided."""

import pytest
import torch
from comparing import relative_error
from running import student

from dss.batch import LABEL, RATIONALE, Sequence, count_targets, pack
from dss.bench import padded
from dss.loss import distillation_loss
from dss.weights import checkpoint_name, save_t5

ROWS = [  # (question, label, rationale)
    ([5, 6, 7, 1], [11, 1], [12, 13, 14, 1]),
    ([8, 9, 10, 11, 12, 1], [13, 14, 1], [15, 1]),
    ([5, 1], [16, 1], [17, 18, 19, 20, 21, 22, 1]),
    ([30, 31, 32, 1], [33, 1], None),
]
PREDICT = [50]  # stand-ins for the prefixes
EXPLAIN = [51]
SEQUENCES = []
for question, label, rationale in ROWS:
    SEQUENCES.append(Sequence(PREDICT + question, label, LABEL))
    if rationale:
        SEQUENCES.append(Sequence(EXPLAIN + question, rationale, RATIONALE))


def gradients(model, parts, lam, counts):
    """The losses (3,), and the gradients by name, of a step in these parts."""
    model.zero_grad()
    total = torch.zeros(3)
    for part in parts:
        losses = distillation_loss(model, pack(part), *counts, lam)
        losses[0].backward()
        total += torch.stack([loss.detach() for loss in losses])
    return total, {name: p.grad for name, p in model.named_parameters()}


def worst_difference(a, b):
    return max(relative_error(a[name], b[name]) for name in b)


@pytest.mark.parametrize("lam", [0.3, 0.0])
def test_one_packed_pass_is_transformers_two_padded_passes(transformers, measured, tmp_path, lam):
    """The released code pads each task's batch, makes two forward passes and adds two means. With
    lambda = 0 that is standard finetuning."""
    ours = student().eval()
    save_t5(ours, tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()

    def task_loss(task):
        some = [s for s in SEQUENCES if s.task == task]
        inputs = padded([s.input_ids for s in some], 0)
        labels = padded([s.target_ids for s in some], -100)
        return theirs(input_ids=inputs, attention_mask=inputs != 0, labels=labels).loss

    label_loss = task_loss(LABEL)
    rationale_loss = task_loss(RATIONALE)
    (label_loss + lam * rationale_loss).backward()
    their_parameters = dict(theirs.named_parameters())
    want = {}
    for name, _ in ours.named_parameters():
        want[name] = their_parameters[checkpoint_name(name, ours)].grad

    losses, got = gradients(ours, [SEQUENCES], lam, count_targets(SEQUENCES))
    want_losses = [label_loss + lam * rationale_loss, label_loss, rationale_loss]
    torch.testing.assert_close(losses, torch.stack(want_losses).detach())
    worst = worst_difference(got, want)
    measured(f"lambda {lam}: gradients of one packed pass against two padded", worst, 1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_the_gradient_does_not_depend_on_micro_batches(size):
    """A mean over each micro-batch would weigh the tokens of a short one more."""
    model = student().eval()
    counts = count_targets(SEQUENCES)
    whole_losses, whole = gradients(model, [SEQUENCES], 0.7, counts)
    parts = [SEQUENCES[i : i + size] for i in range(0, len(SEQUENCES), size)]
    losses, got = gradients(model, parts, 0.7, counts)
    torch.testing.assert_close(losses, whole_losses)
    assert worst_difference(got, whole) < 1e-5
