"""The gated feed-forward activation of T5 1.1:  y = gelu(gate) * up  (Shazeer 2020, "GEGLU").

T5 uses the tanh approximation of GELU, gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))); the exact one
differs in the fourth digit, enough to fail a comparison of logits.
"""

import torch.nn.functional as F


def geglu_reference(gate, up):
    """gate, up: (T, F), one float dtype. Returns gelu_tanh(gate) * up, (T, F). Raises ValueError if shapes differ."""
    if gate.shape != up.shape:
        raise ValueError(f"geglu: gate and up must have one shape, got {list(gate.shape)} and {list(up.shape)}")
    return F.gelu(gate, approximate="tanh") * up
