"""Weights that are cast together: the same products as autocast's, in fewer launches."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dss.batch import LABEL, RATIONALE, Sequence, count_targets, pack
from dss.config import SIZES, parse_args
from dss.distributed import Replicas
from dss.linear import cast_weights
from dss.loss import distillation_loss
from dss.model import T5

SEQUENCES = [
    Sequence([5, 6, 7, 8, 9, 1], [11, 1], LABEL),
    Sequence([5, 6, 7, 8, 9, 1], [12, 13, 14, 1], RATIONALE),
]


class Counted(TorchDispatchMode):
    """Counts the calls of each operation."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls.append(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.fixture(params=["tiny", "t5-v1_1-small"])
def model(request):
    shape = SIZES[request.param]
    torch.manual_seed(0)
    smaller = dict(vocab_size=60, num_layers=2, num_decoder_layers=2, d_model=64, d_ff=80)
    return T5(type(shape)(**(vars(shape) | smaller)))


def gradients(model, cast, autocast=True):
    """The gradient of each parameter, and the operations of the step."""
    model.train().zero_grad()
    torch.manual_seed(3)
    counted = Counted()
    with counted, cast(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            counts = count_targets(SEQUENCES)
            L, _, _ = distillation_loss(model, pack(SEQUENCES), *counts, 1.0)
        L.backward()
    return {name: p.grad for name, p in model.named_parameters()}, counted.calls


def distance(a, b):
    return sum((a[name] - b[name]).square().sum() for name in b).sqrt()


def test_gradients_are_as_near_to_fp32_as_those_of_autocast(model):
    exact, _ = gradients(model, nullcontext, autocast=False)
    of_autocast, _ = gradients(model, nullcontext)
    together, _ = gradients(model, cast_weights)
    assert all(gradient.dtype == torch.float32 for gradient in together.values())
    assert 0 < distance(together, exact) <= 1.5 * distance(of_autocast, exact)


def test_one_product_for_layers_with_the_same_input_and_no_cast_of_a_weight(model):
    _, alone = gradients(model, nullcontext)
    _, together = gradients(model, cast_weights)
    products = ["aten.mm.default", "aten.bmm.default"]
    layers = 4 if model.encoder.layers[0].feed_forward.gated else 0
    saved = 3 * (4 * 2 + 2 + layers)  # forward, and two in backward: of q, k, v; of k, v; gate, up
    count = [sum(calls.count(product) for product in products) for calls in (alone, together)]
    assert count[0] - count[1] == saved
    casts = [calls.count("aten._to_copy.default") for calls in (alone, together)]
    matrices = 2 * 4 + 2 * 8 + 2 * 4 + layers
    assert casts[0] - casts[1] >= 2 * matrices  # each weight, and each gradient
    assert together.count("aten._foreach_copy_.default") == 2


def test_outside_of_a_pass_the_layers_read_their_parameters(model):
    names = list(model.state_dict())
    with pytest.raises(KeyError), cast_weights(model):
        raise KeyError
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    (logits,) = model.eval().logits([[5, 1]], [[0, 6]])
    assert not logits.any()
    assert list(model.state_dict()) == names


def test_layers_that_are_computed_again_in_backward_use_the_same_weights(model):
    plain, _ = gradients(model, cast_weights)
    config = parse_args(["--checkpoint-activations"])
    again, _ = gradients(Replicas(config, torch.device("cpu")).place(model), cast_weights)
    assert distance(again, plain) == 0
