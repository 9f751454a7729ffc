"""RMS norm (with residual and dropout), gated GELU and ReLU kernels against fp64: outputs and each gradient."""

import pytest
import torch
from conftest import BOUNDS, DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from philox import kept

pytest.importorskip("triton", reason="Triton is not installed here")

from kernels.geglu import geglu_reference, geglu_triton, relu_reference, relu_triton
from kernels.rms_norm import rms_norm_reference, rms_norm_triton

dtypes = st.sampled_from(list(BOUNDS))
rates = st.sampled_from([0.0, 0.1, 0.5])
SEED = 2**33 + 5


def mask(T, C, p):
    """What dropout multiplies by, from Philox in NumPy; the kernels' p is a multiple of 1/256."""
    threshold = round(256 * p)
    return (kept(SEED, range(T), 0, C, threshold) * (256 / (256 - threshold))).double().to(DEVICE)


def tensors(shapes, dtype, seed):
    """Leaves of the given shapes, slices of wider tensors, so that a row's stride is not its width."""
    g = torch.Generator().manual_seed(seed)
    wide = (torch.randn(*shape[:-1], shape[-1] + 3, generator=g).to(dtype).to(DEVICE) for shape in shapes)
    return [x[..., 3:].detach().requires_grad_() for x in wide]


def check(kernel, formula, leaves, dtype):
    """All outputs and all gradients of kernel(*leaves) against formula(*leaves) in fp64."""
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    got, want = (f if isinstance(f, tuple) else (f,) for f in (kernel(*leaves), formula(*doubles)))
    g = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, generator=g).to(DEVICE).to(x.dtype) for x in got]
    d_got = torch.autograd.grad(got, leaves, upstream)
    d_want = torch.autograd.grad(want, doubles, [x.double() for x in upstream])
    for a, b in zip((*got, *d_got), (*want, *d_want)):
        assert a.dtype == dtype and a.isfinite().all()
        assert (a - b).norm() <= BOUNDS[dtype] * (b.norm() + 1e-2 * b.numel() ** 0.5)


def norm(s, weight, eps=1e-6):
    return s / (s.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@settings(max_examples=12)
@given(st.integers(1, 70), st.integers(2, 300), st.integers(0, 999), dtypes)
@example(1, 2, 0, torch.float32)
@example(600, 16, 0, torch.float32)  # more row tiles than one for some programs of backward
@example(3, 4096, 0, torch.bfloat16)
def test_rms_norm(T, C, seed, dtype):
    check(rms_norm_triton, norm, tensors([(T, C), (C,)], dtype, seed), dtype)


@settings(max_examples=12)
@given(st.integers(1, 70), st.integers(2, 300), st.integers(0, 999), dtypes, rates)
@example(40, 512, 0, torch.bfloat16, 0.1)
def test_rms_norm_of_residual_plus_dropout(T, C, seed, dtype, p):
    """Both outputs feed the loss, as in the model: s goes on as the residual stream, y into the next part."""

    def kernel(x, weight, residual):
        return rms_norm_triton(x, weight, 1e-6, residual, dropout_p=p, seed=SEED)

    def formula(x, weight, residual):
        s = residual + x * mask(T, C, p)
        return s, norm(s, weight)

    check(kernel, formula, tensors([(T, C), (C,), (T, C)], dtype, seed), dtype)


def test_rms_norm_of_a_bfloat16_branch_beside_a_float32_residual():
    """What autocast gives: the sum is fp32, and each gradient has its input's dtype."""
    (x,), (weight, residual) = tensors([(9, 40)], torch.bfloat16, 0), tensors([(40,), (9, 40)], torch.float32, 1)
    results = []
    for function in (rms_norm_triton, rms_norm_reference):
        s, y = function(x, weight, residual=residual)
        results.append((s, y, *torch.autograd.grad((s * 2 + y).sum(), [x, weight, residual])))
    for got, want in zip(*results):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= (1e-2 if got.dtype == torch.bfloat16 else 2e-6) * want.norm()


def test_rms_norm_sums_squares_in_fp32():
    x = torch.full((1, 4096), 3.0, dtype=torch.bfloat16, device=DEVICE)
    assert ((rms_norm_triton(x, torch.ones(4096, device=DEVICE)) - 1).abs() < 4e-3).all(), "bf16's step below 1"


@settings(max_examples=12)
@given(st.integers(1, 70), st.integers(1, 700), st.integers(0, 999), dtypes, rates)
@example(1, 1, 0, torch.float32, 0.0)
@example(65, 513, 0, torch.float32, 0.1)  # one more than a tile each way
def test_geglu(T, width, seed, dtype, p):
    def formula(gate, up):
        return torch.nn.functional.gelu(gate, approximate="tanh") * up * mask(T, width, p)

    leaves = tensors([(T, width), (T, width)], dtype, seed)
    check(lambda gate, up: geglu_triton(gate, up, p, SEED), formula, leaves, dtype)


@settings(max_examples=8)
@given(st.integers(1, 70), st.integers(1, 700), st.integers(0, 999), dtypes, rates)
def test_relu(T, width, seed, dtype, p):
    leaves = tensors([(T, width)], dtype, seed)
    check(lambda x: relu_triton(x, p, SEED), lambda x: x.relu() * mask(T, width, p), leaves, dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gelu_far_out():
    """Where sigmoid is 0 or 1 to the last digit, and where x^3 is 1e12."""
    gate = torch.tensor([[-1e4, -100.0, -10, -0.0, 10, 100, 1e4]], device=DEVICE, requires_grad=True)
    up = torch.ones_like(gate)
    y = geglu_triton(gate, up)
    (slope,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(y, torch.tensor([[0, 0, 0, 0, 10, 100, 1e4]], device=DEVICE))
    torch.testing.assert_close(slope, torch.tensor([[0, 0, 0, 0.5, 1, 1, 1]], device=DEVICE))


def test_a_seed_of_none_follows_torch_and_dropout_repeats_with_it():
    x = torch.ones(20, 64, device=DEVICE)

    def draw():
        torch.manual_seed(4)
        first = relu_triton(x, 0.3), geglu_triton(x, x, 0.3), rms_norm_triton(x, x[0], residual=x, dropout_p=0.3)[0]
        return [*first, relu_triton(x, 0.3)]

    a, b = draw(), draw()
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[0], a[3]), "each call has a seed of its own"
    share = (torch.stack([relu_triton(x, 0.3, seed) for seed in range(20)]) > 0).float().mean().item()
    assert abs(share - (1 - 77 / 256)) < 4 * (0.21 / (20 * 20 * 64)) ** 0.5


def test_references_drop_at_the_asked_rate_and_leave_the_generator_alone_with_a_seed():
    x = torch.ones(50, 80)
    state = torch.get_rng_state()
    first = relu_reference(x, 0.25, seed=3)
    assert torch.equal(first, relu_reference(x, 0.25, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert abs((first == 0).float().mean() - 0.25) < 0.03 and first.max() == 1 / 0.75
    torch.manual_seed(0)
    want = torch.nn.functional.dropout(x, 0.25)
    torch.manual_seed(0)
    assert torch.equal(relu_reference(x, 0.25), want), "without one it is torch's dropout, draw for draw"


def test_repeats_are_equal_bit_for_bit():
    x, weight, residual = tensors([(300, 48), (48,), (300, 48)], torch.float32, 0)

    def run():
        s, y = rms_norm_triton(x, weight, residual=residual, dropout_p=0.1, seed=1)
        z = geglu_triton(s, y, 0.1, 2)
        return [s, y, z, *torch.autograd.grad(z.square().sum(), [x, weight, residual])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_no_tokens():
    x, weight = torch.zeros(0, 8, device=DEVICE, requires_grad=True), torch.ones(8, device=DEVICE, requires_grad=True)
    y = geglu_triton(rms_norm_triton(x, weight), x)
    assert y.shape == (0, 8) and (torch.autograd.grad(y.sum(), weight)[0] == 0).all()


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda x: rms_norm_triton(x, x[0, 1:]), "rms_norm: weight must be"),
        (lambda x: rms_norm_triton(x, x[0], residual=x[1:]), "rms_norm: residual must have x's shape"),
        (lambda x: rms_norm_triton(x, x[0], dropout_p=0.1), "dropout_p is for x beside a residual"),
        (lambda x: rms_norm_triton(x, x[0], residual=x, dropout_p=-0.1), "dropout_p must be at least 0"),
        (lambda x: rms_norm_triton(x.double(), x[0]), "x must be float32, float16 or bfloat16, got torch.float64"),
        (lambda x: rms_norm_triton(torch.zeros(1, 16385), torch.zeros(16385)), "C up to 16384"),
        (lambda x: geglu_triton(x, x[1:]), "gate and up must have one shape"),
        (lambda x: geglu_triton(x, x.half()), "gate and up must have one shape, dtype"),
        (lambda x: geglu_triton(x[0], x[0]), r"geglu: gate must be \(T, F\)"),
        (lambda x: relu_triton(x, 1.5), "dropout_p"),
        (lambda x: geglu_reference(x, x[1:]), "gate and up must have one shape"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call(torch.zeros(4, 6))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_full_size(dtype):
    """The properties above at the sizes of a training step of T5-base and of T5-xxl."""
    for T, C, F in ((8192, 768, 2048), (4099, 4096, 10240)):
        test_rms_norm.hypothesis.inner_test(T, C, 0, dtype)
        test_rms_norm_of_residual_plus_dropout.hypothesis.inner_test(T, C, 0, dtype, 0.1)
        test_geglu.hypothesis.inner_test(T, F, 0, dtype, 0.1)
        test_relu.hypothesis.inner_test(T, F, 0, dtype, 0.1)
