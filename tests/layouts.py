"""The public layouts of a checkpoint, made from a directory that save_t5 wrote."""

import json

import torch

from dss.weights import read_safetensors, write_safetensors

LAYOUTS = ["model.safetensors", "pytorch_model.bin", "legacy pytorch_model.bin"]
LAYOUTS += ["model.safetensors in shards", "pytorch_model.bin in shards"]


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
