"""Spoil a checkpoint's files in every way, seeded, and see that what is spoiled is refused or means the same to others.

    for first in $(seq 0 500 3000); do python tests/mutation.py 500 $first || echo failed; done      the long run

The judge of what is accepted is transformers: the same logits, the same token ids, from the same directory. Of a
spiece.model that transformers cannot convert, SentencePiece itself is the judge; a state ends in its digest.
"""

import faulthandler
import json
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


def relayout(directory, layout):
    """Rewrite the weights of a directory in another public layout."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    # old checkpoints hold copies, and an unused table
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 3)
    path.unlink()
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    if layout == "pytorch_model.bin":
        torch.save(tensors, directory / layout)
    elif layout == "legacy pytorch_model.bin":  # as saved before 2020, not a zip file
        torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        write = write_safetensors if "safetensors" in layout else lambda path, half: torch.save(half, path)
        stem, end = layout.removesuffix(" in shards").rsplit(".", 1)
        names = [f"{stem}-0000{k}-of-00002.{end}" for k in (1, 2)]
        for name, half in zip(names, halves):
            write(directory / name, half)
        index = {"metadata": {}, "weight_map": {key: name for name, half in zip(names, halves) for key in half}}
        (directory / f"{stem}.{end}.index.json").write_text(json.dumps(index))


def make_layouts(root):
    """A directory for each layout, with config, weights, tokenizer, rows and a run's state."""
    torch.manual_seed(0)
    for layout in ("tied", "untied", "model.safetensors in shards", "pytorch_model.bin", "legacy pytorch_model.bin"):
        out = root / layout
        shape = {} if layout == "tied" else dict(feed_forward_proj="gated-gelu", scale_decoder_outputs=False)
        save_t5(T5(T5Config(**SHAPE, **shape, tie_word_embeddings=layout == "tied")), out)
        tokenizer.train(["How many are fruit?", "How many are tools?"] * 5, out / "spiece.model", 60).save(out)
        names = dict(extra_ids=100, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")  # all that we read
        (out / "tokenizer_config.json").write_text(json.dumps(names))
        (out / "rows.jsonl").write_text('{"input": "a", "rationale": ["b", "c"], "teacher": {"n": 1}}\n' * 3)
        save_state(out / "state.pt", *make_run(), {"step": 3})
        if "tied" not in layout:
            relayout(out, layout)


OPTIMIZERS = {"adamw": lambda p: torch.optim.AdamW(p, fused=True), "adafactor": torch.optim.Adafactor}


def make_run(optimizer="adamw", **shape):
    torch.manual_seed(1)
    model = T5(T5Config(**SHAPE | shape))
    run = model, OPTIMIZERS[optimizer](model.parameters())
    train_a_step(*run)
    return run


def train_a_step(model, optimizer):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


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

    collect(value, not {"model_type", "extra_ids", "weight_map"} & value.keys())  # else all of it is read
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
    bad = [one.to_sparse(), one.int(), one.double(), one * float("nan"), one.half(), one + 1j, one[..., :0], one[None]]
    bad += [[1.0], "x", None, {"a": one}, one.to("meta"), 3, torch.zeros(1).expand(10**6, 10**6)]
    bad += [one[:1].expand_as(one)]
    tensors[draw.choice([key, key, "x", 7])] = draw.choice(bad)
    whole = draw.choice([tensors, tensors, tensors, tensors, [tensors], {"model": tensors}, one, None, {}])
    torch.save(whole, path, _use_new_zipfile_serialization=draw.random() < 0.7)
    if draw.random() < 0.3 and zipfile.is_zipfile(path):
        compress(path)


def compress(path):
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
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
        spoiled = spoil(content, draw)
        path.write_bytes(spoiled if spoiled != content else content[:-1])
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


def main(count, first=0):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    counts = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        make_layouts(Path(scratch, "layouts"))
        for number in range(first, first + count):
            faulthandler.dump_traceback_later(60, exit=True)  # a hang
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            path = mutate(Path(scratch, "layouts"), number, Path(scratch, str(number)))
            verdict = judge(path.parent, path)
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 400 << 10:  # KiB
                verdict = "memory"
            counts[verdict.split(":")[0]] += 1
            if verdict not in ("refused", "alike"):
                print(f"{number} {path.name}: {verdict}", flush=True)
            shutil.rmtree(path.parent)
    print(first, dict(counts))
    return counts.keys() - {"refused", "alike"}


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
