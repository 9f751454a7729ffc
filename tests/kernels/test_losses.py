"""Cross-entropy, of given logits and from hidden states, against its formula."""

import pytest
import torch
import torch.nn.functional as F
from comparing import (
    DEVICE,
    DTYPES,
    TRITON,
    both,
    compare,
    needs_gpu,
    needs_triton,
    relative_error,
    wide,
)

from kernels import losses
from kernels.losses import IGNORE, launch_rows


def rows(T, V, dtype=torch.float32, seed=0):
    """Random logits (T, V), labels of which a third is ignored, weights in [0, 1)."""
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(T, V, generator=g)).to(dtype)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[torch.rand(T, generator=g) < 0.3] = IGNORE
    return logits.to(DEVICE), labels.to(DEVICE), torch.rand(T, generator=g).to(DEVICE)


def matrices(T, V, C, dtype=torch.float32):
    """Random hidden states (T, C) and output matrix (V, C)."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, C, generator=g).to(dtype).to(DEVICE) for n in (T, V)]


def formula(logits, labels, weights):
    keep = labels != IGNORE
    log_p = wide(logits)[keep].log_softmax(-1)
    return -(weights[keep] * log_p.gather(1, labels[keep, None])[:, 0]).sum()


def check_logits(ours, T, V, dtype):
    logits, labels, weights = rows(T, V, dtype)
    compare(
        lambda z: ours.cross_entropy(z, labels, weights),
        lambda z: formula(z, labels, weights),
        [logits],
    )


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, V", [(1, 2), (9, 33), (11, 300), (3, 32128), (2, 250112)])
def test_given_logits(ours, T, V, dtype):
    """The last is mT5's vocabulary, whose rows are too long for one block and are read twice."""
    check_logits(ours, T, V, dtype)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "T, V, C, chunks", [(40, 2, 1, 1), (70, 61, 8, 4), (1, 90, 33, 1), (50, 7, 16, 9)]
)
def test_from_hidden_states(ours, T, V, C, dtype, chunks, monkeypatch):
    """However many chunks the tokens are cut into, and with the scale of tied embeddings."""
    monkeypatch.setattr(losses, "LOGITS_BYTES", -(-T * V * dtype.itemsize // chunks))
    _, labels, weights = rows(T, V)
    compare(
        lambda h, w: ours.linear_cross_entropy(h, w, labels, weights, C**-0.5),
        lambda h, w: formula(F.linear(h * C**-0.5, w), labels, weights),
        matrices(T, V, C, dtype),
    )


@needs_triton
def test_weight_gradient_is_summed_in_fp32_however_many_chunks(monkeypatch):
    """bf16 sums over 4 chunks would lose what one chunk keeps."""
    _, labels, weights = rows(64, 50)
    hidden, matrix = matrices(64, 50, 16)
    matrix.requires_grad_()
    gradients = []
    for chunks in (1, 4):
        monkeypatch.setattr(losses, "LOGITS_BYTES", 64 * 50 * 2 // chunks)
        loss = TRITON.linear_cross_entropy(hidden.bfloat16(), matrix, labels, weights)
        gradients += torch.autograd.grad(loss, matrix)
    assert gradients[0].dtype == torch.float32
    assert relative_error(gradients[1], gradients[0]) < 1e-6


@both
def test_autocast_multiplies_in_bfloat16_and_keeps_fp32_gradients_of_fp32_weights(ours):
    _, labels, weights = rows(30, 40)
    h, w = (x.requires_grad_() for x in matrices(30, 40, 16))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = ours.linear_cross_entropy(h, w, labels, weights, 0.25)
    in_bfloat16 = formula(F.linear(h.bfloat16() * 0.25, w.bfloat16()), labels, weights)
    assert loss.dtype == torch.float32
    want = torch.autograd.grad(in_bfloat16, [h, w])
    for a, b in zip(torch.autograd.grad(loss, [h, w]), want):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 1e-2, "two roundings to bf16 apart"


@both
def test_strides_of_rows_columns_labels_and_weights(ours):
    logits, labels, weights = rows(7, 40)
    want = ours.cross_entropy(logits, labels, weights)
    wider = torch.zeros(7, 64, device=DEVICE)
    wider[:, :40] = logits
    assert torch.equal(ours.cross_entropy(wider[:, :40], labels, weights), want)
    by_columns = ours.cross_entropy(logits.T.contiguous().T, labels, weights)
    torch.testing.assert_close(by_columns, want)
    far_labels, far_weights = (torch.stack([x, x], 1)[:, 0] for x in (labels, weights))
    assert torch.equal(ours.cross_entropy(logits, far_labels, far_weights), want)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_logits_and_all_ignored(ours, dtype):
    """exp(80) overflows in half precision and, squared, in fp32; the row maximum prevents it."""
    values = [[80.0, -80.0, 0.0], [-80.0, 80.0, -80.0]]
    logits = torch.tensor(values, dtype=dtype, device=DEVICE, requires_grad=True)
    ones = torch.ones(2, device=DEVICE)
    right = torch.tensor([1, 1], device=DEVICE)
    loss, nll = ours.cross_entropy(logits, right, ones, return_token_losses=True)
    assert loss == 160 and nll.tolist() == [160, 0] and not nll.requires_grad
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient.float().cpu(), torch.tensor([[1.0, -1, 0], [0, 0, 0]]))
    ignored = torch.full_like(right, IGNORE)
    loss, nll = ours.cross_entropy(logits, ignored, ones, return_token_losses=True)
    assert loss == 0 and (nll == 0).all()
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


@both
def test_a_confident_label_keeps_the_digits_of_p_minus_1(ours):
    """p = 1 - 1.2e-4, but the bf16 number below 1 is 1 - 4e-3: subtracting in bf16 gives 0."""
    logits = torch.tensor([[9.0, 0.0]], dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    label = torch.tensor([0], device=DEVICE)
    loss = ours.cross_entropy(logits, label, torch.ones(1, device=DEVICE))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 0].item() == pytest.approx(-1.234e-4, rel=1e-2)


@both
def test_a_token_of_weight_zero_is_as_if_it_were_not_there(ours):
    _, labels, weights = rows(20, 50)
    weights[::2] = 0
    hidden, matrix = (x.requires_grad_() for x in matrices(20, 50, 8))
    results = []
    for kept in (slice(None), slice(1, None, 2)):
        loss = ours.linear_cross_entropy(hidden[kept], matrix, labels[kept], weights[kept])
        results.append([loss, *torch.autograd.grad(loss, [hidden, matrix])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@needs_triton
def test_in_float16_the_upstream_factor_comes_before_rounding_or_gradients_are_refused():
    """A loss scaler's factor saves entries that float16 cannot hold."""
    logits = torch.zeros(1, 300, dtype=torch.float16, device=DEVICE, requires_grad=True)
    label = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    loss = TRITON.cross_entropy(logits, label, torch.full((1,), 1e-6, device=DEVICE))
    (2.0**16 * loss).backward()
    assert logits.grad[0, 1].item() == pytest.approx(2.0**16 * 1e-6 / 300, rel=1e-3)
    hidden, matrix = matrices(1, 300, 8, torch.float16)
    weights = torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="use bfloat16"):
        TRITON.linear_cross_entropy(hidden.requires_grad_(), matrix, label, weights)
    with torch.no_grad():
        assert TRITON.linear_cross_entropy(hidden, matrix, label, weights).isfinite()


@needs_triton
def test_labels_and_weights_on_another_device_are_refused():
    logits, labels, weights = rows(3, 5)
    with pytest.raises(ValueError, match="cross_entropy: tensors on several devices, .* on meta"):
        TRITON.cross_entropy(logits, labels.to("meta"), weights)
    with pytest.raises(ValueError, match="linear_cross_entropy: tensors on several devices"):
        TRITON.linear_cross_entropy(logits, logits[:2], labels, weights.to("meta"))


@both
def test_inputs_are_left_as_they_were_and_only_wanted_gradients_are_made(ours):
    logits, labels, weights = rows(5, 30)
    before = logits.clone()
    (2 * ours.cross_entropy(logits.requires_grad_(), labels, weights)).backward()
    assert torch.equal(logits.detach(), before)
    hidden, matrix = matrices(5, 30, 8)
    assert not ours.linear_cross_entropy(hidden, matrix, labels, weights).requires_grad
    ours.linear_cross_entropy(hidden, matrix.requires_grad_(), labels, weights).backward()
    assert hidden.grad is None and matrix.grad is not None


@both
def test_the_upstream_factor_counts_in_each_backward_pass(ours):
    logits, labels, weights = rows(3, 5)
    loss = ours.cross_entropy(logits.requires_grad_(), labels, weights)
    once, thrice, again = (
        torch.autograd.grad(factor * loss, logits, retain_graph=True)[0] for factor in (1, 3, 1)
    )
    torch.testing.assert_close(thrice, 3 * once)
    assert torch.equal(once, again)


WRONG = [
    (dict(labels=torch.zeros(2, dtype=torch.long)), r"logits \[3, 4\], labels and weights must"),
    (dict(labels=torch.zeros(3)), "labels and weights must be .* int64"),
    (dict(labels=torch.tensor([0, 4, -100])), r"labels must be in \[0, 4\) or -100, not .4."),
    (dict(weights=torch.ones(3, requires_grad=True)), "weights get no gradient"),
]


@both
@pytest.mark.parametrize("change, word", WRONG)
def test_arguments_that_do_not_fit_are_named(ours, change, word):
    good = dict(labels=torch.zeros(3, dtype=torch.long), weights=torch.zeros(3)) | change
    with pytest.raises(ValueError, match=word):
        ours.cross_entropy(torch.zeros(3, 4), **good)
    with pytest.raises(ValueError, match=word):
        ours.linear_cross_entropy(torch.zeros(3, 2), torch.zeros(4, 2), **good)
    with pytest.raises(ValueError, match="hidden and weight"):
        ours.linear_cross_entropy(torch.zeros(3, 2), torch.zeros(4, 3), **good)


@both
def test_no_tokens_are_no_loss(ours):
    hidden = torch.zeros(0, 8, device=DEVICE)
    matrix = torch.ones(30, 8, device=DEVICE, requires_grad=True)
    loss = ours.linear_cross_entropy(hidden, matrix, hidden[:, 0].long(), hidden[:, 0])
    assert loss == 0 and (torch.autograd.grad(loss, matrix)[0] == 0).all()


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
def test_infinite_logits_of_an_ignored_row_add_nothing():
    values = [[0.0, 1.0], [float("inf"), 0.0]]
    logits = torch.tensor(values, device=DEVICE, requires_grad=True)
    labels = torch.tensor([0, IGNORE], device=DEVICE)
    TRITON.cross_entropy(logits, labels, torch.ones(2, device=DEVICE)).backward()
    assert (logits.grad[1] == 0).all() and logits.grad[0].isfinite().all()


@needs_triton
@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_a_label_that_the_host_could_not_look_at_gives_nan(label):
    """On a GPU a wrong label is not seen before the launch; it must not count as logit 0."""
    logits, labels, weights = rows(2, 40)
    nll = torch.zeros(2, device=DEVICE)
    launch_rows(logits, None, torch.full_like(labels, label), weights, nll)
    assert nll.isnan().all()


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=needs_gpu) for dtype in DTYPES])
def test_rows_at_full_size(dtype):
    """A step's tokens with T5's vocabulary, and with mT5's."""
    for T, V in ((8192, 32128), (512, 250112)):
        check_logits(TRITON, T, V, dtype)


@pytest.mark.parametrize("T, C, V", [pytest.param(4096, 768, 32128, marks=needs_gpu)])
def test_full_size_without_a_look_from_the_host_and_in_a_quarter_of_the_memory(T, C, V):
    """T5-base, bf16; the memory is that of all logits at once. Repeats are equal bit for bit."""
    hidden, matrix = (x.requires_grad_() for x in matrices(T, V, C, torch.bfloat16))
    labels = torch.randint(0, V, (T,), device=DEVICE)
    weights = torch.rand(T, device=DEVICE)
    gradients = []
    for sync in ("default", "error"):  # the first run compiles, which may wait
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode(sync)
        loss = TRITON.linear_cross_entropy(hidden, matrix, labels, weights, C**-0.5)
        gradients.append(torch.autograd.grad(loss, [hidden, matrix]))
        torch.cuda.set_sync_debug_mode("default")
        peak = torch.cuda.max_memory_allocated() - before
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert peak < T * V * (2 + 4 + 4 + 2) / 4, "bf16 and fp32 logits and their gradients"
