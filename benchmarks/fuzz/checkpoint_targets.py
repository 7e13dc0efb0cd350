"""Targets: safetensors files, shard indexes, configs, and packed blocks."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import torch
from safetensors.torch import load, save

from benchmarks.fuzz.mutation import mutate_bytes, mutate_json
from benchmarks.fuzz.target import Target, Violation
from runtime.checkpoints.checkpoint import open_checkpoint, read_config
from runtime.checkpoints.heads import ARCHITECTURES, LINEAR_HEAD
from runtime.checkpoints.model_config import BIASED_LINEARS, BLOCK_LINEARS, ModelConfig
from runtime.checkpoints.quantization_config import NF4_QUANT_STATE, QuantizationConfig
from runtime.checkpoints.quantization_parsing import read_quantization_config
from runtime.checkpoints.safetensors_file import open_safetensors_file, read_tensor
from runtime.checkpoints.shards import open_shards
from tests.helpers.packed import packed_tensors
from tests.helpers.tiny import tiny_config, tiny_tensors, write_shards, write_tokenizer

QUANTIZATIONS = (
    QuantizationConfig("gptq", 4, 16, desc_act=True),
    QuantizationConfig("gptq", 8),
    QuantizationConfig("nf4", 4),
    QuantizationConfig("nf4", 4, double_quant=False),
    QuantizationConfig("int8", 8),
)
OTHER_WRITERS = (
    {"bits": 4, "quant_method": "gptq", "dynamic": {r"+:model\.layers\.1\.": {"bits": 8}, "-:score": {}}},
    {"bits": 4, "quant_method": "gptq", "dynamic": {r"model\.layers\.(?:0|1)\.mlp\.[a-z_]+$": {"group_size": 64}}},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    {"quant_method": "gptq", "bits": 8, "format": "gptq_v2", "checkpoint_format": None, "damp_percent": 0.1},
)
CHECKPOINTS = ("checkpoint", "shards", "safetensors_file", "model_config", "tensor_spec", "heads")
QUANTIZATION = ("quantization_config", "quantization_parsing")


def _modules(*names: str) -> list[str]:
    return [f"runtime.checkpoints.{name}" for name in names]


def _config(hidden: int = 32) -> dict[str, object]:
    return tiny_config(layers=2, hidden=hidden, intermediate=64, heads=2, kv_heads=1, vocab=320, dtype=torch.bfloat16)


def _packed(quantization: QuantizationConfig) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of `_config` with packed linears."""
    model_config = ModelConfig.from_config(_config())
    tensors = tiny_tensors(model_config)
    for index in range(model_config.num_hidden_layers):
        for name in BLOCK_LINEARS:
            full = f"model.layers.{index}.{name}"
            del tensors[f"{full}.weight"]
            if name not in BIASED_LINEARS:
                tensors.pop(f"{full}.bias", None)
            made = packed_tensors(model_config.linear_shape(name), quantization)
            tensors |= {f"{full}.{suffix}": tensor.contiguous() for suffix, tensor in made.items()}
    return tensors


# ---- safetensors files ----------------------------------------------------------------------------------


def _small_files() -> list[bytes]:
    dtypes = (
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int64,
        torch.bool,
    )
    shapes = {f"t{number}": torch.ones(number % 3, 2, dtype=dtype) for number, dtype in enumerate(dtypes)}
    return [
        save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, metadata={"format": "pt"}),
        save(shapes),
        save({"scalar": torch.tensor(1.0), "empty": torch.empty(0, 4)}),
        save({}),
    ]


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Change the header, its length, or the data behind it."""
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    kind = random.randrange(12)
    if kind == 0:
        return mutate_bytes(data, random)
    if kind == 1:
        length = random.choice((0, 1, length - 1, length + 1, len(data), 1 << 30, (1 << 63) + length, (1 << 64) - 1))
        return (length % (1 << 64)).to_bytes(8, "little") + data[8:]
    if kind == 2:
        values = random.choice((values[:-1], values + b"\0", b"", values * 2))
    elif kind == 3:
        header += b" " * random.choice((1, 8, 100_000))
    else:
        header = mutate_json(header, random)
    return len(header).to_bytes(8, "little") + header + values


def _check_safetensors(data: bytes, scratch: Path) -> None:
    """What is accepted, the safetensors library accepts too, and reads the same tensors."""
    path = scratch / "model.safetensors"
    path.write_bytes(data)
    tensors = {name: read_tensor(name, stored) for name, stored in open_safetensors_file(path).tensors.items()}
    expected = load(data)
    same = tensors.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype
        and tensor.shape == expected[name].shape
        and tensor.reshape(-1).view(torch.uint8).equal(expected[name].reshape(-1).view(torch.uint8))
        for name, tensor in tensors.items()
    )
    if not same:
        raise Violation("the safetensors library reads other tensors")


# ---- indexes --------------------------------------------------------------------------------------------


@cache
def _sharded() -> Path:
    directory = Path(mkdtemp(prefix="fuzz-shards-"))
    write_shards(directory, {name: torch.zeros(2) for name in ("a", "b", "c", "model.layers.0.x")}, shards=2)
    return directory


def _indexes() -> list[bytes]:
    return [(_sharded() / "model.safetensors.index.json").read_bytes()]


def _check_index(data: bytes, scratch: Path) -> None:
    """What is accepted maps every tensor to the shard that holds it."""
    for shard in _sharded().glob("*.safetensors"):
        link = scratch / shard.name
        if not link.exists():
            link.symlink_to(shard)
    path = scratch / "model.safetensors.index.json"
    path.write_bytes(data)
    held = {name: shard.file.name for shard in open_shards(scratch) for name in shard.tensors}
    if held != json.loads(data)["weight_map"]:
        raise Violation("an index with other tensors is accepted")


# ---- configs --------------------------------------------------------------------------------------------


def _configs() -> list[bytes]:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "dtype": "float32", "head_dim": 16}
    entries = [quantization.to_config() for quantization in QUANTIZATIONS] + list(OTHER_WRITERS)
    linear = _config() | {"architectures": [ARCHITECTURES[LINEAR_HEAD]], "id2label": {"0": "a"}, "layer_types": []}
    whole = [_config(), _config() | rope, linear, *(_config() | {"quantization_config": entry} for entry in entries)]
    _whole_checkpoint()
    return [json.dumps(each).encode() for each in whole]


def _check_config(data: bytes, scratch: Path) -> None:
    """What is accepted gives finite plans, survives writing, and is that of the weights or refused with them."""
    (scratch / "config.json").write_bytes(data)
    _, model_config, quantization = read_config(scratch / "config.json")
    if not 0 < model_config.linear_flops(7, 2) < float("inf"):
        raise Violation("linear_flops is no number")
    if quantization is not None and model_config.num_hidden_layers < 1000:
        if not quantization.bits_per_weight(model_config) > 0:
            raise Violation("bits_per_weight is no number")
        again = read_quantization_config(json.loads(json.dumps(quantization.to_config())))
        if again.of_block(0) != quantization.of_block(0) or again.of_block(1) != quantization.of_block(1):
            raise Violation(f"{quantization} is read back as {again}")
    link = scratch / "model.safetensors"
    if not link.exists():
        link.symlink_to(_whole_checkpoint())
    open_checkpoint(scratch)


@cache
def _whole_checkpoint() -> Path:
    directory = Path(mkdtemp(prefix="fuzz-model-"))
    write_shards(directory, tiny_tensors(ModelConfig.from_config(_config())))
    return directory / "model.safetensors"


# ---- packed blocks --------------------------------------------------------------------------------------


@cache
def _packed_files() -> dict[bytes, QuantizationConfig]:
    return {save(_packed(quantization)): quantization for quantization in QUANTIZATIONS}


def mutate_block(data: bytes, random: Random) -> bytes:
    """Change the values that a reader checks: g_idx, the quant state, the weight format, the head; or the file."""
    if random.randrange(3) == 0:
        return mutate_safetensors(data, random)
    try:
        tensors = load(data)
    except Exception:  # the file is damaged already
        return mutate_safetensors(data, random)
    checked = ("g_idx", NF4_QUANT_STATE, "weight_format", "score.0.bias")
    names = [name for name in tensors if name.endswith(checked)]
    if not names:
        return mutate_safetensors(data, random)
    name = random.choice(names)
    tensor = tensors[name]
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    if name.endswith(NF4_QUANT_STATE):
        text = mutate_json(raw, random)
        tensors[name] = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
    else:
        changed = bytearray(raw)
        changed[random.randrange(len(changed))] = random.randrange(256)
        tensors[name] = torch.frombuffer(changed, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    return save(tensors)


def _check_block(data: bytes, scratch: Path) -> None:
    """A file with the right names is refused or gives blocks with the shapes of its config."""
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size]
    kinds = {b"qweight": 0, b"nested_absmax": 2, b"quant_state": 3, b"SCB": 4}
    quantization = QUANTIZATIONS[next((kind for word, kind in kinds.items() if word in header), 0)]
    if (
        quantization.bits == 4
        and quantization.method == "gptq"
        and b'"shape":[8,' in header
        and b'"shape":[4,' not in header
    ):
        quantization = QUANTIZATIONS[1]
    (scratch / "config.json").write_text(json.dumps(_config() | {"quantization_config": quantization.to_config()}))
    (scratch / "model.safetensors").write_bytes(data)
    if not (scratch / "tokenizer.json").exists():
        write_tokenizer(scratch)
    checkpoint = open_checkpoint(scratch)
    checkpoint.fingerprint()
    for index in range(checkpoint.model_config.num_hidden_layers):
        checkpoint.read_block(index)


TARGETS = [
    Target("safetensors", _modules("safetensors_file"), _small_files, mutate_safetensors, _check_safetensors),
    Target("index", _modules("checkpoint", "safetensors_file"), _indexes, mutate_json, _check_index),
    Target("config", _modules(*CHECKPOINTS, *QUANTIZATION), _configs, mutate_json, _check_config),
    Target("block", _modules(*CHECKPOINTS, *QUANTIZATION), lambda: [*_packed_files()], mutate_block, _check_block),
]
