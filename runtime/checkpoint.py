"""A checkpoint on disk: opened without reading its weights, refused early if it is not whole.

Opening parses `config.json`, the index and every shard's header, compares each tensor's dtype and shape with
what the config promises, and reads the score head alone, to know that it is finite. Code and pickles that a
checkpoint may carry are never touched.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.architecture import BLOCK_LINEARS, HEAD_TENSORS, Architecture, block_prefix
from runtime.errors import CheckpointError
from runtime.hub import download, is_hub_id
from runtime.layout import check_layout, is_ignored
from runtime.packing import nf4_state
from runtime.quantization import NF4_STATE, Quantization
from runtime.shard import Shard, StoredTensor, open_shard, read_tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
    """A checked checkpoint; tensors are read on request."""

    directory: Path
    name: str
    config: dict[str, Any]
    architecture: Architecture
    quantization: Quantization | None
    tensors: dict[str, StoredTensor]
    shards: tuple[Shard, ...]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in memory of its own. Safe to call from several threads at once.

        Raises:
            CheckpointError: the file no longer holds all of it, or the disk fails.
        """
        return read_tensor(name, self.tensors[name])

    def read_block(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of block `index`, named without their `model.layers.N.` prefix.

        Raises:
            CheckpointError: as `read`, or a packed linear contradicts itself.
        """
        prefix = block_prefix(index)
        block = {name.removeprefix(prefix): self.read(name) for name in self.tensors if name.startswith(prefix)}
        if self.quantization is not None:
            _check_packed(block, self.architecture, self.quantization, f"{self.name}: {prefix}")
        return block

    def sizes(self, prefix: str = "") -> list[int]:
        """Stored bytes of each tensor whose name starts with `prefix`."""
        return [stored.nbytes for name, stored in self.tensors.items() if name.startswith(prefix)]

    def nbytes(self, prefix: str = "") -> int:
        """Stored bytes of those tensors together."""
        return sum(self.sizes(prefix))

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's and the chat template's files that are there."""
        return [path for file in TOKENIZER_FILES if (path := self.directory / file).is_file()]

    def fingerprint(self) -> str:
        """sha256 over the config, each shard's name, size and header, and the score head's bytes.

        Cheap, and no proof of the block weights; but checkpoints of one family, alike in every header, differ in
        the head that each was fine-tuned with.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for shard in sorted(self.shards, key=lambda shard: shard.file.name):
            digest.update(f"\n{shard.file.name} {shard.size} {shard.header_sha256}".encode())
        for name in HEAD_TENSORS:
            digest.update(self.read(name).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a reward model: a directory, a hub id such as `Qwen/WorldPM-72B`, or `demo`.

    Raises:
        CheckpointError: it cannot be found or fetched, is damaged, or is not a whole reward model.
    """
    directory = _find(source)
    config, architecture, quantization = _read_config(directory / "config.json")
    shards = _open_shards(directory)
    stored = {name: tensor for shard in shards for name, tensor in shard.tensors.items() if not is_ignored(name)}
    check_layout(stored, architecture, quantization, str(directory))
    checkpoint = Checkpoint(directory, _name(source), config, architecture, quantization, stored, shards)
    for name in HEAD_TENSORS:
        if not bool(checkpoint.read(name).isfinite().all()):
            raise CheckpointError(f"{directory}: {name} holds a NaN or an infinity; fetch or train the model again.")
    return checkpoint


def read_architecture(source: str | Path) -> tuple[dict[str, Any], Architecture, Quantization | None]:
    """The config alone, from anything `open_checkpoint` takes or from the path of a `config.json`.

    Raises:
        CheckpointError: it cannot be found or fetched, or describes no model that the kit runs.
    """
    path = Path(source)
    return _read_config(path if path.is_file() else _find(source, files=("config.json",)) / "config.json")


def _find(source: str | Path, files: tuple[str, ...] | None = None) -> Path:
    if source == "demo":
        from runtime.demo import (
            demo_directory,
        )  # building it writes a checkpoint, opening one needs no builder

        return demo_directory()
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the directory of the checkpoint.")
    if isinstance(source, str) and is_hub_id(source):
        return download(source) if files is None else download(source, files)
    raise CheckpointError(f"{path} does not exist; name a checkpoint's directory, a hub id (owner/name) or `demo`.")


def _name(source: str | Path) -> str:
    path = Path(source)
    return path.resolve().name if path.is_dir() else str(source)


def _read_config(path: Path) -> tuple[dict[str, Any], Architecture, Quantization | None]:
    config = _read_json(path)
    try:
        architecture = Architecture.from_config(config, str(path))
    except (TypeError, ValueError, AttributeError) as error:  # text for a number, a list for an object
        raise CheckpointError(f"{path} has a value of the wrong kind ({error}); fetch it again.") from error
    described = config.get("quantization_config")
    if described is None:
        return config, architecture, None
    if not isinstance(described, dict):
        raise CheckpointError(f"{path}: quantization_config is {described!r:.80}; an object was expected.")
    return config, architecture, Quantization.from_config(described, str(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} the directory of a checkpoint?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch or write it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a JSON object was expected.")
    return content


def _open_shards(directory: Path) -> tuple[Shard, ...]:
    """`model.safetensors` where there is one, as transformers prefers it, else what the index lists."""
    if (directory / SINGLE_FILE).is_file():
        return (open_shard(directory / SINGLE_FILE),)
    index_path = directory / INDEX_FILE
    if not index_path.is_file():
        pickles = any(directory.glob("*.bin"))
        remedy = "its *.bin pickles are never read, convert them" if pickles else "copy the weights there"
        raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; {remedy}.")
    weight_map = _read_weight_map(index_path)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of the {len(files)} shards in its index, the first being "
            f"{missing[0]}; fetch them again."
        )
    shards = tuple(open_shard(directory / file) for file in files)
    _check_index(weight_map, shards, index_path)
    return shards


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; fetch or write it again.")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0")
        if not plain:
            raise CheckpointError(f"{path} puts {name} in {file!r}; a .safetensors file beside the index was expected.")
    return weight_map


def _check_index(weight_map: dict[str, str], shards: tuple[Shard, ...], path: Path) -> None:
    for shard in shards:
        for name in shard.tensors:
            if weight_map.get(name) != shard.file.name:
                listed = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise CheckpointError(f"{shard.file.name} holds {name}, but {path} {listed}; fetch both again.")
    held = {name for shard in shards for name in shard.tensors}
    absent = sorted(weight_map.keys() - held)
    if absent:
        raise CheckpointError(
            f"{path} lists {absent[0]} in {weight_map[absent[0]]}, which does not hold it "
            f"({len(absent)} such tensors); fetch both again."
        )


def _check_packed(
    block: dict[str, torch.Tensor], architecture: Architecture, quantization: Quantization, where: str
) -> None:
    """What headers cannot show: a group index that points nowhere, or values laid out another way."""
    for linear in BLOCK_LINEARS:
        shape = architecture.linear_shape(linear)
        if quantization.method == "gptq":
            g_idx, groups = block[f"{linear}.g_idx"], quantization.groups(shape[1])
            if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
                raise CheckpointError(f"{where}{linear}.g_idx points outside the {groups} groups of scales.")
        elif quantization.method == "nf4":
            names = (NF4_STATE, "weight.nested_absmax")
            try:
                nf4_state({name: block[key] for name in names if (key := f"{linear}.{name}") in block}, shape)
            except CheckpointError as error:
                raise CheckpointError(f"{where}{linear}.{error}") from error
        elif int(block[f"{linear}.weight_format"]) != 0:
            raise CheckpointError(f"{where}{linear}.weight_format is not 0 (row order); save the model again.")
