"""Greedy decoding with cached keys and values, many inputs at once.

One step reads one token of each unfinished sequence. Every decoder layer remembers two things: `SelfCache` the keys and
values of the tokens so far, which all sequences have equally many of, and `CrossCache` those of the encoder's output,
computed once and packed as the encoder left them. A sequence that ends leaves the batch, and its cache with it.
"""

import torch

from dss.batch import LABEL, Batch, Segments, Sequence, pack, segments
from dss.model import T5


class SelfCache:
    """Keys and values of the targets so far: B sequences of t tokens each."""

    def __init__(self):
        self.k = self.v = None  # (B, t, H, D)

    def update(self, attention, x, _):
        """x: (B, C), the newest token of each sequence -> its keys, values (B * t, H, D) and Segments, grown by one."""
        k, v = (new[:, None] for new in attention.keys_values(x))
        self.k = k if self.k is None else torch.cat([self.k, k], dim=1)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=1)
        B, t = self.k.shape[:2]
        cu_seqlens = torch.arange(0, (B + 1) * t, t, dtype=torch.int32, device=x.device)
        return self.k.flatten(0, 1), self.v.flatten(0, 1), Segments(cu_seqlens, t)

    def keep(self, rows, _):
        self.k, self.v = self.k[rows], self.v[rows]


class CrossCache:
    """Keys and values of the inputs, packed."""

    def __init__(self):
        self.k = self.v = None  # (T_in, H, D)

    def update(self, attention, memory, inputs):
        if self.k is None:
            self.k, self.v = attention.keys_values(memory)
        return self.k, self.v, inputs

    def keep(self, _, tokens):
        self.k, self.v = self.k[tokens], self.v[tokens]


class LayerCache:
    def __init__(self):
        self.self_attention, self.cross_attention = SelfCache(), CrossCache()

    def keep(self, rows, tokens):
        """Drop all sequences but `rows`, whose input tokens are `tokens` (both int64 indices)."""
        self.self_attention.keep(rows, tokens)
        self.cross_attention.keep(rows, tokens)


@torch.no_grad()
def generate(
    model: T5, inputs: list[list[int]], max_new_tokens: int = 64, batch_size: int = 64, stop: int | None = None
) -> list[list[int]]:
    """Greedy outputs for a list of inputs (each a non-empty list of ids, ending in </s>), in their order.

    An output ends before </s>, before the token `stop`, or after max_new_tokens. Inputs are taken batch_size at a time,
    longest first, so that a batch holds inputs of like length and a lack of memory shows at once. Dropout follows
    model.training: call model.eval() first. Raises ValueError for an empty input.
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
    device, config = model.embedding.weight.device, model.config
    lengths = [len(ids) for ids in inputs]
    where = segments(lengths, device)
    memory = model.encode(torch.tensor([token for ids in inputs for token in ids], device=device), where)
    cache = [LayerCache() for _ in range(config.num_decoder_layers)]
    outputs = [[] for _ in inputs]
    running = list(range(len(inputs)))  # the sequences in the batch, as indices of `inputs`
    token = torch.full((len(inputs),), config.decoder_start_token_id, device=device)

    for _ in range(max_new_tokens):
        hidden = model.decode(token, segments([1] * len(running), device), memory, where, cache)  # (B, C)
        token = model.read_out(hidden).argmax(-1)  # (B,)
        drawn = token.tolist()
        going = [row for row, t in enumerate(drawn) if t not in (config.eos_token_id, stop)]
        for row in going:
            outputs[running[row]].append(drawn[row])
        if not going:
            break
        if len(going) < len(running):
            rows = torch.tensor(going, device=device)
            starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
            tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in going]).to(device)
            for layer in cache:
                layer.keep(rows, tokens)
            token, running, lengths = token[rows], [running[r] for r in going], [lengths[r] for r in going]
            where = segments(lengths, device)
    return outputs


@torch.no_grad()
def score(
    model: T5, inputs: list[list[int]], candidates: list[list[list[int]]], batch_size: int = 64
) -> list[list[float]]:
    """The log-likelihood of every candidate output of every input, natural logarithm, summed over its tokens.

    inputs: lists of ids, ending in </s>; candidates[i]: the outputs to compare for inputs[i], each a list of ids, with
    the token that ends it. At most batch_size candidates are computed at a time (but all of one input's). Returns a
    list of lists of floats, shaped as candidates. Raises ValueError for an empty input, candidate or list of them.
    """
    if not all(map(len, inputs)) or not all(map(len, candidates)) or not all(len(c) for cs in candidates for c in cs):
        raise ValueError("score: every input needs a token and a candidate, every candidate a token")
    device, scores, start = model.embedding.weight.device, [], 0
    while start < len(inputs):
        end, pairs = start, []
        while end < len(inputs) and (not pairs or len(pairs) + len(candidates[end]) <= batch_size):
            pairs += [Sequence(inputs[end], candidate, LABEL) for candidate in candidates[end]]
            end += 1
        likelihood = iter(sequence_likelihoods(model, pack(pairs, device, model.config.decoder_start_token_id)))
        scores += [[next(likelihood) for _ in row] for row in candidates[start:end]]
        start = end
    return scores


def sequence_likelihoods(model: T5, batch: Batch) -> list[float]:
    """The log-likelihood of each target of a Batch, as a list of floats."""
    token = model.read_out(model(batch)).float().log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]  # (T,)
    lengths = batch.targets.cu_seqlens.diff().tolist()
    return [float(part.sum()) for part in token.double().cpu().split(lengths)]
