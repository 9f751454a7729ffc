"""Who computes an operation: Triton or the reference, and what DSS_KERNELS has to say about it."""

import pytest
import torch
from comparing import OPERATIONS

import kernels

# What DSS_KERNELS asks for, where, whether Triton is installed and interpreted; the choice, or what the refusal says.
CHOICES = [
    ("", "cpu", True, True, "reference"),
    ("", "cuda", True, False, "triton"),
    ("", "cuda", False, False, "reference"),
    ("reference", "cuda", True, False, "reference"),
    ("triton", "cpu", True, True, "triton"),
    ("triton", "cpu", True, False, "TRITON_INTERPRET=1"),
    ("triton", "mps", False, False, "not installed"),
    ("cuda", "cuda", True, False, "must be 'triton' or 'reference', got 'cuda'"),
]


@pytest.mark.parametrize("value, device, installed, interpreted, outcome", CHOICES)
def test_the_choice_of_kernels(monkeypatch, value, device, installed, interpreted, outcome):
    monkeypatch.setattr("kernels.launch.architecture_of", lambda device: "sm_90")
    monkeypatch.setenv("DSS_KERNELS", value)
    monkeypatch.setattr("kernels.launch.INSTALLED", installed)
    monkeypatch.setattr("kernels.launch.INTERPRETED", interpreted)
    if outcome in ("triton", "reference"):
        assert kernels.choice(torch.device(device)) == outcome
    else:
        with pytest.raises(ValueError, match=f"DSS_KERNELS.*{outcome}"):
            kernels.choice(torch.device(device))


def test_a_gpu_that_the_kernels_do_not_fit_gets_the_references_and_the_run_says_so(monkeypatch):
    """A T4 (compute capability 7.5) has too little shared memory for our tiles, and AMD's GPUs have no row of tiles."""
    monkeypatch.setattr("kernels.launch.INSTALLED", True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    monkeypatch.delenv("DSS_KERNELS", raising=False)
    kernels.launch.architecture_of.cache_clear()
    with pytest.warns(UserWarning, match="compute capability 8.0"):
        assert kernels.choice(torch.device("cuda", 7)) == "reference"
    kernels.launch.architecture_of.cache_clear()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("value", ["reference", "triton"])
def test_an_operation_goes_to_the_chosen_one_of_its_implementations(monkeypatch, name, value):
    for of in ("reference", "triton"):
        monkeypatch.setattr(f"kernels.{name}_{of}", lambda *a, of=of, **o: (of, a, o))
    monkeypatch.setattr("kernels.choice", lambda device: value)
    assert getattr(kernels, name)(x := torch.zeros(2), 1, other=2) == (value, (x, 1), dict(other=2))
