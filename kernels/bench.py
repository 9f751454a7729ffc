"""Check the kernels, then time them, beside the peers that are installed.

    python -m kernels.bench                                    every kernel and size
    python -m kernels.bench --quick --kernel attention
    python -m kernels.bench --json results.json --plot plots

On a GPU each case first runs forward and backward on the very inputs that will be timed. The error of the output and of
every gradient against fp32 may be at most twice that of eager PyTorch in the case's own dtype; a case that fails is
reported and not timed. Times are medians of CUDA events with a cold L2 cache; "spread" is the distance between the
quartiles. Forward is timed as training runs it: that of the cross-entropies makes their gradient too. TF/s and GB/s
count what the mathematics needs, not what is recomputed; "roofline" is the share of a matrix product or of a copy timed
in the same run. Without a GPU: the table of `kernels.aot`, and the references on the CPU.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from . import launch
from .activations import geglu_reference, geglu_triton, relu_reference, relu_triton
from .buckets import relative_position_bucket
from .flash_attention import attention_reference, attention_triton
from .losses import (
    cross_entropy_reference,
    cross_entropy_triton,
    linear_cross_entropy_reference,
    linear_cross_entropy_triton,
)
from .norms import rms_norm_reference, rms_norm_triton

KERNELS = {  # name: what `kernels.aot --only` calls its cases; the first alone with --quick
    "attention": ["attention D=64 encoder, no", "attention", "decoding"],
    "cross_entropy": ["cross_entropy V=32128, fp32", "cross_entropy"],
    "linear_cross_entropy": ["cross_entropy V=32128, fp32", "cross_entropy"],
    "rms_norm": ["rms_norm C=768", "rms_norm"],
    "geglu": ["geglu", "relu"],
}
RATIO = 2.0  # our error may be this many times eager's, plus 1e-5


@dataclass
class Case:
    kernel: str
    size: str
    x: int  # what plots run over: N or V, else T
    inputs: list  # leaf tensors, or None
    ours: callable
    eager: callable
    work: tuple  # (forward, backward) in FLOP or bytes
    unit: str  # "TF/s" or "GB/s"
    peers: dict = field(default_factory=dict)  # other implementations of the same function of `inputs`
    variants: dict = field(default_factory=dict)  # ours with a part left out, timed beside it and not checked
    parts: tuple = (lambda x: x,)  # slices of inputs and results alike in which eager and fp32 fit into memory


# ---- The cases ------------------------------------------------------------------------------------------------------


def cases(kernel, device, quick, dtype=torch.bfloat16):
    """Yields functions that make one Case each, so that only one case's tensors exist at a time."""
    cpu = device.type == "cpu"
    if kernel == "attention":
        sizes = [(128,), (512,)] if cpu else [(1024,)] if quick else [(128,), (256,), (512,), (1024,), (2048,), (4096,)]
        tokens, H = (1024, 4) if cpu else (65536, 12)  # B * H = 768 at N = 1024
        for (N,) in sizes:
            for use in ("encoder", "decoder", "cross"):
                yield functools.partial(attention_case, use, tokens // N, N, H, 64, device, dtype)
        if not quick and not cpu:
            yield functools.partial(attention_case, "encoder", 32, 1024, 12, 128, device, dtype)
    elif kernel in ("cross_entropy", "linear_cross_entropy"):
        make = cross_entropy_case if kernel == "cross_entropy" else linear_case
        T, C = (128, 256) if cpu else (8192 if kernel == "cross_entropy" else 4096, 768)
        for V in (32128,) if quick or cpu else (4096, 8192, 16384, 32128, 65536, 250112):
            yield functools.partial(make, T if V < 10**5 else T // 8, C, V, device, dtype)
    else:
        for T in (512,) if cpu else (8192,) if quick else (1024, 8192, 32768):
            if kernel == "rms_norm":
                yield functools.partial(rms_norm_case, T, 768, device, dtype)
            else:
                yield functools.partial(geglu_case, T, 2048, device, dtype)
                yield functools.partial(relu_case, T, 3072, device, dtype)


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

    def sdpa(q, k, v, table):
        i = torch.arange(N, device=device)
        bias = None
        if table is not None:
            bias = table[buckets[i[None, :] - i[:, None] + N]].permute(2, 0, 1)[None]  # (1, H, N, N)
            bias = bias.masked_fill(i[None, :] > i[:, None], float("-inf")) if causal else bias
            bias = bias.to(q.dtype)
        o = F.scaled_dot_product_attention(padded(q), padded(k), padded(v), attn_mask=bias, scale=1.0)
        return o.transpose(1, 2).reshape(T, H, D)

    def flex(q, k, v, table):
        def score_mod(score, b, h, i, j):
            return score if table is None else score + table[buckets[j - i + N], h]

        mask = causal_mask(N, str(device)) if causal else None
        o = compiled_flex()(padded(q), padded(k), padded(v), score_mod=score_mod, block_mask=mask, scale=1.0)
        return o.transpose(1, 2).reshape(T, H, D)

    flops = 4 * B * H * N * N * D / (2 if causal else 1)
    group = max(1, 2**27 // (B * N * N))  # heads whose fp32 scores take half a gigabyte
    return Case(
        "attention",
        f"{use} N={N} D={D} B*H={B * H}",
        N,
        [q, k, v, table],
        ours=lambda q, k, v, table: attention_triton(q, k, v, table, **rest),
        eager=lambda q, k, v, table: attention_reference(q, k, v, table, **rest),
        work=(flops, 2.5 * flops),
        unit="TF/s",
        peers={"SDPA, materialised bias": sdpa, "FlexAttention, learned table": flex},
        variants={
            "ours with dropout 0.1": lambda q, k, v, t: attention_triton(q, k, v, t, **rest, dropout_p=0.1, seed=1),
            "ours without bias": lambda q, k, v, t: attention_triton(q, k, v, None, **rest),
            "ours, table frozen": lambda q, k, v, t: attention_triton(q, k, v, t.detach(), **rest),
        }
        if table is not None
        else {},
        parts=tuple(lambda x, h=h: x[:, h : h + group] for h in range(0, H, group)),
    )


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


def cross_entropy_case(T, C, V, device, dtype):
    labels, weights = targets(T, V, device)
    size = torch.finfo(dtype).bits // 8
    return Case(
        "cross_entropy",
        f"T={T} V={V}",
        V,
        [leaf(T, V, device=device, dtype=dtype)],
        ours=lambda logits: cross_entropy_triton(logits, labels, weights),
        eager=lambda logits: cross_entropy_reference(logits, labels, weights),
        work=(T * V * size, T * V * size),  # one read, one write
        unit="GB/s",
    )


def linear_case(T, C, V, device, dtype):
    labels, weights = targets(T, V, device)
    peers = {}
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13; it has no weight per token
        peers["torch, no weights"] = lambda h, w: F.linear_cross_entropy(h, w, labels, reduction="sum")
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        peers["Liger, no weights"] = lambda h, w: liger_fused_linear_cross_entropy(h, w, labels, reduction="sum")
    except ImportError:
        pass
    flops = 2 * T * C * V
    return Case(
        "linear_cross_entropy",
        f"T={T} C={C} V={V}",
        V,
        [leaf(T, C, device=device, dtype=dtype), leaf(V, C, device=device, dtype=dtype, scale=C**-0.5, seed=1)],
        ours=lambda h, w: linear_cross_entropy_triton(h, w, labels, weights),
        eager=lambda h, w: linear_cross_entropy_reference(h, w, labels, weights),
        work=(flops, 2 * flops),
        unit="TF/s",
        variants=peers,  # another function than ours, for want of weights: timed, not checked
    )


def rms_norm_case(T, C, device, dtype):
    x, residual = (leaf(T, C, device=device, dtype=dtype, seed=seed) for seed in range(2))
    each = T * C * torch.finfo(dtype).bits // 8
    return Case(
        "rms_norm",
        f"+ residual T={T} C={C}",
        T,
        [x, leaf(C, device=device, dtype=torch.float32), residual],
        ours=lambda x, w, r: torch.cat(rms_norm_triton(x, w, residual=r), 1),
        eager=lambda x, w, r: torch.cat(rms_norm_reference(x, w, residual=r), 1),
        work=(8 * each, 9 * each),  # with the concatenation that makes one output of two
        unit="GB/s",
    )


def geglu_case(T, width, device, dtype):
    gate, up = leaf(T, width, device=device, dtype=dtype), leaf(T, width, device=device, dtype=dtype, seed=1)
    each = T * width * torch.finfo(dtype).bits // 8
    variants = {"ours with dropout 0.1": lambda gate, up: geglu_triton(gate, up, 0.1, 1)}
    size, work = f"gated T={T} F={width}", (3 * each, 5 * each)
    return Case("geglu", size, T, [gate, up], geglu_triton, geglu_reference, work, "GB/s", variants=variants)


def relu_case(T, width, device, dtype):
    each = T * width * torch.finfo(dtype).bits // 8
    x, work = leaf(T, width, device=device, dtype=dtype), (2 * each, 3 * each)
    return Case("geglu", f"relu T={T} F={width}", T, [x], relu_triton, relu_reference, work, "GB/s")


# ---- Checking -------------------------------------------------------------------------------------------------------


def results(function, inputs, upstream=None):
    """[output, a gradient for each input that is a tensor], and the upstream gradient they belong to."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    if upstream is None:
        generator = torch.Generator(output.device).manual_seed(2)
        upstream = torch.randn(output.shape, device=output.device, generator=generator).to(output.dtype)
    gradients = torch.autograd.grad(output, [x for x in leaves if x is not None], upstream.to(output.dtype))
    return [output.detach(), *gradients], upstream


def worst_ratio(case, function):
    """The largest of (error - 1e-5) / (eager's error), over output and gradients, both against fp32."""
    got, upstream = results(function, case.inputs)
    squares = torch.zeros(len(got), 3, dtype=torch.float64)
    for part in case.parts:
        cut = [x if x is None else part(x.detach()) for x in case.inputs]
        exact, _ = results(case.eager, [x if x is None else x.float() for x in cut], part(upstream))
        eager, _ = results(case.eager, cut, part(upstream))
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


def timings(case, function, repeats, best):
    """A dict of the times of one implementation, its memory, and what it reaches of the roofline."""
    leaves = [x for x in case.inputs if x is not None]

    def forward(_=None):
        return function(*case.inputs)

    def backward(output):
        torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

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
    return row


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
    torch.compiler.reset()  # FlexAttention is compiled for each case; past a number of shapes it would not be any more
    checked = {"ours": case.ours, "eager": case.eager} | case.peers
    for name, function in (checked | case.variants).items():
        row = dict(kernel=case.kernel, size=case.size, x=case.x, implementation=name, unit=case.unit)
        try:
            ratio = worst_ratio(case, function) if name in checked and name != "eager" else None
            if ratio is not None and ratio > RATIO:
                yield row | dict(failed=f"FAILED its check: {ratio:.1f} times eager's error; not timed")
                continue
            yield row | {"error ratio": ratio} | timings(case, function, repeats, best)
        except Exception as problem:  # peers fail in ways of their own: out of memory, unsupported, no compiler
            if name == "ours" and not isinstance(problem, torch.OutOfMemoryError):
                raise
            yield row | dict(failed=f"failed: {type(problem).__name__}: {str(problem).splitlines()[0][:80]}")
        torch.cuda.empty_cache()


def bench_gpu(args):
    """Rows of every case, printed as they come."""
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is what errors are measured against
    best = roofline()
    print(f"roofline of this run: {best['TF/s']:.0f} TF/s (bf16 product), {best['GB/s']:.0f} GB/s (copy)\n\n{HEADER}")
    print("|" + "---|" * HEADER.count(" | ") + "---|")
    rows = []
    for kernel in args.kernel:
        for make in cases(kernel, torch.device("cuda"), args.quick):
            for row in measure(make(), 10 if args.quick else 30, best):
                rows.append(row)
                print(show(row), flush=True)
    return rows, best


# ---- Without a GPU --------------------------------------------------------------------------------------------------


def bench_cpu(args):
    """The table of kernels.aot, then the references' times on the CPU in fp32."""
    print("No GPU here: nothing is timed but the references on the CPU.\n")
    if launch.INSTALLED:
        print("Compiled ahead of time:", flush=True)
        only = [text for name in args.kernel for text in KERNELS[name][: 1 if args.quick else None]]
        without = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        root = pathlib.Path(__file__).resolve().parents[1]
        command = [sys.executable, "-m", "kernels.aot", "--only", *only]
        subprocess.run(command, cwd=root, env=without, check=True)
    else:
        print("Triton is not installed here, so nothing is compiled ahead of time.")
    print("\nReferences, fp32:\n| kernel | size | forward ms | both ms |\n|---|---|---|---|")
    rows = []
    for kernel in args.kernel:
        for make in cases(kernel, torch.device("cpu"), args.quick, torch.float32):
            case = make()
            row = dict(kernel=case.kernel, size=case.size, x=case.x, implementation="eager")
            row["forward ms"] = on_the_clock(lambda case=case: case.eager(*case.inputs))
            row["both ms"] = on_the_clock(lambda case=case: results(case.eager, case.inputs))
            rows.append(row)
            print(f"| {case.kernel} | {case.size} | {row['forward ms']:.1f} | {row['both ms']:.1f} |", flush=True)
    return rows, None


def on_the_clock(run, repeats=3):
    """Median of the time run() takes, in ms, after one run to warm up."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


# ---- Output ---------------------------------------------------------------------------------------------------------


def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    triton = getattr(launch.triton, "__version__", None)
    return dict(
        gpu=gpu, platform=platform.platform(), python=platform.python_version(), torch=torch.__version__
    ) | dict(
        triton=triton, date=time.strftime("%Y-%m-%d"), command=" ".join(["python -m kernels.bench", *sys.argv[1:]])
    )


def write_json(path, content):
    temporary = path.with_name(path.name + ".replacing")
    temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    temporary.replace(path)


def plot(rows, directory):
    """A PNG for each kernel: the time of forward and backward over N, V or T, a line for each implementation."""
    try:
        import matplotlib
    except ImportError:
        print("kernels.bench: no plots, matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    over = {"attention": "N", "cross_entropy": "V", "linear_cross_entropy": "V"}
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        figure, axes = pyplot.subplots(figsize=(8, 5))
        lines = {}
        for row in (row for row in rows if row["kernel"] == kernel and "both ms" in row):
            what = row["size"].split()[0] if kernel in ("attention", "geglu") else ""
            lines.setdefault(f"{row['implementation']} {what}".strip(), []).append((row["x"], row["both ms"]))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=name)
        axes.set(
            xscale="log", yscale="log", xlabel=over.get(kernel, "T"), ylabel="forward and backward, ms", title=kernel
        )
        axes.legend(fontsize="small")
        figure.savefig(directory / f"{kernel}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        print(f"wrote {directory / kernel}.png")


def main(argv=None):
    """Exit status: 0 done, or no GPU; 1 a kernel of ours failed its check; 2 the arguments are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one size of each kernel, fewer repeats")
    parser.add_argument("--kernel", nargs="+", choices=list(KERNELS), default=list(KERNELS), help="which kernels [all]")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--plot", type=pathlib.Path, metavar="DIR", help="write a PNG for each kernel to DIR")
    args = parser.parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: the directory {args.json.parent} does not exist")
    here = machine()
    print(", ".join(f"{key} {value}" for key, value in here.items() if value))
    on_gpu = torch.cuda.is_available() and launch.INSTALLED
    rows, best = bench_gpu(args) if on_gpu else bench_cpu(args)
    if args.json:
        write_json(args.json, dict(machine=here, roofline=best, rows=rows))
    if args.plot:
        plot(rows, args.plot)
    return int(any("failed" in row and row["implementation"] == "ours" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
