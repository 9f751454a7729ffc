"""Whole training steps and decoding, beside the peers that are installed:  python -m dss.bench

    python -m dss.bench                                        the embedded task and its tiny student
    python -m dss.bench --data cqa_train.jsonl --size t5-v1_1-small --batch-size 16 --json b.json --plot b.png

Training is compared with the paper's released recipe on transformers, whose T5 computes attention in two ways, "eager"
and "sdpa": two padded forward passes, predict and explain, then one backward pass of their mean loss. Decoding is
compared with transformers' generate and with CTranslate2. All have the same weights, rows and threads, in training the
same AdamW, in decoding batches of inputs of like length. First it is checked that loss, gradient and tokens are alike.

The implementations take turns, so that a busy machine slows all of them, and a ratio is that of two times of one turn:
the median ratio and, as its spread, the quartiles. Peak memory is that of a process of its own. "Of the machine" is the
share of the best rate that a matrix product reached in the same run, counting what the real tokens need once, forward
and backward. "CPU s" is the time of all threads, which a busy machine disturbs less.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data import arguments
from data.arguments import require
from dss.batch import LABEL, RATIONALE, Sequence, count_targets, pack, segments, sequences
from dss.config import SIZES, TrainConfig
from dss.generate import generate
from dss.loss import distillation_loss
from dss.model import T5
from dss.rows import load_rows, single_rationales
from dss.run.output import write_json
from dss.run.start import choose_device, choose_threads, make_model, make_tokenizer
from dss.weights import checkpoint_name, load_t5, save_t5
from tokenizer import T5Tokenizer

OURS, EAGER, SDPA, CT2 = "ours", "transformers-eager", "transformers-sdpa", "ctranslate2"
PARTS = {  # what the profiler calls the operations of each part; the rest is "other"
    "matrix products": "mm addmm bmm baddbmm _linear_pointwise _scaled_dot_product_flash_attention_for_cpu".split(),
    "dropout": "bernoulli_ native_dropout native_dropout_backward random_".split(),
    "softmax": "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data".split(),
    "copies": "copy_ cat index_copy index_copy_ index index_select index_select_backward fill_ zero_".split(),
    "optimiser": "_fused_adamw_ _foreach_norm linalg_vector_norm _foreach_mul_".split(),
}
Rows = list[list[Sequence]]  # each row's two sequences, LABEL and RATIONALE


@dataclass(frozen=True)
class BenchConfig:
    """Time whole training steps and decoding, ours beside transformers and CTranslate2 where they are installed."""

    # what is computed
    data: tuple[str, ...] = ()  # rows with rationales, JSONL files; none: the embedded task
    weights: str = ""  # public T5 weights, a directory or a hub id; none: random weights
    size: Literal[tuple(SIZES)] = "tiny"  # shape of a student with random weights
    spiece: str = ""  # SentencePiece model; none: the one beside --weights, else one trained on the rows
    vocab_size: int = TrainConfig.vocab_size  # most pieces of a tokenizer trained on the rows
    batch_size: int = 16  # rows of a training step
    questions: int = 256  # inputs to decode
    decode_batch: int = 64  # inputs decoded at a time
    max_new_tokens: int = 16  # tokens decoded for each input
    # how it is measured
    what: tuple[Literal["training", "decoding"], ...] = ("training", "decoding")  # which of the two
    peers: tuple[Literal[EAGER, SDPA, CT2], ...] = (EAGER, SDPA, CT2)  # beside ours; those not installed are left out
    repeats: int = 7  # turns that are counted, after one that is not
    seed: int = 0  # of random weights and the order of the rows
    # machine and files
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    threads: int = 0  # CPU threads; 0: as train.py chooses
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast, for PyTorch's implementations
    json: str = ""  # file for every figure
    plot: str = ""  # PNG file: time of a step over input length and over batch, which takes minutes more
    only: str = ""  # run this implementation alone, untimed, and print its peak memory: how the program calls itself

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that makes no sense."""
        for name in ("batch_size", "questions", "decode_batch", "max_new_tokens", "vocab_size"):
            require(getattr(self, name) >= 1, name, "at least 1", self)
        require(self.repeats >= 2, "repeats", "at least 2", self)
        for name in ("json", "plot"):
            require(Path(getattr(self, name)).parent.is_dir(), name, "a file in a directory that exists", self)


@dataclass
class Setting:
    """What all implementations are given."""

    config: BenchConfig
    device: torch.device
    shape: T5  # on "meta": without storage
    tokenizer: T5Tokenizer
    rows: Rows
    directory: Path  # the model and the tokenizer, as transformers loads them

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def load(self, name: str) -> torch.nn.Module:
        """The model of a PyTorch implementation, ours or transformers', always the same weights."""
        if name == OURS:
            return load_t5(self.directory).to(self.device)
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        load = transformers.AutoModelForSeq2SeqLM.from_pretrained
        return load(self.directory, attn_implementation=name.removeprefix("transformers-")).to(self.device)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a peer computes something else than ours, 2 the arguments or files are wrong."""
    config = arguments.parse(argv, BenchConfig, prog="dss.bench")
    try:
        with tempfile.TemporaryDirectory() as directory:
            setting = prepare(config, Path(directory))
            if config.only:
                print(peak_memory(setting))
                return 0
            return compare(setting, sys.argv[1:] if argv is None else argv)
    except (OSError, ValueError) as error:
        return arguments.fail("dss.bench", 2, error)


def prepare(config: BenchConfig, directory: Path) -> Setting:
    """Raises OSError or ValueError, in one line, for whatever the user can put right."""
    shared = {name: getattr(config, name) for name in ("data", "weights", "size", "spiece", "vocab_size", "seed")}
    train = TrainConfig(**shared, device=config.device, dtype=config.dtype, threads=config.threads)
    device = choose_device(config.device, config.dtype)
    rows = load_rows(train)
    tokenizer = make_tokenizer(train, rows, Path(train.out))
    model = make_model(train, tokenizer)
    choose_threads(config.threads, model)
    having = [row for row in rows.train if row.rationale is not None]
    if len(having) < max(config.batch_size, config.questions):
        raise ValueError(f"{len(having)} rows with a rationale: give more --data, or less --batch-size and --questions")
    examples = [sequences(single_rationales(row)[0], "dss", tokenizer) for row in having]
    save_t5(model, directory)
    tokenizer.save(directory)
    return Setting(config, device, model.to("meta"), tokenizer, examples, directory)


# ---- Training: a loss each; the rest of a step is the same ----------------------------------------------------------


def our_loss(model: T5, rows: Rows) -> torch.Tensor:
    """L / 2, which is the released recipe's loss with alpha 0.5 and ours with lambda 1."""
    flat = [sequence for row in rows for sequence in row]
    batch = pack(flat, model.embedding.weight.device, model.config.decoder_start_token_id)
    return distillation_loss(model, batch, *count_targets(flat), 1.0)[0] / 2


def recipe_loss(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """alpha L_label + (1 - alpha) L_rationale, as the released trainer computes it: a padded forward pass for each."""
    losses = []
    for task in (LABEL, RATIONALE):
        some = [sequence for row in rows for sequence in row if sequence.task == task]
        ids, labels = padded([s.input_ids for s in some], 0), padded([s.target_ids for s in some], -100)
        batch = dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
        losses.append(model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss)
    return sum(losses) / 2


def padded(lists: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, lists)), batch_first=True, padding_value=value)


def trainer(setting: Setting, name: str) -> Callable[[Rows], None]:
    """A function that takes one optimiser step on some rows."""
    model = setting.load(name)
    loss_of = our_loss if name == OURS else recipe_loss
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step(rows: Rows) -> None:
        with setting.autocast():
            loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def check_training(setting: Setting, name: str) -> dict:
    """Relative differences of a peer's loss and gradient from ours, without dropout, on one step's rows."""
    rows, ours, theirs = setting.rows[: setting.config.batch_size], setting.load(OURS), setting.load(name).eval()
    losses = []
    for model, loss_of in ((ours, our_loss), (theirs, recipe_loss)):
        with setting.autocast():
            loss = loss_of(model, rows)
        loss.backward()
        losses.append(loss.item())
    peers, difference, size = dict(theirs.named_parameters()), 0.0, 0.0
    for key, parameter in ours.named_parameters():
        gradient = peers[checkpoint_name(key, ours)].grad
        difference += (parameter.grad - gradient).double().square().sum().item()
        size += gradient.double().square().sum().item()
    return dict(loss=abs(losses[0] / losses[1] - 1), gradient=(difference / size) ** 0.5)


def products(model: T5, rows: Rows) -> float:
    """Floating-point operations of the matrix products of one step on the real tokens, forward and backward."""
    flat = [sequence for row in rows for sequence in row]
    read, written = (sum(len(s[side]) for s in flat) for side in (0, 1))
    total = 2.0 * written * model.output_matrix.numel()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "layers" in name:
            of_input = name.startswith("encoder") or "cross_attention.k" in name or "cross_attention.v" in name
            total += 2.0 * parameter.numel() * (read if of_input else written)
    c = model.config
    for s in flat:  # scores, and weights times values
        M, N = len(s.target_ids), len(s.input_ids)
        each = 4 * c.num_heads * c.d_kv
        total += each * (c.num_layers * N * N + c.num_decoder_layers * (M * N + M * M / 2))
    return 3 * total


# ---- Decoding: a function from lists of ids to lists of ids each ----------------------------------------------------


def decoder(setting: Setting, name: str) -> Callable[[list[list[int]]], list[list[int]]]:
    config = setting.config
    longest, size = config.max_new_tokens, config.decode_batch
    if name == OURS:
        model = setting.load(OURS)

        def decode(inputs):
            with setting.autocast():
                return generate(model, inputs, longest, size)

        return decode
    if name == CT2:
        return ctranslate2_decoder(setting)
    model = setting.load(name).eval()

    def decode(inputs):
        outputs = [[] for _ in inputs]
        order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))  # as ours: it pads no more than it must
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            ids = padded([inputs[i] for i in chosen], 0).to(setting.device)
            with setting.autocast(), torch.no_grad():
                written = model.generate(
                    ids, attention_mask=(ids != 0).long(), max_new_tokens=longest, do_sample=False, num_beams=1
                )
            for i, row in zip(chosen, written[:, 1:].tolist()):
                outputs[i] = row[: row.index(1)] if 1 in row else row
        return outputs

    return decode


def ctranslate2_decoder(setting: Setting) -> object:
    import ctranslate2
    import ctranslate2.converters

    out = setting.directory / "ctranslate2"
    if not out.exists():
        ctranslate2.converters.TransformersConverter(str(setting.directory)).convert(str(out))
    device = setting.device.type
    compute = "bfloat16" if (device, setting.config.dtype) == ("cuda", "bfloat16") else "float32"
    translator = ctranslate2.Translator(str(out), device, compute_type=compute, intra_threads=torch.get_num_threads())
    pieces = json.loads((out / "shared_vocabulary.json").read_text("utf-8"))
    ids = {piece: i for i, piece in enumerate(pieces)}

    def decode(inputs):
        results = translator.translate_batch(
            [[pieces[i] for i in row] for row in inputs],
            max_batch_size=setting.config.decode_batch,  # it sorts them by length itself
            beam_size=1,
            max_decoding_length=setting.config.max_new_tokens,
        )
        return [[ids[piece] for piece in result.hypotheses[0]] for result in results]

    return decode


def encoder(setting: Setting) -> Callable[[list[list[int]]], None]:
    """What all decoding begins with, ours: to see its share."""
    model = setting.load(OURS)

    def encode(inputs):
        inputs = sorted(inputs, key=len, reverse=True)
        for start in range(0, len(inputs), setting.config.decode_batch):
            some = inputs[start : start + setting.config.decode_batch]
            ids = torch.tensor([i for row in some for i in row], device=setting.device)
            with setting.autocast(), torch.no_grad():
                model.encode(ids, segments(list(map(len, some)), setting.device))

    return encode


# ---- Measuring ------------------------------------------------------------------------------------------------------


def take_turns(functions: dict[str, Callable], given: Callable[[int], object], repeats: int) -> dict[str, list]:
    """{name: [(seconds, CPU seconds) of each turn]} of functions that take given(turn); the first turn is left out."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        inputs = given(turn)
        for name, function in functions.items():
            begin, cpu = time.perf_counter(), time.process_time()
            function(inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin, time.process_time() - cpu))
    return {name: some[1:] for name, some in times.items()}


def summary(times: dict[str, list]) -> dict[str, dict]:
    """{name: the medians, and the ratio of its seconds to ours, turn by turn, with quartiles}."""
    rows = {}
    for name, some in times.items():
        seconds, cpu = zip(*some)
        ratios = [theirs[0] / ours[0] for theirs, ours in zip(some, times[OURS])]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[name] = {"seconds": statistics.median(seconds), "CPU seconds": statistics.median(cpu)}
        rows[name] |= {"ratio": ratio, "ratio from": low, "ratio to": high, "all seconds": seconds}
    return rows


def best_rate(setting: Setting) -> float:
    """FLOP/s of a matrix product of this device, dtype and number of threads, at its best."""
    n = 8192 if setting.device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=setting.device, dtype=getattr(torch, setting.config.dtype)) for _ in range(2))
    times = take_turns({OURS: lambda _: a @ b}, lambda _: None, 40)
    return 2 * n**3 / min(seconds for seconds, _ in times[OURS])


def parts(setting: Setting, name: str) -> dict[str, float]:
    """Seconds of one training step by kind of operation."""
    step, rows = trainer(setting, name), setting.rows[: setting.config.batch_size]
    step(rows)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[getattr(activity, setting.device.type.upper())]) as profile:
        step(rows)
    of = {operation: part for part, operations in PARTS.items() for operation in operations}
    seconds = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profile.key_averages():
        spent = event.self_device_time_total if setting.device.type == "cuda" else event.self_cpu_time_total
        seconds[of.get(event.key.rpartition("::")[2], "other")] += spent / 1e6
    return seconds


def peak_memory(setting: Setting) -> int:
    """The most bytes this process has held, once it has run one thing alone: `--only NAME --what training`, say."""
    what, name = setting.config.what[0], setting.config.only
    if what == "training":
        step = trainer(setting, name)
        for turn in range(3):
            step(batch_of(setting, turn))
    else:
        decoder(setting, name)(questions(setting))
    if setting.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text()  # Linux; getrusage's figure begins at that of the parent process
    return int(lines.partition("VmHWM:")[2].split()[0]) * 1024


def batch_of(setting: Setting, turn: int) -> Rows:
    rng = random.Random(f"{setting.config.seed} {turn}")
    return rng.sample(setting.rows, setting.config.batch_size)


def questions(setting: Setting) -> list[list[int]]:
    return [row[0].input_ids for row in setting.rows[: setting.config.questions]]


def sweep(setting: Setting, names: list[str]) -> list[dict]:
    """Seconds of a step over input length at batch 4, and over batch at input length 64; 32 target tokens."""
    steps, found = {name: trainer(setting, name) for name in names}, []
    cases = [(length, 4) for length in (32, 64, 128, 256, 512)] + [(64, batch) for batch in (1, 2, 8, 16, 32)]
    for length, batch in cases:
        rng, top = random.Random(0), setting.shape.config.vocab_size - 1
        ids = [[rng.randint(3, top) for _ in range(length + 32)] for _ in range(batch)]
        rows = [[Sequence(row[:length], row[length:], task) for task in (LABEL, RATIONALE)] for row in ids]
        for name, row in summary(take_turns(steps, lambda _, rows=rows: rows, 3)).items():
            found.append(dict(implementation=name, length=length, batch=batch, seconds=row["seconds"]))
            print(f"| {name} | {length} | {batch} | {row['seconds']:.3f} |", flush=True)
    return found


# ---- The report -----------------------------------------------------------------------------------------------------


def compare(setting: Setting, argv: list[str]) -> int:
    config, installed = setting.config, importlib.util.find_spec
    here, peers = machine(setting), [p for p in config.peers if installed(p.partition("-")[0]) is not None]
    report = dict(here, command=" ".join(["python -m dss.bench", *argv]))
    print(", ".join(f"{key} {value}" for key, value in report.items()))
    rate = report["matrix product, FLOP/s"] = best_rate(setting)
    print(f"matrix product: {rate / 1e9:.0f} GFLOP/s\n", flush=True)
    good = True

    if "training" in config.what:
        names = [OURS, *(name for name in peers if name != CT2)]
        bounds = dict(loss=1e-5, gradient=1e-4) if config.dtype == "float32" else dict(loss=1e-2, gradient=1e-1)
        for name in names[1:]:
            found = report[f"{name}, differences"] = check_training(setting, name)
            good &= all(found[key] <= bounds[key] for key in bounds)
            print(f"{name} differs from ours by {found['loss']:.0e} (loss), {found['gradient']:.0e} (gradient)")
        batches = [batch_of(setting, turn) for turn in range(config.repeats + 1)]
        times = take_turns({name: trainer(setting, name) for name in names}, batches.__getitem__, config.repeats)
        found = report["training"] = summary(times)
        tokens = statistics.mean(sum(len(s[side]) for row in rows for s in row for side in (0, 1)) for rows in batches)
        work = statistics.mean(products(setting.shape, rows) for rows in batches)
        print(f"\nA training step of {config.batch_size} rows, {tokens:,.0f} real tokens, {work / 1e9:,.0f} GFLOP\n")
        for row in found.values():
            row["tokens/s"], row["of the machine"] = tokens / row["seconds"], work / row["seconds"] / rate
        show(found, argv, "training", ["tokens/s", "of the machine"])
        of = report["parts"] = {name: parts(setting, name) for name in names}
        print("\n| seconds of one step | " + " | ".join(of) + " |\n|---|" + "---|" * len(of))
        for part in of[OURS]:
            print(f"| {part} | " + " | ".join(f"{seconds[part]:.3f}" for seconds in of.values()) + " |")

    if "decoding" in config.what:
        inputs, names = questions(setting), [OURS, *peers]
        functions = {name: decoder(setting, name) for name in names}
        outputs = {name: function(inputs) for name, function in functions.items()}
        functions["ours, encoder alone"] = encoder(setting)
        found = report["decoding"] = summary(take_turns(functions, lambda _: inputs, config.repeats))
        for name, row in found.items():
            row["same outputs"] = None
            if name in outputs:
                row["same outputs"] = statistics.mean(a == b for a, b in zip(outputs[name], outputs[OURS]))
                # Of two like logits either may win; and CTranslate2 has approximations of its own.
                good &= row["same outputs"] >= 0.98 or name == CT2 or config.dtype != "float32"
        print(f"\nDecoding {len(inputs)} inputs, {config.decode_batch} at a time, {config.max_new_tokens} tokens\n")
        show(found, argv, "decoding", ["same outputs"])

    if config.plot:
        print("\n| step of | input length | batch | seconds |\n|---|---|---|---|")
        report["sweep"] = sweep(setting, [OURS, *(name for name in peers if name != CT2)])
        draw(report["sweep"], config.plot)
    if config.json:
        write_json(Path(config.json), report)
    return 0 if good else arguments.fail("dss.bench", 1, "a peer computes something else than ours")


def show(found: dict[str, dict], argv: list[str], what: str, columns: list[str]) -> None:
    """Print a table, once the peak memory of each implementation has been measured, in a process of its own."""
    heads = ["implementation", "seconds", "CPU s", "x ours (quartiles)", *columns, "peak MiB"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for name, row in found.items():
        row["peak bytes"] = peak_of(name, what, argv) if name in (OURS, EAGER, SDPA, CT2) else None
        ratio = f"{row['ratio']:.2f} ({row['ratio from']:.2f} to {row['ratio to']:.2f})"
        cells = [name, f"{row['seconds']:.3f}", f"{row['CPU seconds']:.3f}", ratio]
        cells += ["" if row[c] is None else f"{row[c]:,.0f}" if c == "tokens/s" else f"{row[c]:.0%}" for c in columns]
        cells.append("" if row["peak bytes"] is None else f"{row['peak bytes'] / 2**20:,.0f}")
        print("| " + " | ".join(cells) + " |", flush=True)


def peak_of(name: str, what: str, argv: list[str]) -> int | None:
    """`peak_memory` of a process of its own; None if that failed."""
    command = [sys.executable, "-m", "dss.bench", *argv, "--what", what, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def machine(setting: Setting) -> dict:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().partition("model name")[2].splitlines()[0].strip("\t: ")
    if setting.device.type == "cuda":
        name = torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "ctranslate2"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return (
        dict(machine=name, threads=torch.get_num_threads(), dtype=setting.config.dtype, date=time.strftime("%Y-%m-%d"))
        | versions
    )


def draw(found: list[dict], file: str) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("dss.bench: no plot, for matplotlib is not installed", file=sys.stderr)
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, x, fixed, value in zip(axes, ("length", "batch"), ("batch", "length"), (4, 64)):
        for name in dict.fromkeys(row["implementation"] for row in found):
            points = [(r[x], r["seconds"]) for r in found if (r["implementation"], r[fixed]) == (name, value)]
            axis.plot(*zip(*sorted(points)), marker="o", label=name)
        label = "input length, tokens (4 rows)" if x == "length" else "rows (64 tokens)"
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds of a training step")
        axis.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    print(f"wrote {file}")


if __name__ == "__main__":
    arguments.run("dss.bench", main)
