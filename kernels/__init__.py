"""The operations a T5 spends its time in, and the one place that chooses how each is computed.

Every operation has a reference in plain PyTorch, `kernels.<module>.<name>_reference`. This version has nothing else;
`DSS_KERNELS=triton` is refused rather than quietly ignored. The model calls only what is defined here.
"""

import os

from .attention import attention_reference
from .cross_entropy import cross_entropy_reference, linear_cross_entropy_reference
from .geglu import geglu_reference
from .rms_norm import rms_norm_reference

__version__ = "0.1.0"  # transformers probes for a package named `kernels` and reads its version


def choice():
    """What DSS_KERNELS asks for: "reference", or "" where it is not set. Raises ValueError for anything else; a program
    calls it once before it begins, so that a misspelt setting does not end a run in the middle."""
    value = os.environ.get("DSS_KERNELS", "")
    if value == "triton":
        raise ValueError("DSS_KERNELS=triton: this version has the reference kernels only; unset it")
    if value not in ("", "reference"):
        raise ValueError(f"DSS_KERNELS must be 'triton' or 'reference', got {value!r}")
    return value


def operation(reference):
    """The public operation with this reference: the one place where an implementation is chosen, at each call."""

    def call(*args, **kwargs):
        choice()
        return reference(*args, **kwargs)

    call.__name__, call.__doc__ = reference.__name__.removesuffix("_reference"), reference.__doc__
    setattr(call, reference.__name__, reference)  # `kernels.attention` is this function, not the module of that name
    return call


attention = operation(attention_reference)
cross_entropy = operation(cross_entropy_reference)
linear_cross_entropy = operation(linear_cross_entropy_reference)
rms_norm = operation(rms_norm_reference)
geglu = operation(geglu_reference)

# Names that belong to a module whose own name an operation has taken above.
cross_entropy.linear_cross_entropy_reference = linear_cross_entropy_reference
