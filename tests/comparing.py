"""The one rule by which kernels are right, and what the kernel tests share.

A test states an operation as a plain formula. Every output and gradient is compared with that
formula in fp64. The error may be twice that of the formula computed in the inputs' dtype
("eager"), plus a floor for where eager is exact by luck. In half precision the floor is one
rounding of the result and four fp32 roundings of a term of size 1. Where all inputs are fp32 it
is 2e-6 of the result's size, or of 1 where the result is smaller: inputs have that size, and so
have the terms that cancel.
"""

from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's: compiled, or interpreted
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps
OPERATIONS = ["attention", "cross_entropy", "linear_cross_entropy", "rms_norm", "geglu"]
REFERENCE, TRITON = (
    SimpleNamespace(
        **{operation: getattr(kernels, f"{operation}_{name}") for operation in OPERATIONS}
    )
    for name in ("reference", "triton")
)
needs_triton = pytest.mark.skipif(not launch.INSTALLED, reason="Triton is not installed here")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")]
both = pytest.mark.parametrize(
    "ours",
    [REFERENCE, pytest.param(TRITON, marks=needs_triton)],
    ids=["reference", "triton"],
)


def wide(x):
    """What T5 computes in fp32 whatever the dtype of its tensors; fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def random(shapes, dtype, seed=0):
    """Normal numbers, as slices of wider tensors: a row's stride is not its width."""
    g = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in shapes:
        wider = torch.randn(*shape[:-1], shape[-1] + 3, generator=g)
        tensors.append(wider.to(dtype).to(DEVICE)[..., 3:])
    return tensors


def check(what, got, eager, exact, eps):
    """Raise AssertionError unless `got` keeps the rule; eps: of the coarsest input's dtype."""
    assert got.isfinite().all(), what
    exact = exact.double()
    error = (got.double() - exact).norm()  # Frobenius
    eager_error = (eager.double() - exact).norm()
    size = exact.norm()
    unit = exact.numel() ** 0.5
    if eps == EPS:
        floor = 2e-6 * max(size, unit)
        bound = max(floor, 2 * eager_error)
    else:
        bound = 2 * eager_error + eps * size + 4 * EPS * unit
    assert error <= bound, f"{what}: error {error:.1e}, bound {bound:.1e}, size {size:.1e}"


def forward_backward(function, leaves):
    """The outputs of function(*leaves) and the gradient of each leaf.

    A leaf may be None. The upstream gradients are drawn from a fixed seed. Where a leaf is fp64,
    they are what its fp32 or half-precision twin had.
    """
    leaves = [x if x is None else x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, generator=g).bfloat16().to(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x is not None], upstream)
    return [*outputs, *gradients]


def compare(function, formula, leaves):
    """Hold outputs and gradients of function(*leaves) to the rule, and to the formula's dtypes."""
    got = forward_backward(function, leaves)
    eager = forward_backward(formula, leaves)
    exact = forward_backward(formula, [x if x is None else x.double() for x in leaves])
    eps = max(torch.finfo(x.dtype).eps for x in leaves if x is not None)
    for i, (a, b, c) in enumerate(zip(got, eager, exact)):
        assert a.dtype == b.dtype
        check(f"result {i} of {len(got)}", a, b, c, eps)


def relative_error(got, want):
    """|got - want| / |want|, Frobenius; infinite where got is not finite."""
    difference = (got.double() - want.double()).norm().nan_to_num(float("inf")).item()
    return difference / max(want.double().norm().item(), 1e-300)
