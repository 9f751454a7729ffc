"""The two configurations: `T5Config`, the shape of a model, and `TrainConfig`, a whole run and its
command line."""

import os
from dataclasses import dataclass
from typing import Literal

from data.cli import parse, require


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5, under the names of transformers' config.json.

    T5 1.0 has relu and one matrix for embedding and output, whose logits it scales by
    d_model**-0.5; T5 1.1, its LM-adapted and Flan descendants and mT5 have a gated GELU and a
    separate output matrix, not scaled.
    """

    vocab_size: int = 32128  # V
    d_model: int = 512  # C
    d_kv: int = 64  # D, the width of one head; H * D need not equal C
    d_ff: int = 2048  # F
    num_layers: int = 6  # of the encoder
    num_decoder_layers: int = 6
    num_heads: int = 8  # H
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"  # or "gated-gelu"
    tie_word_embeddings: bool = True  # the output matrix is the embedding
    scale_decoder_outputs: bool = True  # logits are scaled by d_model**-0.5
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0  # T5 has no start token: pad begins every target
    model_type: str = "t5"  # or "mt5"


def t5(
    d_model: int, d_ff: int, layers: int, heads: int, d_kv: int = 64, **other: object
) -> T5Config:
    return T5Config(
        d_model=d_model,
        d_ff=d_ff,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        d_kv=d_kv,
        **other,
    )


V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, scale_decoder_outputs=False)
MT5 = dict(V1_1, vocab_size=250112, model_type="mt5")

SHAPES = {  # of T5 1.1 and mT5; Flan-T5 and the LM-adapted T5 have those of T5 1.1
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}
SIZES = {
    # For random weights on a CPU; vocab_size is the tokenizer's.
    "tiny": t5(64, 128, 2, 2, d_kv=32, vocab_size=0),
    "tiny-wide": T5Config(0, 64, 64, 128, num_layers=2, num_decoder_layers=1, num_heads=4),
    "mini": t5(128, 256, 3, 4, d_kv=32, vocab_size=0),
    "t5-small": t5(512, 2048, 6, 8),
    "t5-base": t5(768, 3072, 12, 12),
    "t5-large": t5(1024, 4096, 24, 16),
    "t5-3b": t5(1024, 16384, 24, 32, d_kv=128),
    "t5-11b": t5(1024, 65536, 24, 128, d_kv=128),
}
for name, shape in SHAPES.items():
    SIZES[f"t5-v1_1-{name}"] = t5(*shape, **V1_1)
    SIZES[f"mt5-{name}"] = t5(*shape, **MT5)


ANY = 1e300  # no limit but that it is finite
LONGEST = 2**20  # tokens
RANGES = {  # of flags: the least and the largest value
    "steps": (1, ANY),
    "batch_size": (1, LONGEST),
    "micro_batch": (0, LONGEST),
    "eval_every": (1, ANY),
    "log_every": (1, ANY),
    "vocab_size": (1, ANY),
    "max_input_length": (2, LONGEST),
    "max_target_length": (2, LONGEST),
    "max_new_tokens": (1, LONGEST),
    "warmup": (0, ANY),
    "threads": (0, os.cpu_count() or 1),
    "seed": (0, 2**63 - 1),
    "lr": (0, ANY),
    "lam": (0, ANY),
    "weight_decay": (0, ANY),
    "clip": (0, ANY),
    "save_minutes": (0, ANY),
    "subsample": (0, 1),
    "dropout": (0, 0.99),
    "rename_words": (0, 0.99),
}
METRICS = ("text", "choice", "equation")
LABELS = ("gold", "teacher", "gold-or-teacher")


@dataclass(frozen=True)
class TrainConfig:
    """Distil a teacher's rationales into a small T5. Without arguments: the embedded task, minutes
    on a CPU."""

    # Each default stands here and nowhere else; each comment is the help text of its flag.

    # data
    data: tuple[str, ...] = ()  # training rows, JSONL files; default: the embedded task
    eval_data: str = ""  # validation rows, JSONL; default: cut from the training rows
    test_data: str = ""  # test rows, JSONL, answered once, at the end
    eval_fraction: float = 0.1  # share of the training rows cut for validation without --eval-data
    subsample: float = 1.0  # share of the labelled rows of --data; a larger adds rows to a smaller
    labels: Literal[LABELS] = "gold"  # gold-or-teacher: the teacher's where --subsample has no gold
    # method
    method: tuple[str, ...] = ("standard", "dss")  # a student for each, in order: dss/methods.py
    lam: float = 1.0  # lambda in L = L_label + lambda * L_rationale, for methods with two tasks
    # student
    weights: str = ""  # public T5 weights, directory or hub id; default: random weights of --size
    size: Literal[tuple(SIZES)] = "tiny"  # shape of a student with random weights
    look_alike: bool = False  # start random weights with heads that find equal tokens
    rename_words: float = 0.0  # rename at random up to this share of a row's tokens: dss/aids.py
    spiece: str = ""  # SentencePiece model; default: that of --weights, else trained on the rows
    vocab_size: int = 4000  # most pieces of a tokenizer trained on the training rows
    dropout: float | None = None  # dropout rate; default: the student's own
    max_input_length: int = 1024  # tokens of an input, prefix included; longer ones are cut
    max_target_length: int = 256  # tokens of a target or a written rationale; longer ones are cut
    max_new_tokens: int = 64  # tokens of a predicted label
    # optimisation
    steps: int = 900  # optimiser steps
    batch_size: int = 16  # rows a step; a row with a rationale is two sequences under dss
    micro_batch: int = 0  # rows that a device computes at a time, to save memory; 0: all
    lr: float | None = None  # peak learning rate; default: 0.03 scaled, with --weights 5e-5 (paper)
    schedule: Literal["linear", "constant"] = "linear"  # after warm-up: down to 0, or level
    warmup: int = 100  # steps of linear warm-up
    optimizer: Literal["auto", "adamw", "adamw-scaled"] = "auto"  # auto: adamw with --weights
    beta2: float = 0.98  # AdamW's second decay rate
    weight_decay: float = 0.0  # decoupled weight decay
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 0  # random seed of weights, order of rows, dropout and every draw from the data
    # evaluation
    eval_every: int = 200  # steps between evaluations on validation rows; the best weights are kept
    answers: Literal["auto", "likeliest", "write"] = "auto"  # auto: write, but choose from choices
    metric: Literal[("auto", *METRICS)] = "auto"  # how a label counts as right; auto: from the rows
    log_every: int = 20  # steps between lines of metrics.jsonl
    # machine and files
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    threads: int = 0  # CPU threads; 0: one for a student under 5 M parameters, else all
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where a GPU computes it
    shard: bool = False  # divide weights, gradients and optimiser state among torchrun's processes
    checkpoint_activations: bool = False  # save memory: compute layers again in the backward pass
    save_minutes: float = 10.0  # minutes between saved states for --resume; 0: at every evaluation
    out: str = ""  # output directory; default: runs/NAME_OF_DATA
    resume: bool = False  # go on with what --out holds: finished students stay, others continue
    overwrite: bool = False  # replace the students that --out holds

    @property
    def learning_rate(self) -> float:
        if self.lr is not None:
            return self.lr
        if self.scales_rates:
            return 0.03
        return 5e-5 if self.weights else 1e-3

    @property
    def scales_rates(self) -> bool:
        """Whether a tensor's rate is relative to the deviation of its initialisation."""
        if self.optimizer == "auto":
            return not self.weights
        return self.optimizer == "adamw-scaled"

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that makes no sense."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None:
                require(least <= value <= most, name, f"from {least} to {most}", self)
        require(self.subsample > 0, "subsample", "more than 0", self)
        require(0 < self.eval_fraction < 1, "eval_fraction", "between 0 and 1", self)
        require(0 < self.beta2 < 1, "beta2", "between 0 and 1", self)
        require(self.learning_rate > 0, "lr", "more than 0", self)
        require(not (self.resume and self.overwrite), "resume", "left out beside --overwrite", self)
        random = not self.weights
        require(random or not self.look_alike, "look_alike", "left out beside --weights", self)
        require(len(set(self.method)) == len(self.method), "method", "named once each", self)


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """The command line as a TrainConfig. Exits 2 with one line if it is wrong."""
    return parse(argv, TrainConfig, "train.py")
