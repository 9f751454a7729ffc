"""Every kernel compiled ahead of time, without a GPU: does it build, does it fit, and what does a loop cost?

    python -m kernels.aot                                    a table for sm_90
    python -m kernels.aot --arch sm_80 --only attention geglu --json

CASES call the public Triton functions, forward and backward, on tensors without storage (device "meta"), and what they
would launch on a GPU of that architecture is compiled. The figures come from the machine code, by Triton's cuobjdump:

    blocks      of the kernel that fit on a multiprocessor at once, by registers and shared memory
    loops       instructions a warp executes for one tile, of each loop with matrix products (plain, then edge tiles)
    slots       the same in issue slots of a quarter of a multiprocessor, for 8192 scores: comparable between tiles
    exp2        powers of two per score, in the first loop; 2 means that warps compute the same scores twice
    barriers    in the first loop
    spills      loads from and stores to local memory, inside loops and outside
"""

import argparse
import json
import re
import signal
import subprocess
import tempfile
import warnings
from functools import partial
from types import SimpleNamespace

import torch

from . import launch
from .activations import geglu_triton, relu_triton
from .flash_attention import attention_triton
from .losses import cross_entropy_triton
from .norms import rms_norm_triton

BF16, FP32 = torch.bfloat16, torch.float32


# ---- The cases ------------------------------------------------------------------------------------------------------


def meta(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def attention_case(D, causal=False, bias=True, dropout_p=0.1, dtype=BF16, M=1024, N=1024, H=12):
    cu = meta(17, dtype=torch.int32)
    q, k, v = meta(16 * M, H, D, dtype=dtype), meta(16 * N, H, D, dtype=dtype), meta(16 * N, H, D, dtype=dtype)
    table = meta(32, H, dtype=FP32) if bias else None
    attention_triton(q, k, v, table, cu, cu.clone(), causal, dropout_p, 7, 128, M, N).sum().backward()


def cross_entropy_case(V, dtype=BF16):
    labels, weights = meta(64, dtype=torch.int64), meta(64, dtype=FP32).detach()
    cross_entropy_triton(meta(64, V, dtype=dtype), labels, weights).backward()


def norm_case(C):
    """As under autocast: a bf16 branch beside an fp32 stream."""
    sum(rms_norm_triton(meta(64, C), meta(C, dtype=FP32), 1e-6, meta(64, C, dtype=FP32), 0.1, 7)).sum().backward()


USES = {
    "attention D={} encoder": dict(),
    "attention D={} decoder": dict(causal=True),
    "attention D={} cross": dict(bias=False, M=256),
    "attention D={} encoder, no dropout": dict(dropout_p=0.0),
    "attention D={} decoder, no dropout": dict(dropout_p=0.0, causal=True),
    "attention D={} cross, no dropout": dict(dropout_p=0.0, bias=False, M=256),
    "attention D={} encoder, fp32": dict(dtype=FP32),
}
CASES = {use.format(D): partial(attention_case, D, **USES[use]) for D in (64, 128, 32) for use in USES} | {
    "cross_entropy V=32128": partial(cross_entropy_case, 32128),
    "cross_entropy V=32128, fp32": partial(cross_entropy_case, 32128, FP32),
    "cross_entropy V=250112": partial(cross_entropy_case, 250112),
    "rms_norm C=768": lambda: rms_norm_triton(meta(64, 768), meta(768, dtype=FP32)).sum().backward(),
    "rms_norm + residual + dropout C=768": partial(norm_case, 768),
    "rms_norm + residual + dropout C=2048": partial(norm_case, 2048),
    "rms_norm + residual + dropout C=4096": partial(norm_case, 4096),
    "geglu F=2048": lambda: geglu_triton(meta(64, 2048), meta(64, 2048), 0.1, 7).sum().backward(),
    "relu F=3072": lambda: relu_triton(meta(64, 3072), 0.1, 7).sum().backward(),
}


def launches_of(function, architecture):
    """[(kernel, arguments, options)] that function() would launch on a GPU of this architecture."""
    launch.recording = architecture, []
    try:
        function()
        return launch.recording[1]
    finally:
        launch.recording = None


# ---- Compilation ----------------------------------------------------------------------------------------------------


def compile_launch(kernel, arguments, options, architecture):
    """The figures of one launch, as a dict; raises what Triton raises where it does not build."""
    sm = int(architecture[3:])
    driver = SimpleNamespace(  # all that Triton asks of one before it compiles; compilations are kept by device
        get_current_target=lambda: launch.triton.backends.compiler.GPUTarget("cuda", sm, 32),
        get_current_device=lambda: sm,
        get_current_stream=lambda device: 0,
    )
    launch.triton.runtime.driver.set_active(driver)
    built = kernel.warmup(*arguments, grid=(1,), **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [launch.triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        said = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
    registers, shared, warps = int(re.search(r"REG:(\d+)", said)[1]), built.metadata.shared, options["num_warps"]
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    blocks = min(by_registers, (227 if architecture == "sm_90" else 99) * 1024 // (shared + 1024), 64 // warps)
    found = dict(registers=registers, shared=shared, blocks=blocks)
    return found | inspect(said, warps, options["BM"] * options["BN"] if "BM" in options else None)


def inspect(machine_code, warps, scores):
    """{loops, slots, exp2, barriers, spills} of machine code; scores: BM * BN of a kernel that has such tiles."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?);", machine_code, re.M)
    code = [(int(address, 16), text) for address, text in lines]
    count = lambda pattern, part: sum(bool(re.match(pattern, text)) for _, text in part)
    loops, seen = [], set()
    for i, (address, text) in enumerate(code):
        back = re.match(r"BRA.* 0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < address:
            loop = [line for line in code[: i + 1] if line[0] >= int(back[1], 16)]
            seen |= {*loop}
            if scores and count(r"HGMMA|HMMA|FFMA", loop) and len(loop) > 40:
                loops.append(loop)
    inside, spills = count("LDL|STL", seen), count("LDL|STL", code)
    sizes = [len(loop) for loop in loops]
    return dict(
        loops=sizes,
        slots=[round(size * warps / 4 * 8192 / scores) for size in sizes],
        exp2=round(count("MUFU.EX2", loops[0]) * 32 * warps / scores, 2) if loops else None,
        barriers=count("BAR", loops[0]) if loops else None,
        spills=[inside, spills - inside],
    )


def rows(architecture, cases):
    """A dict for each compiled launch: case, kernel, tile, and the figures of the table."""
    for case in cases:
        for kernel, arguments, options in launches_of(CASES[case], architecture):
            tile = "x".join(str(options[key]) for key in ("BM", "BN", "ROWS", "BLOCK") if key in options)
            row = dict(architecture=architecture, case=case, kernel=kernel.__name__, tile=tile)
            row |= dict(warps=options["num_warps"], stages=options.get("num_stages", 3))
            yield row | compile_launch(kernel, arguments, options, architecture)


KEYS = "case kernel tile warps stages registers shared blocks loops slots exp2 barriers spills".split()
HEADER = f"| {' | '.join(KEYS).replace('shared', 'shared, KiB')} |\n|{'---|' * len(KEYS)}"


def line(row):
    joined = {key: " + ".join(map(str, row[key])) for key in ("loops", "slots", "spills")}
    shown = row | joined | dict(shared=f"{row['shared'] / 1024:.1f}", kernel=row["kernel"].removesuffix("_kernel"))
    return f"| {' | '.join('' if shown[key] is None else str(shown[key]) for key in KEYS)} |"


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def main(argv=None):
    parser = OneLineParser(prog="python -m kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", choices=("sm_80", "sm_90"), nargs="+", default=["sm_90"], help="[sm_90]")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name holds one of these")
    parser.add_argument("--json", action="store_true", help="a JSON object a line instead of a table")
    args = parser.parse_args(argv)
    cases = [case for case in CASES if any(text in case for text in args.only)]
    if not cases:
        parser.error(f"--only: no case is named {' or '.join(args.only)}")
    if not launch.INSTALLED or launch.INTERPRETED:
        parser.error("needs Triton, and TRITON_INTERPRET unset")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # 3.9 says it once, whatever we do
    for architecture in args.arch:
        if not args.json:
            print(f"{architecture}\n{HEADER}")
        for row in rows(architecture, cases):
            print(json.dumps(row) if args.json else line(row), flush=True)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head` ends it without a traceback; Windows has no such signal
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
