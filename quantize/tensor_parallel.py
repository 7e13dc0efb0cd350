"""A GPTQ checkpoint written again with MLPs that split evenly over several GPUs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from quantize.job.resources import check_free_space
from quantize.padding import pad_block, padded_size
from quantize.sweep.checkpoint_writer import CheckpointWriter
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.checkpoints.model_config import block_prefix
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.common.errors import ConfigurationError
from runtime.common.files import open_locked, partial_path, scratch_directory, sync_directory, write_file_atomically
from runtime.evaluation.pairs import PARITY_PAIRS_FILE
from runtime.evaluation.reference_scores import REFERENCE_SCORES_FILE
from runtime.evaluation.report import JSON_FILE
from runtime.evaluation.report_files import HTML_FILE, JUNIT_FILE
from runtime.execution.block_loading import read_blocks

CARD_SECTION = """
## Exported for tensor parallelism

For {tensor_parallel} GPUs, `intermediate_size` was raised from {before} to {after}. The added weights are exactly 0, so
the scores and all figures above are unchanged.
"""

COPIED_FILES = (JSON_FILE, HTML_FILE, JUNIT_FILE, PARITY_PAIRS_FILE, REFERENCE_SCORES_FILE)
MANIFEST_FILE = "export.json"


def export_padded(model: str, tensor_parallel: int, output: Path, console: Console) -> None:
    """Write `model` to the new directory `output`, padded for `tensor_parallel` GPUs: whole or not at all.

    Raises:
        CheckpointError: the model is missing or damaged.
        ConfigurationError: it cannot or need not be padded, or `output` exists or has no room.
        JobError: another run writes `output`.
    """
    # 1. Validate the model, the output directory and the free space.
    checkpoint = open_checkpoint(model)
    padded = pad_config(checkpoint, tensor_parallel)
    before, after = (each.model_config.intermediate_size for each in (checkpoint, padded))
    console.print(f"{checkpoint.name}: intermediate_size {before} becomes {after}, for {tensor_parallel} GPUs")
    partial = partial_path(output)
    with open_locked(output.with_name(f".{output.name}.lock"), "wb", output) as lock:
        try:
            with scratch_directory(partial):
                check_output_and_space(output, checkpoint.nbytes() + added_bytes(checkpoint, padded))

                # 2. Write the checkpoint to a temporary directory.
                write_checkpoint(partial, checkpoint, padded, tensor_parallel, console)

                # 3. Rename it to the output directory.
                partial.rename(output)
                sync_directory(output.parent)
        finally:
            Path(lock.name).unlink(missing_ok=True)


def pad_config(checkpoint: Checkpoint, tensor_parallel: int) -> Checkpoint:
    """Return the checkpoint with the padded intermediate size in its config; its tensors are not padded.

    Raises:
        ConfigurationError: the weights are not GPTQ, padding is not needed, or padding the MLP does not suffice.
    """
    quantization = check_gptq(checkpoint)
    check_split(checkpoint, quantization, tensor_parallel)
    before = checkpoint.model_config.intermediate_size
    after = padded_size(before, common_group_size(quantization), tensor_parallel)
    if after == before:
        raise ConfigurationError(
            f"{checkpoint.name}: intermediate_size {before} already splits over {tensor_parallel} GPUs; serve this "
            "checkpoint."
        )
    return replace(
        checkpoint,
        config=checkpoint.config | {"intermediate_size": after},
        model_config=replace(checkpoint.model_config, intermediate_size=after),
    )


def check_gptq(checkpoint: Checkpoint) -> QuantizationConfig:
    """Return the quantization config. Raise ConfigurationError if the weights are not GPTQ."""
    quantization = checkpoint.quantization
    if quantization is None:
        raise ConfigurationError(
            f"{checkpoint.name} is not quantized, and 16-bit weights need no padding; serve it as it is."
        )
    if quantization.method != "gptq":
        raise ConfigurationError(
            f"{checkpoint.name} has bitsandbytes {quantization.method} weights, which engines do not split over GPUs; "
            "quantize with --method gptq."
        )
    return quantization


def common_group_size(quantization: QuantizationConfig) -> int:
    """The least common multiple of the group sizes of all linears; 1 if all linears have one group."""
    sizes = (quantization.group_size, *(each.quantization.group_size for each in quantization.overrides))
    return math.lcm(*(max(size, 1) for size in sizes))


def check_split(checkpoint: Checkpoint, quantization: QuantizationConfig, tensor_parallel: int) -> None:
    """Raise ConfigurationError if attention does not split over the GPUs, because padding the MLP cannot help then."""
    config, group_size = checkpoint.model_config, common_group_size(quantization)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % tensor_parallel or (kv_heads % tensor_parallel and tensor_parallel % kv_heads):
        problem = f"{heads} attention heads and {kv_heads} key-value heads"
    elif config.hidden_size // tensor_parallel % group_size:
        problem = f"o_proj's {config.hidden_size} inputs in groups of {group_size}"
    else:
        return
    raise ConfigurationError(
        f"{checkpoint.name}: {problem} do not split over {tensor_parallel} GPUs for any intermediate_size; choose "
        "another --tensor-parallel."
    )


def added_bytes(checkpoint: Checkpoint, padded: Checkpoint) -> int:
    """Bytes that padding adds to all blocks."""
    quantization = check_gptq(checkpoint)
    blocks = range(checkpoint.model_config.num_hidden_layers)
    old, new = (
        sum(quantization.block_bytes(each.model_config, index) for index in blocks) for each in (checkpoint, padded)
    )
    return new - old


def check_output_and_space(output: Path, nbytes: int) -> None:
    """Raise ConfigurationError if `output` exists or its disk has less than `nbytes` free."""
    if output.exists():
        raise ConfigurationError(f"{output} exists; remove it or choose another --output.")
    check_free_space(output.absolute(), nbytes, "free some space or choose an --output on another disk")


def write_checkpoint(
    directory: Path, checkpoint: Checkpoint, padded: Checkpoint, tensor_parallel: int, console: Console
) -> None:
    """Write shards, reports and manifest to `directory`, then validate the checkpoint."""
    shards = write_shards(CheckpointWriter(directory, padded, check_gptq(checkpoint)), checkpoint, console)
    sizes = {
        "tensor_parallel": tensor_parallel,
        "before": checkpoint.model_config.intermediate_size,
        "after": padded.model_config.intermediate_size,
    }
    copy_reports(checkpoint, directory, sizes)
    manifest = {"schema": 1, "model": checkpoint.name, "fingerprint": checkpoint.fingerprint()}
    text = json.dumps(manifest | sizes | {"shards": shards}, indent=1) + "\n"
    write_file_atomically(directory / MANIFEST_FILE, text)
    open_checkpoint(directory)  # validates every header and shape, and the head


def write_shards(writer: CheckpointWriter, checkpoint: Checkpoint, console: Console) -> dict[str, str]:
    """Write all tensors, index, config and tokenizer. Return the sha256 of each shard by file name."""
    count, size = checkpoint.model_config.num_hidden_layers, writer.source.model_config.intermediate_size
    shards = dict([writer.write_embedding()])
    blocks = read_blocks(checkpoint)
    for index, block in track(
        blocks, "padding", count, console=console, transient=True, disable=not console.is_terminal
    ):
        padded = pad_block(block, writer.quantization.of_block(index), size)
        name, digest = writer.write_shard(index + 1, {block_prefix(index) + key: padded[key] for key in padded})
        shards[name] = digest
    shards |= [writer.write_head()]
    writer.write_index(shards)
    writer.write_config()
    writer.copy_tokenizer()
    return shards


def copy_reports(checkpoint: Checkpoint, output: Path, sizes: dict[str, int]) -> None:
    """Copy reports and reference scores unchanged, and the model card with a section on the export."""
    for name in COPIED_FILES:
        if (checkpoint.directory / name).is_file():
            write_file_atomically(output / name, (checkpoint.directory / name).read_bytes())
    model_card = checkpoint.directory / "README.md"
    text = model_card.read_text(encoding="utf-8") if model_card.is_file() else f"# {checkpoint.name}\n"
    write_file_atomically(output / "README.md", text + CARD_SECTION.format(**sizes))
