"""Time the kernels beside their peers, at the lengths of this task's data sets and at long ones.

    python -m kernels.bench
    python -m kernels.bench --only "attention encoder" --minutes 2 --json times.jsonl

Most important first: steps of 64 and 256 rows with lengths like those of CQA, e-SNLI and SVAMP,
then sequences of 512, 1024 and 4096 tokens, in bfloat16 at T5-base's shape, without dropout.

    useful     share of real queries and keys among the scores that attention's tiles compute
    MB, roof   bytes that forward and backward must move; us at the rates of a copy and a product
    fwd, both  us of forward (which makes the losses' gradient, too) and of forward and backward
    copy       roof / both
    peers      time of the peer for both, over ours

Without a GPU the first three are printed, for an H200. What raises gives a line that says so.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

from . import launch
from .buckets import relative_position_bucket
from .compile import OneLineParser
from .flash_attention import make_tiles

HEADS = 12
D = 64
WIDTH = HEADS * D
D_FF = 2048
BF16 = torch.bfloat16
H200 = (4.3e12, 770e12)  # bytes/s of a copy and FLOP/s of a product

# Tokens of the released files with T5's tokenizer: mean, 95th percentile and maximum of the inputs,
# means of labels and rationales.
DATASETS = {
    "CQA": (58.5, 75, 124, 3.9, 35),
    "e-SNLI": (43.5, 65, 164, 2.3, 17),
    "SVAMP": (53.5, 79, 103, 10, 46),
}


def draw_lengths(dataset: str, rows: int) -> tuple[list[int], list[int]]:
    """Lengths of inputs and targets of a step: each row is a label and a rationale sequence.

    Inputs are log-normal with the data set's mean and 95th percentile, up to its maximum. The
    spread of the others is assumed: rationales have a deviation of 0.4 in the logarithm, labels
    are 2 and a Poisson number of tokens.
    """
    mean, percentile, longest, label, rationale = DATASETS[dataset]
    deviation = 1.645 - math.sqrt(1.645**2 - 2 * math.log(percentile / mean))
    generator = np.random.default_rng(0)

    def log_normal(mean: float, deviation: float) -> list[int]:
        x = generator.lognormal(math.log(mean) - deviation**2 / 2, deviation, rows)
        return x.round().clip(2, longest).astype(int).tolist()

    inputs = log_normal(mean, deviation)
    labels = (2 + generator.poisson(label - 2, rows)).tolist()
    return inputs + inputs, labels + log_normal(rationale, 0.4)


@dataclass
class Case:
    """peers: "ours" and others. Each makes its inputs and returns the call that is timed; gradients
    are those of the call's arguments."""

    name: str
    bytes: float  # that forward and backward must move
    flop: float
    peers: dict[str, Callable[[], partial]]
    useful: float | None = None


def leaf(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def prepare(function: Callable, inputs: Callable[[], list]) -> partial:
    return partial(function, *inputs())


def make_case(operation: str, name: str, inputs: Callable, moved: float, flop: float = 0) -> Case:
    """Ours beside the reference; inputs() makes their arguments."""
    ours = getattr(kernels, f"{operation}_triton")
    eager = getattr(kernels, f"{operation}_reference")
    peers = dict(ours=partial(prepare, ours, inputs), eager=partial(prepare, eager, inputs))
    return Case(f"{operation} {name}", moved, flop, peers)


# ---- Attention ----------------------------------------------------------------------------------


@dataclass
class Attention:
    use: str  # encoder, decoder or cross
    M: list[int]  # the lengths of the sequences
    N: list[int]

    def case(self, name: str) -> Case:
        # Forward reads q, k, v and writes o; backward reads all four and do, writes dq, dk, dv.
        moved = 6 * (sum(self.M) + sum(self.N)) * WIDTH * 2
        scores = HEADS * sum(m * n for m, n in zip(self.M, self.N))
        flop = 14 * scores * D  # two products forward, five backward
        case = make_case("attention", f"{self.use} {name}", self.inputs, moved, flop)
        case.useful = self.useful()
        case.peers["varlen"] = self.varlen
        case.peers["sdpa"] = self.sdpa
        if self.use == "encoder":
            case.peers["flex"] = self.flex
        return case

    def inputs(self) -> list:
        """q as T5 has it: scores of deviation 1 without a factor 1 / sqrt(D)."""
        q = leaf(sum(self.M), HEADS, D, scale=D**-0.5)
        k = leaf(sum(self.N), HEADS, D)
        v = leaf(sum(self.N), HEADS, D)
        table = None if self.use == "cross" else leaf(32, HEADS, dtype=torch.float32)
        return [q, k, v, table, *self.starts(), self.use == "decoder"]

    def starts(self) -> list[Tensor]:
        """cu_seqlens of queries and keys."""
        both = [list(accumulate([0, *lengths])) for lengths in (self.M, self.N)]
        return [torch.tensor(x, dtype=torch.int32) for x in both]

    def useful(self) -> float:
        """By the tiles of forward. Masked scores of a sequence count as useful, too."""
        of_queries, of_keys = self.starts()
        BM = make_tiles(of_queries, sum(self.M)).query_rows
        BN = make_tiles(of_keys, sum(self.N)).key_rows
        useful = 0
        computed = 0
        for m, n in zip(self.M, self.N):
            useful += m * n
            for row in range(0, m, BM):
                keys = min(n, row + BM) if self.use == "decoder" else n
                computed += BM * -(-keys // BN) * BN
        return useful / computed

    def varlen(self) -> partial:
        """PyTorch's, which has no bias."""
        from torch.nn.attention.varlen import varlen_attn

        q, k, v, _, *starts, causal = self.inputs()
        options = dict(scale=1.0, window_size=(-1, 0 if causal else -1))
        return partial(varlen_attn, q, k, v, *starts, max(self.M), max(self.N), **options)

    def flex(self) -> partial:
        """FlexAttention over the packed stream: a document mask and a learned table."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        T = sum(self.M)
        longest = max(self.M)
        document = torch.arange(len(self.M)).repeat_interleave(torch.tensor(self.M))
        buckets = relative_position_bucket(torch.arange(-longest, longest + 1))

        def same_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return document[i] == document[j]

        compiled = torch.compile(flex_attention)
        mask = create_block_mask(same_document, None, None, T, T, device=document.device.type)
        options = dict(block_mask=mask, scale=1.0, kernel_options={"num_stages": 2})

        def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + table[buckets[(j - i).clamp(-longest, longest) + longest], h]

            heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # (1, H, T, D)
            return compiled(*heads, score_mod=bias, **options)[0].transpose(0, 1)

        return partial(function, *self.inputs()[:4])

    def sdpa(self) -> partial:
        """PyTorch's, padded, with a bias for each pair of positions, as released T5s have it."""
        B = len(self.M)
        q = leaf(B, HEADS, max(self.M), D, scale=D**-0.5)
        k = leaf(B, HEADS, max(self.N), D)
        v = leaf(B, HEADS, max(self.N), D)
        same = len({*self.M, *self.N}) == 1
        bias = leaf(1 if same else B, HEADS, max(self.M), max(self.N))
        return partial(F.scaled_dot_product_attention, q, k, v, bias, scale=1.0)


# ---- The others ---------------------------------------------------------------------------------


def weighted(losses: Callable, *arguments: Tensor) -> Tensor:
    """Of a peer that knows no weights: they multiply its losses of each token."""
    return (losses(*arguments[:-1], reduction="none") * arguments[-1]).sum()


def linear_loss_case(name: str, T: int, V: int = 32128) -> Case:
    def inputs() -> list[Tensor]:
        weight = leaf(V, WIDTH, scale=WIDTH**-0.5)
        return [leaf(T, WIDTH), weight, torch.randint(0, V, (T,)), torch.rand(T)]

    def liger() -> partial:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return prepare(partial(weighted, liger_fused_linear_cross_entropy), inputs)

    def torch_linear() -> partial:
        options = torch.nn.LinearCrossEntropyOptions()  # torch >= 2.13
        losses = partial(F.linear_cross_entropy, options=options)
        return prepare(partial(weighted, losses), inputs)

    moved = 6 * (T + V) * WIDTH
    case = make_case("linear_cross_entropy", name, inputs, moved, 6 * T * V * WIDTH)
    case.peers |= dict(torch=torch_linear, liger=liger)
    return case


def loss_case(name: str, T: int, V: int = 32128) -> Case:
    def inputs() -> list[Tensor]:
        return [leaf(T, V), torch.randint(0, V, (T,)), torch.rand(T)]

    return make_case("cross_entropy", name, inputs, 4 * T * V)


def rms_norm_case(name: str, T: int) -> Case:
    def inputs() -> list:
        return [leaf(T, WIDTH), leaf(WIDTH, dtype=torch.float32), 1e-6, leaf(T, WIDTH)]

    return make_case("rms_norm", name, inputs, 9 * T * WIDTH * 2)


def geglu_case(name: str, T: int) -> Case:
    return make_case("geglu", name, lambda: [leaf(T, D_FF), leaf(T, D_FF)], 8 * T * D_FF * 2)


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
                cases.append(linear_loss_case(name, sum(targets)))
                cases.append(rms_norm_case(name, sum(inputs)))
                cases.append(geglu_case(name, sum(inputs)))
    cases.append(loss_case("8192 tokens", 8192))
    for N in (512, 1024, 4096):
        lengths = [N] * (65536 // N)
        for use in ("encoder", "decoder", "cross"):
            cases.append(Attention(use, lengths, lengths).case(f"N={N}"))
    return cases


# ---- Timing -------------------------------------------------------------------------------------


def microseconds(function: Callable, short: bool = False) -> float:
    """The median time, with a cold L2 cache. short: of the kernels alone, where Triton can tell,
    since the host takes longer."""
    testing = launch.triton.testing
    measure = testing.do_bench
    if short:
        measure = getattr(testing, "do_bench_proton", measure)
    return 1000 * measure(function, return_mode="median")


def measure_machine() -> tuple[float, float]:
    a = torch.randn(8192, 8192, dtype=BF16)
    x = torch.empty(2**29, dtype=torch.uint8)
    y = torch.empty_like(x)
    copy = 2 * x.numel() / microseconds(lambda: y.copy_(x)) * 1e6
    return copy, 2 * 8192**3 / microseconds(lambda: a @ a) * 1e6


def measure(make: Callable[[], partial], short: bool) -> tuple[float, float]:
    """us of forward, and of forward and backward."""
    call = make()
    leaves = [x for x in call.args if isinstance(x, Tensor) and x.requires_grad]
    output = call()
    outputs = output if isinstance(output, tuple) else (output,)
    upstream = [torch.randn_like(x) for x in outputs]
    forward = microseconds(call, short)

    def both() -> None:
        torch.autograd.grad(call(), leaves, upstream)

    return forward, microseconds(both, short)


def measure_case(case: Case, short: bool) -> dict[str, object]:
    """us of ours ("forward", "both"), each peer's time over ours, or why it failed."""
    torch.compiler.reset()
    row = {}
    for name, make in case.peers.items():
        try:
            forward, both = measure(make, short)
            if name == "ours":
                row = dict(forward=forward, both=both)
            else:
                row[name] = both / row["both"]
        except Exception as problem:  # out of memory, not supported, not installed
            row[name] = f"{type(problem).__name__}: {str(problem)[:80]}".partition("\n")[0]
    return row


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a kernel of ours failed, 2 the arguments are wrong."""
    parser = OneLineParser(prog="python -m kernels.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of cases")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no case later [6]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append an object a case")
    args = parser.parse_args(argv)
    if not launch.INSTALLED:
        parser.error("needs Triton")
    cases = [case for case in all_cases() if any(text in case.name for text in args.only)]
    if not cases:
        parser.error(f"--only: no case is named {' or '.join(args.only)}")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: no such directory")
    gpu = torch.cuda.is_available()
    machine = "no GPU: nothing is timed; the roof is an H200's"
    copy_rate, product_rate = H200
    if gpu:
        torch.set_default_device("cuda")
        machine = torch.cuda.get_device_name()
        copy_rate, product_rate = measure_machine()
    print(f"{machine}; torch {torch.__version__}, triton {launch.triton.__version__}")
    print(f"copy {copy_rate / 1e12:.2f} TB/s, product {product_rate / 1e12:.0f} TF/s")
    print(f"{'case':<36} useful      MB  roof us")
    end = time.monotonic() + 60 * args.minutes
    failed = False
    for case in cases:
        if time.monotonic() > end:
            print(f"--minutes {args.minutes:g} are over")
            break
        roof = 1e6 * max(case.bytes / copy_rate, case.flop / product_rate)
        row = dict(case=case.name, useful=case.useful, megabytes=case.bytes / 1e6, roof=roof)
        useful = f"{case.useful:.0%}" if case.useful else ""
        print(f"{case.name:<36} {useful:>6} {case.bytes / 1e6:>7.1f} {roof:>8.1f}", flush=True)
        if gpu:
            times = measure_case(case, short=roof < 20)
            failed = failed or "both" not in times
            for name, value in times.items():
                print(f"    {name:<8} {value if isinstance(value, str) else f'{value:.2f}'}")
            row |= times
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                print(json.dumps(row | dict(machine=machine)), file=file)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
