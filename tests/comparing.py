"""The one rule by which kernels are right, and what the kernel tests share.

A test states an operation as a plain formula, and every output and gradient is compared with that formula in fp64.
Where all inputs are fp32, the error may be 2e-6 of the result's size, or of 1 where the result is smaller: inputs have
that size, and so have the terms that cancel. In half precision the error may be twice that of the formula computed in
the same dtype ("eager"), plus a floor for where eager is exact by luck: one rounding of the result, and four fp32
roundings of a term of size 1.
"""

from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the Triton tests run: compiled, or interpreted
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps
needs_triton = pytest.mark.skipif(not launch.INSTALLED, reason="Triton is not installed here")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")]
OPERATIONS = ["attention", "cross_entropy", "linear_cross_entropy", "rms_norm", "geglu", "relu"]
REFERENCE, TRITON = (
    SimpleNamespace(**{operation: getattr(kernels, f"{operation}_{name}") for operation in OPERATIONS})
    for name in ("reference", "triton")
)
both = pytest.mark.parametrize(
    "ours", [REFERENCE, pytest.param(TRITON, marks=needs_triton)], ids=["reference", "triton"]
)


def wide(x):
    """What T5 computes in fp32 whatever the dtype of its tensors; fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def check(what, got, eager, exact, eps):
    """Raise AssertionError unless `got` keeps the rule above; eps: of the coarsest input's dtype."""
    assert got.isfinite().all(), what
    got, eager, exact = got.double(), eager.double(), exact.double()
    error, size, unit = (got - exact).norm(), exact.norm(), exact.numel() ** 0.5  # Frobenius
    half = 2 * (eager - exact).norm() + eps * size + 4 * EPS * unit
    bound = 2e-6 * max(size, unit) if eps == EPS else half
    assert error <= bound, f"{what}: error {error:.1e}, bound {bound:.1e}, size {size:.1e}"


def forward_backward(function, leaves):
    """The outputs of function(*leaves) and the gradient of each leaf, for upstream gradients drawn from a fixed seed.

    A leaf may be None. Where a leaf is fp64, the upstream gradients are what its fp32 or half-precision twin had.
    """
    leaves = [x if x is None else x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, generator=g).bfloat16().to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x for x in leaves if x is not None], upstream)]


def compare(function, formula, leaves):
    """Hold function(*leaves) to the rule: its outputs and all gradients, which have the dtypes of the formula's."""
    got = forward_backward(function, leaves)
    eager = forward_backward(formula, leaves)
    exact = forward_backward(formula, [x if x is None else x.double() for x in leaves])
    eps = max(torch.finfo(x.dtype).eps for x in leaves if x is not None)
    for i, (a, b, c) in enumerate(zip(got, eager, exact)):
        assert a.dtype == b.dtype
        check(f"result {i} of {len(got)}", a, b, c, eps)


def relative_error(got, want):
    """|got - want| / |want|, Frobenius; 0 for two tensors of zeros, infinite where got is not finite."""
    difference = (got.double() - want.double()).norm().nan_to_num(float("inf")).item()
    return difference / max(want.double().norm().item(), 1e-300)
