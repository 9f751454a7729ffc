"""Greedy decoding with cached states, many inputs at once.

One step reads one token of each unfinished sequence. The cache is allocated once: for self-attention each layer's keys
and values of the tokens so far, for cross-attention the encoder's output, which all layers share. A sequence that ends
leaves the batch: the last one takes its row, so that the running sequences stay the first rows, and no others move.

With one query a sequence, attention is a few plain products on padded states; `kernels.attention` would have to be
given a new packed stream of them in every step.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from dss.batch import LABEL, Sequence, pack, segments
from dss.model import T5
from kernels.buckets import relative_position_bucket


class CrossCache:
    """The encoder's output m, (B, N, C), and a bias (B, 1, N) that hides its padding.

    Cross-attention needs no keys W_k m and values W_v m: with q (W_k m)^T = (q W_k) m^T and P (W_v m) = (P m) W_v^T
    the matrices act on one query instead of N states, and every layer reads the same m, which stays in the CPU's cache.
    """

    def __init__(self, memory, lengths):
        self.memory = pad_sequence(memory.split(lengths), batch_first=True)
        padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]  # (B, N)
        self.bias = torch.where(padding, float("-inf"), 0.0)[:, None].to(memory.device)

    def attend(self, attention, q, x):
        """Queries q (B, H, D) of the newest tokens, whose states are x (B, C) -> (B, H, D)."""
        keys, values = (w.unflatten(0, q.shape[1:]) for w in (attention.k.weight, attention.v.weight))  # (H, D, C)
        q = (q.transpose(0, 1) @ keys).transpose(0, 1)  # (B, H, C)
        weights = (q @ self.memory.mT + self.bias).softmax(-1)  # (B, H, N)
        y = weights @ self.memory  # (B, H, C)
        return (y.transpose(0, 1) @ values.mT).transpose(0, 1)

    def move(self, rows, to, B):
        """Copy `rows` to the rows `to`, int64 indices, and keep the first B rows."""
        for x in (self.memory, self.bias):
            x[to] = x[rows]
        self.memory, self.bias = self.memory[:B], self.bias[:B]


class SelfCache:
    """Keys and values of the t tokens so far, with room for N: (B, H, N, D); bias (H, 1, N), of the last query."""

    def __init__(self, B, D, bias, dtype):
        H, _, N = bias.shape
        self.k, self.v = (torch.empty(B, H, N, D, dtype=dtype, device=bias.device) for _ in range(2))
        self.bias, self.t = bias, 0

    def attend(self, attention, q, x):
        self.k[:, :, self.t], self.v[:, :, self.t] = (attention.heads(part(x)) for part in (attention.k, attention.v))
        self.t += 1
        k, v = self.k[:, :, : self.t], self.v[:, :, : self.t]
        weights = (q[:, :, None] @ k.mT + self.bias[..., -self.t :]).softmax(-1)  # (B, H, 1, t)
        return (weights.to(v.dtype) @ v)[:, :, 0]

    def move(self, rows, to, B):
        for x in (self.k, self.v):
            x[to, :, : self.t] = x[rows, :, : self.t]
        self.k, self.v = self.k[:B], self.v[:B]


@torch.no_grad()
def generate(
    model: T5, inputs: list[list[int]], max_new_tokens: int = 64, batch_size: int = 64, stop: int | None = None
) -> list[list[int]]:
    """Greedy outputs for a list of inputs (each a non-empty list of ids, ending in </s>), in their order.

    An output ends before </s>, before the token `stop`, or after max_new_tokens. Inputs are taken batch_size at a time,
    longest first: a batch holds inputs of like length, and memory runs out in the first batch if at all. Call
    model.eval() first. Raises ValueError for an empty input.
    """
    if not all(map(len, inputs)):
        raise ValueError(f"generate: input {[len(i) for i in inputs].index(0)} is empty")
    outputs = [[] for _ in inputs]
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, ids in zip(chosen, generate_batch(model, [inputs[i] for i in chosen], max_new_tokens, stop)):
            outputs[i] = ids
    return outputs


def generate_batch(model: T5, inputs: list[list[int]], max_new_tokens: int, stop: int | None) -> list[list[int]]:
    device, config, lengths = model.embedding.weight.device, model.config, list(map(len, inputs))
    memory = model.encode(torch.tensor([t for ids in inputs for t in ids], device=device), segments(lengths, device))
    distance = torch.arange(1 - max_new_tokens, 1, device=device)
    shape = config.relative_attention_num_buckets, config.relative_attention_max_distance
    bias = model.decoder.bias_table[relative_position_bucket(distance, *shape, bidirectional=False)]  # (N, H)
    across = CrossCache(memory, lengths)
    own = [SelfCache(len(inputs), config.d_kv, bias.T[:, None], memory.dtype) for _ in model.decoder.layers]
    cache = [(one, across) for one in own]

    outputs = [[] for _ in inputs]
    running = list(range(len(inputs)))  # the sequence, as an index of `inputs`, in each row
    token = torch.full((len(inputs),), config.decoder_start_token_id, device=device)
    for _ in range(max_new_tokens):
        token = model.read_out(model.decode(token, None, memory, None, cache)).argmax(-1)  # (B,)
        drawn = token.tolist()
        going = [row for row, t in enumerate(drawn) if t not in (config.eos_token_id, stop)]
        for row in going:
            outputs[running[row]].append(drawn[row])
        B = len(going)
        if B == 0:
            break
        if len(running) > B:
            rows = [row for row in going if row >= B]
            to = sorted(set(range(B)).difference(going))  # as many as `rows`
            for i, j in zip(to, rows):
                running[i] = running[j]
            rows, to = torch.tensor([rows, to], dtype=torch.int64, device=device)
            for part in (across, *own):
                part.move(rows, to, B)
            token[to] = token[rows]
            token, running = token[:B], running[:B]
    return outputs


@torch.no_grad()
def score(
    model: T5, inputs: list[list[int]], candidates: list[list[list[int]]], batch_size: int = 64
) -> list[list[float]]:
    """The log-likelihood of every candidate output of every input, natural logarithm, summed over its tokens.

    inputs: lists of ids, ending in </s>; candidates[i]: the outputs to compare for inputs[i], each a list of ids, with
    the token that ends it. At most batch_size candidates are computed at a time. Returns a list of lists of floats,
    shaped as candidates. Raises ValueError for an empty input, candidate or list.
    """
    if not all(map(len, inputs)) or not all(map(len, candidates)) or not all(len(c) for cs in candidates for c in cs):
        raise ValueError("score: every input needs a token and a candidate, every candidate a token")
    both = zip(inputs, candidates, strict=True)
    pairs = [Sequence(ids, candidate, LABEL) for ids, some in both for candidate in some]
    scores = []
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        batch = pack(some, model.embedding.weight.device, model.config.decoder_start_token_id)
        token = model.read_out(model(batch)).float().log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]  # (T,)
        scores += [float(part.sum()) for part in token.double().cpu().split([len(s.target_ids) for s in some])]
    each = iter(scores)
    return [[next(each) for _ in some] for some in candidates]
