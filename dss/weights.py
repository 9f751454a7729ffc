"""T5 checkpoints in and out, in Hugging Face layout: a directory with config.json and the weights.

Read: model.safetensors, pytorch_model.bin, and both in shards with an index.json. Written: model.safetensors, which
transformers loads as it is. A safetensors file is eight bytes of header length, a JSON header that gives each tensor's
dtype, shape and byte range, and the bytes; reading it maps the file, so a tensor costs memory only when it is copied.

Two facts of a T5 that other layouts run together are kept apart here. `tie_word_embeddings`: is the output matrix the
embedding? `scale_decoder_outputs`: are logits scaled by d_model**-0.5? T5 1.0 does both, T5 1.1 and mT5 neither.
Checkpoints written by transformers 4 have the first key only and mean both by it; transformers 5 writes "tied" for
all, keeps an lm_head.weight where it differs, and says in the second key whether logits are scaled.
"""

import dataclasses
import json
import mmap
import os
import re
import struct
import zipfile
from pathlib import Path

import torch

from data.files import replacing
from dss.config import T5Config
from dss.hub import fetch, shards
from dss.model import T5

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # one matrix, three names
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # T5 1.0 has it, nothing reads it


def load_t5(path_or_hub_id, dropout_rate=None, mapped=False):
    """The T5 in a directory or on the hub (downloaded once, see dss/hub.py), in fp32 on the CPU and in eval mode.

    dropout_rate replaces the checkpoint's own. mapped: the weights stay in their files, in the files' dtype, and cost
    memory only where they are read. Raises OSError if something is missing or cannot be reached, ValueError
    if it is damaged or not a T5 that this code computes; both name the file.
    """
    directory = locate(path_or_hub_id)
    config = read_config(directory / "config.json")
    tensors = read_tensors(directory)
    copies = [tensors.pop(name) for name in EMBEDDING if name in tensors]
    if not copies:
        raise ValueError(f"{directory}: the weights lack shared.weight")
    tensors["shared.weight"] = copies[0]
    head = tensors.get("lm_head.weight")
    tied = head is None or torch.equal(head, copies[0])
    if tied:
        tensors.pop("lm_head.weight", None)
    tensors.pop(UNUSED, None)
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    if dropout_rate is not None:
        config = dataclasses.replace(config, dropout_rate=dropout_rate)

    with torch.device("meta"):
        model = T5(config)
    if mapped:
        model.load_state_dict({n: tensors[checkpoint_name(n, model)] for n, _ in model.named_parameters()}, assign=True)
        return model.eval()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key = checkpoint_name(name, model)
            tensor = tensors.pop(key, None)
            if tensor is None:
                raise ValueError(f"{directory}: the weights lack {key}")
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{directory}: {key} is {list(tensor.shape)}, but config.json makes it {list(parameter.shape)}"
                )
            parameter.copy_(tensor)
    if tensors:
        raise ValueError(
            f"{directory}: {len(tensors)} tensors have no place in this T5: {', '.join(sorted(tensors)[:3])}"
        )
    return model.eval()


def save_t5(model, directory):
    """Write config.json and model.safetensors (fp32) to `directory`, each complete or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {checkpoint_name(name, model): parameter for name, parameter in model.named_parameters()}
    config = dataclasses.asdict(model.config)
    if config["tie_word_embeddings"] and not config["scale_decoder_outputs"]:
        # transformers 4 cannot say "tied but not scaled"; with the output matrix written out, 4 and 5 compute the same
        tensors["lm_head.weight"] = tensors["shared.weight"]
        config["tie_word_embeddings"] = False
    architecture = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}[config["model_type"]]
    config.update(architectures=[architecture], is_encoder_decoder=True, torch_dtype="float32")
    write_safetensors(directory / "model.safetensors", tensors)
    with replacing(directory / "config.json") as file:
        file.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def checkpoint_name(name, model):
    """The name of one of our parameters in a Hugging Face checkpoint."""
    if name == "embedding.weight":
        return "shared.weight"
    name = name.replace(".bias_table", ".block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    name = name.replace(".final_norm.", ".final_layer_norm.").replace(".layers.", ".block.")
    feed_forward = "layer.1" if name.startswith("encoder.") else "layer.2"
    for part, layer, module in (
        ("self_attention", "layer.0", "SelfAttention"),
        ("cross_attention", "layer.1", "EncDecAttention"),
        ("feed_forward", feed_forward, "DenseReluDense"),
    ):
        name = name.replace(f".{part}_norm.", f".{layer}.layer_norm.").replace(f".{part}.", f".{layer}.{module}.")
    gated = model.config.feed_forward_proj == "gated-gelu"
    for ours, theirs in (("gate", "wi_0"), ("up", "wi_1" if gated else "wi"), ("down", "wo")):
        name = name.replace(f".DenseReluDense.{ours}.", f".DenseReluDense.{theirs}.")
    return name


def locate(path_or_hub_id, weights=True):
    """The directory of a checkpoint: the path itself, or the download of a hub id, `weights` or tokenizer alone.

    Raises FileNotFoundError if it is neither, or has no config.json.
    """
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path / 'config.json'}: missing; a directory of T5 weights has a config.json")
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or {".", ".."} & set(name.split("/")):
        raise FileNotFoundError(f"{name}: no such directory of weights")
    return fetch(name, weights)


def read_config(path):
    """config.json -> T5Config. Raises OSError or ValueError, naming the file and the key."""
    try:
        raw = json.loads(Path(path).read_text("utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path}: not JSON ({problem})") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in ("t5", "mt5"):
        raise ValueError(f"{path}: model_type is {kind!r}; this code computes 't5' and 'mt5'")
    given = {f.name: raw[f.name] for f in dataclasses.fields(T5Config) if raw.get(f.name) is not None}
    given.setdefault("num_decoder_layers", given.get("num_layers", T5Config.num_layers))
    given.setdefault("decoder_start_token_id", given.get("pad_token_id", T5Config.pad_token_id))
    if kind == "mt5":
        given["scale_decoder_outputs"] = False
        given.setdefault("feed_forward_proj", "gated-gelu")
    else:
        given.setdefault("scale_decoder_outputs", given.get("tie_word_embeddings", True))
    for field in dataclasses.fields(T5Config):
        value = given.get(field.name, field.default)
        if not isinstance(value, (int, float) if field.type is float else field.type):
            raise ValueError(f"{path}: {field.name} is {value!r}, not {field.type.__name__}")
    config = T5Config(**given)
    if config.feed_forward_proj not in ("relu", "gated-gelu"):
        raise ValueError(f"{path}: feed_forward_proj is {config.feed_forward_proj!r}; known: 'relu', 'gated-gelu'")
    return config


def read_tensors(directory):
    """{name: tensor} of a checkpoint directory, mapped from its files. Raises FileNotFoundError or ValueError."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        if (directory / name).exists():
            return read(directory / name)
        index = directory / f"{name}.index.json"
        if index.exists():
            tensors = {}
            for shard in shards(index):
                if not (directory / shard).exists():
                    raise FileNotFoundError(f"{directory / shard}: missing; {index.name} names it")
                tensors.update(read(directory / shard))
            return tensors
    raise FileNotFoundError(f"{directory}: no model.safetensors or pytorch_model.bin, whole or in shards")


def read_bin(path):
    """A PyTorch checkpoint of tensors alone: weights_only refuses a pickle that would run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as problem:  # torch.load documents no closed set of errors for a damaged file
        raise ValueError(f"{path}: not a PyTorch checkpoint of tensors ({str(problem).splitlines()[0]})") from None


def read_safetensors(path):
    """{name: tensor}, each a view of the mapped file. Raises ValueError, naming the file, if it is damaged."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
    try:
        (length,) = struct.unpack_from("<Q", buffer)
        header = json.loads(buffer[8 : 8 + length])
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            count = torch.Size(shape).numel()
            if end - start != count * dtype.itemsize or not 8 + length <= start <= end <= size:
                raise ValueError(f"the bytes of {name} are not all there")
            flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start) if count else torch.empty(0)
            tensors[name] = flat.reshape(shape)
        return tensors
    except (ValueError, KeyError, TypeError, struct.error) as problem:
        raise ValueError(f"{path}: not a complete safetensors file ({problem})") from None


def write_safetensors(path, tensors):
    """{name: tensor} -> a safetensors file in fp32, complete or not at all."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes of the first tensor begin at a multiple of 8
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
