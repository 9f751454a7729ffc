"""Dropout masks, and the seeds that they depend on."""

import pytest
import torch
from comparing import DEVICE, TRITON, both, needs_triton

from kernels.dropout import dropout_reference, seed_on, threshold_of


@both
def test_a_mask_repeats_with_its_seed_and_follows_torch_s_generator_without_one(ours):
    x = torch.ones(50, 80, device=DEVICE)

    def draw(seed):
        s, _ = ours.rms_norm(x, x[0], 1e-6, x, 0.3, seed)
        return [ours.geglu(x, x, 0.3, seed), s, ours.geglu(x, x, 0.3, seed)]

    state = torch.get_rng_state()
    for seven, again, eight in zip(draw(7), draw(7), draw(8)):
        assert torch.equal(seven, again) and not torch.equal(seven, eight)
    assert torch.equal(state, torch.get_rng_state()), "with a seed the global generator is unused"
    torch.manual_seed(4)
    drawn = draw(None)
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(drawn, draw(None)))
    assert not torch.equal(drawn[0], drawn[2]), "each call has a seed of its own"


def test_the_reference_keeps_its_rate_in_every_byte_of_a_random_word():
    y = dropout_reference(torch.ones(99, 1000), 0.25, 7)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    by_byte = (y.view(-1, 8) > 0).float().mean(0)
    assert ((by_byte - 0.75).abs() < 5 * (8 * 0.1875 / y.numel()) ** 0.5).all()
    odd = dropout_reference(torch.ones(7), 0.5, 7)
    assert odd.shape == (7,), "the last elements do not fill a word"


def test_p_is_rounded_to_a_multiple_of_1_in_256_but_never_to_0_or_1():
    assert [threshold_of(p) for p in (0.0, 0.1, 0.5, 1e-9, 1 - 1e-9)] == [0, 26, 128, 1, 255]


@needs_triton
def test_a_seed_may_lie_on_the_device():
    """Kernels read it when they run, so that the replays of a CUDA graph can change it."""
    x = torch.ones(4, 64, device=DEVICE)
    seed = torch.tensor([5], device=DEVICE)
    first = TRITON.geglu(x, x, 0.5, seed)
    assert torch.equal(first, TRITON.geglu(x, x, 0.5, 5)), "an integer is the same seed"
    seed += 1
    second = TRITON.geglu(x, x, 0.5, seed)
    assert torch.equal(second, TRITON.geglu(x, x, 0.5, 6)) and not torch.equal(first, second)


WRONG = [-1, 2**63, torch.zeros(2).long(), torch.zeros(1), torch.zeros(1).long().to("meta")]


@pytest.mark.parametrize("seed", WRONG, ids=str)
def test_seeds_that_no_kernel_can_read_are_refused(seed):
    with pytest.raises(ValueError, match="dropout: seed must be"):
        seed_on(torch.device("cpu"), seed)
