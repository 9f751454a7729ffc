"""Time the kernels beside their peers, at the lengths of this task's data sets and at long ones.

    python -m kernels.bench
    python -m kernels.bench --only "attention encoder" --minutes 2 --json times.jsonl

Most important first: steps of 64 and 256 rows with lengths like those of CQA, e-SNLI and SVAMP,
then sequences of 512, 1024 and 4096 tokens, in bfloat16 at T5-base's shape, without dropout.

    useful    share of real queries and keys among the scores that attention's tiles compute
    MB, roof  megabytes that forward and backward must move; us that they take at the rate of a copy
              here, or that their products take at an H200's rate, if that is more
    forward   us; the losses make their gradient in it, too
    both      us of forward and backward
    share     roof / both: for all but linear_cross_entropy, the share of a copy's bandwidth
    eager ... time of a peer for both, over ours; or why it failed

Without a GPU the first three are printed, for an H200.
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
from .flash_attention import make_tiles

HEADS = 12
WIDTH = HEADS * 64
D_FF = 2048
BF16 = torch.bfloat16
COPY = 4.3e12  # bytes/s of a copy on an H200
PRODUCT = 770e12  # FLOP/s of a product there

# Tokens of the released files with T5's tokenizer. Of the inputs: mean, deviation of the logarithm
# and maximum. Means of labels and rationales, whose deviation is assumed to be 0.4.
DATASETS = {
    "CQA": (58.5, 0.16, 124, 3.9, 35),
    "e-SNLI": (43.5, 0.27, 164, 2.3, 17),
    "SVAMP": (53.5, 0.26, 103, 10, 46),
}


def draw_lengths(dataset: str, rows: int) -> tuple[list[int], list[int]]:
    """Lengths of inputs and targets of a step: each row is a label and a rationale sequence."""
    input_mean, input_deviation, longest, label_mean, rationale_mean = DATASETS[dataset]
    generator = np.random.default_rng(0)

    def draw(mean: float, deviation: float) -> list[int]:
        x = generator.lognormal(math.log(mean) - deviation**2 / 2, deviation, rows)
        return x.round().clip(2, longest).astype(int).tolist()

    inputs = draw(input_mean, input_deviation)
    return inputs + inputs, draw(label_mean, 0.4) + draw(rationale_mean, 0.4)


class OneLineParser(argparse.ArgumentParser):
    """Wrong arguments are one line, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


@dataclass
class Case:
    """peers: "ours" and others. Each makes its inputs and returns the call that is timed; gradients
    are those of the call's arguments."""

    name: str
    bytes: float  # that forward and backward must move
    flop: float
    peers: dict[str, Callable[[], partial]]
    useful: float | None = None


def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def make_case(operation: str, name: str, inputs: Callable, moved: float, flop: float = 0) -> Case:
    """Ours beside the reference; inputs() makes their arguments."""
    ours = getattr(kernels, f"{operation}_triton")
    eager = getattr(kernels, f"{operation}_reference")
    peers = {
        "ours": lambda: partial(ours, *inputs()),
        "eager": lambda: partial(eager, *inputs()),
    }
    return Case(f"{operation} {name}", moved, flop, peers)


# ---- Attention ----------------------------------------------------------------------------------


def attention_case(
    use: str, name: str, M: list[int], N: list[int], D: int = 64, dropout_p: float = 0.0
) -> Case:
    """use: encoder, decoder or cross. M, N: numbers of queries and keys of the sequences."""
    cu_q = torch.tensor([0, *accumulate(M)], dtype=torch.int32, device="cpu")
    cu_k = torch.tensor([0, *accumulate(N)], dtype=torch.int32, device="cpu")
    causal = use == "decoder"

    def inputs() -> list:
        q = leaf(sum(M), HEADS, D)
        k = leaf(sum(N), HEADS, D)
        v = leaf(sum(N), HEADS, D)
        table = None if use == "cross" else leaf(32, HEADS, dtype=torch.float32)
        return [q, k, v, table, cu_q.to(q.device), cu_k.to(q.device), causal, dropout_p]

    def varlen() -> partial:
        """PyTorch's, which has no bias."""
        from torch.nn.attention.varlen import varlen_attn

        q, k, v, _, *starts, _, _ = inputs()
        options = dict(scale=1.0, window_size=(-1, 0 if causal else -1))
        return partial(varlen_attn, q, k, v, *starts, max(M), max(N), **options)

    def sdpa() -> partial:
        """PyTorch's, padded, with a bias for each pair of positions, as released T5s have it."""
        q = leaf(len(M), HEADS, max(M), D)
        k = leaf(len(M), HEADS, max(N), D)
        v = leaf(len(M), HEADS, max(N), D)
        bias = leaf(len(M), HEADS, max(M), max(N))
        return partial(F.scaled_dot_product_attention, q, k, v, bias, scale=1.0)

    # Forward reads q, k, v and writes o; backward reads all four and do, writes dq, dk, dv.
    moved = 6 * (sum(M) + sum(N)) * HEADS * D * 2
    flop = 14 * HEADS * D * sum(m * n for m, n in zip(M, N))  # two products forward, five backward
    case = make_case("attention", f"{use} {name}", inputs, moved, flop)
    case.peers |= dict(varlen=varlen, sdpa=sdpa)
    if use == "encoder":
        case.peers["flex"] = lambda: partial(flex_attention_of(M), *inputs()[:4])
    BM = make_tiles(cu_q, sum(M)).query_rows
    BN = make_tiles(cu_k, sum(N)).key_rows
    case.useful = useful_share(M, N, causal, BM, BN)
    return case


def useful_share(M: list[int], N: list[int], causal: bool, BM: int, BN: int) -> float:
    """By the tiles of forward. Masked scores of a sequence count as useful, too."""
    computed = 0
    for m, n in zip(M, N):
        for row in range(0, m, BM):
            keys = min(n, row + BM) if causal else n
            computed += BM * -(-keys // BN) * BN
    return sum(m * n for m, n in zip(M, N)) / computed


def flex_attention_of(lengths: list[int]) -> Callable[..., Tensor]:
    """FlexAttention over the packed stream: a document mask and a learned table."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = sum(lengths)
    longest = max(lengths)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    buckets = relative_position_bucket(torch.arange(-longest, longest + 1))
    compiled = torch.compile(flex_attention)
    mask = create_block_mask(
        lambda b, h, i, j: document[i] == document[j], None, None, T, T, document.device.type
    )
    options = dict(block_mask=mask, scale=1.0, kernel_options={"num_stages": 2})

    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + table[buckets[(j - i).clamp(-longest, longest) + longest], h]

        heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # (1, H, T, D)
        return compiled(*heads, score_mod=bias, **options)[0].transpose(0, 1)

    return function


# ---- The others ---------------------------------------------------------------------------------


def linear_loss_case(name: str, T: int, V: int = 32128, C: int = WIDTH) -> Case:
    def inputs() -> list[Tensor]:
        return [leaf(T, C), leaf(V, C), torch.randint(0, V, (T,)), torch.rand(T)]

    def weighted(losses: Callable) -> partial:
        """A peer that knows no weights: they multiply its losses of each token."""

        def function(*arguments: Tensor) -> Tensor:
            return (losses(*arguments[:3], reduction="none") * arguments[3]).sum()

        return partial(function, *inputs())

    def liger() -> partial:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return weighted(liger_fused_linear_cross_entropy)

    def torch_linear() -> partial:
        options = torch.nn.LinearCrossEntropyOptions()  # torch >= 2.13
        return weighted(partial(F.linear_cross_entropy, options=options))

    case = make_case("linear_cross_entropy", name, inputs, 6 * (T + V) * C, 6 * T * V * C)
    case.peers |= dict(torch=torch_linear, liger=liger)
    return case


def rms_norm_case(name: str, T: int, C: int = WIDTH, dropout_p: float = 0.0) -> Case:
    def inputs() -> list:
        return [leaf(T, C), leaf(C, dtype=torch.float32), 1e-6, leaf(T, C), dropout_p]

    return make_case("rms_norm", name, inputs, 9 * T * C * 2)


def geglu_case(name: str, T: int, dropout_p: float = 0.0) -> Case:
    def inputs() -> list:
        return [leaf(T, D_FF), leaf(T, D_FF), dropout_p]

    return make_case("geglu", name, inputs, 8 * T * D_FF * 2)


def all_cases() -> list[Case]:
    """Most important first."""
    cases = []
    for rows in (64, 256):
        for dataset in DATASETS:
            inputs, targets = draw_lengths(dataset, rows)
            name = f"{dataset} {rows} rows"
            cases.append(attention_case("encoder", name, inputs, inputs))
            cases.append(attention_case("decoder", name, targets, targets))
            cases.append(attention_case("cross", name, targets, inputs))
            if dataset == "CQA":
                cases.append(linear_loss_case(name, sum(targets)))
                cases.append(rms_norm_case(name, sum(inputs)))
                cases.append(geglu_case(name, sum(inputs)))
    for N in (512, 1024, 4096):
        lengths = [N] * (65536 // N)
        for use in ("encoder", "decoder", "cross"):
            cases.append(attention_case(use, f"N={N}", lengths, lengths))
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


def measure_copy() -> float:
    """Bytes/s."""
    x = torch.empty(2**29, dtype=torch.uint8)
    y = torch.empty_like(x)
    return 2 * x.numel() / microseconds(lambda: y.copy_(x)) * 1e6


def measure(call: partial, short: bool) -> tuple[float, float]:
    """us of forward, and of forward and backward."""
    leaves = [x for x in call.args if isinstance(x, Tensor) and x.requires_grad]
    output = call()
    outputs = output if isinstance(output, tuple) else (output,)
    upstream = [torch.randn_like(x) for x in outputs]

    def both() -> None:
        torch.autograd.grad(call(), leaves, upstream)

    return microseconds(call, short), microseconds(both, short)


def measure_case(case: Case, roof: float) -> dict[str, object]:
    """The figures that take a GPU, by name."""
    torch.compiler.reset()
    row = {}
    for name, make in case.peers.items():
        try:
            forward, both = measure(make(), short=roof < 20)
            if name == "ours":
                row = dict(forward=forward, both=both, share=roof / both)
            else:
                row[name] = both / row["both"]
        except Exception as problem:  # out of memory, not supported, not installed
            row[name] = f"{type(problem).__name__}: {str(problem)[:80]}".partition("\n")[0]
    return row


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the arguments are wrong."""
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
    machine = "no GPU: nothing is timed, and the rate of a copy is an H200's"
    copy_rate = COPY
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        machine = torch.cuda.get_device_name()
        copy_rate = measure_copy()
    print(f"{machine}; torch {torch.__version__}, triton {launch.triton.__version__}")
    print(f"a copy: {copy_rate / 1e12:.2f} TB/s")
    end = time.monotonic() + 60 * args.minutes
    for case in cases:
        if time.monotonic() > end:
            print(f"--minutes {args.minutes:g} are over")
            break
        roof = 1e6 * max(case.bytes / copy_rate, case.flop / PRODUCT)
        row = dict(MB=case.bytes / 1e6, roof=roof)
        if case.useful:
            row["useful"] = case.useful
        if torch.cuda.is_available():
            row |= measure_case(case, roof)
        print(case.name)
        for name, value in row.items():
            if isinstance(value, float):
                value = f"{value:.3g}"
            print(f"    {name:<8} {value}", flush=True)
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                print(json.dumps(dict(case=case.name, machine=machine) | row), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
