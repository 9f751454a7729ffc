"""Whole training steps and decoding, beside the peers that are installed.

    python -m dss.bench                                        the embedded task and its tiny student
    python -m dss.bench --data cqa_train.jsonl --size t5-v1_1-small --json b.json --plot b.png

Training is compared with the paper's released recipe on transformers: two padded forward passes, predict and explain,
and one backward pass of their mean loss. All have the same weights, rows, threads and AdamW. Each ratio compares two
times of the same turn, because a busy machine slows all implementations. "Of the machine" is the share of the best rate
that a matrix product reached in the same run. dss/README.md has the results.
"""

import importlib.metadata
import json
import multiprocessing
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from data import cli
from data.cli import require
from data.files import write_json
from dss.batch import LABEL, RATIONALE, Sequence, count_targets, count_tokens, pack, sequences
from dss.config import SIZES, TrainConfig
from dss.generate import generate
from dss.loss import distillation_loss
from dss.rows import load_rows, single_rationales
from dss.run.start import choose_device, choose_threads, make_model, make_tokenizer
from dss.weights import checkpoint_name, load_t5, save_t5

OURS, EAGER, SDPA, CT2 = "ours", "transformers-eager", "transformers-sdpa", "ctranslate2"
AT_A_TIME, NEW_TOKENS = 64, 16  # inputs decoded together, tokens decoded for each
PARTS = {  # of a step, by the names that the profiler has for operations; what is none of these is "other"
    "matrix products": "mm|linear|attention",
    "dropout": "bernoulli|dropout|random",
    "copies": "copy|cat$|index|fill|zero",
    "optimiser": "adamw|foreach|norm",
}
Rows = list[list[Sequence]]  # each row's two sequences, LABEL and RATIONALE


@dataclass(frozen=True)
class BenchConfig:
    """Time whole training steps and decoding, ours beside transformers and CTranslate2 where they are installed."""

    data: tuple[str, ...] = ()  # rows with rationales, JSONL files; default: the embedded task
    weights: str = ""  # public T5 weights, a directory or a hub id; default: random weights
    size: Literal[tuple(SIZES)] = "tiny"  # shape of a student with random weights
    batch_size: int = 16  # rows of a training step
    questions: int = 256  # inputs to decode
    what: tuple[Literal["training", "decoding"], ...] = ("training", "decoding")  # which of the two
    repeats: int = 7  # timed turns, after one that warms up
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    threads: int = 0  # CPU threads; 0: as train.py chooses
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast, for PyTorch's implementations
    json: str = ""  # file for every figure
    plot: str = ""  # PNG file: time of a step over input length and over batch, which takes minutes more

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that makes no sense."""
        for name, least in dict(batch_size=1, questions=1, repeats=2).items():
            require(getattr(self, name) >= least, name, f"at least {least}", self)
        for name in ("json", "plot"):
            require(Path(getattr(self, name)).parent.is_dir(), name, "a file in a directory that exists", self)
        require(not self.plot or find_spec("matplotlib"), "plot", "left out where matplotlib is not installed", self)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a peer computes something else than ours, 2 the arguments or files are wrong."""
    config = cli.parse(argv, BenchConfig, prog="dss.bench")
    try:
        with tempfile.TemporaryDirectory() as directory:
            return compare(Setting(config, Path(directory)), sys.argv[1:] if argv is None else argv)
    except (OSError, ValueError) as error:
        return cli.fail("dss.bench", 2, error)


class Setting:
    """What all implementations are given: rows, a directory with the model as transformers loads it, device, dtype."""

    def __init__(self, config: BenchConfig, directory: Path):
        """Raises OSError or ValueError, in one line, for what the user can put right."""
        shared = {name: getattr(config, name) for name in ("data", "weights", "size", "device", "dtype", "threads")}
        train = TrainConfig(**shared)
        train.check()
        rows = load_rows(train)
        tokenizer = make_tokenizer(train, rows, Path(train.out))
        model = make_model(train, tokenizer)
        choose_threads(config.threads, model)
        having = [single_rationales(row)[0] for row in rows.train if row.rationale is not None]
        if len(having) < max(config.batch_size, config.questions):
            raise ValueError(f"{len(having)} rows have a rationale: more --data, or less --batch-size and --questions")
        save_t5(model, directory)
        self.config, self.directory, self.threads = config, directory, torch.get_num_threads()
        self.rows: Rows = [sequences(row, "dss", tokenizer) for row in having]
        # Longest first, so that no implementation pads more than necessary.
        self.inputs = sorted((row[0].input_ids for row in self.rows[: config.questions]), key=len, reverse=True)
        self.device = choose_device(config.device, config.dtype)

    def load(self, name):
        """The model of a PyTorch implementation, ours or transformers', always the same weights."""
        if name == OURS:
            return load_t5(self.directory).to(self.device)
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        load = transformers.AutoModelForSeq2SeqLM.from_pretrained
        return load(self.directory, attn_implementation=name.removeprefix("transformers-")).to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def batch(self, turn):
        return random.Random(turn).sample(self.rows, self.config.batch_size)


def backward(setting: Setting, model: torch.nn.Module, loss_of: Callable, rows: Rows) -> torch.Tensor:
    with setting.autocast():
        loss = loss_of(model, rows)
    loss.backward()
    return loss.detach()


def our_loss(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """L / 2, which is the released recipe's loss with alpha 0.5 and ours with lambda 1."""
    flat = [sequence for row in rows for sequence in row]
    batch = pack(flat, model.embedding.weight.device, model.config.decoder_start_token_id)
    return distillation_loss(model, batch, *count_targets(flat), 1.0)[0] / 2


def recipe_loss(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """alpha L_label + (1 - alpha) L_rationale, as the released trainer computes it: a padded forward pass for each."""
    losses = []
    for some in zip(*rows):  # the LABEL sequences, then the RATIONALE sequences
        ids, labels = padded([s.input_ids for s in some], 0), padded([s.target_ids for s in some], -100)
        batch = dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
        losses.append(model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss)
    return sum(losses) / 2


def padded(lists, value):
    return pad_sequence(list(map(torch.tensor, lists)), batch_first=True, padding_value=value)


def trainer(setting: Setting, name: str) -> Callable[[Rows], None]:
    """A function that takes one optimiser step on some rows."""
    model, loss_of = setting.load(name).train(), our_loss if name == OURS else recipe_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step(rows):
        backward(setting, model, loss_of, rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def check_training(setting: Setting, name: str) -> dict[str, float]:
    """Relative differences of a peer's loss and gradient from ours, without dropout, on one step's rows."""
    ours, theirs = setting.load(OURS), setting.load(name).eval()
    want, got = (backward(setting, *of, setting.batch(0)) for of in ((ours, our_loss), (theirs, recipe_loss)))
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    pairs = [(parameter.grad, gradients[checkpoint_name(key, ours)]) for key, parameter in ours.named_parameters()]
    difference = sum((a - b).double().square().sum().item() for a, b in pairs) ** 0.5
    size = sum(b.double().square().sum().item() for _, b in pairs) ** 0.5
    return dict(loss=abs(got / want - 1).item(), gradient=difference / size)


def parts(setting: Setting, step: Callable) -> dict[str, float]:
    """Seconds of one training step by kind of operation."""
    kind = "device" if setting.device.type == "cuda" else "cpu"
    step(setting.batch(0))
    with torch.profiler.profile() as profile:
        step(setting.batch(0))
    seconds = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profile.key_averages():
        part = next((part for part in PARTS if re.search(PARTS[part], event.key)), "other")
        seconds[part] += getattr(event, f"self_{kind}_time_total") / 1e6
    return seconds


def decoder(setting: Setting, name: str, tokens: int = NEW_TOKENS) -> Callable[[list], list]:
    """A function from lists of ids, longest first, to lists of ids."""
    if name == CT2:
        return ctranslate2_decoder(setting)
    model = setting.load(name).eval()

    def decode(inputs):
        with setting.autocast():
            if name == OURS:
                return generate(model, inputs, tokens, AT_A_TIME)
            outputs = []
            for start in range(0, len(inputs), AT_A_TIME):
                ids = padded(inputs[start : start + AT_A_TIME], 0).to(setting.device)
                greedy = dict(max_new_tokens=tokens, do_sample=False, num_beams=1)
                outputs += model.generate(ids, attention_mask=(ids != 0).long(), **greedy)[:, 1:].tolist()
            return [row[: row.index(1)] if 1 in row else row for row in outputs]

    return decode


def ctranslate2_decoder(setting):
    import ctranslate2
    import ctranslate2.converters

    out, device = setting.directory / "ctranslate2", setting.device.type
    ctranslate2.converters.TransformersConverter(str(setting.directory)).convert(str(out), force=True)
    path = out / "shared_vocabulary.json"  # without a tokenizer the converter repeats names
    names = [str(i) if i > 2 else name for i, name in enumerate(json.loads(path.read_text("utf-8")))]
    write_json(path, names)
    compute = "bfloat16" if (device, setting.config.dtype) == ("cuda", "bfloat16") else "float32"
    translator = ctranslate2.Translator(str(out), device, compute_type=compute, intra_threads=setting.threads)
    ids = {name: i for i, name in enumerate(names)}

    def decode(inputs):
        texts = [[names[i] for i in row] for row in inputs]
        options = dict(max_batch_size=AT_A_TIME, beam_size=1, max_decoding_length=NEW_TOKENS)
        return [[ids[name] for name in r.hypotheses[0]] for r in translator.translate_batch(texts, **options)]

    return decode


def take_turns(functions: dict[str, Callable], given: Callable[[int], object], repeats: int) -> dict[str, dict]:
    """{name: seconds, and their ratio to ours, turn by turn: medians and quartiles} of functions of given(turn)."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        inputs = given(turn)
        for name, function in functions.items():
            begin = time.perf_counter()
            function(inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    rows = {}
    for name, (_, *seconds) in times.items():  # the first turn warms up
        ratios = [theirs / ours for theirs, ours in zip(seconds, times[OURS][1:])]
        low, middle, high = statistics.quantiles(ratios, method="inclusive")
        rows[name] = {"seconds": statistics.median(seconds), "least": min(seconds)}
        rows[name] |= {"x ours, quartile 1": low, "x ours": middle, "x ours, quartile 3": high}
    return rows


def best_rate(setting: Setting) -> float:
    """FLOP/s of a matrix product of this device, dtype and number of threads, at its best."""
    n = 8192 if setting.device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=setting.device, dtype=getattr(torch, setting.config.dtype)) for _ in range(2))
    best = take_turns({OURS: lambda _: a @ b}, lambda _: None, 2)[OURS]["least"]
    if best < 0.2:  # a CPU that has no bfloat16 takes seconds for each
        best = take_turns({OURS: lambda _: a @ b}, lambda _: None, 40)[OURS]["least"]
    return 2 * n**3 / best


def peak_memory(setting: Setting, what: str, name: str) -> int:
    """The most bytes that a process of its own holds, which trains or decodes with one implementation alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run_alone, setting, what, name).result()


def run_alone(setting, what, name):
    torch.set_num_threads(setting.threads)
    run = (trainer if what == "training" else decoder)(setting, name)
    for turn in range(3):
        run(setting.batch(turn) if what == "training" else setting.inputs)
    if setting.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text()  # Linux; getrusage's figure begins at that of the parent process
    return int(lines.partition("VmHWM:")[2].split()[0]) * 1024


def compare(setting: Setting, argv: list[str]) -> int:
    config, report, good = setting.config, machine(setting, argv), True
    names = [OURS, *([EAGER, SDPA] if "transformers" in report else [])]
    rate = report["matrix product, FLOP/s"] = best_rate(setting)
    print("\n".join(f"{key}: {value}" for key, value in report.items()), flush=True)

    if "training" in config.what:
        bounds = dict(loss=1e-5, gradient=1e-4) if config.dtype == "float32" else dict(loss=1e-2, gradient=1e-1)
        for name in names[1:]:
            found = report[f"{name}, differences"] = check_training(setting, name)
            good &= all(found[key] <= bounds[key] for key in bounds)
            print(f"{name} differs from ours by {found['loss']:.0e} (loss), {found['gradient']:.0e} (gradient)")
        steps = {name: trainer(setting, name) for name in names}
        found = report["training"] = take_turns(steps, setting.batch, config.repeats)
        tokens = statistics.mean(sum(map(count_tokens, setting.batch(turn))) for turn in range(1, config.repeats + 1))
        with FlopCounterMode(display=False) as counter:
            our_loss(load_t5(setting.directory), setting.batch(0)).backward()  # on the CPU, whose operations it knows
        work = counter.get_total_flops() / sum(map(count_tokens, setting.batch(0)))
        for name, row in found.items():
            row |= {"tokens/s": tokens / row["seconds"], "of the machine": work * tokens / row["seconds"] / rate}
            row |= {f"{part}, s": seconds for part, seconds in parts(setting, steps[name]).items()}
            row["peak MiB"] = peak_memory(setting, "training", name) / 2**20
        show(found, f"A training step of {config.batch_size} rows, {tokens:,.0f} real tokens")

    if "decoding" in config.what:
        functions = {name: decoder(setting, name) for name in [*names, *([CT2] if CT2 in report else [])]}
        outputs = {name: function(setting.inputs) for name, function in functions.items()}
        functions["ours, one token"] = decoder(setting, OURS, 1)  # nearly all of it is the encoder
        found = report["decoding"] = take_turns(functions, lambda _: setting.inputs, config.repeats)
        for name, output in outputs.items():
            same = found[name]["same outputs"] = statistics.mean(map(list.__eq__, output, outputs[OURS]))
            found[name]["peak MiB"] = peak_memory(setting, "decoding", name) / 2**20
            good &= same >= 0.98 or config.dtype != "float32"  # of two like logits either may win
        show(found, f"Decoding {config.questions} inputs, {AT_A_TIME} at a time, {NEW_TOKENS} tokens")

    if config.plot:
        report["plot"] = plot(setting, names, config.plot)
    if config.json:
        write_json(Path(config.json), report)
    return 0 if good else cli.fail("dss.bench", 1, "a peer computes something else than ours")


def show(found, title):
    """Print a table with a line for each figure."""
    print(f"\n{title}\n\n| | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for figure in found[OURS]:
        digits = ",.0f" if figure in ("tokens/s", "peak MiB") else ".3f"
        cells = [format(row[figure], digits) if figure in row else "" for row in found.values()]
        print(f"| {figure} | {' | '.join(cells)} |", flush=True)


def machine(setting, argv):
    cpus = Path("/proc/cpuinfo")
    name = cpus.read_text().partition("model name\t: ")[2].partition("\n")[0] if cpus.exists() else platform.machine()
    name = torch.cuda.get_device_name() if setting.device.type == "cuda" else name
    here = dict(command=" ".join(["python -m dss.bench", *argv]), machine=name, date=time.strftime("%Y-%m-%d"))
    installed = {d.name: d.version for d in importlib.metadata.distributions() if d.name in ("transformers", CT2)}
    return here | dict(threads=setting.threads, dtype=setting.config.dtype, torch=torch.__version__) | installed


def plot(setting, names, file):
    """Seconds of a step over input length (4 rows) and over rows (64 tokens), 32 target tokens: rows, and a picture."""
    from matplotlib.figure import Figure

    steps = {name: trainer(setting, name) for name in names}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    lengths = [dict(length=n, rows=4) for n in (32, 64, 128, 256, 512)]
    batches = [dict(length=64, rows=n) for n in (1, 2, 4, 8, 16, 32)]
    cases = ("length", "input length, tokens (4 rows)", lengths), ("rows", "rows (64 tokens)", batches)
    for axis, (x, label, points) in zip(figure.subplots(1, 2), cases):
        for point in points:
            some = [Sequence([5] * point["length"], [5] * 32, task) for task in (LABEL, RATIONALE)]
            times = take_turns(steps, lambda _, rows=[some] * point["rows"]: rows, 3)
            point |= {name: times[name]["seconds"] for name in names}
        for name in names:
            axis.loglog([p[x] for p in points], [p[name] for p in points], marker="o", label=name)
        axis.set_xticks([], minor=True)
        axis.set_xticks([p[x] for p in points], [p[x] for p in points])
        axis.set(xlabel=label, ylabel="seconds of a training step")
        axis.legend()
    figure.savefig(file, dpi=120)
    return lengths + batches


if __name__ == "__main__":
    cli.run("dss.bench", main)
