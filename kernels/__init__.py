"""The operations a T5 spends its time in, and the one place that chooses how each is computed.

Every operation has a reference in plain PyTorch, `kernels.<module>.<name>_reference`, and Triton kernels beside it,
`<name>_triton`. GPU tensors go to Triton where it is installed, all others to the reference. DSS_KERNELS=reference or
triton overrides that; `TRITON_INTERPRET=1 DSS_KERNELS=triton` runs the Triton code on CPU tensors, slowly. The model
calls only what is defined here.
"""

import os

from . import launch
from .attention import attention_reference, attention_triton
from .cross_entropy import (
    cross_entropy_reference,
    cross_entropy_triton,
    linear_cross_entropy_reference,
    linear_cross_entropy_triton,
)
from .geglu import geglu_reference, geglu_triton, relu_reference, relu_triton
from .rms_norm import rms_norm_reference, rms_norm_triton

__version__ = "0.2.0"  # transformers probes for a package named `kernels` and reads its version


def choice(device):
    """What tensors on this torch.device are given to: "triton" or "reference".

    Raises ValueError for a DSS_KERNELS that is misspelt or cannot be had here. A program calls this once before it
    begins, so that no run ends in the middle.
    """
    value = os.environ.get("DSS_KERNELS", "")
    if value not in ("", "reference", "triton"):
        raise ValueError(f"DSS_KERNELS must be 'triton' or 'reference', got {value!r}")
    if value == "":
        return "triton" if launch.INSTALLED and device.type == "cuda" else "reference"
    if value == "triton" and not launch.INSTALLED:
        raise ValueError("DSS_KERNELS=triton: Triton is not installed here; unset it to use the references")
    if value == "triton" and device.type != "cuda" and not launch.INTERPRETED:
        raise ValueError(
            f"DSS_KERNELS=triton: Triton needs a GPU, not {device.type}; unset it, or set TRITON_INTERPRET=1 as well"
        )
    return value


def operation(reference, in_triton):
    """The public operation with these implementations, one of which is chosen at each call."""

    def call(*args, **kwargs):
        tensor = args[0] if args else next(iter(kwargs.values()))
        return (in_triton if choice(tensor.device) == "triton" else reference)(*args, **kwargs)

    call.__name__, call.__doc__ = reference.__name__.removesuffix("_reference"), reference.__doc__
    setattr(call, reference.__name__, reference)  # `kernels.attention` is this function, not the module of that name
    setattr(call, in_triton.__name__, in_triton)
    return call


attention = operation(attention_reference, attention_triton)
cross_entropy = operation(cross_entropy_reference, cross_entropy_triton)
linear_cross_entropy = operation(linear_cross_entropy_reference, linear_cross_entropy_triton)
rms_norm = operation(rms_norm_reference, rms_norm_triton)
geglu = operation(geglu_reference, geglu_triton)
relu = operation(relu_reference, relu_triton)

# Names that belong to a module whose own name an operation has taken above.
cross_entropy.linear_cross_entropy_reference = linear_cross_entropy_reference
cross_entropy.linear_cross_entropy_triton = linear_cross_entropy_triton
geglu.relu_reference, geglu.relu_triton = relu_reference, relu_triton
