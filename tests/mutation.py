"""Spoil a checkpoint's files in every way, seeded, and see that what is spoiled is refused or means the same to others.

    python tests/mutation.py 3000 [FIRST]      the long run: each file in a process that is watched, a table at the end

The judge of what is accepted is transformers: the same logits, the same token ids, from the same directory. Of a
spiece.model that transformers cannot convert, SentencePiece itself is the judge; a state ends in its digest.
"""

import json
import multiprocessing
import random
import resource
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokenizer
from data.jsonl import read_jsonl
from dss.config import T5Config
from dss.model import T5
from dss.run.state import load_state, save_state
from dss.weights import load_t5, read_safetensors, save_t5, write_safetensors

SHAPE = dict(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2)
HOSTILE = [None, True, 0, -1, 1, 3, 1.5, 10**6, 10**9, 10**30, float("nan"), float("inf"), "", "x", "relu", [], {}]
HOSTILE += [[-1, 4], [0], [2**40, 2**40], [0.5], ["F32"], {"a": 1}, "I64", "BF16", "gated-silu", "../../x"]
READ = {*T5Config.__dataclass_fields__, "dense_act_fn", "is_gated_act", "extra_ids", "weight_map"}
READ |= {"pad_token", "eos_token", "unk_token"}
TEXT = "How many are 3 apples? <extra_id_3> x</s>y"


def make_layouts(root):
    """A directory for each layout, with config, weights, tokenizer and rows."""
    torch.manual_seed(0)
    for name in ("safetensors", "shards", "bin", "legacy", "tied"):
        shape = {} if name == "tied" else dict(feed_forward_proj="gated-gelu", scale_decoder_outputs=False)
        save_t5(T5(T5Config(**SHAPE, **shape, tie_word_embeddings=name == "tied")), root / name)
        lines = [f"How many are {kind}?" for kind in ("fruit", "tools", "animals")] * 5
        tokenizer.train(lines, root / name / "spiece.model", 60).save(root / name)
        config = json.loads((root / name / "tokenizer_config.json").read_text())
        del config["tokenizer_class"]  # which we do not read
        (root / name / "tokenizer_config.json").write_text(json.dumps(config))
        (root / name / "rows.jsonl").write_text('{"input": "a", "rationale": ["b", "c"], "teacher": {"n": 1}}\n' * 3)
        path = root / name / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in read_safetensors(path).items()}
        if name in ("bin", "legacy"):
            torch.save(tensors, path.with_name("pytorch_model.bin"), _use_new_zipfile_serialization=name == "bin")
        if name == "shards":
            halves = {f"model-0000{k + 1}-of-00002.safetensors": dict(list(tensors.items())[k::2]) for k in (0, 1)}
            for file, half in halves.items():
                write_safetensors(path.with_name(file), half)
            index = {
                "metadata": {"total_size": 4},
                "weight_map": {key: f for f, half in halves.items() for key in half},
            }
            path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
        if name not in ("safetensors", "tied"):
            path.unlink()
        save_state(root / name / "state.pt", *make_run(), {"step": 3})


def make_run():
    torch.manual_seed(1)
    model = T5(T5Config(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


def spoil(content, draw):
    """The bytes of a file, changed in one place."""
    at = draw.choice([draw.randrange(len(content)), draw.randrange(min(len(content), 400)), max(0, len(content) - 30)])
    some, other = content[at : at + draw.choice([1, 2, 8, 100])], draw.randbytes(draw.choice([1, 8]))
    flipped = bytes([content[at] ^ 1 << draw.randrange(8)])
    middle = draw.choice([flipped, b"", some + some, other, other + some, bytes(len(some)), b"9" + some, b"-" + some])
    return draw.choice([content[:at] + middle + content[at + len(some) :]] * 5 + [content[:at], content + some])


def spoil_json(value, draw):
    """A JSON value with one value, of those that are read, replaced, taken out or doubled."""
    places = []

    def collect(node, known):
        for key in node if isinstance(node, dict) else range(len(node)):
            if known or key in READ:
                places.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key], True)

    collect(value, "model_type" not in value and "extra_ids" not in value)
    node, key = draw.choice(places)
    how = draw.randrange(8)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict) and "extra_ids" not in node:
        node[draw.choice(["x", *sorted(READ)])] = node[key]
    elif how == 2 and isinstance(node[key], int):
        node[key] += draw.choice([-1, 1, 8])
    elif how == 3:
        node[key] = json.loads("[" * 900 + "]" * 900)
    else:
        node[key] = draw.choice([*HOSTILE, draw.choice(places)[0]] if draw.random() < 0.1 else HOSTILE)
    try:
        return json.dumps(value).encode()
    except ValueError:  # a value within itself
        return b"[" * 5000


def spoil_tensors(path, draw):
    """A .bin that torch.save wrote, of something else than the tensors."""
    tensors = dict(torch.load(path, weights_only=True))
    key = draw.choice(sorted(tensors))
    one = tensors[key]
    bad = [one[:1].expand_as(one), one.to_sparse(), one.int(), one.double(), one * float("nan"), one.half(), one + 1j]
    bad += [one[..., :0], one.T if one.dim() == 2 else one[None], [1.0], "x", None, {"a": one}, one.to("meta"), 3]
    bad += [torch.zeros(1).expand(10**6, 10**6), torch.quantize_per_tensor(one, 0.1, 0, torch.qint8)]
    tensors[draw.choice([key, key, "x", 7])] = draw.choice(bad)
    whole = draw.choice([tensors, tensors, tensors, tensors, [tensors], {"model": tensors}, one, None, {}])
    torch.save(whole, path, _use_new_zipfile_serialization=draw.random() < 0.7)
    if draw.random() < 0.3 and zipfile.is_zipfile(path):
        entries = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in entries.items():
                file.writestr(name, content)


def mutate(root, number, directory):
    """Copy a layout to `directory` and spoil a file of it, all by `number`. Returns the path of the file."""
    draw = random.Random(number)
    shutil.copytree(root / draw.choice(sorted(p.name for p in root.iterdir())), directory)
    path = draw.choice(sorted(directory.iterdir()))
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.7:
        path.write_bytes(spoil_json(json.loads(content), draw))
    elif path.suffix == ".safetensors" and draw.random() < 0.6:
        (length,) = struct.unpack_from("<Q", content)
        header = spoil_json(json.loads(content[8 : 8 + length]), draw)
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    elif path.suffix == ".bin" and draw.random() < 0.6:
        spoil_tensors(path, draw)
    else:
        path.write_bytes(spoil(content, draw))
    return path


def judge(directory, path):
    """ "refused", "alike" or what is wrong: a traceback, or something accepted that transformers takes otherwise."""
    try:
        model, ours = load_t5(directory), tokenizer.T5Tokenizer(directory)
        rows = [vars(row) for row in read_jsonl(directory / "rows.jsonl")]
        if path.name == "state.pt":
            load_state(path, *make_run())
    except (OSError, ValueError) as problem:
        named = str(directory) in str(problem) or str(directory) in str(getattr(problem, "filename", ""))
        return "refused" if named and "\n" not in str(problem) else f"not one line that names the file: {problem}"
    except Exception:
        return "traceback: " + traceback.format_exc()
    try:
        return "alike" if alike(directory, path, model, ours, rows) else "accepted wrongly: it means something else"
    except Exception as problem:
        return f"accepted wrongly: {problem!r}"


def alike(directory, path, model, ours, rows):
    """Whether others read in a directory what we have read."""
    if path.name == "state.pt":
        return False  # it ends in a digest of all before
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
        return [row["input"] for row in rows] == [line["input"] for line in lines]
    import transformers
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        theirs, mine = load_file(path), read_safetensors(path)
        if theirs.keys() != mine.keys() or not all(torch.equal(theirs[n], mine[n]) for n in mine):
            return False
    if path.name in ("spiece.model", "tokenizer_config.json"):
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(directory)
        except Exception:
            if path.suffix == ".json":
                raise
            return len(sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("How many")) > 0
        return ours.encode(TEXT) == theirs(TEXT).input_ids
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids, start = torch.tensor([[5, 6, 7, 1]]), torch.tensor([[0, 9, 10]])
    with torch.no_grad():
        want = theirs(input_ids=ids, decoder_input_ids=start).logits[0]
        return torch.allclose(model.logits(ids.tolist(), start.tolist())[0], want, rtol=1e-3, atol=1e-3)


def work(root, numbers, results):
    """Judge one number after another, telling the parent; it kills this process if one takes too long."""
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for number in iter(numbers.get, None):
        with tempfile.TemporaryDirectory() as scratch:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            path = mutate(Path(root), number, Path(scratch) / "student")
            verdict = judge(path.parent, path)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            results.put((path.name, f"memory: {grown >> 10} MB" if grown > 400 << 10 else verdict))


def main(count, first=0):
    context, counts = multiprocessing.get_context("spawn"), Counter()
    with tempfile.TemporaryDirectory() as root:
        make_layouts(Path(root))
        worker = None
        for number in range(first, first + count):
            if worker is None:
                numbers, results = context.Queue(), context.Queue()
                worker = context.Process(target=work, args=(root, numbers, results), daemon=True)
                worker.start()
                patience = 120
            numbers.put(number)
            try:
                name, verdict = results.get(timeout=patience)
            except Exception:
                name, verdict = "?", "hang" if worker.is_alive() else f"crash: {worker.exitcode}"
                worker.kill()
                worker = None
            patience = 30
            counts[verdict.split(":")[0]] += 1
            if verdict not in ("refused", "alike"):
                print(f"{number} {name}: {verdict}", flush=True)
    print(dict(counts))
    return sum(counts.values()) - counts["refused"] - counts["alike"]


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) > 0)
