"""Root-mean-square normalisation:  y = x / sqrt(mean(x^2) + eps) * weight.

T5's layer norm subtracts no mean and adds no bias (Zhang and Sennrich 2019). The mean of squares is taken in fp32
whatever the input's dtype: in half precision the sum of a few hundred squares has lost its last digits.
"""

import torch


def rms_norm_reference(x, weight, eps=1e-6):
    """x: (T, C), any float dtype; weight: (C,). Returns (T, C) in x's dtype; the arithmetic is fp32.

    Raises ValueError if weight does not match x's last dimension.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be ({x.shape[-1]},), got {list(weight.shape)}")
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)
