"""The loss of Distilling Step-by-Step:  L = L_label + lambda * L_rationale  (Hsieh et al. 2023,
equation 2).

Each term is the mean cross-entropy over its own target tokens. The means are taken over the whole
optimiser step: N_label and N_rationale count the targets of all its micro-batches on all devices.
Losses and gradients of these parts are then summed, never averaged. Apart from dropout's draws they
do not depend on how a step is divided. (The released code weighs the terms alpha and 1 - alpha;
with alpha = 1 / (1 + lambda) its loss is ours times alpha.)
"""

from torch import Tensor

import kernels
from dss.batch import LABEL, RATIONALE, Batch
from dss.model import T5


def distillation_loss(
    model: T5, batch: Batch, n_label: int | Tensor, n_rationale: int | Tensor, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    """This batch's share of L. n_label, n_rationale: target tokens of each task in the whole step,
    integers or scalar tensors on the batch's device.

    Returns (L, L_label, L_rationale): scalar fp32 tensors in nats, the last two detached. Without
    rationales (n_rationale = 0) or with lam = 0, L is the loss of standard finetuning.
    """
    n_label = n_label + (n_label == 0)  # max(n_label, 1), also of a tensor
    n_rationale = n_rationale + (n_rationale == 0)
    label_weights = (batch.task == LABEL) / n_label  # (T,): 1 / N_label on label tokens, else 0
    rationale_weights = (batch.task == RATIONALE) / n_rationale
    # L = L_label + lambda * L_rationale, token by token:
    weights = label_weights + lam * rationale_weights

    hidden = model(batch)  # (T, C)
    L, nll = kernels.linear_cross_entropy(
        hidden,
        model.output_matrix,
        batch.labels,
        weights,
        scale=model.output_scale,
        return_token_losses=True,
    )
    return L, (nll * label_weights).sum(), (nll * rationale_weights).sum()
