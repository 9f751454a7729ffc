"""Linear layers without bias, and their weights in bfloat16 for one training step.

Autocast casts each matrix where it is used, and each gradient back: 433 launches in a step of
T5-base. `cast_weights` casts the matrices of all layers by one call, and their gradients by
another. It puts those that multiply the same input (queries, keys and values; gate and up) below
each other, so that one product computes them. The parameters stay as they are: one for each matrix,
in fp32, since a step of the optimiser would often be lost in the rounding of bfloat16.

Embedding and output matrix are not among them (kernels/losses.py casts the latter). Evaluation
leaves the casts to autocast.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """x (T, C) -> x W^T (T, N), with a weight W of (N, C)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.joined: Tensor | None = None  # within `cast_weights`: W and those that go with it

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.joined is None else self.joined)


def project(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """layer(x) for each of several layers that are one group (see `cast_weights`)."""
    joined = layers[0].joined
    if joined is None:
        return tuple(layer(x) for layer in layers)
    return JoinedProduct.apply(x.to(joined.dtype), joined, len(layers))


class JoinedProduct(torch.autograd.Function):
    """x (T, C) times the transpose of each of n matrices, which lie below each other in `joined`,
    (n N, C). Returns n tensors (T, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: Tensor, n: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, joined)
        weights = joined.unflatten(0, (n, -1))  # (n, N, C)
        # Not a slice of one product's columns: the kernels take contiguous tensors.
        return torch.bmm(x.expand(n, -1, -1), weights.mT).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, joined = ctx.saved_tensors
        dy = torch.cat(upstream, -1)  # (T, n N)
        return dy @ joined, dy.mT @ x, None


@contextmanager
def cast_weights(model: nn.Module) -> Iterator[None]:
    """Within this, for one forward and backward pass, the layers of a T5 compute with bfloat16
    copies of their weights.

    A module names its layers in `groups`, a list of tuples: the layers of a tuple have the same
    input and shape, and are computed by `project`.
    """
    groups = []
    for module in model.modules():
        groups += getattr(module, "groups", [])
    weights = [layer.weight for group in groups for layer in group]
    joined = Cast.apply([len(group) for group in groups], *weights)
    for group, weight in zip(groups, joined):
        group[0].joined = weight
    try:
        yield
    finally:
        for group in groups:
            group[0].joined = None


class Cast(torch.autograd.Function):
    """Weights in fp32, of which the first sizes[0] are a group, and so on -> a bfloat16 tensor for
    each group, (rows of all its weights, C)."""

    @staticmethod
    def forward(ctx: Any, sizes: list[int], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        joined = []
        first = 0
        for size in sizes:
            rows, columns = weights[first].shape
            joined.append(weights[first].new_empty(size * rows, columns, dtype=torch.bfloat16))
            first += size
        torch._foreach_copy_(split_groups(joined, sizes), list(weights))
        return tuple(joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        parts = split_groups(upstream, ctx.sizes)
        gradients = [torch.empty_like(part, dtype=torch.float32) for part in parts]
        torch._foreach_copy_(gradients, parts)
        return None, *gradients


def split_groups(joined: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """The matrices of each group."""
    parts = []
    for tensor, size in zip(joined, sizes):
        parts += tensor.chunk(size)
    return parts
