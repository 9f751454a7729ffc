"""Time the kernels on a GPU, beside the peers that are installed.

    python -m kernels.bench                                    every kernel and size, most wanted first
    python -m kernels.bench --only "attention encoder" --minutes 9
    python -m kernels.bench --all --json results.jsonl         all of a GPU's checks and figures, a JSON object per row

Times are medians of CUDA events with a cold L2 cache, after a kernel that spins while the host enqueues what is timed;
"spread" is the distance between the quartiles. Ours is timed first and last. What fails is reported, and the next one
runs. Forward is timed as training runs it: that of the cross-entropies makes their gradient too. TF/s and GB/s count
what the mathematics needs; the percentage is of a matrix product or a copy timed in the same run.

--all runs, in this order: the tests that need a GPU, at full size in the tiles that ship; the attention kernels in
other tiles; the cases above; `python -m dss.bench`, whole steps; and hardware counters of one step, where ncu is there.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F

import kernels

from . import launch
from .aot import OneLineParser
from .buckets import relative_position_bucket
from .flash_attention import CONFIGURATIONS


@dataclass
class Case:
    kernel: str
    inputs: dict  # leaf tensors, or None
    rest: dict  # arguments that have no gradient
    unit: str  # "TF/s" or "GB/s"
    forward: float  # FLOP or bytes
    backward: float
    peers: dict = field(default_factory=dict)  # {name: (function, inputs)}

    def todo(self):
        """{name: (function, inputs)} of ours, the peers, and ours again."""
        ours, eager = (partial(getattr(kernels, f"{self.kernel}_{x}"), **self.rest) for x in ("triton", "reference"))
        compiled = torch.compile(lambda **inputs: eager(**inputs), dynamic=False)
        own = {"eager": eager, "torch.compile": compiled, "ours, again": ours}
        own = {name: (function, self.inputs) for name, function in own.items()}
        return {"ours": (ours, self.inputs), **self.peers, **own}


# ---- The cases, on PyTorch's default device -------------------------------------------------------------------------


def cases(dtype=torch.bfloat16):
    """{name: a function that makes the Case}, most wanted first, each kernel in turn."""
    uses = [(use, N, 64) for N in (1024, 512, 256, 2048, 128, 4096) for use in ("encoder", "decoder", "cross")]
    uses.append(("encoder", 1024, 128))
    logits = [(8192, 32128), (1024, 250112), (8192, 8192), (8192, 65536)]
    lists = [
        [(f"attention {use} N={N} D={D}", partial(attention, use, 65536 // N, N, 12, D)) for use, N, D in uses],
        [(f"cross_entropy T={T} V={V}", partial(cross_entropy, T, V)) for T, V in logits],
        [(f"linear_cross_entropy T={T // 2} V={V}", partial(linear_cross_entropy, T // 2, 768, V)) for T, V in logits],
        [(f"rms_norm + residual T={T}", partial(rms_norm, T, 768)) for T in (8192, 1024, 32768)],
        [(f"geglu T={T}", partial(geglu, T, 2048)) for T in (8192, 1024, 32768)],
    ]
    rounds = itertools.chain(*itertools.zip_longest(*lists))
    return {name: partial(make, dtype) for name, make in filter(None, rounds)}


def leaf(*shape, dtype, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def attention(use, B, N, H, D, dtype):
    causal, T = use == "decoder", B * N
    # q as T5 has it: scores of deviation 1 without a factor 1 / sqrt(D)
    q, k, v = (leaf(T, H, D, dtype=dtype, scale=scale) for scale in (D**-0.5, 1, 1))
    table = None if use == "cross" else leaf(32, H, dtype=torch.float32)
    where = torch.arange(0, T + 1, N, dtype=torch.int32)
    rest = dict(cu_seqlens_q=where, cu_seqlens_k=where, causal=causal, max_seqlen_q=N, max_seqlen_k=N)
    buckets = relative_position_bucket(torch.arange(-N, N + 1), bidirectional=not causal)  # of the distance i - N

    def dense(attention, q, k, v, **options):
        heads = (x.view(B, N, H, D).transpose(1, 2) for x in (q, k, v))
        return attention(*heads, scale=1.0, **options).transpose(1, 2).reshape(T, H, D)

    def flex(q, k, v, table):
        def score_mod(score, b, h, i, j):
            return score if table is None else score + table[buckets[j - i + N], h]

        function, mask = flex_attention(N, causal)
        return dense(function, q, k, v, score_mod=score_mod, block_mask=mask)

    sdpa, qkv = partial(dense, F.scaled_dot_product_attention), dict(q=q, k=k, v=v)
    peers = {"SDPA without bias": (partial(sdpa, is_causal=causal), qkv)}  # the ceiling
    peers["FlexAttention, learned table"] = flex, qkv | dict(table=table)
    if table is not None:  # T5 gathers the bias once for all layers, so that SDPA gets it as a leaf
        distance = torch.arange(N)[None, :] - torch.arange(N)[:, None]
        bias = table.detach()[buckets[distance + N]].permute(2, 0, 1)[None]  # (1, H, N, N)
        bias = (bias.masked_fill(distance > 0, float("-inf")) if causal else bias).to(dtype).requires_grad_()
        dropped = partial(kernels.attention_triton, **rest, dropout_p=0.1, seed=torch.ones(1, dtype=torch.int64))
        peers |= {
            "SDPA, materialised bias": (sdpa, qkv | dict(attn_mask=bias)),
            "ours with dropout 0.1": (dropped, qkv | dict(table=table)),
            "ours without bias": (partial(kernels.attention_triton, table=None, **rest), qkv),
        }
    flops = 4 * B * H * N * N * D / (2 if causal else 1)
    return Case("attention", qkv | dict(table=table), rest, "TF/s", flops, 2.5 * flops, peers)


@functools.cache
def flex_attention(N, causal):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible, device = lambda b, h, i, j: j <= i, torch.get_default_device()
    mask = create_block_mask(visible, None, None, N, N, device) if causal else None
    return torch.compile(flex_attention, dynamic=False), mask


def cross_entropy(T, V, dtype):
    inputs, each = dict(logits=leaf(T, V, dtype=dtype)), T * V * dtype.itemsize  # one read, one write
    rest = dict(labels=torch.randint(0, V, (T,)), weights=torch.rand(T))
    return Case("cross_entropy", inputs, rest, "GB/s", each, each)


def linear_cross_entropy(T, C, V, dtype):
    inputs = dict(hidden=leaf(T, C, dtype=dtype), weight=leaf(V, C, dtype=dtype, scale=C**-0.5))
    labels, flops, peers = torch.randint(0, V, (T,)), 2 * T * C * V, {}
    for peer, module, name in (  # they have no weights: another function than ours
        ("torch", "torch.nn.functional", "linear_cross_entropy"),  # >= 2.13
        ("Liger", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
        ("CCE", "cut_cross_entropy", "linear_cross_entropy"),
    ):
        if find_spec(module.partition(".")[0]):
            peers[f"{peer}, no weights"] = partial(unweighted, module, name, labels), inputs
    rest = dict(labels=labels, weights=torch.rand(T))
    return Case("linear_cross_entropy", inputs, rest, "TF/s", flops, 2 * flops, peers)


def unweighted(module, name, labels, hidden, weight):
    return getattr(import_module(module), name)(hidden, weight, labels, reduction="sum")


def rms_norm(T, C, dtype):
    x, residual, each = leaf(T, C, dtype=dtype), leaf(T, C, dtype=dtype), T * C * dtype.itemsize
    inputs = dict(x=x, weight=leaf(C, dtype=torch.float32), residual=residual)
    return Case("rms_norm", inputs, {}, "GB/s", 4 * each, 5 * each)


def geglu(T, width, dtype):
    inputs, each = dict(gate=leaf(T, width, dtype=dtype), up=leaf(T, width, dtype=dtype)), T * width * dtype.itemsize
    dropped = partial(kernels.geglu_triton, dropout_p=0.1, seed=torch.ones(1, dtype=torch.int64))
    return Case("geglu", inputs, {}, "GB/s", 3 * each, 5 * each, {"ours with dropout 0.1": (dropped, inputs)})


# ---- Timing ---------------------------------------------------------------------------------------------------------


def timed(run, prepare=lambda: None):
    """(median, distance between the quartiles) in ms of run(prepare()), by CUDA events, the L2 cache overwritten."""
    cache = torch.empty(2**26, dtype=torch.int32, device="cuda")
    for _ in range(3):
        run(prepare())
    times = []
    for _ in range(20):
        state = prepare()
        cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # about 1 ms, in which the host enqueues what follows
        begin.record()
        run(state)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    low, median, high = statistics.quantiles(times, n=4)
    return median, high - low


def roofline():
    """What this machine does at best, in this run: TF/s of a bf16 matrix product, GB/s of a copy."""
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16)
    x, y = torch.empty(2, 2**29, dtype=torch.uint8)
    product, copy = timed(lambda _: a @ b)[0], timed(lambda _: y.copy_(x))[0]
    return {"TF/s": 2 * 8192**3 / product / 1e9, "GB/s": 2 * x.numel() / copy / 1e6}


def timings(case, function, inputs, best):
    """A dict of the times of one implementation, its memory, what it reaches of the roofline, and the GPU's state."""
    leaves = [x for x in inputs.values() if x is not None]
    forward = lambda _=None: function(**inputs)
    output = forward()
    upstream = [torch.randn_like(x) for x in (output if isinstance(output, tuple) else (output,))]
    del output
    backward = lambda output: torch.autograd.grad(output, leaves, upstream)

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backward(forward())
    row = {"peak MiB": (torch.cuda.max_memory_allocated() - before) / 2**20, "unit": case.unit}
    row["forward ms"], _ = timed(forward)
    row["backward ms"], _ = timed(backward, forward)
    row["both ms"], row["spread"] = timed(lambda _: backward(forward()))
    work = dict(forward=case.forward, backward=case.backward, both=case.forward + case.backward)
    for name, amount in work.items():
        row[f"{name} rate"] = amount / row[f"{name} ms"] / (1e9 if case.unit == "TF/s" else 1e6)
        row[f"{name} roofline"] = row[f"{name} rate"] / best[case.unit]
    return row | dict(gpu=gpu_state())


def gpu_state():
    """Clocks, power and temperature, as nvidia-smi says them, where there is one."""
    fields = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", fields, "--format=csv,noheader", "-i", str(torch.cuda.current_device())]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


COLUMNS = "case, implementation, forward ms, backward ms, both ms, spread, rate, peak MiB".split(", ")
TIMES = "{forward ms:.3f} | {backward ms:.3f} | {both ms:.3f} | {spread:.3f}"
FIGURES = TIMES + " | {both rate:.0f} {unit}, {both roofline:.0%} | {peak MiB:.0f}"


def show(row):
    figures = row["failed"] if "failed" in row else FIGURES.format_map(row)
    return f"| {row['case']} | {row['implementation']} | {figures} |"


def measure(name, case, best):
    """Yields a row for each implementation; one that fails is reported and not timed."""
    torch.compiler.reset()  # peers are compiled for each case; past a number of shapes they would not be any more
    for implementation, (function, inputs) in case.todo().items():
        yield attempt(dict(case=name, implementation=implementation), timings, case, function, inputs, best)
        torch.cuda.empty_cache()


def attempt(row, measure, *arguments):
    """The row with what measure(*arguments) finds, or why it failed, which may not end the run."""
    try:
        return row | measure(*arguments)
    except Exception as problem:  # out of memory, unsupported, no compiler
        return row | dict(failed=f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:80]}")


def bench_cases(args, keep):
    """Measure the cases that --only names until --minutes are over; keep(row, text) each row."""
    best, end = roofline(), time.monotonic() + 60 * args.minutes
    text = f"roofline of this run: {best['TF/s']:.0f} TF/s (bf16 product), {best['GB/s']:.0f} GB/s (copy)\n"
    keep(dict(roofline=best), text)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, make in cases().items():
        for row in measure(name, make(), best) if any(text in name for text in args.only) else ():
            keep(row, show(row))
            if args.minutes and time.monotonic() > end:
                return print(f"--minutes {args.minutes:g} are over")


TILES = [  # (BM, BN, num_warps, num_stages), to time beside those that ship
    *((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (32, 64, 4, 2), (64, 128, 4, 2)),
    *((128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 8, 2), (32, 128, 8, 2), (128, 128, 8, 2)),
]


def bench_tiles(keep):
    """Forward and backward of the encoder at N = 1024, D = 64, dropout 0.1, with one kernel in other tiles."""
    function, inputs = attention("encoder", 64, 1024, 12, 64, torch.bfloat16).peers["ours with dropout 0.1"]
    upstream, leaves = torch.randn_like(inputs["q"]), list(inputs.values())
    step = lambda _: torch.autograd.grad(function(**inputs), leaves, upstream)
    table = CONFIGURATIONS[launch.architecture(torch.device("cuda"))]
    for kernel, tile in itertools.product(("forward", "dq", "dkdv"), TILES):
        shipped, table[kernel, 2][64] = table[kernel, 2][64], tile
        row = dict(kernel=f"attention {kernel}", tile=tile, shipped=tile == shipped)
        row = attempt(row, lambda: {"both ms": timed(step)[0]})
        table[kernel, 2][64] = shipped
        keep(row, row)


COUNTERS = ",".join((
    "gpu__time_duration.sum", "sm__inst_issued.avg.per_cycle_active", "sm__warps_active.avg.per_cycle_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", "l1tex__data_bank_conflicts_pipe_lsu.sum",
))  # fmt: skip
STEPS = ["dss.bench", "--size", "t5-v1_1-base", "--dtype", "bfloat16"]
COUNTED = ["kernels.bench", "--only", "attention encoder N=1024 D=64"]


def bench_all(args, keep):
    if run_beside(["pytest", "-q", "-m", "gpu"]):
        keep(dict(implementation="ours", failed="pytest -m gpu"), "== tests failed")
    bench_tiles(keep)
    bench_cases(args, keep)
    run_beside(STEPS)
    run_beside(COUNTED, "ncu", "-k", "regex:attention", "-c", "12", "--metrics", COUNTERS)


def run_beside(module, *under):
    """Run a program of which --all is made; a missing or failing one is reported, and the rest still runs."""
    print(f"\n== {' '.join([*under[:1], *module])}", flush=True)
    try:
        command = [*under, sys.executable, "-m", *module]
        status = subprocess.run(command, cwd=pathlib.Path(__file__).parents[1]).returncode
        print(f"== exit status {status}")
        return status
    except OSError as problem:
        print(f"== not run: {problem}")


def main(argv=None):
    """Exit status: 0 done; 1 a kernel of ours failed; 2 the arguments are wrong, or there is no GPU."""
    parser = OneLineParser(prog="python -m kernels.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name holds one of these")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after this many minutes [no limit]")
    parser.add_argument("--all", action="store_true", help="all of a GPU's checks and figures")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="append a line of JSON for each row to FILE")
    args = parser.parse_args(argv)
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json: {args.json} is a directory, or in one that does not exist")
    if not any(text in name for name in cases() for text in args.only):
        parser.error(f"--only: no case is named {' or '.join(args.only)}")
    if not torch.cuda.is_available() or not launch.INSTALLED:
        parser.error("needs a GPU and Triton; without them `python -m kernels.aot` compiles the kernels")
    torch.set_default_device("cuda")
    failed = False

    def keep(row, text):
        nonlocal failed
        failed |= "failed" in row and row.get("implementation", "").startswith("ours")
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        print(text, flush=True)

    here = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=launch.triton.__version__)
    here |= dict(date=time.strftime("%Y-%m-%d"), command=" ".join(["python -m kernels.bench", *sys.argv[1:]]))
    keep(here, ", ".join(f"{key} {value}" for key, value in here.items()))
    (bench_all if args.all else bench_cases)(args, keep)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
