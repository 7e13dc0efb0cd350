"""Find the safetensors files of a checkpoint, and compare them with its index."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.checkpoints.safetensors_file import SafetensorsFile, open_safetensors_file
from runtime.common.errors import CheckpointError, brief, printable
from runtime.common.json_object import read_json_object

LONGEST_FILE_NAME = 255  # bytes; the limit of common file systems
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def open_shards(directory: Path) -> tuple[SafetensorsFile, ...]:
    """Open `model.safetensors` if it exists (as transformers does), else the shards in the index.

    Raises:
        CheckpointError: a file is missing or damaged, or the index contradicts the shards.
    """
    if (directory / SINGLE_FILE).is_file():
        return (open_safetensors_file(directory / SINGLE_FILE),)
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
            f"{missing[0]}; download them again."
        )
    shards = tuple(open_safetensors_file(directory / file) for file in files)
    _check_index(weight_map, shards, index_path)
    return shards


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; download or write it again.")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0")
        if not plain or len(os.fsencode(printable(file))) > LONGEST_FILE_NAME:
            raise CheckpointError(
                f"{path} puts {name} in {brief(file)}; a .safetensors file beside the index was expected."
            )
    return weight_map


def _check_index(weight_map: dict[str, str], shards: tuple[SafetensorsFile, ...], path: Path) -> None:
    for shard in shards:
        for name in shard.tensors:
            if weight_map.get(name) != shard.file.name:
                listed = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise CheckpointError(f"{shard.file.name} holds {name}, but {path} {listed}; download both again.")
    held = {name for shard in shards for name in shard.tensors}
    absent = sorted(weight_map.keys() - held)
    if absent:
        raise CheckpointError(
            f"{path} lists {absent[0]} in {weight_map[absent[0]]}, which does not hold it "
            f"({len(absent)} such tensors); download both again."
        )
