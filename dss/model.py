"""T5, encoder and decoder, on packed streams of tokens (Raffel et al. 2020; T5 1.1: Shazeer 2020). Read it top-down.

    T5            embedding, encoder stack, decoder stack, output matrix
      Stack       a bias table shared by its layers, the layers, a final norm
        Layer     x + self-attention, (decoder: x + cross-attention,) x + feed-forward; each on a normalised x
          Attention, FeedForward, RMSNorm

Everything but attention works on tokens, (T, C), whichever sequence they belong to; attention alone is told where
sequences begin (`Segments`). Dimensions: T tokens of all sequences, C model width, H heads, D head width, V vocabulary,
B sequences. The arithmetic that dominates is in `kernels`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from dss.batch import LABEL, Batch, Segments, Sequence, pack
from dss.config import T5Config

FEW = 128  # products of fewer tokens, as in a step of decoding, are computed another way


class T5(nn.Module):
    """A T5 of the given `T5Config` with T5's random initialisation, drawn from torch's global generator."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, config.num_layers, is_decoder=False)
        self.decoder = Stack(config, config.num_decoder_layers, is_decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        self.initialise()

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def output_matrix(self) -> Tensor:
        """(V, C): the matrix that turns a decoder state into logits, times `output_scale`."""
        return self.embedding.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def output_scale(self) -> float:
        # The embedding has entries of variance 1; as output matrix it would give logits sqrt(C) times too large.
        return self.config.d_model**-0.5 if self.config.scale_decoder_outputs else 1.0

    def forward(self, batch: Batch) -> Tensor:
        """The decoder state (T, C) that predicts each of batch.labels."""
        with kernels.seeds_drawn_together(batch.input_ids.device):
            memory = self.encode(batch.input_ids, batch.inputs)
            return self.decode(batch.decoder_input_ids, batch.targets, memory, batch.inputs)

    def encode(self, input_ids: Tensor, inputs: Segments) -> Tensor:
        """(T_in,) packed tokens -> (T_in, C) encoder states."""
        return self.encoder(self.embedding(input_ids), inputs)

    def decode(
        self, decoder_input_ids: Tensor, targets: Segments, memory: Tensor, inputs: Segments, cache: list | None = None
    ) -> Tensor:
        """(T,) packed target tokens, reading memory (T_in, C) -> (T, C). With a cache, (B,) tokens: dss/generate.py."""
        return self.decoder(self.embedding(decoder_input_ids), targets, memory, inputs, cache)

    def logits(self, input_ids: list[list[int]], decoder_input_ids: list[list[int]]) -> list[Tensor]:
        """Two lists of lists of token ids -> a list of (T_i, V) tensors, one for each pair.

        decoder_input_ids[i] begins with the start token (pad). Raises ValueError if the lists differ in length or hold
        an empty one.
        """
        if len(input_ids) != len(decoder_input_ids) or not all(map(len, [*input_ids, *decoder_input_ids])):
            raise ValueError("logits: give as many inputs as decoder inputs, at least one token in each")
        if not input_ids:
            return []
        pairs = [Sequence(i, d, LABEL) for i, d in zip(input_ids, decoder_input_ids)]
        batch = pack(pairs, self.embedding.weight.device)
        memory = self.encode(batch.input_ids, batch.inputs)
        hidden = self.decode(batch.labels, batch.targets, memory, batch.inputs)  # not shifted: they begin with pad
        return list(self.read_out(hidden).split([len(d) for d in decoder_input_ids]))

    def read_out(self, hidden: Tensor) -> Tensor:
        """(T, C) decoder states -> (T, V) logits."""
        return product(hidden * self.output_scale, self.output_matrix)

    @torch.no_grad()
    def initialise(self) -> None:
        """T5's initialisation: a matrix (N, C) has deviation 1/sqrt(C). Attention does not divide by sqrt(D), so query
        weights are smaller by that.

        An untied output matrix gets 1/sqrt(C), as in T5's own code (transformers draws it with deviation 1, and
        training from random weights then starts at a loss of about sqrt(C)).
        """
        c, factor = self.config, self.config.initializer_factor
        other = {"embedding": 1.0, "bias_table": c.d_model**-0.5, "q": (c.d_model * c.d_kv) ** -0.5}
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(factor)
            else:
                key = name.removesuffix(".weight").rsplit(".", 1)[-1]
                parameter.normal_(0.0, factor * other.get(key, parameter.shape[1] ** -0.5))


class Stack(nn.Module):
    """Encoder or decoder. The bias table belongs to the stack: all its layers add the same position bias."""

    def __init__(self, config: T5Config, num_layers: int, is_decoder: bool):
        super().__init__()
        self.bias_table = nn.Parameter(torch.empty(config.relative_attention_num_buckets, config.num_heads))
        self.layers = nn.ModuleList(Layer(config, is_decoder) for _ in range(num_layers))
        self.final_norm = RMSNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, x: Tensor, positions: Segments,
        memory: Tensor | None = None, inputs: Segments | None = None, cache: list | None = None,
    ) -> Tensor:  # fmt: skip
        """x: (T, C) of the `Segments` positions; a decoder also reads memory (T_in, C) of the `Segments` inputs."""
        x, part = self.dropout(x), None
        for i, layer in enumerate(self.layers):
            x, part = layer(x, part, positions, self.bias_table, memory, inputs, cache[i] if cache else None)
        _, y = self.final_norm(x, part)
        return self.dropout(y)


class Layer(nn.Module):
    """One layer: T5 normalises the input of each part and adds its output to what came in ("pre-norm").

    A layer returns the residual stream x and the output of its last part, which the next norm adds to x: one kernel
    does both.
    """

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        self.self_attention_norm = RMSNorm(config)
        self.self_attention = Attention(config, causal=is_decoder)
        if is_decoder:
            self.cross_attention_norm = RMSNorm(config)
            self.cross_attention = Attention(config, causal=False)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, part: Tensor | None, positions: Segments, bias_table: Tensor,
        memory: Tensor | None, inputs: Segments | None, cache: tuple | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x, part: (T, C), the sum of which goes into the layer (no part: x alone); the rest is as `Stack` has it."""
        x, y = self.self_attention_norm(x, part)
        own, across = cache or (None, None)
        part = self.self_attention(y, positions, y, positions, bias_table, own)
        if memory is not None:  # no position bias from target to input: their positions have nothing in common
            x, y = self.cross_attention_norm(x, part)
            part = self.cross_attention(y, positions, memory, inputs, None, across)
        x, y = self.feed_forward_norm(x, part)
        return x, self.feed_forward(y)


class Attention(nn.Module):
    """Multi-head attention from x to memory (self-attention: memory is x). No bias vectors, no 1/sqrt(D)."""

    def __init__(self, config: T5Config, causal: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)
        self.o = Linear(inner, config.d_model)
        self.d_kv, self.causal = config.d_kv, causal
        self.max_distance, self.dropout_p = config.relative_attention_max_distance, config.dropout_rate

    def forward(
        self, x: Tensor, queries: Segments, memory: Tensor, keys: Segments, bias_table: Tensor | None, cache: Any
    ) -> Tensor:
        """x: (Tq, C) of the sequences `queries`; memory: (Tk, C) of `keys`; bias_table: (num_buckets, H) or None."""
        if cache:
            return self.o(cache.attend(self, self.heads(self.q(x)), x).flatten(1))
        if memory is x:
            q, k, v = map(self.heads, products(x, self.q, self.k, self.v))
        else:
            q = self.heads(self.q(x))
            k, v = map(self.heads, products(memory, self.k, self.v))
        p = self.dropout_p if self.training else 0.0
        options = dict(causal=self.causal, dropout_p=p, max_distance=self.max_distance)
        options |= dict(max_seqlen_q=queries.max_seqlen, max_seqlen_k=keys.max_seqlen)
        y = kernels.attention(q, k, v, bias_table, queries.cu_seqlens, keys.cu_seqlens, **options)
        return self.o(y.flatten(1))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_kv))  # (T, H * D) -> (T, H, D)


class FeedForward(nn.Module):
    """T5 1.0: relu(x U) W. T5 1.1: (gelu(x G) * x U) W, gated. Dropout sits before the last matrix."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.gate = Linear(config.d_model, config.d_ff)
        self.up = Linear(config.d_model, config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)
        self.dropout_p = config.dropout_rate

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout_p if self.training else 0.0
        if self.gated:
            y = kernels.geglu(*products(x, self.gate, self.up), p)  # (T, F)
        else:
            y = F.dropout(F.relu(self.up(x)), p, self.training)
        return self.down(y)


class Linear(nn.Linear):
    """A linear layer without a bias vector."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, C) times weight (N, C) transposed -> (T, N). For few tokens a CPU computes (W x^T)^T faster, 4 of them in a
    quarter of the time."""
    return (weight @ x.T).T if len(x) < FEW and x.device.type == "cpu" else F.linear(x, weight)


def products(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """layer(x) of each of some equally large layers, by one matrix product.

    Where x has few tokens, as in decoding, joining the weights would take longer than it saves.
    """
    if len(x) < FEW:
        return tuple(layer(x) for layer in layers)
    return product(x, torch.cat([layer.weight for layer in layers])).chunk(len(layers), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.eps, self.dropout_p = config.layer_norm_epsilon, config.dropout_rate

    def forward(self, x: Tensor, part: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + dropout(part), or x as it is where there is no part, and that normalised."""
        if part is None:
            return x, kernels.rms_norm(x, self.weight, self.eps)
        p = self.dropout_p if self.training else 0.0
        return kernels.rms_norm(part, self.weight, self.eps, residual=x, dropout_p=p)
