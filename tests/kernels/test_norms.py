"""RMS norm, with residual and dropout, against its formula: outputs and each gradient."""

import pytest
import torch
from comparing import (
    DEVICE,
    DTYPES,
    TRITON,
    both,
    compare,
    forward_backward,
    needs_gpu,
    needs_triton,
    random,
    wide,
)
from philox import mask

SEED = 2**33 + 5


def norm(s, weight):
    s32 = wide(s)
    return (s32 / (s32.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight).to(s.dtype)


def check_norm(ours, T, C, dtype, p, seed=0):
    """Without and with a residual; with dropout where its mask is known: in Triton."""
    if ours is not TRITON:
        p = 0.0
    keep = mask(SEED, range(T), 0, C, round(256 * p)).to(DEVICE)
    compare(ours.rms_norm, norm, random([(T, C), (C,)], dtype, seed))

    def formula(x, weight, residual):  # both outputs feed the loss, as in the model
        s = (wide(residual) + wide(x) * keep.to(wide(x))).to(x.dtype)
        return s, norm(s, weight)

    leaves = random([(T, C), (C,), (T, C)], dtype, seed)
    compare(lambda x, w, r: ours.rms_norm(x, w, 1e-6, r, p, SEED), formula, leaves)


SIZES = [(1, 1, 0), (33, 7, 0), (13, 300, 0.5), (5, 513, 0.1), (2, 4096, 0)]


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, C, p", SIZES)
def test_outputs_and_gradients(ours, T, C, dtype, p):
    check_norm(ours, T, C, dtype, p)


@needs_triton
def test_several_tiles_a_program(monkeypatch):
    monkeypatch.setattr("kernels.norms.PROGRAMS", 2)
    check_norm(TRITON, 23, 300, torch.float32, 0.1)


@both
def test_under_autocast_the_sum_is_float32_and_gradients_have_their_inputs_dtypes(ours):
    """A bf16 branch beside an fp32 residual; the normalised output alone gets autocast's dtype."""
    (x,) = random([(9, 40)], torch.bfloat16)
    weight, residual = random([(40,), (9, 40)], torch.float32, 1)

    def formula(x, weight, residual):
        s = residual + x
        return s, norm(s, weight)

    compare(lambda x, w, r: ours.rms_norm(x, w, residual=r), formula, [x, weight, residual])
    with torch.autocast(DEVICE, torch.bfloat16):
        s, y = ours.rms_norm(residual, weight, residual=residual)
    assert s.dtype == torch.float32 and y.dtype == torch.bfloat16


@both
def test_no_tokens(ours):
    x = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    y = ours.geglu(ours.rms_norm(x, weight), x)
    assert y.shape == (0, 8)
    assert (torch.autograd.grad(y.sum(), weight)[0] == 0).all()


@both
@pytest.mark.parametrize(
    "change, word",
    [
        (dict(weight=torch.zeros(5)), "weight must be"),
        (dict(residual=torch.zeros(3, 6)), "residual must have x's shape"),
        (dict(residual=None, dropout_p=0.1), "dropout_p is for x beside a residual"),
        (dict(dropout_p=-0.1), "dropout_p must be at least 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(ours, change, word):
    good = dict(x=torch.zeros(4, 6), weight=torch.zeros(6), residual=torch.zeros(4, 6))
    with pytest.raises(ValueError, match=word):
        ours.rms_norm(**good | change)


@needs_triton
def test_what_only_the_kernel_refuses():
    with pytest.raises(ValueError, match=r"takes x of \(T, C\), got \[1, 2, 3\]"):
        TRITON.rms_norm(torch.zeros(1, 2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="rms_norm: no kernel computes in float64, got .4, 6."):
        TRITON.rms_norm(torch.zeros(4, 6).double(), torch.zeros(6))


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=needs_gpu) for dtype in DTYPES])
def test_full_size(dtype):
    """The sizes of a step of T5-base and of T5-xxl; repeats are equal bit for bit."""
    for T, C in ((8192, 768), (8192, 2048), (4099, 4096)):
        check_norm(TRITON, T, C, dtype, 0.1)
        leaves = random([(T, C), (C,)], dtype)
        first, second = (forward_backward(TRITON.rms_norm, leaves) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))
