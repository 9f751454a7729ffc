"""Checkpoints in every public layout load alike; damaged or foreign ones are refused by name."""

import json
import os
import struct

import pytest
import torch
from checkpoints import LAYOUTS, read_weights, relayout
from hypothesis import given
from hypothesis import strategies as st
from running import V1_1, student

from dss.weights import load_t5, read_safetensors, resolve_checkpoint, save_t5, write_safetensors

INPUT, TARGET = [[5, 6, 7, 1]], [[0, 9, 10]]


@pytest.fixture(scope="module")
def model():
    return student(**V1_1).eval()


@pytest.fixture
def saved(model, tmp_path):
    """A directory with the model."""
    save_t5(model, tmp_path / "student")
    return tmp_path / "student"


def same(model, directory):
    return torch.equal(load_t5(directory).logits(INPUT, TARGET)[0], model.logits(INPUT, TARGET)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_alike(saved, model, layout):
    relayout(saved, layout)
    assert same(model, saved)


def test_transformers_own_shards_load(saved, model, transformers, tmp_path):
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(saved)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert same(model, tmp_path / "shards")


shapes = st.lists(st.integers(1, 4), max_size=3)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), shapes, max_size=5
    )
)
def test_safetensors_files_are_read_as_written_and_as_the_library_reads_them(
    tmp_path_factory, many
):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    tensors = {name: torch.randn(shape) for name, shape in many.items()}
    write_safetensors(path, tensors)
    back = read_safetensors(path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[n], tensors[n]) for n in tensors)
    try:
        from safetensors.torch import load_file
    except ImportError:
        return
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys() and all(
        torch.equal(theirs[n], tensors[n]) for n in tensors
    )


def test_half_precision_checkpoints_load_in_fp32(saved, model, tmp_path):
    pytest.importorskip(
        "safetensors", reason="safetensors, which writes half precision here, is not installed"
    )
    from safetensors.torch import save_file

    tensors = {name: tensor.bfloat16() for name, tensor in read_weights(saved).items()}
    save_file(tensors, saved / "model.safetensors")
    loaded = load_t5(saved)
    assert all(p.dtype == torch.float32 for p in loaded.parameters()) and not loaded.training
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.bfloat16().float())


def test_loading_leaves_the_file_alone(saved):
    """Tensors are views of a mapped file; training in place on them would write to it."""
    before = (saved / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in load_t5(saved).parameters():
            parameter.zero_()
    assert (saved / "model.safetensors").read_bytes() == before


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit_weights(directory, change):
    tensors = read_weights(directory)
    change(tensors)
    write_safetensors(directory / "model.safetensors", tensors)


WEIGHTS = "model.safetensors"
Q, COPY = "encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.embed_tokens.weight"


def make_bin(directory):
    relayout(directory, "pytorch_model.bin")
    return directory / "pytorch_model.bin"


def flip(path):
    """Change one bit of the weights, of which torch.load takes no notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "config.json").unlink(), "config.json: missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "model_type"),
        (lambda d: edit_config(d, model_type="umt5"), "model_type is 'umt5'"),
        (lambda d: edit_config(d, feed_forward_proj="gated-silu"), "is 'gated-silu'"),
        (lambda d: edit_config(d, dense_act_fn="silu"), "is 'silu', but feed_forward_proj is"),
        (lambda d: edit_config(d, d_model="wide"), "d_model is 'wide', not int"),
        (lambda d: edit_config(d, d_ff=True), "d_ff is True, not int"),
        (lambda d: edit_config(d, d_kv=-8), "config.json: cannot be read: .*negative dimension"),
        (lambda d: edit_config(d, eos_token_id=61), "eos_token_id is 61"),
        (lambda d: edit_config(d, vocab_size=10**9), "shared.weight is .*, but config.json makes"),
        (lambda d: edit_config(d, num_layers=3), "lack encoder.block.2."),
        (
            lambda d: edit_config(d, num_layers=1),
            "tensors have no place in this T5: encoder.block.1",
        ),
        (lambda d: edit_weights(d, lambda t: t.update(x=torch.zeros(1))), "1 tensors have no.*: x"),
        (lambda d: edit_weights(d, lambda t: t.pop("shared.weight")), "lack shared.weight"),
        (lambda d: edit_weights(d, lambda t: t[Q].view(-1)[3].fill_(float("nan"))), f"{Q} holds a"),
        (
            lambda d: edit_weights(d, lambda t: t.update({COPY: t["shared.weight"] + 1})),
            "is not sha",
        ),
        (lambda d: (d / WEIGHTS).unlink(), "no model.safetensors or pytorch_model.bin"),
        (lambda d: (d / WEIGHTS).write_bytes(b""), "model.safetensors: cannot be read"),
        (lambda d: (d / WEIGHTS).write_bytes(b"<html>no</html>"), "model.safetensors: cannot be"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-10]), "cannot be read"),
        (lambda d: make_bin(d).write_bytes(b""), "pytorch_model.bin: cannot be read"),
        (lambda d: make_bin(d).write_bytes(b"<html>no</html>"), "it holds more than a state_dict"),
        (lambda d: flip(make_bin(d)), "pytorch_model.bin: cannot be read: .* in it is damaged"),
        (lambda d: torch.save([1.0], make_bin(d)), "pytorch_model.bin: cannot be read"),
        (
            lambda d: torch.save({"model": {Q: torch.ones(1)}}, make_bin(d)),
            "'model' in it is not a t",
        ),
    ],
)
def test_what_is_no_t5_is_refused_by_name(saved, damage, words):
    damage(saved)
    with pytest.raises((ValueError, OSError), match=words) as error:
        load_t5(saved)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_pickle_that_would_run_code_is_refused(saved, monkeypatch):
    monkeypatch.chdir(saved)
    (saved / "model.safetensors").unlink()
    torch.save({"shared.weight": Evil()}, saved / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="pytorch_model.bin: cannot be read: it holds more than a state_dict"
    ):
        load_t5(saved)
    assert not (saved / "pwned").exists()


def test_an_interrupted_save_leaves_the_old_file(saved, model, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()
    monkeypatch.setattr(struct, "pack", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_t5(model, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert {p.name for p in saved.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "name", ["{saved}/none", "../no-such-weights", "a/b/c", "bad\0id", "{saved}/config.json"]
)
def test_what_is_neither_a_directory_nor_a_hub_id_is_not_looked_for(saved, name):
    with pytest.raises(FileNotFoundError, match="no such directory of weights"):
        resolve_checkpoint(name.format(saved=saved))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 31\n"


def with_prefix(directory, prefix):
    tensors = {prefix + name: tensor for name, tensor in read_weights(directory).items()}
    write_safetensors(directory / WEIGHTS, tensors | {"loss.weight": torch.ones(1)})


def with_dtype(directory, dtype):
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content.replace(b'"F32"', dtype, 1))


def with_int8(directory):
    tensors = read_weights(directory)
    torch.save(tensors | {Q: tensors[Q].to(torch.int8)}, make_bin(directory))


def adapter(directory, unlinked):
    (directory / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (directory / unlinked).unlink()


def run_folder(directory, names):
    content = (directory / "config.json").read_text()
    (directory / "config.json").unlink()
    for name in names:
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(content)


def without_index(directory, layout):
    relayout(directory, layout)
    next(directory.glob("*.index.json")).unlink()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: (d / WEIGHTS).write_bytes(POINTER), "model.safetensors: .* git-lfs pointer"),
        (lambda d: make_bin(d).write_bytes(POINTER), "pytorch_model.bin: .* git-lfs pointer"),
        (lambda d: with_dtype(d, b'"U8" '), "is U8; quantized weights are not read, F64, F32"),
        (lambda d: with_dtype(d, b'"I32"'), "is I32; quantized weights are not read"),
        (lambda d: with_dtype(d, b'"F16"'), "are more or fewer than its shape needs"),
        (with_int8, f"{Q} is torch.int8; quantized weights are not read"),
        (lambda d: adapter(d, "config.json"), "this is an adapter: merge it"),
        (lambda d: adapter(d, WEIGHTS), "this is an adapter: merge it"),
        (lambda d: with_prefix(d, "model."), "its name begins with 'model.'"),
        (lambda d: with_prefix(d, "_orig_mod."), "its name begins with '_orig_mod.'"),
        (lambda d: with_prefix(d, "a.b."), "its name begins with 'a.b.'"),
        (lambda d: run_folder(d, ["checkpoint-9"]), "did you mean .*checkpoint-9"),
        (lambda d: run_folder(d, ["best", "last"]), "did you mean .*best, last"),
        (lambda d: without_index(d, LAYOUTS[3]), "model-00001-of-00002.safetensors is there, but"),
        (lambda d: without_index(d, LAYOUTS[4]), "pytorch_model-00001-of-00002.bin is there, but"),
        (lambda d: torch.save(student(), make_bin(d)), "it holds more than a state_dict"),
    ],
)
def test_weights_in_other_wrappings_are_named(saved, change, words):
    change(saved)
    with pytest.raises((ValueError, OSError), match=words) as error:
        load_t5(saved)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_beside_other_files_loads(saved, model, layout):
    """What only looks like another wrapping: an old adapter, a Trainer's folders, whole numbers."""
    (saved / "adapter_config.json").write_text("{}")
    (saved / "checkpoint-5").mkdir()
    (saved / "checkpoint-5" / "config.json").write_text("{}")
    edit_config(saved, initializer_factor=1, layer_norm_epsilon=1e-6, dropout_rate=0)
    relayout(saved, layout)
    assert same(model, saved)
