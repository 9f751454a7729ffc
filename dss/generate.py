"""Greedy decoding with a key/value cache, many inputs at once; and the likelihood of given outputs.

One step reads one token of each running sequence. Each attention of the decoder has a `Cache`:
self-attention adds the newest token's key and value to it; cross-attention's holds those of the
encoder states, computed once. With one query a sequence, attention is two small products on padded
keys and values, and `kernels.attention` is not needed.
"""

from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dss.batch import LABEL, Segments, Sequence, pack, segments, stream
from dss.model import T5, Cache, LayerCache
from kernels.buckets import relative_position_bucket


def make_caches(
    model: T5, memory: Tensor, inputs: Segments, lengths: list[int], room: int
) -> list[LayerCache]:
    """Caches of all decoder layers for encoder states memory (T_in, C) and at most `room` tokens of
    output."""
    config = model.config
    B = len(lengths)
    longest = inputs.max_seqlen
    distance = torch.arange(1 - room, 1, device=memory.device)  # of keys to the newest token
    bucket = relative_position_bucket(
        distance,
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
        bidirectional=False,
    )
    position_bias = model.decoder.bias_table[bucket].T[None]  # (1, H, room)
    padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]  # (B, longest)
    padding_bias = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
    padding_bias = padding_bias[:, None].to(memory.device)  # (B, 1, longest)
    caches = []
    for layer in model.decoder.layers:
        attention = layer.cross_attention
        k = padded(attention.heads(attention.k(memory)), lengths)
        v = padded(attention.heads(attention.v(memory)), lengths)
        shape = (B, config.num_heads, room, config.d_kv)
        own = Cache(k.new_empty(shape), v.new_empty(shape), position_bias, length=0)
        caches.append(LayerCache(own, Cache(k, v, padding_bias, length=longest)))
    return caches


def padded(x: Tensor, lengths: list[int]) -> Tensor:
    """(T, H, D) packed -> (B, H, N, D), zeros behind the end of each sequence."""
    return pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous()


@torch.no_grad()
def generate(
    model: T5,
    inputs: list[list[int]],
    max_new_tokens: int = 64,
    batch_size: int = 64,
    stop: int | None = None,
) -> list[list[int]]:
    """Greedy outputs for a list of inputs (each a non-empty list of ids, ending in </s>), in their
    order.

    An output ends before </s>, before the token `stop`, or after max_new_tokens. Inputs are taken
    batch_size at a time, longest first: a batch holds inputs of like length, and if memory runs out
    it does so in the first batch. Call model.eval() first. Raises ValueError for an empty input.
    """
    for i, ids in enumerate(inputs):
        if len(ids) == 0:
            raise ValueError(f"generate: input {i} is empty")
    outputs = [[] for _ in inputs]
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        written = generate_batch(model, [inputs[i] for i in chosen], max_new_tokens, stop)
        for i, ids in zip(chosen, written):
            outputs[i] = ids
    return outputs


def generate_batch(
    model: T5, inputs: list[list[int]], max_new_tokens: int, stop: int | None
) -> list[list[int]]:
    """`generate` for one batch. What a finished sequence still writes is passed over."""
    device = model.embedding.weight.device
    memory, where = encode_inputs(model, inputs)
    lengths = [len(ids) for ids in inputs]
    caches = make_caches(model, memory, where, lengths, max_new_tokens)

    outputs = [[] for _ in inputs]
    running = set(range(len(inputs)))
    token = torch.full((len(inputs),), model.config.decoder_start_token_id, device=device)
    for _ in range(max_new_tokens):
        hidden = model.decode(token, None, memory, where, caches)  # (B, C)
        token = model.read_out(hidden).argmax(-1)  # (B,)
        for i, written in enumerate(token.tolist()):
            if written in (model.config.eos_token_id, stop):
                running.discard(i)
            elif i in running:
                outputs[i].append(written)
        if not running:
            break
    return outputs


def encode_inputs(model: T5, inputs: list[list[int]]) -> tuple[Tensor, Segments]:
    """Encoder states (T_in, C) of some inputs, and where each begins."""
    device = model.embedding.weight.device
    where = segments([len(ids) for ids in inputs], device)
    return model.encode(stream(np.concatenate(inputs), device), where), where


@torch.no_grad()
def score(
    model: T5, inputs: list[list[int]], candidates: list[list[list[int]]], batch_size: int = 64
) -> list[list[float]]:
    """The log-likelihood of every candidate output of every input, natural logarithm, summed over
    its tokens.

    inputs: lists of ids, ending in </s>; candidates[i]: the outputs to compare for inputs[i], each
    a list of ids with the token that ends it. At most batch_size candidates are computed at a time.
    Returns a list of lists of floats, shaped as candidates. Raises ValueError for an empty input,
    candidate or list.
    """
    if not all([*inputs, *candidates, *chain.from_iterable(candidates)]):
        raise ValueError("score: an input, a candidate or a list of candidates is empty")
    pairs = []
    for i, (ids, outputs) in enumerate(zip(inputs, candidates, strict=True)):
        pairs += [(i, Sequence(ids, output, LABEL)) for output in outputs]
    device = model.embedding.weight.device
    scores = []
    for first in range(0, len(pairs), batch_size):
        numbers, some = zip(*pairs[first : first + batch_size])
        batch = pack(some, device, model.config.decoder_start_token_id)
        # Each of their inputs is encoded once, and its candidates read the same states.
        distinct = list(dict.fromkeys(numbers))
        memory, _ = encode_inputs(model, [inputs[i] for i in distinct])
        states = dict(zip(distinct, memory.split([len(inputs[i]) for i in distinct])))
        repeated = torch.cat([states[i] for i in numbers])
        hidden = model.decode(batch.decoder_input_ids, batch.targets, repeated, batch.inputs)
        log_p = model.read_out(hidden).float().log_softmax(-1)  # (T, V)
        of_labels = log_p.gather(1, batch.labels[:, None])[:, 0].double().cpu()  # (T,)
        for of_candidate in of_labels.split([len(s.target_ids) for s in some]):
            scores.append(float(of_candidate.sum()))
    remaining = iter(scores)
    return [[next(remaining) for _ in some] for some in candidates]
