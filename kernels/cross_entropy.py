"""Cross-entropy with a weight per token, over logits or straight from hidden states.

    loss = sum_t  w_t * ( logsumexp(z_t) - z_t[label_t] ),        z_t = scale * W h_t

The weights carry the method: 1 / N_label on the tokens of label targets and lambda / N_rationale on those of
rationales make one weighted sum of  L_label + lambda * L_rationale,  so both tasks are one pass over one stream.
A token whose label is -100, or whose weight is 0, adds nothing to the loss and nothing to any gradient.

This file holds the references in plain PyTorch; the linear one makes all T x V logits at once.
"""

import torch.nn.functional as F

IGNORE = -100  # the label of a token that is not a target, as everywhere in PyTorch


def cross_entropy_reference(logits, labels, weights, return_token_losses=False):
    """sum_t weights[t] * -log softmax(logits[t])[labels[t]], computed in fp32.

    logits: (T, V), any float dtype; labels: (T,) int64 in [0, V), or -100 for "ignored"; weights: (T,) fp32.
    Returns a scalar fp32 tensor and, if asked, also the (T,) unweighted losses in nats, detached, 0 where ignored.
    Raises ValueError for shapes that do not fit together.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or weights.shape != labels.shape:
        raise ValueError(
            "cross_entropy: logits, labels and weights must be (T, V), (T,) and (T,), got "
            f"{list(logits.shape)}, {list(labels.shape)}, {list(weights.shape)}"
        )
    nll = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    loss = (nll * weights).sum()
    return (loss, nll.detach()) if return_token_losses else loss


def linear_cross_entropy_reference(hidden, weight, labels, weights, scale=1.0, return_token_losses=False):
    """`cross_entropy_reference` of the logits scale * hidden @ weight^T.

    hidden: (T, C); weight: (V, C); scale: d_model**-0.5 where T5 ties the output to the embedding, else 1.
    Other arguments, results and errors as in `cross_entropy_reference`.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy: hidden and weight must be (T, C) and (V, C), got "
            f"{list(hidden.shape)}, {list(weight.shape)}"
        )
    return cross_entropy_reference(F.linear(hidden * scale, weight), labels, weights, return_token_losses)
