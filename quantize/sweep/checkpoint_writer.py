"""Write the files of a packed checkpoint, each of them atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.heads import LINEAR_HEAD
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.checkpoints.safetensors_file import open_safetensors_file
from runtime.common.files import sha256_of, write_file_atomically
from runtime.common.json_object import read_json_object
from runtime.common.safetensors_writer import write_safetensors


class CheckpointWriter:
    """Writes one checkpoint: a shard for the embedding, one per block, one for the head, then the other files.

    Attributes:
        source: the checkpoint whose embedding, head, config and tokenizer are copied.
        quantization: written to the config.
    """

    def __init__(self, output: Path, source: Checkpoint, quantization: QuantizationConfig):
        self.output = output
        self.source = source
        self.quantization = quantization
        self.shard_count = source.model_config.num_hidden_layers + 2

    def shard_name(self, position: int) -> str:
        """File name of shard `position`: 0 is the embedding, N + 1 is block N."""
        return f"model-{position + 1:05d}-of-{self.shard_count:05d}.safetensors"

    def write_shard(self, position: int, tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
        """Write a shard and return its file name and sha256.

        Raises:
            OSError: the file cannot be written.
        """
        path = self.output / self.shard_name(position)
        write_safetensors(path, tensors, {"format": "pt"})
        return path.name, sha256_of(path)

    def write_embedding(self) -> tuple[str, str]:
        """Copy the embedding to the first shard."""
        name = "model.embed_tokens.weight"
        return self.write_shard(0, {name: self.source.read(name)})

    def write_head(self, replacements: dict[str, torch.Tensor] | None = None) -> tuple[str, str]:
        """Copy final norm and score head to the last shard, with the tensors in `replacements` replaced."""
        names = ("model.norm.weight", *self.source.model_config.head_tensors)
        tensors = {name: self.source.read(name) for name in names}
        return self.write_shard(self.shard_count - 1, tensors | (replacements or {}))

    def write_index(self, shards: dict[str, str]) -> None:
        """Write `model.safetensors.index.json` from the headers of the shards.

        Args:
            shards: keyed by file name.
        """
        weight_map: dict[str, str] = {}
        total = 0
        for shard in sorted(shards):
            tensors = open_safetensors_file(self.output / shard).tensors
            weight_map.update(dict.fromkeys(tensors, shard))
            total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file_atomically(self.output / "model.safetensors.index.json", _json(index))

    def write_config(self) -> None:
        """Write `config.json` and `quantize_config.json`, without `auto_map`: it would run code from the checkpoint."""
        config, model_config = dict(self.source.config), self.source.model_config
        config.pop("auto_map", None)
        config["architectures"] = [model_config.architecture]
        if model_config.head_tensors == LINEAR_HEAD and "id2label" not in config:  # transformers' default is two labels
            config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        config |= self._in_both_spellings()
        config["scored_token"] = self.source.renderer().rule.name
        config["quantization_config"] = self.quantization.to_config()
        write_file_atomically(self.output / "config.json", _json(config))
        write_file_atomically(self.output / "quantize_config.json", _json(self.quantization.to_config()))

    def _in_both_spellings(self) -> dict[str, Any]:
        """What readers older and newer than transformers 5 look for under different names."""
        model_config, rope = self.source.model_config, self.source.config.get("rope_parameters") or {}
        dtype, theta = str(model_config.dtype).removeprefix("torch."), model_config.rope_theta
        rope_parameters = {"rope_type": "default"} | rope | {"rope_theta": theta}
        return {"dtype": dtype, "torch_dtype": dtype, "rope_theta": theta, "rope_parameters": rope_parameters}

    def copy_tokenizer(self) -> None:
        """Copy tokenizer files and chat template; `tokenizer.json` without truncation and padding, else unchanged."""
        for file in self.source.tokenizer_files():
            content = _without_limits(file) if file.name == "tokenizer.json" else file.read_bytes()
            write_file_atomically(self.output / file.name, content)


def _without_limits(file: Path) -> bytes:
    """A tokenizer without the truncation and padding that transformers stores: readers would cut or pad every text."""
    tokenizer = read_json_object(file)
    if not (tokenizer.get("truncation") or tokenizer.get("padding")):
        return file.read_bytes()
    return _json(tokenizer | {"truncation": None, "padding": None}).encode()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
