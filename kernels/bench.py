"""Check the kernels, then time them, beside the peers that are installed.

    python -m kernels.bench                                    every kernel and size, most wanted first
    python -m kernels.bench --kernel attention --size N=1024 --minutes 9
    python -m kernels.bench --json results.jsonl               a line of JSON for each row, written at once
    python -m kernels.bench --all --json results.jsonl         all of a GPU's checks and figures, see below

On a GPU each case first runs forward and backward on the very inputs that will be timed. The error of the output and of
every gradient against fp32 may be at most twice that of eager PyTorch in the case's own dtype; what fails is reported
and not timed, and the next one runs. Times are medians of CUDA events with a cold L2 cache, behind a kernel that spins
while the host enqueues what is timed, so that the host's time does not count; "spread" is the distance between the
quartiles. Ours is timed first and last. Forward is timed as training runs it: that of the cross-entropies makes their
gradient too. TF/s and GB/s count what the mathematics needs, not what is recomputed; "roofline" is the share of a
matrix product or of a copy timed in the same run.

--all runs, in this order: the tests that need a GPU, at full size in the tiles that ship; the attention kernels in
other tiles; the cases above; `python -m dss.bench`, whole steps; and hardware counters of one step, where ncu is there.
"""

import argparse
import functools
import itertools
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from . import attention_kernels, launch
from .activations import geglu_reference, geglu_triton
from .buckets import relative_position_bucket
from .flash_attention import attention_reference, attention_triton
from .losses import (
    cross_entropy_reference,
    cross_entropy_triton,
    linear_cross_entropy_reference,
    linear_cross_entropy_triton,
)
from .norms import rms_norm_reference, rms_norm_triton

ROOT = pathlib.Path(__file__).resolve().parents[1]
KERNELS = ["attention", "cross_entropy", "linear_cross_entropy", "rms_norm", "geglu"]
RATIO = 2.0  # our error may be this many times eager's, plus 1e-5


@dataclass
class Case:
    kernel: str
    size: str
    inputs: list  # leaf tensors, or None
    ours: callable
    eager: callable
    work: tuple  # (forward, backward) in FLOP or bytes
    unit: str  # "TF/s" or "GB/s"
    peers: dict = field(default_factory=dict)  # other implementations of the same function of `inputs`
    variants: dict = field(default_factory=dict)  # {name: (function, inputs)} of another function: not checked
    parts: tuple = (lambda x: x,)  # slices of inputs and results alike in which eager and fp32 fit into memory


# ---- The cases ------------------------------------------------------------------------------------------------------


def cases(kernels, device, quick, dtype=torch.bfloat16):
    """Yields functions that make one Case each, so that only one case's tensors exist at a time; most wanted first."""
    lists = {kernel: [] for kernel in kernels}

    def add(kernel, make, *arguments):
        if kernel in lists:
            lists[kernel].append(functools.partial(make, *arguments, device, dtype))

    for N in (1024,) if quick else (1024, 512, 256, 2048, 128, 4096):
        for use in ("encoder", "decoder", "cross"):
            add("attention", attention_case, use, 65536 // N, N, 12, 64)  # B * H = 768 at N = 1024
    if not quick:
        add("attention", attention_case, "encoder", 32, 1024, 12, 128)
    for V in (32128,) if quick else (32128, 250112, 8192, 65536):
        few = 8 if V > 10**5 else 1
        add("cross_entropy", cross_entropy_case, 8192 // few, V)
        add("linear_cross_entropy", linear_case, 4096 // few, 768, V)
    for T in (8192,) if quick else (8192, 1024, 32768):
        add("rms_norm", rms_norm_case, T, 768)
        add("geglu", geglu_case, T, 2048)
    for one_of_each in itertools.zip_longest(*lists.values()):
        yield from filter(None, one_of_each)


def leaf(*shape, device, dtype, scale=1.0, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, device=device, generator=generator) * scale).to(dtype).requires_grad_()


def attention_case(use, B, N, H, D, device, dtype):
    causal, T = use == "decoder", B * N
    # q as T5 has it: scores of deviation 1 without a factor 1 / sqrt(D)
    q, k, v = (leaf(T, H, D, device=device, dtype=dtype, scale=s, seed=i) for i, s in enumerate((D**-0.5, 1, 1)))
    table = None if use == "cross" else leaf(32, H, device=device, dtype=torch.float32)
    where = torch.arange(0, T + 1, N, dtype=torch.int32, device=device)
    rest = dict(cu_seqlens_q=where, cu_seqlens_k=where, causal=causal, max_seqlen_q=N, max_seqlen_k=N)
    reach = torch.arange(-N, N + 1, device=device)
    buckets = relative_position_bucket(reach, 32, 128, bidirectional=not causal)  # of the distance i - N

    def padded(x):
        return x.view(B, N, H, D).transpose(1, 2)

    def sdpa(q, k, v, bias):
        o = F.scaled_dot_product_attention(padded(q), padded(k), padded(v), attn_mask=bias, scale=1.0)
        return o.transpose(1, 2).reshape(T, H, D)

    def sdpa_causal(q, k, v):
        heads = map(padded, (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=causal, scale=1.0).transpose(1, 2).reshape(T, H, D)

    def materialised(table):
        i = torch.arange(N, device=device)
        bias = table[buckets[i[None, :] - i[:, None] + N]].permute(2, 0, 1)[None]  # (1, H, N, N)
        return (bias.masked_fill(i[None, :] > i[:, None], float("-inf")) if causal else bias).to(dtype)

    def flex(q, k, v, table):
        def score_mod(score, b, h, i, j):
            return score if table is None else score + table[buckets[j - i + N], h]

        mask = causal_mask(N, str(device)) if causal else None
        o = compiled_flex()(padded(q), padded(k), padded(v), score_mod=score_mod, block_mask=mask, scale=1.0)
        return o.transpose(1, 2).reshape(T, H, D)

    variants = {"SDPA without bias": (sdpa_causal, [q, k, v])}  # the ceiling
    if table is not None:  # T5 gathers the bias once for all layers, so that SDPA gets it as a leaf
        bias = materialised(table.detach()).requires_grad_()
        dropped = functools.partial(attention_triton, **rest, dropout_p=0.1, seed=torch.ones_like(where[:1]).long())
        variants |= {
            "SDPA, materialised bias": (sdpa, [q, k, v, bias]),
            "ours with dropout 0.1": (dropped, [q, k, v, table]),
            "ours without bias": (lambda q, k, v: attention_triton(q, k, v, None, **rest), [q, k, v]),
            "ours, table frozen": (lambda q, k, v: attention_triton(q, k, v, table.detach(), **rest), [q, k, v]),
        }
    flops = 4 * B * H * N * N * D / (2 if causal else 1)
    group = max(1, 2**27 // (B * N * N))  # heads whose fp32 scores take half a gigabyte
    return Case(
        "attention",
        f"{use} N={N} D={D} B*H={B * H}",
        [q, k, v, table],
        ours=lambda q, k, v, table: attention_triton(q, k, v, table, **rest),
        eager=lambda q, k, v, table: attention_reference(q, k, v, table, **rest),
        work=(flops, 2.5 * flops),
        unit="TF/s",
        peers={"FlexAttention, learned table": flex, "torch.compile": compiled(attention_reference, **rest)},
        variants=variants,
        parts=tuple(lambda x, h=h: x[:, h : h + group] for h in range(0, H, group)),
    )


def compiled(function, *arguments, **options):
    """torch.compile of function(*inputs, *arguments, **options), compiled when it is first called."""
    return torch.compile(lambda *inputs: function(*inputs, *arguments, **options), dynamic=False)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def causal_mask(N, device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: j <= i, None, None, N, N, device=device)


def targets(T, V, device):
    generator = torch.Generator(device).manual_seed(1)
    labels = torch.randint(0, V, (T,), device=device, generator=generator)
    return labels, torch.rand(T, device=device, generator=generator)


def cross_entropy_case(T, V, device, dtype):
    labels, weights = targets(T, V, device)
    size = torch.finfo(dtype).bits // 8
    return Case(
        "cross_entropy",
        f"T={T} V={V}",
        [leaf(T, V, device=device, dtype=dtype)],
        ours=lambda logits: cross_entropy_triton(logits, labels, weights),
        eager=lambda logits: cross_entropy_reference(logits, labels, weights),
        work=(T * V * size, T * V * size),  # one read, one write
        unit="GB/s",
        peers={"torch.compile": compiled(cross_entropy_reference, labels, weights)},
    )


def linear_case(T, C, V, device, dtype):
    labels, weights = targets(T, V, device)
    inputs = [leaf(T, C, device=device, dtype=dtype), leaf(V, C, device=device, dtype=dtype, scale=C**-0.5, seed=1)]
    variants = {}  # another function than ours, for want of weights
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        sums = functools.partial(F.linear_cross_entropy, reduction="sum")
        variants["torch, no weights"] = (lambda h, w: sums(h, w, labels), inputs)
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        variants["Liger, no weights"] = (lambda h, w: liger(h, w, labels, reduction="sum"), inputs)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        variants["CCE, no weights"] = (lambda h, w: cce(h, w, labels, reduction="sum"), inputs)
    except ImportError:
        pass
    flops = 2 * T * C * V
    return Case(
        "linear_cross_entropy",
        f"T={T} C={C} V={V}",
        inputs,
        ours=lambda h, w: linear_cross_entropy_triton(h, w, labels, weights),
        eager=lambda h, w: linear_cross_entropy_reference(h, w, labels, weights),
        work=(flops, 2 * flops),
        unit="TF/s",
        peers={"torch.compile": compiled(linear_cross_entropy_reference, labels, weights)},
        variants=variants,
    )


def rms_norm_case(T, C, device, dtype):
    x, residual = (leaf(T, C, device=device, dtype=dtype, seed=seed) for seed in range(2))
    each = T * C * torch.finfo(dtype).bits // 8
    return Case(
        "rms_norm",
        f"+ residual T={T} C={C}",
        [x, leaf(C, device=device, dtype=torch.float32), residual],
        ours=lambda x, w, r: rms_norm_triton(x, w, residual=r),
        eager=lambda x, w, r: rms_norm_reference(x, w, residual=r),
        work=(4 * each, 5 * each),
        unit="GB/s",
        peers={"torch.compile": compiled(lambda x, w, r: rms_norm_reference(x, w, residual=r))},
    )


def geglu_case(T, width, device, dtype):
    gate, up = leaf(T, width, device=device, dtype=dtype), leaf(T, width, device=device, dtype=dtype, seed=1)
    each = T * width * torch.finfo(dtype).bits // 8
    seed = torch.ones(1, dtype=torch.int64, device=device)
    return Case(
        "geglu",
        f"T={T} F={width}",
        [gate, up],
        ours=geglu_triton,
        eager=geglu_reference,
        work=(3 * each, 5 * each),
        unit="GB/s",
        peers={"torch.compile": compiled(geglu_reference)},
        variants={"ours with dropout 0.1": (lambda gate, up: geglu_triton(gate, up, 0.1, seed), [gate, up])},
    )


# ---- Checking -------------------------------------------------------------------------------------------------------


def results(function, inputs, upstream=None):
    """[outputs, a gradient for each input that is a tensor], and the upstream gradients they belong to."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = upstream or gradients_for(outputs)
    upstream = [g.to(x.dtype) for g, x in zip(upstream, outputs)]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x is not None], upstream)
    return [*(x.detach() for x in outputs), *gradients], upstream


def gradients_for(outputs):
    generator = torch.Generator(outputs[0].device).manual_seed(2)
    return [torch.randn(x.shape, device=x.device, generator=generator).to(x.dtype) for x in outputs]


def worst_ratio(case, function):
    """The largest of (error - 1e-5) / (eager's error), over output and gradients, both against fp32."""
    got, upstream = results(function, case.inputs)
    squares = torch.zeros(len(got), 3, dtype=torch.float64)
    for part in case.parts:
        cut = [x if x is None else part(x.detach()) for x in case.inputs]
        exact, _ = results(case.eager, [x if x is None else x.float() for x in cut], list(map(part, upstream)))
        eager, _ = results(case.eager, cut, list(map(part, upstream)))
        for i, (a, b, c) in enumerate(zip(map(part, got), eager, exact)):
            a, b, c = a.double(), b.double(), c.double()
            squares[i] += torch.stack([x.square().sum().cpu() for x in (a - c, b - c, c)])
    size = squares[:, 2].sqrt().clamp(min=1e-30)
    ours, theirs = squares[:, 0].sqrt() / size, squares[:, 1].sqrt() / size
    return ((ours - 1e-5).clamp(min=0) / theirs.clamp(min=1e-12)).nan_to_num(float("inf")).max().item()


# ---- Timing ---------------------------------------------------------------------------------------------------------


def timed(run, repeats, prepare=lambda: None):
    """(median, distance between the quartiles) in ms of run(prepare()), by CUDA events, the L2 cache overwritten."""
    cache = torch.empty(2**26, dtype=torch.int32, device="cuda")
    for _ in range(3):
        run(prepare())
    times = []
    for _ in range(repeats):
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
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product, _ = timed(lambda _: a @ b, 20)
    x = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy, _ = timed(lambda _: y.copy_(x), 20)
    return {"TF/s": 2 * 8192**3 / product / 1e9, "GB/s": 2 * x.numel() / copy / 1e6}


def timings(case, function, inputs, repeats, best):
    """A dict of the times of one implementation, its memory, what it reaches of the roofline, and the GPU's state."""
    leaves = [x for x in inputs if x is not None]
    forward = lambda _=None: function(*inputs)
    output = forward()
    upstream = gradients_for(output if isinstance(output, tuple) else (output,))
    backward = lambda output: torch.autograd.grad(output, leaves, upstream, allow_unused=True)
    del output

    row, scale = {}, 1e9 if case.unit == "TF/s" else 1e6
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backward(forward())
    row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    for name, run, prepare, work in (
        ("forward", forward, lambda: None, case.work[0]),
        ("backward", backward, forward, case.work[1]),
        ("both", lambda _: backward(forward()), lambda: None, sum(case.work)),
    ):
        median, spread = timed(run, repeats, prepare)
        row[f"{name} ms"], row[f"{name} spread"] = median, spread
        row[f"{name} {case.unit}"] = work / median / scale
        row[f"{name} roofline"] = work / median / scale / best[case.unit]
    return row | dict(gpu_state=gpu_state())


def gpu_state():
    """Clocks, power and temperature, as nvidia-smi says them."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", str(torch.cuda.current_device())]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


HEADER = (
    "| kernel | size | implementation | error, x eager | forward ms | backward ms | both ms | spread | both | roofline "
    "| peak MiB |"
)


def show(row):
    if "failed" in row:
        return f"| {row['kernel']} | {row['size']} | {row['implementation']} | {row['failed']} |"
    numbers = [f"{row[name]:.3f}" for name in ("forward ms", "backward ms", "both ms", "both spread")]
    error = f"{row['error ratio']:.2f}" if row["error ratio"] is not None else "-"
    rate = f"{row['both ' + row['unit']]:.0f} {row['unit']}"
    cells = [row["kernel"], row["size"], row["implementation"], error, *numbers, rate, f"{row['both roofline']:.0%}"]
    return f"| {' | '.join([*cells, format(row['peak MiB'], '.0f')])} |"


def measure(case, repeats, best):
    """Yields a row for each implementation; one that fails its check, or fails, is reported and not timed."""
    torch.compiler.reset()  # peers are compiled for each case; past a number of shapes they would not be any more
    checked = {"ours": case.ours, "eager": case.eager} | case.peers
    todo = [(name, function, case.inputs) for name, function in checked.items()]
    todo += [(name, *variant) for name, variant in case.variants.items()]
    for name, function, inputs in [*todo, ("ours, again", case.ours, case.inputs)]:
        row = dict(kernel=case.kernel, size=case.size, implementation=name, unit=case.unit)
        try:
            ratio = worst_ratio(case, function) if name in checked and name != "eager" else None
            if ratio is not None and ratio > RATIO:
                yield row | dict(failed=f"FAILED its check: {ratio:.1f} times eager's error; not timed")
                continue
            yield row | {"error ratio": ratio} | timings(case, function, inputs, repeats, best)
        except Exception as problem:  # out of memory, unsupported, no compiler: none of it may end the run
            said = str(problem).splitlines() or [""]
            yield row | dict(failed=f"failed: {type(problem).__name__}: {said[0][:80]}")
        torch.cuda.empty_cache()


def bench_cases(args, keep):
    """Measure the cases that --kernel and --size ask for until --minutes are over; keep(row) each row."""
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is what errors are measured against
    best = roofline()
    keep(dict(roofline=best))
    print(f"roofline of this run: {best['TF/s']:.0f} TF/s (bf16 product), {best['GB/s']:.0f} GB/s (copy)\n\n{HEADER}")
    print("|" + "---|" * HEADER.count(" | ") + "---|")
    for make in cases(args.kernel, torch.device("cuda"), args.quick):
        case = make()
        for row in measure(case, 10 if args.quick else 20, best) if args.size in case.size else ():
            keep(row)
            print(show(row), flush=True)
            if args.minutes and time.monotonic() > args.end:
                print(f"--minutes {args.minutes:g} are over")
                return


# Tiles to time beside those that ship: {kernel: (BM, BN, num_warps, num_stages), ...}
TILES = {
    "forward": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2)],
    "dq": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2)],
    "dkdv": [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2)],
}


def bench_tiles(args, keep):
    """Forward and backward of the encoder at N = 1024, D = 64, dropout 0.1, with one kernel in other tiles."""
    case = attention_case("encoder", 64, 1024, 12, 64, torch.device("cuda"), torch.bfloat16)
    function, inputs = case.variants["ours with dropout 0.1"]
    table = attention_kernels.CONFIGURATIONS[launch.architecture(torch.device("cuda"))]
    for kernel, tile in [(kernel, tile) for kernel, tiles in TILES.items() for tile in tiles]:
        shipped, row = table[kernel, 2][64], dict(kernel=f"attention {kernel}", tile=tile)
        table[kernel, 2][64] = tile
        try:
            output = function(*inputs)
            upstream = torch.randn_like(output)
            run = lambda _, upstream=upstream: torch.autograd.grad(function(*inputs), inputs, upstream)
            row |= {"both ms": timed(run, 10)[0], "shipped": tile == shipped}
        except Exception as problem:
            row |= dict(failed=f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:80]}")
        finally:
            table[kernel, 2][64] = shipped
        keep(row)
        print(row, flush=True)


def run_beside(name, command):
    """Run a program of which --all is made; one that is missing or fails is said so, and does not end the rest."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    try:
        print(f"== exit status {subprocess.run(command, cwd=ROOT).returncode}")
    except OSError as problem:
        print(f"== not run: {problem}")


COUNTERS = ",".join((
    "gpu__time_duration.sum", "sm__inst_issued.avg.per_cycle_active", "sm__warps_active.avg.per_cycle_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", "l1tex__data_bank_conflicts_pipe_lsu.sum",
))  # fmt: skip


def bench_all(args, keep):
    run_beside("the GPU's tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu"])
    print("\n== other tiles")
    bench_tiles(args, keep)
    print("\n== kernels and peers")
    bench_cases(args, keep)
    run_beside("whole steps", [sys.executable, "-m", "dss.bench", "--size", "base"])
    one = [sys.executable, "-m", "kernels.bench", "--quick", "--kernel", "attention", "--size", "encoder"]
    run_beside("counters", ["ncu", "-k", "regex:attention", "-c", "12", "--metrics", COUNTERS, *one])


# ---- Output ---------------------------------------------------------------------------------------------------------


def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    triton = getattr(launch.triton, "__version__", None)
    return dict(
        gpu=gpu, platform=platform.platform(), python=platform.python_version(), torch=torch.__version__
    ) | dict(
        triton=triton, date=time.strftime("%Y-%m-%d"), command=" ".join(["python -m kernels.bench", *sys.argv[1:]])
    )


def main(argv=None):
    """Exit status: 0 done; 1 a kernel of ours failed its check; 2 the arguments are wrong, or there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one size of each kernel, fewer repeats")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="which kernels [all]")
    parser.add_argument("--size", default="", metavar="TEXT", help="cases whose size holds this, as N=1024 or encoder")
    parser.add_argument("--minutes", type=float, default=0.0, help="end after so many [when all is done]")
    parser.add_argument("--all", action="store_true", help="all of a GPU's checks and figures")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="append a line of JSON for each row to FILE")
    args = parser.parse_args(argv)
    args.end = time.monotonic() + 60 * args.minutes
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: the directory {args.json.parent} does not exist")
    if not torch.cuda.is_available() or not launch.INSTALLED:
        parser.error("needs a GPU and Triton; without them `python -m kernels.aot` compiles the kernels")
    here, rows = machine(), []

    def keep(row):
        rows.append(row)
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    keep(dict(machine=here))
    print(", ".join(f"{key} {value}" for key, value in here.items() if value))
    (bench_all if args.all else bench_cases)(args, keep)
    return int(any("failed" in row and row.get("implementation") == "ours" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
