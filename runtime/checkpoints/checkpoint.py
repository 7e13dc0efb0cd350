"""Open a checkpoint and check that it is complete, without reading the block weights.

`open_checkpoint` parses `config.json`, the index and the header of each shard, compares the dtype and shape of each
tensor with the config, and checks that the score head is finite. Code and pickle files in a checkpoint are never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoints.heads import check_no_adapter, head_of_tensors
from runtime.checkpoints.model_config import ModelConfig, block_prefix
from runtime.checkpoints.quantization_config import NF4_QUANT_STATE, QuantizationConfig
from runtime.checkpoints.quantization_parsing import read_quantization_config
from runtime.checkpoints.safetensors_file import SafetensorsFile, TensorInfo, read_tensor
from runtime.checkpoints.shards import open_shards
from runtime.checkpoints.source import checkpoint_name, find_directory
from runtime.checkpoints.tensor_spec import check_layout, common_dtype, is_ignored, read_nf4_quant_state
from runtime.common.errors import CheckpointError, brief
from runtime.common.files import sha256_of
from runtime.common.hub import downloaded_commit
from runtime.common.json_object import read_json_object
from runtime.conversations.rendering import Renderer
from runtime.conversations.scoring_rule import END_OF_CONVERSATION

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; tensors are read on request.

    Attributes:
        notes: for the user, on what the config says and the tensors contradict.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    model_config: ModelConfig
    quantization: QuantizationConfig | None
    tensors: dict[str, TensorInfo]
    shards: tuple[SafetensorsFile, ...]
    notes: tuple[str, ...] = ()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to newly allocated CPU memory. Thread-safe.

        Raises:
            CheckpointError: the file was truncated since it was opened, or cannot be read.
        """
        return read_tensor(name, self.tensors[name])

    def read_block(self, index: int) -> dict[str, torch.Tensor]:
        """Read the tensors of block `index`, named without their `model.layers.N.` prefix.

        Raises:
            CheckpointError: see `read`; or a packed linear has values out of range.
        """
        prefix = block_prefix(index)
        block = {name.removeprefix(prefix): self.read(name) for name in self.tensors if name.startswith(prefix)}
        if quantizations := self.block_quantization(index):
            _check_packed_linears(block, self.model_config, quantizations, f"{self.name}: {prefix}")
        return block

    def block_quantization(self, index: int) -> dict[str, QuantizationConfig] | None:
        """The quantization of each linear of block `index`, by name; None if the checkpoint is unquantized."""
        return self.quantization.of_block(index) if self.quantization else None

    def tensor_nbytes(self, prefix: str = "") -> list[int]:
        """Return the stored bytes of each tensor whose name starts with `prefix`."""
        return [stored.nbytes for name, stored in self.tensors.items() if name.startswith(prefix)]

    def nbytes(self, prefix: str = "") -> int:
        """Return the stored bytes of all tensors whose names start with `prefix`."""
        return sum(self.tensor_nbytes(prefix))

    def renderer(self) -> Renderer:
        """Return a renderer with the checkpoint's tokenizer and chat template.

        Raises:
            CheckpointError: they are missing or damaged, or do not belong to the model.
        """
        config = self.model_config
        renderer = Renderer.from_directory(self.directory, config.max_position_embeddings, config.vocab_size)
        expected = self.config.get("scored_token")
        if expected is None and Path(self.name).name.casefold().startswith("worldpm"):
            expected = END_OF_CONVERSATION
        if expected not in (None, renderer.rule.name):
            raise CheckpointError(
                f"{self.directory}: by its chat template the score is read at {renderer.rule.description}, but this "
                f"model's is read at {brief(expected)}; restore its published chat template."
            )
        return renderer

    def tokenizer_files(self) -> list[Path]:
        """Return the tokenizer and chat template files that exist."""
        return [path for file in TOKENIZER_FILES if (path := self.directory / file).is_file()]

    @property
    def commit(self) -> str | None:
        """The commit on the hub that it was downloaded from; None if it is a local directory."""
        return downloaded_commit(self.directory)

    def fingerprint(self) -> str:
        """Return a SHA-256 over config.json, tokenizer, chat template, the shards' headers, and the score head's bytes.

        It is cheap, but does not cover the block weights. The head is included because fine-tuned checkpoints of one
        family have equal headers and different heads.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for file in self.tokenizer_files():
            digest.update(f"\n{file.name} {sha256_of(file)}".encode())
        for shard in sorted(self.shards, key=lambda shard: shard.file.name):
            digest.update(f"\n{shard.file.name} {shard.size} {shard.header_sha256}".encode())
        for name in self.model_config.head_tensors:
            digest.update(self.read(name).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a reward model: a directory, a hub id such as `Qwen/WorldPM-72B` or `Qwen/WorldPM-72B@main`, or `demo`.

    Raises:
        CheckpointError: it cannot be found or downloaded, is damaged, or is not a complete reward model.
    """
    directory = find_directory(source)
    check_no_adapter(directory)
    config, model_config, quantization = _read_config(directory / "config.json")
    shards = open_shards(directory)
    stored = {name: tensor for shard in shards for name, tensor in shard.tensors.items() if not is_ignored(name)}
    model_config, notes = _as_stored(model_config, quantization, stored, directory)
    check_layout(stored, model_config, quantization, str(directory))
    checkpoint = Checkpoint(
        directory, checkpoint_name(source), config, model_config, quantization, stored, shards, notes
    )
    for name in model_config.head_tensors:
        if not bool(checkpoint.read(name).isfinite().all()):
            raise CheckpointError(f"{directory}: {name} holds a NaN or an infinity; download or train the model again.")
    return checkpoint


def _as_stored(
    model_config: ModelConfig,
    quantization: QuantizationConfig | None,
    stored: Mapping[str, TensorInfo],
    directory: Path,
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Take head and dtype from the tensors; return the config and notes on a difference."""
    model_config = replace(model_config, head_tensors=head_of_tensors(stored, str(directory)))
    dtype = common_dtype(stored) if quantization is None else None
    if dtype in (None, model_config.dtype):
        return model_config, ()
    assert dtype is not None
    said, found = (str(each).removeprefix("torch.") for each in (model_config.dtype, dtype))
    return replace(model_config, dtype=dtype), (
        f"config.json says dtype {said}, but all tensors are {found} and are read as such",
    )


def read_config(source: str | Path) -> tuple[dict[str, Any], ModelConfig, QuantizationConfig | None]:
    """Read only the config, from any source that `open_checkpoint` accepts or from the path of a `config.json`.

    Returns:
        config.json as parsed, the model's shapes, and the quantization (None if unquantized).

    Raises:
        CheckpointError: the config cannot be found, downloaded or parsed, or the model is not supported.
    """
    path = Path(source)
    return _read_config(path if path.is_file() else find_directory(source, ("config.json",)) / "config.json")


def _read_config(path: Path) -> tuple[dict[str, Any], ModelConfig, QuantizationConfig | None]:
    config = read_json_object(path)
    try:
        model_config = ModelConfig.from_config(config, str(path))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # such as a string instead of a number
        raise CheckpointError(f"{path} has a value of the wrong type ({error}); download it again.") from error
    quantization_entry = config.get("quantization_config")
    if quantization_entry is None:
        return config, model_config, None
    if not isinstance(quantization_entry, dict):
        raise CheckpointError(f"{path}: quantization_config is {brief(quantization_entry)}; an object was expected.")
    return config, model_config, read_quantization_config(quantization_entry, str(path))


def _check_packed_linears(
    block: dict[str, torch.Tensor],
    model_config: ModelConfig,
    quantizations: Mapping[str, QuantizationConfig],
    where: str,
) -> None:
    """Check what headers do not show: the range of g_idx, the NF4 quant state, the order of LLM.int8 codes."""
    for linear, quantization in quantizations.items():
        shape = model_config.linear_shape(linear)
        if quantization.method == "gptq":
            g_idx, num_groups = block[f"{linear}.g_idx"], quantization.num_groups(shape[1])
            if int(g_idx.min()) < 0 or int(g_idx.max()) >= num_groups:
                raise CheckpointError(f"{where}{linear}.g_idx points outside the {num_groups} groups of scales.")
        elif quantization.method == "nf4":
            names = (NF4_QUANT_STATE, "weight.nested_absmax")
            try:
                read_nf4_quant_state(
                    {name: block[key] for name in names if (key := f"{linear}.{name}") in block}, shape
                )
            except CheckpointError as error:
                raise CheckpointError(f"{where}{linear}.{error}") from error
        elif int(block[f"{linear}.weight_format"]) != 0:
            raise CheckpointError(f"{where}{linear}.weight_format is not 0 (row order); save the model again.")
