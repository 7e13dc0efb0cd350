"""The files of a packed checkpoint, each whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from runtime.architecture import HEAD_TENSORS
from runtime.checkpoint import Checkpoint
from runtime.errors import JobError
from runtime.files import sha256_of, whole_file, write_whole
from runtime.quantization import Quantization
from runtime.shard import open_shard


class Writer:
    """Writes one checkpoint: the embedding's shard, a shard a block, the head's shard, then the rest."""

    def __init__(self, output: Path, source: Checkpoint, quantization: Quantization):
        self.output = output
        self.source = source
        self.quantization = quantization
        self.shard_count = source.architecture.num_hidden_layers + 2

    def shard_name(self, position: int) -> str:
        """File name of shard `position`, counted from 0 (the embedding); block N is at N + 1."""
        return f"model-{position + 1:05d}-of-{self.shard_count:05d}.safetensors"

    def write_shard(self, position: int, tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
        """Write a shard and return its name and sha256."""
        path = self.output / self.shard_name(position)
        with whole_file(path) as temporary:
            try:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
            except SafetensorError as error:  # how the library reports a full disk
                raise JobError(f"{path} cannot be written: {error}.") from error
            digest = sha256_of(temporary)
        return path.name, digest

    def write_embedding(self) -> tuple[str, str]:
        """The first shard: the embedding, as it was."""
        name = "model.embed_tokens.weight"
        return self.write_shard(0, {name: self.source.read(name)})

    def write_head(self, repaired: dict[str, torch.Tensor] | None = None) -> tuple[str, str]:
        """The last shard: final norm and score head, as they were but for what was `repaired`."""
        tensors = {name: self.source.read(name) for name in ("model.norm.weight", *HEAD_TENSORS)} | (repaired or {})
        return self.write_shard(self.shard_count - 1, tensors)

    def write_index(self, shards: dict[str, str]) -> None:
        """`model.safetensors.index.json`, from the headers of the shards."""
        weight_map: dict[str, str] = {}
        total = 0
        for shard in sorted(shards):
            tensors = open_shard(self.output / shard).tensors
            weight_map.update(dict.fromkeys(tensors, shard))
            total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_whole(self.output / "model.safetensors.index.json", _json(index))

    def write_config(self) -> None:
        """`config.json` and `quantize_config.json`; what would run a checkpoint's own code is left out."""
        config = {key: value for key, value in self.source.config.items() if key != "auto_map"}
        config["architectures"] = ["Qwen2ForRewardModel"]
        config["quantization_config"] = self.quantization.to_config()
        write_whole(self.output / "config.json", _json(config))
        write_whole(self.output / "quantize_config.json", _json(self.quantization.to_config()))

    def copy_tokenizer(self) -> None:
        """Tokenizer files and chat template, byte for byte."""
        for file in self.source.tokenizer_files():
            write_whole(self.output / file.name, file.read_bytes())


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
