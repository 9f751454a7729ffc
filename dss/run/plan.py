"""The memory that a run takes on each device, known before it takes any: `python train.py --plan [--FLAG VALUE ...]`.

Weights, gradients and optimiser state follow from the shapes. For activations a step with the data's own lengths runs
on PyTorch's meta device, which has shapes and no numbers, and what autograd would keep for the backward pass is added
up. The peak is the sum of all: memory that the backward pass frees can rarely be reused for its gradients.

Checked on the CPU (tests/test_plan.py). On a GPU the kernels keep no attention scores, dropout masks or logits, and
that is left out here; with bfloat16 half is taken of what is kept, and a bfloat16 copy of the weights that autocast
makes. GB are 10^9 bytes.
"""

import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dss.batch import Batch, count_tokens, pack, sequences
from dss.config import TrainConfig
from dss.loss import distillation_loss
from dss.model import T5
from dss.rows import Rows, load_rows, single_rationales
from dss.run import parallel
from dss.run.start import choose_device, choose_dtype, make_tokenizer, shape_of
from tokenizer import T5Tokenizer

GB = 1e9
SAMPLE = 256  # rows, at least, whose lengths stand for those of all
LOGITS = 2**29  # bytes, about, of the logits that the GPU kernels have at a time


@dataclass(frozen=True)
class Plan:
    """GB on each device."""

    what: str  # is trained how
    weights: float
    gradients: float
    optimizer: float
    activations: float  # with what --shard gathers of other devices' weights for the time
    peak: float  # of all these together
    device: float  # GB that there are
    problem: str  # why the run cannot begin, if it cannot
    warning: str  # why it may end before long, if it may

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "peak")
        numbers = "\n".join(f"{name:>14} {getattr(self, name):9.2f} GB" for name in parts)
        verdict = self.problem or self.warning or "it fits"
        return f"plan: {self.what}; on each device\n{numbers}\nof {self.device:.2f} GB: {verdict}"

    def require_fit(self) -> None:
        """Raise ValueError for a run that cannot begin; warn of one that may end before long."""
        if self.problem:
            raise ValueError(f"{self.what}: {self.problem}")
        if self.warning:
            print(f"train.py: warning: {self.warning}", file=sys.stderr)


def plan_of(config: TrainConfig) -> Plan:
    """What --plan prints. Reads the rows, but no weights. Raises OSError or ValueError for rows that cannot be used."""
    device = choose_device(config.device, config.dtype)
    dtype = "bfloat16" if config.device_gb and config.dtype == "auto" else choose_dtype(config.dtype, device)
    rows = load_rows(config)
    return make_plan(replace(config, dtype=dtype), rows, make_tokenizer(config, rows, Path(config.out)), device)


def make_plan(config: TrainConfig, rows: Rows, tokenizer: T5Tokenizer, device: torch.device) -> Plan:
    """The plan of a run for the method that needs most. device: this machine's; with --device-gb, a GPU elsewhere."""
    gpu = device.type == "cuda" or config.device_gb > 0
    shape = shape_of(config, tokenizer)
    with torch.device("meta"):
        model = T5(replace(shape, dropout_rate=0.0) if gpu else shape)
    n, P = config.processes or parallel.size(), model.num_parameters()
    parts = n if config.shard else 1  # that weights, gradients and optimiser state are cut into
    adam = config.optimizer == "adamw"
    state = 8 * P if adam else 4 * sum(p.numel() // p.shape[-1] + p.shape[-1] for p in model.parameters())
    passes = [pass_of(config, method, rows, tokenizer, n) for method in config.method]
    kept = max(activations(model, batch, config, gpu, parts) for batch in passes)
    waiting = 0 if gpu or config.shard or len(config.method) == 1 else 4 * P  # the first weights, for the next method
    weights, optimizer = 4 * P / parts / GB, state / parts / GB  # gradients are as large as weights
    least, there = 2 * weights + optimizer, config.device_gb or memory_of(device) / GB
    peak, problem, warning = least + (kept + waiting) / GB, "", ""
    if least > there:
        smaller = "" if config.shard else "--shard with more processes or " if n == 1 else "--shard or "
        smaller += "--optimizer adafactor" if adam and not config.shard else "a smaller student"
        problem = f"weights, gradients and optimizer alone take {least:.1f} GB of {there:.1f}; {smaller} takes less"
    elif peak > there:
        saver = "" if config.micro_batch == 1 else "a smaller --micro-batch or "
        saver += "a smaller student" if config.checkpoint_activations else "--checkpoint-activations"
        warning = f"activations may bring the total to {peak:.1f} GB of {there:.1f}; {saver} takes less"
    what = f"{config.weights or config.size}, {P:,} parameters, {config.optimizer}, {config.dtype}, {n} device"
    what += "s" * (n > 1) + ", sharded" * config.shard
    figures = dict(weights=weights, gradients=weights, optimizer=optimizer, activations=kept / GB, peak=peak)
    return Plan(what, **figures, device=there, problem=problem, warning=warning)


def pass_of(config: TrainConfig, method: str, rows: Rows, tokenizer: T5Tokenizer, n: int) -> Batch:
    """The largest of the passes that a sample of the rows makes on one of n devices, without its data."""
    size = -(-config.batch_size // n)
    size = min(size, config.micro_batch or size)
    sample = rows.train[:: max(1, len(rows.train) // max(SAMPLE, size))]
    lengths = config.max_input_length, config.max_target_length
    found = [sequences(single_rationales(row)[0], method, tokenizer, *lengths) for row in sample]
    found = [found[i % len(found)] for i in range(max(size, len(found) // size * size))]  # steps may outnumber rows
    passes = [found[i : i + size] for i in range(0, len(found), size)]
    return pack([s for row in max(passes, key=lambda rows: sum(map(count_tokens, rows))) for s in row], "meta")


def activations(model: T5, batch: Batch, config: TrainConfig, gpu: bool, parts: int) -> int:
    """Bytes that a pass keeps for its backward pass, and those that come and go while both run."""
    layers = parallel.layers(model)
    kept, place = [0] * (len(layers) + 1), 0  # of each layer, and first of what lies outside of them
    seen = {p.untyped_storage()._cdata: p for p in model.parameters()}  # held, so that no place in memory is used again

    def enter(number: int, *_: object) -> None:
        nonlocal place
        place = number

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        scores = tensor.dim() == 4 and tensor.shape[-1] != model.config.d_kv
        logits = tensor.dim() == 2 and tensor.shape[-1] == model.config.vocab_size
        if storage._cdata not in seen and not (gpu and (scores or logits)):
            seen[storage._cdata] = tensor
            kept[place] += storage.nbytes() // (2 if config.dtype == "bfloat16" else 1)
        return tensor

    hooks = [layer.register_forward_pre_hook(partial(enter, i)) for i, layer in enumerate(layers, 1)]
    hooks += [layer.register_forward_hook(partial(enter, 0)) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        distillation_loss(model.train(), batch, 1, 1, config.lam)
    for hook in hooks:
        hook.remove()

    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    whole = not config.shard and not config.checkpoint_activations  # then autocast keeps a copy of each layer
    half = 2 * sum(sizes) if config.dtype == "bfloat16" and whole else 0
    gathered = 4 * (model.num_parameters() - sum(sizes) + 3 * max(sizes)) if parts > 1 else 0  # two layers, a gradient
    tokens = (len(batch.input_ids), len(batch.labels))
    if config.checkpoint_activations:  # the layers' inputs are kept; a layer at a time is computed once more
        inputs = [4 * model.config.d_model * tokens[i >= model.config.num_layers] for i in range(len(layers))]
        kept[1:] = [*inputs, max(kept[1:])]
    logits = LOGITS if gpu else 2 * 4 * tokens[1] * model.config.vocab_size  # their gradients
    return sum(kept) + logits + half + gathered


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine's memory for each of its processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
