"""RMS norm (with residual and dropout), gated GELU and ReLU against plain formulas: outputs and each gradient."""

import pytest
import torch
import torch.nn.functional as F
from comparing import DEVICE, DTYPES, REFERENCE, TRITON, both, compare, forward_backward, needs_gpu, needs_triton, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from philox import mask

SEED = 2**33 + 5


def tensors(shapes, dtype, seed=0):
    """Tensors of the given shapes, slices of wider ones, so that a row's stride is not its width."""
    g = torch.Generator().manual_seed(seed)
    wider = (torch.randn(*shape[:-1], shape[-1] + 3, generator=g).to(dtype).to(DEVICE) for shape in shapes)
    return [x[..., 3:] for x in wider]


def norm(s, weight):
    s32 = wide(s)
    return (s32 / (s32.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight).to(s.dtype)


def check_all(ours, T, C, dtype, p, seed=0):
    """Each operation, with dropout where its mask is known: in Triton."""
    p = p if ours is TRITON else 0.0
    keep = mask(SEED, range(T), 0, C, round(256 * p)).to(DEVICE)
    compare(ours.rms_norm, norm, tensors([(T, C), (C,)], dtype, seed))

    def residual_formula(x, weight, residual):  # both outputs feed the loss, as in the model
        s = (wide(residual) + wide(x) * keep.to(wide(x))).to(x.dtype)
        return s, norm(s, weight)

    leaves = tensors([(T, C), (C,), (T, C)], dtype, seed)
    compare(lambda x, w, r: ours.rms_norm(x, w, 1e-6, r, p, SEED), residual_formula, leaves)

    def geglu_formula(gate, up):
        return (F.gelu(wide(gate), approximate="tanh") * wide(up) * keep.to(wide(up))).to(up.dtype)

    leaves = tensors([(T, C), (T, C)], dtype, seed)
    compare(lambda gate, up: ours.geglu(gate, up, p, SEED), geglu_formula, leaves)
    compare(lambda x: ours.relu(x, p, SEED), lambda x: (wide(x).relu() * keep.to(wide(x))).to(x.dtype), leaves[:1])


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(  # 513: one more than a tile; the last: several row tiles a program
    "T, C, p", [(1, 1, 0), (1, 2, 0), (33, 7, 0), (70, 300, 0.5), (65, 513, 0.1), (3, 4096, 0), (600, 16, 0.1)]
)
def test_forward_backward(ours, T, C, dtype, p):
    check_all(ours, T, C, dtype, p)


@pytest.mark.search
@both
@settings(max_examples=100)
@given(st.integers(8, 70), st.integers(4, 700), st.integers(0, 999), st.sampled_from(DTYPES))
def test_random_sizes(ours, T, C, seed, dtype):
    check_all(ours, T, C, dtype, [0.0, 0.1, 0.5][seed % 3], seed)


@both
def test_rms_norm_of_a_bfloat16_branch_beside_a_float32_residual(ours):
    """What autocast gives: the sum is fp32, and each gradient has its input's dtype."""
    (x,), (weight, residual) = tensors([(9, 40)], torch.bfloat16), tensors([(40,), (9, 40)], torch.float32, 1)

    def formula(x, weight, residual):
        s = residual + x
        return s, norm(s, weight)

    compare(lambda x, w, r: ours.rms_norm(x, w, residual=r), formula, [x, weight, residual])


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gelu_far_out():
    """Where sigmoid is 0 or 1 to the last digit, and where x^3 is 1e12."""
    gate = torch.tensor([[-1e4, -100.0, -10, -0.0, 10, 100, 1e4]], device=DEVICE, requires_grad=True)
    up = torch.ones_like(gate)
    y = TRITON.geglu(gate, up)
    (slope,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(y, torch.tensor([[0, 0, 0, 0, 10, 100, 1e4]], device=DEVICE))
    torch.testing.assert_close(slope, torch.tensor([[0, 0, 0, 0.5, 1, 1, 1]], device=DEVICE))


@both
def test_dropout_repeats_with_its_seed_and_follows_torch_s_without_one(ours):
    x = torch.ones(50, 80, device=DEVICE)

    def draw(seed):
        norm = ours.rms_norm(x, x[0], 1e-6, x, 0.3, seed)[0]
        return [ours.relu(x, 0.3, seed), ours.geglu(x, x, 0.3, seed), norm, ours.relu(x, 0.3, seed)]

    state = torch.get_rng_state()
    seven, again, eight = draw(7), draw(7), draw(8)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(seven, again, eight))
    assert torch.equal(state, torch.get_rng_state()), "with a seed the global generator is left alone"
    drawn, again = (torch.manual_seed(4) and draw(None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again))
    assert not torch.equal(drawn[0], drawn[3]), "each call has a seed of its own"


def test_the_reference_s_dropout_keeps_its_rate_in_every_byte_of_a_random_word():
    """And in the last elements, which share a word with none."""
    x = torch.ones(99, 1001)
    y = REFERENCE.relu(x, 0.25, 7)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs((y > 0).float().mean().item() - 0.75) < 4 * (0.1875 / x.numel()) ** 0.5
    by_byte = (y.flatten()[: x.numel() // 8 * 8].unflatten(0, (-1, 8)) > 0).float().mean(0)
    assert ((by_byte - 0.75).abs() < 5 * (8 * 0.1875 / x.numel()) ** 0.5).all()


@both
def test_no_tokens(ours):
    x, weight = torch.zeros(0, 8, device=DEVICE, requires_grad=True), torch.ones(8, device=DEVICE, requires_grad=True)
    y = ours.geglu(ours.rms_norm(x, weight), x)
    assert y.shape == (0, 8) and (torch.autograd.grad(y.sum(), weight)[0] == 0).all()


OF_BOTH = [
    (lambda ours, x: ours.rms_norm(x, x[0, 1:]), "rms_norm: weight must be"),
    (lambda ours, x: ours.rms_norm(x, x[0], residual=x[1:]), "rms_norm: residual must have x's shape"),
    (lambda ours, x: ours.rms_norm(x, x[0], dropout_p=0.1), "dropout_p is for x beside a residual"),
    (lambda ours, x: ours.rms_norm(x, x[0], residual=x, dropout_p=-0.1), "dropout"),
    (lambda ours, x: ours.geglu(x, x[1:]), "gate and up must have one shape"),
    (lambda ours, x: ours.geglu(x, x.half()), "gate and up must have one shape and dtype"),
    (lambda ours, x: ours.relu(x, 1.5), "dropout"),
]
OF_TRITON = [
    (lambda ours, x: ours.rms_norm(x.double(), x[0]), "x must be float32, float16 or bfloat16, got torch.float64"),
    (lambda ours, x: ours.rms_norm(torch.zeros(1, 16385), torch.zeros(16385)), "C up to 16384"),
    (lambda ours, x: ours.geglu(x[0], x[0]), r"geglu: .* \(T, F\)"),
    (lambda ours, x: ours.relu(x.double()), "relu: .* float32, float16 or bfloat16"),
]
CASES = [(REFERENCE, *case) for case in OF_BOTH]
CASES += [pytest.param(TRITON, *case, marks=needs_triton) for case in OF_BOTH + OF_TRITON]


@pytest.mark.parametrize("ours, call, word", CASES)
def test_arguments_that_do_not_fit_are_named(ours, call, word):
    with pytest.raises(ValueError, match=word):
        call(ours, torch.zeros(4, 6))


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=needs_gpu) for dtype in DTYPES])
def test_full_size(dtype):
    """The sizes of a training step of T5-base and of T5-xxl; repeats are equal bit for bit."""
    for T, C in ((8192, 768), (8192, 2048), (4099, 4096), (4099, 10240)):
        check_all(TRITON, T, C, dtype, 0.1)
        first, second = (forward_backward(TRITON.rms_norm, tensors([(T, C), (C,)], dtype)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))
