"""T5, encoder and decoder, on packed streams of tokens (Raffel et al. 2020; T5 1.1: Shazeer 2020).
Read it top-down.

    T5            embedding, encoder stack, decoder stack, output matrix
      Stack       a bias table shared by its layers, the layers, a final norm
        Layer     x + self-attention, x + cross-attention (decoder), x + feed-forward
          Attention, FeedForward, RMSNorm

Everything but attention works on tokens, (T, C), whichever sequence they belong to; attention alone
is told where sequences begin (`Segments`). Dimensions: T tokens of all sequences, C model width, H
heads, D head width, F feed-forward width, V vocabulary, B sequences. The operations that take the
time are in `kernels`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from dss.batch import LABEL, Batch, Segments, Sequence, pack
from dss.config import T5Config
from dss.linear import Linear, project


class T5(nn.Module):
    """A T5 of the given `T5Config` with T5's random initialisation, drawn from torch's global
    generator."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model)
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
        # The embedding has entries of variance 1; as output matrix it would give logits sqrt(C)
        # times too large.
        return self.config.d_model**-0.5 if self.config.scale_decoder_outputs else 1.0

    def forward(self, batch: Batch) -> Tensor:
        """The decoder state (T, C) that predicts each of batch.labels."""
        memory = self.encode(batch.input_ids, batch.inputs)
        return self.decode(batch.decoder_input_ids, batch.targets, memory, batch.inputs)

    def encode(self, input_ids: Tensor, inputs: Segments) -> Tensor:
        """(T_in,) packed tokens -> (T_in, C) encoder states."""
        return self.encoder(self.embedding(input_ids), inputs)

    def decode(
        self,
        decoder_input_ids: Tensor,
        targets: Segments | None,
        memory: Tensor,
        inputs: Segments,
        caches: "list[LayerCache] | None" = None,
    ) -> Tensor:
        """(T,) packed target tokens, reading memory (T_in, C) -> (T, C).

        With caches, one a layer: (B,) newest tokens -> (B, C), and no targets (dss/generate.py)."""
        return self.decoder(self.embedding(decoder_input_ids), targets, memory, inputs, caches)

    def read_out(self, hidden: Tensor) -> Tensor:
        """(T, C) decoder states -> (T, V) logits."""
        return F.linear(hidden * self.output_scale, self.output_matrix)

    def logits(
        self, input_ids: list[list[int]], decoder_input_ids: list[list[int]]
    ) -> list[Tensor]:
        """Two lists of lists of token ids -> a list of (T_i, V) tensors, one for each pair.

        decoder_input_ids[i] begins with the start token (pad). Raises ValueError if the lists
        differ in length or hold an empty one.
        """
        if len(input_ids) != len(decoder_input_ids) or not all([*input_ids, *decoder_input_ids]):
            raise ValueError(
                "logits: give as many inputs as decoder inputs, at least one token in each"
            )
        if not input_ids:
            return []
        pairs = [Sequence(i, d, LABEL) for i, d in zip(input_ids, decoder_input_ids)]
        batch = pack(pairs, self.embedding.weight.device)
        memory = self.encode(batch.input_ids, batch.inputs)
        hidden = self.decode(
            batch.labels, batch.targets, memory, batch.inputs
        )  # not shifted: they begin with pad
        return list(self.read_out(hidden).split([len(d) for d in decoder_input_ids]))

    @torch.no_grad()
    def initialise(self) -> None:
        if self.embedding.weight.is_meta:  # it has no values
            return
        for name, parameter in self.named_parameters():
            deviation = self.initial_deviation(name)
            if "norm" in name:
                parameter.fill_(deviation)
            else:
                parameter.normal_(0.0, deviation)

    def initial_deviation(self, name: str) -> float:
        """The standard deviation with which a parameter is drawn; for the weights of a norm, their
        value.

        A matrix (N, C) has 1/sqrt(C). Attention does not divide by sqrt(D), so query weights are
        smaller by that. An untied output matrix has 1/sqrt(C), as in T5's own code (transformers
        draws it with deviation 1, and training from random weights then starts at a loss of about
        sqrt(C)).
        """
        C = self.config.d_model
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if "norm" in name or kind == "embedding":
            deviation = 1.0
        elif kind == "bias_table":
            deviation = C**-0.5
        elif kind == "q":
            deviation = (C * self.config.d_kv) ** -0.5
        else:
            deviation = self.get_parameter(name).shape[1] ** -0.5
        return self.config.initializer_factor * deviation


class Embedding(nn.Embedding):
    """Draws nothing on the meta device."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there, this would import PyTorch's compiler: two seconds
            super().reset_parameters()


class Stack(nn.Module):
    """Encoder or decoder. The bias table belongs to the stack: all its layers add the same position
    bias.

    A layer takes and returns two tensors, x and `update`, whose sum is the residual stream.
    `update` is the output of the last sublayer; the next norm adds it to x, because one kernel does
    both.
    """

    def __init__(self, config: T5Config, num_layers: int, is_decoder: bool) -> None:
        super().__init__()
        self.bias_table = nn.Parameter(
            torch.empty(config.relative_attention_num_buckets, config.num_heads)
        )
        self.layers = nn.ModuleList(Layer(config, is_decoder) for _ in range(num_layers))
        self.final_norm = RMSNorm(config)
        self.dropout_p = config.dropout_rate
        self.is_decoder = is_decoder
        self.max_distance = config.relative_attention_max_distance

    def forward(
        self,
        x: Tensor,
        segments: Segments | None,
        memory: Tensor | None = None,
        inputs: Segments | None = None,
        caches: "list[LayerCache] | None" = None,
    ) -> Tensor:
        """x: (T, C) of the sequences in `segments`; a decoder also reads memory (T_in, C) of those
        in `inputs`."""
        p = self.dropout_p if self.training else 0.0
        x = kernels.plain_dropout(x, p)
        update = None
        diag = None
        if kernels.choice(x.device) == "triton":  # the bias of each distance, once for all layers
            diag = kernels.bias_by_distance(self.bias_table, self.is_decoder, self.max_distance)
        for i, layer in enumerate(self.layers):
            cache = caches[i] if caches else None
            x, update = layer(x, update, segments, self.bias_table, diag, memory, inputs, cache)
        _, y = self.final_norm(x, update)
        return kernels.plain_dropout(y, p)


class Layer(nn.Module):
    """One layer: T5 normalises the input of each sublayer and adds its output to what came in
    ("pre-norm")."""

    def __init__(self, config: T5Config, is_decoder: bool) -> None:
        super().__init__()
        self.self_attention_norm = RMSNorm(config)
        self.self_attention = Attention(config, causal=is_decoder)
        if is_decoder:
            self.cross_attention_norm = RMSNorm(config)
            self.cross_attention = Attention(config, causal=False, is_cross=True)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        segments: Segments | None,
        bias_table: Tensor,
        diag: Tensor | None,
        memory: Tensor | None,
        inputs: Segments | None,
        cache: "LayerCache | None",
    ) -> tuple[Tensor, Tensor]:
        """x, update: (T, C), whose sum goes into the layer (no update: x alone); the rest is as
        `Stack` has it."""
        # Dropout seeds are drawn here, so that a layer that is computed again draws the same ones.
        with kernels.seeds_drawn_together(x.device):
            x, y = self.self_attention_norm(x, update)
            own_cache = cache.self_attention if cache else None
            update = self.self_attention(y, segments, y, segments, bias_table, diag, own_cache)
            if memory is not None:  # no bias table: positions of target and input are unrelated
                x, y = self.cross_attention_norm(x, update)
                cross_cache = cache.cross_attention if cache else None
                update = self.cross_attention(y, segments, memory, inputs, None, None, cross_cache)
            x, y = self.feed_forward_norm(x, update)
            return x, self.feed_forward(y)


class Attention(nn.Module):
    """Multi-head attention from x to memory (self-attention: memory is x). No bias vectors, no
    1/sqrt(D)."""

    def __init__(self, config: T5Config, causal: bool, is_cross: bool = False) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)
        self.o = Linear(inner, config.d_model)
        if is_cross:  # q has another input than k and v
            self.groups = [(self.q,), (self.k, self.v), (self.o,)]
        else:
            self.groups = [(self.q, self.k, self.v), (self.o,)]
        self.is_cross = is_cross
        self.d_kv = config.d_kv
        self.causal = causal
        self.max_distance = config.relative_attention_max_distance
        self.dropout_p = config.dropout_rate

    def forward(
        self,
        x: Tensor,
        queries: Segments | None,
        memory: Tensor,
        keys: Segments | None,
        bias_table: Tensor | None,
        diag: Tensor | None,
        cache: "Cache | None",
    ) -> Tensor:
        """x: (Tq, C) of the sequences `queries`; memory: (Tk, C) of `keys`; bias_table:
        (num_buckets, H) or None; diag: the table by distance, for Triton alone."""
        if cache is not None:  # decoding: x is the newest token of each sequence
            if not self.is_cross:
                cache.append(self.heads(self.k(x)), self.heads(self.v(x)))
            return self.o(cache.attend(self.heads(self.q(x))).flatten(1))
        if self.is_cross:
            q = self.q(x)
            k, v = project(memory, self.k, self.v)
        else:
            q, k, v = project(x, self.q, self.k, self.v)
        y = kernels.attention(
            self.heads(q),
            self.heads(k),
            self.heads(v),
            bias_table,
            queries.cu_seqlens,
            keys.cu_seqlens,
            causal=self.causal,
            dropout_p=self.dropout_p if self.training else 0.0,
            max_distance=self.max_distance,
            max_seqlen_q=queries.max_seqlen,
            max_seqlen_k=keys.max_seqlen,
            tiles_q=queries.tiles,
            tiles_k=keys.tiles,
            diag=diag,
        )
        return self.o(y.flatten(1))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_kv))  # (T, H * D) -> (T, H, D)


class FeedForward(nn.Module):
    """T5 1.0: relu(x U) W. T5 1.1: (gelu(x G) * x U) W, gated. Dropout sits before the last
    matrix."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.gate = Linear(config.d_model, config.d_ff)
        self.up = Linear(config.d_model, config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)
        if self.gated:
            self.groups = [(self.gate, self.up), (self.down,)]
        else:
            self.groups = [(self.up,), (self.down,)]
        self.dropout_p = config.dropout_rate

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout_p if self.training else 0.0
        if self.gated:
            gate, up = project(x, self.gate, self.up)
            y = kernels.geglu(gate, up, p)  # (T, F)
        else:
            y = kernels.plain_dropout(F.relu(self.up(x)), p)
        return self.down(y)


class RMSNorm(nn.Module):
    """T5's layer norm: scaled to a root mean square of 1, not centred, no bias."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.eps = config.layer_norm_epsilon
        self.dropout_p = config.dropout_rate

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + dropout(update), or x as it is where there is no update, and that normalised."""
        if update is None:
            return x, kernels.rms_norm(x, self.weight, self.eps)
        p = self.dropout_p if self.training else 0.0
        return kernels.rms_norm(update, self.weight, self.eps, residual=x, dropout_p=p)


# ---- The key/value cache of decoding, which dss/generate.py fills --------------------------------


@dataclass
class Cache:
    """Keys and values of one attention layer for B sequences, the first `length` of which are
    filled in."""

    k: Tensor  # (B, H, N, D)
    v: Tensor  # (B, H, N, D)
    bias: Tensor  # (1, H, N): for keys N - 1, ..., 0 tokens back; or (B, 1, N): -inf on padding
    length: int

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the keys and values (B, H, D) of the newest tokens."""
        self.k[:, :, self.length] = k
        self.v[:, :, self.length] = v
        self.length += 1

    def attend(self, q: Tensor) -> Tensor:
        """Attention of queries (B, H, D) to the keys that are filled in -> (B, H, D)."""
        k = self.k[:, :, : self.length]
        v = self.v[:, :, : self.length]
        scores = (q[:, :, None] @ k.mT)[:, :, 0] + self.bias[..., -self.length :]  # (B, H, length)
        weights = scores.softmax(-1).to(v.dtype)
        return (weights[:, :, None] @ v)[:, :, 0]


@dataclass
class LayerCache:
    self_attention: Cache
    cross_attention: Cache
