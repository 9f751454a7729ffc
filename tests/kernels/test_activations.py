"""Gated GELU against its formula: the output and each gradient."""

import pytest
import torch
from comparing import DEVICE, DTYPES, TRITON, both, compare, needs_gpu, needs_triton, random, wide
from philox import mask

SEED = 2**33 + 5


def gelu(x):
    """The tanh approximation, as T5's code writes it."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def check_geglu(ours, T, F, dtype, p, seed=0):
    """With dropout where its mask is known: in Triton."""
    if ours is not TRITON:
        p = 0.0
    keep = mask(SEED, range(T), 0, F, round(256 * p)).to(DEVICE)

    def formula(gate, up):
        return (gelu(wide(gate)) * wide(up) * keep.to(wide(up))).to(up.dtype)

    leaves = random([(T, F), (T, F)], dtype, seed)
    compare(lambda gate, up: ours.geglu(gate, up, p, SEED), formula, leaves)


SIZES = [(1, 1, 0), (33, 7, 0), (70, 300, 0.5), (65, 513, 0.1)]  # 513: 512 + 1


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, F, p", SIZES)
def test_output_and_gradients(ours, T, F, dtype, p):
    check_geglu(ours, T, F, dtype, p)


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gelu_far_out():
    """Where sigmoid is 0 or 1 to the last digit, and where x^3 is 1e12."""
    values = [-1e4, -100.0, -10, -0.0, 10, 100, 1e4]
    gate = torch.tensor([values], device=DEVICE, requires_grad=True)
    y = TRITON.geglu(gate, torch.ones_like(gate))
    (slope,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(y, torch.tensor([[0, 0, 0, 0, 10, 100, 1e4]], device=DEVICE))
    torch.testing.assert_close(slope, torch.tensor([[0, 0, 0, 0.5, 1, 1, 1]], device=DEVICE))


@both
def test_arguments_that_do_not_fit_are_named(ours):
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="gate and up must have one shape"):
        ours.geglu(x, x[1:])
    with pytest.raises(ValueError, match="gate and up must have one shape and dtype"):
        ours.geglu(x, x.half())
    with pytest.raises(ValueError, match="dropout_p must be at least 0"):
        ours.geglu(x, x, 1.5)


@needs_triton
def test_what_only_the_kernel_refuses():
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"geglu: .* \(T, F\)"):
        TRITON.geglu(x[0], x[0])
    with pytest.raises(ValueError, match="geglu: no kernel computes in float64"):
        TRITON.geglu(x.double(), x.double())


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=needs_gpu) for dtype in DTYPES])
def test_full_size(dtype):
    """The sizes of a training step of T5-base and of T5-xxl."""
    for T, F in ((8192, 2048), (4099, 10240)):
        check_geglu(TRITON, T, F, dtype, 0.1)
