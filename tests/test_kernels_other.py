"""Cross-entropy, RMS norm and GEGLU references against plain fp64 formulas."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import kernels

sizes = st.tuples(st.integers(1, 9), st.integers(2, 41), st.integers(0, 10_000))  # T, V, seed


def problem(T, V, seed, C=7):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(T, C, generator=g), torch.randn(V, C, generator=g)
    labels = torch.randint(0, V, (T,), generator=g).masked_fill(torch.rand(T, generator=g) < 0.3, -100)
    return hidden, weight, labels, torch.rand(T, generator=g)


def fp64_loss(hidden, weight, labels, weights, scale):
    logits = scale * hidden @ weight.T
    keep = labels >= 0
    picked = logits[keep].gather(1, labels[keep, None])[:, 0]
    return (weights[keep].double() * (logits[keep].logsumexp(-1) - picked)).sum()


@given(sizes, st.sampled_from([1.0, 512**-0.5]))
def test_linear_cross_entropy_and_its_gradients(size, scale):
    hidden, weight, labels, weights = problem(*size)
    single = [hidden.requires_grad_(), weight.requires_grad_()]
    double = [x.detach().double().requires_grad_() for x in single]
    got, want = (
        kernels.linear_cross_entropy(*single, labels, weights, scale),
        fp64_loss(*double, labels, weights, scale),
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)
    if (labels >= 0).any():
        for a, b in zip(torch.autograd.grad(got, single), torch.autograd.grad(want, double)):
            assert (a - b).norm() <= 2e-6 * (b.norm() + 1)


@given(sizes)
def test_weight_zero_is_a_token_that_is_not_there(size):
    hidden, weight, labels, weights = problem(*size)
    weights[::2] = 0
    hidden.requires_grad_()
    loss = kernels.linear_cross_entropy(hidden, weight, labels, weights)
    left = kernels.linear_cross_entropy(hidden[1::2], weight, labels[1::2], weights[1::2])
    torch.testing.assert_close(loss, left, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert (gradient[::2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_confident_logits_and_all_ignored(dtype):
    """+-80 overflows exp in half precision and in fp32 when squared; fp32 inside and the row maximum keep it finite."""
    logits = torch.tensor([[80.0, -80.0, 0.0], [-80.0, 80.0, -80.0]], dtype=dtype, requires_grad=True)
    loss, nll = kernels.cross_entropy(logits, torch.tensor([1, 1]), torch.ones(2), return_token_losses=True)
    assert loss == 160 and nll.tolist() == [160, 0]
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient.float(), torch.tensor([[1.0, -1, 0], [0, 0, 0]]))
    none = kernels.cross_entropy(logits, torch.tensor([-100, -100]), torch.ones(2))
    assert none == 0 and (torch.autograd.grad(none, logits)[0] == 0).all()


def test_cross_entropy_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="cross_entropy: logits"):
        kernels.cross_entropy(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), torch.zeros(3))
    with pytest.raises(ValueError, match="linear_cross_entropy: hidden"):
        kernels.linear_cross_entropy(torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(3), torch.zeros(3))


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 10_000))
@example(3, 1, 1)
def test_rms_norm_and_its_gradients(T, C, seed):
    g = torch.Generator().manual_seed(seed)
    single = [torch.randn(T, C, generator=g).requires_grad_(), torch.randn(C, generator=g).requires_grad_()]
    double = [x.detach().double().requires_grad_() for x in single]
    got = kernels.rms_norm(*single, eps=1e-6)
    want = double[0] / (double[0].square().mean(-1, keepdim=True) + 1e-6).sqrt() * double[1]
    weight = torch.randn(T, C, generator=g)
    pairs = zip(torch.autograd.grad((got * weight).sum(), single), torch.autograd.grad((want * weight).sum(), double))
    # dx = r (w g - y mean(w g y)), r = 1 / rms: at C = 1 the two terms cancel, so errors are relative to the first
    cancelled = (weight * double[1] / (double[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()).norm()
    for a, b in ((got, want), *pairs):
        assert (a - b).norm() <= 2e-6 * (b.norm() + cancelled + 1)


def test_rms_norm_sums_squares_in_fp32():
    """In bf16 the mean of 4096 squares would be off by percents."""
    x = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    y = kernels.rms_norm(x, torch.ones(4096))
    assert y.dtype == torch.bfloat16 and (y == 1).all()
    with pytest.raises(ValueError, match="rms_norm: weight"):
        kernels.rms_norm(x, torch.ones(7))


def test_geglu_is_the_tanh_approximation():
    gate, up = torch.linspace(-5, 5, 41, dtype=torch.float64), torch.linspace(2, -3, 41, dtype=torch.float64)
    tanh = gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(kernels.geglu(gate, up), tanh * up)
    assert (kernels.geglu(gate, up) - F.gelu(gate) * up).abs().max() > 1e-4, "the exact GELU is not T5's"
    with pytest.raises(ValueError, match="geglu"):
        kernels.geglu(gate, up[1:])


# What DSS_KERNELS asks for, where; what is chosen, or what the refusal says.
CHOICES = [
    ("", "cpu", dict(installed=True, interpreted=True), "reference"),
    ("", "cuda", dict(installed=True, interpreted=False), "triton"),
    ("", "cuda", dict(installed=False, interpreted=False), "reference"),
    ("reference", "cuda", dict(installed=True, interpreted=False), "reference"),
    ("triton", "cpu", dict(installed=True, interpreted=True), "triton"),
    ("triton", "cpu", dict(installed=True, interpreted=False), "TRITON_INTERPRET=1"),
    ("triton", "mps", dict(installed=False, interpreted=False), "not installed"),
    ("cuda", "cuda", dict(installed=True, interpreted=False), "must be 'triton' or 'reference', got 'cuda'"),
]


@pytest.mark.parametrize("value, device, here, outcome", CHOICES)
def test_the_choice_of_kernels(monkeypatch, value, device, here, outcome):
    monkeypatch.setenv("DSS_KERNELS", value)
    monkeypatch.setattr("kernels.launch.INSTALLED", here["installed"])
    monkeypatch.setattr("kernels.launch.INTERPRETED", here["interpreted"])
    if outcome in ("triton", "reference"):
        assert kernels.choice(torch.device(device)) == outcome
    else:
        with pytest.raises(ValueError, match=f"DSS_KERNELS.*{outcome}"):
            kernels.choice(torch.device(device))


def test_a_misspelt_choice_stops_the_first_operation(monkeypatch):
    monkeypatch.setenv("DSS_KERNELS", "cuda")
    with pytest.raises(ValueError, match="DSS_KERNELS"):
        kernels.geglu(gate=torch.zeros(2), up=torch.zeros(2))
