"""Checkpoints in every public layout load alike; damaged or foreign ones are refused by name."""

import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import LAYOUTS, read_weights, relayout, same
from hypothesis import given
from hypothesis import strategies as st
from running import ROOT, V1_1, student

from dss.weights import load_t5, read_safetensors, resolve_checkpoint, save_t5, write_safetensors

WEIGHTS = "model.safetensors"
Q = "encoder.block.0.layer.0.SelfAttention.q.weight"
COPY = "decoder.embed_tokens.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 31\n"


@pytest.fixture(scope="module")
def model():
    return student(**V1_1).eval()


@pytest.fixture
def saved(model, tmp_path):
    """A directory with the model."""
    save_t5(model, tmp_path / "student")
    return tmp_path / "student"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_alike(saved, model, layout):
    """Beside other files, too: an old adapter, a Trainer's folder; and with whole numbers."""
    (saved / "adapter_config.json").write_text("{}")
    (saved / "checkpoint-5").mkdir()
    (saved / "checkpoint-5" / "config.json").write_text("{}")
    change_config(initializer_factor=1, dropout_rate=0)(saved)
    relayout(saved, layout)
    assert same(model, saved)


def test_transformers_own_shards_load(saved, model, transformers, tmp_path):
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(saved)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert same(model, tmp_path / "shards")


names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@given(st.dictionaries(names, st.lists(st.integers(1, 4), max_size=3), max_size=5))
def test_safetensors_files_are_as_the_library_reads_them(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    write_safetensors(path, tensors)
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    for read in (read_safetensors, library.load_file):
        back = read(path)
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_half_precision_checkpoints_load_in_fp32(saved, model):
    tensors = {name: tensor.bfloat16() for name, tensor in read_weights(saved).items()}
    in_bin(tensors)(saved)
    loaded = load_t5(saved)
    assert all(p.dtype == torch.float32 for p in loaded.parameters()) and not loaded.training
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.bfloat16().float())


def test_loading_does_not_import_pytorch_s_compiler(saved):
    """Which takes two seconds, and is not needed to answer questions."""
    code = f"import dss.weights as w, sys; w.load_t5({str(saved)!r}); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "torch" in loaded.split() and "torch._dynamo" not in loaded.split()


def test_loading_leaves_the_file_alone(saved):
    """Tensors are views of a mapped file; training in place on them would write to it."""
    before = (saved / WEIGHTS).read_bytes()
    with torch.no_grad():
        for parameter in load_t5(saved).parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert (saved / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    "name", ["{saved}/none", "../no-such-weights", "a/b/c", "bad\0id", "{saved}/config.json"]
)
def test_what_is_neither_a_directory_nor_a_hub_id_is_not_looked_for(saved, name):
    with pytest.raises(FileNotFoundError, match="no such directory of weights"):
        resolve_checkpoint(name.format(saved=saved))


# ---- Ways to spoil a directory: each is a function of the directory ----------------------------


def write(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def change_config(**changes):
    def change(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return change


def change_weights(edit):
    """edit(tensors) changes them in place."""

    def change(directory):
        tensors = read_weights(directory)
        edit(tensors)
        write_safetensors(directory / WEIGHTS, tensors)

    return change


def in_bin(content):
    def change(directory):
        (directory / WEIGHTS).unlink()
        torch.save(content, directory / "pytorch_model.bin")

    return change


def flipped_bit_in_bin(directory):
    in_bin(read_weights(directory))(directory)
    path = directory / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add_prefix(tensors):
    for name in list(tensors):
        tensors["model." + name] = tensors.pop(name)


def quantized(directory):
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content.replace(b'"F32"', b'"U8" ', 1))


def adapter(directory):
    (directory / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (directory / "config.json").unlink()


def one_folder_up(directory):
    (directory / "checkpoint-9").mkdir()
    (directory / "config.json").rename(directory / "checkpoint-9" / "config.json")


def without_index(directory):
    relayout(directory, "model.safetensors in shards")
    (directory / "model.safetensors.index.json").unlink()


def index_of(shard):
    def change(directory):
        (directory / WEIGHTS).unlink()
        index = {"weight_map": {"shared.weight": shard}}
        (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return change


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: (d / "config.json").unlink(), "config.json: missing"),
        (write("config.json", b"{"), "config.json: not JSON"),
        (change_config(model_type="umt5"), "model_type is 'umt5'"),
        (change_config(feed_forward_proj="gated-silu"), "is 'gated-silu'"),
        (change_config(d_ff="64"), "config.json: d_ff is .64."),
        (change_config(vocab_size=10**9), "shared.weight is .*, but config.json makes"),
        (change_config(num_layers=3), "lack encoder.block.2."),
        (change_config(num_layers=1), "tensors have no place in this T5, such as encoder.block.1"),
        (change_weights(lambda t: t.update(x=torch.zeros(1))), "1 tensors have no place.* x$"),
        (change_weights(lambda t: t.pop("shared.weight")), "lack shared.weight$"),
        (change_weights(lambda t: t[Q].view(-1)[3].fill_(float("nan"))), f"{Q} holds a number"),
        (change_weights(lambda t: t.update({COPY: t["shared.weight"] + 1})), "is not shared.wei"),
        (change_weights(add_prefix), "; model.shared.weight is there"),
        (quantized, "is U8; quantized weights are not read, F64, F32"),
        (lambda d: os.truncate(d / WEIGHTS, 30_000), "model.safetensors: cannot be read"),
        (write(WEIGHTS, POINTER), "model.safetensors: .* git-lfs pointer"),
        (in_bin({"model": {Q: torch.ones(1)}}), "pytorch_model.bin: cannot be read"),
        (in_bin({Q: torch.ones(1, dtype=torch.int8)}), f"{Q} is torch.int8; quantized weights"),
        (in_bin({"shared.weight": Evil()}), "it holds more than a state_dict"),
        (flipped_bit_in_bin, "pytorch_model.bin: cannot be read: it is damaged"),
        (index_of("../../outside.bin"), "index.json: not an index of files of weights beside it"),
        (index_of(3), "index.json: not an index"),
        (adapter, "this is an adapter: merge it"),
        (one_folder_up, "did you mean .*checkpoint-9"),
        (without_index, "model-00001-of-00002.safetensors is there, but"),
    ],
)
def test_what_is_no_t5_is_refused_by_name(saved, monkeypatch, change, words):
    change(saved)
    monkeypatch.chdir(saved)
    with pytest.raises((ValueError, OSError), match=words) as error:
        load_t5(saved)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)
    assert "weights_only" not in str(error.value), "torch's advice to load pickles"
    assert not (saved / "pwned").exists(), "no pickle runs code"
