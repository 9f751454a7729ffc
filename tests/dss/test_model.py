"""The model against transformers: logits, every gradient, greedy tokens, and the way back through a saved directory."""

import dataclasses

import pytest
import torch
from comparing import relative_error
from running import SMALL, V1_1, student

from dss.batch import LABEL, Sequence, pack
from dss.config import SIZES
from dss.generate import generate
from dss.model import T5
from dss.weights import checkpoint_name, load_t5, save_t5

RELU = dict(feed_forward_proj="relu")
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
FEW = dict(relative_attention_num_buckets=8, relative_attention_max_distance=20)
VARIANTS = {  # name: (transformers' config arguments, whether lm_head is a matrix of its own)
    "T5 1.0": (RELU, False),
    "T5 1.1, LM-adapted, Flan": (GATED, True),
    "T5 1.1 as transformers 5 initialises it": (GATED, False),  # tied but not scaled
    "mT5": (GATED, True),
    "deeper decoder, H * D != C": (GATED | dict(num_decoder_layers=3, d_kv=16), True),
    "few buckets, short distance": (RELU | FEW, False),
}
INPUTS = [[5, 6, 7, 8, 1], [9, 1], [*range(3, 43), 1]]
TARGETS = [[4, 5, 1], [7, 8, 9, 10, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 1], [1]]


@pytest.fixture(params=VARIANTS)
def pair(request, transformers, tmp_path):
    """(transformers' model in training shape but without dropout, ours loaded from the directory it saved)."""
    arguments, own_head = VARIANTS[request.param]
    kind = "MT5" if request.param == "mT5" else "T5"
    shape = SMALL | arguments | dict(dropout_rate=0.0, decoder_start_token_id=0)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForConditionalGeneration")(getattr(transformers, f"{kind}Config")(**shape))
    with torch.no_grad():
        for parameter in theirs.parameters():  # away from the initial ones and zeros, so that a swap would show
            parameter.add_(0.1 * torch.randn_like(parameter))
        if own_head:
            theirs.lm_head.weight = torch.nn.Parameter(torch.randn(61, 24) / 5)
    theirs.save_pretrained(tmp_path / "theirs")
    return request.param, theirs.train(), load_t5(tmp_path / "theirs")


STARTED = [[0, *target[:-1]] for target in TARGETS]


def their_logits(theirs):
    pairs = [(torch.tensor([i]), torch.tensor([d])) for i, d in zip(INPUTS, STARTED)]
    return torch.cat([theirs(input_ids=i, decoder_input_ids=d).logits[0] for i, d in pairs])


def test_logits_and_every_gradient_are_those_of_transformers(pair, measured):
    name, theirs, ours = pair
    got, want = torch.cat(ours.logits(INPUTS, STARTED)), their_logits(theirs)
    measured(f"{name}: logits against transformers", relative_error(got, want), 1e-5)
    labels = torch.tensor([token for target in TARGETS for token in target])
    for logits in (got, want):
        torch.nn.functional.cross_entropy(logits, labels).backward()
    want = dict(theirs.named_parameters())
    worst = max(relative_error(p.grad, want[checkpoint_name(n, ours)].grad) for n, p in ours.named_parameters())
    measured(f"{name}: worst of {len(want)} gradients against transformers", worst, 1e-4)


def test_greedy_tokens_are_transformers_tokens(pair):
    _, theirs, ours = pair
    theirs.eval()
    for ids, got in zip(INPUTS, generate(ours, INPUTS, max_new_tokens=12)):
        # use_cache=False: transformers 5.23 fails to make a cache for a decoder deeper than its encoder
        want = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, use_cache=False)[0].tolist()[1:]
        assert got == want[: want.index(1) if 1 in want else None]


def test_the_saved_student_gives_transformers_the_same_logits(pair, transformers, measured, tmp_path):
    name, theirs, ours = pair
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_t5(ours, tmp_path / "ours")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs)
    error = relative_error(their_logits(back), torch.cat(ours.logits(INPUTS, STARTED)))
    measured(f"{name}: logits of the saved student in transformers", error, 1e-5)
    again = load_t5(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters()))


@pytest.mark.parametrize("size", ["t5-v1_1-small", "mt5-small"])
def test_random_weights_begin_at_the_loss_of_a_guess(size):
    """An output matrix of deviation 1, as transformers draws it, would begin near a loss of sqrt(d_model) = 22."""
    torch.manual_seed(0)
    model = T5(dataclasses.replace(SIZES[size], vocab_size=500, num_layers=2, num_decoder_layers=2)).eval()
    batch = pack([Sequence(list(range(3, 30)), list(range(100, 140)), LABEL)])
    logits = model.read_out(model(batch))
    loss = torch.nn.functional.cross_entropy(logits, batch.labels).item()
    assert abs(loss - torch.tensor(500.0).log()) < 1.0, loss


def test_public_sizes_have_the_published_parameter_counts():
    counts = {"t5-small": 60.5, "t5-base": 222.9, "t5-v1_1-small": 77.0, "t5-v1_1-base": 247.6, "mt5-small": 300.2}
    for size, millions in counts.items():
        with torch.device("meta"):
            model = T5(SIZES[size])
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=1e-3), size


def test_dropout_follows_torch_s_seed_and_acts_behind_the_final_norm():
    model = student(**V1_1, dropout_rate=0.5)
    batch = pack([Sequence(INPUTS[0], TARGETS[1], LABEL)])
    torch.manual_seed(1)
    first = model.train()(batch)
    torch.manual_seed(1)
    assert torch.equal(first, model(batch)), "dropout is drawn from torch's seed"
    assert not torch.equal(first, model(batch))
    assert (first == 0).float().mean() == pytest.approx(0.5, abs=0.1), "behind the final norm"


@pytest.mark.parametrize("place", ["self_attention", "cross_attention", "feed_forward", "feed_forward_norm"])
def test_each_dropout_acts_in_training_alone(place):
    model = student(**V1_1)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout_p"):
            module.dropout_p = 0.5 if name.endswith(place) else 0.0
    one, two = (model.train().logits([[5, 6, 7, 1]], [[0, 8, 9]])[0] for _ in range(2))
    assert not torch.allclose(one, two)
    one, two = (model.eval().logits([[5, 6, 7, 1]], [[0, 8, 9]])[0] for _ in range(2))
    assert torch.equal(one, two)


def test_bfloat16_autocast_stays_near_fp32():
    model = student(**V1_1).eval()
    batch = pack([Sequence(i, t, LABEL) for i, t in zip(INPUTS, TARGETS)])
    full = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch)
    assert relative_error(half.float(), full) < 3e-2


def test_logits_refuses_lists_that_do_not_match():
    model = student(**V1_1)
    assert model.logits([], []) == []
    for inputs, decoder_inputs in (([[1]], []), ([[]], [[0]]), ([[1]], [[]])):
        with pytest.raises(ValueError, match="logits"):
            model.logits(inputs, decoder_inputs)
