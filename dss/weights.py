"""T5 checkpoints in Hugging Face's layout: a directory with config.json and the weights.

Read: model.safetensors, pytorch_model.bin, and both in shards with an index.json. Written:
model.safetensors, which transformers loads as it is. A safetensors file is eight bytes of header
length, a JSON header that gives each tensor's dtype, shape and byte range, and the bytes.

Two settings that other layouts merge are separate here. `tie_word_embeddings`: is the output matrix
the embedding? `scale_decoder_outputs`: are logits scaled by d_model**-0.5? T5 1.0 does both, T5 1.1
and mT5 neither. Checkpoints written by transformers 4 have the first key only and mean both by it;
transformers 5 writes "tied" for all, keeps an lm_head.weight where it differs, and says in the
second key whether logits are scaled.
"""

import contextlib
import dataclasses
import json
import math
import mmap
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from data.files import read_json, reason, replacing, write_json
from dss.config import T5Config
from dss.download import WEIGHTS, download, shard_names
from dss.model import T5

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARED = "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # old files repeat it
HEAD = "lm_head.weight"
POINTER = b"version https://git-lfs"  # what a clone without git-lfs has in place of a large file
# T5 1.0 has this table, nothing reads it
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def load_t5(path_or_hub_id: str | os.PathLike, dropout_rate: float | None = None) -> T5:
    """The T5 in a directory or on the hub, in fp32 on the CPU and in eval mode.

    dropout_rate replaces the checkpoint's own. Raises OSError if something is missing or cannot be
    reached, ValueError if it is damaged or not a T5 that this code computes; both name the file.
    """
    directory = resolve_checkpoint(path_or_hub_id)
    config = read_config(directory / "config.json")
    tensors = read_tensors(directory)
    tied = merge_shared(tensors, directory)
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    if dropout_rate is not None:
        config = dataclasses.replace(config, dropout_rate=dropout_rate)
    with reading(directory / "config.json"), torch.device("meta"):
        model = T5(config)
    parameters = {}
    for name, parameter in model.named_parameters():
        key = checkpoint_name(name, model)
        if key not in tensors:
            raise ValueError(f"{directory}: the weights lack {key}")
        tensor = tensors.pop(key).to(torch.float32, copy=True)
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{directory}: {key} is {list(tensor.shape)}, "
                f"but config.json makes it {list(parameter.shape)}"
            )
        low, high = tensor.aminmax()  # needs no memory, as isfinite() of all would
        if not math.isfinite(high - low):
            raise ValueError(f"{directory}: {key} holds a number that is not finite")
        parameters[name] = tensor
    if tensors:
        names = ", ".join(sorted(tensors)[:3])
        raise ValueError(
            f"{directory}: {len(tensors)} tensors have no place in this T5, such as {names}"
        )
    model.load_state_dict(parameters, assign=True)
    return model.eval()


def merge_shared(tensors: dict[str, torch.Tensor], directory: Path) -> bool:
    """Keep one of several names of the embedding. Returns whether it is the output matrix, too."""
    tensors.pop(UNUSED, None)
    for name in COPIES:
        copy = tensors.pop(name, None)
        if copy is not None and not torch.equal(copy, tensors.setdefault(SHARED, copy)):
            raise ValueError(f"{directory}: {name} is not {SHARED}; one embedding is supported")
    if SHARED not in tensors:
        wrapped = [name for name in tensors if name.endswith("." + SHARED)]
        hint = f"; {wrapped[0]} is there: save the model without its wrapper" if wrapped else ""
        raise ValueError(f"{directory}: the weights lack {SHARED}{hint}")
    tied = HEAD not in tensors or torch.equal(tensors[HEAD], tensors[SHARED])
    if tied:
        tensors.pop(HEAD, None)
    return tied


def save_t5(model: T5, directory: str | os.PathLike) -> None:
    """Write config.json and model.safetensors (fp32), each complete or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[checkpoint_name(name, model)] = parameter
    config = dataclasses.asdict(model.config)
    if config["tie_word_embeddings"] and not config["scale_decoder_outputs"]:
        # transformers 4 cannot say "tied but not scaled"; with the output matrix written out,
        # versions 4 and 5 compute the same
        tensors[HEAD] = tensors[SHARED]
        config["tie_word_embeddings"] = False
    config["architectures"] = [f"{config['model_type'].upper()}ForConditionalGeneration"]
    config["is_encoder_decoder"] = True
    config["torch_dtype"] = "float32"
    write_safetensors(directory / "model.safetensors", tensors)
    write_json(directory / "config.json", dict(sorted(config.items())))


def checkpoint_name(name: str, model: T5) -> str:
    """The name of one of our parameters in a Hugging Face checkpoint."""
    if name == "embedding.weight":
        return SHARED
    feed_forward = "layer.1" if name.startswith("encoder.") else "layer.2"
    up = "wi_1" if model.config.feed_forward_proj == "gated-gelu" else "wi"
    pairs = {
        ".bias_table": ".block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ".final_norm.": ".final_layer_norm.",
        ".layers.": ".block.",
        ".self_attention_norm.": ".layer.0.layer_norm.",
        ".self_attention.": ".layer.0.SelfAttention.",
        ".cross_attention_norm.": ".layer.1.layer_norm.",
        ".cross_attention.": ".layer.1.EncDecAttention.",
        ".feed_forward_norm.": f".{feed_forward}.layer_norm.",
        ".feed_forward.": f".{feed_forward}.DenseReluDense.",
        ".DenseReluDense.gate.": ".DenseReluDense.wi_0.",
        ".DenseReluDense.up.": f".DenseReluDense.{up}.",
        ".DenseReluDense.down.": ".DenseReluDense.wo.",
    }
    for ours, theirs in pairs.items():
        name = name.replace(ours, theirs)
    return name


def resolve_checkpoint(path_or_hub_id: str | os.PathLike, weights: bool = True) -> Path:
    """The directory of a checkpoint: the path itself, or the download of a hub id.

    weights: whether those of a hub id are downloaded, too. Raises FileNotFoundError if it is
    neither a directory with a config.json nor a hub id, and what `download` raises.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path / 'config.json'}: missing{what_is_there(path)}")
        return path
    hub_id = str(path_or_hub_id)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", hub_id, re.ASCII):
        raise FileNotFoundError(f"{hub_id}: no such directory of weights")
    return download(hub_id, weights)


def what_is_there(directory: Path) -> str:
    """The end of a message: what a directory that is not a checkpoint may be instead."""
    if (directory / "adapter_config.json").exists():
        return "; this is an adapter: merge it into its base model, and save that"
    shards = sorted(directory.glob("*-of-*"))
    if shards:
        return f"; {shards[0].name} is there, but the index.json that lists it is not"
    inside = sorted(path.parent.name for path in directory.glob("*/config.json"))
    if inside:
        return f"; did you mean a directory in it: {', '.join(inside)}?"
    return ""


def read_config(path: str | os.PathLike) -> T5Config:
    """config.json -> T5Config. Raises OSError or ValueError, naming the file and the key."""
    raw = read_json(path)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in ("t5", "mt5"):
        raise ValueError(f"{path}: model_type is {kind!r}; this code computes 't5' and 'mt5'")
    given = {}
    for field in dataclasses.fields(T5Config):
        value = raw.get(field.name)
        if value is None:  # null: as if it were not there
            continue
        if not isinstance(value, (type(field.default), int)):  # 1 may stand for 1.0
            raise ValueError(f"{path}: {field.name} is {value!r}")
        given[field.name] = value
    given.setdefault("num_decoder_layers", given.get("num_layers", T5Config.num_layers))
    if kind == "mt5":
        given["scale_decoder_outputs"] = False
    else:
        given.setdefault("scale_decoder_outputs", given.get("tie_word_embeddings", True))
    config = T5Config(**given)
    if config.feed_forward_proj not in ("relu", "gated-gelu"):
        raise ValueError(
            f"{path}: feed_forward_proj is {config.feed_forward_proj!r}, not 'relu' or 'gated-gelu'"
        )
    return config


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a checkpoint directory. Raises OSError or ValueError, naming the file."""
    for name in WEIGHTS:
        read = read_bin if name.endswith(".bin") else read_safetensors
        if (directory / name).exists():
            return read(directory / name)
        index = directory / f"{name}.index.json"
        if index.exists():
            tensors = {}
            for shard in shard_names(index):
                tensors.update(read(directory / shard))
            return tensors
    raise FileNotFoundError(
        f"{directory}: no {' or '.join(WEIGHTS)}, whole or in shards{what_is_there(directory)}"
    )


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Whatever the block, which reads a file, raises becomes one line with the file's name."""
    try:
        yield
    except Exception as problem:
        if isinstance(problem, OSError) and problem.filename:
            raise
        what = reason(problem)
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                what = "it is a git-lfs pointer, not the file itself; `git lfs pull` fetches it"
        raise ValueError(f"{path}: cannot be read: {what}") from None


def require_float(name: str, dtype: torch.dtype | str) -> None:
    """Raise ValueError for a tensor of integers or of eight bits, as in quantized weights."""
    if dtype not in DTYPES.values():
        raise ValueError(
            f"{name} is {dtype}; quantized weights are not read, {', '.join(DTYPES)} are"
        )


def read_bin(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{name: tensor} of a PyTorch checkpoint. A pickle that would run code is refused."""
    with reading(path):
        zipped = zipfile.is_zipfile(path)  # since PyTorch 1.6
        if zipped and zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError("it is damaged")
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError:  # torch's message advises to load it all the same
            raise ValueError("it holds more than a state_dict, which is not loaded") from None
        for name, tensor in tensors.items():
            require_float(name, tensor.dtype)
    return tensors


def read_safetensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{name: tensor}; each is a view of the mapped file and costs memory only where it is read."""
    tensors = {}
    with reading(path), open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = struct.unpack_from("<Q", data)
        begin = 8 + length
        header = json.loads(data[8:begin])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype = DTYPES.get(entry["dtype"], entry["dtype"])
            require_float(name, dtype)
            count = math.prod(entry["shape"])
            start = begin + entry["data_offsets"][0]
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def write_safetensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor]) -> None:
    """{name: tensor} -> a safetensors file in fp32, complete or not at all."""
    header = {"__metadata__": {"format": "pt"}}
    offset = 0
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
