"""T5 checkpoints in and out, in Hugging Face layout: a directory with config.json and the weights.

Read: model.safetensors, pytorch_model.bin, and both in shards with an index.json. Written: model.safetensors, which
transformers loads as it is. A safetensors file is eight bytes of header length, a JSON header that gives each tensor's
dtype, shape and byte range, and the bytes; reading it maps the file, so a tensor costs memory only when it is copied.

Two settings that other layouts merge are separate here. `tie_word_embeddings`: is the output matrix the
embedding? `scale_decoder_outputs`: are logits scaled by d_model**-0.5? T5 1.0 does both, T5 1.1 and mT5 neither.
Checkpoints written by transformers 4 have the first key only and mean both by it; transformers 5 writes "tied" for
all, keeps an lm_head.weight where it differs, and says in the second key whether logits are scaled.
"""

import dataclasses
import json
import math
import mmap
import os
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from data.files import open_regular, parse_json, read_json, reason, replacing, write_json
from dss.config import T5Config
from dss.hub import fetch
from dss.model import T5
from tokenizer import T5Tokenizer

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # one matrix, three names
HEAD = "lm_head.weight"
NULLABLE = ("num_decoder_layers", "pad_token_id", "eos_token_id", "decoder_start_token_id")  # null: as if not there
MOST_HEADER = 100_000_000  # bytes, the format's own limit
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # T5 1.0 has it, nothing reads it


def load_t5(path_or_hub_id: str | os.PathLike, dropout_rate: float | None = None, mapped: bool = False) -> T5:
    """The T5 in a directory or on the hub (downloaded once, see dss/hub.py), in fp32 on the CPU and in eval mode.

    dropout_rate replaces the checkpoint's own. mapped: the weights stay in their files, in the files' dtype, and cost
    memory only where they are read. Raises OSError if something is missing or cannot be reached, ValueError if it is
    damaged or not a T5 that this code computes; both name the file. No memory is taken for weights before every shape
    is known to be the one in the files.
    """
    directory = resolve_checkpoint(path_or_hub_id)
    config = read_config(directory / "config.json")
    tensors = read_tensors(directory)
    shared, *copies = [tensors.pop(name) for name in EMBEDDING if name in tensors] or [None]
    if shared is None:
        raise ValueError(f"{directory}: the weights lack shared.weight")
    if not all(torch.equal(copy, shared) for copy in copies):
        raise ValueError(f"{directory}: embed_tokens.weight is not shared.weight; one shared embedding is supported")
    tensors["shared.weight"] = shared
    tied = torch.equal(tensors.get(HEAD, shared), shared)
    if tied:
        tensors.pop(HEAD, None)
    tensors.pop(UNUSED, None)
    dropout_rate = config.dropout_rate if dropout_rate is None else dropout_rate
    config = dataclasses.replace(config, tie_word_embeddings=tied, dropout_rate=dropout_rate)

    with torch.device("meta"):
        model = T5(config)
    shapes = {checkpoint_name(name, model): parameter.shape for name, parameter in model.named_parameters()}
    for key, shape in shapes.items():
        if key not in tensors:
            raise ValueError(f"{directory}: the weights lack {key}")
        if (found := tensors[key].shape) != shape:
            raise ValueError(f"{directory}: {key} is {list(found)}, but config.json makes it {list(shape)}")
    if others := sorted(tensors.keys() - shapes):
        raise ValueError(f"{directory}: {len(others)} tensors have no place in this T5: {', '.join(others[:3])}")
    if mapped:
        model.load_state_dict({n: tensors[checkpoint_name(n, model)] for n, _ in model.named_parameters()}, assign=True)
        return model.eval()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.pop(key := checkpoint_name(name, model)))
            if not all(map(math.isfinite, parameter.aminmax())):  # takes no memory, as isfinite() of all would
                raise ValueError(f"{directory}: {key} holds a number that is not finite")
    return model.eval()


def save_t5(model: T5, directory: str | os.PathLike) -> None:
    """Write config.json and model.safetensors (fp32) to `directory`, each complete or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {checkpoint_name(name, model): parameter for name, parameter in model.named_parameters()}
    config = dataclasses.asdict(model.config)
    if config["tie_word_embeddings"] and not config["scale_decoder_outputs"]:
        # transformers 4 cannot say "tied but not scaled"; with the output matrix written out, 4 and 5 compute the same
        tensors[HEAD] = tensors["shared.weight"]
        config["tie_word_embeddings"] = False
    architecture = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}[config["model_type"]]
    config.update(architectures=[architecture], is_encoder_decoder=True, torch_dtype="float32")
    write_safetensors(directory / "model.safetensors", tensors)
    write_json(directory / "config.json", dict(sorted(config.items())))


def checkpoint_name(name: str, model: T5) -> str:
    """The name of one of our parameters in a Hugging Face checkpoint."""
    if name == "embedding.weight":
        return "shared.weight"
    name = name.replace(".bias_table", ".block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    name = name.replace(".final_norm.", ".final_layer_norm.").replace(".layers.", ".block.")
    last = "layer.1" if name.startswith("encoder.") else "layer.2"
    parts = [("self_attention", "layer.0", "SelfAttention"), ("cross_attention", "layer.1", "EncDecAttention")]
    for part, layer, module in [*parts, ("feed_forward", last, "DenseReluDense")]:
        name = name.replace(f".{part}_norm.", f".{layer}.layer_norm.").replace(f".{part}.", f".{layer}.{module}.")
    gated = model.config.feed_forward_proj == "gated-gelu"
    for ours, theirs in (("gate", "wi_0"), ("up", "wi_1" if gated else "wi"), ("down", "wo")):
        name = name.replace(f".DenseReluDense.{ours}.", f".DenseReluDense.{theirs}.")
    return name


def resolve_checkpoint(path_or_hub_id: str | os.PathLike, weights: bool = True) -> Path:
    """The directory of a checkpoint: the path itself, or the download of a hub id, `weights` or tokenizer alone.

    Raises FileNotFoundError if it is neither, or has no config.json.
    """
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path / 'config.json'}: missing; a directory of T5 weights has a config.json")
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) or {".", ".."} & set(name.split("/")):
        raise FileNotFoundError(f"{name}: no such directory of weights")
    return fetch(name, check_file, weight_files if weights else None)


def weight_files(directory: Path, has: Callable[[str], bool]) -> list[str]:
    """The names of the files that hold a checkpoint's weights, whole or in shards; [] if there are none.

    has(name) says whether `directory` has a file, or downloads it. Raises ValueError for an invalid index.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if has(name):
            return [name]
        if has(f"{name}.index.json"):
            return shards(directory / f"{name}.index.json")
    return []


def shards(index: str | os.PathLike) -> list[str]:
    """The file names that an index.json lists. Raises ValueError if it is not such an index."""
    try:
        content = read_json(index)
        names, about = sorted(set(content["weight_map"].values())), content.get("metadata", {})
        if not isinstance(about, dict) or any(n != os.path.basename(n) or n in ("", ".", "..") for n in names):
            raise ValueError("its metadata is not an object, or it names a file in another directory")
        return names
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise ValueError(f"{index}: not an index of shards ({problem})") from None


def check_file(path: Path, name: str) -> None:
    """Raise OSError or ValueError unless the file at `path` is what a checkpoint's file called `name` must be."""
    by_name = {"spiece.model": T5Tokenizer, "config.json": read_config, "tokenizer_config.json": read_json}
    by_ending = {"safetensors": read_safetensors, "bin": read_bin}
    (by_name.get(name) or by_ending.get(name.rpartition(".")[2], shards))(path)


def read_config(path: str | os.PathLike) -> T5Config:
    """config.json -> T5Config. Raises OSError or ValueError, naming the file and the key."""
    raw = read_json(path)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in ("t5", "mt5"):
        raise ValueError(f"{path}: model_type is {kind!r}; this code computes 't5' and 'mt5'")
    names = [field.name for field in dataclasses.fields(T5Config) if field.name in raw]
    given = {name: raw[name] for name in names if raw[name] is not None or name not in NULLABLE}
    given.setdefault("num_decoder_layers", given.get("num_layers", T5Config.num_layers))
    given.setdefault("decoder_start_token_id", given.get("pad_token_id", T5Config.pad_token_id))
    if kind == "mt5":
        given["scale_decoder_outputs"] = False
        given.setdefault("feed_forward_proj", "gated-gelu")
    else:
        given.setdefault("scale_decoder_outputs", given.get("tie_word_embeddings", True))
    config = T5Config(**given)
    gated = config.feed_forward_proj == "gated-gelu"  # transformers says the same thing up to three times
    for key, value in dict(dense_act_fn="gelu_new" if gated else "relu", is_gated_act=gated).items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}, but feed_forward_proj is {config.feed_forward_proj!r}")
    return config


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a checkpoint directory, mapped from its files. Raises FileNotFoundError or ValueError."""
    files = weight_files(directory, lambda name: (directory / name).exists())
    if not files:
        raise FileNotFoundError(f"{directory}: no model.safetensors or pytorch_model.bin, whole or in shards")
    tensors = {}
    for name in files:
        tensors |= (read_safetensors if name.endswith(".safetensors") else read_bin)(directory / name)
    return tensors


def read_bin(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{name: tensor} of a PyTorch checkpoint: weights_only refuses a pickle that would run code."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is a compressed archive, which cannot be memory-mapped")
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        if not isinstance(tensors, dict) or not all(isinstance(n, str) and is_dense(t) for n, t in tensors.items()):
            raise ValueError("it is not a dict of named dense tensors of floating-point numbers")
        # A view may say it is larger than what it views. Four names may share the embedding.
        if sum(t.numel() * t.itemsize for name, t in tensors.items() if name not in (*EMBEDDING[1:], HEAD)) > size:
            raise ValueError("its tensors are larger than the file")
        return tensors
    except Exception as problem:  # torch.load documents no closed set of errors for a damaged file
        raise ValueError(f"{path}: not a PyTorch checkpoint of tensors ({reason(problem)})") from None


def is_dense(value):
    strided = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return strided and value.dtype in DTYPES.values()


def read_safetensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{name: tensor}, each a view of the mapped file. Raises ValueError, naming the file, if it breaks the format:
    each byte after the header belongs to one tensor."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
    try:
        (length,) = struct.unpack_from("<Q", buffer)
        if length > min(size - 8, MOST_HEADER):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = parse_json(buffer[8 : 8 + length].rstrip(b" "), "its header")
        metadata = header.pop("__metadata__", {}) if buffer[8:9] == b"{" else None
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its header is not one")
        tensors, begin = {}, 8 + length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
            sizes = start, end, *shape
            if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in sizes):
                raise ValueError(f"{name} has no shape or no place")
            count, end = math.prod(shape), 8 + length + end
            if 8 + length + start != begin or end - begin != count * dtype.itemsize or end > size:
                raise ValueError(f"the bytes of {name} are not all there, or not its own")
            flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=begin) if count else torch.empty(0)
            tensors[name] = flat.reshape(shape)
            begin = end
        if begin != size:
            raise ValueError(f"{size - begin:,} bytes belong to no tensor")
        return tensors
    except (ValueError, KeyError, TypeError, RuntimeError, struct.error) as problem:
        raise ValueError(f"{path}: not a complete safetensors file ({problem})") from None


def write_safetensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor]) -> None:
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
