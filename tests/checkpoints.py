"""Checkpoints for tests: an untrained student, and the public layouts of its weights."""

import json
from dataclasses import replace

import torch

from dss.config import SIZES
from dss.model import T5
from dss.weights import load_t5, read_safetensors, save_t5, write_safetensors
from tokenizer import T5Tokenizer

LAYOUTS = ["model.safetensors", "pytorch_model.bin", "legacy pytorch_model.bin"]
LAYOUTS += ["model.safetensors in shards", "pytorch_model.bin in shards"]


def same(model, path_or_hub_id):
    """Whether a checkpoint is this model."""
    loaded = load_t5(path_or_hub_id).state_dict()
    return all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def make_student(directory, spiece):
    """Write an untrained student and its tokenizer, but no dss.json."""
    torch.manual_seed(3)
    tokenizer = T5Tokenizer(spiece)
    save_t5(T5(replace(SIZES["tiny"], vocab_size=tokenizer.vocab_size)), directory)
    tokenizer.save(directory)
    return directory


def read_weights(directory):
    """Copies of the tensors, for they are views of the file."""
    tensors = read_safetensors(directory / "model.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def relayout(directory, layout):
    """Rewrite the weights of a directory in another layout."""
    if layout == "model.safetensors":
        return
    tensors = read_weights(directory)
    (directory / "model.safetensors").unlink()
    # old checkpoints hold a copy, and an unused table
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unused] = torch.zeros(32, 3)
    if layout == "pytorch_model.bin":
        torch.save(tensors, directory / layout)
    elif layout == "legacy pytorch_model.bin":  # as saved before 2020, not a zip file
        path = directory / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        write_shards(directory, tensors, layout.removesuffix(" in shards"))


def write_shards(directory, tensors, name):
    stem, ending = name.rsplit(".", 1)
    places = {}
    for k in (0, 1):
        shard = f"{stem}-0000{k + 1}-of-00002.{ending}"
        half = dict(list(tensors.items())[k::2])
        places |= dict.fromkeys(half, shard)
        if ending == "bin":
            torch.save(half, directory / shard)
        else:
            write_safetensors(directory / shard, half)
    (directory / f"{name}.index.json").write_text(json.dumps({"weight_map": places}))
