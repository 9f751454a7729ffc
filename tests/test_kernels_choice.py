"""Who computes an operation: Triton or the reference, and what DSS_KERNELS has to say about it."""

import inspect

import pytest
import torch

import kernels
from kernels import activations, flash_attention, losses, norms

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
    monkeypatch.setattr("kernels.launch.architecture_of", lambda device: "sm_90")
    monkeypatch.setenv("DSS_KERNELS", value)
    monkeypatch.setattr("kernels.launch.INSTALLED", here["installed"])
    monkeypatch.setattr("kernels.launch.INTERPRETED", here["interpreted"])
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


OPERATIONS = dict(attention=flash_attention, cross_entropy=losses, linear_cross_entropy=losses, rms_norm=norms)
OPERATIONS |= dict(geglu=activations, relu=activations)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_goes_to_the_chosen_implementation(monkeypatch, name):
    """Each has a reference and a Triton version in its module, and hands them its arguments as they are."""
    monkeypatch.setattr("kernels.launch.INTERPRETED", True)
    monkeypatch.setattr("kernels.launch.INSTALLED", True)
    x = torch.zeros(2)
    for value in ("reference", "triton"):
        assert inspect.isfunction(getattr(OPERATIONS[name], f"{name}_{value}"))
        monkeypatch.setenv("DSS_KERNELS", value)
        monkeypatch.setattr(kernels, f"{name}_{value}", lambda *a, value=value, **o: (value, a, o))
        assert getattr(kernels, name)(x, 1, other=2) == (value, (x, 1), dict(other=2))
