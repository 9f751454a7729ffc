"""The cross-entropy kernels against fp64 formulas, interpreted on a CPU or compiled on a GPU: loss, gradients."""

import pytest
import torch
from conftest import BOUNDS, DEVICE, relative_error
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed here")

from kernels.cross_entropy import (
    IGNORE,
    chunk_rows,
    cross_entropy_reference,
    cross_entropy_triton,
    launch_rows,
    linear_cross_entropy_reference,
    linear_cross_entropy_triton,
)

dtypes = st.sampled_from(list(BOUNDS))
options = st.sampled_from([{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.3, "z_loss": 1e-3}])


def rows(T, V, seed, dtype=torch.float32, scale=3.0):
    """Random logits (T, V), labels of which a third is ignored, weights in [0, 1)."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(T, V, generator=g) * scale).to(dtype)
    labels = torch.randint(0, V, (T,), generator=g).masked_fill(torch.rand(T, generator=g) < 0.3, IGNORE)
    return logits.to(DEVICE), labels.to(DEVICE), torch.rand(T, generator=g).to(DEVICE)


def fp64_loss(z, labels, weights, label_smoothing=0.0, z_loss=0.0):
    keep = labels != IGNORE
    z, y = z[keep], labels[keep, None]
    lse = z.logsumexp(-1)
    losses = lse - (1 - label_smoothing) * z.gather(1, y)[:, 0] - label_smoothing * z.mean(-1) + z_loss * lse**2
    return (weights[keep].double() * losses).sum()


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def check(got, want, inputs, doubles, dtype, cancelled=0.0):
    """Loss within fp32's bound, each gradient within dtype's; `cancelled`: size of the terms that a gradient is left
    of, a tenth of whose rounding it may have (a confident row's is w p - w, with p near 1)."""
    assert got.dtype == torch.float32 and relative_error(got, want) <= max(2e-6, 1e-6 / max(want.abs().item(), 1e-9))
    for a, b in zip(torch.autograd.grad(got * 3, inputs), torch.autograd.grad(want * 3, doubles)):
        assert (a - b).norm().item() <= BOUNDS[dtype] * (b.norm().item() + 0.3 * cancelled)


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(2, 300), st.integers(0, 999), dtypes, options)
@example(4, 32, 0, torch.float32, {})
@example(3, 32128, 0, torch.bfloat16, {})
@example(2, 32768, 0, torch.float32, {"label_smoothing": 0.1})
@example(2, 250112, 0, torch.bfloat16, {"label_smoothing": 0.1, "z_loss": 1e-4})  # mT5: read twice
@example(2, 250112, 1, torch.float32, {})
@example(6, 2, 0, torch.float32, {})  # once failed
def test_loss_and_gradient_of_given_logits(T, V, seed, dtype, extra):
    logits, labels, weights = rows(T, V, seed, dtype)
    logits.requires_grad_()
    double = logits.detach().double().requires_grad_()
    got = cross_entropy_triton(logits, labels, weights, **extra)
    cancelled = weights[labels != IGNORE].norm().item()
    check(got, fp64_loss(double, labels, weights, **extra), [logits], [double], dtype, cancelled)


@settings(max_examples=15)
@given(
    st.integers(1, 40), st.integers(2, 90), st.integers(1, 33), st.integers(0, 999), dtypes, st.integers(1, 9), options
)
@example(37, 61, 8, 0, torch.bfloat16, 1, {})
@example(40, 2, 1, 40, torch.float16, 1, {"z_loss": 0.01})  # once failed
@example(3, 2, 15, 360, torch.bfloat16, 5, {"label_smoothing": 0.3, "z_loss": 1e-3})  # so did this
def test_linear_cross_entropy_and_both_gradients(T, V, C, seed, dtype, chunks, extra):
    """However many chunks the tokens are cut into, and with the scale of tied embeddings."""
    _, labels, weights = rows(T, V, seed)
    g = torch.Generator().manual_seed(seed)
    hidden, matrix = (torch.randn(n, C, generator=g).to(dtype).to(DEVICE).requires_grad_() for n in (T, V))
    scale = C**-0.5
    doubles = [x.detach().double().requires_grad_() for x in (hidden, matrix)]
    budget = -(-T * V * hidden.element_size() // chunks)
    got = linear_cross_entropy_triton(hidden, matrix, labels, weights, scale, logits_bytes=budget, **extra)
    z = scale * doubles[0] @ doubles[1].T
    want = fp64_loss(z, labels, weights, **extra)
    # the logits of a half-precision model are rounded before the loss is taken
    loss_bound = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert relative_error(got, want) <= loss_bound
    # d hidden = G W: where its terms cancel (V = 2, two close weights) their rounding errors do not, so the error is
    # relative to the root of their summed squares, which is as large as G W itself where they do not cancel.
    g, *d_want = torch.autograd.grad(want, [z, *doubles])
    g = torch.maximum(g.abs(), (weights * (labels != IGNORE))[:, None] * z.detach().softmax(-1))  # w p, of w (p - y)
    terms = [(scale * (a.square() @ b.square()).sqrt()).norm() for a, b in ((g, doubles[1]), (g.T, doubles[0]))]
    for a, b, size in zip(torch.autograd.grad(got, [hidden, matrix]), d_want, terms):
        error = (a - b).norm().item() / max(b.norm().item(), size.item(), 1e-300)
        assert error <= 1.5 * BOUNDS[dtype], "rounded logits and a rounded gradient"


def test_weight_gradient_is_summed_in_fp32_however_many_chunks():
    """bf16 sums over 32 chunks lose what a single chunk keeps."""
    T, V, C = 256, 50, 16
    _, labels, weights = rows(T, V, 0)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, C, generator=g).bfloat16().to(DEVICE)
    matrix = torch.randn(V, C, generator=g).to(DEVICE).requires_grad_()  # fp32 master weights beside bf16 states

    def d_matrix(budget):
        return gradient(linear_cross_entropy_triton(hidden, matrix, labels, weights, logits_bytes=budget), matrix)

    whole, chunked = d_matrix(10**9), d_matrix(T * V * 2 // 32)
    assert whole.dtype == torch.float32
    assert relative_error(chunked, whole) < 1e-6


def test_autocast_multiplies_in_bfloat16_and_keeps_the_gradient_of_fp32_weights_in_fp32():
    _, labels, weights = rows(30, 40, 3)
    hidden, matrix = torch.randn(30, 16, device=DEVICE), torch.randn(40, 16, device=DEVICE)
    results = []
    for function in (linear_cross_entropy_triton, linear_cross_entropy_reference):
        h, w = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = function(h, w, labels, weights, 0.25)
        results.append([loss, *torch.autograd.grad(loss, [h, w])])
    for got, want in zip(*results):
        assert got.dtype == torch.float32 and relative_error(got, want) < 1e-2


@pytest.mark.parametrize("V", [5, 700])
@pytest.mark.parametrize("block", [16, 64, 1024])
def test_the_block_size_does_not_matter(V, block):
    """Rows read once or in many blocks; the last block holds what V leaves."""
    logits, labels, weights = rows(6, V, 1)
    results = []
    for size in (block, 1024):
        losses, nll, d_logits = torch.empty(6, device=DEVICE), torch.empty(6, device=DEVICE), torch.empty_like(logits)
        launch_rows(logits, d_logits, labels, weights, losses, nll, 0.1, 1e-3, block=size)
        results.append(torch.cat([losses[:, None], nll[:, None], d_logits], 1))
    assert relative_error(*results) <= 2e-6


def test_rows_of_a_larger_tensor_and_columns_that_are_not_contiguous():
    logits, labels, weights = rows(7, 40, 2)
    wide = torch.zeros(7, 64, device=DEVICE)
    wide[:, :40] = logits
    want = cross_entropy_triton(logits, labels, weights)
    assert torch.equal(cross_entropy_triton(wide[:, :40], labels, weights), want), "row stride"
    assert torch.equal(cross_entropy_triton(logits.T.contiguous().T, labels, weights), want), "column stride"
    far = torch.stack([labels, labels], 1)[:, 0], torch.stack([weights, weights], 1)[:, 0]
    assert torch.equal(cross_entropy_triton(logits, *far), want), "strides of labels and weights"


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_confident_logits_and_all_ignored(dtype):
    """+-80 overflows exp in fp32 when squared, in half precision at once; the row's maximum is taken off first."""
    logits = torch.tensor([[80.0, -80.0, 0.0], [-80.0, 80.0, -80.0]], dtype=dtype, device=DEVICE, requires_grad=True)
    ones, right = torch.ones(2, device=DEVICE), torch.tensor([1, 1], device=DEVICE)
    loss, nll = cross_entropy_triton(logits, right, ones, return_token_losses=True)
    assert loss == 160 and nll.tolist() == [160, 0] and not nll.requires_grad
    torch.testing.assert_close(gradient(loss, logits).float().cpu(), torch.tensor([[1.0, -1, 0], [0, 0, 0]]))
    loss, nll = cross_entropy_triton(logits, right * 0 + IGNORE, ones, return_token_losses=True)
    assert loss == 0 and (nll == 0).all() and (gradient(loss, logits) == 0).all()
    weight = torch.ones(5, 3, device=DEVICE, dtype=dtype, requires_grad=True)
    loss = linear_cross_entropy_triton(logits, weight, right * 0 + IGNORE, ones)
    assert all((g == 0).all() for g in torch.autograd.grad(loss, [logits, weight]))


def test_a_confident_label_keeps_the_digits_of_p_minus_1():
    """p = 1 - 1.2e-4: subtracted in bf16, whose neighbour of 1 is 1 - 4e-3, nothing would be left."""
    logits = torch.tensor([[9.0, 0.0]], dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    loss = cross_entropy_triton(logits, torch.tensor([0], device=DEVICE), torch.ones(1, device=DEVICE))
    assert gradient(loss, logits)[0, 0].item() == pytest.approx(-1.234e-4, rel=1e-2)


@settings(max_examples=8)
@given(st.integers(2, 20), st.integers(2, 50), st.integers(0, 999))
def test_weight_zero_is_a_token_that_is_not_there(T, V, seed):
    _, labels, weights = rows(T, V, seed)
    weights[::2] = 0
    hidden, matrix = torch.randn(T, 8, device=DEVICE), torch.randn(V, 8, device=DEVICE)
    results = []
    for kept in (slice(None), slice(1, None, 2)):
        h, w = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
        loss = linear_cross_entropy_triton(h[kept], w, labels[kept], weights[kept])
        results.append([loss, *torch.autograd.grad(loss, [h, w])])
    assert (results[0][1][::2] == 0).all()
    for a, b in zip(*results):
        assert (a - b).norm() <= 2e-6 * (b.norm() + 1)


def test_repeats_are_equal_bit_for_bit():
    _, labels, weights = rows(50, 333, 0)
    hidden, matrix = (torch.randn(n, 24, device=DEVICE).requires_grad_() for n in (50, 333))

    def run():
        loss = linear_cross_entropy_triton(hidden, matrix, labels, weights, logits_bytes=20_000)
        return [loss, *torch.autograd.grad(loss, [hidden, matrix])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_inputs_are_left_as_they_were_and_no_gradient_is_made_that_nobody_wants():
    logits, labels, weights = rows(5, 30, 0)
    before = logits.clone()
    loss = cross_entropy_triton(logits.requires_grad_(), labels, weights)
    (2 * loss).backward()
    assert torch.equal(logits.detach(), before)
    hidden, matrix = torch.randn(5, 8, device=DEVICE), torch.randn(30, 8, device=DEVICE)
    assert not linear_cross_entropy_triton(hidden, matrix, labels, weights).requires_grad
    want = linear_cross_entropy_triton(hidden, matrix.clone().requires_grad_(), labels, weights)
    for frozen in ("hidden", "matrix"):
        h, w = (x.clone().requires_grad_(name != frozen) for name, x in (("hidden", hidden), ("matrix", matrix)))
        loss = linear_cross_entropy_triton(h, w, labels, weights)
        assert torch.equal(loss, want)
        loss.backward()
        assert (h.grad is None) == (frozen == "hidden") and (w.grad is None) == (frozen == "matrix")


def test_the_options_of_the_reference_are_the_same_formulas():
    logits, labels, weights = rows(8, 60, 5)
    for extra in ({}, {"label_smoothing": 0.2}, {"z_loss": 0.01}, {"label_smoothing": 0.2, "z_loss": 0.01}):
        got, nll = cross_entropy_reference(logits, labels, weights, True, **extra)
        assert relative_error(got, fp64_loss(logits.double(), labels, weights, **extra)) <= 2e-6
        ours, our_nll = cross_entropy_triton(logits, labels, weights, True, **extra)
        assert relative_error(ours, got) <= 2e-6 and relative_error(our_nll, nll) <= 2e-6


def test_chunks_are_few_and_even():
    assert chunk_rows(8192, 32128 * 2, 256 * 2**20) == 4096  # two halves rather than 4177 and the rest
    assert chunk_rows(100, 10, 1) == 1 and chunk_rows(0, 10, 100) == 1 and chunk_rows(7, 10, 10**9) == 7


def test_a_second_backward_pass_is_refused_rather_than_scaled_twice():
    logits, labels, weights = rows(3, 5, 0)
    loss = cross_entropy_triton(logits.requires_grad_(), labels, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(labels=torch.zeros(2, dtype=torch.long)), "logits, labels and weights"),
        (dict(labels=torch.zeros(3)), "labels int64"),
        (dict(labels=torch.tensor([0, 4, -100])), r"labels must be in \[0, 4\) or -100, got 4"),
        (dict(labels=torch.tensor([0, -1, -100])), "got -1"),
        (dict(weights=torch.zeros(3, requires_grad=True)), "weights must not require a gradient"),
        (dict(label_smoothing=1.0), "label_smoothing must be in"),
        (dict(z_loss=-1.0), "z_loss 0 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, word):
    good = dict(labels=torch.zeros(3, dtype=torch.long), weights=torch.zeros(3))
    with pytest.raises(ValueError, match=word):
        cross_entropy_triton(torch.zeros(3, 4), **(good | change))
    with pytest.raises(ValueError, match=word):
        linear_cross_entropy_triton(torch.zeros(3, 2), torch.zeros(4, 2), **(good | change))
    with pytest.raises(ValueError, match="hidden and weight"):
        linear_cross_entropy_triton(torch.zeros(3, 2), torch.zeros(4, 3), **good)


def test_no_tokens_are_no_loss():
    hidden, matrix = torch.zeros(0, 8, device=DEVICE), torch.ones(30, 8, device=DEVICE, requires_grad=True)
    empty = torch.zeros(0, device=DEVICE)
    loss = linear_cross_entropy_triton(hidden, matrix, empty.long(), empty)
    assert loss == 0 and (gradient(loss, matrix) == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_rows_at_full_size(dtype):
    """The property above for a step's tokens, with T5's vocabulary and with mT5's."""
    for T, V in ((8192, 32128), (512, 250112)):
        test_loss_and_gradient_of_given_logits.hypothesis.inner_test(T, V, 0, dtype, {})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_full_size_without_a_look_from_the_host_and_in_a_quarter_of_the_memory():
    """T5-base: 4096 tokens, C = 768, V = 32128, bf16."""
    T, C, V = 4096, 768, 32128
    hidden = torch.randn(T, C, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    matrix = (torch.randn(V, C, device=DEVICE, dtype=torch.bfloat16) / C**0.5).requires_grad_()
    labels, weights = torch.randint(0, V, (T,), device=DEVICE), torch.rand(T, device=DEVICE)
    peaks, results = [], []
    for function in (linear_cross_entropy_triton, linear_cross_entropy_reference):
        for _ in range(2):  # the first run compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.set_sync_debug_mode("error" if function is linear_cross_entropy_triton else "default")
            loss = function(hidden, matrix, labels, weights)
            gradients = torch.autograd.grad(loss, [hidden, matrix])
            torch.cuda.set_sync_debug_mode("default")
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
        results.append([loss, *gradients])
    for got, want in zip(*results):
        assert relative_error(got, want) < 1e-2
    assert peaks[0] < peaks[1] / 4


@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_a_label_the_host_could_not_look_at_gives_nan(label):
    """On a GPU a wrong label is not seen before the launch; counted as logit 0 it would go unnoticed."""
    logits, labels, weights = rows(2, 40, 0)
    losses, nll = torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    launch_rows(logits, None, torch.full_like(labels, label), weights, losses, nll, 0.0, 0.0)
    assert losses.isnan().all() and nll.isnan().all()
