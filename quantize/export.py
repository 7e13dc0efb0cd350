"""A packed model for tensor-parallel engines: `python -m quantize.export MODEL --tensor-parallel 2 --output DIR`.

`export` is the story; `runtime.command` handles how a run can end.
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from quantize.padding import pad_block, padded_size
from quantize.plan import check_room
from quantize.writer import Writer
from runtime import parity_pairs, reference
from runtime.architecture import BLOCK_LINEARS, Architecture, block_prefix
from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.command import make_parser, run_command
from runtime.errors import PlanError
from runtime.files import open_locked, sync_directory, write_whole
from runtime.quantization import Quantization
from runtime.report import HTML_FILE, JSON_FILE, JUNIT_FILE
from runtime.sweep import read_blocks

DESCRIPTION = """\
Write a GPTQ model again with MLPs that split over several GPUs.

Engines with tensor parallelism give each GPU a share of every weight, and a share must be whole groups. Where it would
not be, intermediate_size is raised to the next multiple for which it is. The added weights are exactly 0, so every
score stays what it was.
"""

EXAMPLES = """\
examples:
  python -m quantize.export worldpm-72b-gptq-4bit --tensor-parallel 2 --output worldpm-72b-gptq-4bit-tp2
  python -m quantize.export worldpm-72b-gptq-4bit --tensor-parallel 8 --output worldpm-72b-gptq-4bit-tp8

A 72B in groups of 128 gets an intermediate_size of 29696 for 2, 4 and 8 GPUs alike.

exit status: 0 done; 2 an error that the message explains; 130 stopped, with nothing written
"""

CARD = """
## Exported for tensor parallelism

For {tensor_parallel} GPUs its `intermediate_size` is {after} in place of {before}. The added weights are exactly 0, so
every score stands, and so does every figure above.
"""

EVIDENCE = (JSON_FILE, HTML_FILE, JUNIT_FILE, parity_pairs.FILE_NAME, reference.FILE_NAME)
MANIFEST_FILE = "export.json"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, export, lambda _: "nothing was written.", argv)


def parse(argv: list[str] | None = None) -> Namespace:
    """Read the arguments.

    Raises:
        PlanError: one has a value that cannot be.
    """
    parser = make_parser("python -m quantize.export", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a GPTQ checkpoint: its directory or hub id")
    parser.add_argument("--tensor-parallel", type=int, required=True, metavar="N", help="GPUs that share every weight")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    arguments = parser.parse_args(argv)
    if arguments.tensor_parallel < 2:
        raise PlanError(f"--tensor-parallel is {arguments.tensor_parallel}; at least 2 was expected.")
    return arguments


def export(arguments: Namespace, console: Console) -> int:
    """The whole story: look, write beside the place, put it there."""
    output, tensor_parallel = arguments.output, arguments.tensor_parallel

    # 1. See whether it can be done, and whether there is anything to do.
    checkpoint = open_checkpoint(arguments.model)
    quantization = check_packed(checkpoint)
    before = checkpoint.architecture.intermediate_size
    after = padded_size(before, quantization.group_size, tensor_parallel)
    check_split(checkpoint, quantization, tensor_parallel)
    if after == before:
        raise PlanError(
            f"{checkpoint.name}: intermediate_size {before} splits over {tensor_parallel} GPUs as it is; serve it so."
        )
    wider = replace(
        checkpoint,
        config=checkpoint.config | {"intermediate_size": after},
        architecture=replace(checkpoint.architecture, intermediate_size=after),
    )
    check_place(output, checkpoint.nbytes() + added_bytes(checkpoint.architecture, wider.architecture, quantization))
    console.print(f"{checkpoint.name}: intermediate_size {before} becomes {after}, for {tensor_parallel} GPUs")

    # 2. Write it where nobody takes it for whole.
    partial = output.with_name(f".{output.name}.partial")
    with open_locked(output.with_name(f".{output.name}.lock"), "wb", output) as lock:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        try:
            partial.mkdir()
            shards = write_shards(Writer(partial, wider, quantization), checkpoint, console)
            sizes = {"tensor_parallel": tensor_parallel, "before": before, "after": after}
            write_evidence(checkpoint, partial, sizes)
            manifest = {"schema": 1, "model": checkpoint.name, "fingerprint": checkpoint.fingerprint()}
            write_whole(partial / MANIFEST_FILE, json.dumps(manifest | sizes | {"shards": shards}, indent=1) + "\n")
            open_checkpoint(partial)  # every header, shape and the head, as any reader will meet them

            # 3. Put it in its place.
            partial.rename(output)
            sync_directory(output.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)
    console.print(f"checkpoint  {output}")
    return 0


def check_packed(checkpoint: Checkpoint) -> Quantization:
    """Raise PlanError for weights that are not in groups which a GPU must have whole."""
    quantization = checkpoint.quantization
    if quantization is None:
        raise PlanError(f"{checkpoint.name} is not quantized, and 16-bit weights split anywhere; serve it as it is.")
    if quantization.method != "gptq":
        raise PlanError(
            f"{checkpoint.name} has {quantization.method} weights of bitsandbytes, which engines do not split by "
            "tensor; quantize with --method gptq."
        )
    return quantization


def check_split(checkpoint: Checkpoint, quantization: Quantization, tensor_parallel: int) -> None:
    """Raise PlanError where something else than the MLP does not split, as then no padding of it helps."""
    shape = checkpoint.architecture
    heads, keys, size = shape.num_attention_heads, shape.num_key_value_heads, max(quantization.group_size, 1)
    if heads % tensor_parallel or (keys % tensor_parallel and tensor_parallel % keys):
        fault = f"{heads} attention heads and {keys} key heads"
    elif shape.hidden_size // tensor_parallel % size:
        fault = f"o_proj's {shape.hidden_size} inputs in groups of {size}"
    else:
        return
    raise PlanError(
        f"{checkpoint.name}: {fault} do not split over {tensor_parallel} GPUs, whatever the MLP's width; choose "
        "another --tensor-parallel."
    )


def added_bytes(before: Architecture, after: Architecture, quantization: Quantization) -> int:
    """Bytes that a wider MLP adds in all blocks."""
    old, new = (
        sum(quantization.linear_bytes(*each.linear_shape(name)) for name in BLOCK_LINEARS) for each in (before, after)
    )
    return (new - old) * before.num_hidden_layers


def check_place(output: Path, nbytes: int) -> None:
    """Raise PlanError unless `output` can be made and its disk has room."""
    if output.exists():
        raise PlanError(f"{output} exists; remove it, or choose another --output.")
    check_room(output.absolute(), nbytes, "free some, or choose an --output on another disk")


def write_shards(writer: Writer, checkpoint: Checkpoint, console: Console) -> dict[str, str]:
    """Every tensor, index, configuration and tokenizer; sha256 by name of the shards."""
    count, size = checkpoint.architecture.num_hidden_layers, writer.source.architecture.intermediate_size
    shards = dict([writer.write_embedding()])
    blocks = read_blocks(checkpoint)
    for index, block in track(
        blocks, "padding", count, console=console, transient=True, disable=not console.is_terminal
    ):
        padded = pad_block(block, writer.quantization, size)
        name, digest = writer.write_shard(index + 1, {block_prefix(index) + key: padded[key] for key in padded})
        shards[name] = digest
    shards |= [writer.write_head()]
    writer.write_index(shards)
    writer.write_config()
    writer.copy_tokenizer()
    return shards


def write_evidence(checkpoint: Checkpoint, output: Path, sizes: dict[str, int]) -> None:
    """Reports and reference scores as they were, and a model card with what was done."""
    for name in EVIDENCE:
        if (checkpoint.directory / name).is_file():
            write_whole(output / name, (checkpoint.directory / name).read_bytes())
    card = checkpoint.directory / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {checkpoint.name}\n"
    write_whole(output / "README.md", text + CARD.format(**sizes))


if __name__ == "__main__":
    sys.exit(main())
