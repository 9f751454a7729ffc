"""The model against transformers, and on the Triton kernels against itself on the references."""

import copy
import dataclasses

import pytest
import torch
from comparing import DEVICE, needs_triton, relative_error
from running import SMALL, V1_1, student
from torch.utils._python_dispatch import TorchDispatchMode

from dss.batch import LABEL, RATIONALE, Sequence, count_targets, pack
from dss.config import SIZES, parse_args
from dss.distributed import Replicas
from dss.loss import distillation_loss
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
TARGETS = [[4, 5, 1], [7, 8, 9, 10, *range(30, 44), 1], [1]]
STARTED = [[0, *target[:-1]] for target in TARGETS]


def shake(model, size=0.1):
    """Move the weights away from their initial values, so that a swap of two would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))


def their_logits(theirs):
    logits = []
    for ids, started in zip(INPUTS, STARTED):
        output = theirs(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([started]))
        logits.append(output.logits[0])
    return torch.cat(logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_gradients_and_saved_weights_are_those_of_transformers(
    variant, transformers, measured, tmp_path
):
    """In training, but without dropout."""
    arguments, own_head = VARIANTS[variant]
    kind = "MT5" if variant == "mT5" else "T5"
    shape = SMALL | arguments | dict(dropout_rate=0.0, decoder_start_token_id=0)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape)
    theirs = getattr(transformers, f"{kind}ForConditionalGeneration")(config).train()
    shake(theirs)
    if own_head:
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(61, 24) / 5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_t5(tmp_path / "theirs")

    got = torch.cat(ours.logits(INPUTS, STARTED))
    want = their_logits(theirs)
    measured(f"{variant}: logits against transformers", relative_error(got, want), 1e-5)
    labels = torch.tensor(sum(TARGETS, []))
    for logits in (got, want):
        torch.nn.functional.cross_entropy(logits, labels).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    errors = []
    for name, p in ours.named_parameters():
        errors.append(relative_error(p.grad, gradients[checkpoint_name(name, ours)]))
    measured(f"{variant}: worst gradient against transformers", max(errors), 1e-4)

    shake(ours, 0.05)
    save_t5(ours, tmp_path / "ours")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs)
    error = relative_error(their_logits(back), torch.cat(ours.logits(INPUTS, STARTED)))
    measured(f"{variant}: logits of the saved student in transformers", error, 1e-5)
    again = load_t5(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters()))


@pytest.mark.parametrize("size", ["t5-v1_1-small", "mt5-small"])
def test_random_weights_begin_at_the_loss_of_a_guess(size):
    """An output matrix of deviation 1, as transformers draws it, would begin near a loss of
    sqrt(d_model) = 22."""
    torch.manual_seed(0)
    small = dict(vocab_size=500, num_layers=2, num_decoder_layers=2)
    model = T5(dataclasses.replace(SIZES[size], **small)).eval()
    batch = pack([Sequence(list(range(3, 30)), list(range(100, 140)), LABEL)])
    loss = torch.nn.functional.cross_entropy(model.read_out(model(batch)), batch.labels)
    assert abs(loss - torch.tensor(500.0).log()) < 1.0


def test_public_sizes_have_the_published_parameter_counts():
    millions = {"t5-small": 60.5, "t5-base": 222.9, "t5-v1_1-small": 77.0}
    millions |= {"t5-v1_1-base": 247.6, "mt5-small": 300.2}
    for size, number in millions.items():
        with torch.device("meta"):
            model = T5(SIZES[size])
        assert model.num_parameters() == pytest.approx(number * 1e6, rel=1e-3), size


PLACES = ["self_attention", "cross_attention", "feed_forward", "feed_forward_norm"]
PLACES += ["encoder", "decoder"]  # of the embedding, and behind the final norm


@pytest.mark.parametrize("shape", [{}, V1_1], ids=["T5 1.0", "T5 1.1"])
@pytest.mark.parametrize("place", PLACES)
def test_each_dropout_acts_in_training_alone(place, shape):
    model = student(**shape, dropout_rate=0.0)
    for name, module in model.named_modules():
        if name.endswith(place):
            module.dropout_p = 0.5
    for training in (True, False):
        model.train(training)
        one, two = (model.logits([[5, 6, 7, 1]], [[0, 8, 9]])[0] for _ in range(2))
        assert torch.equal(one, two) != training


# ---- On the Triton kernels -----------------------------------------------------------------------

WIDE = dict(d_model=32, d_kv=16, d_ff=48, num_heads=2, num_decoder_layers=1, dropout_rate=0.0)
SEQUENCES = [
    Sequence([5, 6, 7, 8, 1], [11, 1], LABEL),
    Sequence([*range(3, 60), 1], [*range(20, 55), 1], RATIONALE),
]


def wide_student(**changes):
    model = student(**(WIDE | changes)).to(DEVICE)
    shake(model)
    return model


def train_step(model, monkeypatch, kernels):
    """The losses (3,), and the gradients by name, of one step."""
    monkeypatch.setenv("DSS_KERNELS", kernels)
    model.zero_grad()
    batch = pack(SEQUENCES, DEVICE)
    losses = distillation_loss(model, batch, *count_targets(SEQUENCES), lam=0.5)
    losses[0].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return torch.stack([loss.detach() for loss in losses]), gradients


@needs_triton
@pytest.mark.parametrize("shape", [RELU, V1_1], ids=["T5 1.0", "T5 1.1"])
def test_every_gradient_of_a_step_on_triton_is_that_of_the_references(shape, monkeypatch, measured):
    model = wide_student(**shape)
    losses, gradients = train_step(model, monkeypatch, "triton")
    want_losses, want = train_step(model, monkeypatch, "reference")
    torch.testing.assert_close(losses, want_losses, rtol=1e-5, atol=1e-6)
    assert all((g != 0).any() for g in want.values()), "a parameter that plays no part"
    worst = max(relative_error(gradients[name], want[name]) for name in want)
    measured(f"Triton: worst of {len(want)} gradients against the references", worst, 2e-5)


@pytest.mark.parametrize("kernels", ["reference", pytest.param("triton", marks=needs_triton)])
def test_dropout_follows_torch_s_seed_also_where_layers_are_computed_again(kernels, monkeypatch):
    """With --checkpoint-activations a layer must draw the same dropout when it is computed again:
    otherwise the gradients are wrong, at an equal loss."""
    shape = V1_1 | dict(dropout_rate=0.3, num_layers=1, num_heads=1)
    plain = wide_student(**shape).train()
    config = parse_args(["--checkpoint-activations"])
    checkpointed = Replicas(config, torch.device(DEVICE)).place(copy.deepcopy(plain))
    computed = []
    attention = checkpointed.encoder.layers[0].self_attention
    attention.register_forward_hook(lambda *_: computed.append(1))
    found = []
    for model, seed in ((plain, 1), (checkpointed, 1), (plain, 2)):
        torch.manual_seed(seed)
        found.append(train_step(model, monkeypatch, kernels))
    (losses, gradients), (same_losses, same_gradients), (other_losses, _) = found
    assert len(computed) == 2
    assert torch.equal(losses, same_losses) and not torch.equal(losses, other_losses)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]) and gradient.isfinite().all(), name


class Watch(TorchDispatchMode):
    """Counts casts of floating-point tensors with a row per token, and what would make the host
    wait."""

    def __init__(self, row_counts):
        super().__init__()
        self.row_counts = row_counts
        self.casts = 0
        self.waits = 0
        self.operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations += 1
        if operation is torch.ops.aten._to_copy.default and args[0].is_floating_point():
            of_tokens = args[0].dim() > 1 and args[0].shape[0] in self.row_counts
            self.casts += of_tokens and args[0].dtype != result.dtype
        aten = torch.ops.aten
        self.waits += operation in (aten._local_scalar_dense.default, aten.nonzero.default)
        return result


@needs_triton
def test_a_bfloat16_step_of_t5_base_casts_few_activations_and_never_waits(monkeypatch):
    """A step on a GPU, without one: launches are recorded, not made. Of 12 + 12 layers; narrow,
    since the counts do not depend on the width."""
    from kernels.compile import recording

    monkeypatch.setattr("kernels.choice", lambda device: "triton")
    # These checks read labels and cu_seqlens, but only on the CPU.
    monkeypatch.setattr("kernels.losses.check_arguments", lambda *_: None)
    monkeypatch.setattr("kernels.flash_attention.check_arguments", lambda *of: of[-1])
    model = student(**WIDE | V1_1 | dict(num_layers=12, num_decoder_layers=12, dropout_rate=0.1))
    model.train()
    for stack in (model.encoder, model.decoder):
        stack.dropout_p = 0.0  # on a CPU the reference reads its seed
    sequences = []
    for task in (LABEL, RATIONALE) * 2:
        sequences.append(Sequence(list(range(2, 60)), list(range(2, 52)), task))
    batch = pack(sequences)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, _ = distillation_loss(model, batch, *count_targets(sequences), 1.0)
        loss.backward()

    with recording("sm_90"):
        step()  # the first step fills caches, which may wait
    watch = Watch({len(batch.input_ids), len(batch.labels)})
    with recording("sm_90") as launches, watch:
        step()
    launched = [launch.kernel.__name__ for launch in launches]
    assert launched.count("attention_forward_kernel") == 36
    assert launched.count("attention_dkdv_kernel") == 36
    assert watch.casts <= 20 and watch.waits == 0
    assert watch.operations > 100, "the mode saw the step"
