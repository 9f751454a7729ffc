"""What a training step on a GPU asks of the host and of memory, without a GPU: launches are recorded, not made."""

import torch
from comparing import needs_triton
from running import V1_1, student
from torch.utils._python_dispatch import TorchDispatchMode

from dss.batch import LABEL, RATIONALE, Sequence, count_targets, pack
from dss.loss import distillation_loss
from kernels.compile import recording

pytestmark = needs_triton
DEEP = dict(
    vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_heads=2, num_layers=12, num_decoder_layers=12
)
SEQUENCES = [
    Sequence(list(range(2, 62)), list(range(2, 52)), task) for task in (LABEL, RATIONALE) * 2
]
TOKENS = {sum(len(s.input_ids) for s in SEQUENCES), sum(len(s.target_ids) for s in SEQUENCES)}


class Casts(TorchDispatchMode):
    """Counts the casts of floating-point tensors with a row per token, and what would make the host wait."""

    casts = waits = operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result, self.operations = operation(*args, **(kwargs or {})), self.operations + 1
        if operation is torch.ops.aten._to_copy.default and args[0].is_floating_point():
            self.casts += (
                args[0].dtype != result.dtype and args[0].dim() > 1 and args[0].shape[0] in TOKENS
            )
        self.waits += operation in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return result


def test_a_bfloat16_step_of_t5_base_casts_few_activations_and_never_waits(monkeypatch):
    """12 + 12 layers; narrow, since the count does not depend on the width."""
    monkeypatch.setenv("DSS_KERNELS", "triton")
    monkeypatch.setattr(
        "kernels.losses.check_arguments", lambda *_: None
    )  # they read labels and cu_seqlens only on
    monkeypatch.setattr("kernels.flash_attention.check_arguments", lambda *of: of[-1])  # the CPU
    model = student(**DEEP, **V1_1, dropout_rate=0.1).train()
    model.encoder.dropout.p = model.decoder.dropout.p = (
        0.0  # torch's own, which on a CPU asks for values
    )
    batch, count = pack(SEQUENCES), Casts()

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = distillation_loss(model, batch, *count_targets(SEQUENCES), 1.0)[0]
        loss.backward()

    with recording("sm_90"):
        step()  # the first step fills caches, which may wait
    with recording("sm_90") as launches, count:
        step()
    launched = [launch.kernel.__name__ for launch in launches]
    assert count.casts <= 20 and count.waits == 0
    assert (
        launched.count("attention_forward_kernel") == launched.count("attention_dkdv_kernel") == 36
    )
    assert count.operations > 100, "the mode saw the step"
