"""The loss is the paper's: that of transformers' two padded passes, however a step is cut, and at lambda = 0."""

import pytest
import torch
from comparing import relative_error
from running import student

from dss.batch import LABEL, RATIONALE, Sequence, count_targets, pack
from dss.loss import distillation_loss
from dss.weights import checkpoint_name, save_t5

ROWS = [  # (question, label, rationale)
    ([5, 6, 7, 1], [11, 1], [12, 13, 14, 1]),
    ([8, 9, 10, 11, 12, 1], [13, 14, 1], [15, 1]),
    ([5, 1], [16, 1], [17, 18, 19, 20, 21, 22, 1]),
    ([30, 31, 32, 1], [33, 1], None),
]
PREDICT, EXPLAIN = [50], [51]  # stand-ins for the prefixes


def dual_task(rows):
    sequences = []
    for question, label, rationale in rows:
        sequences.append(Sequence(PREDICT + question, label, LABEL))
        if rationale:
            sequences.append(Sequence(EXPLAIN + question, rationale, RATIONALE))
    return sequences


def gradients(model, batches, lam, counts):
    model.zero_grad()
    losses = [distillation_loss(model, pack(b), *counts, lam) for b in batches]
    sum(L for L, _, _ in losses).backward()
    total = sum(torch.stack([x.detach() for x in three]) for three in losses)
    return total, {n: p.grad for n, p in model.named_parameters()}


def worst_difference(a, b):
    return max(relative_error(a[n], b[n]) for n in b)


@pytest.mark.parametrize("lam", [1.0, 0.3, 4.0])
def test_one_packed_pass_is_transformers_two_padded_passes(transformers, measured, tmp_path, lam):
    """The computation of the paper's released code: pad each task's batch, two forward passes, add the two means."""
    ours = student().eval()
    save_t5(ours, tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()

    def padded(lists, value):
        longest = max(map(len, lists))
        return torch.tensor([ids + [value] * (longest - len(ids)) for ids in lists])

    def task_loss(prefix, pairs):
        inputs = padded([prefix + q for q, _ in pairs], 0)
        return theirs(input_ids=inputs, attention_mask=inputs != 0, labels=padded([t for _, t in pairs], -100)).loss

    label_loss = task_loss(PREDICT, [(q, label) for q, label, _ in ROWS])
    rationale_loss = task_loss(EXPLAIN, [(q, r) for q, _, r in ROWS if r])
    (label_loss + lam * rationale_loss).backward()
    want = {n: dict(theirs.named_parameters())[checkpoint_name(n, ours)].grad for n, _ in ours.named_parameters()}

    sequences = dual_task(ROWS)
    (L, L_label, L_rationale), got = gradients(ours, [sequences], lam, count_targets(sequences))
    torch.testing.assert_close(L_label, label_loss.detach())
    torch.testing.assert_close(L_rationale, rationale_loss.detach())
    torch.testing.assert_close(L, L_label + lam * L_rationale)
    measured(f"lambda {lam}: gradients of one packed pass against two padded passes", worst_difference(got, want), 1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_gradient_does_not_depend_on_micro_batches(size):
    """Means over micro-batches would weigh a token of a short micro-batch more; the counts are of the whole step."""
    model, sequences = student().eval(), dual_task(ROWS)
    counts = count_targets(sequences)
    whole_losses, whole = gradients(model, [sequences], 0.7, counts)
    parts = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    losses, got = gradients(model, parts, 0.7, counts)
    torch.testing.assert_close(losses, whole_losses)
    assert worst_difference(got, whole) < 1e-5


def test_lambda_0_is_standard_finetuning():
    """With rationales in the batch, loss and gradient are those of the labels alone."""
    model, sequences = student().eval(), dual_task(ROWS)
    labels = [s for s in sequences if s.task == LABEL]
    _, standard = gradients(model, [labels], 1.0, count_targets(labels))
    (L, L_label, _), got = gradients(model, [sequences], 0.0, count_targets(sequences))
    assert L_label == L
    assert worst_difference(got, standard) < 1e-5


def test_each_mean_is_over_its_own_tokens():
    """Twice the same rationales leave L as it is; a sum over tokens would double their term."""
    model, sequences = student().eval(), dual_task(ROWS)
    doubled = sequences + [s for s in sequences if s.task == RATIONALE]
    once = distillation_loss(model, pack(sequences), *count_targets(sequences), 1.0)[0]
    twice = distillation_loss(model, pack(doubled), *count_targets(doubled), 1.0)[0]
    torch.testing.assert_close(once, twice)
