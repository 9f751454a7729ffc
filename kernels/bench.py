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
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
    peers: dict[str, Callable[[], Implementation]]  # "ours" among them
    useful: float | None = None  # share of the scores

    def roof(self, copy_rate: float, product_rate: float) -> float:
        """us that forward and backward take at least."""
        return 1e6 * max(self.bytes / copy_rate, self.flop / product_rate)


def leaf(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


@dataclass(eq=False)
class Attention:
    """One use of attention: the lengths of its sequences, and what computes it."""

    use: str  # encoder, decoder or cross
    M: list[int]
    N: list[int]

    def __post_init__(self) -> None:
        self.causal = self.use == "decoder"
        self.longest = (max(self.M), max(self.N))

    def case(self, name: str) -> Case:
        scores = HEADS * sum(m * n for m, n in zip(self.M, self.N))
        rows = 6 * sum(self.M) + 6 * sum(self.N)  # q, o, dq, do and q, o again; k, v likewise
        peers = dict(ours=self.ours, varlen=self.varlen, sdpa=self.sdpa, eager=self.eager)
        if self.use == "encoder":
            peers["flex"] = self.flex
        flop = 14 * scores * D  # two products forward, five backward
        return Case(f"attention {self.use} {name}", rows * WIDTH * 2, flop, peers, self.useful())

    def useful(self) -> float:
        """By the tiles of forward on sm_90. Masked scores of a sequence count as useful, too."""
        q = torch.empty(sum(self.M), HEADS, D, dtype=BF16)
        k = torch.empty(sum(self.N), HEADS, D, dtype=BF16)
        with recording("sm_90") as launches:
            self.run(kernels.attention_triton, q, k, k)
        tile = launches[0].options
        useful = 0
        computed = 0
        for m, n in zip(self.M, self.N):
            useful += m * n
            for row in range(0, m, tile["BM"]):
                keys = min(n, row + tile["BM"]) if self.causal else n
                computed += tile["BM"] * -(-keys // tile["BN"]) * tile["BN"]
        return useful / computed

    def run(
        self, function: Callable, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None
    ) -> Tensor:
        longest_q, longest_k = self.longest
        options = dict(causal=self.causal, max_seqlen_q=longest_q, max_seqlen_k=longest_k)
        return function(q, k, v, table, *self.starts(q.device), **options)

    @functools.cache
    def starts(self, device: torch.device) -> list[Tensor]:
        """cu_seqlens of queries and keys."""
        both = [accumulate([0, *lengths]) for lengths in (self.M, self.N)]
        return [torch.tensor(list(x), dtype=torch.int32, device=device) for x in both]

    def leaves(self) -> list[Tensor]:
        """q, as T5 has it: scores of deviation 1 without a factor 1 / sqrt(D); k, v and a table."""
        q = leaf(sum(self.M), HEADS, D, scale=D**-0.5)
        k = leaf(sum(self.N), HEADS, D)
        v = leaf(sum(self.N), HEADS, D)
        if self.use == "cross":
            return [q, k, v]
        return [q, k, v, leaf(32, HEADS, dtype=torch.float32)]

    def ours(self) -> Implementation:
        leaves = self.leaves()
        return Implementation(lambda: self.run(kernels.attention_triton, *leaves), leaves)

    def eager(self) -> Implementation:
        leaves = self.leaves()
        return Implementation(lambda: self.run(kernels.attention_reference, *leaves), leaves)

    def varlen(self) -> Implementation:
        """PyTorch's, which has no bias."""
        from torch.nn.attention.varlen import varlen_attn

        leaves = self.leaves()[:3]
        starts = self.starts(leaves[0].device)
        options = dict(scale=1.0, window_size=(-1, 0) if self.causal else (-1, -1))
        return Implementation(
            lambda: varlen_attn(*leaves, *starts, *self.longest, **options), leaves
        )

    def flex(self) -> Implementation:
        """FlexAttention over the packed stream: a document mask and a learned table."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        leaves = self.leaves()
        q, k, v = (x.transpose(0, 1)[None] for x in leaves[:3])
        table = leaves[3]
        T = sum(self.M)
        longest = self.longest[0]
        document = torch.arange(len(self.M)).repeat_interleave(torch.tensor(self.M))
        buckets = relative_position_bucket(torch.arange(-longest, longest + 1, device=q.device))

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return document[i] == document[j]

        def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + table[buckets[(j - i).clamp(-longest, longest) + longest], h]

        options = dict(score_mod=bias, scale=1.0, kernel_options={"num_stages": 2})
        options["block_mask"] = create_block_mask(mask, None, None, T, T, device=str(q.device))
        compiled = torch.compile(flex_attention)
        return Implementation(lambda: compiled(q, k, v, **options), leaves)

    def sdpa(self) -> Implementation:
        """PyTorch's, padded, with a bias for each pair of positions, as released T5s have it."""
        B = len(self.M)
        q = leaf(B, HEADS, self.longest[0], D, scale=D**-0.5)
        k = leaf(B, HEADS, self.longest[1], D)
        v = leaf(B, HEADS, self.longest[1], D)
        bias = leaf(1 if min(self.N) == max(self.N) else B, HEADS, *self.longest)
        return Implementation(
            lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0),
            [q, k, v, bias],
        )


def loss_case(name: str, T: int, V: int, linear: bool) -> Case:
    def make(function: Callable) -> Implementation:
        labels = torch.randint(0, V, (T,))
        weights = torch.rand(T)
        leaves = [leaf(T, WIDTH), leaf(V, WIDTH, scale=WIDTH**-0.5)] if linear else [leaf(T, V)]
        return Implementation(lambda: function(*leaves, labels, weights), leaves)

    def torch_none(h: Tensor, w: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()  # torch >= 2.13
        losses = F.linear_cross_entropy(h, w, labels, reduction="none", options=options)
        return (losses * weights).sum()

    def liger(*arguments: Tensor) -> Tensor:
        from liger_kernel.transformers import functional

        *leaves, labels, weights = arguments
        if linear:
            losses = functional.liger_fused_linear_cross_entropy(*leaves, labels, reduction="none")
        else:
            losses = functional.liger_cross_entropy(*leaves, labels, reduction="none")
        return (losses * weights).sum()

    operation = "linear_cross_entropy" if linear else "cross_entropy"
    functions = dict(
        ours=getattr(kernels, f"{operation}_triton"),
        liger=liger,
        eager=getattr(kernels, f"{operation}_reference"),
    )
    if linear:
        functions["torch"] = torch_none
    peers = {peer: functools.partial(make, function) for peer, function in functions.items()}
    moved = 3 * T * WIDTH * 2 + V * WIDTH * 6 if linear else 4 * T * V
    return Case(f"{operation} {name}", moved, 6 * T * V * WIDTH * linear, peers)


def norm_case(name: str, T: int) -> Case:
    def make(function: Callable) -> Implementation:
        x, residual = leaf(T, WIDTH), leaf(T, WIDTH)
        weight = leaf(WIDTH, dtype=torch.float32)
        return Implementation(lambda: function(x, weight, residual=residual), [x, weight, residual])

    peers = dict(
        ours=lambda: make(kernels.rms_norm_triton), eager=lambda: make(kernels.rms_norm_reference)
    )
    return Case(f"rms_norm {name}", 9 * T * WIDTH * 2, 0, peers)


def geglu_case(name: str, T: int) -> Case:
    def make(function: Callable) -> Implementation:
        gate, up = leaf(T, 2048), leaf(T, 2048)
        return Implementation(lambda: function(gate, up), [gate, up])

    peers = dict(
        ours=lambda: make(kernels.geglu_triton), eager=lambda: make(kernels.geglu_reference)
    )
    return Case(f"geglu {name}", 8 * T * 2048 * 2, 0, peers)


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
                cases.append(loss_case(name, sum(targets), 32128, linear=True))
                cases.append(norm_case(name, sum(inputs)))
                cases.append(geglu_case(name, sum(inputs)))
    cases.append(loss_case("T=8192 V=32128", 8192, 32128, linear=False))
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

            def both(found: Implementation = found, upstream: list[Tensor] = upstream) -> None:
                torch.autograd.grad(found.function(), found.leaves, upstream)

            taken = microseconds(both, short)
            if name == "ours":
                row.forward = microseconds(found.function, short)
                row.both = taken
            elif row.both is not None:
                row.peers[name] = taken / row.both
        except Exception as problem:  # out of memory, not supported, not installed
            first_line = (str(problem).splitlines() or [""])[0]
            row.failed[name] = f"{type(problem).__name__}: {first_line[:100]}"


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
        row = Row(case.name, case.useful, case.bytes / 1e6, case.roof(*rates))
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
