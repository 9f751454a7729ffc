"""Cross-entropy, of given logits and from hidden states, against its formula: loss and gradients."""

import pytest
import torch
import torch.nn.functional as F
from comparing import (
    DEVICE,
    DTYPES,
    REFERENCE,
    TRITON,
    both,
    compare,
    needs_gpu,
    needs_triton,
    relative_error,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import losses
from kernels.losses import IGNORE, launch_rows


def rows(T, V, seed, dtype=torch.float32, scale=3.0):
    """Random logits (T, V), labels of which a third is ignored, weights in [0, 1)."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(T, V, generator=g) * scale).to(dtype)
    labels = torch.randint(0, V, (T,), generator=g).masked_fill(
        torch.rand(T, generator=g) < 0.3, IGNORE
    )
    return logits.to(DEVICE), labels.to(DEVICE), torch.rand(T, generator=g).to(DEVICE)


def matrices(T, V, C, seed, dtype=torch.float32):
    """Random hidden states (T, C) and output matrix (V, C)."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, C, generator=g).to(dtype).to(DEVICE) for n in (T, V)]


def formula(logits, labels, weights):
    keep = labels != IGNORE
    log_p = wide(logits)[keep].log_softmax(-1)
    return -(weights[keep] * log_p.gather(1, labels[keep, None])[:, 0]).sum()


def check_logits(ours, T, V, seed, dtype):
    logits, labels, weights = rows(T, V, seed, dtype)
    compare(
        lambda z: ours.cross_entropy(z, labels, weights),
        lambda z: formula(z, labels, weights),
        [logits],
    )


def check_linear(ours, T, V, C, seed, dtype, chunks):
    """However many chunks the tokens are cut into, and with the scale of tied embeddings."""
    if ours is TRITON and dtype == torch.float16:
        return  # refused, as a test below says
    _, labels, weights = rows(T, V, seed)
    scale = C**-0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "LOGITS_BYTES", -(-T * V * dtype.itemsize // chunks))
        compare(
            lambda h, w: ours.linear_cross_entropy(h, w, labels, weights, scale),
            lambda h, w: formula(F.linear(h * scale, w), labels, weights),
            matrices(T, V, C, seed, dtype),
        )


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, V", [(6, 2), (9, 33), (1, 7), (41, 300), (3, 32128), (2, 250112)])
def test_loss_and_gradient_of_given_logits(ours, T, V, dtype):
    """The last is mT5's vocabulary, whose rows are too long for one block and are read twice."""
    check_logits(ours, T, V, 0, dtype)


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T, V, C, chunks", [(40, 2, 1, 1), (70, 61, 8, 4), (1, 90, 33, 1), (50, 7, 16, 9)]
)
def test_linear_cross_entropy_and_both_gradients(ours, T, V, C, dtype, chunks):
    check_linear(ours, T, V, C, 0, dtype, chunks)


@pytest.mark.search
@both
@settings(max_examples=100)
@given(
    st.integers(8, 40),
    st.integers(2, 300),
    st.integers(8, 33),
    st.integers(0, 9999),
    st.sampled_from(DTYPES),
)
def test_random_sizes(ours, T, V, C, seed, dtype):
    check_logits(ours, T, V, seed, dtype)
    check_linear(ours, T, V, C, seed, dtype, chunks=1 + seed % 9)


@needs_triton
def test_weight_gradient_is_summed_in_fp32_however_many_chunks(monkeypatch):
    """bf16 sums over 16 chunks would lose what one chunk keeps."""
    T, V, C = 256, 50, 16
    _, labels, weights = rows(T, V, 0)
    hidden, matrix = matrices(T, V, C, 0)
    matrix.requires_grad_()

    def d_matrix(budget):
        monkeypatch.setattr(losses, "LOGITS_BYTES", budget)
        loss = TRITON.linear_cross_entropy(hidden.bfloat16(), matrix, labels, weights)
        return torch.autograd.grad(loss, matrix)[0]

    whole = d_matrix(10**9)
    chunked = d_matrix(T * V * 2 // 16)
    assert whole.dtype == torch.float32
    assert relative_error(chunked, whole) < 1e-6


@both
def test_autocast_multiplies_in_bfloat16_and_keeps_the_gradient_of_fp32_weights_in_fp32(ours):
    _, labels, weights = rows(30, 40, 3)
    h, w = (x.requires_grad_() for x in matrices(30, 40, 16, 3))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = ours.linear_cross_entropy(h, w, labels, weights, 0.25)
    in_bfloat16 = formula((F.linear(h.bfloat16() * 0.25, w.bfloat16())), labels, weights)
    got, want = (torch.autograd.grad(f, [h, w]) for f in (loss, in_bfloat16))
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in got)
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(got, want)), (
        "two roundings to bf16 apart"
    )


@both
def test_rows_of_a_larger_tensor_and_columns_that_are_not_contiguous(ours):
    logits, labels, weights = rows(7, 40, 2)
    wider = torch.zeros(7, 64, device=DEVICE)
    wider[:, :40] = logits
    want = ours.cross_entropy(logits, labels, weights)
    assert torch.equal(ours.cross_entropy(wider[:, :40], labels, weights), want), "row stride"
    torch.testing.assert_close(
        ours.cross_entropy(logits.T.contiguous().T, labels, weights), want, msg="column stride"
    )
    far = torch.stack([labels, labels], 1)[:, 0], torch.stack([weights, weights], 1)[:, 0]
    assert torch.equal(ours.cross_entropy(logits, *far), want), "strides of labels and weights"


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_logits_and_all_ignored(ours, dtype):
    """exp(80) overflows in half precision and, squared, in fp32; the row maximum keeps it finite."""
    logits = torch.tensor(
        [[80.0, -80.0, 0.0], [-80.0, 80.0, -80.0]], dtype=dtype, device=DEVICE, requires_grad=True
    )
    ones, right = torch.ones(2, device=DEVICE), torch.tensor([1, 1], device=DEVICE)
    loss, nll = ours.cross_entropy(logits, right, ones, return_token_losses=True)
    assert loss == 160 and nll.tolist() == [160, 0] and not nll.requires_grad
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient.float().cpu(), torch.tensor([[1.0, -1, 0], [0, 0, 0]]))
    loss, nll = ours.cross_entropy(logits, right * 0 + IGNORE, ones, return_token_losses=True)
    assert loss == 0 and (nll == 0).all() and (torch.autograd.grad(loss, logits)[0] == 0).all()
    if ours is TRITON and dtype == torch.float16:
        return
    weight = torch.ones(5, 3, device=DEVICE, dtype=dtype, requires_grad=True)
    loss = ours.linear_cross_entropy(logits, weight, right * 0 + IGNORE, ones)
    assert all((g == 0).all() for g in torch.autograd.grad(loss, [logits, weight]))


@both
def test_a_confident_label_keeps_the_digits_of_p_minus_1(ours):
    """p = 1 - 1.2e-4, but the bf16 number below 1 is 1 - 4e-3: subtracting in bf16 gives 0."""
    logits = torch.tensor([[9.0, 0.0]], dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    loss = ours.cross_entropy(
        logits, torch.tensor([0], device=DEVICE), torch.ones(1, device=DEVICE)
    )
    assert torch.autograd.grad(loss, logits)[0][0, 0].item() == pytest.approx(-1.234e-4, rel=1e-2)


@both
def test_weight_zero_is_a_token_that_is_not_there(ours):
    _, labels, weights = rows(20, 50, 0)
    weights[::2] = 0
    hidden, matrix = (x.requires_grad_() for x in matrices(20, 50, 8, 0))
    results = []
    for kept in (slice(None), slice(1, None, 2)):
        loss = ours.linear_cross_entropy(hidden[kept], matrix, labels[kept], weights[kept])
        results.append([loss, *torch.autograd.grad(loss, [hidden, matrix])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@needs_triton
def test_in_float16_the_upstream_factor_comes_before_rounding_or_the_gradient_is_refused():
    """A loss scaler's factor saves entries that float16 cannot hold."""
    logits = torch.zeros(1, 300, dtype=torch.float16, device=DEVICE, requires_grad=True)
    label = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    loss = TRITON.cross_entropy(logits, label, torch.full((1,), 1e-6, device=DEVICE))
    (2.0**16 * loss).backward()
    torch.testing.assert_close(logits.grad[0, 1].item(), 2.0**16 * 1e-6 / 300, rtol=1e-3, atol=0)
    hidden, matrix = matrices(1, 300, 8, 0, torch.float16)
    weights = torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="train in bfloat16"):
        TRITON.linear_cross_entropy(hidden.requires_grad_(), matrix, label, weights)
    with torch.no_grad():
        assert TRITON.linear_cross_entropy(hidden, matrix, label, weights).isfinite()


@needs_triton
def test_labels_on_another_device_are_refused():
    logits, labels, weights = rows(3, 5, 0)
    hidden, matrix = matrices(3, 5, 8, 0)
    with pytest.raises(ValueError, match="labels must be on .* got meta"):
        TRITON.cross_entropy(logits, labels.to("meta"), weights)
    with pytest.raises(ValueError, match="weights must be on .* got meta"):
        TRITON.linear_cross_entropy(hidden, matrix, labels, weights.to("meta"))


@needs_triton
def test_the_gradient_of_a_gradient_is_refused():
    logits, labels, weights = rows(3, 5, 0)
    loss = TRITON.cross_entropy(logits.requires_grad_(), labels, weights)
    (gradient,) = torch.autograd.grad(loss.exp(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@both
def test_inputs_are_left_as_they_were_and_no_gradient_is_made_that_nobody_wants(ours):
    logits, labels, weights = rows(5, 30, 0)
    before = logits.clone()
    (2 * ours.cross_entropy(logits.requires_grad_(), labels, weights)).backward()
    assert torch.equal(logits.detach(), before)
    hidden, matrix = matrices(5, 30, 8, 0)
    want = ours.linear_cross_entropy(hidden, matrix, labels, weights)
    assert not want.requires_grad
    for wanted in (0, 1):
        leaves = [hidden.clone(), matrix.clone()]
        leaves[wanted].requires_grad_()
        loss = ours.linear_cross_entropy(*leaves, labels, weights)
        loss.backward()
        assert torch.equal(loss, want) and [x.grad is not None for x in leaves] == [
            wanted == 0,
            wanted == 1,
        ]


@needs_triton
def test_a_second_backward_pass_is_refused_rather_than_scaled_twice():
    logits, labels, weights = rows(3, 5, 0)
    loss = TRITON.cross_entropy(logits.requires_grad_(), labels, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@both
@pytest.mark.parametrize(
    "change, word",
    [
        (dict(labels=torch.zeros(2, dtype=torch.long)), "logits, labels and weights"),
        (dict(labels=torch.zeros(3)), "labels int64"),
        (dict(labels=torch.tensor([0, 4, -100])), r"labels must be in \[0, 4\) or -100, got 4"),
        (dict(labels=torch.tensor([0, -1, -100])), "got -1"),
        (dict(weights=torch.ones(3, requires_grad=True)), "weights get no gradient"),
    ],
)
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
    hidden, matrix = (
        torch.zeros(0, 8, device=DEVICE),
        torch.ones(30, 8, device=DEVICE, requires_grad=True),
    )
    empty = torch.zeros(0, device=DEVICE)
    loss = ours.linear_cross_entropy(hidden, matrix, empty.long(), empty)
    assert loss == 0 and (torch.autograd.grad(loss, matrix)[0] == 0).all()


@needs_triton
def test_infinite_logits_of_an_ignored_row_add_nothing():
    logits = torch.tensor([[0.0, 1.0], [float("inf"), 0.0]], device=DEVICE, requires_grad=True)
    labels = torch.tensor([0, IGNORE], device=DEVICE)
    TRITON.cross_entropy(logits, labels, torch.ones(2, device=DEVICE)).backward()
    assert (logits.grad[1] == 0).all() and logits.grad[0].isfinite().all()


@needs_triton
@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_a_label_the_host_could_not_look_at_gives_nan(label):
    """On a GPU a wrong label is not seen before the launch; it must not count as logit 0."""
    logits, labels, weights = rows(2, 40, 0)
    of_rows, nll = torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    launch_rows(logits, None, torch.full_like(labels, label), weights, of_rows, nll)
    assert of_rows.isnan().all() and nll.isnan().all()


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=needs_gpu) for dtype in DTYPES])
def test_rows_at_full_size(dtype):
    """A step's tokens with T5's vocabulary, and with mT5's."""
    for T, V in ((8192, 32128), (512, 250112)):
        check_logits(TRITON, T, V, 0, dtype)


@pytest.mark.parametrize("T, C, V", [pytest.param(4096, 768, 32128, marks=needs_gpu)])
def test_full_size_without_a_look_from_the_host_and_in_a_quarter_of_the_memory(T, C, V):
    """T5-base, bf16; the memory is that of all logits at once."""
    eager = lambda hidden, matrix, *rest: REFERENCE.cross_entropy(hidden @ matrix.T, *rest[:2])
    hidden, matrix = (x.requires_grad_() for x in matrices(T, V, C, 0, torch.bfloat16))
    labels, weights = torch.randint(0, V, (T,), device=DEVICE), torch.rand(T, device=DEVICE)
    peaks = []
    for function in (eager, TRITON.linear_cross_entropy):
        for sync in ("default", "error" if function is TRITON.linear_cross_entropy else "default"):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode(sync)
            gradients = torch.autograd.grad(
                function(hidden, matrix, labels, weights, C**-0.5), [hidden, matrix]
            )
            torch.cuda.set_sync_debug_mode("default")
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    again = torch.autograd.grad(
        function(hidden, matrix, labels, weights, C**-0.5), [hidden, matrix]
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients, again)), "repeats are equal bit for bit"
    assert peaks[1] < peaks[0] / 4
