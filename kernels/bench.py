"""Time the kernels beside their peers, at the lengths of this task's data sets and at long ones.

    python -m kernels.bench
    python -m kernels.bench --only "attention encoder" --minutes 2 --json times.jsonl

Most important first: steps of 64 and 256 rows with lengths like those of CQA, e-SNLI and SVAMP,
then sequences of 512, 1024 and 4096 tokens, in bfloat16 at T5-base's shape, without dropout.
Columns:

    useful     of the scores that attention's forward tiles compute, those of real queries and keys
    MB, roof   bytes that forward and backward must move; us at the speed of a copy and of a product
    fwd, both  us of forward, and of forward and backward (forward makes the losses' gradient, too)
    copy       roof / both: the share of what the machine could do
    peers      the peer's time for both over ours

Without a GPU the first three are printed, for an H200. An implementation that raises gives a line
that says so, and the others are still timed.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

from . import launch
from .buckets import relative_position_bucket
from .compile import OneLineParser, recording

HEADS = 12
D = 64
WIDTH = HEADS * D
D_FF = 2048
BF16 = torch.bfloat16
COPY_RATE = 4.3e12  # bytes/s and FLOP/s of an H200; measured anew where there is a GPU
PRODUCT_RATE = 770e12

# Tokens of the released files with T5's tokenizer: mean, 95th percentile and maximum of the inputs,
# means of labels and rationales.
DATASETS = {
    "CQA": (58.5, 75, 124, 3.9, 35),
    "e-SNLI": (43.5, 65, 164, 2.3, 17),
    "SVAMP": (53.5, 79, 103, 10, 46),
}


def draw_lengths(dataset: str, rows: int) -> tuple[list[int], list[int]]:
    """Lengths of inputs and targets of a step: each row is a label and a rationale sequence.

    Inputs are log-normal with the data set's mean and 95th percentile, up to its maximum.
    Rationales have a deviation of 0.4 in the logarithm, labels are 2 tokens and a Poisson number
    more (the spread of both is assumed).
    """
    mean, percentile, longest, label, rationale = DATASETS[dataset]
    deviation = 1.645 - math.sqrt(1.645**2 - 2 * math.log(percentile / mean))
    generator = np.random.default_rng(0)

    def log_normal(mean: float, deviation: float, count: int) -> list[int]:
        x = generator.lognormal(math.log(mean) - deviation**2 / 2, deviation, count)
        return x.round().clip(2, longest).astype(int).tolist()

    inputs = log_normal(mean, deviation, rows)
    labels = (2 + generator.poisson(label - 2, rows)).tolist()
    return inputs + inputs, labels + log_normal(rationale, 0.4, rows)


# ---- Cases --------------------------------------------------------------------------------------


@dataclass
class Implementation:
    function: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]  # whose gradients backward makes


@dataclass
class Case:
    name: str
    bytes: float  # that forward and backward must move
    flop: float
    peers: dict[str, Callable[[], Implementation]]  # "ours" is the first
    useful: float | None = None  # share of the scores


def leaf(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def both_of_ours(operation: str, make: Callable) -> dict[str, Callable[[], Implementation]]:
    """The Triton implementation and the reference, on tensors that make(function) makes."""
    triton_function = getattr(kernels, f"{operation}_triton")
    reference = getattr(kernels, f"{operation}_reference")
    return dict(ours=partial(make, triton_function), eager=partial(make, reference))


@dataclass
class Attention:
    """One use of attention: the lengths of its sequences, and what computes it."""

    use: str  # encoder, decoder or cross
    M: list[int]
    N: list[int]

    def __post_init__(self) -> None:
        self.causal = self.use == "decoder"
        self.longest = (max(self.M), max(self.N))
        self.tokens = (sum(self.M), sum(self.N))

    def case(self, name: str) -> Case:
        peers = both_of_ours("attention", self.packed)
        peers |= dict(varlen=self.varlen, sdpa=self.sdpa)
        if self.use == "encoder":
            peers["flex"] = self.flex
        # Forward reads q, k, v and writes o; backward reads all four and do, writes dq, dk, dv.
        moved = 6 * sum(self.tokens) * WIDTH * 2
        scores = HEADS * sum(m * n for m, n in zip(self.M, self.N))
        flop = 14 * scores * D  # two products forward, five backward
        return Case(f"attention {self.use} {name}", moved, flop, peers, self.useful())

    def useful(self) -> float:
        """By the tiles of forward on sm_90. Masked scores of a sequence count as useful, too."""
        q = torch.empty(self.tokens[0], HEADS, D, dtype=BF16)
        k = torch.empty(self.tokens[1], HEADS, D, dtype=BF16)
        with recording("sm_90") as launches:
            kernels.attention_triton(q, k, k, None, *self.starts(), **self.options())
        tile = launches[0].options
        useful = 0
        computed = 0
        for m, n in zip(self.M, self.N):
            useful += m * n
            for row in range(0, m, tile["BM"]):
                keys = min(n, row + tile["BM"]) if self.causal else n
                computed += tile["BM"] * -(-keys // tile["BN"]) * tile["BN"]
        return useful / computed

    def starts(self) -> list[Tensor]:
        """cu_seqlens of queries and keys."""
        both = [list(accumulate([0, *lengths])) for lengths in (self.M, self.N)]
        return [torch.tensor(x, dtype=torch.int32) for x in both]

    def options(self) -> dict[str, object]:
        longest_q, longest_k = self.longest
        return dict(causal=self.causal, max_seqlen_q=longest_q, max_seqlen_k=longest_k)

    def leaves(self) -> list[Tensor]:
        """q, as T5 has it: scores of deviation 1 without a factor 1 / sqrt(D); k, v and a table."""
        q = leaf(self.tokens[0], HEADS, D, scale=D**-0.5)
        k = leaf(self.tokens[1], HEADS, D)
        v = leaf(self.tokens[1], HEADS, D)
        table = leaf(32, HEADS, dtype=torch.float32)
        return [q, k, v] if self.use == "cross" else [q, k, v, table]

    def packed(self, function: Callable) -> Implementation:
        leaves = self.leaves()
        arguments = [*leaves, *[None] * (4 - len(leaves)), *self.starts()]
        return Implementation(partial(function, *arguments, **self.options()), leaves)

    def varlen(self) -> Implementation:
        """PyTorch's, which has no bias."""
        from torch.nn.attention.varlen import varlen_attn

        leaves = self.leaves()[:3]
        arguments = [*leaves, *self.starts(), *self.longest]
        window = (-1, 0) if self.causal else (-1, -1)
        return Implementation(
            partial(varlen_attn, *arguments, scale=1.0, window_size=window), leaves
        )

    def flex(self) -> Implementation:
        """FlexAttention over the packed stream: a document mask and a learned table."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        leaves = self.leaves()
        q, k, v = (x.transpose(0, 1)[None] for x in leaves[:3])
        table = leaves[3]
        T = len(leaves[0])
        longest = self.longest[0]
        document = torch.arange(len(self.M)).repeat_interleave(torch.tensor(self.M))
        buckets = relative_position_bucket(torch.arange(-longest, longest + 1))

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return document[i] == document[j]

        def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + table[buckets[(j - i).clamp(-longest, longest) + longest], h]

        options = dict(score_mod=bias, scale=1.0, kernel_options={"num_stages": 2})
        options["block_mask"] = create_block_mask(mask, None, None, T, T, device=q.device.type)
        return Implementation(partial(torch.compile(flex_attention), q, k, v, **options), leaves)

    def sdpa(self) -> Implementation:
        """PyTorch's, padded, with a bias for each pair of positions, as released T5s have it."""
        B = len(self.M)
        q = leaf(B, HEADS, self.longest[0], D, scale=D**-0.5)
        k = leaf(B, HEADS, self.longest[1], D)
        v = leaf(B, HEADS, self.longest[1], D)
        bias = leaf(1 if len({*self.M, *self.N}) == 1 else B, HEADS, *self.longest)
        function = F.scaled_dot_product_attention
        leaves = [q, k, v, bias]
        return Implementation(partial(function, *leaves, scale=1.0), leaves)


def loss_case(name: str, T: int, linear: bool, V: int = 32128) -> Case:
    def make(function: Callable) -> Implementation:
        leaves = [leaf(T, WIDTH), leaf(V, WIDTH, scale=WIDTH**-0.5)] if linear else [leaf(T, V)]
        labels = torch.randint(0, V, (T,))
        return Implementation(partial(function, *leaves, labels, torch.rand(T)), leaves)

    def weighted(function: Callable, *arguments: Tensor, **options: object) -> Tensor:
        """A peer's losses of each token, times the weights, which it does not know."""
        losses = function(*arguments[:-1], reduction="none", **options)
        return (losses * arguments[-1]).sum()

    def liger(*arguments: Tensor) -> Tensor:
        from liger_kernel.transformers import functional

        return weighted(getattr(functional, f"liger_{liger_name}"), *arguments)

    def torch_linear(*arguments: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()  # torch >= 2.13
        return weighted(F.linear_cross_entropy, *arguments, options=options)

    operation = "linear_cross_entropy" if linear else "cross_entropy"
    liger_name = "fused_linear_cross_entropy" if linear else "cross_entropy"
    peers = both_of_ours(operation, make)
    peers["liger"] = partial(make, liger)
    if linear:
        peers["torch"] = partial(make, torch_linear)
        return Case(f"{operation} {name}", 6 * (T + V) * WIDTH, 6 * T * V * WIDTH, peers)
    return Case(f"{operation} {name}", 4 * T * V, 0, peers)


def norm_case(name: str, T: int) -> Case:
    def make(function: Callable) -> Implementation:
        leaves = [leaf(T, WIDTH), leaf(WIDTH, dtype=torch.float32), leaf(T, WIDTH)]
        x, weight, residual = leaves
        return Implementation(partial(function, x, weight, residual=residual), leaves)

    return Case(f"rms_norm {name}", 9 * T * WIDTH * 2, 0, both_of_ours("rms_norm", make))


def geglu_case(name: str, T: int) -> Case:
    def make(function: Callable) -> Implementation:
        leaves = [leaf(T, D_FF), leaf(T, D_FF)]
        return Implementation(partial(function, *leaves), leaves)

    return Case(f"geglu {name}", 8 * T * D_FF * 2, 0, both_of_ours("geglu", make))


def all_cases() -> list[Case]:
    """Most important first."""
    cases = []
    for rows in (64, 256):
        for dataset in DATASETS:
            inputs, targets = draw_lengths(dataset, rows)
            name = f"{dataset} {rows} rows"
            cases.append(Attention("encoder", inputs, inputs).case(name))
            cases.append(Attention("decoder", targets, targets).case(name))
            cases.append(Attention("cross", targets, inputs).case(name))
            if dataset == "CQA":
                cases.append(loss_case(name, sum(targets), linear=True))
                cases.append(norm_case(name, sum(inputs)))
                cases.append(geglu_case(name, sum(inputs)))
    cases.append(loss_case("8192 tokens", 8192, linear=False))
    for N in (512, 1024, 4096):
        lengths = [N] * (65536 // N)
        for use in ("encoder", "decoder", "cross"):
            cases.append(Attention(use, lengths, lengths).case(f"N={N}"))
    return cases


# ---- Timing -------------------------------------------------------------------------------------


def microseconds(function: Callable, short: bool = False) -> float:
    """The median time, with a cold L2 cache. short: counts kernels alone, where Triton can."""
    testing = launch.triton.testing
    measure = testing.do_bench
    if short:  # the host would take longer than the kernels
        measure = getattr(testing, "do_bench_proton", measure)
    return 1000 * measure(function, return_mode="median")


def measure_machine() -> tuple[float, float]:
    """Bytes/s of a copy and FLOP/s of a bf16 product."""
    a = torch.randn(8192, 8192, dtype=BF16)
    x = torch.empty(2**29, dtype=torch.uint8)
    y = torch.empty_like(x)
    copy_rate = 2 * x.numel() / microseconds(lambda: y.copy_(x)) * 1e6
    product_rate = 2 * 8192**3 / microseconds(lambda: a @ a) * 1e6
    return copy_rate, product_rate


@dataclass
class Row:
    case: str
    useful: float | None
    megabytes: float
    roof: float
    forward: float | None = None  # us
    both: float | None = None
    peers: dict[str, float] = field(default_factory=dict)  # time for both, over ours
    failed: dict[str, str] = field(default_factory=dict)  # implementation: why

    def line(self) -> str:
        useful = "" if self.useful is None else f"{self.useful:.0%}"
        text = f"{self.case:<36}{useful:>7}{self.megabytes:>9.1f}{self.roof:>9.1f}"
        if self.both is not None:
            text += f"{self.forward:>9.1f}{self.both:>9.1f}{self.roof / self.both:>7.0%}"
            text += "".join(f"  {peer} {ratio:.2f}" for peer, ratio in self.peers.items())
        failures = [f"\n    {name} failed: {why}" for name, why in self.failed.items()]
        return text + "".join(failures)


HEADER = f"{'case':<36} useful       MB  roof us   fwd us  both us   copy  peers"


def measure(case: Case, row: Row) -> None:
    """Fill in the times of ours and of the peers; what raises is noted."""
    torch.compiler.reset()
    short = row.roof < 20
    for name, make in case.peers.items():
        try:
            found = make()
            output = found.function()
            outputs = output if isinstance(output, tuple) else (output,)
            upstream = [torch.randn_like(x) for x in outputs]
            both = microseconds(partial(forward_backward, found, upstream), short)
            if name == "ours":
                row.forward = microseconds(found.function, short)
                row.both = both
            elif row.both is not None:
                row.peers[name] = both / row.both
        except Exception as problem:  # out of memory, not supported, not installed
            first_line = (str(problem).splitlines() or [""])[0]
            row.failed[name] = f"{type(problem).__name__}: {first_line[:100]}"


def forward_backward(found: Implementation, upstream: list[Tensor]) -> None:
    torch.autograd.grad(found.function(), found.leaves, upstream)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a kernel of ours failed, 2 the arguments are wrong."""
    parser = OneLineParser(prog="python -m kernels.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="cases whose name holds one of these",
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no case later [6]")
    parser.add_argument("--json", metavar="FILE", help="append a JSON object for each row")
    args = parser.parse_args(argv)
    if not launch.INSTALLED:
        parser.error("needs Triton")
    cases = [case for case in all_cases() if any(text in case.name for text in args.only)]
    if not cases:
        parser.error(f"--only: no case is named {' or '.join(args.only)}")
    try:
        file = open(args.json, "a", encoding="utf-8") if args.json else None
    except OSError as problem:
        parser.error(f"--json: {problem}")
    end = time.monotonic() + 60 * args.minutes
    gpu = torch.cuda.is_available()
    rates = (COPY_RATE, PRODUCT_RATE)
    machine = "no GPU: nothing is timed, roof of an H200"
    if gpu:
        torch.set_default_device("cuda")
        rates = measure_machine()
        machine = torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}, triton {launch.triton.__version__}")
    print(f"copy {rates[0] / 1e12:.2f} TB/s, product {rates[1] / 1e12:.0f} TF/s\n{HEADER}")
    failed = False
    for case in cases:
        if time.monotonic() > end:
            print(f"--minutes {args.minutes:g} are over")
            break
        roof = 1e6 * max(case.bytes / rates[0], case.flop / rates[1])
        row = Row(case.name, case.useful, case.bytes / 1e6, roof)
        if gpu:
            measure(case, row)
        failed = failed or "ours" in row.failed
        print(row.line(), flush=True)
        if file:
            file.write(json.dumps(asdict(row) | dict(machine=machine)) + "\n")
            file.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
