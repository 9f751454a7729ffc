"""Who computes an operation, Triton or the reference, and what DSS_KERNELS changes."""

import inspect

import pytest
import torch
from comparing import (
    DEVICE,
    OPERATIONS,
    REFERENCE,
    TRITON,
    forward_backward,
    needs_gpu,
    needs_triton,
)

import kernels
from kernels.compile import recording

# DSS_KERNELS, device, whether Triton is installed and interpreted; the choice, or what the error
# says.
CHOICES = [
    ("", "cpu", True, True, "reference"),
    ("", "cuda", True, False, "triton"),
    ("reference", "cuda", True, False, "reference"),
    ("triton", "cpu", True, True, "triton"),
    ("triton", "cpu", True, False, "TRITON_INTERPRET=1"),
    ("triton", "mps", False, False, "not installed"),
    ("cuda", "cuda", True, False, "must be 'triton' or 'reference', got 'cuda'"),
]

STAGES = [
    ("3.7.0+git1", "sm_90", 1),
    ("3.10.0", "sm_90", 2),
    ("3.6.0", "sm_80", 2),
]


@pytest.mark.parametrize("value, device, installed, interpreted, outcome", CHOICES)
def test_the_choice_of_kernels(monkeypatch, value, device, installed, interpreted, outcome):
    monkeypatch.setattr("kernels.launch.architecture", lambda device: "sm_90")
    monkeypatch.setenv("DSS_KERNELS", value)
    monkeypatch.setattr("kernels.launch.INSTALLED", installed)
    monkeypatch.setattr("kernels.launch.INTERPRETED", interpreted)
    if outcome in ("triton", "reference"):
        assert kernels.choice(torch.device(device)) == outcome
    else:
        with pytest.raises(ValueError, match=f"DSS_KERNELS.*{outcome}"):
            kernels.choice(torch.device(device))


def test_a_gpu_that_the_kernels_do_not_fit(monkeypatch):
    """A T4 (compute capability 7.5) has too little shared memory for our tiles."""
    monkeypatch.setattr("kernels.launch.INSTALLED", True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    kernels.launch.architecture.cache_clear()
    monkeypatch.delenv("DSS_KERNELS", raising=False)
    with pytest.warns(UserWarning, match="compute capability 8.0 .* the references compute"):
        assert kernels.choice(torch.device("cuda", 7)) == "reference"
    monkeypatch.setenv("DSS_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"DSS_KERNELS=triton: .* compute capability 8\.0"):
        kernels.choice(torch.device("cuda", 7))
    kernels.launch.architecture.cache_clear()


def arguments(name, x):
    """Of an operation, from an (N, N') tensor."""
    heads = x[:, None]
    labels = torch.zeros(len(x), dtype=torch.int64, device=DEVICE)
    weights = torch.ones(len(x), device=DEVICE)
    cu_seqlens = torch.tensor([0, len(x)], dtype=torch.int32, device=DEVICE)
    return dict(
        attention=(heads, heads, heads, None, cu_seqlens, cu_seqlens),
        cross_entropy=(x, labels, weights),
        linear_cross_entropy=(x, x, labels, weights),
        rms_norm=(x, x[0]),
        geglu=(x, x),
    )[name]


@needs_triton
def test_dss_kernels_decides_which_implementation_an_operation_calls(monkeypatch):
    """Only the Triton implementations launch kernels."""
    x = torch.ones(5, 16, device=DEVICE)
    for value, count in [("reference", 0), ("triton", 5)]:
        monkeypatch.setenv("DSS_KERNELS", value)
        with recording("sm_90") as launches:
            for name in OPERATIONS:
                getattr(kernels, name)(*arguments(name, x))
        assert len(launches) == count


@needs_triton
def test_a_head_width_without_a_kernel_gets_the_reference_and_a_warning(monkeypatch):
    monkeypatch.setenv("DSS_KERNELS", "triton")
    x = torch.randn(5, 2, 24, device=DEVICE)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    with pytest.warns(UserWarning, match="no Triton kernel for heads of width 24; the reference"):
        y = kernels.attention(x, x, x, None, cu_seqlens, cu_seqlens)
    assert torch.equal(y, REFERENCE.attention(x, x, x, None, cu_seqlens, cu_seqlens))


@needs_triton
@pytest.mark.parametrize("version, row, count", STAGES)
def test_pipelines_have_one_stage_where_triton_leaves_out_a_fence(monkeypatch, version, row, count):
    monkeypatch.setattr("kernels.launch.architecture", lambda device: row)
    monkeypatch.setattr("kernels.launch.triton.__version__", version)
    assert kernels.launch.stages(torch.device("cuda")) == count


@pytest.mark.parametrize("N", [pytest.param(N, marks=needs_gpu) for N in (60, 1024)])
def test_attention_gives_the_same_bits_200_times(N):
    """A tile that is read before it has arrived would show as a rare difference."""
    cu_seqlens = torch.arange(0, 17 * N, N, dtype=torch.int32, device=DEVICE)
    leaves = [torch.randn(16 * N, 12, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    leaves.append(torch.randn(32, 12, device=DEVICE))

    def function(q, k, v, table):
        return TRITON.attention(q, k, v, table, cu_seqlens, cu_seqlens)

    first = forward_backward(function, leaves)
    for _ in range(200):
        again = forward_backward(function, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_and_its_implementations_have_one_signature(name):
    signature = inspect.signature(getattr(kernels, name))
    assert signature == inspect.signature(getattr(REFERENCE, name))
    assert signature == inspect.signature(getattr(TRITON, name))
    assert not any(p.kind.name.startswith("VAR_") for p in signature.parameters.values())


@needs_triton
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_gradient_of_a_gradient_is_refused(name):
    """Autograd does not see what happens in a kernel, so it would be wrong."""
    x = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    y = getattr(TRITON, name)(*arguments(name, x))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
